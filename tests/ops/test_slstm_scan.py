"""slstm_scan: against its equation, mode against mode, the kernel against plain PyTorch, and what it refuses."""

import importlib
import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from conftest import assert_close, backends_under_test
from minrnn.ops import SLSTMState, slstm_scan
from parity import check_chunks, check_resets, compare

BACKENDS = backends_under_test()
SHAPES = [(2, 9, 1, 1), (3, 21, 2, 5), (9, 11, 3, 16), (1, 5, 1, 70)]  # B, T, N, d: remainders of rows and of columns


def inputs(batch, time, heads, size, dtype=torch.float64):
    """x of the four gates, R and b."""
    torch.manual_seed(1)
    series = [2 * torch.randn(batch, time, heads * size, dtype=dtype) for _ in range(4)]
    weights = torch.randn(heads, size, 4, size, dtype=dtype) / size**0.5, torch.randn(4, heads * size, dtype=dtype)
    return [x.requires_grad_() for x in (*series, *weights)]


def some_state(batch, width, dtype=torch.float64):
    h, c, m = (torch.randn(batch, width, dtype=dtype) for _ in range(3))
    return SLSTMState(h.requires_grad_(), c.requires_grad_(), (torch.rand_like(h) + 1).requires_grad_(), m)


def define(into, forget, candidate, output, recurrent, bias, state, reset):
    """The equation without any stabilisation: sums in their own unit, one step and one sequence at a time."""
    heads, size = recurrent.shape[:2]
    rows = []
    for b in range(len(into)):
        h, c, n = torch.zeros(3, into.shape[2], dtype=into.dtype)
        if state is not None:
            h, c, n = state.h[b], state.c[b] * state.m[b].exp(), state.n[b] * state.m[b].exp()
        for t in range(into.shape[1]):
            if reset is not None and reset[b, t]:
                h, c, n = torch.zeros(3, into.shape[2], dtype=into.dtype)
            gates = torch.stack([x[b, t] for x in (into, forget, candidate, output)]) + bias
            past = [[h.view(heads, size)[k] @ recurrent[k, :, g] for k in range(heads)] for g in range(4)]
            i, f, z, o = gates + torch.stack([torch.cat(row) for row in past])
            keep = 1 / (1 + torch.exp(-f))
            c, n = keep * c + i.exp() * z.tanh(), keep * n + i.exp()
            h = c / n / (1 + torch.exp(-o))
            rows.append(h)
    return torch.stack(rows).view(into.shape)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_equation(backend, shape, with_reset, given_state):
    args = inputs(*shape)
    state = some_state(shape[0], args[0].shape[2]) if given_state else None
    reset = torch.rand(shape[:2]) < 0.3 if with_reset else None
    y, last = slstm_scan(*args, state, reset=reset, backend=backend)
    sources = [*args, *(state[:3] if given_state else [])]
    compare((y, ()), (define(*args, state, reset), ()), sources, y.dtype)
    assert_close(last.h, y[:, -1], y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_plain_pytorch(shape, dtype):
    """Values, the whole last state, and all gradients through both."""
    args, state, reset = inputs(*shape, dtype), some_state(shape[0], shape[2] * shape[3], dtype), None
    for reset in (None, torch.rand(shape[:2]) < 0.3):
        mine, theirs = (slstm_scan(*args, state, reset=reset, backend=b) for b in (None, "reference"))
        compare(mine, theirs, [*args, *state[:3]], dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 19])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_chunked_and_stepped_agree(backend, time):
    series = torch.randn(2, time, 4 * 6, dtype=torch.float64, requires_grad=True)
    weights = inputs(2, 1, 2, 3)[4:]

    def run(x, state, *, reset=None):
        return slstm_scan(*x.chunk(4, -1), *weights, state, reset=reset, backend=backend)

    check_chunks(run, series, some_state(2, 6), weights)
    check_resets(run, series, weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gate_is_too_large_and_no_rounding_becomes_a_decay(backend):
    """exp(i) overflows; and each step forgets less than the unit's logarithm can resolve."""
    args, time = [x.detach().float() for x in inputs(1, 200, 1, 4)], torch.arange(200)
    args[0] = torch.where(time == 0, 2000.0, 1994.0)[None, :, None].expand(1, 200, 4)
    args[1], args[4], args[5] = torch.full((1, 200, 4), 9.9), torch.zeros(1, 4, 4, 4), torch.zeros(4, 4)
    mine, _ = slstm_scan(*args, backend=backend)
    exact, _ = slstm_scan(*(x.double() for x in args), backend="reference")
    assert_close(mine, exact, torch.float32)
    wild = [x * 300 for x in inputs(2, 40, 2, 3, torch.float32)[:4]]
    y, last = slstm_scan(*wild, *inputs(2, 40, 2, 3, torch.float32)[4:], backend=backend)
    assert all(x.isfinite().all() for x in (y, *last, *torch.autograd.grad(y.sum(), wild)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype):
    args, weight = inputs(13, 40, 2, 9, dtype), torch.randn(13, 40, 18, dtype=dtype)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, last = slstm_scan(*args)
        found.append([y, *last, *torch.autograd.grad((y * weight).sum(), args)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for rows in (slice(0, 1), slice(2, 7)):
        part = [x[rows] for x in args[:4]]
        y, last = slstm_scan(*part, *args[4:])
        grads = torch.autograd.grad((y * weight[rows]).sum(), part)
        assert all(torch.equal(a, b[rows]) for a, b in zip([y, *last, *grads], found[0], strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_both_orders(backend):
    args, (h, c, n, m) = inputs(2, 3, 2, 2), some_state(2, 4)
    reset = torch.tensor([[False, False, True], [True, False, False]])

    def run(*sources):
        y, last = slstm_scan(*sources[:6], SLSTMState(*sources[6:], m), reset=reset, backend=backend)
        return y, last.h, last.c / last.n  # c and n alone are in a unit that is a constant to autograd

    assert torch.autograd.gradcheck(run, (*args, h, c, n), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*args, h, c, n), fast_mode=True)


def test_torch_func():
    args = [x.detach() for x in inputs(3, 4, 2, 2)]

    def loss(x, backend=None):
        return slstm_scan(x, *args[1:], backend=backend)[0].sin().sum()

    def oracle(x):
        return loss(x, "reference")

    assert_close(grad(loss)(args[0]), grad(oracle)(args[0]), torch.float64)
    assert_close(jvp(loss, (args[0],), (args[1],))[1], jvp(oracle, (args[0],), (args[1],))[1], torch.float64)
    mapped = vmap(lambda *x: slstm_scan(*(one[None] for one in x), *args[4:])[0][0])(*args[:4])
    assert_close(mapped, slstm_scan(*args)[0], torch.float64)


@pytest.mark.skipif("native" not in BACKENDS, reason="the operator is that of the kernel")
def test_compile_is_one_graph_for_all_lengths():
    operator, reset = importlib.import_module("minrnn.ops.slstm")._fused, torch.rand(2, 9) < 0.3

    def run(*sources):
        y, h, *_ = operator(*sources)
        return y.sin().sum() + h.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for time in (5, 9):
        args, rest = inputs(2, time, 2, 3), (*some_state(2, 6), reset[:, :time])
        for a, b in zip(*(torch.autograd.grad(f(*args, *rest), args) for f in (compiled, run)), strict=True):
            assert_close(a, b, torch.float64)


@pytest.mark.skipif("native" not in BACKENDS, reason="the operator is that of the kernel")
def test_opcheck():
    args, reset = inputs(2, 9, 2, 3), torch.rand(2, 9) < 0.3
    torch.library.opcheck(torch.ops.minrnn.slstm.default, (*args, *some_state(2, 6), reset))


def test_16_bit_inputs_have_a_float32_state():
    args = inputs(3, 20, 2, 4, torch.bfloat16)
    y, last = slstm_scan(*args)
    wide, exact = slstm_scan(*(x.double() for x in args))
    assert y.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in last)
    assert_close(y, wide, torch.bfloat16)
    assert_close(last.c / last.n, exact.c / exact.n, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_recurrence_alone(backend):
    args = inputs(2, 9, 2, 5, torch.float32)
    y, _ = slstm_scan(*args, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = slstm_scan(*args, backend=backend)
    assert torch.equal(y, cast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    args, copies = inputs(4, 6, 2, 3), inputs(4, 6, 2, 3)
    for view in (lambda x: x.transpose(0, 1), lambda x: x[::2, 1::3], lambda x: x[:1].expand(3, -1, -1)):
        mine = slstm_scan(*map(view, args[:4]), *args[4:], backend=backend)
        theirs = slstm_scan(*(view(x).contiguous() for x in args[:4]), *args[4:], backend=backend)
        compare(mine, theirs, args, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


def test_the_beginning():
    """No step and no sequence; None is the state of the beginning."""
    args = inputs(3, 4, 2, 3)
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    start = SLSTMState(zeros, zeros, zeros, torch.full_like(zeros, -math.inf))
    compare(slstm_scan(*args, start), slstm_scan(*args), args, torch.float64)
    y, last = slstm_scan(*(x[:, :0] for x in args[:4]), *args[4:], start)
    assert y.shape == (3, 0, 6) and all(torch.equal(a, b) for a, b in zip(last, start, strict=True))
    y, last = slstm_scan(*(x[:0] for x in args[:4]), *args[4:])
    assert y.shape == (0, 4, 6) and all(x.shape == (0, 6) for x in last)


@pytest.mark.parametrize(
    ("error", "message", "place", "change"),
    [
        (TypeError, "into must be a torch.Tensor", 0, lambda x: x.tolist()),
        (ValueError, "into must be (B, T, D)", 0, lambda x: x[0]),
        (TypeError, "into must be float32", 0, lambda x: x.long()),
        (ValueError, "forget must be (B, T, D)", 1, lambda x: x[:, 1:]),
        (TypeError, "candidate must have the dtype", 2, lambda x: x.float()),
        (TypeError, "output must be a torch.Tensor", 3, lambda x: None),
        (ValueError, "recurrent must be (N, d, 4, d)", 4, lambda x: x[:1]),
        (ValueError, "recurrent must be (N, d, 4, d)", 4, lambda x: x.new_zeros(())),
        (TypeError, "recurrent must be float32", 4, lambda x: x.to(torch.complex64)),
        (ValueError, "bias must be (4, D)", 5, lambda x: x[:3]),
        (ValueError, "initial.c must be (B, D)", 6, lambda x: x._replace(c=x.c[1:])),
        (TypeError, "initial.m must be a torch.Tensor", 6, lambda x: x._replace(m=0.0)),
        (TypeError, "initial.n must be float32", 6, lambda x: x._replace(n=x.n.long())),
        (ValueError, "reset must be (B, T)", 7, lambda x: x[:, 1:]),
        (TypeError, "reset must be torch.bool", 7, lambda x: x.long()),
    ],
)
def test_bad_arguments_are_named(error, message, place, change):
    args = [*inputs(2, 4, 2, 3), some_state(2, 6), torch.zeros(2, 4, dtype=torch.bool)]
    args[place] = change(args[place])
    with pytest.raises(error) as raised:
        slstm_scan(*args[:7], reset=args[7])
    assert f"slstm_scan: {message}" in str(raised.value)


def test_a_backend_that_is_none_is_named():
    with pytest.raises(ValueError, match="slstm_scan: backend must be one of"):
        slstm_scan(*inputs(1, 1, 1, 1), backend="cuda")
