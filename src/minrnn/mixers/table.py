"""The table of mixers: what each is made from, and what usually surrounds it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from minrnn._shapes import accumulate_dtype
from minrnn.mixers.aaren import Aaren, AarenConfig
from minrnn.mixers.attention import AttentionConfig, AttentionMixer
from minrnn.mixers.contract import ALONE, Mixer, Place
from minrnn.mixers.h3 import H3, H3Config
from minrnn.mixers.hyena import Hyena, HyenaConfig
from minrnn.mixers.inner import checked_config
from minrnn.mixers.mamba import Mamba, MambaConfig
from minrnn.mixers.minrnn import MinGRUConfig, MinGRUMixer, MinLSTMConfig, MinLSTMMixer
from minrnn.mixers.mlstm import MLSTM, MLSTMConfig
from minrnn.mixers.rnn import GRULoopMixer, GRUMixer, LSTMLoopMixer, LSTMMixer, RNNConfig
from minrnn.mixers.rwkv import RWKV4, RWKV4Config
from minrnn.mixers.s4_block import S4Block, S4BlockConfig, S4DBlockConfig, S6BlockConfig
from minrnn.mixers.slstm import SLSTM, SLSTMConfig


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
        equation: what it computes, in a line; h' is the state after a step, h the one before.
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
        "h' = (1-z) h + z g(v), z = sigmoid(k)",
        "fused scan",
        "T",
    ),
    "minlstm": Entry(
        MinLSTMMixer,
        MinLSTMConfig,
        Usual(conv=4, mlp=2.0, mlp_kind="geglu"),
        "h' = (f h + i g(v)) / (f + i), f, i = sigmoid(k), sigmoid(j)",
        "fused scan",
        "T",
    ),
    "gru": Entry(
        GRUMixer,
        RNNConfig,
        Usual(),
        "h' = (1-z) tanh(W x + r U h) + z h",
        "none: steps of nn.GRU",
        "T, sequential",
    ),
    "lstm": Entry(
        LSTMMixer,
        RNNConfig,
        Usual(),
        "h' = o tanh(c'), c' = f c + i tanh(W x + U h)",
        "none: steps of nn.LSTM",
        "T, sequential",
    ),
    "gru_loop": Entry(
        GRULoopMixer,
        RNNConfig,
        Usual(),
        "h' = (1-z) h + z tanh(W [x, r h])",
        "none: a loop of cells",
        "T, sequential",
    ),
    "lstm_loop": Entry(
        LSTMLoopMixer,
        RNNConfig,
        Usual(),
        "h' = o tanh(c'), c' = f c + i tanh(W [x, h])",
        "none: a loop of cells",
        "T, sequential",
    ),
    "s4d": Entry(
        S4Block,
        S4DBlockConfig,
        Usual(),
        "h' = exp(dt A) h + B x, y = glu(W gelu(Re(C h') + D x)), A diagonal",
        "FFT",
        "T log T",
    ),
    "s4": Entry(
        S4Block,
        S4BlockConfig,
        Usual(),
        "h' = A h + B x, y = glu(W gelu(Re(C h') + D x)), A diagonal - P P*, bilinear",
        "FFT",
        "T log T",
    ),
    "s6": Entry(
        S4Block,
        S6BlockConfig,
        Usual(),
        "h' = exp(dt A) h + dt x B, y = glu(W gelu(h' C + D x)); dt, B, C from x",
        "fused scan",
        "T",
    ),
    "mamba": Entry(
        Mamba,
        MambaConfig,
        Usual(norm="rms"),
        "y = silu(z) (h' C + D u), h' = exp(dt A) h + dt u B; dt, B, C from u",
        "fused scan",
        "T",
    ),
    "h3": Entry(
        H3,
        H3Config,
        Usual(mlp=4.0),
        "y = q ssm(v shift(k))",
        "FFT",
        "T log T",
    ),
    "hyena": Entry(
        Hyena,
        HyenaConfig,
        Usual(mlp=4.0),
        "y = x0 (K * (x1 v)), K = window MLP(time)",
        "FFT",
        "T log T",
    ),
    "attention": Entry(
        AttentionMixer,
        AttentionConfig,
        Usual(mlp=4.0),
        "y = softmax(q K^T / sqrt(d)) V",
        "matrix products",
        "T^2",
    ),
    "aaren": Entry(
        Aaren,
        AarenConfig,
        Usual(mlp=4.0),
        "y = sum of e^s v / sum of e^s, s = q . k, q learned",
        "fused scan",
        "T",
    ),
    "rwkv4": Entry(
        RWKV4,
        RWKV4Config,
        Usual(mlp=4.0, mlp_kind="channel_mix"),
        "y = sigmoid(r) (sum of e^(k - w age) v / sum of e^(k - w age))",
        "fused scan",
        "T",
    ),
    "mlstm": Entry(
        MLSTM,
        MLSTMConfig,
        Usual(),
        "C' = f C + i k v^T, n' = f n + i k, y = C'^T q / max(|n' . q|, 1)",
        "chunkwise",
        "T",
    ),
    "slstm": Entry(
        SLSTM,
        SLSTMConfig,
        Usual(mlp=1.3, mlp_kind="geglu"),
        "h' = o c' / n', c' = f c + e^i tanh(z), n' = f n + e^i; i, f, z, o read h",
        "fused loop",
        "T, sequential",
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
    return checked_config("mixer", MIXERS, name, options)


def make_mixer(name: str, width: int, options: Mapping[str, Any] | None = None, place: Place = ALONE) -> Mixer:
    """The mixer `name` for a model of `width` channels.

    Args:
        name: a key of `MIXERS`.
        width: D.
        options: fields of its dataclass, `MIXERS[name].config`, whose docstring explains them; those that are not there
            take their defaults.
        place: where in its stack it stands.

    Raises:
        ValueError: as `mixer_config`; or there is no such place.

    Example:
        >>> mixer = make_mixer("mamba", 64, {"expansion": 2})
        >>> y, state = mixer(torch.randn(8, 100, 64))
        >>> optimizer = torch.optim.AdamW(minrnn.models.parameter_groups(mixer, lr=1e-3, weight_decay=0.1))

    (State-space mixers want smaller learning rates for some of their weights: `parameter_groups` knows which.)
    """
    if not 0 <= place.layer < place.layers:
        raise ValueError(f"make_mixer: place must have a layer from 0 to below its layers, got {place}")
    config, dtype = mixer_config(name, options or {}), torch.get_default_dtype()
    wide = accumulate_dtype(dtype)
    torch.set_default_dtype(wide)
    try:
        mixer = MIXERS[name].module(width, config, place)
    finally:
        torch.set_default_dtype(dtype)
    return mixer if wide == dtype else mixer.to(dtype)  # some of whose parameters stay float32
