"""The scans under PyTorch's transforms: gradcheck of both modes and orders, torch.func, torch.compile, opcheck."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from conftest import assert_close, backends_under_test
from minrnn.ops import linear_scan, mingru_scan, minlstm_scan
from minrnn.ops.autograd import FEW

BACKENDS = backends_under_test()
RESET = torch.tensor([[False, True, False, False, True], [True, False, False, True, False], [False] * 5])
LENGTHS = torch.tensor([5, 3, 0])
SURROUNDINGS = [{}, {"reset": RESET}, {"lengths": LENGTHS}, {"reset": RESET, "lengths": LENGTHS, "reverse": True}]


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("context", SURROUNDINGS, ids=lambda c: "+".join(c) or "plain")
@pytest.mark.parametrize(
    ("scan", "blocks", "options"),
    [
        (mingru_scan, 2, {"activation": "g"}),
        (mingru_scan, 2, {"activation": "tanh"}),
        (minlstm_scan, 3, {"activation": "identity"}),
        (minlstm_scan, 3, {"normalize": False}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_gated(backend, scan, blocks, options, context):
    restart = (doubles(2),) if "reset" in context else ()

    def run(projection, initial, *restart):
        return scan(projection, initial, restart=restart[0] if restart else None, backend=backend, **options, **context)

    inputs = (doubles(3, 5, blocks * 2), doubles(3, 2), *restart)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2), (2,), (5, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_linear(backend, shape, dtype):
    inputs = [(torch.randn(s, dtype=dtype) * 0.7).requires_grad_() for s in (shape, (3, 5, 2), (3, 2))]
    for context in ({}, {"reset": RESET, "reverse": True}):

        def run(a, b, h, context=context):
            return linear_scan(a, b, h, backend=backend, **context)

        assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func(backend):
    """grad, vmap, jvp and every nesting of two derivatives, against the step loop under PyTorch's own rules."""

    def loss(p, backend=backend):
        return mingru_scan(p, backend=backend)[0].sin().sum()

    def oracle(p):
        return loss(p, "reference")

    p = torch.randn(3, 5, 4, dtype=torch.float64)
    assert_close(grad(loss)(p), grad(oracle)(p), p.dtype)
    assert_close(vmap(grad(lambda one: loss(one[None])))(p), grad(oracle)(p), p.dtype)
    assert_close(jvp(loss, (p,), (p,))[1], jvp(oracle, (p,), (p,))[1], p.dtype)
    wanted = torch.autograd.functional.hessian(oracle, p[:1])
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(loss))(p[:1]), wanted, p.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_joins_the_batch(backend):
    values, reset = torch.randn(4, 3, 5, 2), torch.rand(4, 3, 5) < 0.3
    for shape, dim in (((4, 3, 5, 2), 0), ((4, 2), 0), ((5, 4, 1), 1), ((2,), None)):
        coeffs = torch.rand(shape)
        mapped = vmap(lambda a, b, r: linear_scan(a, b, reset=r, backend=backend), in_dims=(dim, 0, 0))(
            coeffs, values, reset
        )
        for i in range(4):
            one = coeffs if dim is None else coeffs.select(dim, i)
            assert_close(mapped[i], linear_scan(one, values[i], reset=reset[i], backend="reference"), torch.float32)
    restarts = torch.randn(4, 2)
    projection = torch.randn(3, 5, 4)
    mapped = vmap(lambda s: mingru_scan(projection, reset=reset[0], restart=s, backend=backend)[0])(restarts)
    for i in range(4):
        alone = mingru_scan(projection, reset=reset[0], restart=restarts[i], backend="reference")[0]
        assert_close(mapped[i], alone, torch.float32)


def test_compile_with_dynamic_time():
    """One graph, no break, no recompilation for a new length; compiled = eager, forward and backward."""
    compiles = 0

    def count(graph, inputs):
        nonlocal compiles
        compiles += 1
        return torch._inductor.compile(graph, inputs)

    def run(p, h, reset, lengths):
        out, last = mingru_scan(p, h, reset=reset, lengths=lengths)
        return out.sin().sum() + last.sum() + linear_scan(out.sigmoid(), out, h, reverse=True).sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for time in (5, 9, 33):
        p, h = torch.randn(3, time, 8, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        reset, lengths = torch.rand(3, time) < 0.2, torch.randint(0, time + 1, (3,))
        mine, theirs = compiled(p, h, reset, lengths), run(p, h, reset, lengths)
        assert_close(mine, theirs, torch.float32)
        for a, b in zip(torch.autograd.grad(mine, (p, h)), torch.autograd.grad(theirs, (p, h)), strict=True):
            assert_close(a, b, torch.float32)
    assert compiles == 1


def test_few_compiled_steps_without_a_gradient_are_plain_operations(compilable):
    """For the compiler to join with what is around them; not where a gradient is asked for, a step's number is unknown
    or a backend is named."""
    scans = []

    def count(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        scans.append(sum("minrnn" in target for target in targets))
        return torch._inductor.compile(graph, inputs)

    def run(p, q, h, reset, lengths, backend=None):
        rest = {"reset": reset, "lengths": lengths, "backend": backend}
        return *mingru_scan(p, h, **rest), *minlstm_scan(q, h, restart=h[0], reverse=True, **rest)

    def counted(time, *, grad=False, backend=None, **options):
        torch._dynamo.reset()
        scans.clear()
        inputs = torch.randn(3, time, 8), torch.randn(3, time, 12), torch.randn(3, 4)
        reset, lengths = torch.rand(3, time) < 0.3, torch.tensor([0, 1, time])
        with torch.set_grad_enabled(grad):
            mine = torch.compile(run, fullgraph=True, backend=count, **options)(*inputs, reset, lengths, backend)
        for a, b in zip(mine, run(*inputs, reset, lengths), strict=True):
            assert_close(a, b, torch.float32)
        return scans

    assert [counted(time) for time in (1, 3, FEW)] == [[0]] * 3
    assert counted(FEW + 1) == counted(3, grad=True) == counted(3, backend="native") == [2]
    assert counted(3, dynamic=True) == [2]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_many_gradients_at_once(backend):
    p = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 2, 4, 3, dtype=p.dtype)

    def run(q, backend=backend):
        return mingru_scan(q, backend=backend)[0]

    many = vmap(vjp(run, p)[1])(weights)[0]
    for i in range(5):
        assert_close(many[i], torch.autograd.grad(run(p, "reference"), p, weights[i])[0], p.dtype)
    with pytest.raises(NotImplementedError, match="mingru_scan: .* torch.func.jacrev"):
        torch.autograd.grad(run(p), p, weights, is_grads_batched=True)
    with pytest.raises(NotImplementedError, match="linear_scan: .* jacfwd"):
        torch.autograd.functional.jacobian(run, p, strategy="forward-mode", vectorize=True)


@pytest.mark.parametrize("context", SURROUNDINGS, ids=lambda c: "+".join(c) or "plain")
def test_forward_mode_over_a_backward_pass(context):
    """The tangent of a gradient, whose graph is made within the level or outside, is the second derivative that going
    backward twice gives."""

    def loss(p, q, c):
        h, last = mingru_scan(p, **context)
        gated, _ = minlstm_scan(q, last, **context)
        return (linear_scan(c.sigmoid(), h * gated).square().sum() + last.pow(3).sum()) / 7

    inputs = doubles(3, 5, 8), doubles(3, 5, 12), doubles(3, 5, 4)
    directions = [torch.randn_like(x) for x in inputs]
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    wanted = torch.autograd.grad(first, inputs, directions)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, directions, strict=True)]
        within = torch.autograd.grad(loss(*duals), inputs)
        for gradient, second in zip(within, wanted, strict=True):
            assert_close(forward_ad.unpack_dual(gradient).tangent, second, torch.float64)
    h, _ = mingru_scan(inputs[0], **context)
    weight, tangent = torch.randn(2, *h.shape, dtype=h.dtype).unbind()
    (wanted,) = torch.autograd.grad(h, inputs[0], tangent, retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(h, inputs[0], forward_ad.make_dual(weight, tangent), retain_graph=True)
        assert_close(forward_ad.unpack_dual(gradient).tangent, wanted, torch.float64)
    (mapped,) = vmap(lambda v: torch.autograd.grad(h, inputs[0], v, retain_graph=True))(tangent[None])
    assert_close(mapped[0], wanted, torch.float64)


def test_tensors_without_memory_and_what_is_recorded_go_by_the_operator():
    """FakeTensor, tensors of a class that wraps others, `torch.jit.trace`, `make_fx` and `linearize`."""

    def run(p, h, reset, lengths):
        out, last = mingru_scan(p, h, reset=reset, lengths=lengths)
        return linear_scan(out.sigmoid(), out, last)

    def made():
        return torch.randn(3, 5, 8), torch.randn(3, 4), torch.rand(3, 5) < 0.3, torch.tensor([5, 2, 0])

    inputs, others = made(), made()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        assert run(*fakes).shape == (3, 5, 4)
        assert mingru_scan(torch.empty(3, 5, 8, requires_grad=True))[0].sum().grad_fn is not None
    assert run(*fakes).shape == (3, 5, 4)
    both = run(*(TwoTensor(x, y) for x, y in zip(inputs, others, strict=True)))
    traced = torch.jit.trace(run, inputs, check_trace=False)
    for x, part in ((inputs, both.a), (others, both.b)):
        assert_close(part, run(*x), torch.float32)
        assert_close(traced(*x), run(*x), torch.float32)
        assert_close(make_fx(run)(*inputs)(*x), run(*x), torch.float32)
    p, v = torch.randn(2, 3, 5, 8).unbind()
    value, tangent = torch.func.linearize(lambda p: mingru_scan(p)[0], p)
    assert_close(value, mingru_scan(p)[0], torch.float32)
    assert_close(tangent(v), jvp(lambda p: mingru_scan(p)[0], (p,), (v,))[1], torch.float32)


def test_forward_mode_in_a_compiled_function():
    p, v = torch.randn(2, 2, 5, 6).unbind(0)

    def tangent(p, v):
        return jvp(lambda q: mingru_scan(q)[0], (p,), (v,))[1]

    torch._dynamo.reset()
    assert_close(torch.compile(tangent, backend="aot_eager")(p, v), tangent(p, v), torch.float32)


def _time_major(tensor):
    return None if tensor is None else tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("layouts", ["batch, batch", "time, time", "batch, time", "channels last but one"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", ["mingru", "minlstm", "minlstm_unnormalized", "linear"])
def test_opcheck(gates, backend, layouts):
    """The operator's promises of shapes, dtypes and strides, which a compiler relies on."""
    reset, lengths = (RESET, None) if gates == "linear" else (RESET, LENGTHS)
    restart = None if gates == "linear" else torch.randn(3, 2, requires_grad=True)
    source = torch.rand(3, 5, 2 * {"mingru": 2, "linear": 1}.get(gates, 3), requires_grad=True)
    values = torch.randn(3, 5, 2, requires_grad=True) if gates == "linear" else None
    if layouts == "time, time":
        source, values = _time_major(source), _time_major(values)
    elif layouts == "batch, time":
        values = _time_major(values)
    elif layouts == "channels last but one":
        source = source.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    state = torch.randn(3, 2, requires_grad=True)
    inputs = (source, values, state, reset, restart, lengths, gates, "identity", False, backend)
    torch.library.opcheck(torch.ops.minrnn.scan, inputs)
    hidden, last = torch.ops.minrnn.scan(*inputs)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    gradient = (torch.randn_like(hidden), torch.randn_like(last))
    arguments = (*gradient, *detached[:6], hidden.detach(), *inputs[6:])
    torch.library.opcheck(torch.ops.minrnn.scan_backward, arguments, test_utils=("test_schema", "test_faketensor"))
