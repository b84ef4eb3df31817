"""The cells of the experiments that train models: tasks, models and training at each scale."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from minrnn.models import BackboneConfig
from minrnn.reproduce.cells import Cell, Scale, Settings, with_defaults
from minrnn.tasks import FormalLanguage, ListOps, SelectiveCopying, TextConfig
from minrnn.tasks.formal import EXAMINED, LANGUAGES
from minrnn.train import TrainConfig

# Of the scales: the paper's, and the one that is fastest on CPUs.
_NORM: dict[Scale, Settings] = {"smoke": {}, "laptop": {}, "paper": {"norm": "rms"}}
BARE = {"conv": 0, "mlp": 0.0, "dropout": 0.0}  # nothing but the mixer in a block
MINGRU: Settings = {"mixer": "mingru"}
MINLSTM: Settings = {"mixer": "minlstm"}
# The released code's default, beside the normalised gates of the paper's text; its forget bias is 3.
UNNORMALIZED: Settings = {"mixer": "minlstm", "mixer_options": {"normalize": False, "forget_bias": 3.0}}


TASKS: dict[str, Callable[..., Any]] = {
    "copying": SelectiveCopying,
    "formal": FormalLanguage,
    "listops": ListOps,
    "text": TextConfig,
}


def task_of(task: Settings) -> Any:
    """The task of a cell's config, {"name": ..., its settings}; of a text, its config."""
    return TASKS[task["name"]](**{name: value for name, value in task.items() if name != "name"})


def _cell(
    experiment: str, system: str, column: str, seed: int, task: Settings, backbone: Settings, train: Settings
) -> Cell:
    """A cell whose config holds every default: one that changes is another config."""
    arguments = inspect.signature(TASKS[task["name"]]).parameters.values()
    config = {
        "measure": "training",
        "task": {**{each.name: each.default for each in arguments if each.default is not each.empty}, **task},
        "backbone": with_defaults(BackboneConfig(**backbone)),
        "train": {name: value for name, value in asdict(TrainConfig(**train)).items() if name != "seed"},
    }
    return Cell(experiment, system, column, seed, json.loads(json.dumps(config)))  # lists for tuples


def _training(
    experiment: str, seeds: int, task: Settings, train: Settings, systems: Mapping[str, Settings], column: str = ""
) -> Iterable[Cell]:
    """The second seed of a system after the first of all others: a table that fills evenly."""
    for seed in range(seeds):
        for system, backbone in systems.items():
            yield _cell(experiment, system, column, seed, task, backbone, train)


def _at_rates(
    rates: Iterable[float],
    experiment: str,
    task: Settings,
    train: Settings,
    systems: Mapping[str, Settings],
    prefix: str = "",
) -> Iterable[Cell]:
    """One seed of every system at other learning rates: a column for each."""
    for rate in rates:
        yield from _training(experiment, 1, task, {**train, "lr": rate}, systems, f"{prefix}learning rate {rate:g}")


def _with(backbone: Settings, **options: Any) -> Settings:
    """The backbone with more options of its mixer."""
    return {**backbone, "mixer_options": {**backbone.get("mixer_options", {}), **options}}


def _minimal(scale: Scale, **options: Any) -> dict[str, Settings]:
    """The minimal RNNs, minLSTM in both forms; at the paper's scale from a learned state, as the released code."""
    systems = {"minLSTM": MINLSTM, "minGRU": MINGRU, "minLSTM unnormalized": UNNORMALIZED}
    if scale == "paper":
        options["learn_initial_state"] = True
    return {name: _with(backbone, **options) for name, backbone in systems.items()}


# Selective copying. The learning rate of the shorter scales is what a 64-position task was seen to be learned with.
_COPYING: dict[Scale, tuple[Settings, Settings, int]] = {  # task, training, width
    "smoke": (
        {"length": 8, "tokens": 2, "batch_size": 4, "examination": 1},
        {"steps": 4, "lr": 3e-3, "warmup": 1, "eval_every": 2},
        16,
    ),
    "laptop": (
        {"length": 64, "tokens": 8, "batch_size": 64, "examination": 20},
        {"steps": 2000, "lr": 3e-3, "warmup": 100, "eval_every": 250, "save_every": 250},
        64,
    ),
    "paper": (
        {"length": 4096, "tokens": 16, "batch_size": 64, "examination": 200},
        {"steps": 400_000, "lr": 3e-4, "warmup": 0, "decay": "constant", "weight_decay": 0.05, "eval_every": 1000,
         "beta2": 0.999, "save_every": 1000},
        64,
    ),
}  # fmt: skip
_EXPANSION: dict[Scale, float] = {"smoke": 2.0, "laptop": 6.0, "paper": 6.0}


def layers(scale: Scale) -> Iterable[Cell]:
    """Selective copying by one, two and three layers of the minimal RNNs."""
    task, train, width = _COPYING[scale]
    task = {"name": "copying", **task}
    kinds = _minimal(scale, expansion=_EXPANSION[scale])
    for layers in (1, 2, 3):
        shape = {"width": width, "layers": layers, **BARE, **_NORM[scale]}
        systems = {name: {**shape, **backbone} for name, backbone in kinds.items()}
        column = f"{layers} layer{'s' * (layers > 1)}"
        yield from _training("layers", 1 if scale == "smoke" else 3, task, train, systems, column)
        if scale == "paper":  # of the two rates that are published the other
            yield from _at_rates((1e-4,), "layers", task, train, systems, f"{column}, ")


def _copying_systems(scale: Scale, width: int, task: Settings) -> dict[str, Settings]:
    """Every system of the comparison, for a task of this length."""
    longest = {"inner": "hyena", "inner_options": {"max_length": task["length"] + task["tokens"]}}
    small: Settings = {"width": width, "layers": 2, **BARE, **_NORM[scale]}  # as in Mamba's own comparison
    wide: Settings = {"width": width, "layers": 3, **BARE, **_NORM[scale]}
    minimal = {name: {**wide, **each} for name, each in _minimal(scale, expansion=_EXPANSION[scale]).items()}
    return {
        "S4": {**small, "mixer": "s4"},
        "S4 with S6": {**small, "mixer": "s6"},
        "H3 with Hyena": {**small, "mixer": "h3", "mixer_options": longest},
        "H3 with S4": {**small, "mixer": "h3", "mixer_options": {"inner": "s4"}},
        "H3 with S6": {**small, "mixer": "h3", "mixer_options": {"inner": "s6"}},
        "Mamba with Hyena": {**small, "mixer": "mamba", "mixer_options": longest},
        "Mamba with S4": {**small, "mixer": "mamba", "mixer_options": {"inner": "s4"}},
        "Mamba with S6": {**small, "mixer": "mamba"},
        **minimal,
        # As wide as gives them about as many weights as the minimal RNNs.
        "GRU": {**wide, "mixer": "gru", "mixer_options": {"expansion": 2.0}},
        "LSTM": {**wide, "mixer": "lstm", "mixer_options": {"expansion": 2.0}},
    }


def copying(scale: Scale) -> Iterable[Cell]:
    """Selective copying by every system of the comparison."""
    task, train, width = _COPYING[scale]
    task = {"name": "copying", **task}
    systems = _copying_systems(scale, width, task)
    seeds = {"smoke": 1, "laptop": 2, "paper": 3}[scale]
    column = "minRNN's convention"
    yield from _training("copying", seeds, task, train, systems, column)
    if scale == "laptop":  # for the usual rate was chosen on minGRU
        yield from _at_rates((1e-3, 1e-2), "copying", task, train, systems, f"{column}, ")
        # Some systems stand in another order than in the paper: whether more positions bring them into it.
        longer = {**task, "length": 256}
        others = "minLSTM unnormalized", "GRU", "LSTM"  # which are not in its table
        chosen = {name: each for name, each in _copying_systems(scale, width, longer).items() if name not in others}
        yield from _at_rates((1e-2,), "copying", longer, train, chosen, f"{column}, {longer['length']} positions, ")
    # Two conventions are published, and systems that are set against each other were trained by one each.
    both = {name: systems[name] for name in ("Mamba with S6", *_minimal(scale))}
    yield from _training("copying", seeds, {**task, "convention": "s4"}, train, both, "S4's convention")


def _shakespeare(scale: Scale) -> tuple[Settings, Settings, Settings]:
    """Task, model and training of every system that learns Shakespeare's plays by characters."""
    task: Settings = {"name": "text", "data": "shakespeare", "length": 256, "batch_size": 64}
    shape: Settings = {"width": 384, "layers": 3, "dropout": 0.2}
    # One learning rate for all, warm-up and cosine as in nanoGPT's recipe for characters, which the paper builds on.
    train: Settings = {
        "steps": 5000, "lr": 1e-3, "warmup": 100, "beta2": 0.99, "weight_decay": 0.1, "clip": 0.25, "eval_every": 25,
        "save_every": 25, "patience": 500, "keep": "best", "precision": "bf16-mixed",
    }  # fmt: skip
    if scale == "laptop":
        task, shape = {**task, "batch_size": 16}, {**shape, "width": 128}
        train = {**train, "lr": 3e-3, "eval_every": 100, "save_every": 100}
    if scale == "smoke":
        task = {**task, "data": "pydoc", "length": 16, "batch_size": 2}  # which needs no network
        shape = {"width": 12, "layers": 1, "dropout": 0.2}
        train = {**train, "steps": 4, "warmup": 1, "eval_every": 2}
    return task, shape, train


_AROUND: Settings = {"conv": 4, "mlp": 4.0, "mlp_kind": "gelu"}


def lm(scale: Scale) -> Iterable[Cell]:
    """Shakespeare's plays by characters."""
    task, shape, train = _shakespeare(scale)
    if scale == "laptop":
        train = {**train, "steps": 2000}
    attention: Settings = {**shape, "mixer": "attention"}
    heads: Settings = {"heads": 6 if scale != "laptop" else 4, "dropout": 0.2}
    systems = {
        "minGRU": {**shape, **_AROUND, **_with(MINGRU, expansion=2.0)},
        "minLSTM": {**shape, **_AROUND, **_with(MINLSTM, expansion=2.0)},
        "Mamba": {**shape, "mixer": "mamba"},
        "Transformer": {**attention, "mixer_options": {**heads, "max_length": task["length"]}},
        "Transformer with rotary positions": {**attention, "mixer_options": {**heads, "positions": "rotary"}},
    }
    yield from _training("lm", 1, task, train, systems)
    if scale == "laptop":
        yield from _at_rates((1e-3,), "lm", task, train, systems)


def _changes(rate: float) -> dict[str, tuple[Settings, Settings]]:
    """What is changed alone, to the short cosine with the learning rate `rate`: of the model, and of its training."""
    return {
        "twice the learning rate": ({}, {"lr": 2 * rate}),
        "dropout 0.4": ({"dropout": 0.4}, {}),
        "weight decay 1": ({}, {"weight_decay": 1.0}),
        "beta2 0.95": ({}, {"beta2": 0.95}),
        "gradient norm 1": ({}, {"clip": 1.0}),
        # All MLPs and convolutions here have as many weights together.
        "GEGLU": ({"mlp": 7 / 3, "mlp_kind": "geglu"}, {}),
        "wider MLP, no convolution": ({"mlp": 4.0, "conv": 0}, {}),
        "RMSNorm": ({"norm": "rms"}, {}),
        "forget bias 1": ({"mixer_options": {"expansion": 2.0, "forget_bias": 1.0}}, {}),
    }


_TOGETHER = ("twice the learning rate", "dropout 0.4")


def best(scale: Scale) -> Iterable[Cell]:
    """minGRU on Shakespeare's plays by other recipes; the last is the preset shakespeare-best, at the scale's size."""
    task, shape, train = _shakespeare(scale)
    plain = {**shape, **_AROUND, **_with(MINGRU, expansion=2.0), "mlp": 3.5}
    short = {**train, "steps": {"smoke": 3, "laptop": 1500, "paper": 600}[scale]}
    changes = _changes(train["lr"])
    recipes = {"long cosine": (plain, train), "short cosine": (plain, short)}
    recipes |= {name: ({**plain, **model}, {**short, **training}) for name, (model, training) in changes.items()}
    model, training = plain, short
    for name in _TOGETHER:
        model, training = {**model, **changes[name][0]}, {**training, **changes[name][1]}
    recipes["shakespeare-best"] = model, training
    for seed in range(3 if scale == "laptop" else 1):
        for system, (model, training) in recipes.items():
            if seed == 0 or system in ("short cosine", "shakespeare-best"):  # how much chance does
                yield _cell("best", system, "", seed, task, model, training)


def formal(scale: Scale) -> Iterable[Cell]:
    """Every formal language by every system."""
    train: Settings = {"steps": 500_000, "lr": 3e-4, "warmup": 0, "decay": "constant", "weight_decay": 0.01,
                    "beta2": 0.999, "eval_every": 5000, "save_every": 5000}  # fmt: skip
    shape: Settings = {"width": 256, "layers": 2, "dropout": 0.0}
    task: Settings = {"name": "formal", "batch_size": 256, "examination": 200}
    if scale == "laptop":
        train = {"steps": 1500, "lr": 2e-3, "warmup": 100, "weight_decay": 0.01, "eval_every": 250, "save_every": 250}
        task, shape["width"] = {**task, "batch_size": 64, "examination": 20}, 64
    if scale == "smoke":
        train = {"steps": 2, "warmup": 1, "eval_every": 2}
        task, shape["width"] = {**task, "batch_size": 4, "examination": 1, "trained": [1, 6], "examined": [6, 9]}, 8
    around: Settings = {"conv": 4, "mlp": 0.0}
    systems = {
        "Transformer": {"mixer": "attention", "mixer_options": {"positions": "rotary"}, "norm": "rms"},
        "Mamba": {"mixer": "mamba"},
        "RWKV-4": {"mixer": "rwkv4"},
        "xLSTM": {"mixer": "mlstm"},
        "Hyena": {"mixer": "hyena", "mixer_options": {"max_length": 2 * EXAMINED[1]}},  # a word, and as much after it
        **{name: {**backbone, **around, **_NORM[scale]} for name, backbone in _minimal(scale).items()},
    }
    systems = {name: {**shape, **backbone} for name, backbone in systems.items()}
    # Two settings of the minimal RNNs are published: the paper's text's, and that of a copy of the released code.
    copied = {name: {**systems[name], "conv": 0} for name in _minimal(scale)}
    halves = {"batch_size": task["batch_size"] // 2, "examination": 2 * task["examination"]}
    seeds = 3 if scale == "paper" else 1
    for language in LANGUAGES:
        words = {**task, "language": language}
        yield from _training("formal", seeds, words, train, systems, language)
        column = f"{language} without convolution"
        yield from _training("formal", seeds, {**words, **halves}, {**train, "weight_decay": 0.05}, copied, column)


def listops(scale: Scale) -> Iterable[Cell]:
    """ListOps with and without convolution and MLP."""
    shape: Settings = {"width": 128, "layers": 8, "dropout": 0.0}
    task: Settings = {"name": "listops", "batch_size": 32, "examination": 60}
    train: Settings = {"steps": 250_000, "lr": 1e-3, "warmup": 25_000, "weight_decay": 0.05, "beta2": 0.999,
                    "eval_every": 5000, "save_every": 1000}  # fmt: skip
    if scale == "laptop":
        shape = {"width": 64, "layers": 3, "dropout": 0.0}
        task = {**task, "length": 120, "shortest": 20, "depth": 5, "arguments": 5, "batch_size": 64, "examination": 20}
        train = {"steps": 3000, "lr": 2e-3, "warmup": 300, "weight_decay": 0.05, "eval_every": 500, "save_every": 250}
    if scale == "smoke":
        shape = {"width": 8, "layers": 1, "dropout": 0.0}
        task = {**task, "length": 30, "shortest": 5, "depth": 3, "arguments": 4, "batch_size": 4, "examination": 1}
        train = {"steps": 2, "warmup": 1, "eval_every": 2}
    for column, (conv, mlp) in {"plain": (0, 0.0), "conv": (4, 0.0), "MLP": (0, 4.0), "conv + MLP": (4, 4.0)}.items():
        around = {"conv": conv, "mlp": mlp, "mlp_kind": "gelu", **_NORM[scale]}
        systems = {name: {**shape, **kind, **around} for name, kind in _minimal(scale).items()}
        yield from _training("listops", 3 if scale == "paper" else 1, task, train, systems, column)
