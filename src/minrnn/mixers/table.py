"""The table of mixers: what each is made from, and what usually surrounds it."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from minrnn.mixers.contract import ALONE, Mixer, Place
from minrnn.mixers.minrnn import MinGRUConfig, MinGRUMixer, MinLSTMConfig, MinLSTMMixer


class Usual(NamedTuple):
    """What a mixer's authors put around it in a block.

    Args:
        conv: kernel of the causal convolution before it, 0 for none.
        mlp: hidden width of the MLP after it in widths of the model, 0 for none.
        mlp_kind: of that MLP, "geglu", "gelu" or "channel_mix".
        norm: before each of the two, "layer" or "rms".
    """

    conv: int = 0
    mlp: float = 0.0
    mlp_kind: str = "gelu"
    norm: str = "layer"


class Entry(NamedTuple):
    """A row of the table.

    Args:
        module: makes the mixer of (width, config, place).
        config: the dataclass of its options.
        usual: what surrounds it where a model's config says nothing else.
        equation: what it computes, in a line.
        parallel: how it is computed over a whole sequence.
        cost: of that, with the length T.
    """

    module: Callable[[int, Any, Place], Mixer]
    config: type
    usual: Usual
    equation: str
    parallel: str
    cost: str


MIXERS: dict[str, Entry] = {
    "mingru": Entry(
        MinGRUMixer,
        MinGRUConfig,
        Usual(conv=4, mlp=2.0, mlp_kind="geglu"),
        "h = (1-z) h' + z g(v), z = sigmoid(k)",
        "fused scan",
        "T",
    ),
    "minlstm": Entry(
        MinLSTMMixer,
        MinLSTMConfig,
        Usual(conv=4, mlp=2.0, mlp_kind="geglu"),
        "h = (f h' + i g(v)) / (f + i), f, i = sigmoid(k), sigmoid(j)",
        "fused scan",
        "T",
    ),
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
    config = MIXERS[name].config
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            raise ValueError(f"mixer: options of {name} must be among {', '.join(known)}, got {option!r}")
    return config(**options)


def make_mixer(name: str, width: int, options: Mapping[str, Any], place: Place = ALONE) -> Mixer:
    """The mixer `name` with these `options` for a model of `width` channels, at its `place` in the stack; errors as in
    `mixer_config`."""
    return MIXERS[name].module(width, mixer_config(name, options), place)
