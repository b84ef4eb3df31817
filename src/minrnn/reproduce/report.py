"""The report: from whatever a folder has so far to one page, as HTML and as Markdown."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from minrnn._files import replace_files
from minrnn.bench.report import threads
from minrnn.reproduce import figures, report_rl, report_timing, report_training
from minrnn.reproduce.cells import Cell, Results, Scale
from minrnn.reproduce.experiments import EXPERIMENTS, Experiment
from minrnn.reproduce.page import STATES, Findings, Found, find
from minrnn.reproduce.published import MISSING, NOTES, PUBLISHED, URL, Key, Number

FEW = 6  # cells of one origin that are named, where others have another


@dataclass(frozen=True)
class Section:
    """All that the page says of an experiment."""

    name: str
    about: Experiment
    command: str
    found: Sequence[Found]
    counts: Mapping[str, int]
    findings: Findings
    gaps: Sequence[str]
    changed: Sequence[str]
    known: Sequence[str]
    shared: Sequence[str]
    cost: str
    origins: Sequence[str]


def build(results: Results, scale: Scale, cells: Sequence[Cell], out: Path) -> None:
    """Write report.html, one page that needs nothing else, and report.md with its figures/, from what is there so far.

    Args:
        results: the folder of cells; those that have not ended are shown as such.
        scale: of the cells.
        cells: all that the page is to show.
        out: the directory of the page.

    Raises:
        OSError: it cannot be written; an earlier page is unharmed.
    """
    sections = []
    for name, experiment in EXPERIMENTS.items():
        if found := [find(results, cell) for cell in cells if cell.experiment == name]:
            sections.append(_section(name, experiment, scale, found))
    drawn = [figure for section in sections for figure in section.findings.figures]
    page = {"scale": scale, "sections": sections, "missing": MISSING, "url": URL, "states": STATES}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    replace_files(
        {out / "figures" / f"{figure.name}.svg": figures.standalone(figure.svg).encode() for figure in drawn}
        | {out / f"report.{kind}": _environment(kind).get_template(f"report.{kind}.jinja").render(page).encode()
           for kind in ("md", "html")}
    )  # fmt: skip


def _environment(kind: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minrnn.reproduce"),
        autoescape=kind == "html",
        finalize=markdown if kind == "md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment


def markdown(value: object) -> str:
    """A value as plain text of Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", " ".join(str(value).split()))


def _section(name: str, experiment: Experiment, scale: Scale, found: Sequence[Found]) -> Section:
    done, published = [each for each in found if each.state == "done"], PUBLISHED.get(name, {})
    of_metric = {"seconds": report_timing, "return": report_rl}.get(experiment.metric, report_training)
    findings = of_metric.summarize(name, experiment, found, published)
    counts = Counter(each.state for each in found)
    of_users = any(each.cell.reads == "directory" for each in found)
    # As many cells at once as there were, for their times; what is timed itself had all cores.
    jobs = max((each.record["facts"]["cores"] // each.record["facts"]["threads"] for each in done), default=1)
    return Section(
        name=name,
        about=experiment,
        command=f"minrnn reproduce {name} --scale {scale}{' --data DIRECTORY' * of_users}"
        + f" --jobs {jobs}" * (jobs > 1),
        found=found,
        counts={state: counts[state] for state in STATES if counts[state]},
        findings=findings,
        gaps=[*(f"{each.cell.name} {each.state}: {each.note}" for each in found if each.note), *findings.gaps],
        changed=experiment.changed[scale],
        known=[*_sure(published), *NOTES.get(name, ())],
        shared=_shared([each.cell.config for each in found]),
        cost=_cost([each.record["seconds"] for each in done]),
        origins=_origins(done),
    )


def _sure(published: Mapping[Key, Number]) -> list[str]:
    """How the paper's numbers are known, each kind with those it holds for."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for (system, column), number in published.items():
        kinds.setdefault(f"{number.source}: {number.sure}", {}).setdefault(system, []).append(column)
    several = Counter(system for systems in kinds.values() for system in systems)
    lines = []
    for kind, systems in kinds.items():
        named = (
            f"{system}, {', '.join(columns)}" if several[system] > 1 else system for system, columns in systems.items()
        )
        lines.append(f"{kind} ({'; '.join(named)})." if len(kinds) > 1 else f"{kind}.")
    return lines


def _shared(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that all cells have in common."""
    first, *others = (_flat(config) for config in configs)
    return [f"{name} = {value}" for name, value in first.items() if all(other.get(name) == value for other in others)]


def _flat(config: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{inside}{name}.") if isinstance(value, dict) else {f"{inside}{name}": value}
    return flat


def _cost(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    if len(seconds) == 1:
        return f"{duration(seconds[0])}, of one cell"
    low, middle, high = (duration(choose(seconds)) for choose in (min, statistics.median, max))
    added = f"{duration(sum(seconds))}, all cells added up, of which several may have run at once"
    return f"{added}; a cell took {low} to {high}, half of them at most {middle}"


def duration(seconds: float) -> str:
    """Seconds in readable units."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _origins(done: Sequence[Found]) -> list[str]:
    """Where cells come from, each origin with its cells, and with that of what they went on from."""
    origins: dict[str, list[Found]] = {}
    for found in done:
        record, config = found.record, found.cell.config
        asked = config.get("train", config.get("table", {})).get("precision")
        last = _origin(record["facts"], record.get("precision", asked))
        earlier = dict.fromkeys(_origin(each, each.get("precision")) for each in record.get("earlier_sessions", ()))
        earlier.pop(last, None)
        text = last + "".join(f"; begun by {each}" for each in earlier)
        origins.setdefault(text, []).append(found)
    return [f"{text}; {_cells(found, named=len(origins) > 1 and len(found) <= FEW)}" for text, found in origins.items()]


def _origin(facts: Mapping[str, Any], precision: str | None) -> str:
    """Code, versions, machine and arithmetic of a process."""
    cpu = f"{facts['cpu']} ({facts['cpu_capability']}), {facts['cores']} cores"
    where = [facts["gpu"]["name"] if facts["gpu"] else cpu, *([precision] if precision else [])]
    versions = f"minrnn {facts['minrnn']} ({_commit(facts)}), torch {facts['torch']}, Python {facts['python']}"
    return f"{versions}; {', '.join(where)}, {threads(facts['threads'])}, {facts['system']}"


def _commit(facts: Mapping[str, Any]) -> str:
    return re.sub(r"^(.{12})[0-9a-f]*", r"commit \1", facts["commit"]) if facts["commit"] else "an installed copy"


def _cells(found: Sequence[Found], *, named: bool) -> str:
    """How many cells these are, which, if they are to be named, and their first and last day."""
    days = sorted({each.record["facts"]["date"][:10] for each in found})
    names = ", ".join(each.cell.name.partition("/")[2] for each in found)
    count = f"{len(found)} cell{'s' * (len(found) > 1)}{f' ({names})' * named}"
    return f"{count}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"
