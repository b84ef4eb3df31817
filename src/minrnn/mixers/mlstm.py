"""mLSTM, the layer of xLSTM whose memory is a matrix.

B batch, T time, D model width, W inner width, H heads, d = W / H channels of a head, K kernel size.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_positive, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state, plain, scaled
from minrnn.mixers.conv import DepthwiseConv
from minrnn.mixers.headwise import HeadwiseLinear, HeadwiseNorm, small_init_
from minrnn.ops.mlstm import mlstm

MULTIPLE = 64  # of which the inner width is one


@dataclass(frozen=True)
class MLSTMConfig:
    """Options of `MLSTM`.

    Args:
        heads: H, each with a memory of its own
        expansion: inner width in widths of the model; it is rounded up to a multiple of 64
        conv: kernel of the convolution before queries and keys
        block: channels in each block of the maps to queries, keys and values
    """

    heads: int = 4
    expansion: float = 2.0
    conv: int = 4
    block: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "heads", "conv", "block")
        check_positive(self, "expansion")


class MLSTMState(NamedTuple):
    """What an `MLSTM` carries; all but the first in float32 where the model is 16-bit.

    Args:
        conv: the last inputs of the convolution, (B, K-1, W).
        matrix: C, (B, H, d, d).
        normalizer: n, (B, H, d).
        level: m, (B, H): C and n stand for e^m times what they hold. -inf at the beginning of a sequence.
    """

    conv: Tensor
    matrix: Tensor
    normalizer: Tensor
    level: Tensor


class MLSTM(Mixer):
    """A memory of keys and values, written and forgotten through one gate each per head, read by queries.

    [u | z] = W_up x, c = silu(conv(u)), q = W_q c, k = W_k c, v = W_v u, W_q, W_k and W_v block-diagonal;
    [i | f] = W_g [q | k | v] + b_g, h as in `minrnn.ops.mlstm`, per head, the forget gate sigmoid(f), the input gate
    e^i; y = W_down ((norm(h) + s ⊙ c) ⊙ silu(z)), norm per head.

    It begins with W_g = 0, b_f from 3 to 6 over the heads, b_i from N(0, 0.01), s = 1; W_up, W_q, W_k and W_v from
    N(0, 2 / (5 D)), W_down from N(0, 4 / (layers² D)).

    Args:
        width: D.
        config: the options.
        place: of it, how many layers there are.

    Raises:
        ValueError: heads or block do not divide the inner width.

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), sections 2.3 and 2.4, figure 11 and the
    authors' code.
    """

    def __init__(self, width: int, config: MLSTMConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.width, self.heads = width, config.heads
        self.inner = inner = math.ceil(scaled(width, config.expansion) / MULTIPLE) * MULTIPLE
        for name in ("heads", "block"):
            if inner % getattr(config, name):
                raise ValueError(f"MLSTM: {name} must divide the inner width {inner}, got {getattr(config, name)}")
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, config.conv)
        self.query, self.key, self.value = (HeadwiseLinear(inner, inner // config.block) for _ in range(3))
        self.gates = nn.Linear(3 * inner, 2 * self.heads)
        self.norm = HeadwiseNorm(inner, self.heads)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, width, bias=False)
        for part in (self.up, self.query, self.key, self.value):
            small_init_(part.weight, width)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            into, forget = self.gates.bias.chunk(2)
            into.normal_(std=0.1)
            forget.copy_(torch.linspace(3.0, 6.0, self.heads))
        nn.init.normal_(self.down.weight, std=2 / (place.layers * math.sqrt(width)))

    def tuning(self) -> Mapping[str, Tuning]:
        """The biases of the gates stay in float32: how long the memory lasts hangs on their last digits."""
        return {"gates.bias": Tuning(decay=False, keep_float32=True)}

    def forward(
        self, x: Tensor, state: MLSTMState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, MLSTMState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        check_series("MLSTM", x, self.width, reset, self.up.weight)
        batch, heads, size = len(x), self.heads, self.inner // self.heads
        if state is None:
            state = self.initial_state(batch)
        check_state(
            "MLSTM",
            state,
            MLSTMState,
            self.up.weight,
            conv=("(B, K-1, W)", (batch, self.conv.kernel - 1, self.inner)),
            matrix=("(B, H, d, d)", (batch, heads, size, size)),
            normalizer=("(B, H, d)", (batch, heads, size)),
            level=("(B, H)", (batch, heads)),
        )
        matrix, normalizer, level = (part.to(accumulate_dtype(self.up.weight.dtype)) for part in state[1:])
        u, z = self.up(x).chunk(2, -1)
        c, tail = self.conv(u, state.conv, reset=reset)
        c = F.silu(c)
        q, k, v = self.query(c), self.key(c), self.value(u)
        if plain(self.gates, nn.Linear):
            # [q | k | v] is not put together: it would cost more than the product.
            parts = zip((q, k, v), self.gates.weight.chunk(3, 1), strict=True)
            gates = sum(F.linear(part, weight).to(level.dtype) for part, weight in parts) + self.gates.bias
        else:
            # Of a 16-bit model the weights are, and the bias is not.
            with torch.autocast(x.device.type, q.dtype) if q.dtype != level.dtype else nullcontext():
                gates = self.gates(torch.cat([q, k, v], -1)).to(level.dtype)
        q, k, v = (part.unflatten(-1, (heads, size)) for part in (q, k, v))
        into, forget = gates.chunk(2, -1)
        h, *memory = mlstm(q, k, v, into, forget, matrix, normalizer, level, reset)
        y = self.down((self.norm(h.flatten(-2)) + self.skip * c) * F.silu(z))
        return y, MLSTMState(tail, *memory)

    def initial_state(self, batch_size: int) -> MLSTMState:
        """Nothing remembered."""
        new, size = self.gates.bias.new_zeros, self.inner // self.heads
        dtype = accumulate_dtype(self.up.weight.dtype)
        return MLSTMState(
            self.conv.initial_state(batch_size),
            new((batch_size, self.heads, size, size), dtype=dtype),
            new((batch_size, self.heads, size), dtype=dtype),
            new((batch_size, self.heads), dtype=dtype).fill_(-torch.inf),
        )

    @property
    def state_size(self) -> int:
        """(K-1) W + H (d² + d + 1)."""
        size = self.inner // self.heads
        return self.conv.state_size + self.heads * (size * (size + 1) + 1)

    def extra_repr(self) -> str:
        return f"{self.width}, inner={self.inner}, heads={self.heads}"
