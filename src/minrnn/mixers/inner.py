"""The table of inner layers: sequence maps that stand inside a block of several systems."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from minrnn.mixers.contract import ALONE, Mixer, Place
from minrnn.mixers.hyena import LongConv, LongConvConfig
from minrnn.mixers.s4 import S4, S4Config
from minrnn.mixers.s4d import S4D, S4DConfig
from minrnn.mixers.s6 import S6, S6Config


class InnerLayer(NamedTuple):
    """A row of the table.

    Args:
        module: makes the layer of (width, config, place).
        config: the dataclass of its options.
    """

    module: Callable[[int, Any, Place], Mixer]
    config: type


INNER: dict[str, InnerLayer] = {
    "s4d": InnerLayer(S4D, S4DConfig),
    "s4": InnerLayer(S4, S4Config),
    "hyena": InnerLayer(LongConv, LongConvConfig),
    "s6": InnerLayer(S6, S6Config),
}


def checked_config(caller: str, table: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """The checked options of `name` in `table`, a frozen dataclass.

    Args:
        caller: what the table is of, for messages.
        table: from names to rows, of which `config` is the dataclass of options.
        name: a key of the table.
        options: fields of its dataclass; those that are not there take their defaults.

    Raises:
        ValueError: the table has no such name, or that not these options.
    """
    if name not in table:
        raise ValueError(f"{caller}: name must be one of {', '.join(table)}, got {name!r}")
    config = table[name].config
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            raise ValueError(f"{caller}: options of {name} must be among {', '.join(known)}, got {option!r}")
    return config(**options)


def inner_config(name: str, options: Mapping[str, Any]) -> Any:
    """The checked `options` of the inner layer `name`; errors as in `checked_config`."""
    return checked_config("inner layer", INNER, name, options)


def make_inner(name: str, width: int, options: Mapping[str, Any], place: Place = ALONE) -> Mixer:
    """The inner layer `name` with these `options` for `width` channels, at its `place` in the stack; errors as in
    `checked_config`."""
    config = inner_config(name, options)
    return INNER[name].module(width, config, place)
