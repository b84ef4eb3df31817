"""The selective scan: against a loop over its equation, backend against backend, and what PyTorch asks of an op."""

import pytest
import torch

from conftest import assert_close, backends_under_test
from minrnn.ops import selective, selective_scan
from parity import check_chunks, check_resets, compare

BACKENDS = [*backends_under_test(), "reference"]
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not under test")


def arguments(batch, time, width, states, dtype=torch.float64):
    """(u, delta, A, B, C, D, initial) and a bias; A of either sign."""
    torch.manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    args = [draw(batch, time, width), draw(batch, time, width).abs() / 2, (draw(width, states) - 1).clamp(max=0.05)]
    args += [draw(batch, time, states), draw(batch, time, states), draw(width), draw(batch, width, states)]
    return [x.to(dtype).requires_grad_() for x in args], draw(width).to(dtype).requires_grad_()


def scan(args, bias=None, reset=None, backend="native"):
    y, last = selective_scan(*args, reset=reset, bias=bias, backend=backend)
    return y, last


def define(args, bias, reset):
    """One step, one sequence at a time."""
    u, delta, A, B, C, D, initial = args
    delta = delta if bias is None else torch.log(1 + torch.exp(delta + bias))
    outputs, lasts = [], []
    for b in range(len(u)):
        h, rows = initial[b], []
        for t in range(u.shape[1]):
            h = torch.zeros_like(h) if reset is not None and reset[b, t] else h
            h = torch.exp(delta[b, t, :, None] * A) * h + torch.outer(delta[b, t] * u[b, t], B[b, t])
            rows.append(h @ C[b, t] + D * u[b, t])
        outputs.append(torch.stack(rows))
        lasts.append(h)
    return torch.stack(outputs), torch.stack(lasts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("states", [1, 5, 16])
def test_it_is_its_equation(backend, resets, biased, states):
    (args, bias), reset = arguments(3, 35, 7, states), torch.rand(3, 35) < 0.1 if resets else None
    bias = bias if biased else None
    inputs = [*args, bias] if biased else args
    compare(scan(args, bias, reset, backend), define(args, bias, reset), inputs, torch.float64)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(2, 70, 1, 1), (1, 33, 130, 5), (3, 64, 300, 16), (2, 9, 16, 64), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2),
     (2, 4, 3, 0)],
)  # fmt: skip
def test_any_shape(backend, dtype, shape):
    (args, bias), reset = arguments(*shape, dtype), torch.rand(shape[:2]) < 0.1
    exact = [x.detach().double().requires_grad_() for x in (*args, bias)]
    found, expected = scan(args, bias, reset, backend), scan(exact[:7], exact[7], reset, "reference")
    assert found[0].dtype == found[1].dtype == dtype
    grads = []
    for (y, last), inputs in ((found, (*args, bias)), (expected, exact)):
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in (y, last)]
        total = (y * weights[0]).sum() + (last * weights[1]).sum()
        grads.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        scale = b.abs().max().clamp(min=1) if b.numel() else 1
        assert_close(a / scale, b / scale, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", [0, 1, 2, 32, 33, 63])
def test_whole_chunked_and_stepped_agree(backend, time):
    args, bias = arguments(2, time, 5, 3)
    u, delta, A, B, C, D, initial = args
    x = torch.cat([u, delta, B, C], 2).detach().requires_grad_()

    def run(x, state, *, reset=None):
        u, delta, B, C = x.split([5, 5, 3, 3], 2)
        return selective_scan(u, delta, A, B, C, D, state, reset=reset, bias=bias, backend=backend)

    check_chunks(run, x, initial, [A, D, bias])
    check_resets(run, x, [A, D, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_skip_and_state(backend):
    args, _ = arguments(2, 9, 3, 2)
    zeros = [*args[:5], torch.zeros(3).double(), torch.zeros(2, 3, 2).double()]
    compare(scan(args[:5], backend=backend), scan(zeros, backend=backend), args[:5], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_in_float32(backend):
    time = 2048 if backend == "native" else 256
    args, bias = arguments(1, time, 16, 16, torch.float32)
    with torch.no_grad():
        args[1].mul_(4).sub_(6)  # softplus of it is between 1e-3 and 1
        args[2].copy_(-torch.arange(1.0, 17))
    exact = [x.detach().double().requires_grad_() for x in (*args, bias)]
    found, expected = scan(args, bias, None, backend), scan(exact[:7], exact[7], None, "reference")
    grads = torch.autograd.grad(found[0].sum(), (*args, bias))
    exact_grads = torch.autograd.grad(expected[0].sum(), exact)
    for a, b in zip((*found, *grads), (*expected, *exact_grads), strict=True):
        scale = b.abs().max().clamp(min=1)
        assert_close(a / scale, b / scale, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_over_the_whole_range_of_the_type(backend, dtype):
    """exp(ΔA) alone: y = exp(ΔA) h, to a few units in the last place."""
    low, high = (-80, 80) if dtype == torch.float32 else (-700, 700)
    rates = torch.linspace(low, high, 2001, dtype=dtype)[:, None]
    one, zero = torch.ones(1, 1, 2001, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    y, _ = selective_scan(one, one, rates, zero, zero + 1, None, one.view(1, 2001, 1), backend=backend)
    expected = rates[:, 0].double().exp()
    bound = 4 + abs(high)  # the argument itself is rounded once
    assert ((y[0, 0].double() / expected - 1).abs() <= bound * torch.finfo(dtype).eps).all()
    rates = torch.tensor([[-torch.inf], [-1e30], [-1e3], [torch.nan], [0.0]], dtype=dtype)
    y, _ = selective_scan(*(x[..., :5] for x in (one, one)), rates, zero, zero + 1, None, one[0, :, :5, None],
                          backend=backend)  # fmt: skip
    assert (y[0, 0, :3].abs() < 1e-37).all() and y[0, 0, 3].isnan() and y[0, 0, 4] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_over_the_whole_range(backend):
    x = torch.cat([torch.linspace(-80, 80, 2001), torch.tensor([-1e4, 1e4])])[None, None].requires_grad_()
    one = torch.ones(1, 1, 1)
    y, _ = selective_scan(
        torch.ones_like(x), x, torch.zeros(2003, 1), one, one, bias=torch.zeros(2003), backend=backend
    )
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double()
    expected = exact.clamp(min=0) + (-exact.abs()).exp().log1p()
    assert_close(y, expected, torch.float32)
    assert_close(slope, exact.sigmoid(), torch.float32)
    small = (x > -80) & (x < 0)
    assert ((y[small] / expected[small] - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_is_computed_in_float32(backend, dtype):
    args, bias = arguments(2, 40, 5, 4, dtype)
    wide = [x.detach().float() for x in args]
    y, last = scan(args, bias, None, backend)
    expected, state = scan(wide, bias.detach().float(), None, backend)
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype)) and torch.equal(last, state)
    grads = torch.autograd.grad(y.sum() + last.sum(), (*args, bias))
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


@NATIVE
def test_bits_do_not_depend_on_threads_or_batch():
    args, bias = arguments(5, 150, 300, 5, torch.float32)

    def grads(threads, rows):
        torch.set_num_threads(threads)
        u, delta, A, B, C, D, initial = args
        y, last = scan([u[rows], delta[rows], A, B[rows], C[rows], D, initial[rows]], bias)
        return [y, last, *torch.autograd.grad((y * y).sum() + last.sum(), (*args, bias))]

    one, three, alone = grads(1, slice(None)), grads(3, slice(None)), grads(2, slice(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert all(torch.equal(a[0], b[3]) for a, b in zip(alone[:2], one[:2], strict=True))
    for i in (2, 3, 5, 6, 8):  # u, delta, B, C, initial
        assert torch.equal(alone[i][3], one[i][3])


@NATIVE
def test_memory_holds_no_state_of_every_step():
    batch, time, width, states = 1, 512, 64, 16
    u = torch.randn(batch, time, width, requires_grad=True)
    B, C = torch.randn(2, batch, time, states)
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(u, u.detach().abs(), -torch.rand(width, states), B, C)
    assert max(sizes) <= batch * time * width


@NATIVE
def test_any_strides():
    args, bias = arguments(3, 20, 6, 4)
    strided = [x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach().repeat_interleave(2)[::2] for x in args]
    inputs = [x.requires_grad_() for x in strided]
    (y, last), (expected, state) = scan(inputs, bias), scan(args, bias)
    assert torch.equal(y, expected) and torch.equal(last, state)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_both_orders(backend):
    (args, bias), reset = arguments(2, 4, 3, 2), torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)

    def function(*inputs):
        return scan(inputs[:7], inputs[7], reset, backend)

    assert torch.autograd.gradcheck(function, (*args, bias))
    assert torch.autograd.gradgradcheck(function, (*args, bias))


@NATIVE
def test_many_gradients_at_once_are_refused_as_by_the_other_scans():
    args, _ = arguments(2, 4, 3, 2)
    y = selective_scan(*args)[0]
    with pytest.raises(NotImplementedError, match="selective_scan: .* torch.func.jacrev"):
        torch.autograd.grad(y, args[0], torch.ones(3, *y.shape, dtype=y.dtype), is_grads_batched=True)


@NATIVE
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_good_operator(biased):
    args, bias = arguments(2, 35, 5, 3)
    bias = bias if biased else None
    torch.library.opcheck(torch.ops.minrnn.selective_scan, (*args, None, bias))
    operator = selective._fused
    compiled = torch.compile(lambda *inputs: operator(*inputs), fullgraph=True)
    inputs = [*args, bias] if biased else args
    compare(compiled(*args, None, bias), operator(*args, None, bias), inputs, torch.float64)


@NATIVE
def test_torch_func():
    args, bias = arguments(3, 6, 4, 2)
    args = [x.detach() for x in args]

    def single(u, delta, B, C, initial):
        y, _ = scan([u[None], delta[None], args[2], B[None], C[None], args[5], initial[None]], bias.detach())
        return y[0]

    series = (args[0], args[1], args[3], args[4], args[6])
    assert_close(torch.func.vmap(single)(*series), scan(args, bias)[0], torch.float64)
    grads = torch.func.vmap(torch.func.grad(lambda *x: single(*x).sum()))(*series)
    u = args[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(scan([u, *args[1:]], bias.detach())[0].sum(), u)
    assert_close(grads, expected, torch.float64)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "u must be a torch.Tensor, got list", {"u": []}),
        (ValueError, r"u must be \(B, T, E\) = three dimensions, got \(2, 4\)", {"u": torch.zeros(2, 4)}),
        (ValueError, r"delta must be \(B, T, E\) = \(2, 4, 3\), got \(2, 4, 1\)", {"delta": torch.zeros(2, 4, 1)}),
        (ValueError, r"A must be \(E, N\) = two dimensions, the first 3, got \(2, 5\)", {"A": torch.zeros(2, 5)}),
        (ValueError, r"A must be \(E, N\) = .*, got \(3,\)", {"A": torch.zeros(3)}),
        (ValueError, r"B must be \(B, T, N\) = \(2, 4, 5\), got \(2, 4, 3\)", {"B": torch.zeros(2, 4, 3)}),
        (ValueError, r"C must be \(B, T, N\) = \(2, 4, 5\), got \(4, 5\)", {"C": torch.zeros(4, 5)}),
        (ValueError, r"D must be \(E,\) = \(3,\), got \(5,\)", {"D": torch.zeros(5)}),
        (ValueError, r"bias must be \(E,\) = \(3,\), got \(1, 3\)", {"bias": torch.zeros(1, 3)}),
        (ValueError, r"initial must be \(B, E, N\) = \(2, 3, 5\), got \(2, 5, 3\)", {"initial": torch.zeros(2, 5, 3)}),
        (ValueError, "A must be on cpu as the input is, got meta", {"A": torch.zeros(3, 5, device="meta")}),
        (
            ValueError,
            "reset must be on cpu as the input is, got meta",
            {"reset": torch.zeros(2, 4, device="meta").bool()},
        ),
        (ValueError, r"reset must be \(B, T\) = \(2, 4\), got \(4, 2\)", {"reset": torch.zeros(4, 2).bool()}),
        (TypeError, "reset must be torch.bool, got torch.int64", {"reset": torch.zeros(2, 4).long()}),
        (TypeError, "A must be float32, .* got torch.complex64", {"A": torch.zeros(3, 5, dtype=torch.complex64)}),
        (TypeError, "u must be float32, .* got torch.int64", {"u": torch.zeros(2, 4, 3).long()}),
        (ValueError, "backend must be one of .*, got 'fast'", {"backend": "fast"}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    given = {"u": torch.zeros(2, 4, 3), "delta": torch.zeros(2, 4, 3), "A": torch.zeros(3, 5)}
    given |= {"B": torch.zeros(2, 4, 5), "C": torch.zeros(2, 4, 5)} | change
    with pytest.raises(error, match="selective_scan: " + match):
        selective_scan(**given)
