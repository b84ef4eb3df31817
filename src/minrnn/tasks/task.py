"""What training asks of a task."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Model = Callable[..., tuple[Tensor, Any]]  # (tokens (B, T), state) -> (logits (B, T, vocabulary), state)


class Task(Protocol):
    """Data, a loss to train on, and a metric on what is held out."""

    def batch(self, seed: int, step: int) -> Any:
        """The training batch of a step, a function of (seed, step) alone: tensors of B rows, in a tuple or by
        themselves."""
        ...

    def loss(self, model: Any, batch: Any) -> Tensor:
        """What is minimised, a mean over the batch."""
        ...

    def evaluate(self, model: Any, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """Metrics on what is held out: the loss as `held_out`, and any others."""
        ...
