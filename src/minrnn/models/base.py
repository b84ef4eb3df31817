"""What training and files know of a model."""

from typing import Any, ClassVar

from torch import nn

from minrnn.mixers import Mixer
from minrnn.models.config import ModelConfig


class SequenceModel(nn.Module):
    """A backbone of mixers between an input and an output layer: `output, state = model(input, state, reset=reset)`.

    Args:
        config: what it is made of, a `config_class`.
    """

    config_class: ClassVar[type[ModelConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def constant_state(self) -> bool:
        """Whether the state does not grow with the sequence, so that a sequence may be of any length."""
        return all(part.state_size is not None for part in self.modules() if isinstance(part, Mixer))
