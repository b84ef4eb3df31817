"""A run: a directory that begins with its configuration and ends with a trained model, its losses and its curve."""

import dataclasses
import json
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from minrnn.models import LanguageModel, LanguageModelConfig, generate, load, replace_files, save
from minrnn.tasks import TextTask
from minrnn.tasks.corpus import locate
from minrnn.tasks.text import score
from minrnn.tasks.vocabulary import decode_stream, load_tokenizer
from minrnn.train.config import RunConfig, TrainConfig
from minrnn.train.curve import draw_curve
from minrnn.train.fit import fit
from minrnn.train.module import Journal
from minrnn.train.progress import make_console


def train(
    config: RunConfig, out: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, float | None]:
    """Train a language model in the directory `out`.

    Args:
        config: text, model and training. With `resume` it must be the run's own, `RunConfig.of_run(out)`; only its text
            may lie at another place.
        out: a new directory, or with `resume` the one of an interrupted run.
        resume: go on from the last checkpoint, to the losses that an uninterrupted run would have had.
        console: where progress and a sample are shown; by default the standard output.

    Returns:
        What result.json holds: the held-out loss in nats per token, in windows from zero state (`held_out`) and as one
        sequence with its state carried on (`held_out_carried`), and the run's size and time.

    Raises:
        ValueError: the text, the directory or the checkpoint are not right, or the loss is no longer finite.
        OSError: the disk is full; the last checkpoint is unharmed.
        Interrupted: stopped by Ctrl-C or SIGTERM; saved, and ready to resume.
        KeyboardInterrupt: Ctrl-C once more, or outside the steps; the last checkpoint is unharmed.
    """
    console = console or make_console()
    main_process = rank_zero_only.rank == 0  # Lightning starts the others with this same call
    if main_process and not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"train: --out must be a new directory, got {out}, which exists: --resume goes on with its run"
        )
    tokenizer = load_tokenizer(out / "tokenizer.json") if resume else None
    task = TextTask(config.task, tokenizer)
    stored = RunConfig.of_run(out) if resume else None
    noted = stored or config
    noted = dataclasses.replace(
        noted, task=dataclasses.replace(noted.task, data=locate(config.task.data), sha256=task.sha256)
    )
    torch.manual_seed(config.train.seed)
    model = LanguageModel(LanguageModelConfig(task.vocabulary, config.backbone))
    if config.train.precision == "64-true":
        model.double()  # now: Lightning does so after it has read the checkpoint, and would round that
    if main_process and noted != stored:  # a new run, or one whose text has moved
        out.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": task.tokenizer.to_str(), "train.json": json.dumps(noted.to_dict(), indent=2) + "\n"}
        replace_files({out / name: content.encode() for name, content in files.items()})
        if not resume:
            save(model, out)  # last: a run that is killed before it has what a resume needs
    _say(console, f"{config.backbone.mixer}, {_parameters(model):,} parameters, in {out}")
    _say(
        console,
        f"{config.task.data}: {len(task.train):,} {task.config.unit}s to train on, {len(task.held_out) - 1:,} held out",
    )
    journal = fit(model, task, config.train, out, console)
    return _finish(load(out), task, config.train, journal, console) if main_process else {}


def _finish(
    model: LanguageModel, task: TextTask, config: TrainConfig, journal: Journal, console: Console
) -> dict[str, float | None]:
    """Measure, draw, sample; what all of it says is printed and kept in result.json."""
    lines = journal.metrics.read()
    result = {
        "held_out": journal.best if config.keep == "best" else journal.held_out,
        "held_out_carried": score(model, task.held_out, task.config, carried=True) if model.constant_state else None,
        "best_step": journal.best_step,
        "steps": lines[-1]["step"],
        "parameters": _parameters(model),
        "seconds": round(journal.seconds, 1),
    }
    replace_files({journal.run / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
    title = f"{Path(task.config.data).name}, {model.config.backbone.mixer}"
    draw_curve(lines, journal.run / "curve.png", title, f"nats per {task.config.unit}")
    # A model without a constant state may know no longer text than those that it was trained on.
    length = task.config.length
    read, make = (length, 300) if model.constant_state else (length // 2 + 1, length // 2)
    prompt = task.held_out[:read].tolist()
    ids = generate(model, prompt, max_new_tokens=make, temperature=0.8, generator=torch.Generator().manual_seed(0))
    console.rule("a sample", align="left")
    _say(console, "".join(decode_stream(task.tokenizer, ids)))
    console.rule("the end", align="left")
    unit = f"nats per {task.config.unit}"
    _say(console, f"held out: {result['held_out']:.4f} {unit} in windows of {length} from zero state")
    if model.constant_state:
        _say(console, f"held out: {result['held_out_carried']:.4f} {unit} with the state carried on")
    steps = f"trained {result['steps']:,} steps in {result['seconds']:.0f} s"
    _say(console, f"{steps}; the model, curve.png and metrics.jsonl are in {journal.run}")
    return result


def _parameters(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
