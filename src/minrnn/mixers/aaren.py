"""Aaren: softmax attention as an RNN.

B batch, T time, D model width, H heads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.attention import heads_of
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state, plain
from minrnn.ops import WKVState, wkv


@dataclass(frozen=True)
class AarenConfig:
    """Options of `Aaren`.

    Args:
        heads: by default as many as leave each at least 64 channels
        bias: whether the linear maps have biases
    """

    heads: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "heads")


class AarenState(NamedTuple):
    """What each head's softmax needs of the past.

    Args:
        average: (B, D), of the values, by their weights.
        weight: (B, H), the sum of the weights, divided by exp(max).
        max: (B, H), the largest score up to now, -inf before the first.
    """

    average: Tensor
    weight: Tensor
    max: Tensor


class Aaren(Mixer):
    """Causal attention whose query is learned and the same at all times, so that its softmax is a recurrence.

    For each head, with s_t = q · k_t / sqrt(D / H), k = W_k x, v = W_v x + b_v and q = W_q p + b_q of a learned p:
    y_t = W_out [sum over j <= t of e^{s_j} v_j / sum over j <= t of e^{s_j}] + b_out.

    The keys themselves are not computed, but the scores, by W_k^T q. (Their bias would change no softmax; there is
    none.) The scores are float32 where the model is 16-bit. The maps begin as GPT-2's, and p, which stands where
    attention has a normalised input, from N(0, 1).

    Args:
        width: D.
        config: the options.
        place: how deep the stack is, for the beginning of W_out.

    Raises:
        ValueError: the heads do not divide the width.

    Source: Feng et al., "Attention as an RNN" (2024), sections 3.1 and 3.3; Radford et al., "Language models are
    unsupervised multitask learners" (2019), section 2.3.
    """

    def __init__(self, width: int, config: AarenConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.heads = heads_of(type(self).__name__, width, config.heads)
        self.token = nn.Parameter(torch.randn(width))
        self.query = nn.Linear(width, width, bias=config.bias)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * place.layers) if layer is self.output else 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, state: AarenState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, AarenState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, width, heads = type(self).__name__, len(self.token), self.heads
        check_series(caller, x, width, reset, self.value.weight)
        if state is None:
            state = self.initial_state(len(x))
        per_head = "(B, H)", (len(x), heads)
        check_state(
            caller,
            state,
            AarenState,
            self.value.weight,
            average=("(B, D)", (len(x), width)),
            weight=per_head,
            max=per_head,
        )
        values, each = self.value(x), width // heads
        scores = self._scores(x)
        still = scores.new_zeros(width)
        mixed, after = wkv(
            scores.repeat_interleave(each, 2),
            values.to(scores.dtype),
            still,
            still,
            WKVState(state.average, *(x.repeat_interleave(each, 1) for x in state[1:])),
            reset=reset,
        )
        weight, top = (x[:, ::each].clone() for x in after[1:])
        return self.output(mixed.to(values.dtype)), AarenState(after.average, weight, top)

    def _scores(self, x: Tensor) -> Tensor:
        """(B, T, H)."""
        dtype = accumulate_dtype(x.dtype)
        keys = None if plain(self.key, nn.Linear) else self.key(x).to(dtype).unflatten(2, (self.heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            query = self.query(self.token).to(dtype).view(self.heads, -1) / math.sqrt(len(self.token) / self.heads)
            if keys is not None:
                return (query * keys).sum(-1)
            # q · (W x) = (q W) · x: one row for each head.
            weight = self.key.weight.to(dtype).unflatten(0, (self.heads, -1))
            return F.linear(x.to(dtype), (query[:, None] @ weight)[:, 0])

    def initial_state(self, batch_size: int) -> AarenState:
        """The average of nothing."""
        dtype = accumulate_dtype(self.token.dtype)
        average, weight = (self.token.new_zeros(batch_size, n, dtype=dtype) for n in (len(self.token), self.heads))
        return AarenState(average, weight, torch.full_like(weight, -math.inf))

    @property
    def state_size(self) -> int:
        """D + 2 H."""
        return len(self.token) + 2 * self.heads

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
