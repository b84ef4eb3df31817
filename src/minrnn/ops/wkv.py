"""RWKV's weighted average of values, decaying with time: one fused kernel on CPU, scans in plain PyTorch elsewhere.

B batch, T time, D channels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_reset
from minrnn.ops import backends, native
from minrnn.ops.fused import fused
from minrnn.ops.scan import linear_scan


class WKVState(NamedTuple):
    """What an average needs of the past of a sequence, (B, D) each.

    Args:
        average: of the values, by their weights.
        weight: the sum of the weights, divided by exp(max).
        max: the logarithm of the largest weight, -inf before the first step. It says in which unit `weight` is, no
            more: it is a constant to autograd, and no gradient is lost by that. Where `weight` is 0 there is no past,
            whatever the unit, and none of its gradients: a state that is to be learned begins with weights above 0.
    """

    average: Tensor
    weight: Tensor
    max: Tensor


def wkv(
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    bonus: Tensor,
    initial: WKVState | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """The average of all values up to now, weighted by exp(key), which decays with time, for each channel.

    y_t = (sum over j < t of e^{k_j - (t-1-j) w} v_j + e^{u + k_t} v_t) / (the same with all v = 1).

    Without decay and bonus, w = u = 0, this is softmax attention of one query that is the same at all times.

    Args:
        keys: k, (B, T, D), finite: float32, float64, bfloat16 or float16.
        values: v, (B, T, D), of the dtype of `keys`.
        decay: w, (D,), not below 0: what a weight loses at each step, as a logarithm.
        bonus: u, (D,): what the weight of the current step has more, as a logarithm.
        initial: the state of earlier steps; None at the beginning of a sequence.
        reset: bool (B, T). Where true, step t begins a new sequence, by selection, so that a NaN before ends there.

    Returns:
        y, (B, T, D), in the dtype of `values`; and the state after the last step, float32 for 16-bit values.

    Numerics: in the state's dtype, weights in units of the largest, so that no key is too large; deterministic, and
    on the native backend bitwise independent of the batch and of the number of threads.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes do not agree.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer era" (2023), section 3.
    """
    caller = "wkv"
    backends.check_series(caller, "keys", keys, "(B, T, D)")
    batch, _, width = keys.shape
    dtype, shape = accumulate_dtype(keys.dtype), (batch, width)
    if initial is None:
        zeros = keys.new_zeros(shape, dtype=dtype)
        initial = WKVState(zeros, zeros, keys.new_full(shape, -math.inf, dtype=dtype))
    operands = {
        "values": (values, "(B, T, D)", tuple(keys.shape)),
        "decay": (decay, "(D,)", (width,)),
        "bonus": (bonus, "(D,)", (width,)),
        **{f"initial.{name}": (part, "(B, D)", shape) for name, part in initial._asdict().items()},
    }
    backends.check_operands(caller, keys, operands)
    if values.dtype != keys.dtype:
        raise TypeError(f"{caller}: values must have the dtype of keys, {keys.dtype}, got {values.dtype}")
    check_reset(caller, reset, keys)
    # What weighs nothing does so in any unit, as in a state of zeros; a unit far above the keys would drown them.
    initial = initial._replace(max=initial.max.masked_fill(initial.weight == 0, -math.inf))
    run: Callable[..., tuple[Tensor, ...]]
    run = _fused if backends.choose(backends.forced(None), keys, caller, gpu=False) == "native" else _plain
    y, average, weight, top = run(*(x.to(dtype) for x in (keys, values, decay, bonus, *initial)), reset)
    return y.to(values.dtype), WKVState(average, weight, top.detach())


def _plain(
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    bonus: Tensor,
    average: Tensor,
    weight: Tensor,
    top: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    """(y, average, weight, max) by two scans: of the weights, and of the averages, which move towards each value by the
    share that it has in the weight."""

    def before(first: Tensor, after: Tensor, fresh: float) -> Tensor:
        """What was carried into each step."""
        carried = torch.cat([first[:, None], after[:, :-1]], 1)
        return carried if reset is None else carried.masked_fill(reset[..., None], fresh)

    if keys.shape[1] == 0:
        return keys * values, average.clone(), weight.clone(), top.clone()
    tops = _running_max(keys.detach(), decay.detach(), top.detach(), reset).to(keys.dtype)
    past = before(top.detach(), tops, -math.inf)
    # The difference of the maxima first: it is exact where they are close, so that no rounding becomes a decay.
    weights = linear_scan(((past - tops) - decay).exp(), (keys - tops).exp(), weight, reset=reset)
    earlier = before(weight, weights, 0)
    # The logarithm of a key's weight over that of all before it; inf at the first step, where those weigh nothing.
    odds = keys - past - earlier.masked_fill(earlier == 0, 1).log()
    averages = linear_scan(torch.sigmoid(-odds - decay), torch.sigmoid(odds + decay) * values, average, reset=reset)
    y = torch.lerp(before(average, averages, 0), values, torch.sigmoid(odds + bonus))
    return y, averages[:, -1].clone(), weights[:, -1].clone(), tops[:, -1].clone()


def _running_max(keys: Tensor, decay: Tensor, top: Tensor, reset: Tensor | None) -> Tensor:
    """max_t = max(max_{t-1} - w, k_t), (B, T, D) in float64, begun again at resets: cummax(k_t + w t) - w t.

    Each sequence of a row is lifted above those before it; what that costs in precision only changes the unit of the
    sums. A NaN must not outlive its sequence, and is seen in the sums all the same.
    """
    keys, top = keys.nan_to_num().double(), top.nan_to_num(neginf=-math.inf).double()
    lift = torch.arange(1, keys.shape[1] + 1, dtype=torch.float64, device=keys.device)[:, None] * decay
    if reset is not None:
        raised = keys + lift
        height = torch.maximum(raised.amax(1), top) - raised.amin(1)
        lift = lift + reset.cumsum(1)[..., None] * height[:, None]
    return torch.cat([top[:, None], keys + lift], 1).cummax(1).values[:, 1:] - lift


_EVERY = 16  # as in native/wkv.c


def _results(keys: Tensor, values: Tensor, decay, bonus, average, weight, top, reset) -> tuple[Tensor, ...]:
    """Memory for y, average, weight, max, and for the states that are kept for the way back."""
    batch, time, width = keys.shape
    marks = keys.new_empty(batch, -(-time // _EVERY), 3, width)
    return keys.new_empty(keys.shape), *(keys.new_empty(batch, width) for _ in range(3)), marks


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    out = _results(*inputs)
    keys = inputs[0]
    native.call("wkv_forward", keys.shape, keys.dtype, map(native.address, (*inputs, *out)))
    return out


def _backward(grads: tuple, inputs: tuple, out: tuple) -> tuple[Tensor | None, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    keys, values, _, _, average, weight, top, _ = inputs
    given = [
        torch.zeros_like(x) if grad is None else grad.contiguous() for grad, x in zip(grads[:3], out[:3], strict=True)
    ]
    found = [torch.empty_like(x) for x in (keys, values, average, average, average, weight)]
    native.call("wkv_backward", keys.shape, keys.dtype, map(native.address, (*inputs, *out, *given, *found)))
    grad_keys, grad_values, grad_decay, grad_bonus, *grad_state = found
    return grad_keys, grad_values, grad_decay.sum(0), grad_bonus.sum(0), *grad_state, torch.zeros_like(top), None


_fused = fused(
    "wkv",
    "Tensor keys, Tensor values, Tensor decay, Tensor bonus, Tensor average, Tensor weight, Tensor top, Tensor? reset",
    returned=4,
    kept=1,
    forward=_forward,
    fake=_results,
    backward=_backward,
    plain=_plain,
)
