"""The cells of the experiments that measure time. Systems are named as in `minrnn.bench.systems`."""

from collections.abc import Iterable

from minrnn.models import BackboneConfig
from minrnn.reproduce.cells import Cell, Scale, Settings, with_defaults
from minrnn.reproduce.cells_training import BARE, MINGRU, MINLSTM

_TIMED = ["LSTM-loop", "GRU-loop", "nn.LSTM", "nn.GRU", "MinLSTM", "MinGRU", "minGRU-pytorch", "mamba"]


def speed(scale: Scale) -> Iterable[Cell]:
    """Training steps at all lengths, of two widths."""
    lengths, widths = tuple(64 * 2**i for i in range(9)), (16, 64)
    config: Settings = {"batch": 64, "rounds": 100, "budget": 300.0, "device": "auto", "systems": _TIMED, "longest": {}}
    if scale == "laptop":
        config |= {"rounds": 15, "budget": 5.0, "device": "cpu"}
    if scale == "smoke":
        lengths, widths = (4, 8), (8,)
        config |= {"batch": 2, "rounds": 2, "device": "cpu", "longest": {"LSTM-loop": 4, "GRU-loop": 4}}
    for width in widths:
        for length in lengths:
            settings = {"measure": "speed", "width": width, "length": length, **config}
            yield Cell("speed", f"width {width}", f"T = {length}", 0, settings)


_ROLES: dict[str, Settings] = {
    "LSTM-loop": {"mixer": "lstm_loop"},
    "GRU-loop": {"mixer": "gru_loop"},
    "nn.LSTM": {"mixer": "lstm"},
    "nn.GRU": {"mixer": "gru"},
    "MinLSTM": MINLSTM,
    "MinGRU": MINGRU,
    "mamba": {"mixer": "mamba"},
    "attention": {"mixer": "attention", "mixer_options": {"positions": "rotary"}},
}


def inference(scale: Scale) -> Iterable[Cell]:
    """Contexts of all batches and lengths."""
    shapes = [(batch, length) for batch in (8, 16, 32, 64) for length in (512, 1024, 2048)]
    shapes += [(8, length) for length in (4096, 8192, 16384, 32768, 65536)]
    shapes += [(64, length) for length in (64, 128, 256, 4096, 8192, 16384)]
    backbone: Settings = {"width": 384, "layers": 3, **BARE}
    config: Settings = {"vocabulary": 65, "rounds": 50, "budget": 60.0, "device": "auto", "longest": {}}
    if scale == "laptop":
        backbone["width"] = 128
        config |= {"budget": 2.0, "device": "cpu"}
    if scale == "smoke":
        shapes, backbone = [(2, 4), (2, 8), (3, 4)], {"width": 8, "layers": 1, **BARE}
        config |= {"rounds": 2, "device": "cpu", "longest": {"attention": 4}}
    systems = {name: with_defaults(BackboneConfig(**backbone, **own)) for name, own in _ROLES.items()}
    for batch, length in sorted(shapes):
        settings = {"measure": "inference", "batch": batch, "length": length, **config, "systems": systems}
        if scale == "laptop":
            settings["longest"] = {"attention": 16384 if batch == 8 else 4096}
        yield Cell("inference", f"batch {batch}", f"T = {length}", 0, settings)
