"""What a model is made of: small frozen dataclasses, checked when made, to and from plain values for JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from minrnn._config import check_at_least, check_choice, check_fraction, check_types
from minrnn.mixers import MIXERS, mixer_config


@dataclass(frozen=True)
class BackboneConfig:
    """A stack of equal blocks.

    Args:
        width: channels between the blocks
        layers: how many blocks
        mixer: what mixes along time, one of those that `minrnn info --mixers` lists
        mixer_options: options of the mixer, such as expansion
        conv: kernel of the causal convolution before the mixer, 0 for none (default: what the mixer's authors do)
        mlp: hidden width of the MLP after the mixer in widths of the model, 0 for none (default: as the authors)
        mlp_kind: of that MLP: geglu, gelu, relu or channel_mix (default: as the authors)
        norm: before each of them: layer or rms (default: as the authors)
        dropout: share of the MLP's output that is dropped in training; without an MLP, nothing is
    """

    width: int = 128
    layers: int = 3
    mixer: str = "mingru"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    conv: int | None = None
    mlp: float | None = None
    mlp_kind: str | None = None
    norm: str | None = None
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_types(self)
        mixer_config(self.mixer, self.mixer_options)
        for name, usual in MIXERS[self.mixer].usual._asdict().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        check_at_least(self, 1, "width", "layers")
        check_at_least(self, 0, "conv", "mlp")
        if 0 < (self.mlp or 0) * self.width < 1:
            raise ValueError(f"BackboneConfig: mlp * width must be 0 or at least 1, got {self.mlp} * {self.width}")
        if (self.mlp or 0) * self.width >= 2**63:
            raise ValueError(f"BackboneConfig: mlp * width must be below 2**63, got {self.mlp} * {self.width}")
        check_fraction(self, "dropout")
        check_choice(self, "mlp_kind", ("geglu", "gelu", "relu", "channel_mix"))
        check_choice(self, "norm", ("layer", "rms"))


@dataclass(frozen=True)
class ModelConfig:
    """What a kind of model is made of: a `backbone`, and what is around it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config whose `to_dict` gave `values`; ValueError or TypeError where none could have."""
        _check_fields(cls, values)
        _check_fields(BackboneConfig, values["backbone"])
        return cls(**{**values, "backbone": BackboneConfig(**values["backbone"])})


def _check_fields(config: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless `values` has all fields of the dataclass `config` and no others."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{config.__name__}: fields must be a mapping, got {type(values).__name__}")
    known = [each.name for each in fields(config)]
    if set(values) != set(known):
        raise ValueError(f"{config.__name__}: fields must be {', '.join(known)}, got {', '.join(map(str, values))}")


@dataclass(frozen=True)
class LanguageModelConfig(ModelConfig):
    """A backbone between an embedding of tokens and logits over tokens.

    Args:
        vocabulary: how many different tokens there are
        backbone: what is between
    """

    vocabulary: int
    backbone: BackboneConfig = BackboneConfig()

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "vocabulary")
