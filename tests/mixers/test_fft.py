"""Long convolution and what carries it on in chunks: against its definition, sequence by sequence."""

import pytest
import torch

from conftest import assert_close
from minrnn.mixers.segments import FEW, Joined, segments
from minrnn.ops import fft, long_conv
from minrnn.ops.sequences import Sequences
from parity import compare

D = 3
F64 = torch.float64


def made(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def define(x, kernel, reset):
    """Every product of a step and a kernel's number, one by one."""
    rows = []
    for b in range(x.shape[0]):
        begin = 0
        for t in range(x.shape[1]):
            begin = t if reset is not None and reset[b, t] else begin
            lags = range(min(t - begin + 1, kernel.shape[1]))
            rows.append(sum((kernel[:, lag] * x[b, t - lag] for lag in lags), torch.zeros_like(x[b, t])))
    return torch.stack(rows).view_as(x) if rows else x * 0


@pytest.mark.parametrize("length", [1, 3, 63, 80])
@pytest.mark.parametrize("time", [0, 1, 2, 11, 63])
def test_long_conv_is_its_definition(time, length):
    x, kernel = made(3, time, D), made(D, length)
    for reset in (None, torch.rand(3, time) < 0.2):
        compare((long_conv(x, kernel, reset=reset), ()), (define(x, kernel, reset), ()), [x, kernel], F64)


def test_every_length_of_fft_leaves_nothing_that_wraps_around():
    for time in range(1, 36):
        x, kernel = made(1, time, 1), made(1, time // 2 + 1)
        compare((long_conv(x, kernel), ()), (define(x, kernel, None), ()), [x, kernel], F64)
    for time in (100, 1000, 2049, 5000):
        size = fft._fft_length(time, time)
        assert 2 * time - 1 <= size <= 1.25 * 2 * time
        assert any(size % factor == 0 and (size // factor).bit_count() == 1 for factor in fft.FACTORS)


@pytest.mark.parametrize("tile", [1, 200, 1500])
def test_tiles_are_of_no_importance(monkeypatch, tile):
    x, kernel, reset = made(5, 9, 40), made(40, 9), torch.rand(5, 9) < 0.2
    whole = [(long_conv(x, kernel, reset=r), ()) for r in (None, reset)]
    monkeypatch.setattr(fft, "TILE", tile)
    for r, expected in zip((None, reset), whole, strict=True):
        compare((long_conv(x, kernel, reset=r), ()), expected, [x, kernel], F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_computed_in_float32(dtype):
    x, kernel = made(2, 300, D, dtype=dtype), made(D, 300, dtype=torch.float32)
    y = long_conv(x, kernel)
    wanted = long_conv(x.double(), kernel.double())
    scale = wanted.abs().max().detach()
    assert y.dtype == dtype
    assert_close(y / scale, wanted / scale, dtype)
    for found, exact in zip(
        torch.autograd.grad(y.float().sum(), [x, kernel]), torch.autograd.grad(wanted.sum(), [x, kernel]), strict=True
    ):
        scale = exact.abs().max()
        assert_close(found / scale, exact / scale, dtype)


def test_a_nan_stays_in_its_sequence():
    x, kernel, reset = made(2, 12, D), made(D, 12), torch.zeros(2, 12, dtype=torch.bool)
    reset[:, [4, 9]] = True
    spoiled = x.detach().clone()
    spoiled[0, 2], spoiled[1, 10] = float("nan"), float("inf")
    spoiled.requires_grad_()
    y, clean = long_conv(spoiled, kernel, reset=reset), long_conv(x, kernel, reset=reset)
    assert torch.equal(y[0, 4:], clean[0, 4:]) and torch.equal(y[1, :9], clean[1, :9])
    (grad,) = torch.autograd.grad(y[0, 4:].sum() + y[1, :9].sum(), spoiled)
    assert grad.isfinite().all()


def test_padding_at_most_doubles_the_work():
    for reset in (
        torch.rand(8, 200) < 0.1,
        torch.arange(8)[:, None].expand(8, 200) > 0,  # one long sequence among many of a step
        torch.zeros(8, 200, dtype=torch.bool),
    ):
        groups = list(Sequences(reset).groups())
        assert sum(there.numel() for _, _, there in groups) < 2 * reset.numel()
        assert sorted(torch.cat([index[there] for _, index, there in groups]).tolist()) == list(range(reset.numel()))


def test_second_derivatives_and_transforms():
    x, kernel, reset = made(2, 5, 2), made(2, 4), torch.rand(2, 5) < 0.3
    for r in (None, reset):
        assert torch.autograd.gradcheck(lambda x, k, r=r: long_conv(x, k, reset=r), (x, kernel))
        assert torch.autograd.gradgradcheck(lambda x, k, r=r: long_conv(x, k, reset=r), (x, kernel))
    series = torch.randn(3, 2, 5, 2, dtype=F64)
    mapped = torch.func.vmap(lambda x: long_conv(x, kernel, reset=reset))(series)
    assert_close(mapped, torch.stack([long_conv(x, kernel, reset=reset) for x in series]), F64)
    _, tangent = torch.func.jvp(lambda x: long_conv(x, kernel), (x,), (series[0],))
    assert_close(tangent, long_conv(series[0], kernel), F64)


def test_one_graph():
    x, kernel, reset = made(2, 9, D), made(D, 9), torch.rand(2, 9) < 0.3
    compiled = torch.compile(lambda x, k, r: long_conv(x, k, reset=r) * 2, fullgraph=True, backend="aot_eager")
    compare((compiled(x, kernel, reset), ()), (long_conv(x, kernel, reset=reset) * 2, ()), [x, kernel], F64)


def test_strides_and_sizes():
    x, kernel = made(4, 9, D), made(9, D).T
    for view in (x.transpose(0, 1), x[::2, 1::3], x[:1].expand(3, -1, -1)):
        compare((long_conv(view, kernel), ()), (long_conv(view.contiguous(), kernel.contiguous()), ()), [x], F64)
    for shape in ((0, 4, D), (2, 0, D), (2, 4, 0)):
        y = long_conv(made(*shape), made(shape[2], 4), reset=torch.zeros(shape[:2], dtype=torch.bool))
        assert y.shape == shape
    y = long_conv(x, made(D, 0))
    assert (y == 0).all()
    assert (torch.autograd.grad(y.sum(), x)[0] == 0).all()


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be", lambda x, k, r: ([1.0], k, r)),
        (ValueError, r"x must be \(B, T, D\)", lambda x, k, r: (x[0], k, r)),
        (TypeError, "kernel must be", lambda x, k, r: (x, [1.0], r)),
        (TypeError, "x must be float32", lambda x, k, r: (x.long(), k, r)),
        (TypeError, "kernel must be float32", lambda x, k, r: (x, k.to(torch.complex64), r)),
        (ValueError, r"kernel must be \(D, L\)", lambda x, k, r: (x, k[1:], r)),
        (ValueError, r"kernel must be \(D, L\)", lambda x, k, r: (x, k[0], r)),
        (ValueError, r"reset must be \(B, T\)", lambda x, k, r: (x, k, r[1:])),
        (TypeError, "reset must be torch.bool", lambda x, k, r: (x, k, r.long())),
    ],
)
def test_bad_arguments_are_named(error, match, arguments):
    x, kernel, reset = arguments(torch.randn(2, 4, D), torch.randn(D, 4), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(error, match=f"long_conv: {match}.*got"):
        long_conv(x, kernel, reset=reset)


def test_segments_are_the_steps_before_the_first_and_from_the_last_reset():
    reset = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    first, last, whole = segments(reset)
    assert first.int().tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6, [0] * 6]
    assert last.int().tolist() == [[0, 0, 0, 0, 1, 1], [1] * 6, [1] * 6]
    assert whole.tolist() == [False, True, False]
    assert [part.shape for part in segments(reset[:, :0])] == [(3, 0), (3, 0), (3,)]


@pytest.mark.parametrize("length", [1, 4, 30])
@pytest.mark.parametrize("time", [0, 1, FEW, FEW + 1, 9])
def test_joined_are_the_new_steps_of_the_whole(time, length):
    past = 6
    series, kernel = made(3, past + time, D), made(D, length)
    for reset in (None, torch.rand(3, time) < 0.3):
        joined = Joined(past, time, reset)
        full = None if reset is None else torch.cat([torch.zeros(3, past, dtype=torch.bool), reset], 1)
        wanted = define(series, kernel, full)[:, past:]
        compare((joined.convolve(series, kernel), ()), (wanted, ()), [series, kernel], F64)
        kept, begins = joined.keep(series, past), full
        for b in range(3):
            begin = 0 if begins is None else max([0, *begins[b].nonzero()[:, 0].tolist()])
            for i, t in enumerate(range(time, past + time)):
                assert torch.equal(kept[b, i], series[b, t] if t >= begin else torch.zeros(D, dtype=F64))
