"""The two Lightning pieces of a run: what is optimised, and what happens between two steps."""

import contextlib
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minrnn._console import say
from minrnn.models import SequenceModel, parameter_groups, save
from minrnn.tasks import Task
from minrnn.tasks.answers import AnswerTask
from minrnn.train.config import Precision, TrainConfig
from minrnn.train.files import CHECKPOINT, Metrics

# What a second request to stop does, whatever the handlers were before the run. (A terminal that goes away may say so
# more than once, and wants nothing at once.)
AT_ONCE: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
HANGUP = getattr(signal, "SIGHUP", None)  # of Unix


LOG_EVERY = 10  # steps between two lines of the training loss
_KEPT = ("seconds", "held_out", "best", "best_step")  # of the Journal, in a checkpoint


class Interrupted(Exception):
    """The run was asked to stop by `signal`, and has saved itself after `step`."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signal, self.step = signum, step


@dataclass(frozen=True)
class Batches(IterableDataset):
    """The training batches of a task from step `start` on, without end: of each, every `size`-th row from `rank`.

    However many processes make them, they are the same and in the same order.
    """

    task: Task
    seed: int
    start: int
    rank: int
    size: int

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker and HANGUP:  # a terminal tells all its processes: the first one decides
            signal.signal(HANGUP, signal.SIG_IGN)
        for step in itertools.count(self.start + first, every):
            yield tree_map(lambda rows: rows[self.rank :: self.size], self.task.batch(self.seed, step))


class Training(L.LightningModule):
    """A model, a task and an optimiser. The step number alone says which batch and which random numbers come next."""

    def __init__(self, model: SequenceModel, task: Task, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.task, self.config = model, task, config

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        batches = Batches(self.task, self.config.seed, trainer.global_step, trainer.global_rank, trainer.world_size)
        # Made questions may take longer than a step on a GPU; beside a step on the processor there is no core for them.
        apart = isinstance(self.task, AnswerTask) and trainer.strategy.root_device.type != "cpu"
        return DataLoader(batches, batch_size=None, num_workers=min(8, os.cpu_count() or 1) if apart else 0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        numbers = (self.config.seed, self.trainer.global_step, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task.loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.config.lr, self.config.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, self.config.beta2), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.config.schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        # Lightning's own refuses fused optimisers in mixed precision, for the sake of a gradient scaler, of which
        # there is none here.
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.clip)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        shapes = [
            {name: tensor.shape for name, tensor in each.items()}
            for each in (checkpoint["state_dict"], self.state_dict())
        ]
        if shapes[0] != shapes[1]:
            raise ValueError("checkpoint: must hold the weights of this run's model, got those of another")


class Journal(L.Callback):
    """After each step, in this order: note the loss, measure what is held out, save, and stop if asked to.

    A checkpoint therefore stands for all that was done up to its step, and a resumed run repeats the rest. From
    `on_train_start` to `close` signals are its own.
    """

    def __init__(self, run: Path, console: Console, precision: Precision) -> None:
        self.run, self.console, self.metrics = run, console, Metrics(run / "metrics.jsonl")
        self.precision: Precision = precision  # that is used
        self.seconds = 0.0  # of all sessions of this run
        self.loss = math.nan  # the latest
        self.held_out: float | None = None  # the latest
        self.best, self.best_step = math.inf, 0  # the lowest held-out loss, and after which step it was seen
        self._resumed = 0  # after which step the checkpoint was made
        self.began = False  # whether training has; before, a checkpoint may be at fault for what fails
        self._asked_to_stop: int | None = None
        # Read now: when training starts, Lightning has put its own in their place. Other threads cannot set any.
        main_thread = threading.current_thread() is threading.main_thread()
        self._handlers = {signum: signal.getsignal(signum) for signum in AT_ONCE} if main_thread else {}
        if main_thread and HANGUP and signal.getsignal(HANGUP) == signal.SIG_DFL:  # nohup, or a host, has another
            self._handlers[HANGUP] = signal.SIG_DFL

    @property
    def checkpoint(self) -> Path:
        return self.run / CHECKPOINT

    def on_load_checkpoint(self, trainer: L.Trainer, module: Training, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, module: Training) -> None:
        if trainer.global_step != self._resumed:  # Lightning passes by in silence what is not in its loops
            raise LookupError(f"its loops are not at step {self._resumed}")
        self.began, self._started = True, time.monotonic() - self.seconds
        trainer.should_stop = self._at_end(trainer.global_step, module.config)  # a run that is resumed at its end
        if trainer.is_global_zero:
            self.metrics.rewind(trainer.global_step)
        for signum in self._handlers:
            signal.signal(signum, self._ask_to_stop)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Training, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, config = trainer.global_step, module.config
        self.seconds = time.monotonic() - self._started
        # All processes stop after the same step, also when only one of them was asked to.
        own = torch.stack([outputs["loss"], outputs["loss"].new_tensor(self._asked_to_stop is not None)])
        self.loss, asked_to_stop = trainer.strategy.reduce(own, reduce_op="mean").tolist()
        self._check_finite(module, step, "loss", self.loss)
        due = step % config.eval_every == 0 or step == config.steps
        if trainer.is_global_zero and (due or step % LOG_EVERY == 0):
            rate = config.lr * config.schedule(step - 1)
            self.metrics.append(step, loss=self.loss, lr=rate, seconds=round(self.seconds, 3))
        if due:
            self._evaluate(trainer, module, step)
        last = trainer.should_stop = self._at_end(step, config)
        if step % config.save_every == 0 or last or asked_to_stop:
            weights = sum(parameter.detach().cpu().double().sum().item() for parameter in module.model.parameters())
            self._check_finite(module, step, "sum of the weights", weights)
            if trainer.is_global_zero and config.keep == "last":
                save(module.model, self.run)
            trainer.save_checkpoint(self.checkpoint)  # last: killed before it, a resumed run saves the model again
        if asked_to_stop and not last:
            raise Interrupted(self._asked_to_stop or signal.SIGTERM, step)

    def _evaluate(self, trainer: L.Trainer, module: Training, step: int) -> None:
        module.eval()
        metrics = module.task.evaluate(module.model, device=module.device)
        module.train()
        self.held_out = metrics["held_out"]
        self._check_finite(module, step, "held-out loss", self.held_out)
        if trainer.is_global_zero:
            self.metrics.append(step, **metrics)
        if self.held_out < self.best:
            self.best, self.best_step = self.held_out, step
            if trainer.is_global_zero and module.config.keep == "best":
                save(module.model, self.run)

    def _at_end(self, step: int, config: TrainConfig) -> bool:
        due = step % config.eval_every == 0
        return step == config.steps or (due and 0 < config.patience <= step - self.best_step)

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state_dict[name])

    def close(self) -> None:
        """Give the signals back. (Lightning calls no `teardown` after an exception.)"""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        self._asked_to_stop = signum
        signal.signal(signum, AT_ONCE.get(signum, signal.SIG_IGN))
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another write
            once_more = "; the same signal once more stops at once" if signum in AT_ONCE else ""
            say(self.console, f"stopping after this step{once_more}")

    def _check_finite(self, module: Training, step: int, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        weights = module.model.named_parameters()
        bad = next((f" (first seen in {each})" for each, weight in weights if not weight.isfinite().all()), "")
        raise ValueError(
            f"train: the {name} must stay finite, got {value} at step {step}{bad}; a lower learning rate may help"
        )
