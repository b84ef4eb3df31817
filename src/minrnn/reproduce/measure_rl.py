"""Cells of offline reinforcement learning: models that learn from logged episodes and then act, and the time that an
action takes."""

import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from minrnn._console import say
from minrnn.bench import measure
from minrnn.bench.measure import Summary
from minrnn.reproduce.cells import Cell
from minrnn.reproduce.measure_training import fitted
from minrnn.rl import DecisionModel, Policy
from minrnn.rl.behaviour import MeanAction
from minrnn.rl.collect import CollectConfig, collect, last_behaviour, provenance, references
from minrnn.rl.evaluate import evaluate, latency, play, scores
from minrnn.rl.policy import Mode
from minrnn.rl.systems import SYSTEMS
from minrnn.rl.task import OfflineConfig, OfflineTask
from minrnn.train import RunConfig


def act(cell: Cell, work: Path, data: str | None, console: Console) -> dict[str, Any]:
    """Train the decision model of a cell, and let it act.

    Args:
        cell: its config has `data` (what to `collect`, or the names of `files` for an `env`), the `table` of the run,
            and how many `episodes` it is to act for each target return.
        work: as for `fitted`; data that are collected lie in `episodes` beside all cells at work.
        data: the directory of those files.
        console: where progress is shown.

    Returns:
        What `fitted` does, with `outcomes`, one for each mode of acting and each target: as `scores` has them, and all
        returns; `references`, the measured returns of other policies; and `data`, the episodes in short, and how their
        digest compares with the first one that was noted (`digest`).
    """
    wanted, digest = cell.config["data"], ""
    if "collect" in wanted:
        env = wanted["collect"]["env"]
        source, digest = _collected(wanted["collect"], work.parents[1] / "episodes", console)
    else:
        source, env = _files(wanted["files"], data), wanted["env"]
    config = RunConfig.from_dict({**cell.config["table"], "data": source, "seed": cell.seed})
    assert isinstance(config.task, OfflineConfig), "the table is of an offline task"
    task = OfflineTask(config.task)
    torch.manual_seed(cell.seed)
    model = task.make_model(config.backbone)
    settings = {**cell.config, "sha256": task.sha256}  # files of the same names may hold other data
    record = fitted(settings, model, task, config.train, work, console)
    begin, known = time.perf_counter(), references(source)
    outcomes = list(play(model, env, get_args(Mode), task.targets, known, episodes=cell.config["episodes"]))
    episodes = task.episodes
    about = {"episodes": len(episodes.lengths), "steps": len(episodes.rewards), "sha256": task.sha256, "digest": digest}
    return {
        **record,
        "outcomes": outcomes,
        "references": known,
        "data": {**about, "mean": float(episodes.returns.mean()), "highest": float(episodes.returns.max())},
        "seconds": round(record["seconds"] + time.perf_counter() - begin, 1),
    }


def behave(cell: Cell, work: Path, console: Console) -> dict[str, Any]:
    """Let the policy behind the data of a cell act as the models do, without noise and from the same beginnings.

    Args:
        cell: its config has `data` (what to `collect`) and how many `episodes` it is to act.
        work: of the cell; the data lie as for `act`.
        console: where progress is shown.

    Returns:
        What `act` has of a model: `outcomes`, equal in all modes, for it remembers nothing; `references`; of `data`
        the `mean` return and the `digest`; `parameters` and `seconds`.
    """
    begin, wanted = time.perf_counter(), cell.config["data"]["collect"]
    source, digest = _collected(wanted, work.parents[1] / "episodes", console)
    behaviour, known = last_behaviour(wanted["env"]), references(source)
    returns, lengths = evaluate(MeanAction(behaviour), wanted["env"], episodes=cell.config["episodes"])
    outcome = {**scores(wanted["env"], returns, known), "returns": returns.tolist(), "lengths": lengths.tolist()}
    return {
        "outcomes": [{"mode": mode, **outcome} for mode in get_args(Mode)],
        "references": known,
        "data": {"digest": digest, "mean": provenance(source)["returns"]["mean"]},
        "parameters": sum(weight.size + bias.size for weight, bias in behaviour.layers),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _collected(settings: dict[str, Any], folder: Path, console: Console) -> tuple[str, str]:
    """The directory of a data set of our own, rolled if it is not there, and how its digest relates to the first."""
    config = CollectConfig(**settings)
    out = folder / f"{config.env}-{config.quality}-{config.steps}"
    return str(out), collect(config, out=out, console=console)["digest"]


def _files(names: list[str], folder: str | None) -> str:
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"data: must be a directory with D4RL's {', '.join(names)}, got {folder!r}: --data DIRECTORY")
    return "+".join(str(Path(folder, name)) for name in names)


def latency_of_all(cell: Cell, console: Console) -> dict[str, Any]:
    """Time an action of one environment, of all decision models in turns.

    A turn is several actions: of models that take turns after every one, none would find its weights in the cache,
    where those of a policy that acts alone stay.

    Args:
        cell: its config has the `tables` of runs by mixer, `observation_size` and `action_size`, `rounds`, the
            `actions` of a turn, and whether the models are timed `compiled`, too.
        console: where progress is shown.

    Returns:
        `points`, one for each model and mode, eager and compiled: microseconds per action (`time`), how many times
        longer the Decision Transformer's window takes (`speedup`), both as summaries over rounds, and the time of an
        action `early` in an episode of 1,000 steps and `late`; `device` and `seconds`.
    """
    begin, config = time.perf_counter(), cell.config
    torch.manual_seed(cell.seed)
    random, count = np.random.default_rng(cell.seed), config["actions"]
    observation = random.normal(size=config["observation_size"])

    def act_often(policy: Policy) -> None:
        for _ in range(count):
            policy.act(observation, 1.0)

    points: list[dict[str, Any]] = []
    for compiled in (False, True) if config["compiled"] else (False,):
        policies: dict[tuple[str, Mode], Policy] = {}
        for mixer, table in config["tables"].items():
            run = RunConfig.from_dict({**table, "data": "none"})
            assert isinstance(run.task, OfflineConfig), "the table is of an offline task"
            sizes = config["observation_size"], config["action_size"]
            model = DecisionModel(run.task.model_config(*sizes, run.backbone))
            for mode in get_args(Mode):
                policies[SYSTEMS[mixer].name, mode] = policy = Policy(model, target=1000.0, mode=mode)
                if compiled:
                    policy.compile()
        spans = {}
        for place, policy in policies.items():
            say(console, f"{', '.join(place)}{', compiled' * compiled}")
            spans[place] = latency(policy)
            for _ in range(policy.model.config.context):
                policy.act(observation, 1.0)
        names = {", ".join(place): place for place in policies}
        steps = {name: partial(act_often, policies[place]) for name, place in names.items()}
        times = measure.alternate(steps, config["rounds"])
        against = f"{SYSTEMS['attention'].name}, window"
        for name, (system, mode) in names.items():
            points.append(
                {
                    "system": system,
                    "mode": mode,
                    "compiled": compiled,
                    "constant": policies[system, mode].constant_state,
                    "time": vars(Summary.of([1e6 * each / count for each in times[name]])),
                    "speedup": vars(measure.ratio(times, against, name)),
                    "early": spans[system, mode]["early"],
                    "late": spans[system, mode]["late"],
                }
            )
    return {"points": points, "device": "cpu", "seconds": round(time.perf_counter() - begin, 1)}
