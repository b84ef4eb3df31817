"""Short causal convolutions along time, each channel by itself: one fused kernel on CPU, sums of products elsewhere.

B batch, T time, D channels, K kernel size.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_reset, check_tensor, shape_error
from minrnn.ops import backends, native
from minrnn.ops.fused import fused


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = b + sum over k of w_k ⊙ x_{t-K+1+k}, k = 0 ... K-1, and the inputs that later steps still need.

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16, as the next three; where they differ, everything is of the
            dtype to which they promote.
        weight: w, (K, D), K at least 1 and small: the cost is K T D.
        bias: b, (D,), or None for 0.
        past: x_{1-K} ... x_{-1}, (B, K-1, D): the tail of an earlier call; zeros at the beginning of a sequence.
        reset: bool (B, T). Where true, step t begins a new sequence. Only inputs of the same sequence meet, by
            selection, so that a NaN before ends there.

    Returns:
        y, (B, T, D); and the tail, (B, K-1, D): the last K-1 inputs, zeros for those that a reset has cut off.

    Numerics: 16-bit values are multiplied and summed in float32. Deterministic, and on the native backend bitwise
    independent of the number of threads, y and its gradients in x and past also of the batch.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes do not agree.
    """
    caller = "short_conv"
    backends.check_series(caller, "x", x, "(B, T, D)")
    check_tensor(caller, "weight", weight)
    batch, _, width = x.shape
    if weight.dim() != 2 or len(weight) == 0 or weight.shape[1] != width:
        raise shape_error(caller, "weight", "(K, D)", f"at least 1 row of {width}", tuple(weight.shape))
    operands = {
        "weight": (weight, "(K, D)", tuple(weight.shape)),
        "past": (past, "(B, K-1, D)", (batch, len(weight) - 1, width)),
    }
    if bias is not None:
        operands["bias"] = bias, "(D,)", (width,)
    backends.check_operands(caller, x, operands)
    dtype = torch.promote_types(torch.promote_types(x.dtype, past.dtype), weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        bias = bias.to(dtype)
    check_reset(caller, reset, x)
    chosen = backends.choose(backends.forced(None), x, caller, gpu=False)
    run = _fused if chosen == "native" and len(weight) <= _MOST else _plain
    y, tail = run(x.to(dtype), weight.to(dtype), bias, past.to(dtype), reset)
    return y, tail


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, tail) as a sum of shifted products, on most devices faster than a grouped convolution."""
    time, earlier = x.shape[1], past.shape[1]
    inputs = torch.cat([past, x], 1).to(accumulate_dtype(x.dtype))
    # Which sequence an input belongs to, counted by the resets: only inputs of the same one meet.
    count = None if reset is None else F.pad(reset.long(), (earlier, 0)).cumsum(1)

    def seen(start: int, stop: int, here: slice) -> Tensor:
        if count is None:
            return inputs[:, start:stop]
        return inputs[:, start:stop].where((count[:, start:stop] == count[:, here])[..., None], 0)

    products = (seen(k, k + time, slice(earlier, None)) * row for k, row in enumerate(weight))
    y = sum(products, inputs.new_zeros(()) if bias is None else bias)
    return y.to(x.dtype), seen(time, time + earlier, slice(-1, None)).clone().to(x.dtype)


_STEPS, _MOST = 128, 4  # as in native/short_conv.c


def _call(name: str, weight: Tensor, series: tuple[Tensor | None, ...], *flat: Tensor | None) -> None:
    """Call the kernel; `series` and `flat` are its tensors with strides and its contiguous ones, in its order."""
    x = series[0]
    assert x is not None, "x is always given"
    words = chain(chain.from_iterable(map(native.layout, series)), map(native.address, flat))
    native.call(name, (*x.shape, len(weight)), x.dtype, words)


def _results(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for y and the tail."""
    return x.new_empty(x.shape), past.new_empty(past.shape)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
    x, past, weight = native.contiguous_channels(x), native.contiguous_channels(past), weight.contiguous()
    bias, reset = (None if one is None else one.contiguous() for one in (bias, reset))
    out = _results(x, weight, bias, past, reset)
    _call("short_conv_forward", weight, (x, past, *out, None, None, None, None), reset, weight, bias, None, None, None)
    return out


def _backward(grads: tuple, inputs: tuple, out: tuple) -> tuple[Tensor | None, ...]:
    x, weight, bias, past, reset = inputs
    given = [
        native.contiguous_channels(y.new_zeros(()).expand(y.shape) if grad is None else grad)
        for grad, y in zip(grads, out, strict=True)
    ]
    x, past, weight = native.contiguous_channels(x), native.contiguous_channels(past), weight.contiguous()
    reset = None if reset is None else reset.contiguous()
    grad_x, grad_past, grad_weight, grad_bias = (x.new_empty(y.shape) for y in (x, past, weight, weight[0]))
    parts = x.new_empty(
        len(x), max(1, -(-x.shape[1] // _STEPS)), len(weight) + 1, x.shape[2], dtype=accumulate_dtype(x.dtype)
    )
    _call(
        "short_conv_backward", weight, (x, past, None, None, *given, grad_x, grad_past),
        reset, weight, None, parts, grad_weight, grad_bias,
    )  # fmt: skip
    return grad_x, grad_weight, None if bias is None else grad_bias, grad_past, None


_fused = fused(
    "short_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor past, Tensor? reset",
    returned=2,
    kept=0,
    forward=_forward,
    fake=_results,
    backward=_backward,
    plain=_plain,
)
