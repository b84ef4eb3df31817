"""The short convolution: against the sums of its equation and PyTorch's, kernel against sums of products."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close, backends_under_test
from minrnn.ops import short_conv
from parity import check_chunks, check_resets, compare

BACKENDS = [name for name in ("native", "parallel") if name in backends_under_test()]
F64 = torch.float64
only_native = pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not under test")
only_both = pytest.mark.skipif(len(BACKENDS) < 2, reason="there is only one backend to test")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("MINRNN_BACKEND", request.param)
    return request.param


def arguments(batch, time, width, kernel, dtype=F64):
    """(x, weight, bias, past), all asking for gradients."""
    shapes = (batch, time, width), (kernel, width), (width,), (batch, kernel - 1, width)
    return [torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes]


def define(x, weight, bias, past, reset):
    """(y, tail), one number after the other."""
    (batch, time, _), kernel = x.shape, len(weight)
    y, tail = 0 * x, 0 * past
    for b in range(batch):
        sequence, known = 0, {i - kernel + 1: (0, past[b, i]) for i in range(kernel - 1)}
        for t in range(time):
            sequence += 0 if reset is None else int(reset[b, t])
            known[t] = (sequence, x[b, t])
            for k in range(kernel):
                of, value = known[t - kernel + 1 + k]
                y[b, t] += weight[k] * value if of == sequence else 0
            y[b, t] += 0 if bias is None else bias
        for i in range(kernel - 1):
            of, value = known[time - kernel + 1 + i]
            tail[b, i] = value if of == sequence else 0
    return y, tail


@pytest.mark.parametrize("kernel", [1, 2, 4, 9])
@pytest.mark.parametrize("time", [0, 1, 2, 17])
@pytest.mark.parametrize("resets", [0.0, 0.3])
def test_it_is_its_equation(backend, kernel, time, resets):
    args, reset = arguments(3, time, 5, kernel), torch.rand(3, time) < resets if resets else None
    compare(short_conv(*args, reset), define(*args, reset), args, F64)
    x, weight, _, past = args
    compare(short_conv(x, weight, None, past, reset), define(x, weight, None, past, reset), args, F64)


@pytest.mark.parametrize("kernel", [1, 3, 4, 8, 11])
def test_it_is_torchs_depthwise_convolution(backend, kernel):
    args = x, weight, bias, past = arguments(2, 300, 70, kernel)
    inputs = torch.cat([past, x], 1)
    y = F.conv1d(inputs.mT, weight.mT[:, None], bias, groups=70).mT
    compare(short_conv(*args), (y, inputs[:, 300:]), args, F64)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("kernel", [1, 4])
def test_whole_chunked_and_stepped_agree(backend, time, kernel):
    x, weight, bias, past = arguments(2, time, 5, kernel)

    def run(x, state, *, reset=None):
        return short_conv(x, weight, bias, torch.zeros_like(past) if state is None else state, reset)

    check_chunks(run, x, past, (weight, bias))
    check_resets(run, x, (weight, bias))


@only_both
@pytest.mark.parametrize(
    ("batch", "time", "width", "kernel"),
    [(2, 300, 5, 3), (1, 129, 700, 4), (3, 2, 33, 8), (2, 5, 1, 6), (2, 0, 3, 4), (0, 4, 3, 3), (2, 3, 0, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
def test_kernel_and_sums_agree(monkeypatch, batch, time, width, kernel, dtype):
    args, reset = arguments(batch, time, width, kernel, dtype), torch.rand(batch, time) < 0.1
    x, weight, _, past = args
    for bias, given in ((args[2], None), (args[2], reset), (None, reset)):
        found = []
        for name in BACKENDS:
            monkeypatch.setenv("MINRNN_BACKEND", name)
            y, tail = short_conv(x, weight, bias, past, given)
            assert y.dtype == tail.dtype == dtype
            inputs = [one for one in (x, weight, bias, past) if one is not None]
            # Of a mean: the gradients of weights are sums over B T products, which float16 could not hold.
            found.append(
                (y, tail, *torch.autograd.grad((y.square().mean() if y.numel() else y.sum()) + tail.sum(), inputs))
            )
        assert torch.equal(found[0][1], found[1][1])
        for left, right in zip(*found, strict=True):
            assert left.dtype == dtype
            assert_close(left, right, dtype)


def test_nothing_passes_a_reset(backend):
    """A NaN before it is in no value and no gradient after it, and is carried on by no state."""
    x, weight, bias, past = (one.detach() for one in arguments(2, 9, 3, 4))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, [4, 8]] = True
    x[:, 2:4], past[:] = torch.nan, torch.nan
    x.requires_grad_(), past.requires_grad_(), weight.requires_grad_()
    y, tail = short_conv(x, weight, bias, past, reset)
    assert y[:, 4:].isfinite().all() and y[:, :4].isnan().all()
    assert torch.equal(tail, F.pad(x[:, 8:], (0, 0, 2, 0)))
    grads = torch.autograd.grad(y[:, 4:].sum() + tail.sum(), (x, past))
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][:, :4].any() and not grads[1].any()
    grad_y = torch.ones_like(y)
    grad_y[:, 4:8] = torch.nan
    (grad,) = torch.autograd.grad(short_conv(x, weight, bias, past, reset)[0], x, grad_y)
    assert grad[:, [0, 1, 2, 3, 8]].isfinite().all() and grad[:, 4:8].isnan().all()


def test_any_strides(backend):
    x, weight, bias, past = arguments(4, 9, 6, 3)
    wide = torch.randn(4, 4, 18, dtype=F64, requires_grad=True)
    views = (
        (x.transpose(0, 1), past[:, :1].expand(-1, 9, -1).transpose(0, 1)[:, :2]),
        (x[::2, 1::3], past[::2]),
        (x[:1].expand(3, -1, -1), past[:1].expand(3, -1, -1)),
        (wide[..., 6:12], wide[:, ::2, 12:]),
        (wide[..., ::3], wide[:, :2, 1::3]),
        (x.flip(2).mT[:, :6].mT[:, :6], past),
    )
    for series, earlier in views:
        left = short_conv(series, weight.mT.contiguous().mT, bias, earlier)
        right = short_conv(series.contiguous(), weight, bias, earlier.contiguous())
        compare(left, right, [x, weight, bias, past, wide], F64)
        assert left[0].is_contiguous()


@only_native
def test_bits_do_not_depend_on_threads_or_batch():
    args = x, weight, bias, past = arguments(5, 400, 600, 4, torch.float32)
    reset, weights = torch.rand(5, 400) < 0.01, torch.randn(5, 400, 600)

    def grads(threads, rows):
        torch.set_num_threads(threads)
        y, tail = short_conv(x[rows], weight, bias, past[rows], reset[rows])
        return [y, tail, *torch.autograd.grad((y * weights[rows]).sum() + tail.sum(), args)]

    one, four, alone = grads(1, slice(None)), grads(4, slice(None)), grads(2, slice(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))
    assert torch.equal(alone[0], one[0][3:4]) and torch.equal(alone[1], one[1][3:4])
    assert torch.equal(alone[2][3], one[2][3]) and torch.equal(alone[5][3], one[5][3])


@only_native
def test_long_sums_of_float32_stay_close():
    args = arguments(4, 4096, 3, 4, torch.float32)
    found = []
    for inputs in (args, [one.detach().double().requires_grad_() for one in args]):
        y, _ = short_conv(*inputs)
        found.append(torch.autograd.grad(y, inputs[1:3], torch.ones_like(y)))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-3)


@only_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_summed_in_float32(dtype):
    """Rounded once: as the same in float64, but for the last bit where the two sums lie on either side of a half."""
    args = arguments(2, 40, 17, 4, dtype)
    y, _ = short_conv(*args)
    exact, _ = short_conv(*(one.double() for one in args))
    assert (y == exact.to(dtype)).float().mean() > 0.999
    assert_close(y, exact, dtype)


def test_mixed_dtypes_promote(backend):
    x, weight, bias, past = arguments(2, 7, 3, 4, torch.float32)
    y, tail = short_conv(x.bfloat16(), weight, bias, past)
    assert y.dtype == tail.dtype == torch.float32
    assert_close(y, short_conv(x.bfloat16().float(), weight, bias, past)[0], torch.float32)
    y, tail = short_conv(x.bfloat16(), weight.bfloat16(), None, past.double())
    assert y.dtype == tail.dtype == F64


@pytest.mark.parametrize("kernel", [1, 3])
def test_second_derivatives_and_transforms(backend, kernel):
    args = arguments(2, 5, 2, kernel)
    reset = torch.tensor([[False, False, True, False, False], [False] * 5])
    for given in (None, reset):
        assert torch.autograd.gradcheck(lambda *args, r=given: short_conv(*args, r), args)
        assert torch.autograd.gradgradcheck(lambda *args, r=given: short_conv(*args, r), args)

    def loss(*args):
        return short_conv(*args, reset)[0].square().sum()

    for whole, one in zip(
        torch.func.grad(loss, (0, 1, 2, 3))(*args), torch.autograd.grad(loss(*args), args), strict=True
    ):
        assert_close(whole, one, F64)
    x, weight, bias, past = args
    mapped, _ = torch.func.vmap(lambda w: short_conv(x, w, bias, past, reset))(torch.stack([weight, 2 * weight]))
    assert_close(mapped[1], short_conv(x, 2 * weight, bias, past, reset)[0], F64)


@only_native
def test_the_operator_keeps_its_promises():
    args, reset = arguments(2, 18, 3, 4), torch.rand(2, 18) < 0.2
    x, weight, _, past = args
    for given in (
        (*args, reset),
        (*args, None),
        (x, weight, None, past, reset),
        (x.mT.contiguous().mT, *args[1:], None),
    ):
        torch.library.opcheck(torch.ops.minrnn.short_conv.default, given)
    operator = importlib.import_module("minrnn.ops.short_conv")._fused
    compiled = torch.compile(lambda *args: operator(*args), fullgraph=True, backend="aot_eager")
    compare(tuple(compiled(*args, reset)), tuple(operator(*args, reset)), args, F64)


def test_it_compiles_whole():
    args, reset = arguments(2, 18, 3, 4), torch.rand(2, 18) < 0.2
    compiled = torch.compile(lambda *args: short_conv(*args), fullgraph=True, backend="aot_eager")
    compare(compiled(*args, reset), short_conv(*args, reset), args, F64)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "x must be a torch.Tensor", {"x": 0.0}),
        (ValueError, r"x must be \(B, T, D\) = .*got \(4, 3\)", {"x": torch.zeros(4, 3)}),
        (TypeError, "x must be float32.*got torch.int64", {"x": torch.zeros(2, 4, 3, dtype=torch.int64)}),
        (ValueError, r"weight must be \(K, D\) = .*got \(0, 3\)", {"weight": torch.zeros(0, 3)}),
        (ValueError, r"weight must be \(K, D\) = .*got \(3, 2\)", {"weight": torch.zeros(3, 2)}),
        (ValueError, r"bias must be \(D,\)", {"bias": torch.zeros(2)}),
        (TypeError, "bias must be a torch.Tensor", {"bias": 0.0}),
        (ValueError, r"past must be \(B, K-1, D\) = \(2, 2, 3\), got \(2, 3, 3\)", {"past": torch.zeros(2, 3, 3)}),
        (TypeError, "past must be a torch.Tensor, got NoneType", {"past": None}),
        (ValueError, r"reset must be \(B, T\)", {"reset": torch.zeros(2, 3, dtype=torch.bool)}),
        (TypeError, "reset must be torch.bool, got torch.int64", {"reset": torch.zeros(2, 4, dtype=torch.int64)}),
    ],
)
def test_errors_name_the_argument(error, match, change):
    args = {"x": torch.zeros(2, 4, 3), "weight": torch.zeros(3, 3), "bias": None, "past": torch.zeros(2, 2, 3)} | change
    with pytest.raises(error, match=f"short_conv: {match}"):
        short_conv(**args)
