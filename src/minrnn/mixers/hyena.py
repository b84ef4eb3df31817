"""Hyena: long convolutions with implicit filters, and gates.

B batch, T time, D model width, n order, L longest sequence, P steps of it that are past.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_finite, check_positive, check_types
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state
from minrnn.mixers.conv import DepthwiseConv
from minrnn.mixers.segments import Joined


@dataclass(frozen=True)
class LongConvConfig:
    """Options of `LongConv`.

    Args:
        max_length: L, steps of the longest sequence; the filter is a function of time in units of it
        features: of a time, what the filter's network sees; odd
        filter_width: hidden width of that network
        omega: frequency of its sines at the beginning of training
        lr_limit: the highest learning rate of the network
    """

    max_length: int = 1024
    features: int = 5
    filter_width: int = 64
    omega: float = 10.0
    lr_limit: float = 1e-3

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "max_length", "filter_width")
        if self.features < 3 or self.features % 2 == 0:
            raise ValueError(f"{type(self).__name__}: features must be odd and at least 3, got {self.features}")
        check_finite(self, "omega")
        check_positive(self, "lr_limit", finite=False)


@dataclass(frozen=True)
class HyenaConfig(LongConvConfig):
    """Options of `Hyena`: those of `LongConv`, and

    Args:
        max_length: L, steps of the longest sequence; the filters are functions of time in units of it
        features: of a time, what the filters' network sees; odd
        filter_width: hidden width of that network
        omega: frequency of its sines at the beginning of training
        lr_limit: the highest learning rate of the network
        order: n, how many gates there are; one filter less
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 2, "order")


class ImplicitFilter(nn.Module):
    """K_d(l) = exp(-δ_d t) MLP(p(t))_d + β_d [l = 0], with t = l / (L-1): filters as functions of time.

    p(t) = (t, cos(f_j 2πl/L), -sin(f_j 2πl/L)), f evenly spaced from 1e-4 to one less than their number. The MLP has
    three hidden layers, sine activations with one vector of frequencies for all, and no bias at its end. δ is evenly
    spaced from ln(100) / 1.5 to ln(100) / 0.3 over the channels: the window falls to 1 % after 1.5 to 0.3 L. β begins
    as N(0, 1), the MLP as nn.Linear does. All stays in float32 in a 16-bit module.

    Args:
        width: how many filters.
        config: the options.
    """

    def __init__(self, width: int, config: LongConvConfig) -> None:
        super().__init__()
        hidden = config.filter_width
        self.max_length, self.lr_limit = config.max_length, config.lr_limit
        self.bands = (config.features - 1) // 2
        self.layers = nn.ModuleList(nn.Linear(size, hidden) for size in (config.features, hidden, hidden))
        self.frequency = nn.Parameter(torch.full((hidden,), float(config.omega)))
        self.output = nn.Linear(hidden, width, bias=False)
        self.skip = nn.Parameter(torch.randn(width))

    def tuning(self) -> Mapping[str, Tuning]:
        """No decay and at most `lr_limit` for the network; β is as any parameter."""
        slow = Tuning(lr_limit=self.lr_limit, decay=False, keep_float32=True)
        return {name: slow for name, _ in self.named_parameters()} | {"skip": Tuning(keep_float32=True)}

    def forward(self, length: int) -> Tensor:
        """K from l = 0 to `length`, at most L: (width, length)."""
        with torch.autocast(self.skip.device.type, enabled=False):
            steps = torch.arange(length, dtype=self.skip.dtype, device=self.skip.device)[:, None]
            angles = steps * (2 * math.pi / self.max_length) * self._evenly(1e-4, self.bands - 1, self.bands)
            time = steps / max(self.max_length - 1, 1)
            hidden = torch.cat([time, angles.cos(), -angles.sin()], 1)
            for layer in self.layers:
                hidden = torch.sin(self.frequency * layer(hidden))
            rates = self._evenly(math.log(100) / 1.5, math.log(100) / 0.3, len(self.skip))
            kernel = self.output(hidden) * torch.exp(-rates * time)
            return (kernel + F.pad(self.skip[None], (0, 0, 0, length - 1))).mT if length else kernel.mT

    def _evenly(self, start: float, end: float, count: int) -> Tensor:
        return torch.linspace(start, end, count, dtype=self.skip.dtype, device=self.skip.device)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}"


class LongConvState(NamedTuple):
    """What `LongConv` has seen.

    Args:
        history: (B, P, D), the inputs of the current sequences, zeros before the beginning of those shorter than P.
        steps: int64 (B,), how long they are.
    """

    history: Tensor
    steps: Tensor


class LongConv(Mixer):
    """y = K * x, each channel convolved with an implicit filter: Hyena's, as an inner layer of other blocks.

    The state has no constant size: it is all inputs of a sequence, and a step t costs O(t).

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Poli et al., "Hyena hierarchy" (2023), section 3.3; as an inner layer, Gu and Dao, "Mamba" (2023), section
    4.6.1.
    """

    def __init__(self, width: int, config: LongConvConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.width = width
        self.filter = ImplicitFilter(width, config)

    def forward(
        self, x: Tensor, state: LongConvState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, LongConvState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`.

        Raises:
            ValueError: also if a sequence, with the steps before x, is longer than `max_length`.
        """
        caller = type(self).__name__
        check_series(caller, x, self.width, reset, self.filter.skip, wide=True)
        state = self.initial_state(len(x)) if state is None else state
        past = past_steps(state)
        check_state(
            caller,
            state,
            LongConvState,
            self.filter.skip,
            history=("(B, P, D)", (len(x), past, self.width)),
            steps=("(B,)", (len(x),), torch.int64),
        )
        steps, most = count_steps(caller, state.steps, x.shape[1], reset, self.filter.max_length)
        joined = Joined(past, x.shape[1], reset)
        series = joined.join(state.history, x)
        y = joined.convolve(series, self.filter(min(series.shape[1], self.filter.max_length)))
        return y, LongConvState(joined.keep(series, most), steps)

    def initial_state(self, batch_size: int) -> LongConvState:
        """No history."""
        weight = self.filter.skip
        steps = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return LongConvState(weight.new_zeros(batch_size, 0, self.width), steps)

    @property
    def state_size(self) -> None:
        """It grows."""
        return None


class HyenaState(NamedTuple):
    """What `Hyena` has seen.

    Args:
        conv: (B, 2, (n+1)D), of the short convolution.
        history: (B, P, (n-1)D), what was convolved of the current sequences, zeros before the beginning of those
            shorter than P.
        steps: int64 (B,), how long they are.
    """

    conv: Tensor
    history: Tensor
    steps: Tensor


class Hyena(Mixer):
    """x^0 ... x^{n-1}, v = conv(W_in x + b_in); v <- K^i * (x^i ⊙ v) for i = n-1 ... 1; y = W_out (x^0 ⊙ v) + b_out.

    conv is depthwise, of 3 steps; the filters K^i are `ImplicitFilter`s of one network. No sequence may be longer than
    `max_length`. The state has no constant size: it is all that was convolved, (n-1)D numbers a step, and a step t
    costs O(t).

    The defaults are those of the authors' experiments on associative recall. In their code times are features that may
    be trained; there and here they are not.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Poli et al., "Hyena hierarchy: towards larger convolutional language models" (2023), section 3 and
    algorithms 1 to 3.
    """

    def __init__(self, width: int, config: HyenaConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.order = config.order
        self.input = nn.Linear(width, (config.order + 1) * width)
        self.conv = DepthwiseConv((config.order + 1) * width, 3)
        self.filter = ImplicitFilter((config.order - 1) * width, config)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Tensor, state: HyenaState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, HyenaState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`.

        Raises:
            ValueError: also if a sequence, with the steps before x, is longer than `max_length`.
        """
        caller, width, filters = type(self).__name__, self.output.in_features, self.order - 1
        check_series(caller, x, width, reset, self.input.weight)
        state = self.initial_state(len(x)) if state is None else state
        past = past_steps(state)
        check_state(
            caller,
            state,
            HyenaState,
            self.input.weight,
            conv=("(B, 2, (n+1)D)", (len(x), 2, self.conv.width)),
            history=("(B, P, (n-1)D)", (len(x), past, filters * width)),
            steps=("(B,)", (len(x),), torch.int64),
        )
        steps, most = count_steps(caller, state.steps, x.shape[1], reset, self.filter.max_length)
        joined = Joined(past, x.shape[1], reset)
        mixed, conv = self.conv(self.input(x), state.conv, reset=reset)
        first, *gates, v = mixed.chunk(self.order + 1, -1)
        kernels = self.filter(min(past + x.shape[1], self.filter.max_length)).chunk(filters)
        kept = []
        for gate, before, kernel in zip(reversed(gates), state.history.chunk(filters, -1), kernels, strict=True):
            series = joined.join(before, gate * v)
            v = joined.convolve(series, kernel)
            kept.append(joined.keep(series, most))
        return self.output(first * v), HyenaState(conv, torch.cat(kept, -1), steps)

    def initial_state(self, batch_size: int) -> HyenaState:
        """No history."""
        weight = self.output.weight
        history = weight.new_zeros(batch_size, 0, (self.order - 1) * len(weight))
        steps = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return HyenaState(self.conv.initial_state(batch_size), history, steps)

    @property
    def state_size(self) -> None:
        """It grows."""
        return None


def past_steps(state: object) -> int:
    """P of a state that has a history, 0 for what is none."""
    history: object = getattr(state, "history", None)
    return history.shape[1] if isinstance(history, Tensor) and history.dim() == 3 else 0


def count_steps(caller: str, steps: Tensor, time: int, reset: Tensor | None, max_length: int) -> tuple[Tensor, int]:
    """How long the sequences are after `time` more steps, (B,), and the longest of these; ValueError if any sequence,
    also one that a reset has ended, is longer than `max_length`."""
    if reset is None or reset.numel() == 0:
        after = longest = steps + time
    else:
        now = torch.arange(time, device=steps.device)
        longest = now + 1 - torch.where(reset, now, -steps[:, None]).cummax(1).values
        after = longest[:, -1]
    if longest.numel() and int(longest.max()) > max_length:
        raise ValueError(
            f"{caller}: a sequence must be at most max_length = {max_length} steps long, with those before x, "
            f"got {int(longest.max())}"
        )
    return after, int(after.max()) if after.numel() else 0
