"""The selective scan of S6: a recurrence whose decay and whose input and output maps depend on the input.

B batch, T time, E channels, N state size per channel.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_reset, check_tensor, shape_error
from minrnn.ops import backends, native
from minrnn.ops.fused import fused
from minrnn.ops.scan import linear_scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t ⊙ u_t) B_tᵀ, y_t = h_t C_t + D ⊙ u_t, with h_t (E, N) for each sequence.

    The states are never in memory for all t, neither forward nor backward, except in the plain PyTorch form, which
    serves other devices, second derivatives and `torch.func`, in (B, T, E, N) numbers.

    Args:
        u: (B, T, E): float32, float64, bfloat16 or float16. This and all others may be of any of these dtypes: the scan
            is computed in float64 where u is, else in float32.
        delta: Δ, (B, T, E); with a bias, Δ = softplus(delta + bias).
        A: (E, N). Below zero the state decays.
        B: (B, T, N), the input map of each step, the same for all channels.
        C: (B, T, N), the output map.
        D: (E,), what of u goes past the state; nothing if None.
        initial: h_{-1}, (B, E, N); zeros if None.
        reset: bool (B, T). Where true, step t begins a new sequence from zeros, by selection, so that a NaN before ends
            there, in values and in gradients.
        bias: (E,), or None.
        backend: "native", "triton", "parallel", plain PyTorch, or "reference", a loop over the steps; None takes the
            fastest for the tensors' device.

    Returns:
        y, (B, T, E), in the dtype of u; and the last state, (B, E, N), float32 for 16-bit u.

    Numerics: deterministic; on the native and the triton backend a result does not depend on how the work is spread,
    nor that of a sequence on its batch, bit by bit. On the native one exp(Δ A) ends at the smallest and the largest
    power of two of the type; on the triton one what is below the smallest is zero.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes or devices do not agree, or the backend cannot serve.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section 3.2; Δ B for
    the discrete B as in its code.
    """
    caller = "selective_scan"
    backends.check_series(caller, "u", u, "(B, T, E)")
    check_tensor(caller, "A", A)
    batch, time, width = u.shape
    if A.dim() != 2 or len(A) != width:
        raise shape_error(caller, "A", "(E, N)", f"two dimensions, the first {width}", tuple(A.shape))
    dtype, states = accumulate_dtype(u.dtype), A.shape[1]
    D = u.new_zeros(width) if D is None else D
    initial = u.new_zeros(batch, width, states, dtype=dtype) if initial is None else initial
    operands = {
        "A": (A, "(E, N)", tuple(A.shape)),
        "delta": (delta, "(B, T, E)", (batch, time, width)),
        "B": (B, "(B, T, N)", (batch, time, states)),
        "C": (C, "(B, T, N)", (batch, time, states)),
        "D": (D, "(E,)", (width,)),
        "initial": (initial, "(B, E, N)", (batch, width, states)),
    }
    if bias is not None:
        operands["bias"] = bias, "(E,)", (width,)
    backends.check_operands(caller, u, operands)
    check_reset(caller, reset, u)
    chosen = backends.choose(backends.forced(backend), u, caller)
    bias = None if bias is None else bias.to(dtype)
    # The GPU widens u and delta as it reads them.
    series = [x if chosen == "triton" and accumulate_dtype(x.dtype) == dtype else x.to(dtype) for x in (u, delta)]
    args: tuple[Any, ...] = (*series, *(x.to(dtype) for x in (A, B, C, D, initial)), reset, bias)
    run = {"native": _fused, "triton": _gpu}.get(chosen) or partial(_plain, backend=chosen)
    y, last = run(*args)
    return y.to(u.dtype), last


def _plain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    bias: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, last) by one linear scan over all E N numbers of state."""
    narrow, u, delta = u.dtype, u.to(A.dtype), delta.to(A.dtype)
    delta = delta if bias is None else -F.logsigmoid(-delta - bias)  # softplus, exact at any size
    decay, values = (delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None]
    states = linear_scan(decay.flatten(2), values.flatten(2), initial.flatten(1), reset=reset, backend=backend)
    states = states.view(decay.shape)
    last = states[:, -1].clone() if u.shape[1] else initial.clone()
    return ((states * C[:, :, None]).sum(-1) + D * u).to(narrow), last


_BLOCK, _VECTOR, _EVERY = 128, 16, 32  # as in native/selective.c


def _blocks(width: int) -> tuple[int, int]:
    """In how many blocks the channels are taken, and the memory of each in channels."""
    most = -(-width // _BLOCK)
    own = -(-width // max(most * _VECTOR, 1)) * _VECTOR
    return -(-width // max(own, 1)), own


def _results(u: Tensor, delta: Tensor, A: Tensor, B, C, D, initial: Tensor, reset, bias) -> tuple[Tensor, ...]:
    """Memory for y, the last state, and the states that are kept for the way back."""
    (batch, time, _), (blocks, own) = u.shape, _blocks(u.shape[2])
    marks = u.new_empty(batch, blocks, -(-time // _EVERY), A.shape[1], own)
    return u.new_empty(u.shape), u.new_empty(initial.shape), marks


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    out = _results(*inputs)
    u, rates = inputs[0], inputs[2]
    sizes = (*u.shape, rates.shape[1])
    native.call("selective_forward", sizes, u.dtype, map(native.address, (*inputs, *out)))
    return out


def _backward(grads: tuple, inputs: tuple, out: tuple) -> tuple[Tensor | None, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    u, delta, A, B, C, D, initial, _, bias = inputs
    given = [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads[:2], out[:2], strict=True)]
    found = [torch.empty_like(x) for x in (u, delta, initial)]
    # What is summed over sequences or channels comes in parts, which are added up one after the other.
    parts = [x.new_empty(len(u), *x.shape) for x in (A, D, D)]
    parts += [x.new_empty(_blocks(len(A))[0], *x.shape) for x in (B, C)]
    words = map(native.address, (*inputs, *out, *given, *found, *parts))
    native.call("selective_backward", (*u.shape, A.shape[1]), u.dtype, words)
    sums: list[Tensor] = []
    for part in parts:
        total = part.new_zeros(part.shape[1:])
        for x in part.unbind():
            total += x
        sums.append(total)
    grad_u, grad_delta, grad_initial = found
    grad_a, grad_d, grad_bias, grad_b, grad_c = sums
    return (
        *(grad_u, grad_delta, grad_a, grad_b, grad_c, grad_d, grad_initial, None),
        None if bias is None else grad_bias,
    )


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor initial, Tensor? reset, Tensor? bias"
)
_fused = fused(
    "selective_scan",
    _ARGUMENTS,
    returned=2,
    kept=1,
    forward=_forward,
    fake=_results,
    backward=_backward,
    plain=_plain,
)


def _on_gpu(name: str) -> Callable[..., Any]:
    """A function of the GPU's kernels, which are imported when they are first called."""
    return lambda *args: getattr(importlib.import_module("minrnn.ops.triton.selective"), name)(*args)


_gpu = fused(
    "selective_scan_gpu",
    _ARGUMENTS,
    returned=2,
    kept=1,
    forward=_on_gpu("forward"),
    fake=_on_gpu("results"),
    backward=_on_gpu("backward"),
    plain=_plain,
)
