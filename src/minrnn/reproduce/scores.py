"""What experiments that train tell: tables of accuracies or losses, and learning curves."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from minrnn.reproduce import figures
from minrnn.reproduce.experiments import Experiment
from minrnn.reproduce.page import Figure, Found, Table, Told, counted, shown, signed, spread, without
from minrnn.reproduce.published import Key, Number
from minrnn.reproduce.trained import task_of


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
SOLVED = 99  # %: what counts as having learned a task


def tell(name: str, experiment: Experiment, found: Sequence[Found], published: Mapping[Key, Number]) -> Told:
    """What the cells of an experiment that trains tell."""
    measure = MEASURES[experiment.metric]
    places: dict[Key, list[Found]] = {}
    for each in found:
        places.setdefault((each.cell.system, each.cell.column), []).append(each)
    columns = dict.fromkeys(column for _, column in places)
    exams = {column: exam for column in columns if (exam := _exam(column, found, measure))}
    base = experiment.baseline
    head = ("system", "weights", "minrnn", "paper", "difference", *([f"against {base}"] if base else []), "seeds")
    tables = []
    for column in columns:
        against = _mean(places.get((base, column), []), measure)
        rows = [
            _row(system, seeds, published.get((system, its)), measure, bool(base), against)
            for (system, its), seeds in places.items()
            if its == column
        ]
        exam = exams.get(column)
        title = f"{column} (one constant answer: {exam.constant:.{measure.digits}f})" if exam else column
        tables.append(Table(title, head, rows))
    curves = (_curves(column, measure, places, published, exams.get(column)) for column in columns)
    drawn = []
    if panels := [panel for panel in curves if panel.series]:
        caption = "Each line is one seed."
        if any(panel.levels for panel in panels):
            caption += " Dashed, with a marker at the right end: the paper's number"
            caption += ", with a large marker at its step." if any(panel.points for panel in panels) else "."
        if any(panel.floor is not None for panel in panels):
            caption += " Dotted: one constant answer."
        drawn = [Figure(name, caption, figures.draw(name, f"{experiment.title}: {measure.axis}", panels, "step"))]
    if experiment.along == "systems":
        told = list(_sentences(columns, places, published, measure, exams))
        if told and any(len(_values(seeds, measure)) == 1 for seeds in places.values()):
            told.append("Of a system with one seed it is not known what chance does.")
    else:
        told = list(_along_columns(places, measure))
    return Told(measure.words, told, tables, [], drawn, [])


@dataclass(frozen=True)
class Exam:
    """What the examination of a column can tell apart, in the unit of the table.

    Args:
        constant: the accuracy of the best constant answer.
        questions: how many there are; some have several answers, which makes the errors too large.
    """

    constant: float
    questions: int

    def error(self, accuracy: float) -> float:
        """The standard error of an accuracy that so many questions have shown."""
        return (accuracy * (MEASURES["accuracy"].factor - accuracy) / self.questions) ** 0.5


def _exam(column: str, found: Sequence[Found], measure: Measure) -> Exam | None:
    """Of a column in which an accuracy has been measured."""
    its = [each.cell.config["task"] for each in found if each.cell.column == column and each.state == "done"]
    if measure.key != "accuracy" or not its:
        return None
    constant, questions = _constant(json.dumps(its[0]))
    return Exam(measure.factor * constant, questions)


@cache
def _constant(config: str) -> tuple[float, int]:
    """Of a task, as JSON: the accuracy of the best constant answer, and how many questions show it."""
    task = task_of(json.loads(config))
    return task.constant(), task.examination * task.batch_size


def _row(
    system: str, found: Sequence[Found], number: Number | None, measure: Measure, compared: bool, against: float | None
) -> tuple[str, ...]:
    """Of the seeds of a system: weights, ours, the paper's number, the difference, that to the baseline, the count."""
    paper = _at_step(number.value, number.deviation, number.step, measure.digits) if number else ""
    if number and number.scaled:
        paper += " scaled"
    mean, values = _mean(found, measure), _values(found, measure)
    if mean is None:
        return system, "", without(found), paper, "", *[""] * compared, ""
    done = [each.record for each in found if each.state == "done"]
    step = round(statistics.mean(each["best"]["step"] for each in done)) if measure.which == "best" else None
    differences = [number.value if number and not number.scaled else None, *[against] * compared]
    return (
        system,
        f"{done[0]['parameters']:,}",
        _at_step(mean, spread(values), step, measure.digits),
        paper,
        *("" if other is None else signed(mean - other, measure.digits) for other in differences),
        counted(len(values), found),
    )


def _mean(found: Sequence[Found], measure: Measure) -> float | None:
    values = _values(found, measure)
    return statistics.mean(values) if values else None


def _values(found: Sequence[Found], measure: Measure) -> list[float]:
    return [measure.of(each.record[measure.which]) for each in found if each.state == "done"]


def _at_step(value: float, deviation: float | None, step: int | None, digits: int) -> str:
    return shown(value, deviation, digits) + ("" if step is None else f" at step {step:,}")


def _curves(
    column: str,
    measure: Measure,
    places: Mapping[Key, Sequence[Found]],
    published: Mapping[Key, Number],
    exam: Exam | None,
) -> figures.Panel:
    series = [
        figures.Series(system, [line["step"] for line in lines], [measure.of(line) for line in lines])
        for (system, its), found in places.items()
        for each in found
        if its == column and (lines := each.record.get("metrics"))
    ]
    drawn = {each.system for each in series}
    numbers = {
        system: number for (system, its), number in published.items()
        if its == column and system in drawn and not number.scaled
    }  # fmt: skip
    return figures.Panel(
        column,
        measure.axis,
        series,
        {system: number.value for system, number in numbers.items()},
        {system: [(number.step, number.value)] for system, number in numbers.items() if number.step is not None},
        measure.reach,
        exam.constant if exam else None,
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its standard error: of the seeds, and of the examination."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float], deviation: float, exam: Exam) -> "Estimate":
        mean = statistics.mean(values)
        return cls(mean, math.hypot(deviation / len(values) ** 0.5, exam.error(mean)))

    def apart(self, other: "Estimate", digits: int) -> bool:
        """Whether two differ by more than twice the standard error of their difference, and by what is shown."""
        least = 2 * math.hypot(self.error, other.error)
        return abs(self.mean - other.mean) > least and f"{self.mean:.{digits}f}" != f"{other.mean:.{digits}f}"


def _pooled(samples: Iterable[Sequence[float]]) -> float:
    """The standard deviation within samples, which two or three seeds of one system would not tell; 0 if none has two
    seeds."""
    several = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in several)
    return (sum((len(each) - 1) * statistics.variance(each) for each in several) / freedom) ** 0.5 if several else 0.0


def _sentences(
    columns: Iterable[str],
    places: Mapping[Key, Sequence[Found]],
    published: Mapping[Key, Number],
    measure: Measure,
    exams: Mapping[str, Exam],
) -> Iterator[str]:
    """How the systems of each column stand."""
    for column in columns:
        values = {system: each for (system, its), found in places.items()
                  if its == column and (each := _values(found, measure))}  # fmt: skip
        if not values:
            continue
        exam = exams.get(column)
        papers = {system: number.value for (system, its), number in published.items() if its == column}
        told = _ends(values, measure, exam) if exam else _ranking(values, measure, papers)
        yield f"{column or 'Lowest first'}: {told}."


def _ranking(values: Mapping[str, Sequence[float]], measure: Measure, papers: Mapping[str, float]) -> str:
    """All systems, the lowest first, with the paper's numbers."""
    return ", ".join(
        f"{system} {shown(statistics.mean(each), spread(each), measure.digits)}"
        + (f" (the paper's {papers[system]:.{measure.digits}f})" if system in papers else "")
        for system, each in sorted(values.items(), key=lambda item: statistics.mean(item[1]))
    )


def _ends(values: Mapping[str, Sequence[float]], measure: Measure, exam: Exam) -> str:
    """Which systems are first and which last, as far as they can be told apart, and which solve the task."""
    deviation = _pooled(values.values())
    estimates = {system: Estimate.of(each, deviation, exam) for system, each in values.items()}
    low, high = (choose(estimates.values(), key=lambda each: each.mean) for choose in (min, max))
    span = " to ".join(dict.fromkeys(f"{end.mean:.{measure.digits}f}" for end in (low, high)))

    def named(end: Estimate) -> str:
        """All that cannot be told apart from this end."""
        ranks: dict[str, list[str]] = {}
        for system, each in sorted(estimates.items(), key=lambda item: abs(item[1].mean - end.mean)):
            if not each.apart(end, measure.digits):
                ranks.setdefault(f"{each.mean:.{measure.digits}f}", []).append(system)
        return ", ".join(f"{', '.join(names)} ({value})" for value, names in ranks.items())

    if high.mean <= exam.constant + 2 * exam.error(exam.constant):
        return f"nobody does better than one constant answer ({span}; {exam.constant:.{measure.digits}f})"
    told = f"highest {named(high)}; lowest {named(low)}"
    if not low.apart(high, measure.digits):
        told = f"not told apart ({span})" if len(estimates) > 1 else named(high)
    best_first = sorted(estimates.items(), key=lambda item: -item[1].mean)
    solved = [system for system, each in best_first if each.mean >= SOLVED]
    names = ", ".join(solved) if len(solved) < len(estimates) else "all"
    return f"{told}; {SOLVED} % or more: {names}" if solved else told


def _along_columns(places: Mapping[Key, Sequence[Found]], measure: Measure) -> Iterator[str]:
    """What each system does from column to column."""
    systems = dict.fromkeys(system for system, _ in places)
    for name in systems:
        values = {column: _values(found, measure) for (system, column), found in places.items() if system == name}
        told = [
            f"{column} {shown(statistics.mean(each), spread(each), measure.digits)}"
            for column, each in values.items()
            if each
        ]
        if told:
            yield f"{name}: {', '.join(told)}."
