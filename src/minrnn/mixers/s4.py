"""S4: state-space models whose transition is diagonal plus low-rank.

B batch, T time, D model width, N state size per channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import ALONE, Place
from minrnn.mixers.state_space import StateSpace, StateSpaceConfig, System, as_complex, as_real


@dataclass(frozen=True)
class S4Config(StateSpaceConfig):
    """Options of `S4`.

    Args:
        state: N, real numbers of state per channel
        dt_min: the shortest step at the beginning of training
        dt_max: the longest
        lr_limit: the highest learning rate of the steps, the transition and its input weights
    """


def hippo_legs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in its normal plus low-rank form, one of each pair of conjugate numbers.

    A_nk = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, 0 else; B_n = sqrt(2n + 1). With P_n = sqrt(n + 1/2),
    A + P P^T is -1/2 plus a skew-symmetric matrix, and A = V (Λ - P' P'*) V*, Re Λ = -1/2. The phases of eigenvectors
    are free; they are chosen such that B' = V* B is positive, and with it P' = V* P.

    Args:
        size: N.

    Returns:
        Im Λ, P' and B', (N/2,) each, real, float64, Im Λ rising from above 0.

    Source: Gu et al., "Efficiently modeling long sequences with structured state spaces" (2022), theorem 1 and
    appendix C.1.
    """
    n = torch.arange(size, dtype=torch.float64)
    rank, inputs = (n + 0.5).sqrt(), (2 * n + 1).sqrt()
    lower = -torch.outer(inputs, inputs).tril(-1) / 2  # of the skew-symmetric part: half of A's, as P P^T is the other
    frequencies, vectors = torch.linalg.eigh(-1j * (lower - lower.mT))
    kept = vectors[:, size // 2 :].mH
    return frequencies[size // 2 :], (kept @ rank.to(kept.dtype)).abs(), (kept @ inputs.to(kept.dtype)).abs()


class LowRankSystem(System):
    """The bilinear transform of A = Λ - P P*: Ā = 2 M - 1 and B̄ = M ΔB with M = (1 - ΔA/2)^-1.

    M v = R v - R P (Δ/2) (P* R v) / (1 + (Δ/2) P* R P), R = 1 / (1 - ΔΛ/2), costs O(N). P* sums over both numbers of
    each conjugate pair. Whole sequences need the powers of Ā as a real matrix, which is the step of the unit vectors.

    Args:
        step: Δ, (D, 1).
        diagonal: Λ, (D, N/2) complex.
        rank: P, (D, N/2) complex.
        input: B, (D, N/2) complex.
        output: C, (D, N/2) complex.
    """

    few = 64

    def __init__(self, step: Tensor, diagonal: Tensor, rank: Tensor, input: Tensor, output: Tensor) -> None:
        super().__init__(output)
        self._resolvent = 1 / (1 - diagonal * (step / 2))
        seen = rank.conj() * self._resolvent
        self._seen = as_real(seen.conj())
        total = 2 * (seen * rank).sum(-1, keepdim=True).real
        self._added = self._resolvent * rank * (step / (1 + total * (step / 2)))
        self._input = input * step

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        v = 2 * h + self._input * u[..., None]
        return self._resolvent * v - self._added * (as_real(v) * self._seen).sum(-1, keepdim=True) - h

    def transition(self) -> Tensor:
        units = as_complex(torch.eye(self._seen.shape[-1], dtype=self._seen.dtype, device=self._seen.device))
        channels = units[:, None].expand(-1, len(self._seen), -1)
        return as_real(self.step(channels, torch.zeros_like(channels[..., 0].real))).permute(1, 2, 0).contiguous()

    def square(self, power: Tensor) -> Tensor:
        return power @ power

    def apply(self, power: Tensor, columns: Tensor) -> Tensor:
        return columns @ power.mT

    def apply_adjoint(self, power: Tensor, rows: Tensor) -> Tensor:
        return rows @ power


class S4(StateSpace):
    """h_t = Ā h_{t-1} + B̄ x_t, y_t = 2 Re(C · h_t) + D x_t with the bilinear Ā, B̄ of h' = (Λ - P P*) h + B x.

    Λ is kept as log(-Re Λ) and Im Λ. So A is dissipative for any parameters, Ā a contraction, and its powers, which
    the impulse response is made from, are stable. (They do in matrix products what the Cauchy kernel does in
    O(T N) divisions, need no truncated C, which would tie the parameters to one length, and are faster on CPUs.)

    It begins as HiPPO-LegS in every channel (see `hippo_legs`).

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Gu et al., "Efficiently modeling long sequences with structured state spaces" (2022), section 3; the form
    Λ - P P* is of Goel et al., "It's raw! Audio generation with state-space models" (2022), section 4.2.
    """

    def __init__(self, width: int, config: S4Config, place: Place = ALONE) -> None:
        super().__init__(width, config, place)
        frequency, rank, inputs = hippo_legs(config.state)

        def channels(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.to(self.C.dtype).repeat(width, *[1] * values.dim()))

        self.log_decay = channels(torch.full((self.pairs,), 0.5).log())
        self.frequency = channels(frequency)
        self.P = channels(torch.stack([rank, torch.zeros_like(rank)], -1))
        self.B = channels(torch.stack([inputs, torch.zeros_like(inputs)], -1))

    def discretize(self) -> LowRankSystem:
        """The system of the parameters as they are."""
        diagonal = torch.complex(-self.log_decay.exp(), self.frequency)
        rank, inputs, output = (torch.view_as_complex(p) for p in (self.P, self.B, self.C))
        return LowRankSystem(self.log_step.exp()[:, None], diagonal, rank, inputs, output)

    def extra_repr(self) -> str:
        return f"state={2 * self.pairs}"
