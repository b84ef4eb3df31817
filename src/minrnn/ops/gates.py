"""What a gated layer puts into its recurrence: from a projection to the coefficients and values of h_t = a_t h_{t-1} +
b_t.

Elementwise, plain PyTorch, differentiable any number of times. Every rule of the fused scans (forward, backward,
tangent) that is not a kernel is said by the two functions here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import Projection, Series, accumulate_dtype, laid_out_like

ACTIVATIONS = ("g", "identity", "tanh")


def width(gates: str) -> int:
    """How many blocks of H channels a projection has: 2 for minGRU, 3 for minLSTM."""
    return 2 if gates == "mingru" else 3


def results(source: Tensor, values: Tensor | None, gates: str) -> tuple[Tensor, Tensor]:
    """Memory for what a scan gives: h, laid out as the series that it comes from, and the last state."""
    like = source if values is None else values
    channels = like.shape[2] if values is not None else like.shape[2] // width(gates)
    last = like.new_empty((like.shape[0], channels), dtype=accumulate_dtype(like.dtype))
    return laid_out_like(like, channels, like.dtype), last


def activate(x: Tensor, activation: str) -> Tensor:
    """The candidate's activation: identity; tanh; or g(x) = x + 1/2 where x >= 0, else sigmoid(x).

    g is from Feng et al. (2024), appendix B.
    """
    if activation == "identity":
        return x
    if activation == "tanh":
        return torch.tanh(x)
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _slope(x: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return torch.ones_like(x)
    if activation == "tanh":
        return 1 - torch.tanh(x).square()
    return torch.where(x >= 0, torch.ones_like(x), torch.sigmoid(x) * torch.sigmoid(-x))


def coefficients(projection: Projection, gates: str, activation: str) -> tuple[Series, Series]:
    """The pair (a, b) of h_t = a_t h_{t-1} + b_t, each (B, T, H), for a projection (B, T, 2H) or (B, T, 3H).

    mingru, [gate k | candidate v]: a = sigmoid(-k), b = sigmoid(k) act(v).
    minlstm, [forget k | input i | candidate v]: with d = log sigmoid(i) - log sigmoid(k), a = sigmoid(-d), b =
    sigmoid(d) act(v), which is f/(f+i) and i/(f+i) without the 0/0 of two shut gates. minlstm_unnormalized: a =
    sigmoid(k), b = sigmoid(i) act(v).
    """
    if gates == "mingru":
        gate, candidate = projection.chunk(2, -1)
        return torch.sigmoid(-gate), torch.sigmoid(gate) * activate(candidate, activation)
    forget, into, candidate = projection.chunk(3, -1)
    value = activate(candidate, activation)
    if gates == "minlstm":
        delta = F.logsigmoid(into) - F.logsigmoid(forget)
        return torch.sigmoid(-delta), torch.sigmoid(delta) * value
    return torch.sigmoid(forget), torch.sigmoid(into) * value


def partials(projection: Projection, gates: str, activation: str) -> list[tuple[Tensor | None, Tensor | None]]:
    """The partial derivatives (da/dx, db/dx) for each block x of the projection; None where one is zero."""
    *gate_blocks, candidate = projection.chunk(width(gates), -1)
    value, slope = activate(candidate, activation), _slope(candidate, activation)
    if gates == "mingru":
        (gate,) = gate_blocks
        write = torch.sigmoid(gate)
        both = write * torch.sigmoid(-gate)
        return [(-both, both * value), (None, write * slope)]
    forget, into = gate_blocks
    if gates == "minlstm":
        delta = F.logsigmoid(into) - F.logsigmoid(forget)
        both = torch.sigmoid(delta) * torch.sigmoid(-delta)
        by_forget, by_into = both * torch.sigmoid(-forget), both * torch.sigmoid(-into)
        return [(by_forget, -by_forget * value), (-by_into, by_into * value), (None, torch.sigmoid(delta) * slope)]
    write = torch.sigmoid(into)
    return [
        (torch.sigmoid(forget) * torch.sigmoid(-forget), None),
        (None, write * torch.sigmoid(-into) * value),
        (None, write * slope),
    ]
