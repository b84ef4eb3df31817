"""Mixers: every system of the comparison behind one contract, (B, T, D) to (B, T, D). The table says which."""

from minrnn.mixers.aaren import Aaren, AarenConfig, AarenState
from minrnn.mixers.attention import AttentionConfig, AttentionMixer, AttentionState
from minrnn.mixers.contract import Mixer, Place, Tuning, detach_state
from minrnn.mixers.conv import CausalConv, DepthwiseConv
from minrnn.mixers.h3 import H3, H3Config, H3State
from minrnn.mixers.hyena import Hyena, HyenaConfig, HyenaState, LongConv, LongConvConfig, LongConvState
from minrnn.mixers.inner import INNER, inner_config, make_inner
from minrnn.mixers.mamba import Mamba, MambaConfig, MambaState
from minrnn.mixers.minrnn import MinGRUConfig, MinGRUMixer, MinLSTMConfig, MinLSTMMixer
from minrnn.mixers.mlstm import MLSTM, MLSTMConfig, MLSTMState
from minrnn.mixers.rnn import (
    GRULoop,
    GRULoopMixer,
    GRUMixer,
    GRUState,
    LSTMLoop,
    LSTMLoopMixer,
    LSTMMixer,
    LSTMState,
    RNNConfig,
)
from minrnn.mixers.rwkv import RWKV4, ChannelMix, RWKV4Config, RWKV4State
from minrnn.mixers.s4 import S4, S4Config
from minrnn.mixers.s4_block import S4Block, S4BlockConfig, S4DBlockConfig, S6BlockConfig
from minrnn.mixers.s4d import S4D, S4DConfig
from minrnn.mixers.s6 import S6, S6Config
from minrnn.mixers.slstm import SLSTM, SLSTMConfig, SLSTMMixerState
from minrnn.mixers.state_space import LazyState
from minrnn.mixers.table import MIXERS, make_mixer, mixer_config

__all__ = [
    "H3",
    "INNER",
    "MIXERS",
    "MLSTM",
    "RWKV4",
    "S4",
    "S4D",
    "S6",
    "SLSTM",
    "Aaren",
    "AarenConfig",
    "AarenState",
    "AttentionConfig",
    "AttentionMixer",
    "AttentionState",
    "CausalConv",
    "ChannelMix",
    "DepthwiseConv",
    "GRULoop",
    "GRULoopMixer",
    "GRUMixer",
    "GRUState",
    "H3Config",
    "H3State",
    "Hyena",
    "HyenaConfig",
    "HyenaState",
    "LSTMLoop",
    "LSTMLoopMixer",
    "LSTMMixer",
    "LSTMState",
    "LazyState",
    "LongConv",
    "LongConvConfig",
    "LongConvState",
    "MLSTMConfig",
    "MLSTMState",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "MinGRUConfig",
    "MinGRUMixer",
    "MinLSTMConfig",
    "MinLSTMMixer",
    "Mixer",
    "Place",
    "RNNConfig",
    "RWKV4Config",
    "RWKV4State",
    "S4Block",
    "S4BlockConfig",
    "S4Config",
    "S4DBlockConfig",
    "S4DConfig",
    "S6BlockConfig",
    "S6Config",
    "SLSTMConfig",
    "SLSTMMixerState",
    "Tuning",
    "detach_state",
    "inner_config",
    "make_inner",
    "make_mixer",
    "mixer_config",
]
