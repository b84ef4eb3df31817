"""What every mixer is: a map of (B, T, D) to (B, T, D) along time, whole, in chunks or in steps, with a carried state.

B batch, T time, D model width.
"""

import dataclasses
from abc import ABC, abstractmethod
from types import UnionType
from typing import Any, Literal, get_origin

import torch
from torch import Tensor, nn

from minrnn._shapes import check_shape, check_tensor, shape_error


class Mixer(nn.Module, ABC):
    """`y, state = mixer(x, state=None, *, reset=None)`, always these two, for a whole sequence, a chunk or one step.

    A state is opaque to its holder: it is got from `initial_state` or from a call, and given to the next call. Its
    recurrent parts are float32 where the model is 16-bit.
    """

    @abstractmethod
    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix along time.

        Args:
            x: (B, T, D).
            state: what an earlier call gave for the steps before x; None at the beginning of a sequence.
            reset: bool (B, T). Where true, step t begins a new sequence: nothing from t on depends on a step before it.

        Returns:
            y, (B, T, D), y_t a function of x_0 ... x_t and the state; and the state after the last step.

        Raises:
            TypeError: an argument is not a tensor, or reset is not bool.
            ValueError: shapes do not agree.
        """

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences."""

    @property
    @abstractmethod
    def state_size(self) -> int | None:
        """Numbers in the state of one sequence; None where they grow with its length."""


def check_series(door: str, x: Tensor, width: int, reset: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x is (B, T, width) and `reset`, if given, bool (B, T)."""
    check_tensor(door, "x", x)
    if x.dim() != 3 or x.shape[2] != width:
        raise shape_error(door, "x", "(B, T, D)", f"three dimensions, the last {width}", tuple(x.shape))
    if reset is not None:
        check_tensor(door, "reset", reset)
        check_shape(door, "reset", reset, "(B, T)", tuple(x.shape[:2]))
        if reset.dtype != torch.bool:
            raise TypeError(f"{door}: reset must be torch.bool, got {reset.dtype}")


def check_types(config: Any) -> None:
    """Raise TypeError unless every field of a dataclass holds what its annotation says; an int will do for a float."""
    for field in dataclasses.fields(config):
        value, origin = getattr(config, field.name), get_origin(field.type)
        wanted: Any = str if origin is Literal else field.type if origin in (None, UnionType) else origin
        allowed = (float, int) if wanted is float else wanted
        if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
            door = type(config).__name__
            raise TypeError(
                f"{door}: {field.name} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}"
            )
