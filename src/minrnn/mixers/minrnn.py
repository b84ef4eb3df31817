"""minGRU and minLSTM as mixers: widen, one scan, and back to the model's width.

B batch, T time, D model width, H = expansion x D hidden width.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minrnn._config import check_choice, check_finite, check_positive, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state_tensor, scaled
from minrnn.ops import ACTIVATIONS, mingru_scan, minlstm_scan
from minrnn.ops.gates import activate


@dataclass(frozen=True)
class MinGRUConfig:
    """Options of `MinGRUMixer`.

    Args:
        expansion: hidden width in widths of the model
        activation: of the candidate: g, identity or tanh
        learn_initial_state: whether sequences begin from a learned state instead of zeros
        forget_bias: how far the gates lean towards keeping the state at the beginning of training
    """

    expansion: float = 1.0
    activation: str = "g"
    learn_initial_state: bool = False
    forget_bias: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "expansion")
        check_finite(self, "forget_bias")
        check_choice(self, "activation", ACTIVATIONS)


@dataclass(frozen=True)
class MinLSTMConfig(MinGRUConfig):
    """Options of `MinLSTMMixer`: those of minGRU, and

    Args:
        expansion: hidden width in widths of the model
        activation: of the candidate: g, identity or tanh
        learn_initial_state: whether sequences begin from a learned state instead of zeros
        forget_bias: how far the gates lean towards keeping the state at the beginning of training
        normalize: whether the two gates are divided by their sum
    """

    normalize: bool = True


class MinRNNMixer(Mixer):
    """What the two share: y = W_out scan(W_in x + b_in) + b_out.

    The state is that of the scan, (B, H), float32 where the model is 16-bit. With `learn_initial_state` a sequence
    begins, and begins again at resets, from act(p), p a parameter drawn from N(0, 1); without, from zeros.
    W_in and b_in begin as nn.Linear's, but for `forget_bias`.
    """

    blocks: ClassVar[int]  # of H channels in the projection W_in x + b_in
    keeps: ClassVar[int]  # 1 where the first block is a gate that keeps the state, -1 where it overwrites it

    def __init__(self, width: int, config: MinGRUConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.hidden, self.activation = int(scaled(width, config.expansion)), config.activation
        if self.hidden < 1:
            caller = type(self).__name__
            raise ValueError(f"{caller}: expansion x width must be at least 1, got {config.expansion} x {width}")
        self.input = nn.Linear(width, self.blocks * self.hidden)
        with torch.no_grad():
            self.input.bias[: self.hidden] += self.keeps * config.forget_bias
        self.output = nn.Linear(self.hidden, width)
        self.initial = nn.Parameter(torch.randn(self.hidden)) if config.learn_initial_state else None

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller = type(self).__name__
        check_series(caller, x, self.input.in_features, reset, self.input.weight)
        if state is None:
            state = self.initial_state(len(x))
        else:
            check_state_tensor(caller, "state", state, self.input.weight, "(B, H)", (len(x), self.hidden))
            state = state.to(accumulate_dtype(self.input.weight.dtype))
        hidden, state = self.scan(self.input(x), state, reset, self._restart())
        return self.output(hidden), state

    @abstractmethod
    def scan(
        self, projection: Tensor, state: Tensor, reset: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over a projection (B, T, blocks x H)."""

    def initial_state(self, batch_size: int) -> Tensor:
        """(batch_size, H)."""
        weight, restart = self.input.weight, self._restart()
        if restart is None:
            return weight.new_zeros(batch_size, self.hidden, dtype=accumulate_dtype(weight.dtype))
        return restart.repeat(batch_size, 1)

    @property
    def state_size(self) -> int:
        """H."""
        return self.hidden

    def _restart(self) -> Tensor | None:
        """The learned state in which a sequence begins, (H,), if there is one, in the dtype of states."""
        if self.initial is None:
            return None
        return activate(self.initial, self.activation).to(accumulate_dtype(self.initial.dtype))


class MinGRUMixer(MinRNNMixer):
    """minGRU between two linear maps: [k | v] = W_in x + b_in, h = mingru_scan([k | v]), y = W_out h + b_out.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.1 and appendix C.2.
    """

    blocks, keeps = 2, -1

    def scan(
        self, projection: Tensor, state: Tensor, reset: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return mingru_scan(projection, state, reset=reset, restart=restart, activation=self.activation)


class MinLSTMMixer(MinRNNMixer):
    """minLSTM between two linear maps: [f | i | v] = W_in x + b_in, h = minlstm_scan([f | i | v]), y = W_out h + b_out.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.2 and appendix C.2; its code has forget_bias = 3.
    """

    blocks, keeps = 3, 1

    def __init__(self, width: int, config: MinLSTMConfig, place: Place = ALONE) -> None:
        super().__init__(width, config, place)
        self.normalize = config.normalize

    def scan(
        self, projection: Tensor, state: Tensor, reset: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return minlstm_scan(
            projection, state, reset=reset, restart=restart, activation=self.activation, normalize=self.normalize
        )
