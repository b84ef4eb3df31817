"""Cells: an experiment is made of them, and each is one JSON file.

A results folder holds EXPERIMENT/SYSTEM-COLUMN-SEED.json for each cell that has ended, and under work/ a directory
with the checkpoint of each that has not, beside a lock of whoever is at work on it.
"""

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

import minrnn
from minrnn._console import say
from minrnn._files import locked, replace_files
from minrnn.mixers import mixer_config
from minrnn.models import BackboneConfig
from minrnn.tasks.corpus import DOWNLOADS

Scale = Literal["smoke", "laptop", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Settings = dict[str, Any]  # plain values, of JSON

FORMAT = 1  # of a cell's file
BEGUN = "cell.json"  # of a cell that has not ended: what it is trained with
DONE = "\x04"  # what a worker process says at the end of a cell


def with_defaults(backbone: BackboneConfig) -> Settings:
    """A backbone as plain values, with the defaults of its mixer, too: a default that changes is another config."""
    return {**asdict(backbone), "mixer_options": asdict(mixer_config(backbone.mixer, backbone.mixer_options))}


@dataclass(frozen=True)
class Cell:
    """What is measured, of what, with which random numbers.

    Args:
        experiment: its name.
        system: a row of the experiment's table.
        column: of that table; empty where it has one only.
        seed: of weights and batches.
        config: plain values, all that the result depends on but the machine.
    """

    experiment: str
    system: str
    column: str
    seed: int
    config: Settings

    @property
    def name(self) -> str:
        """EXPERIMENT/SYSTEM-COLUMN-SEED, as in the folder."""
        return f"{self.experiment}/{re.sub('[^a-z0-9]+', '-', f'{self.system} {self.column} {self.seed}'.lower())}"

    @property
    def reads(self) -> Literal["file", "directory"] | None:
        """What of the user's it reads, as `--data` names it."""
        if "files" in self.config.get("data", {}):
            return "directory"
        return "file" if self.config.get("task", {}).get("data") in DOWNLOADS else None


class Results:
    """A folder of cells.

    Args:
        root: the folder; made when the first cell is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, cell: Cell) -> Path:
        """The file of a cell."""
        return self.root / f"{cell.name}.json"

    def work(self, cell: Cell) -> Path:
        """The directory of a cell that has not ended."""
        return self.root / "work" / cell.name

    def claim(self, name: str, console: Console) -> AbstractContextManager[None]:
        """The sole right to measure the cell of this name, or to write the report, waited for: it may be another
        process's, such as a worker whose parent was killed."""
        return locked(self.root / "work" / f"{name}.lock", partial(say, console))

    def has(self, cell: Cell) -> bool:
        """Whether a cell has been measured, and did not fail; raises as `read` does."""
        record = self.read(cell)
        return record is not None and "error" not in record

    def has_begun(self, cell: Cell) -> bool:
        """Whether there is something to go on from; raises as `read` does."""
        return read_same(self.work(cell) / BEGUN, {"minrnn": minrnn.__version__, **cell.config}) is not None

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured, or why it failed; None where there is nothing, or a file that is torn or has neither.

        Raises:
            ValueError: the file, or what is at work on the cell, is of another version, or of the same cell with
                another config.
        """
        self.has_begun(cell)  # for what it raises
        record = read_same(self.path(cell), {"format": FORMAT, "minrnn": minrnn.__version__, **asdict(cell)})
        return record if record and "facts" in record and record.keys() & {"error", "seconds"} else None

    def write(self, cell: Cell, record: dict[str, Any]) -> None:
        """Put `record` into the file of a cell, beside what the cell is."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "minrnn": minrnn.__version__, **asdict(cell), **record}
        replace_files({path: (json.dumps(content, indent=1) + "\n").encode()})


def read_same(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table in a file of JSON, None if there is none, or the file is torn.

    Raises:
        ValueError: it has not all entries of `wanted`.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    table, wanted = found if isinstance(found, dict) else {}, json.loads(json.dumps(wanted))
    if other := {name: value for name, value in wanted.items() if table.get(name) != value}:
        name, got, want = _difference({each: table.get(each) for each in other}, other)
        raise ValueError(
            f"{path} must be of a cell with {name} = {want!r}, got {got!r}: results are not mixed; move them away, or "
            "choose another folder with --out"
        )
    return table


def _difference(kept: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any]:
    """The name of the first entry in which two nested tables differ, and both values."""
    name = next(name for name in [*wanted, *kept] if kept.get(name) != wanted.get(name))
    got, want = kept.get(name), wanted.get(name)
    if isinstance(got, dict) and isinstance(want, dict):
        inner, got, want = _difference(got, want)
        name = f"{name}.{inner}"
    return name, got, want
