"""Mamba: a selective state-space model between a short convolution and a gate.

B batch, T time, D model width, E = expansion x D channels, K kernel size.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_positive, check_types
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state, scaled
from minrnn.mixers.conv import DepthwiseConv
from minrnn.mixers.inner import inner_config, make_inner


@dataclass(frozen=True)
class MambaConfig:
    """Options of `Mamba`.

    Args:
        expansion: channels in widths of the model
        conv: K, the kernel of the convolution before the inner layer
        inner: what mixes along time, one of the table of inner layers
        inner_options: options of that; S6's rank is a 16th of the model's width, rounded up, if they say nothing else
    """

    expansion: float = 2.0
    conv: int = 4
    inner: str = "s6"
    inner_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "expansion")
        check_at_least(self, 1, "conv")
        inner_config(self.inner, self.inner_options)


class MambaState(NamedTuple):
    """What `Mamba` has seen.

    Args:
        conv: (B, K-1, E), the last inputs of the convolution, zeros for those before the beginning of a sequence.
        inner: the state of the inner layer.
    """

    conv: Tensor
    inner: Any


class Mamba(Mixer):
    """u = silu(conv(W_u x)), y = W_out (inner(u) ⊙ silu(W_z x)), conv depthwise and causal.

    The linear maps begin as nn.Linear's, W_out divided by the square root of the number of layers. (W_u and W_z as one
    map would cost autograd a concatenation.)

    Args:
        width: D.
        config: the options.
        place: where the mixer stands; how many layers there are scales W_out.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section 3.4.
    """

    def __init__(self, width: int, config: MambaConfig, place: Place = ALONE) -> None:
        super().__init__()
        hidden, options = int(scaled(width, config.expansion)), config.inner_options
        if hidden < 1:
            raise ValueError(f"Mamba: expansion x width must be at least 1, got {config.expansion} x {width}")
        if config.inner == "s6":
            options = {"rank": math.ceil(width / 16)} | options
        self.input = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.conv = DepthwiseConv(hidden, config.conv)
        self.inner = make_inner(config.inner, hidden, options, place)
        self.output = nn.Linear(hidden, width, bias=False)
        with torch.no_grad():
            self.output.weight /= math.sqrt(place.layers)

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller = type(self).__name__
        check_series(caller, x, self.input.in_features, reset, self.input.weight)
        state = self.initial_state(len(x)) if state is None else state
        past = (len(x), self.conv.kernel - 1, self.conv.width)
        check_state(caller, state, MambaState, self.input.weight, conv=("(B, K-1, E)", past))
        u, conv = self.conv(self.input(x), state.conv, reset=reset)
        mixed, inner = self.inner(F.silu(u), state.inner, reset=reset)
        return self.output(mixed * F.silu(self.gate(x))), MambaState(conv, inner)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros, and the initial state of the inner layer."""
        return MambaState(self.conv.initial_state(batch_size), self.inner.initial_state(batch_size))

    @property
    def state_size(self) -> int | None:
        """(K-1) E and that of the inner layer."""
        inner = self.inner.state_size
        return None if inner is None else self.conv.state_size + inner
