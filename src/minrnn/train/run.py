"""A run: a directory that begins with its configuration and ends with a trained model, its losses and its curve."""

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from minrnn._console import say
from minrnn._files import locked, replace_files
from minrnn.models import SequenceModel, load_model, save
from minrnn.train.config import RunConfig, TrainConfig
from minrnn.train.curve import draw_curve
from minrnn.train.files import CHECKPOINT
from minrnn.train.fit import fit
from minrnn.train.jobs import JOBS, Job
from minrnn.train.module import Journal
from minrnn.train.progress import make_console

LOCK = ".lock"  # in the directory of a run, while a process is at it


def train(
    config: RunConfig, out: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, float | None]:
    """Train a model in the directory `out`.

    Args:
        config: data, model and training. With `resume` it must be the run's own, `RunConfig.of_run(out)`; only its data
            may lie at another place.
        out: a new directory, or with `resume` the one of an interrupted run.
        resume: go on from the last checkpoint, to the losses that an uninterrupted run would have had.
        console: where progress and the end are shown; by default the standard output.

    Returns:
        What result.json holds: the held-out loss in windows from zero state (`held_out`: nats per token of a text, the
        mean squared error of actions), of a text also as one sequence with its state carried on (`held_out_carried`),
        and the run's size and time.

    Raises:
        ValueError: the data, the directory or the checkpoint are not right, or the loss is no longer finite.
        OSError: the disk is full; the last checkpoint is unharmed.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP; saved, and ready to resume.
        KeyboardInterrupt: Ctrl-C once more, or outside the steps; the last checkpoint is unharmed.
    """
    console = console or make_console()
    main_process = rank_zero_only.rank == 0  # Lightning starts the others with this same call
    if main_process and not resume:
        _check_new(out)
    job: Job = JOBS[type(config.task)](config.task, out if resume else None)
    stored = RunConfig.of_run(out) if resume else None
    noted = dataclasses.replace(stored or config, task=job.noted())
    torch.manual_seed(config.train.seed)
    model = job.make_model(config.backbone)
    if config.train.precision == "64-true":
        model.double()  # now: Lightning does so after it has read the checkpoint, and would round that
    # Of two processes, such as a job and the one that was queued in its place, the second waits.
    with locked(out / LOCK, partial(say, console)) if main_process else contextlib.nullcontext():
        if main_process and not resume:
            _check_new(out)
        if main_process and noted != stored:  # a new run, or one whose data have moved
            files = {**({} if resume else job.files()), "train.json": json.dumps(noted.to_dict(), indent=2) + "\n"}
            replace_files({out / name: content.encode() for name, content in files.items()})
            if not resume:
                save(model, out)  # last: a run that is killed before it has what a resume needs
        say(console, f"{config.backbone.mixer}, {_parameters(model):,} parameters, in {out}")
        say(console, job.about())
        try:
            journal = fit(model, job.task, config.train, out, console)
        except ValueError:
            if main_process and not resume and not (out / CHECKPOINT).exists():
                # There is nothing to go on from, and a second try needs a new directory; one that is mounted, or
                # somebody's own, may stay, but empty.
                with contextlib.suppress(OSError):
                    for path in out.iterdir():
                        path.unlink()
                    out.rmdir()
            raise
        return _finish(load_model(out, type(model)), job, config.train, journal, console) if main_process else {}


def _check_new(out: Path) -> None:
    """Raise ValueError if there is something at `out`, but for an empty directory."""
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        how = ": --resume goes on with its run" if (out / "train.json").exists() else ", and has no run to resume"
        raise ValueError(f"train: --out must be a new directory, got {out}, which exists{how}")


def _finish(model: SequenceModel, job: Job, config: TrainConfig, journal: Journal, console: Console) -> dict[str, Any]:
    """Measure and draw; what comes out is printed and kept in result.json."""
    lines = journal.metrics.read()
    result = {
        "held_out": journal.best if config.keep == "best" else journal.held_out,
        **job.measure(model),
        "best_step": journal.best_step,
        "steps": lines[-1]["step"],
        "parameters": _parameters(model),
        "seconds": round(journal.seconds, 1),
        "precision": journal.precision,
    }
    replace_files({journal.run / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
    draw_curve(lines, journal.run / "curve.png", *job.labels(model))
    job.show(model, result, console)
    if result["held_out"] > 1.01 * journal.best:
        say(console, f"the lowest was {journal.best:.4f}, at step {journal.best_step}: --keep best keeps that model")
    steps = f"trained {result['steps']:,} steps in {result['seconds']:.0f} s"
    say(console, f"{steps}; the model, curve.png and metrics.jsonl are in {journal.run}")
    return result


def _parameters(model: SequenceModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
