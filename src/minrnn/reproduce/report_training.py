"""What experiments that train tell: tables of accuracies or losses, and learning curves."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from minrnn.reproduce import figures
from minrnn.reproduce.cells_training import task_of
from minrnn.reproduce.estimates import Estimate, pooled
from minrnn.reproduce.experiments import Experiment
from minrnn.reproduce.page import (
    APART,
    ONE_SEED,
    Figure,
    Findings,
    Found,
    Table,
    by_place,
    placeholder,
    seed_count,
    shown,
    signed,
    stdev,
)
from minrnn.reproduce.published import Key, Number
from minrnn.tasks.formal import LANGUAGES


@dataclass(frozen=True)
class Metric:
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


METRICS = {
    "accuracy": Metric(
        "Accuracy in % after the last step, so the step is not chosen on what is evaluated",
        "accuracy, %", "result", "accuracy", 100.0, 1, None,
    ),
    "held_out": Metric(
        "Lowest held-out loss in nats per character, as in the paper",
        "held-out loss, nats", "best", "held_out", 1.0, 3, 0.5,
    ),
}  # fmt: skip
SOLVED = 99  # %, as it is shown: what counts as having learned a task


def summarize(name: str, experiment: Experiment, found: Sequence[Found], published: Mapping[Key, Number]) -> Findings:
    """What the cells of an experiment that trains show."""
    metric = METRICS[experiment.metric]
    places = by_place(found)
    columns = dict.fromkeys(column for _, column in places)
    eval_sets = {column: eval_set for column in columns if (eval_set := _eval_set(column, found, metric))}
    base = experiment.baseline
    head = ("system", "weights", "minrnn", "paper", "difference", *([f"against {base}"] if base else []), "seeds")
    tables = []
    for column in columns:
        against = _mean(places.get((base, column), []), metric)
        rows = [
            _row(system, seeds, published.get((system, its)), metric, bool(base), against)
            for (system, its), seeds in places.items()
            if its == column
        ]
        eval_set = eval_sets.get(column)
        title = f"{column} (best constant answer: {eval_set.constant:.{metric.digits}f})" if eval_set else column
        tables.append(Table(title, head, rows))
    curves = (_curves(column, metric, places, published, eval_sets.get(column)) for column in columns)
    drawn = []
    if panels := [panel for panel in curves if panel.series]:
        caption = "Each line is one seed."
        if any(panel.levels for panel in panels):
            caption += " Dashed, with a marker at the right end: the paper's number"
            caption += ", with a large marker at its step." if any(panel.points for panel in panels) else "."
        if any(panel.floor is not None for panel in panels):
            caption += " Dotted: the best constant answer."
        drawn = [Figure(name, caption, figures.draw(name, f"{experiment.title}: {metric.axis}", panels, "step"))]
    if experiment.along == "systems":
        told = list(_sentences(columns, places, published, metric, eval_sets))
        told += [APART] if told and eval_sets else []
        if told and any(len(_values(seeds, metric)) == 1 for seeds in places.values()):
            told.append(ONE_SEED)
    else:
        told = list(_along_columns(places, metric))
    return Findings(metric.words, told, tables, [], drawn, [])


@dataclass(frozen=True)
class EvalSet:
    """What the examination of a column can tell apart, in the unit of the table.

    Args:
        constant: the accuracy of the best constant answer.
        questions: how many there are. Some have several answers, which makes the errors too large; the words of formal
            languages share few lengths, which makes them too small.
    """

    constant: float
    questions: int

    def error(self, accuracy: float) -> float:
        """The standard error of an accuracy that so many questions have shown."""
        return (accuracy * (METRICS["accuracy"].factor - accuracy) / self.questions) ** 0.5


def _eval_set(column: str, found: Sequence[Found], metric: Metric) -> EvalSet | None:
    """Of a column in which an accuracy has been measured."""
    its = [each.cell.config["task"] for each in found if each.cell.column == column and each.state == "done"]
    if metric.key != "accuracy" or not its:
        return None
    constant, questions = _constant(json.dumps(its[0]))
    return EvalSet(metric.factor * constant, questions)


@cache
def _constant(config: str) -> tuple[float, int]:
    """Of a task, as JSON: the accuracy of the best constant answer, and how many questions show it."""
    task = task_of(json.loads(config))
    return task.constant_accuracy(), task.examination * task.batch_size


def _row(
    system: str, found: Sequence[Found], number: Number | None, metric: Metric, compared: bool, against: float | None
) -> tuple[str, ...]:
    """Of the seeds of a system: weights, ours, the paper's number, the difference, that to the baseline, the count."""
    paper = _at_step(number.value, number.deviation, number.step, metric.digits) if number else ""
    if number and number.scaled:
        paper += " scaled"
    mean, values = _mean(found, metric), _values(found, metric)
    if mean is None:
        return system, "", placeholder(found), paper, "", *[""] * compared, ""
    done = [each.record for each in found if each.state == "done"]
    step = round(statistics.mean(each["best"]["step"] for each in done)) if metric.which == "best" else None
    ours, comparable = _at_step(mean, stdev(values), step, metric.digits), mean
    if number and number.scaled:
        comparable = _scaled(mean, found[0].cell.config["task"]["language"])
        ours += f"; {round(comparable, metric.digits) or 0:.{metric.digits}f} scaled".replace("-", "−")  # no −0
    pairs = [(comparable, number.value if number else None), *[(mean, against)] * compared]
    return (
        system,
        f"{done[0]['parameters']:,}",
        ours,
        paper,
        *("" if other is None else signed(each - other, metric.digits) for each, other in pairs),
        seed_count(len(values), found),
    )


def _scaled(accuracy: float, language: str) -> float:
    """The accuracy of a formal language so that guessing is 0."""
    full = METRICS["accuracy"].factor
    chance = full / LANGUAGES[language].answers
    return full * (accuracy - chance) / (full - chance)


def _mean(found: Sequence[Found], metric: Metric) -> float | None:
    values = _values(found, metric)
    return statistics.mean(values) if values else None


def _values(found: Sequence[Found], metric: Metric) -> list[float]:
    return [metric.of(each.record[metric.which]) for each in found if each.state == "done"]


def _at_step(value: float, deviation: float | None, step: int | None, digits: int) -> str:
    return shown(value, deviation, digits) + ("" if step is None else f" at step {step:,}")


def _curves(
    column: str,
    metric: Metric,
    places: Mapping[Key, Sequence[Found]],
    published: Mapping[Key, Number],
    eval_set: EvalSet | None,
) -> figures.Panel:
    series = [
        figures.Series(system, [line["step"] for line in lines], [metric.of(line) for line in lines])
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
        metric.axis,
        series,
        {system: number.value for system, number in numbers.items()},
        {system: [(number.step, number.value)] for system, number in numbers.items() if number.step is not None},
        metric.reach,
        eval_set.constant if eval_set else None,
    )


def _sentences(
    columns: Iterable[str],
    places: Mapping[Key, Sequence[Found]],
    published: Mapping[Key, Number],
    metric: Metric,
    eval_sets: Mapping[str, EvalSet],
) -> Iterator[str]:
    """How the systems of each column stand."""
    for column in columns:
        values = {system: each for (system, its), found in places.items()
                  if its == column and (each := _values(found, metric))}  # fmt: skip
        if not values:
            continue
        eval_set = eval_sets.get(column)
        papers = {system: number.value for (system, its), number in published.items() if its == column}
        told = _best_and_worst(values, metric, eval_set) if eval_set else _ranking(values, metric, papers)
        wanted = sum(its == column for _, its in places)
        some = f" ({len(values)} of {wanted} systems so far)" if len(values) < wanted else ""
        yield f"{column or 'Lowest first'}{some}: {told}."


def _ranking(values: Mapping[str, Sequence[float]], metric: Metric, papers: Mapping[str, float]) -> str:
    """All systems, the lowest first, with the paper's numbers."""
    return ", ".join(
        f"{system} {shown(statistics.mean(each), stdev(each), metric.digits)}"
        + (f" (the paper's {papers[system]:.{metric.digits}f})" if system in papers else "")
        for system, each in sorted(values.items(), key=lambda item: statistics.mean(item[1]))
    )


def _best_and_worst(values: Mapping[str, Sequence[float]], metric: Metric, eval_set: EvalSet) -> str:
    """Which systems are first and which last, as far as they can be told apart, and which solve the task."""
    deviation = pooled(values.values())
    estimates = {
        system: Estimate.of(each, deviation, eval_set.error(statistics.mean(each))) for system, each in values.items()
    }
    low, high = (choose(estimates.values(), key=lambda each: each.mean) for choose in (min, max))
    span = " to ".join(dict.fromkeys(f"{end.mean:.{metric.digits}f}" for end in (low, high)))

    def named(end: Estimate) -> str:
        """All that cannot be told apart from this end."""
        ranks: dict[str, list[str]] = {}
        for system, each in sorted(estimates.items(), key=lambda item: abs(item[1].mean - end.mean)):
            if not each.apart(end, metric.digits):
                ranks.setdefault(f"{each.mean:.{metric.digits}f}", []).append(system)
        return ", ".join(f"{', '.join(names)} ({value})" for value, names in ranks.items())

    if high.mean <= eval_set.constant + 2 * eval_set.error(eval_set.constant):
        return f"no system beats the best constant answer ({span}; {eval_set.constant:.{metric.digits}f})"
    told = f"highest {named(high)}; lowest {named(low)}"
    if not low.apart(high, metric.digits):
        told = f"no significant difference ({span})" if len(estimates) > 1 else named(high)
    best_first = sorted(estimates.items(), key=lambda item: -item[1].mean)
    solved = [system for system, each in best_first if round(each.mean, metric.digits) >= SOLVED]
    names = ", ".join(solved) if len(solved) < len(estimates) else "all"
    return f"{told}; {SOLVED} % or more: {names}" if solved else told


def _along_columns(places: Mapping[Key, Sequence[Found]], metric: Metric) -> Iterator[str]:
    """What each system does from column to column."""
    systems = dict.fromkeys(system for system, _ in places)
    for name in systems:
        values = {column: _values(found, metric) for (system, column), found in places.items() if system == name}
        told = [
            f"{column} {shown(statistics.mean(each), stdev(each), metric.digits)}"
            for column, each in values.items()
            if each
        ]
        if told:
            yield f"{name}: {', '.join(told)}."
