"""The step loop: the definition of every scan in this package, and the oracle of its tests.

Any dtype, any device, differentiable by PyTorch's own autograd: nothing here shares a rule with the fast backends.
"""

import torch
from jaxtyping import Inexact
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
    """h_t = a_t h_{t-1} + b_t, one step after the other.

    Args: `coeffs` broadcastable to (B, T, H), `values` (B, T, H), `initial` and `restart` (B, H) or None for zeros,
    `reset` bool (B, T), `lengths` int (B,). Returns: h (B, T, H), zero beyond a length, and the last state (B, H).
    """
    batch, time, hidden = values.shape
    # Taken apart once: the gradient of each single step of a tensor would be as large as the tensor.
    steps = list(zip(coeffs.expand(values.shape).unbind(1), values.unbind(1), strict=True))
    state = values.new_zeros(batch, hidden) if initial is None else initial.clone()
    restart = torch.zeros_like(state) if restart is None else restart
    outputs: list[Tensor] = [state] * time
    for t in reversed(range(time)) if reverse else range(time):
        coeff, value = steps[t]
        carried = state if reset is None else torch.where(reset[:, t, None], restart, state)
        new = coeff * carried + value
        if lengths is None:
            outputs[t] = state = new
        else:
            valid = (t < lengths)[:, None]
            state = torch.where(valid, new, state)
            outputs[t] = torch.where(valid, new, torch.zeros_like(new))
    return (torch.stack(outputs, 1) if time else torch.zeros_like(values)), state
