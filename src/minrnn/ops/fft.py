"""Causal convolution along time with kernels as long as the series, by FFT.

B batch, T time, D channels, L length of the kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_reset, check_tensor, shape_error
from minrnn.ops import backends
from minrnn.ops.fused import fused
from minrnn.ops.sequences import Sequences

TILE = 1 << 18  # numbers in a batch of FFTs on CPU, few enough for it and its spectra to stay in cache
FACTORS = (1, 3, 5, 9, 15)  # times powers of two: lengths of fast FFTs, no two neighbours further than 25% apart


def long_conv(x: Tensor, kernel: Tensor, *, reset: Tensor | None = None) -> Tensor:
    """y_t = sum over j <= t of K_{t-j} ⊙ x_j, each channel along time with a kernel of its own.

    Args:
        x: (B, T, D): float32, float64, bfloat16 or float16.
        kernel: K, (D, L), any L: beyond L it is zero, beyond T it is not looked at.
        reset: bool (B, T). Where true, step t begins a new sequence, which sees nothing of the steps before it. Each
            sequence has its own FFT, so that a NaN in one does not reach the others.

    Returns:
        y, (B, T, D), in the dtype of `x`.

    Numerics: in float32 for 16-bit input. FFTs round relative to the largest values of a sequence, and a NaN or an
    infinity reaches all steps of its sequence. The cost is T log T; with resets, sequences are padded to at most twice
    their length, and the cost is at most that of a series of 2 T.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes do not agree.
    """
    caller = "long_conv"
    backends.check_series(caller, "x", x, "(B, T, D)")
    check_tensor(caller, "kernel", kernel)
    if kernel.dim() != 2 or len(kernel) != x.shape[2]:
        raise shape_error(caller, "kernel", "(D, L)", f"two dimensions, the first {x.shape[2]}", tuple(kernel.shape))
    backends.check_operands(caller, x, {"kernel": (kernel, "(D, L)", tuple(kernel.shape))})
    check_reset(caller, reset, x)
    return _long_conv(x, kernel, reset)[0]


def _fft_length(time: int, length: int) -> int:
    """A fast length at which the first `time` numbers of a convolution are free of what wraps around; and those of its
    gradients, which are correlations, too."""
    least = time + min(time, length) - 1
    return min(f << max((-(-least // f) - 1).bit_length(), 0) for f in FACTORS)


def _tiles(x: Tensor, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Channels, and the rows that go with them, whose FFTs of length `size` are computed at once."""
    batch, _, width = x.shape
    tile = TILE if x.device.type == "cpu" else batch * width * size
    wide = min(max(tile // size, 16), width)
    high = max(tile // (size * wide), 1)
    for d in range(0, width, wide):
        yield slice(d, d + wide), [slice(b, b + high) for b in range(0, batch, high)]


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Without resets."""
    time, dtype, y = x.shape[1], accumulate_dtype(x.dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
    size, kernel = _fft_length(time, kernel.shape[1]), kernel[:, :time].to(dtype)
    for channels, tiles in _tiles(x, size):
        response = torch.fft.rfft(kernel[channels], size)
        for rows in tiles:
            spectrum = torch.fft.rfft(x[rows, :, channels].mT.to(dtype), size).mul_(response)
            y[rows, :, channels] = torch.fft.irfft(spectrum, size)[..., :time].mT
    return y


def _correlate(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the kernel, the latter in the dtype of the sums."""
    time, dtype, dx = x.shape[1], accumulate_dtype(x.dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
    size, length = _fft_length(time, kernel.shape[1]), min(time, kernel.shape[1])
    dkernel = torch.zeros_like(kernel, dtype=dtype)
    for channels, tiles in _tiles(x, size):
        response = torch.fft.rfft(kernel[channels, :time].to(dtype), size).conj().resolve_conj()
        total = torch.zeros_like(response)
        for rows in tiles:
            spectrum = torch.fft.rfft(grad[rows, :, channels].mT.to(dtype), size)
            inputs = torch.fft.rfft(x[rows, :, channels].mT.to(dtype), size)
            total += inputs.conj().mul(spectrum).sum(0)
            dx[rows, :, channels] = torch.fft.irfft(spectrum.mul_(response), size)[..., :time].mT
        dkernel[channels, :length] = torch.fft.irfft(total, size)[:, :length]
    return dx, dkernel


def _pad(x: Tensor, index: Tensor, there: Tensor) -> Tensor:
    return x.flatten(0, 1)[index].where(there[..., None], 0)


def _forward(x: Tensor, kernel: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    nothing = x.new_empty(0)  # kept, for an operator has two results or more
    if x.numel() == 0 or kernel.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), nothing
    if reset is None:
        return _convolve(x, kernel), nothing
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for _, index, there in Sequences(reset).groups():
        y.flatten(0, 1)[index[there]] = _convolve(_pad(x, index, there), kernel)[there]
    return y, nothing


def _backward(grads: tuple, args: tuple, results: tuple) -> tuple[Tensor | None, ...]:
    (grad,), (x, kernel, reset) = grads, args
    if grad is None or x.numel() == 0 or kernel.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(kernel), None
    if reset is None:
        dx, dkernel = _correlate(grad, x, kernel)
        return dx, dkernel.to(kernel.dtype), None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dkernel = torch.zeros_like(kernel, dtype=accumulate_dtype(x.dtype))
    for _, index, there in Sequences(reset).groups():
        found, of_kernel = _correlate(_pad(grad, index, there), _pad(x, index, there), kernel)
        dx.flatten(0, 1)[index[there]] = found[there]
        dkernel += of_kernel
    return dx, dkernel.to(kernel.dtype), None


def _plain(x: Tensor, kernel: Tensor, reset: Tensor | None) -> tuple[Tensor]:
    if x.numel() == 0 or kernel.numel() == 0:
        return (x * 0,)
    dtype = accumulate_dtype(x.dtype)

    def convolve(series: Tensor) -> Tensor:
        time = series.shape[1]
        size = _fft_length(time, kernel.shape[1])
        response = torch.fft.rfft(kernel[:, :time].to(dtype), size)
        y = torch.fft.irfft(torch.fft.rfft(series.mT.to(dtype), size) * response, size)
        return y[..., :time].mT.to(series.dtype)

    if reset is None:
        return (convolve(x),)
    groups = list(Sequences(reset).groups())
    order = torch.cat([index[there] for _, index, there in groups]).argsort()
    found = torch.cat([convolve(_pad(x, index, there))[there] for _, index, there in groups])
    return (found[order].view_as(x),)


def _fake(x: Tensor, kernel: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0)


_long_conv = fused("long_conv", "Tensor x, Tensor kernel, Tensor? reset", 1, 1, _forward, _fake, _backward, _plain)
