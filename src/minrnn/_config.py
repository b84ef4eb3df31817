"""What dataclasses of options check: types, ranges, choices. Each names the class, the field, what was wanted and what
came."""

import dataclasses
import math
from collections.abc import Collection
from types import UnionType
from typing import Any, Literal, get_args, get_origin


def check_types(config: Any) -> None:
    """Raise TypeError unless every field of a dataclass holds what its annotation says; an int will do for a float."""
    for field in dataclasses.fields(config):
        value, origin = getattr(config, field.name), get_origin(field.type)
        wanted: Any = str if origin is Literal else field.type if origin in (None, UnionType) else origin
        allowed = wanted | int if float in (wanted, *get_args(wanted)) else wanted
        if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
            caller = type(config).__name__
            raise TypeError(
                f"{caller}: {field.name} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}"
            )


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError unless these fields are at least this, and finite; None is none of its business."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            finite = " and finite" * isinstance(value, float)
            raise ValueError(f"{type(config).__name__}: {name} must be at least {least}{finite}, got {value}")


def check_positive(config: Any, *names: str, finite: bool = True) -> None:
    """Raise ValueError unless these fields are above 0, and finite unless infinity has a meaning."""
    for name in names:
        value = getattr(config, name)
        if not value > 0 or (finite and value == math.inf):
            raise ValueError(f"{type(config).__name__}: {name} must be above 0{' and finite' * finite}, got {value}")


def check_finite(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are finite."""
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value):
            raise ValueError(f"{type(config).__name__}: {name} must be finite, got {value}")


def check_fraction(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be in [0, 1), got {value}")


def check_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """Raise ValueError unless the field is one of these."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")
