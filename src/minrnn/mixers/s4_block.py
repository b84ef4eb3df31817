"""The S4 block: an inner layer along time, then a gated map across channels.

B batch, T time, D model width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_fraction, check_types
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series
from minrnn.mixers.inner import inner_config, make_inner


@dataclass(frozen=True)
class S4BlockConfig:
    """Options of `S4Block`.

    Args:
        inner: what mixes along time, one of the table of inner layers
        inner_options: options of that
        dropout: share of the activations after it that is dropped in training
    """

    inner: str = "s4"
    inner_options: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        inner_config(self.inner, self.inner_options)
        check_fraction(self, "dropout")


@dataclass(frozen=True)
class S4DBlockConfig(S4BlockConfig):
    """Options of `S4Block` around S4D: those of `S4BlockConfig`, with another default.

    Args:
        inner: what mixes along time, one of the table of inner layers
        inner_options: options of that
        dropout: share of the activations after it that is dropped in training
    """

    inner: str = "s4d"


@dataclass(frozen=True)
class S6BlockConfig(S4BlockConfig):
    """Options of `S4Block` around S6: those of `S4BlockConfig`, with another default.

    Args:
        inner: what mixes along time, one of the table of inner layers
        inner_options: options of that
        dropout: share of the activations after it that is dropped in training
    """

    inner: str = "s6"


class S4Block(Mixer):
    """y = u ⊙ sigmoid(v), [u | v] = W dropout(gelu(inner(x))) + b: the S4 block, around any inner layer.

    Norm and residual stand outside. The state is that of the inner layer. W and b begin as nn.Linear's.

    Args:
        width: D.
        config: the options.
        place: handed on to the inner layer.

    Source: Gu et al., "Efficiently modeling long sequences with structured state spaces" (2022), section 3.4; the gated
    map as in the code of Gu et al., "On the parameterization and initialization of diagonal state space models" (2022).
    """

    def __init__(self, width: int, config: S4BlockConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.inner = make_inner(config.inner, width, config.inner_options, place)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        check_series(type(self).__name__, x, self.output.in_features, reset, self.output.weight)
        y, state = self.inner(x, state, reset=reset)
        return F.glu(self.output(self.dropout(F.gelu(y)))), state

    def initial_state(self, batch_size: int) -> Any:
        """That of the inner layer."""
        return self.inner.initial_state(batch_size)

    @property
    def state_size(self) -> int | None:
        """That of the inner layer."""
        return self.inner.state_size
