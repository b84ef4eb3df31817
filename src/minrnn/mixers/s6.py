"""S6: a diagonal state-space model whose steps and maps depend on the input.

B batch, T time, E width, N state size per channel, R rank of the steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minrnn._config import check_at_least, check_positive, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state_tensor
from minrnn.ops import selective_scan


@dataclass(frozen=True)
class S6Config:
    """Options of `S6`.

    Args:
        state: N, numbers of state per channel
        rank: R, of the map from the input to the steps; 0 for a 16th of the width, rounded up
        dt_min: the shortest step at the beginning of training
        dt_max: the longest
        dt_floor: no step begins below this
    """

    state: int = 16
    rank: int = 0
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "state")
        if self.rank < 0:
            raise ValueError(f"S6Config: rank must be at least 1, or 0 for a 16th of the width, got {self.rank}")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise ValueError(f"S6Config: dt_min must be above 0 and at most dt_max, got {self.dt_min}, {self.dt_max}")
        check_positive(self, "dt_floor")


class S6(Mixer):
    """[δ | B | C] = W x, Δ = softplus(W_Δ δ + b_Δ), h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t ⊙ x_t) B_tᵀ, y_t = h_t C_t +
    D ⊙ x_t, with h_t (E, N), A = -exp(A_log), and one B_t and C_t for all channels.

    The state is h, (B, E, N), float32 where the model is 16-bit. It begins with A_n = -n for n = 1 ... N, D = 1, b_Δ
    such that Δ without input is log-uniform in [dt_min, dt_max], W_Δ from U(-1/sqrt(R), 1/sqrt(R)), W as nn.Linear.

    Args:
        width: E.
        config: the options.
        place: of no importance here.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), sections 3.2 and 3.6.
    """

    def __init__(self, width: int, config: S6Config, place: Place = ALONE) -> None:
        super().__init__()
        state, rank = config.state, config.rank or math.ceil(width / 16)
        self.sizes = [rank, state, state]
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, width, bias=False)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        step = torch.empty(width).uniform_(low, high).exp().clamp(min=config.dt_floor)
        self.step_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def tuning(self) -> Mapping[str, Tuning]:
        """The transition, the way past the state and the bias of the steps: in float32, without decay."""
        return dict.fromkeys(("A_log", "D", "step_bias"), Tuning(decay=False, keep_float32=True))

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller = type(self).__name__
        check_series(caller, x, len(self.D), reset, self.input.weight)
        if state is not None:
            check_state_tensor(caller, "state", state, self.input.weight, "(B, E, N)", (len(x), *self.A_log.shape))
        delta, into, out = self.input(x).split(self.sizes, -1)
        decay = -self.A_log.exp()
        return selective_scan(x, self.step(delta), decay, into, out, self.D, state, reset=reset, bias=self.step_bias)

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros, (batch_size, E, N)."""
        dtype = accumulate_dtype(self.input.weight.dtype)
        return self.A_log.new_zeros(batch_size, *self.A_log.shape, dtype=dtype)

    @property
    def state_size(self) -> int:
        """E N."""
        return self.A_log.numel()

    def extra_repr(self) -> str:
        return f"state={self.A_log.shape[1]}, rank={self.sizes[0]}"
