"""Models: a backbone of blocks around a mixer, the language model, its files, and the text that it makes."""

from minrnn.models.base import SequenceModel
from minrnn.models.block import Backbone, Block, GatedMLP
from minrnn.models.config import BackboneConfig, LanguageModelConfig, ModelConfig
from minrnn.models.files import load, load_model, save
from minrnn.models.generate import generate
from minrnn.models.language import LanguageModel, parameter_groups

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Block",
    "GatedMLP",
    "LanguageModel",
    "LanguageModelConfig",
    "ModelConfig",
    "SequenceModel",
    "generate",
    "load",
    "load_model",
    "parameter_groups",
    "save",
]
