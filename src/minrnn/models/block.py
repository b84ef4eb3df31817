"""Blocks and their stack: what surrounds a mixer.

B batch, T time, D model width.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.mixers import CausalConv, make_mixer
from minrnn.models.config import BackboneConfig


class MLP(nn.Module):
    """y = dropout(W_out (u ⊙ gelu(v)) + b_out), u = W_value x + b_value, v = W_gate x + b_gate: a gated MLP.

    Args:
        width: D.
        hidden: of u and v. (Of one wider map they would cost autograd a concatenation.)
        dropout: share of y that is dropped in training.

    Source: Shazeer, "GLU variants improve Transformer" (2020), GEGLU.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.dropout(self.output(self.value(x) * F.gelu(self.gate(x))))


class Block(nn.Module):
    """x + conv(x), then x + mixer(norm(x)), then x + mlp(norm(x)); the first and the last only if the config has them.

    It is called as a `Mixer` is, and its state is as opaque.

    Args:
        config: of the stack that the block belongs to.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), appendix C.2. The norm is LayerNorm without bias, the
    fastest on CPUs.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.mlp * config.width)
        self.conv = CausalConv(width, config.conv) if config.conv else None
        self.mixer_norm = nn.LayerNorm(width, bias=False)
        self.mixer = make_mixer(config.mixer, width, config.mixer_options)
        self.mlp_norm = nn.LayerNorm(width, bias=False) if hidden else None
        self.mlp = MLP(width, hidden, config.dropout) if hidden else None

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        before, mixed = self.initial_state(len(x)) if state is None else state
        if self.conv is not None:
            y, before = self.conv(x, before, reset=reset)
            x = x + y
        y, mixed = self.mixer(self.mixer_norm(x), mixed, reset=reset)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, (before, mixed)

    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences."""
        before = () if self.conv is None else self.conv.initial_state(batch_size)
        return before, self.mixer.initial_state(batch_size)


class Backbone(nn.Module):
    """Blocks one after the other, and a last norm. It is called as a `Mixer` is, and its state is as opaque.

    Args:
        config: how many blocks, and of what.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        state = self.initial_state(len(x)) if state is None else state
        if len(state) != len(self.blocks):
            raise ValueError(f"Backbone: state must be that of {len(self.blocks)} blocks, got {len(state)}")
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, carried = block(x, before, reset=reset)
            after.append(carried)
        return self.norm(x), tuple(after)

    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences."""
        return tuple(cast(Block, block).initial_state(batch_size) for block in self.blocks)
