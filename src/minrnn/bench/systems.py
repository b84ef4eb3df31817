"""What is compared: every system as a module from (B, T, input) to (B, T, hidden), by one table. Layers and their peers
are one comparison, mixers and theirs another.

The names in `SYSTEMS` are those of the command line, of the JSON and of the figure's legend.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from minrnn._config import check_at_least, check_choice
from minrnn.layers import MinGRU, MinLSTM
from minrnn.mixers import MIXERS, make_mixer
from minrnn.mixers.rnn import CellLoop, GRULoop, LSTMLoop

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One step that is timed: forward and backward of `layers` layers over (batch, length, input_size).

    float32 and float64 are the dtype of everything; bfloat16 and float16 run under autocast with float32 weights.
    With `first_layer` the input needs no gradient, as in a network's first layer. Everything is on `device`.
    """

    batch: int = 64
    length: int = 512
    input_size: int = 128
    hidden_size: int = 128
    layers: int = 1
    dtype: str = "float32"
    first_layer: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch", "length", "input_size", "hidden_size", "layers")
        check_choice(self, "dtype", DTYPES)

    @property
    def autocasts(self) -> bool:
        return DTYPES[self.dtype].itemsize == 2

    def input(self) -> Tensor:
        """A random input, (B, T, input_size)."""
        return self._random(self.input_size).requires_grad_(not self.first_layer)

    def hidden(self) -> Tensor:
        """A random input of a layer above the first, (B, T, hidden_size)."""
        return self._random(self.hidden_size).requires_grad_()

    def _random(self, width: int) -> Tensor:
        dtype = torch.float32 if self.autocasts else DTYPES[self.dtype]
        return torch.randn(self.batch, self.length, width, dtype=dtype, device=self.device)


class Loops(nn.Module):
    """Layers of a step-by-step cell loop, as the paper timed it."""

    def __init__(self, kind: type[CellLoop], load: Workload) -> None:
        super().__init__()
        widths = [load.input_size] + [load.hidden_size] * (load.layers - 1)
        self.layers = nn.ModuleList(kind(width, load.hidden_size) for width in widths)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input, _ = layer(input)
        return input


class Products(nn.Module):
    """The matrix products of a minimal RNN alone, nn.Linear of `blocks` × H: its layers cannot be faster.

    Every layer above the first is given its own input, so that the products of all layers are timed and nothing else.
    """

    def __init__(self, load: Workload, blocks: int):
        super().__init__()
        widths = [load.input_size] + [load.hidden_size] * (load.layers - 1)
        self.linears = nn.ModuleList(nn.Linear(width, blocks * load.hidden_size) for width in widths)
        self.above = [load.hidden() for _ in widths[1:]]

    def forward(self, input: Tensor) -> list[Tensor]:
        for tensor in self.above:
            tensor.grad = None
        return [linear(x) for linear, x in zip(self.linears, [input, *self.above], strict=True)]


def _torch_rnn(kind: Callable[..., nn.Module]) -> Callable[[Workload], nn.Module]:
    return lambda load: kind(load.input_size, load.hidden_size, load.layers, batch_first=True)


def _mingru_pytorch(load: Workload) -> nn.Module:
    from minGRU_pytorch import minGRU

    widths = [load.input_size] + [load.hidden_size] * (load.layers - 1)
    # Its hidden width is int(dim * factor); the half keeps rounding from losing one.
    return nn.Sequential(*(minGRU(w, (load.hidden_size + 0.5) / w, proj_out=False) for w in widths))


def _mixer(name: str, load: Workload) -> nn.Module:
    """Mixers keep the width; those that are made for a length are made for this one."""
    if load.input_size != load.hidden_size or load.layers != 1:
        sizes = f"input_size {load.input_size}, hidden_size {load.hidden_size}, layers {load.layers}"
        raise ValueError(f"{name}: a mixer has one layer with hidden_size = input_size, got {sizes}")
    has_length = "max_length" in {field.name for field in fields(MIXERS[name].config)}
    return make_mixer(name, load.hidden_size, {"max_length": load.length} if has_length else {})


def _mambapy(load: Workload) -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=load.hidden_size, n_layers=1, pscan=True))


def _transformers_mamba(load: Workload) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=load.hidden_size, num_hidden_layers=1), layer_idx=0)


def _xlstm_slstm(load: Workload) -> nn.Module:
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    return sLSTMLayer(sLSTMLayerConfig(embedding_dim=load.hidden_size, num_heads=4, backend="vanilla"))


def _xlstm_mlstm(load: Workload) -> nn.Module:
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

    return mLSTMLayer(mLSTMLayerConfig(embedding_dim=load.hidden_size, context_length=load.length))


@dataclass(frozen=True)
class System:
    """A row of the comparison: how it is built, and which systems it is set against."""

    build: Callable[[Workload], nn.Module]
    over: tuple[str, ...] = ()  # the systems that it means to replace: their time over its own is its speed-up
    limit: str | None = None  # the system that no other code of it could beat
    package: str | None = None  # compared when this package is installed
    mixes: bool = False  # a mixer or one's peer; its limit is its own products

    def missing(self) -> str | None:
        """Why this system cannot be compared here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install minrnn[peers])"
        return None


_OVER = {
    "mingru": ("gru", "gru_loop", "aaren"),
    "minlstm": ("lstm", "lstm_loop"),
    "mamba": ("mambapy", "transformers-mamba"),
    "mlstm": ("xlstm-mlstm",),
    "slstm": ("xlstm-slstm",),
}
SYSTEMS: dict[str, System] = {
    "products-2H": System(lambda load: Products(load, 2)),
    "MinGRU": System(_torch_rnn(MinGRU), ("nn.GRU", "GRU-loop", "minGRU-pytorch", "mamba"), "products-2H"),
    "nn.GRU": System(_torch_rnn(nn.GRU)),
    "GRU-loop": System(partial(Loops, GRULoop)),
    "minGRU-pytorch": System(_mingru_pytorch, ("GRU-loop",), package="minGRU_pytorch"),
    "products-3H": System(lambda load: Products(load, 3)),
    "MinLSTM": System(_torch_rnn(MinLSTM), ("nn.LSTM", "LSTM-loop", "mamba"), "products-3H"),
    "nn.LSTM": System(_torch_rnn(nn.LSTM)),
    "LSTM-loop": System(partial(Loops, LSTMLoop)),
    **{name: System(partial(_mixer, name), _OVER.get(name, ()), mixes=True) for name in MIXERS},
    "mambapy": System(_mambapy, package="mambapy", mixes=True),
    "transformers-mamba": System(_transformers_mamba, package="transformers", mixes=True),
    "xlstm-mlstm": System(_xlstm_mlstm, package="xlstm", mixes=True),
    "xlstm-slstm": System(_xlstm_slstm, package="xlstm", mixes=True),
}


def installed(*, mixes: bool) -> list[str]:
    """The systems of one of the two comparisons that can be compared here."""
    return [name for name, system in SYSTEMS.items() if system.mixes == mixes and not system.missing()]


def build(names: Iterable[str], load: Workload) -> dict[str, nn.Module]:
    """The named systems with fresh weights, of the workload's dtype and sizes, on its device."""
    dtype = torch.float32 if load.autocasts else DTYPES[load.dtype]
    return {name: SYSTEMS[name].build(load).to(load.device, dtype) for name in names}


def with_limits(names: Iterable[str]) -> list[str]:
    """`names` and the limits that belong to them, in the order of `SYSTEMS`."""
    names = set(names)
    wanted = names | {SYSTEMS[name].limit for name in names}
    return [name for name in SYSTEMS if name in wanted]
