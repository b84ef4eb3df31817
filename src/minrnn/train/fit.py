"""One training run of any model on any task, on Lightning."""

import logging
import warnings
from contextlib import closing
from pathlib import Path

import lightning.pytorch as L
import torch
from rich.console import Console

from minrnn._console import say
from minrnn.models import SequenceModel
from minrnn.tasks import Task
from minrnn.train.config import Precision, TrainConfig
from minrnn.train.files import CheckpointFile
from minrnn.train.module import Journal, Training
from minrnn.train.progress import Bar


def fit(model: SequenceModel, task: Task, config: TrainConfig, run: Path, console: Console) -> Journal:
    """Train `model` on `task`, from the last checkpoint in the directory `run` if it has one.

    Args:
        model: trained in place; its config and weights are saved in `run`, as `config.keep` says.
        task: gives batches, loss and metrics.
        config: how to train.
        run: an existing directory, whose metrics.jsonl has the measurements.
        console: where progress is shown.

    Returns:
        The journal of the run: seconds, the lowest held-out loss and its step, the precision that was used.

    Raises:
        ValueError: the checkpoint is not right, or the loss is no longer finite.
        OSError: the disk is full; the last checkpoint is unharmed.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP; saved, and ready to go on.
        KeyboardInterrupt: Ctrl-C once more, or outside the steps; the last checkpoint is unharmed.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    precision = used_precision(config)
    if precision != config.precision:
        say(console, f"precision: {precision}, for torch has no bfloat16 kernels for this processor")
    journal = Journal(run, console, precision)
    checkpoint, files = (journal.checkpoint if journal.checkpoint.exists() else None), CheckpointFile()
    try:
        with closing(journal), closing(Bar(console, journal)) as bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")  # about their own insides
            trainer = L.Trainer(
                max_steps=config.steps,
                precision=journal.precision,
                devices=config.devices,
                accelerator="auto",
                callbacks=[journal, bar],
                plugins=[files],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=journal.run,
            )
            trainer.fit(Training(model, task, config), ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # nothing is wrong with the checkpoint
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if not files.has_read or journal.began:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"checkpoint: {checkpoint} is torn, or not a checkpoint of minrnn: {reason}") from error
    except BrokenPipeError:  # nobody reads the output: nothing is wrong with the disk
        raise
    except OSError as error:
        if checkpoint and not files.has_read:
            raise
        raise OSError(
            f"train: cannot write into {journal.run}: {error.strerror or error}; the last checkpoint is unharmed"
        ) from error
    return journal


def used_precision(config: TrainConfig) -> Precision:
    """What was asked for, but float32 on a processor that torch has no bfloat16 kernels for: there it multiplies number
    by number, a hundred times slower."""
    if config.precision != "bf16-mixed" or torch.accelerator.is_available():
        return config.precision
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return config.precision
    return "32-true"
