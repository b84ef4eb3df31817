"""Causal softmax attention, as in GPT.

B batch, T time, D model width, t the length of the cache.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_choice, check_fraction, check_types
from minrnn._shapes import accumulate_dtype, check_tensor
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state
from minrnn.ops.sequences import Sequences

POSITIONS = ("learned", "rotary", "none")
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class AttentionConfig:
    """Options of `AttentionMixer`.

    Args:
        heads: by default as many as leave each at least 64 channels
        positions: "learned", a table of `max_length`; "rotary", of any length; or "none"
        max_length: of a sequence with learned positions
        dropout: of attention weights, and of y
        bias: whether the linear maps have biases
    """

    heads: int | None = None
    positions: str = "learned"
    max_length: int = 1024
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "heads", "max_length")
        check_choice(self, "positions", POSITIONS)
        check_fraction(self, "dropout")


class AttentionState(NamedTuple):
    """The cache: keys and values of the steps seen, (B, heads, t, D / heads), in the dtype of the model; and how many
    of them each sequence has seen since it began, (B,). These are its last ones, and zeros stand before them.

    Keys hold their rotary positions already.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


def heads_of(caller: str, width: int, heads: int | None) -> int:
    """How many heads a width has: those asked for, or as many as leave each at least 64 channels.

    Raises:
        ValueError: they do not divide the width.
    """
    heads = heads or max(n for n in range(1, max(width // 64, 1) + 1) if width % n == 0)
    if width % heads:
        raise ValueError(f"{caller}: heads must divide width = {width}, got {heads}")
    return heads


class AttentionMixer(Mixer):
    """y = W_out [softmax(Q K^T / √d + M) V of every head], [Q | K | V] = W_in x, d = D / heads, M causal.

    Positions count from 0 at the beginning of a sequence, and again at a reset.

    - "learned": GPT adds p_t, a row of a table, to the embedding, so that every layer finds it in the residual stream.
      A mixer does that from the first layer, the only one that has the table: it maps x_t + p_t, and adds p_t to y_t,
      which a residual connection then hands to the layers above. (What is left of a difference: the norm in front of
      the first layer has not seen p_t.)
    - "rotary": channels (i, i + d/2) of queries and keys are turned by t · 10000^(-2i/d), i < d/2.

    W_in and the table begin as N(0, 0.02²), W_out as N(0, 0.02² / 2 layers), biases as zeros. The cost of a step is
    that of the length of its sequence.

    Args:
        width: D.
        config: the options.
        place: layer 0 has the table; the number of layers scales W_out.

    Raises:
        ValueError: heads do not divide D, or rotary positions meet an odd D / heads.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2; Radford et al., "Language models are
    unsupervised multitask learners" (2019), section 2.3; Su et al., "RoFormer" (2021), section 3.2.
    """

    def __init__(self, width: int, config: AttentionConfig, place: Place = ALONE) -> None:
        super().__init__()
        caller = type(self).__name__
        heads = heads_of(caller, width, config.heads)
        if config.positions == "rotary" and width // heads % 2:
            raise ValueError(f"{caller}: rotary positions need width / heads to be even, got {width} / {heads}")
        self.width, self.heads, self.positions, self.max_length = width, heads, config.positions, config.max_length
        self.dropout = nn.Dropout(config.dropout)
        self.input = nn.Linear(width, 3 * width, config.bias)
        self.output = nn.Linear(width, width, config.bias)
        has_table = config.positions == "learned" and place.layer == 0
        self.table = nn.Parameter(torch.empty(config.max_length, width)) if has_table else None
        nn.init.normal_(self.input.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02 / (2 * place.layers) ** 0.5)
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)
        for linear in (self.input, self.output):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`.

        Raises:
            ValueError: a sequence is longer than the table of learned positions.
        """
        check_series(type(self).__name__, x, self.width, reset, self.input.weight)
        state = self.initial_state(len(x)) if state is None else self._checked(state, len(x))
        steps = torch.arange(x.shape[1], device=x.device)
        positions = state.length[:, None] + steps
        if reset is not None and reset.any():
            begins = steps.where(reset, -1).cummax(1).values
            positions = positions.where(begins < 0, steps - begins)
        else:
            reset = None
        position = self._learned(positions)
        q, k, v = self._project(x if position is None else x + position, positions)
        if reset is None:
            y, state = self._continued(q, k, v, state)
        else:
            y, state = self._restarted(q, k, v, state, reset, positions[:, -1] + 1)
        y = self.dropout(self.output(y.flatten(2)))
        return y if position is None else y + position.to(y.dtype), state

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, T, heads, D / heads)."""
        qkv = self.input(x).unflatten(2, (3, self.heads, -1))
        if self.positions != "rotary":
            return qkv.unbind(2)
        half = qkv.shape[-1] // 2
        steps = positions.to(accumulate_dtype(qkv.dtype))
        rates = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=steps.dtype) / half)
        angles = steps[:, :, None, None, None] * rates
        cos, sin = angles.cos(), angles.sin()
        left, right = qkv[:, :, :2].split(half, -1)
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        q, k = turned.to(qkv.dtype).unbind(2)
        return q, k, qkv[:, :, 2]

    def _learned(self, positions: Tensor) -> Tensor | None:
        """Rows of the table, (B, T, D), if there is one."""
        if self.table is None:
            return None
        if positions.numel() and (last := int(positions.max())) >= self.max_length:
            raise ValueError(
                f"{type(self).__name__}: a sequence with learned positions must be at most max_length = "
                f"{self.max_length} long, got {last + 1}"
            )
        return F.embedding(positions, self.table)

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """y, (B, T, heads, D / heads), where no sequence begins anew."""
        past, time, mask = state.keys.shape[2], q.shape[1], None
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if past:
            k, v, mask = _joined(state.keys, k), _joined(state.values, v), _seen(state.length, past, time)
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return y.transpose(1, 2), AttentionState(k, v, state.length + time)

    def _restarted(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, reset: Tensor, length: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """y where sequences begin anew; each attends alone, in a batch with those about as long as itself.

        A mask would not do: to what it hides it gives the weight 0, and 0 · NaN is NaN.
        """
        sequences, steps, outputs = Sequences(reset), [], []
        cached = sequences.continues & (state.keys.shape[2] > 0)
        for which, index, there in sequences.groups(apart=cached):
            q_here, k_here, v_here = (each.flatten(0, 1)[index].where(there[..., None, None], 0) for each in (q, k, v))
            row = sequences.row[which]
            goes_on = bool(cached[which].any())
            before = AttentionState(*(each[row] for each in state)) if goes_on else self.initial_state(len(row))
            y, _ = self._continued(q_here, k_here, v_here, before)
            steps.append(index[there])
            outputs.append(y[there])
        y = torch.cat(outputs)[torch.cat(steps).argsort()].view_as(q)
        kept = int(length.max())
        alive = (torch.arange(-kept, 0, device=q.device) >= -length[:, None])[:, None, :, None]
        k, v = (
            _joined(before, after.transpose(1, 2))[:, :, -kept:].where(alive, 0)
            for before, after in ((state.keys, k), (state.values, v))
        )
        return y, AttentionState(k, v, length)

    def _checked(self, state: object, batch: int) -> AttentionState:
        """A caller's state."""
        caller = type(self).__name__
        check_state(caller, state, AttentionState, self.input.weight, length=("(B,)", (batch,), torch.int64))
        state = cast(AttentionState, state)
        check_tensor(caller, "state.keys", state.keys)
        shape = (batch, self.heads, *state.keys.shape[2:3], self.width // self.heads)
        letters = "(B, heads, t, D / heads)"
        check_state(caller, state, AttentionState, self.input.weight, keys=(letters, shape), values=(letters, shape))
        return state

    def initial_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        empty = self.input.weight.new_zeros(batch_size, self.heads, 0, self.width // self.heads)
        return AttentionState(empty, empty, torch.zeros(batch_size, dtype=torch.long, device=empty.device))

    @property
    def state_size(self) -> None:
        """None: the cache grows."""
        return None

    def extra_repr(self) -> str:
        return f"heads={self.heads}, positions={self.positions!r}"


def _joined(before: Tensor, after: Tensor) -> Tensor:
    """Two series one after the other, in the dtype of the second."""
    return torch.cat([before.to(after.dtype), after], 2)


def _seen(length: Tensor, past: int, time: int) -> Tensor:
    """Which of `past` + `time` steps each of the last `time` sees, (B, 1, time, past + time): those up to itself, from
    the `length` last of the past on."""
    steps = torch.arange(-past, time, device=length.device)
    causal = steps <= steps[past:, None]
    return (causal & (steps >= -length[:, None, None]))[:, None]
