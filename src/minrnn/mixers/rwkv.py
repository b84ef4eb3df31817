"""RWKV-4: its two halves of a block, the time-mix and the channel-mix.

B batch, T time, D model width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minrnn._shapes import accumulate_dtype
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state, check_state_tensor
from minrnn.ops import WKVState, wkv


@dataclass(frozen=True)
class RWKV4Config:
    """`RWKV4` has no options."""


class RWKV4State(NamedTuple):
    """What a time-mix knows of the past, (B, D) each.

    Args:
        previous: the last input.
        average, weight, max: as in `minrnn.ops.WKVState`.
    """

    previous: Tensor
    average: Tensor
    weight: Tensor
    max: Tensor


class RWKV4(Mixer):
    """RWKV-4's time-mix, an average of values whose weights decay with time.

    k, v, r = W_k x'^k, W_v x'^v, W_r x'^r, where x'^i_t = μ_i ⊙ x_t + (1 - μ_i) ⊙ x_{t-1};
    y = W_out (sigmoid(r) ⊙ wkv(k, v)), the weights in `wkv` decaying by w = exp(`decay`) at each step, that of the
    current step raised by u = `bonus`.

    It begins as its authors': W_k, W_r and W_out at zero, W_v orthogonal; with i the channel, l the layer of L,
    decay = -5 + 8 (i / (D-1))^(0.7 + 1.3 l / (L-1)), bonus = ln 0.3 + ((i+1) mod 3 - 1) / 2, μ_k = (i / D)^(1 - l/L),
    μ_v = μ_k + 0.3 l / (L-1), μ_r = (i / D)^((1 - l/L) / 2). The first layer has l / (L-1) = 0 in every stack, also in
    one of one layer; and the first channel i / (D-1) = 0, also if it is alone.

    Args:
        width: D.
        config: it has no options.
        place: l and L.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer era" (2023), section 3; their code for version 4.
    """

    def __init__(self, width: int, config: RWKV4Config, place: Place = ALONE) -> None:
        super().__init__()
        depth, channel = place.layer / max(place.layers - 1, 1), torch.arange(width)
        self.decay = nn.Parameter(-5 + 8 * (channel / max(width - 1, 1)) ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(math.log(0.3) + ((channel + 1) % 3 - 1) / 2)
        self.mix_key = nn.Parameter(_key_mix(width, place))
        self.mix_value = nn.Parameter(_key_mix(width, place) + 0.3 * depth)
        self.mix_receptance = nn.Parameter(_key_mix(width, place).sqrt())
        self.key, self.value, self.receptance, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        for layer in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer.weight)
        nn.init.orthogonal_(self.value.weight)

    def tuning(self) -> Mapping[str, Tuning]:
        """w and u learn faster, and keep their precision."""
        return {
            "decay": Tuning(lr_scale=2.0, decay=False, keep_float32=True),
            "bonus": Tuning(lr_scale=3.0, decay=False, keep_float32=True),
        }

    def forward(
        self, x: Tensor, state: RWKV4State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, width = type(self).__name__, len(self.decay)
        check_series(caller, x, width, reset, self.key.weight)
        if state is None:
            state = self.initial_state(len(x))
        check_state(
            caller,
            state,
            RWKV4State,
            self.key.weight,
            **{name: ("(B, D)", (len(x), width)) for name in RWKV4State._fields},
        )
        shifted, previous = _shift(x, state.previous, reset)
        difference = x - shifted
        keys = self.key(_mix(shifted, difference, self.mix_key))
        values = self.value(_mix(shifted, difference, self.mix_value))
        receptance = self.receptance(_mix(shifted, difference, self.mix_receptance))
        average, after = wkv(keys, values, self.decay.exp(), self.bonus, WKVState(*state[1:]), reset=reset)
        return self.output(receptance.sigmoid() * average), RWKV4State(previous, *after)

    def initial_state(self, batch_size: int) -> RWKV4State:
        """Zeros before the sequence, and the average of nothing."""
        weight = self.value.weight
        previous = weight.new_zeros(batch_size, len(weight))
        average = torch.zeros_like(previous, dtype=accumulate_dtype(weight.dtype))
        return RWKV4State(previous, average, torch.zeros_like(average), torch.full_like(average, -math.inf))

    @property
    def state_size(self) -> int:
        """4 D."""
        return 4 * len(self.decay)


class ChannelMix(Mixer):
    """RWKV-4's channel-mix, which follows its time-mix: y = sigmoid(W_r x'^r) ⊙ W_v relu(W_k x'^k)^2.

    x'^i_t = μ_i ⊙ x_t + (1 - μ_i) ⊙ x_{t-1}. The state is the last input, (B, D). It begins as its authors': W_r and
    W_v at zero, W_k orthogonal; with i the channel, l the layer of L, μ_k = μ_r = (i / D)^(1 - l/L).

    Args:
        width: D.
        hidden: of k.
        place: l and L.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer era" (2023), section 3; their code for version 4.
    """

    def __init__(self, width: int, hidden: int, place: Place) -> None:
        super().__init__()
        self.mix_key = nn.Parameter(_key_mix(width, place))
        self.mix_receptance = nn.Parameter(_key_mix(width, place))
        self.key = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.key.weight, gain=math.sqrt(max(hidden / width, 1)))
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.receptance.weight)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, width = type(self).__name__, len(self.mix_key)
        check_series(caller, x, width, reset, self.key.weight)
        if state is None:
            state = self.initial_state(len(x))
        check_state_tensor(caller, "state", state, self.key.weight, "(B, D)", (len(x), width))
        shifted, last = _shift(x, state, reset)
        difference = x - shifted
        keys = self.key(_mix(shifted, difference, self.mix_key))
        receptance = self.receptance(_mix(shifted, difference, self.mix_receptance))
        return receptance.sigmoid() * self.value(keys.relu().square()), last

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros, (batch_size, D)."""
        return self.mix_key.new_zeros(batch_size, len(self.mix_key))

    @property
    def state_size(self) -> int:
        """D."""
        return len(self.mix_key)


def _shift(x: Tensor, previous: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_{t-1} for each t, zeros where a sequence begins; and the last x."""
    series = torch.cat([previous.to(x.dtype)[:, None], x], 1)
    shifted = series[:, :-1]
    return shifted if reset is None else shifted.masked_fill(reset[..., None], 0), series[:, -1].clone()


def _mix(shifted: Tensor, difference: Tensor, share: Tensor) -> Tensor:
    """x_{t-1} + share ⊙ (x_t - x_{t-1})."""
    return torch.addcmul(shifted, difference, share.to(shifted.dtype))


def _key_mix(width: int, place: Place) -> Tensor:
    """(i / D)^(1 - l/L)."""
    return (torch.arange(width) / width) ** (1 - place.layer / place.layers)
