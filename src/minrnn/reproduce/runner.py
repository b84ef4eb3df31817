"""Runs cells in worker processes, one after the other or several at once."""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any, cast

import torch
from rich.console import Console

from minrnn._console import say
from minrnn.bench import facts
from minrnn.reproduce.cells import DONE, Cell, Results


def run(
    cells: Sequence[Cell], results: Results, *, jobs: int = 1, data: str | None = None, console: Console
) -> list[dict[str, Any]]:
    """Measure those cells that have not ended well, and write their files.

    Args:
        cells: what is wanted.
        results: the folder; what it has of these cells is kept, what failed is tried again.
        jobs: how many worker processes share the cores; what measures time has them for itself.
        data: where the text, or the episodes, of the cells lie; a text is downloaded by default.
        console: where progress is shown.

    Returns:
        What stands in the file of each cell.

    Raises:
        ValueError: the folder has one of these cells from another version, or with another config.
        OSError: a cell's file cannot be written.
        KeyboardInterrupt: Ctrl-C; what has ended is kept, and what was at work has saved a checkpoint. A second one
            ends it at once.
    """
    left = [cell for cell in cells if not results.has(cell)]
    say(console, f"{len(cells)} cells, {len(cells) - len(left)} of them measured before")
    # What measures time is measured alone.
    trained = [cell for cell in left if cell.config["measure"] in ("training", "acting")]
    _serve([cell for cell in left if cell not in trained], 1, results, data, console)
    _serve(trained, jobs, results, data, console)
    return [results.read(cell) or {} for cell in cells]


def _serve(cells: Sequence[Cell], jobs: int, results: Results, data: str | None, console: Console) -> None:
    """Measure all of `cells`."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    arguments = [str(results.root), str(max(1, torch.get_num_threads() // jobs)), data or ""]
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    servers = [_Server(arguments, waiting, ended, results, console) for _ in range(min(jobs, len(cells)))]
    try:
        for server in servers:
            server.start()
        for _ in servers:
            if error := ended.get():
                raise error
    finally:  # nothing is left to stop, unless an exception came
        try:
            for server in servers:
                server.stop()
            for server in servers:
                if server.is_alive():
                    server.join()
                if worker := server.worker:  # whose server has ended first, as where nobody reads the output
                    worker.wait()
        finally:
            for server in servers:
                server.stop()  # asked twice, a worker ends at once


class _Server(threading.Thread):
    """Feeds one worker process; starts another where one was killed."""

    def __init__(
        self,
        arguments: list[str],
        waiting: queue.SimpleQueue,
        ended: queue.SimpleQueue,
        results: Results,
        console: Console,
    ) -> None:
        super().__init__(daemon=True)
        self.arguments, self.waiting, self.ended = arguments, waiting, ended
        self.results, self.console = results, console
        self.stopped = False
        self.worker: subprocess.Popen[str] | None = None

    def run(self) -> None:
        try:
            with contextlib.suppress(queue.Empty):
                while not self.stopped:
                    self._measure(self.waiting.get_nowait())
            self._dismiss()
        except BaseException as error:  # such as a full disk, or nobody who reads the output
            self.ended.put(error)
        else:
            self.ended.put(None)

    def stop(self) -> None:
        """Ask the worker to save what it is at, and to end."""
        self.stopped = True
        if worker := self.worker:
            worker.terminate()

    def _dismiss(self) -> None:
        if self.worker:
            self.worker.communicate()  # it ends with its input
            self.worker = None

    def _measure(self, cell: Cell) -> None:
        if self.worker is None or self.worker.poll() is not None:  # killed between two cells
            # In a group of its own: a Ctrl-C at the terminal must not reach it, only a signal from here.
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "minrnn.reproduce.worker", *self.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0,
            )  # fmt: skip
            if self.stopped:  # meanwhile
                self.worker.terminate()
        say(self.console, f"{cell.name}: begins")
        asked, answers = cast(IO[str], self.worker.stdin), cast(IO[str], self.worker.stdout)
        try:
            asked.write(json.dumps(asdict(cell)) + "\n")
            asked.flush()
            for line in answers:
                if line.strip() == DONE:
                    break
                say(self.console, f"{cell.name}: {line.rstrip()}")
            else:
                raise BrokenPipeError
        except BrokenPipeError:
            status, self.worker = self.worker.wait(), None
            if self.stopped:
                return
            if not self.results.has(cell):
                reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                self.results.write(cell, {"error": f"its process ended by {reason}", "facts": facts.gather()})
        record = self.results.read(cell) or {}
        if not record.get("error", "ValueError").startswith("ValueError"):  # which is of what was asked for
            self._dismiss()  # what failed may have broken the process, as errors of a GPU do
        say(self.console, f"{cell.name}: {outcome(record)} ({self.waiting.qsize()} are waiting)")


def outcome(record: dict[str, Any]) -> str:
    """The end of a cell in a few words."""
    if "error" in record:
        return f"failed: {record['error']}"
    shown = [
        f"{name.replace('_', ' ')} {record['result'][name]:.4g}"
        for name in ("accuracy", "held_out")
        if name in record.get("result", {})
    ]
    return ", ".join([*shown, f"{record['seconds']:.0f} s"])
