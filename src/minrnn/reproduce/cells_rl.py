"""The cells of offline reinforcement learning: which data, which decision models, and what they are asked for."""

from collections.abc import Iterable
from typing import Any

from minrnn.reproduce.cells import Cell, Scale, Settings, with_defaults
from minrnn.rl.systems import SYSTEMS, published, usual
from minrnn.train import RunConfig

ENVIRONMENTS = "HalfCheetah", "Hopper", "Walker2d"
# Which of the two returns that Decision Transformers were asked for its table is of.
TARGETS = {"HalfCheetah": 6000.0, "Hopper": 3600.0, "Walker2d": 5000.0}
BEHAVIOUR = "behaviour, no noise"  # the row of the policy behind the data
# Files of D4RL, by quality; medium-expert by joining two, as Decision Mamba's code does.
_FILES = {"medium": ["medium"], "medium-replay": ["medium_replay"], "medium-expert": ["expert", "medium"]}
_SHORT: dict[Scale, tuple[Settings, Settings, int]] = {  # training, data, episodes of an examination
    "smoke": (
        {"width": 8, "layers": 1, "context": 3, "batch_size": 4, "steps": 2, "warmup": 1, "eval_every": 2},
        {"steps": 500},
        1,
    ),
    "laptop": (
        {"batch_size": 64, "lr": 1e-3, "steps": 2000, "warmup": 100, "eval_every": 250, "save_every": 250},
        {},
        10,
    ),
}


def rl(scale: Scale) -> Iterable[Cell]:
    """Every decision model on every data set, and the time that each takes to act."""
    if scale == "paper":
        for quality, names in _FILES.items():
            for name in ENVIRONMENTS:
                files = [f"{name.lower()}_{each}-v2.hdf5" for each in names]
                dataset = {"files": files, "env": f"{name}-v5"}
                tables = {mixer: published(mixer, f"{name.lower()}-{quality}") for mixer in SYSTEMS}
                tables = {mixer: {**table, "eval_every": 10_000, "save_every": 1000} for mixer, table in tables.items()}
                yield from _trained(f"{name} {quality}", dataset, tables, range(5), 100, [TARGETS[name]])
    else:
        train, data, episodes = _SHORT[scale]
        tables = {mixer: {**usual(mixer), **train} for mixer in SYSTEMS}
        qualities, names = ("medium", "medium-replay"), ENVIRONMENTS
        if scale == "smoke":
            qualities, names = ("medium",), ("Hopper",)
        for quality in qualities:
            for name in names:
                dataset = {"collect": {"env": f"{name}-v5", "quality": quality, **data}}
                config = {"measure": "behaviour", "data": dataset, "episodes": episodes}
                yield Cell("rl", BEHAVIOUR, f"{name} {quality}", 0, config)
                seeds = range(2 if name == "Hopper" and scale == "laptop" else 1)
                yield from _trained(f"{name} {quality}", dataset, tables, seeds, episodes, [])
    config: Settings = {"measure": "latency", "observation_size": 11, "action_size": 3, "rounds": 30, "actions": 20,
                     "compiled": True}  # fmt: skip
    tables = {mixer: usual(mixer) for mixer in SYSTEMS}
    if scale == "smoke":
        config |= {"rounds": 2, "actions": 2, "compiled": False}
        tables = {mixer: {**table, "width": 8, "layers": 1} for mixer, table in tables.items()}
    tables = {mixer: _run(table) for mixer, table in tables.items()}
    yield Cell("rl", "all", "time per action", 0, {**config, "tables": tables})


def _run(table: dict[str, Any]) -> Settings:
    """A run's table with every default, without what is each cell's own."""
    config = RunConfig.from_dict({"task": "offline", "data": "elsewhere", **table})
    own = ("data", "sha256", "env", "seed")
    table = config.to_dict() | with_defaults(config.backbone)
    return {name: value for name, value in table.items() if name not in own}


def _trained(
    column: str,
    data: Settings,
    tables: dict[str, dict[str, Any]],
    seeds: Iterable[int],
    episodes: int,
    targets: list[float],
) -> Iterable[Cell]:
    for seed in seeds:
        for mixer, table in tables.items():
            whole_table = _run({**table, "targets": targets})
            config = {"measure": "acting", "data": data, "table": whole_table, "episodes": episodes}
            yield Cell("rl", SYSTEMS[mixer].name, column, seed, config)
