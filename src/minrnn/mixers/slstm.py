"""sLSTM: xLSTM's scalar memory, whose heads see their own past.

B batch, T time, D model width, N heads, K kernel size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state
from minrnn.mixers.conv import DepthwiseConv
from minrnn.mixers.headwise import HeadwiseLinear, HeadwiseNorm, small_init_
from minrnn.ops import SLSTMState, slstm_scan


@dataclass(frozen=True)
class SLSTMConfig:
    """Options of `SLSTM`.

    Args:
        heads: how many, a divisor of the width
        conv: kernel of the convolution before the input gate and the forget gate, 0 for none
    """

    heads: int = 4
    conv: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "heads")
        check_at_least(self, 0, "conv")


class SLSTMMixerState(NamedTuple):
    """What a chunk takes from those before it.

    Args:
        conv: (B, K-1, D), the last inputs; K = 1 where there is no convolution.
        h, c, n, m: (B, D), as in `minrnn.ops.SLSTMState`.
    """

    conv: Tensor
    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTM(Mixer):
    """y = norm(slstm_scan(W_i x', W_f x', W_z x, W_o x)), x' = silu(conv(x)); maps, memory and norm are by heads.

    `minrnn.ops.slstm_scan` has the recurrence, R and b in it. The maps begin from N(0, 2 / (5 D)), R at zero, and b at
    zero but for the forget gate: with j = 0 ... d-1 the channel of d in its head, l the layer of L,
    b_f = 5 - 12 (j / (d-1))^(0.3 + 1.3 l / (L-1)). The first layer has l / (L-1) = 0 in every stack, also in one of one
    layer; and the first channel j / (d-1) = 0: it remembers longest. All biases stay
    float32 when the module is cast. As in the authors' code, neither R nor b decays.

    Args:
        width: D.
        config: the options.
        place: l and L.

    Raises:
        ValueError: the heads do not divide the width, or leave some a single channel.

    Source: Beck et al., "xLSTM: Extended long short-term memory" (2024), section 2.2 and appendix A.2; their code for
    what stands around the recurrence and for how it begins.
    """

    def __init__(self, width: int, config: SLSTMConfig, place: Place = ALONE) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"{type(self).__name__}: heads must divide width = {width}, got {config.heads}")
        if width // config.heads < 2:  # the norm of one channel is always 0
            caller = type(self).__name__
            raise ValueError(
                f"{caller}: heads must leave each at least 2 of width = {width} channels, got {config.heads}"
            )
        size, depth = width // config.heads, place.layer / max(place.layers - 1, 1)
        self.conv = DepthwiseConv(width, config.conv) if config.conv else None
        self.into, self.forget, self.candidate, self.output = (HeadwiseLinear(width, config.heads) for _ in range(4))
        for layer in (self.into, self.forget, self.candidate, self.output):
            small_init_(layer.weight, width)
        self.recurrent = nn.Parameter(torch.zeros(config.heads, size, 4, size))
        self.bias = nn.Parameter(torch.zeros(4, width))
        channel = torch.arange(size) / max(size - 1, 1)
        with torch.no_grad():
            self.bias[1] = (5 - 12 * channel ** (0.3 + 1.3 * depth)).repeat(config.heads)
        self.norm = HeadwiseNorm(width, config.heads)

    def tuning(self) -> Mapping[str, Tuning]:
        """The recurrence's own parameters do not decay, and its biases keep their precision."""
        return {"recurrent": Tuning(decay=False), "bias": Tuning(decay=False, keep_float32=True)}

    def forward(
        self, x: Tensor, state: SLSTMMixerState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, SLSTMMixerState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, width = type(self).__name__, self.bias.shape[1]
        check_series(caller, x, width, reset, self.into.weight)
        if state is None:
            state = self.initial_state(len(x))
        past = 0 if self.conv is None else self.conv.kernel - 1
        shapes = {name: ("(B, D)", (len(x), width)) for name in SLSTMState._fields}
        check_state(
            caller, state, SLSTMMixerState, self.into.weight, conv=("(B, K-1, D)", (len(x), past, width)), **shapes
        )
        mixed, tail = x, state.conv
        if self.conv is not None:
            mixed, tail = self.conv(x, tail, reset=reset)
            mixed = F.silu(mixed)
        h, after = slstm_scan(
            self.into(mixed),
            self.forget(mixed),
            self.candidate(x),
            self.output(x),
            self.recurrent,
            self.bias,
            SLSTMState(*state[1:]),
            reset=reset,
        )
        return self.norm(h).to(h.dtype), SLSTMMixerState(tail, *after)

    def initial_state(self, batch_size: int) -> SLSTMMixerState:
        """Zeros before the sequence, and nothing remembered."""
        weight, width = self.into.weight, self.bias.shape[1]
        tail = weight.new_zeros(batch_size, 0, width) if self.conv is None else self.conv.initial_state(batch_size)
        h, c, n = weight.new_zeros(3, batch_size, width, dtype=accumulate_dtype(weight.dtype)).unbind()
        return SLSTMMixerState(tail, h, c, n, torch.full_like(h, -math.inf))

    @property
    def state_size(self) -> int:
        """(K-1) D for the convolution, 4 D for the memory."""
        return (0 if self.conv is None else self.conv.state_size) + 4 * self.bias.shape[1]
