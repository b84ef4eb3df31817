"""xLSTM's scalar memory with recurrent weights, one step after the other: a kernel on CPU, plain PyTorch elsewhere.

B batch, T time, D channels, N heads, d = D / N channels of one head.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_reset, check_tensor, shape_error
from minrnn.ops import backends, native
from minrnn.ops.fused import fused


class SLSTMState(NamedTuple):
    """What a step takes from the steps before it, (B, D) each.

    Args:
        h: the output, 0 before the first step.
        c: the sum of the candidates, divided by exp(m), 0 before the first step.
        n: the sum of their weights, divided by exp(m), 0 before the first step.
        m: the logarithm of a weight that none of the past ones exceeds by much, -inf before the first step. It says in
            which unit the sums are, no more: it is a constant to autograd, and no gradient is lost by that.
    """

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


def slstm_scan(
    into: Tensor,
    forget: Tensor,
    candidate: Tensor,
    output: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial: SLSTMState | None = None,
    *,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SLSTMState]:
    """sLSTM: an LSTM with an exponential input gate, whose memory is an average, and whose heads see their own past.

    With g_t = x_t + R h_{t-1} + b for each x of the four inputs, in each head:

        c_t = sigmoid(f_t) c_{t-1} + exp(i_t) tanh(z_t),  n_t = sigmoid(f_t) n_{t-1} + exp(i_t),
        h_t = sigmoid(o_t) c_t / n_t.

    c and n are kept divided by exp(m_t), m_t = max(m_{t-1} + log sigmoid(f_t), i_t), so that no gate is too large. A
    sequence begins with c = n = h = 0 and m = -inf: its first step is m = i, whatever the unit.

    The four inputs are four tensors because they come of separate maps: joining them would cost a copy.

    Args:
        into: what enters i, (B, T, D): float32, float64, bfloat16 or float16.
        forget: what enters f, (B, T, D), of the same dtype, as are the next two.
        candidate: what enters z, (B, T, D).
        output: what enters o, (B, T, D).
        recurrent: R, (N, d, 4, d): in each head, from the channels of h to the four gates, in the order above.
        bias: b, (4, D).
        initial: the state after earlier steps; None at the beginning of a sequence.
        reset: bool (B, T). Where true, step t begins a new sequence, by selection, so that a NaN before ends there.
        backend: "native", the kernel, or "parallel" or "reference", which are both the loop in plain PyTorch; None
            takes the fastest for the tensors' device.

    Returns:
        h, (B, T, D), in the dtype of the inputs; and the state after the last step, float32 for 16-bit inputs.

    Numerics: in the state's dtype; deterministic, and on the native backend bitwise independent of the batch and of the
    number of threads.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes do not agree, or the backend cannot serve.

    Source: Beck et al., "xLSTM: Extended long short-term memory" (2024), section 2.2 and appendix A.2.
    """
    caller = "slstm_scan"
    backends.check_series(caller, "into", into, "(B, T, D)")
    batch, _, width = into.shape
    dtype = accumulate_dtype(into.dtype)
    check_tensor(caller, "recurrent", recurrent)
    heads = len(recurrent) if recurrent.dim() else 0
    if heads == 0 or width % heads or recurrent.shape != (heads, width // heads, 4, width // heads):
        wanted = f"a square for each of 4 gates and N heads, D = {width} channels in all"
        raise shape_error(caller, "recurrent", "(N, d, 4, d)", wanted, tuple(recurrent.shape))
    if initial is None:
        zeros = into.new_zeros(batch, width, dtype=dtype)
        initial = SLSTMState(zeros, zeros, zeros, torch.full_like(zeros, -math.inf))
    series = {"forget": forget, "candidate": candidate, "output": output}
    operands = {
        **{name: (each, "(B, T, D)", tuple(into.shape)) for name, each in series.items()},
        "recurrent": (recurrent, "(N, d, 4, d)", tuple(recurrent.shape)),
        "bias": (bias, "(4, D)", (4, width)),
        **{f"initial.{name}": (part, "(B, D)", (batch, width)) for name, part in initial._asdict().items()},
    }
    backends.check_operands(caller, into, operands)
    for name, each in series.items():
        if each.dtype != into.dtype:
            raise TypeError(f"{caller}: {name} must have the dtype of into, {into.dtype}, got {each.dtype}")
    check_reset(caller, reset, into)
    run = _fused if backends.choose(backends.forced(backend), into, caller, gpu=False) == "native" else _plain
    tensors = [x.to(dtype) for x in (into, forget, candidate, output, recurrent, bias, *initial)]
    y, h, c, n, m = run(*[*tensors, reset])
    return y.to(into.dtype), SLSTMState(h, c, n, m.detach())


def _plain(
    into: Tensor,
    forget: Tensor,
    candidate: Tensor,
    output: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    """(y, h, c, n, m), one step after the other."""
    heads, size, _, _ = recurrent.shape
    m, outputs = m.detach(), []
    # Taken apart once: the gradient of each single step of a tensor would be as large as the tensor.
    for t, gates in enumerate((torch.stack([into, forget, candidate, output], 2) + bias).unbind(1)):
        if reset is not None:
            begins = reset[:, t, None]
            h, c, n, m = (*(x.masked_fill(begins, 0) for x in (h, c, n)), m.masked_fill(begins, -math.inf))
        with torch.autocast(h.device.type, enabled=False):  # the recurrence keeps its precision
            past = torch.einsum("bka,kagj->bgkj", h.unflatten(1, (heads, size)), recurrent)
        i, f, z, o = (gates + past.flatten(2)).unbind(1)
        kept = F.logsigmoid(f)
        top = torch.maximum(m + kept, i).detach()
        # The difference of the maxima first: it is exact where they are close, so that no rounding becomes a decay.
        old, new, m = ((m - top) + kept).exp(), (i - top).exp(), top
        c, n = old * c + new * z.tanh(), old * n + new
        h = o.sigmoid() * (c / n)
        outputs.append(h)
    return torch.stack(outputs, 1) if outputs else into.clone(), h.clone(), c.clone(), n.clone(), m.clone()


_EVERY = 8  # as in native/slstm.c


def _results(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for y, h, c, n, m, and for the states that are kept for the way back."""
    into = inputs[0]
    assert into is not None, "all but the resets are always given"
    batch, time, width = into.shape
    marks = into.new_empty(batch, -(-time // _EVERY), 3, width)
    return into.new_empty(into.shape), *(into.new_empty(batch, width) for _ in range(4)), marks


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    out = _results(*inputs)
    into, recurrent = inputs[0], inputs[4]
    sizes = (*into.shape, len(recurrent))
    native.call("slstm_forward", sizes, into.dtype, map(native.address, (*inputs, *out)))
    return out


def _backward(grads: tuple, inputs: tuple, out: tuple) -> tuple[Tensor | None, ...]:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    series, recurrent, bias, h, m = inputs[:4], inputs[4], inputs[5], inputs[6], inputs[9]
    given = [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads[:4], out[:4], strict=True)]
    transposed = recurrent.permute(0, 2, 3, 1).contiguous()
    *grad_series, grad_recurrent = (torch.empty_like(x) for x in (*series, recurrent))
    grad_bias, grad_state = bias.new_empty(len(h), *bias.shape), [torch.empty_like(h) for _ in range(3)]
    found = (*grad_series, grad_recurrent, grad_bias, *grad_state)
    words = map(native.address, (*inputs, *out, transposed, *given, *found))
    native.call("slstm_backward", (*series[0].shape, len(recurrent)), h.dtype, words)
    return *grad_series, grad_recurrent, grad_bias.sum(0), *grad_state, torch.zeros_like(m), None


_fused = fused(
    "slstm",
    "Tensor into, Tensor forget, Tensor candidate, Tensor output, Tensor recurrent, Tensor bias, "
    "Tensor h, Tensor c, Tensor n, Tensor m, Tensor? reset",
    returned=5,
    kept=1,
    forward=_forward,
    fake=_results,
    backward=_backward,
    plain=_plain,
)
