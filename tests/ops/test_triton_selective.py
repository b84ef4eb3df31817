"""The GPU kernels of the selective scan, in Triton's interpreter: against the step loop in float64, and as an op."""

import os

import pytest
import torch

from conftest import assert_close
from minrnn.ops import linear_scan, selective, selective_scan, short_conv, slstm_scan, wkv
from parity import check_chunks, check_resets

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run in Triton's interpreter: set TRITON_INTERPRET=1"
)
OWN = ("u", "delta", "B", "C", "initial")  # what each sequence has for itself
NAMES = ("u", "delta", "A", "B", "C", "D", "initial", "bias")


def arguments(batch, time, width, states, dtype=torch.float32):
    """What NAMES says; A of either sign."""
    torch.manual_seed(1)
    shapes = dict(zip("BTEN", (batch, time, width, states), strict=True))
    letters = ("BTE", "BTE", "EN", "BTN", "BTN", "E", "BEN", "E")
    args = [torch.randn([shapes[x] for x in name], dtype=torch.float64) for name in letters]
    args[1] = args[1].abs() / 2
    args[2] = (args[2] - 1).clamp(max=0.05)
    return [x.to(dtype).requires_grad_() for x in args]


def scan(args, reset=None, biased=True, backend="triton"):
    return selective_scan(*args[:7], reset=reset, bias=args[7] if biased else None, backend=backend)


def values_and_gradients(args, reset=None, biased=True, backend="triton"):
    y, last = scan(args, reset, biased, backend)
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in (y, last)]
    total = (y * weights[0]).sum() + (last * weights[1]).sum()
    return [y, last, *torch.autograd.grad(total, args, allow_unused=True, materialize_grads=True)]


def check(args, reset=None, biased=True):
    """Values and all gradients, by the largest number of each, against the step loop in float64."""
    found = values_and_gradients(args, reset, biased)
    exact = [x.detach().double().requires_grad_() for x in args]
    expected = values_and_gradients(exact, reset, biased, "reference")
    for name, a, b in zip(("y", "last", *NAMES), found, expected, strict=True):
        scale = b.abs().max().clamp(min=1) if b.numel() else 1
        try:
            assert_close(a / scale, b / scale, args[0].dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return found


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 33, 5, 3), torch.float32),
        ((1, 7, 33, 16), torch.float32),
        ((1, 70, 2, 17), torch.float32),
        ((2, 37, 3, 2), torch.bfloat16),
        ((2, 12, 4, 1), torch.float16),
        ((1, 35, 9, 4), torch.float64),
    ],
)
def test_it_is_its_equation(shape, dtype, resets, biased):
    check(arguments(*shape, dtype), torch.rand(shape[:2]) < 0.2 if resets else None, biased)


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0), (1, 1, 1, 1), (1, 3, 2, 65), (1, 2, 2, 256), (3, 4, 1, 5)],
)
def test_any_size(shape):
    found = check(arguments(*shape), torch.rand(shape[:2]) < 0.2)
    assert found[0].dtype == found[1].dtype == torch.float32


@pytest.fixture
def pieces(monkeypatch):
    """Short sequences are cut too."""
    from minrnn.ops.triton import selective as calls

    monkeypatch.setattr(calls, "_LONG", 40)
    monkeypatch.setattr(calls, "_PIECE", 32)
    assert calls._Call([*arguments(1, 100, 2, 1)[:7], None, None]).pieces == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resets", [False, True])
def test_in_pieces(pieces, dtype, resets):
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[0, [40, 65]] = True
    check(arguments(2, 70, 2, 2, dtype), reset if resets else None)


def test_a_nan_ends_at_a_reset(pieces):
    args, reset = arguments(1, 70, 2, 2), torch.zeros(1, 70, dtype=torch.bool)
    reset[0, 50] = True
    spoiled = [x.detach().clone() for x in args]
    for x in (spoiled[0], spoiled[1], spoiled[3], spoiled[4]):
        x[:, 3] = torch.nan
    spoiled = [x.requires_grad_() for x in spoiled]
    (found, last), (expected, state) = scan(spoiled, reset), scan(args, reset)
    assert torch.equal(found[:, 50:], expected[:, 50:]) and torch.equal(last, state)
    grads = torch.autograd.grad(found[:, 50:].sum(), [spoiled[i] for i in (0, 1, 3, 4)])
    wanted = torch.autograd.grad(expected[:, 50:].sum(), [args[i] for i in (0, 1, 3, 4)])
    assert all(torch.equal(a[:, 50:], b[:, 50:]) for a, b in zip(grads, wanted, strict=True))


def test_a_nan_of_a_gradient_ends_at_a_reset(pieces):
    args, reset = arguments(1, 70, 2, 2), torch.zeros(1, 70, dtype=torch.bool)
    reset[0, 50] = True
    y, last = scan(args, reset)
    weight = torch.ones_like(y)
    weight[:, 60:] = torch.nan
    (grad,) = torch.autograd.grad((y * weight).sum() + last.sum(), args[0])
    assert grad[:, :50].isfinite().all() and grad[:, 60:].isnan().all()


def test_whole_chunked_and_stepped_agree():
    args = [x.detach() for x in arguments(1, 9, 2, 2, torch.float64)]
    u, delta, A, B, C, D, initial, bias = args
    x = torch.cat([u, delta, B, C], 2).requires_grad_()
    parameters = [x.requires_grad_() for x in (A, D, bias)]

    def run(x, state, *, reset=None):
        u, delta, B, C = x.split([2, 2, 2, 2], 2)
        return selective_scan(u, delta, A, B, C, D, state, reset=reset, bias=bias, backend="triton")

    check_chunks(run, x, initial.requires_grad_(), parameters)
    check_resets(run, x, parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_read_as_it_is_and_computed_in_float32(dtype):
    args = arguments(1, 37, 3, 2, dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y, last = scan(args)
    expected, state = scan([x.detach().float() for x in args])
    assert y.dtype == dtype and torch.equal(last, state)
    assert_close(y, expected, dtype)  # the interpreter does not round as a GPU does
    wide = [x for x in saved if x.dtype == torch.float32 and x.shape[:2] == y.shape[:2] and x.shape[2] == 3]
    assert not wide
    grads = torch.autograd.grad(y.sum() + last.sum(), args)
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


def test_bits_do_not_depend_on_the_batch(pieces):
    args = arguments(3, 40, 2, 2)

    def grads(rows):
        part = [
            x[rows] if name in ("u", "delta", "B", "C", "initial") else x for name, x in zip(NAMES, args, strict=True)
        ]
        y, last = scan(part)
        return [y, last, *torch.autograd.grad((y * y).sum() + last.sum(), args)]

    whole, alone = grads(slice(None)), grads(slice(1, 2))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone[:2], whole[:2], strict=True))
    for name, a, b in zip(NAMES, alone[2:], whole[2:], strict=True):
        if name in OWN:
            assert torch.equal(a[1], b[1])
    assert all(torch.equal(a, b) for a, b in zip(whole, grads(slice(None)), strict=True))


def test_any_strides():
    args = arguments(2, 6, 3, 2)
    strided = [x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach().repeat_interleave(2)[::2] for x in args]
    found, expected = (values_and_gradients(x) for x in ([x.requires_grad_() for x in strided], args))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_memory_holds_no_state_of_every_step():
    batch, time, width, states = 1, 64, 32, 16
    args, sizes = arguments(batch, time, width, states), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        scan(args)
    assert max(sizes) <= batch * time * width


def test_derivatives_of_both_orders():
    args, reset = arguments(1, 3, 2, 2, torch.float64), torch.tensor([[0, 1, 0]], dtype=torch.bool)

    def function(*inputs):
        return scan(inputs, reset)

    assert torch.autograd.gradcheck(function, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_and_transforms_by_the_plain_form(dtype):
    args = arguments(2, 5, 3, 2, dtype)

    def single(u, delta, B, C, initial):
        rest = [x.detach() for x in args]
        batch = [u[None], delta[None], rest[2], B[None], C[None], rest[5], initial[None], rest[7]]
        return scan(batch)[0][0]

    series = [args[i].detach() for i in (0, 1, 3, 4, 6)]
    assert_close(torch.func.vmap(single)(*series), scan(args)[0].double(), dtype)
    (grad,) = torch.autograd.grad((scan(args)[0] ** 2).sum(), args[0], create_graph=True)
    exact = [x.detach().double().requires_grad_() for x in args]
    (wanted,) = torch.autograd.grad((scan(exact, backend="reference")[0] ** 2).sum(), exact[0], create_graph=True)
    found, expected = torch.autograd.grad(grad.sum(), args[3])[0], torch.autograd.grad(wanted.sum(), exact[3])[0]
    assert found.dtype == dtype
    scale = expected.abs().max()
    assert_close(found / scale, expected / scale, dtype)


@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_good_operator(biased):
    args = arguments(1, 5, 3, 2)
    flat = (*args[:7], None, args[7] if biased else None)
    torch.library.opcheck(torch.ops.minrnn.selective_scan_gpu, flat)


def test_it_compiles():
    args = arguments(1, 5, 3, 2)
    compiled = torch.compile(lambda *inputs: selective._gpu(*inputs), fullgraph=True, backend="aot_eager")
    inputs = (*args[:7], None, args[7])
    for (a, b), (c, d) in ((compiled(*inputs), selective._gpu(*inputs)),):
        assert torch.equal(a, c) and torch.equal(b, d)
        found, expected = (torch.autograd.grad(y.sum() + z.sum(), args) for y, z in ((a, b), (c, d)))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def refusing():
    x, w = torch.zeros(1, 2, 3), torch.zeros(3)
    yield "wkv", lambda: wkv(x, x, w, w)
    yield "short_conv", lambda: short_conv(x, torch.zeros(2, 3), None, torch.zeros(1, 1, 3))
    yield "slstm_scan", lambda: slstm_scan(x, x, x, x, torch.zeros(1, 3, 4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(("caller", "call"), list(refusing()), ids=lambda x: x if isinstance(x, str) else "")
def test_what_has_no_gpu_kernels_says_so(monkeypatch, caller, call):
    monkeypatch.setenv("MINRNN_BACKEND", "triton")
    linear_scan(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=f"{caller}: backend 'triton' was asked for, but it has no GPU kernels"):
        call()
