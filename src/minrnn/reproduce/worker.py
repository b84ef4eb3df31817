"""A process that measures one cell after the other: `python -m minrnn.reproduce.worker ROOT THREADS DATA`.

It reads cells as lines of JSON, writes each one's file, and answers each with the line `DONE`; what else it prints is
progress. What kills it costs the cell at hand and no other.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minrnn._extras import how_to_install
from minrnn.bench import facts
from minrnn.reproduce import measure_rl, measure_timing
from minrnn.reproduce.cells import DONE, Cell, Results
from minrnn.reproduce.measure_training import train
from minrnn.train.module import Interrupted

MEASURES: dict[str, Callable[[Cell, Path, str | None, Console], dict[str, Any]]] = {
    "training": train,
    "acting": measure_rl.act,
    "speed": lambda cell, work, data, console: measure_timing.speed(cell, console),
    "inference": lambda cell, work, data, console: measure_timing.inference(cell, console),
    "behaviour": lambda cell, work, data, console: measure_rl.behave(cell, work, console),
    "latency": lambda cell, work, data, console: measure_rl.latency_of_all(cell, console),
}


def measure(cell: Cell, results: Results, data: str | None, console: Console) -> None:
    """Measure a cell and write its file; if it fails, with the reason.

    Args:
        cell: what to measure; left alone if another process has done so meanwhile.
        results: the folder.
        data: where a text, or the episodes, of the cell lie.
        console: where progress is shown.
    """
    work = results.work(cell)
    with results.claim(cell.name, console):
        if results.has(cell):
            return
        try:
            record = MEASURES[cell.config["measure"]](cell, work, data, console)
        except (Interrupted, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            missing = how_to_install(error) if isinstance(error, ModuleNotFoundError) else None
            record = {"error": f"{type(error).__name__}: {missing or error}".partition("\n")[0]}
        device = record.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        results.write(cell, {**record, "facts": facts.gather(device)})
        if "error" not in record:
            shutil.rmtree(work, ignore_errors=True)


def main(root: str, threads: str, data: str) -> int:
    """Serve the cells of the standard input until it ends; 130 if stopped before, 1 if a file could not be written."""
    torch.set_num_threads(int(threads))
    console = Console(width=200)
    facts.gather()  # of the code as it is loaded now
    try:
        for line in sys.stdin:
            measure(Cell(**json.loads(line)), Results(Path(root)), data or None, console)
            sys.stdout.write(f"{DONE}\n")
            sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt):
        return 130
    except OSError as error:  # a full disk, or nobody who listens
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
