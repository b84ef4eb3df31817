"""The scan in plain PyTorch, parallel over time, for any device: MPS, XPU, a CPU without the C library.

Neighbouring steps are composed, (a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2), the half as long scan is solved by the
same rule, and the steps between are filled in: O(T) work in O(log T) passes (Blelloch 1990, in the odd-even form). No
logarithms are taken.
"""

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from minrnn._shapes import Lengths, Reset, Series, State


def scan(
    coeffs: Inexact[Tensor, "#B #T #H"],
    values: Series,
    initial: State | None = None,
    *,
    reset: Reset | None = None,
    restart: State | None = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
) -> tuple[Series, State]:
    """As reference.scan. Differentiable, but every pass is kept for it; the rules need the inputs and h only."""
    batch, time, hidden = values.shape
    if initial is None:
        initial = values.new_zeros(batch, hidden)
    if time == 0:
        return torch.zeros_like(values), initial.clone()
    coeffs = coeffs.expand(values.shape)
    padding = None
    if lengths is not None:  # padding hands the state on
        padding = padded_steps(lengths, time)
        coeffs = torch.where(padding, torch.ones_like(coeffs), coeffs)
        values = torch.where(padding, torch.zeros_like(values), values)
    cut = None
    if reset is not None:
        cut = reset[..., None] if padding is None else reset[..., None] & ~padding
        if restart is not None:
            values = torch.where(cut, coeffs * restart[:, None] + values, values)
        coeffs = coeffs.masked_fill(cut, 0)  # their gradient would be that of a product with what is cut off, or NaN
    if reverse:
        coeffs, values = coeffs.flip(1), values.flip(1)
        cut = None if cut is None else cut.flip(1)
    # The first step takes in the initial state; a cut there would drop it.
    first = coeffs[:, :1] * initial[:, None] + values[:, :1]
    if cut is not None:
        first = torch.where(cut[:, :1], values[:, :1], first)
    hidden_states = _solve(coeffs, torch.cat([first, values[:, 1:]], 1), cut)
    last = hidden_states[:, -1].clone()
    if reverse:
        hidden_states = hidden_states.flip(1)
    if padding is not None:
        hidden_states = hidden_states.masked_fill(padding, 0)
    return hidden_states, last


def padded_steps(lengths: Lengths, time: int) -> Bool[Tensor, "B T 1"]:
    """The steps at or beyond each length, (B, T, 1) bool."""
    return torch.arange(time, device=lengths.device)[None, :, None] >= lengths[:, None, None]


def _solve(coeffs: Tensor, values: Tensor, cut: Tensor | None) -> Tensor:
    """h_0 = b_0, h_t = a_t h_{t-1} + b_t, where a step with `cut` takes nothing from before, by selection."""
    time = values.shape[1]
    if time == 1:
        return values
    pairs = time // 2
    a1, a2 = coeffs[:, 0 : 2 * pairs : 2], coeffs[:, 1::2]
    b1, b2 = values[:, 0 : 2 * pairs : 2], values[:, 1::2]
    pair_values, pair_cut = a2 * b1 + b2, None
    if cut is not None:
        cut1, cut2 = cut[:, 0 : 2 * pairs : 2], cut[:, 1::2]
        pair_values = torch.where(cut2, b2, pair_values)
        pair_cut = cut1 | cut2
    odd = _solve(a2 * a1, pair_values, pair_cut)
    even = coeffs[:, 2::2] * odd[:, : (time - 1) // 2] + values[:, 2::2]
    if cut is not None:
        even = torch.where(cut[:, 2::2], values[:, 2::2], even)
    even = torch.cat([values[:, :1], even], 1)
    states = torch.stack([even[:, :pairs], odd], 2).flatten(1, 2)
    return states if time % 2 == 0 else torch.cat([states, even[:, pairs:]], 1)
