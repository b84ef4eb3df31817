"""Cells that train a model on a task, and what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import minrnn
from minrnn._files import replace_files
from minrnn.bench import facts
from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig, SequenceModel
from minrnn.reproduce import cells_training
from minrnn.reproduce.cells import BEGUN, Cell, Settings, read_same
from minrnn.tasks import Task, TextConfig, TextTask
from minrnn.tasks.corpus import DOWNLOADS
from minrnn.train import TrainConfig
from minrnn.train.files import CHECKPOINT
from minrnn.train.fit import fit, used_precision


def make_task(config: dict[str, Any], data: str | None = None) -> Any:
    """The task of a cell's config, {"name": ..., its settings}; `data` says where a text lies."""
    if data and config.get("data") in DOWNLOADS:
        config = {**config, "data": data, "sha256": DOWNLOADS[config["data"]].sha256}
    task = cells_training.task_of(config)
    return TextTask(task) if isinstance(task, TextConfig) else task


def train(cell: Cell, work: Path, data: str | None, console: Console) -> dict[str, Any]:
    """Train the language model of a cell on its task.

    Args:
        cell: its config has `task`, `backbone` and `train`.
        work: as for `fitted`.
        data: where the task's text lies.
        console: where progress is shown.
    """
    task = make_task(cell.config["task"], data)
    torch.manual_seed(cell.seed)
    model = LanguageModel(LanguageModelConfig(task.vocabulary, BackboneConfig(**cell.config["backbone"])))
    return fitted(cell.config, model, task, TrainConfig(**cell.config["train"], seed=cell.seed), work, console)


def fitted(
    settings: Settings, model: SequenceModel, task: Task, config: TrainConfig, work: Path, console: Console
) -> dict[str, Any]:
    """Train a model for a cell, from where an earlier try was cut off.

    Args:
        settings: all that the result depends on, the seed apart.
        model: trained in place.
        task: what it learns.
        config: how.
        work: directory of the checkpoint.
        console: where progress is shown.

    Returns:
        The `metrics` of each step after which the held-out loss was measured, with the training loss of a step near it;
        the `result`, which is the last of them, and the `best`, by that loss; `parameters`, `seconds`, and the
        `precision` that was used; the facts and precision of the `earlier_sessions`, those that were cut off.

    Raises:
        ValueError: what is at work is of other settings or another version; or it is damaged, or the loss is no longer
            finite: that is thrown away, for another try would end there again.
    """
    begun, about = work / BEGUN, {"minrnn": minrnn.__version__, **settings}
    if read_same(begun, about) is None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    sessions = work / "sessions.json"
    earlier = json.loads(sessions.read_bytes()) if sessions.exists() and (work / CHECKPOINT).exists() else []
    here = {**facts.gather("cuda" if torch.cuda.is_available() else "cpu"), "precision": used_precision(config)}
    replace_files({begun: json.dumps(about).encode(), sessions: json.dumps([*earlier, here]).encode()})
    try:
        journal = fit(model, task, config, work, console)
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    measured: list[dict[str, float]] = []
    latest: dict[str, float] = {}
    for line in journal.metrics.read():
        latest |= line
        if "held_out" in line:
            measured.append(dict(latest))
    return {
        "result": measured[-1],
        "best": min(measured, key=lambda line: line["held_out"]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(journal.seconds, 1),
        "precision": journal.precision,
        "earlier_sessions": earlier,
        "metrics": measured,
    }
