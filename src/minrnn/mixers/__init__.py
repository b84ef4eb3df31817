"""Mixers: every system of the comparison behind one contract, (B, T, D) to (B, T, D). The table says which."""

from minrnn.mixers.contract import Mixer, Place, Tuning, detach_state
from minrnn.mixers.conv import CausalConv, DepthwiseConv
from minrnn.mixers.minrnn import MinGRUConfig, MinGRUMixer, MinLSTMConfig, MinLSTMMixer
from minrnn.mixers.rwkv import ChannelMix
from minrnn.mixers.table import MIXERS, make_mixer, mixer_config

__all__ = [
    "MIXERS",
    "CausalConv",
    "ChannelMix",
    "DepthwiseConv",
    "MinGRUConfig",
    "MinGRUMixer",
    "MinLSTMConfig",
    "MinLSTMMixer",
    "Mixer",
    "Place",
    "Tuning",
    "detach_state",
    "make_mixer",
    "mixer_config",
]
