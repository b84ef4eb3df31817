"""The parts of the report's page, and what a folder has of a cell."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from minrnn.reproduce.cells import Cell, Results
from minrnn.reproduce.published import Key

State = Literal["done", "failed", "refused", "not finished", "missing"]
STATES: tuple[State, ...] = get_args(State)
APART = (
    "Told apart is what differs by more than twice the standard error of the difference, over what is evaluated and "
    "over seeds, whose deviation is pooled over the systems of a table."
)
ONE_SEED = "Where a system has one seed, its spread over seeds is unknown."


@dataclass(frozen=True)
class Found:
    """A cell, and what the folder has of it.

    Args:
        cell: what was wanted.
        state: done, failed, refused (a file of another version or config), not finished (it was begun), missing.
        record: what was measured; empty unless it is done.
        note: why it failed or was refused.
    """

    cell: Cell
    state: State
    record: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A heading, the names of columns, and rows, the first of each the row's name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """An <svg> element, with the name of its file and what it shows."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Findings:
    """What an experiment's cells show.

    Args:
        measured: what the tables' numbers are.
        sentences: made from the numbers.
        tables: with the paper's numbers.
        more: further tables, folded away.
        figures: drawn from the cells.
        gaps: what has no number, and why.
    """

    measured: str
    sentences: list[str]
    tables: list[Table]
    more: list[Table]
    figures: list[Figure]
    gaps: list[str]


def find(results: Results, cell: Cell) -> Found:
    """What the folder has of a cell."""
    try:
        record = results.read(cell)
    except ValueError as error:
        return Found(cell, "refused", {}, str(error))
    if record is None:
        return Found(cell, "not finished" if results.has_begun(cell) else "missing", {})
    return Found(cell, "failed", {}, record["error"]) if "error" in record else Found(cell, "done", record)


def by_place(found: Iterable[Found]) -> dict[Key, list[Found]]:
    """The seeds of each system in each column."""
    places: dict[Key, list[Found]] = {}
    for each in found:
        places.setdefault((each.cell.system, each.cell.column), []).append(each)
    return places


def shown(value: float, deviation: float | None, digits: int) -> str:
    """A number, with its deviation if there is one."""
    return f"{value:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def stdev(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def placeholder(found: Sequence[Found]) -> str:
    """What stands in place of a number of which no seed has been measured: the first state that one is in."""
    return next(state for state in STATES if any(each.state == state for each in found))


def seed_count(measured: int, found: Sequence[Found]) -> str:
    """How many of the seeds have been measured."""
    return str(measured) if measured == len(found) else f"{measured} of {len(found)}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; none where it rounds to nothing."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
