"""Runs cells in worker processes, one after the other or several at once."""

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
        data: where a text of the cells lies; by default it is downloaded.
        console: where progress is shown.

    Returns:
        What stands in the file of each cell.

    Raises:
        ValueError: the folder has one of these cells from another version, or with another config.
        KeyboardInterrupt: Ctrl-C; what has ended is kept, and what was at work has saved a checkpoint.
    """
    records = [results.read(cell) for cell in cells]
    left = [cell for cell, record in zip(cells, records, strict=True) if record is None or "error" in record]
    console.print(f"{len(cells)} cells, {len(cells) - len(left)} of them measured before", highlight=False)
    # What measures time is measured alone.
    _serve([cell for cell in left if cell.config["measure"] != "training"], 1, results, data, console)
    _serve([cell for cell in left if cell.config["measure"] == "training"], jobs, results, data, console)
    return [results.read(cell) or {} for cell in cells]


def _serve(cells: Sequence[Cell], jobs: int, results: Results, data: str | None, console: Console) -> None:
    """Measure all of `cells`."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    arguments = [str(results.root), str(max(1, torch.get_num_threads() // jobs)), data or ""]
    servers = [_Server(arguments, waiting, results, console) for _ in range(min(jobs, len(cells)))]
    try:
        for server in servers:
            server.start()
        for server in servers:
            while server.is_alive():  # a bare join would not see Ctrl-C
                server.join(0.2)
    except KeyboardInterrupt:
        for server in servers:
            server.stop()
        for server in servers:
            server.join()
        raise


class _Server(threading.Thread):
    """Feeds one worker process; starts another where one was killed."""

    def __init__(self, arguments: list[str], waiting: queue.SimpleQueue, results: Results, console: Console) -> None:
        super().__init__(daemon=True)
        self.arguments, self.waiting, self.results, self.console = arguments, waiting, results, console
        self.stopped = False
        self.worker: subprocess.Popen[str] | None = None

    def run(self) -> None:
        while not self.stopped:
            try:
                cell = self.waiting.get_nowait()
            except queue.Empty:
                break
            self._measure(cell)
        if self.worker:
            self.worker.communicate()  # it ends with its input

    def stop(self) -> None:
        """Ask the worker to save what it is at, and to end."""
        self.stopped = True
        if self.worker:
            self.worker.send_signal(signal.SIGINT)

    def _measure(self, cell: Cell) -> None:
        if self.worker is None:
            # In a group of its own: a Ctrl-C at the terminal must reach it once, from here.
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "minrnn.reproduce.worker", *self.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0,
            )  # fmt: skip
        self._say(f"{cell.name}: begins")
        asked, answers = cast(IO[str], self.worker.stdin), cast(IO[str], self.worker.stdout)
        try:
            asked.write(json.dumps(asdict(cell)) + "\n")
            asked.flush()
            for line in answers:
                if line.strip() == DONE:
                    break
                self._say(f"{cell.name}: {line.rstrip()}")
            else:
                raise BrokenPipeError
        except BrokenPipeError:
            status, self.worker = self.worker.wait(), None
            if self.stopped:
                return
            reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            self.results.write(cell, {"error": f"its process ended by {reason}", "facts": facts.gather()})
        record = self.results.read(cell) or {}
        self._say(f"{cell.name}: {outcome(record)} ({self.waiting.qsize()} are waiting)")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


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
