"""What the user sees while a run goes on: a live bar on a terminal, a line now and then anywhere else."""

import errno
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import lightning.pytorch as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils._pytree import tree_leaves

from minrnn._console import say, silence
from minrnn.train.module import Journal


class _Output:
    """The standard output, or nothing once nobody reads it: a terminal or a pipe that is gone ends no training."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> int:
        with self._or_nothing():
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nothing():
            self.file.flush()

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            silence(self.file)


def make_console() -> Console:
    """The standard output; silent in all processes of a run but the first."""
    output = cast(TextIO, _Output(sys.stdout)) if sys.stdout else None  # closed by whoever started the process
    return Console(file=output, quiet=rank_zero_only.rank > 0)


class Bar(L.Callback):
    """Step, loss, held-out loss, positions of sequences per second and time left. Called after the `Journal`."""

    def __init__(self, console: Console, journal: Journal) -> None:
        self.console, self.journal = console, journal
        self.every_seconds = 0.5 if console.is_terminal else 15.0
        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
        self.bar = Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._first, self._started, self._told = trainer.global_step, time.monotonic(), 0.0
        self._line = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, status="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self._told < self.every_seconds and step != trainer.max_steps:
            return
        self._told = now
        pace = (now - self._started) / (step - self._first)
        rate = math.prod(tree_leaves(batch)[0].shape[:2]) * trainer.world_size / pace
        left = round(pace * (trainer.max_steps - step))
        held_out = self.journal.held_out
        status = f"loss {self.journal.loss:.3f}"
        status += "" if held_out is None else f" · held out {held_out:.3f}"
        status += f" · {rate / 1000:,.1f}k positions/s · {left // 60}:{left % 60:02d} left"
        if self.console.is_terminal:
            self.bar.update(self._line, completed=step, status=status)
        else:
            say(self.console, f"step {step}/{trainer.max_steps} · {status}")

    def close(self) -> None:
        """Give the terminal its cursor back. (Lightning calls no `teardown` after an exception.)"""
        self.bar.stop()
