"""Blocks and their stack: what surrounds a mixer.

B batch, T time, D model width.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._shapes import check_tensor
from minrnn.mixers import CausalConv, ChannelMix, Mixer, Place, make_mixer
from minrnn.mixers.contract import scaled
from minrnn.models.config import BackboneConfig


class GatedMLP(nn.Module):
    """y = W_out (u ⊙ gelu(v)) + b_out, u = W_value x + b_value, v = W_gate x + b_gate.

    Args:
        width: D.
        hidden: of u and v. (Of one wider map they would cost autograd a concatenation.)

    Source: Shazeer, "GLU variants improve Transformer" (2020), GEGLU.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.output(self.value(x) * F.gelu(self.gate(x)))


def make_norm(config: BackboneConfig) -> nn.Module:
    """LayerNorm without bias, the fastest on CPUs, or RMSNorm."""
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width, bias=False)


def make_mlp(config: BackboneConfig, hidden: int, place: Place) -> nn.Module:
    """The map from (B, T, D) to itself that follows a mixer; a `Mixer` if it looks back in time."""
    if config.mlp_kind == "channel_mix":
        return ChannelMix(config.width, hidden, place)
    if config.mlp_kind == "geglu":
        return GatedMLP(config.width, hidden)
    activation = nn.GELU() if config.mlp_kind == "gelu" else nn.ReLU()
    return nn.Sequential(nn.Linear(config.width, hidden), activation, nn.Linear(hidden, config.width))


class Block(nn.Module):
    """x + conv(x), then x + mixer(norm(x)), then x + dropout(mlp(norm(x))); the first and the last only if the config
    has them.

    It is called as a `Mixer` is, and its state is as opaque.

    Args:
        config: of the stack that the block belongs to.
        place: where it stands in that.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), appendix C.2, and the sources of the mixers.
    """

    def __init__(self, config: BackboneConfig, place: Place) -> None:
        super().__init__()
        hidden = int(scaled(config.width, config.mlp or 0))
        self.conv = CausalConv(config.width, config.conv) if config.conv else None
        self.mixer_norm = make_norm(config)
        self.mixer = make_mixer(config.mixer, config.width, config.mixer_options, place)
        self.mlp_norm = make_norm(config) if hidden else None
        self.mlp = make_mlp(config, hidden, place) if hidden else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        check_tensor("Block", "x", x)
        if state is None:  # each part makes its own: sharded ones have weights for it only when they are called
            state = tuple(None if isinstance(part, Mixer) else () for part in (self.conv, self.mixer, self.mlp))
        _check_parts("Block", state, 3)
        before, mixed, after = state
        if self.conv is not None:
            y, before = self.conv(x, before, reset=reset)
            x = x + y
        y, mixed = self.mixer(self.mixer_norm(x), mixed, reset=reset)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            y = self.mlp_norm(x)
            if isinstance(self.mlp, Mixer):
                y, after = self.mlp(y, after, reset=reset)
            else:
                y = self.mlp(y)
            x = x + self.dropout(y)
        return x, (before, mixed, after)

    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences."""
        parts = (self.conv, self.mixer, self.mlp)
        return tuple(part.initial_state(batch_size) if isinstance(part, Mixer) else () for part in parts)


class Backbone(nn.Module):
    """Blocks one after the other, and a last norm. It is called as a `Mixer` is, and its state is as opaque.

    Args:
        config: how many blocks, and of what.

    Raises:
        TypeError: config is none.
    """

    def __init__(self, config: BackboneConfig) -> None:
        if not isinstance(config, BackboneConfig):
            raise TypeError(f"Backbone: config must be a BackboneConfig, got {type(config).__name__}")
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, Place(i, config.layers)) for i in range(config.layers))
        self.norm = make_norm(config)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        check_tensor("Backbone", "x", x)
        state = (None,) * len(self.blocks) if state is None else state
        _check_parts("Backbone", state, len(self.blocks))
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, carried = block(x, before, reset=reset)
            after.append(carried)
        return self.norm(x), tuple(after)

    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences."""
        return tuple(cast(Block, block).initial_state(batch_size) for block in self.blocks)


def _check_parts(caller: str, state: object, parts: int) -> None:
    if not isinstance(state, tuple) or len(state) != parts:
        got = f"{len(state)} parts" if isinstance(state, tuple) else type(state).__name__
        raise ValueError(f"{caller}: state must be a tuple of {parts} parts, as calls give it, got {got}")
