"""Mixers: every system of the comparison behind one contract, (B, T, D) to (B, T, D). The table says which."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minrnn.mixers.contract import Mixer
from minrnn.mixers.conv import CausalConv
from minrnn.mixers.minrnn import MinGRUConfig, MinGRUMixer, MinLSTMConfig, MinLSTMMixer

__all__ = [
    "MIXERS",
    "CausalConv",
    "MinGRUConfig",
    "MinGRUMixer",
    "MinLSTMConfig",
    "MinLSTMMixer",
    "Mixer",
    "make_mixer",
    "mixer_config",
]

# By name: the module, made from (width, options), and the dataclass of its options.
MIXERS: dict[str, tuple[Any, Any]] = {
    "mingru": (MinGRUMixer, MinGRUConfig),
    "minlstm": (MinLSTMMixer, MinLSTMConfig),
}


def mixer_config(name: str, options: Mapping[str, Any]) -> Any:
    """The checked options of the mixer `name`, a frozen dataclass.

    Args:
        name: a key of `MIXERS`.
        options: fields of its dataclass; those that are not there take their defaults.

    Raises:
        ValueError: no mixer has this name, or it has not these options.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer: name must be one of {', '.join(MIXERS)}, got {name!r}")
    _, config = MIXERS[name]
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            raise ValueError(f"mixer: options of {name} must be among {', '.join(known)}, got {option!r}")
    return config(**options)


def make_mixer(name: str, width: int, options: Mapping[str, Any]) -> Mixer:
    """The mixer `name` with these `options` for a model of `width` channels; errors as in `mixer_config`."""
    config = mixer_config(name, options)
    return MIXERS[name][0](width, config)
