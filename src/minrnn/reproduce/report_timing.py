"""What experiments that measure time tell: time, speed-up and memory against length, in tables and figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minrnn.reproduce import figures
from minrnn.reproduce.experiments import Experiment
from minrnn.reproduce.page import Figure, Findings, Found, Table
from minrnn.reproduce.published import Key, Number

Point = Mapping[str, Any]

_MEASURED = (
    "Medians (and quartiles) of rounds in which the systems take turns, slow ones in the first few alone; a speed-up "
    "is the median of the ratios in the rounds that both took part in, not the ratio of the two medians"
)


class Value(NamedTuple):
    """A number, or the median of so many rounds with its quartiles in words."""

    median: float
    spread: str = ""
    rounds: str = ""


Lines = dict[str, dict[int, Value]]  # by name, values at lengths


@dataclass(frozen=True)
class Quantity:
    """What a point has under `key`: a number, a summary of numbers, or one for each system that it is set against."""

    name: str
    title: str
    key: str
    factor: float = 1.0

    def of(self, point: Point) -> Iterator[tuple[str, Value]]:
        """The lines of a figure that the point is on, and where: "A", or "A over B"."""
        value = point[self.key]
        if isinstance(value, dict) and "median" not in value:
            for other, ratio in value.items():
                yield f"{point['system']} over {other}", self._value(ratio)
        elif value is not None:
            yield point["system"], self._value(value)

    def _value(self, value: Any) -> Value:
        if not isinstance(value, dict):
            return Value(self.factor * value)
        quartiles = "–".join(rounded(self.factor * value[each]) for each in ("q1", "q3"))
        return Value(self.factor * value["median"], f" ({quartiles})", str(value["count"]))


QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "speed": (
        Quantity("time in ms", "time of a training step, ms", "seconds", 1e3),
        Quantity("speed-up", "speed-up", "speedup_over"),
        Quantity("memory", "peak memory of a training step, MB", "peak_bytes", 1e-6),
        Quantity("memory ratio", "peak memory as a multiple", "memory_over"),
    ),
    "inference": (
        Quantity("context", "time to read the context, ms", "prefill", 1e3),
        Quantity("token", "time of one token after it, ms", "step", 1e3),
        Quantity("state", "state between them, MB", "state_bytes", 1e-6),
        Quantity("context speed-up", "speed-up of the context", "prefill_speedup_over"),
        Quantity("token speed-up", "speed-up of the token", "step_speedup_over"),
    ),
}


@dataclass
class Setting:
    """All points of one batch, width and device, by quantity; `batch` is what the paper's numbers are told by."""

    batch: int
    lines: dict[Quantity, Lines] = field(default_factory=dict)


def summarize(name: str, experiment: Experiment, found: Sequence[Found], published: Mapping[Key, Number]) -> Findings:
    """What the cells of an experiment with points show."""
    settings: dict[str, Setting] = {}
    quantities = QUANTITIES[found[0].cell.config["measure"]]
    reasons: dict[tuple[str, str], list[int]] = {}
    for each in found:
        record = each.record
        for point in record.get("points", ()):
            width = f", width {point['width']}" if "width" in point else ""
            title = f"batch {point['batch']}{width}, on the {'GPU' if record['device'] == 'cuda' else 'CPU'}"
            setting = settings.setdefault(title, Setting(point["batch"]))
            if "peak_bytes" in point:
                point = {**point, "memory_over": _multiples(point, record["points"])}
            for quantity in quantities:
                lines = setting.lines.setdefault(quantity, {})
                for line, value in quantity.of(point):
                    lines.setdefault(line, {})[point["length"]] = value
        for system, reason in record.get("left_out", {}).items():
            reasons.setdefault((f"{system}: {reason}", each.cell.system), []).append(each.cell.config["length"])
    return Findings(
        measured=_MEASURED,
        sentences=[
            *(sentence for quantity in quantities for sentence in _sentence(quantity, settings)),
            *_weights(found),
        ],
        tables=list(_compared(settings, published)),
        more=[
            _table(title, *lines) for title, setting in settings.items() for lines in setting.lines.items() if lines[1]
        ],
        figures=[_draw(f"{name}-{i}", *each, published) for i, each in enumerate(settings.items())],
        gaps=[
            f"{reason} ({place}, at length {', '.join(f'{length:,}' for length in sorted(lengths))})."
            for (reason, place), lengths in reasons.items()
        ],
    )


def _multiples(point: Point, others: Sequence[Point]) -> dict[str, float]:
    """The peak memory of a system over that of those that its time is set against."""
    peaks = {other["system"]: other["peak_bytes"] for other in others}
    return {
        other: point["peak_bytes"] / peaks[other]
        for other in point["speedup_over"]
        if point["peak_bytes"] and peaks.get(other)
    }


def _place(quantity: Quantity, setting: Setting, length: int) -> str:
    """The name of a column of the paper's numbers."""
    return f"{quantity.name} at batch {setting.batch}, length {length}"


def _compared(settings: Mapping[str, Setting], published: Mapping[Key, Number]) -> Iterator[Table]:
    """The paper's numbers beside those of each setting, and those that no setting has."""
    rest = dict(published)
    for title, setting in settings.items():
        ours = {
            (line, _place(quantity, setting, length)): value
            for quantity, lines in setting.lines.items()
            for line, values in lines.items()
            for length, value in values.items()
        }
        here = [key for key in published if f" at batch {setting.batch}, " in key[1]]
        if here:
            yield Table(title, _HEAD, [_row(key, ours.get(key), published[key]) for key in here])
        for key in here:
            rest.pop(key, None)
    if rest:
        yield Table("not measured", _HEAD, [_row(key, None, number) for key, number in rest.items()])


_HEAD = ("system", "minrnn", "paper", "difference", "rounds")


def _row(key: Key, ours: Value | None, number: Number) -> tuple[str, ...]:
    name, paper = ", ".join(key), f"{number.value:,g}"
    if ours is None:
        return name, "missing", paper, "", ""
    gap = ours.median - number.value
    difference = f"{'+' if gap > 0 else '−' if gap else ''}{rounded(abs(gap))}"
    return name, rounded(ours.median) + ours.spread, paper, difference, ours.rounds


def rounded(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, quantity: Quantity, lines: Lines) -> Table:
    lengths = sorted({length for values in lines.values() for length in values})
    rows = [
        (
            line,
            *(rounded(values[length].median) + values[length].spread if length in values else "" for length in lengths),
        )
        for line, values in lines.items()
    ]
    return Table(f"{title}: {quantity.title}", ("length", *(f"{length:,}" for length in lengths)), rows)


def _draw(name: str, title: str, setting: Setting, published: Mapping[Key, Number]) -> Figure:
    panels = []
    for quantity, lines in setting.lines.items():
        series = [
            figures.Series(line, sorted(values), [values[x].median for x in sorted(values)])
            for line, values in lines.items()
        ]
        points = {
            line: [(x, published[key].value) for x in sorted(values)
                   if (key := (line, _place(quantity, setting, x))) in published]
            for line, values in lines.items()
        }  # fmt: skip
        panels.append(figures.Panel(quantity.title, "", series, points=points))
    caption = f"Against length, {title}."
    if any(points for panel in panels for points in panel.points.values()):
        caption += " Large markers: the paper's numbers."
    return Figure(name, caption, figures.draw(name, caption, panels, "length", logarithmic=True))


def _weights(found: Sequence[Found]) -> Iterator[str]:
    """How large the systems are, at each width."""
    sizes: dict[str, dict[str, int]] = {}
    for each in found:
        for point in each.record.get("points", ()):
            width = f" at width {point['width']}" if "width" in point else ""
            sizes.setdefault(width, {})[point["system"]] = point["parameters"]
    for width, systems in sizes.items():
        yield f"Weights{width}: {', '.join(f'{system} {count:,}' for system, count in systems.items())}."


def _sentence(quantity: Quantity, settings: Mapping[str, Setting]) -> Iterator[str]:
    """From where to where each ratio goes, over all settings and lengths."""
    ratios: dict[str, list[float]] = {}
    for setting in settings.values():
        for line, values in setting.lines[quantity].items():
            if " over " in line:
                ratios.setdefault(line, []).extend(value.median for value in values.values())
    spans = (
        f"{line} {' to '.join(dict.fromkeys(rounded(end) for end in (min(values), max(values))))}"
        for line, values in ratios.items()
    )
    if ratios:
        yield f"{quantity.title.capitalize()}, lowest to highest: {', '.join(spans)}."
