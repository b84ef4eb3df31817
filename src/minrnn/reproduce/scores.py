"""What experiments that train tell: tables of accuracies or losses, and learning curves."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minrnn.reproduce import figures
from minrnn.reproduce.experiments import Experiment
from minrnn.reproduce.page import STATES, Figure, Found, Table, Told, signed
from minrnn.reproduce.published import Key, Number


@dataclass(frozen=True)
class Measure:
    """What of a training cell is reported: `key` of its `result` (the last measurement) or of its `best`."""

    words: str
    axis: str
    which: Literal["result", "best"]
    key: str
    factor: float
    digits: int
    reach: float | None  # of the figure's axis

    def of(self, measurement: Mapping[str, float]) -> float:
        return self.factor * measurement[self.key]


MEASURES = {
    "accuracy": Measure(
        "Accuracy in % after the last step, so nothing is chosen on what is examined",
        "accuracy, %", "result", "accuracy", 100.0, 1, None,
    ),
    "held_out": Measure(
        "Lowest held-out loss in nats per character, as in the paper",
        "held-out loss, nats", "best", "held_out", 1.0, 3, 0.5,
    ),
}  # fmt: skip


def tell(name: str, experiment: Experiment, found: Sequence[Found], published: Mapping[Key, Number]) -> Told:
    """What the cells of an experiment that trains tell."""
    measure = MEASURES[experiment.metric]
    places: dict[Key, list[Found]] = {}
    for each in found:
        places.setdefault((each.cell.system, each.cell.column), []).append(each)
    columns = dict.fromkeys(column for _, column in places)
    tables = [
        Table(
            column,
            ("system", "minrnn", "paper", "difference", "seeds"),
            [(place[0], *entry(seeds, published.get(place), measure))
             for place, seeds in places.items() if place[1] == column],
        )
        for column in columns
    ]  # fmt: skip
    panels = [_curves(column, measure, places, published) for column in columns]
    drawn = []
    if any(panel.series for panel in panels):
        caption = "Each line is one seed."
        if any(panel.levels for panel in panels):
            caption += " Dashed and without markers: the paper's number"
            caption += ", with a large open marker at its step." if any(panel.points for panel in panels) else "."
        drawn = [Figure(name, caption, figures.draw(name, f"{experiment.title}: {measure.axis}", panels, "step"))]
    means = {place: statistics.mean(values) for place, each in places.items() if (values := _values(each, measure))}
    return Told(measure.words, _sentences(means, measure), tables, [], drawn, [])


def entry(found: Sequence[Found], number: Number | None, measure: Measure) -> tuple[str, str, str, str]:
    """Of the seeds of one system: ours, the paper's number, the difference, and how many seeds there are."""
    paper = _shown(number.value, number.deviation, number.step, measure.digits) if number else ""
    if number and number.scaled:
        paper += " scaled"
    values = _values(found, measure)
    if not values:
        return next(state for state in STATES if any(each.state == state for each in found)), paper, "", ""
    step = None
    if measure.which == "best":
        step = round(statistics.mean(each.record["best"]["step"] for each in found if each.state == "done"))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.mean(values)
    return (
        _shown(mean, deviation, step, measure.digits),
        paper,
        signed(mean - number.value, measure.digits) if number and not number.scaled else "",
        str(len(values)) if len(values) == len(found) else f"{len(values)} of {len(found)}",
    )


def _values(found: Sequence[Found], measure: Measure) -> list[float]:
    return [measure.of(each.record[measure.which]) for each in found if each.state == "done"]


def _shown(value: float, deviation: float | None, step: int | None, digits: int) -> str:
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{value:.{digits}f}{spread}" + ("" if step is None else f" at step {step:,}")


def _curves(
    column: str,
    measure: Measure,
    places: Mapping[Key, Sequence[Found]],
    published: Mapping[Key, Number],
) -> figures.Panel:
    series = [
        figures.Series(system, [line["step"] for line in lines], [measure.of(line) for line in lines])
        for (system, its), found in places.items()
        for each in found
        if its == column and (lines := each.record.get("metrics"))
    ]
    shown = {each.system for each in series}
    numbers = {system: number for (system, its), number in published.items() if its == column and system in shown}
    return figures.Panel(
        column,
        measure.axis,
        series,
        {system: number.value for system, number in numbers.items()},
        {system: [(number.step, number.value)] for system, number in numbers.items() if number.step is not None},
        measure.reach,
    )


def _label(place: Key) -> str:
    return ", ".join(filter(None, place))


def _sentences(means: Mapping[Key, float], measure: Measure) -> list[str]:
    """What the means say, the better end first."""
    if len(means) < 2:
        return []
    sign = 1 if measure.key == "accuracy" else -1
    best, worst = (choose(means, key=lambda place: sign * means[place]) for choose in (max, min))
    first, last = ("Highest", "lowest") if sign > 0 else ("Lowest", "highest")
    told = [f"{word}: {_label(place)} ({means[place]:.{measure.digits}f})" for word, place in
            ((first, best), (last, worst))]  # fmt: skip
    return ["; ".join(told) + "."]
