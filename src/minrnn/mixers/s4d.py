"""S4D: diagonal state-space models.

B batch, T time, D model width, N state size per channel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minrnn._config import check_choice
from minrnn.mixers.contract import ALONE, Place
from minrnn.mixers.s4 import hippo_legs
from minrnn.mixers.state_space import StateSpace, StateSpaceConfig, System, as_complex, as_real

INITS = ("lin", "inv", "legs")
DISCRETIZATIONS = ("zoh", "bilinear")


@dataclass(frozen=True)
class S4DConfig(StateSpaceConfig):
    """Options of `S4D`.

    Args:
        state: N, real numbers of state per channel
        dt_min: the shortest step at the beginning of training
        dt_max: the longest
        lr_limit: the highest learning rate of the steps and the transition
        init: where the transition begins: lin, inv or legs
        discretization: zoh or bilinear
    """

    init: str = "lin"
    discretization: str = "zoh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init", INITS)
        check_choice(self, "discretization", DISCRETIZATIONS)


class DiagonalSystem(System):
    """Ā h = a ⊙ h.

    Args:
        decay: a, (D, N/2) complex.
        input: B̄, (D, N/2) complex.
        output: C, (D, N/2) complex.
    """

    few = 16

    def __init__(self, decay: Tensor, input: Tensor, output: Tensor) -> None:
        super().__init__(output)
        self.decay, self.input = decay, input

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        return self.decay * h + self.input * u[..., None]

    def transition(self) -> Tensor:
        return self.decay[:, None]

    def square(self, power: Tensor) -> Tensor:
        return power * power

    def apply(self, power: Tensor, columns: Tensor) -> Tensor:
        return as_real(power * as_complex(columns))

    def apply_adjoint(self, power: Tensor, rows: Tensor) -> Tensor:
        return as_real(power.conj() * as_complex(rows))


class S4D(StateSpace):
    """h_t = Ā ⊙ h_{t-1} + B̄ x_t, y_t = 2 Re(C · h_t) + D x_t: N/2 complex numbers of state per channel.

    Of the continuous system h' = A h + x with steps Δ, the zero-order hold gives Ā = exp(ΔA) and B̄ = (Ā - 1) / A, the
    bilinear transform Ā = (1 + ΔA/2) / (1 - ΔA/2) and B̄ = Δ / (1 - ΔA/2). A is kept as log(-Re A) and Im A, so that it
    stays stable. Only the product of the input weights B with C matters: C stands for it.

    It begins with Re A = -1/2 and, for n = 0 ... N/2 - 1, Im A_n = π n ("lin"), (N/π) (N / (2n + 1) - 1) ("inv"), or
    the diagonal and the input weights of HiPPO-LegS in its normal plus low-rank form ("legs").

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Gu et al., "On the parameterization and initialization of diagonal state space models" (2022), sections 3
    and 4.
    """

    def __init__(self, width: int, config: S4DConfig, place: Place = ALONE) -> None:
        super().__init__(width, config, place)
        self.discretization = config.discretization
        n, size = torch.arange(self.pairs), config.state
        if config.init == "legs":
            imag, _, weights = hippo_legs(size)
            self.C = nn.Parameter(self.C.detach() * weights.to(self.C.dtype)[:, None])
        else:
            imag = math.pi * n if config.init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
        self.log_decay = nn.Parameter(torch.full((width, self.pairs), math.log(0.5)))
        self.frequency = nn.Parameter(imag.to(self.C.dtype).repeat(width, 1))

    def discretize(self) -> DiagonalSystem:
        """The system of the parameters as they are."""
        step = self.log_step.exp()[:, None]
        scaled = torch.complex(-self.log_decay.exp() * step, self.frequency * step)  # ΔA
        if self.discretization == "zoh":
            return DiagonalSystem(scaled.exp(), step * scaled.expm1() / scaled, torch.view_as_complex(self.C))
        inverse = 1 / (1 - scaled / 2)
        return DiagonalSystem((1 + scaled / 2) * inverse, step * inverse, torch.view_as_complex(self.C))

    def extra_repr(self) -> str:
        return f"state={2 * self.pairs}, discretization={self.discretization}"
