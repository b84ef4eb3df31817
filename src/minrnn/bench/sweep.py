"""Time and peak memory against length, for every system: what `minrnn bench` measures without `--table`."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minrnn.bench import facts, measure, products
from minrnn.bench.report import say, write_json
from minrnn.bench.systems import SYSTEMS, Workload, build, with_limits

TIMES = f"{'length':>7}  {'system':<18}{'time, ms':>10}  {'quartiles':<17}{'rounds':>6}{'x limit':>9}{'MB':>9}"
COLUMNS = f"{TIMES}{'weights':>11}{'state':>9}"
HEAD = f"{COLUMNS}  speed-up over"


@dataclass(frozen=True)
class Sweep:
    """What to measure: the workload at each of `lengths`, for each of `systems`."""

    workload: Workload
    lengths: tuple[int, ...]
    systems: tuple[str, ...]
    repeats: int = 15
    budget: float = 20.0  # seconds per system and length, after which it drops out of the rounds
    longest: float = 20.0  # seconds that a step may take


def run(sweep: Sweep, path: Path) -> dict[str, object]:
    """Measure, printing rows as they come; returns what stands in the JSON file, which is written after each length."""
    about = facts.gather()
    bandwidth = measure.copy_bandwidth()
    for line in _introduction(sweep, about, bandwidth):
        say(line)
    points: list[dict[str, object]] = []
    result = {"facts": about, "settings": asdict(sweep), "copy_gb_per_s": bandwidth / 1e9, "points": points}
    refusals = {name: refusal(name, sweep.workload) for name in with_limits(sweep.systems)}
    for name, reason in refusals.items():
        if reason:
            say(f"{name} is left out: {reason}")
    names = [name for name, reason in refusals.items() if not reason]
    for length in sweep.lengths:
        names = [name for name in names if _affords(sweep, name, length, points)]
        points += at_length(sweep, names, length)
        write_json(path, result)
    return result


def _affords(sweep: Sweep, name: str, length: int, points: list[dict]) -> bool:
    """Whether a system may go on to `length`, by how it grew between the last two; if not, the terminal says why."""
    *_, before, last = [None, None, *(point for point in points if point["system"] == name)]
    if before is None or last is None or not before["peak_bytes"] or not last["peak_bytes"]:
        return True

    def ahead(now: float, then: float) -> float:
        power = math.log(now / then) / math.log(last["length"] / before["length"])
        return now * (length / last["length"]) ** power

    seconds = ahead(last["seconds"]["median"], before["seconds"]["median"])
    peak = ahead(last["peak_bytes"], before["peak_bytes"])
    memory = facts.memory_gb()
    if seconds > sweep.longest or (memory and peak > 5e8 * memory):
        say(f"{name} ends before length {length}: a step would take about {seconds:.0f} s and {peak / 1e9:.1f} GB")
        return False
    return True


def _introduction(sweep: Sweep, about: dict, bandwidth: float) -> list[str]:
    load = sweep.workload
    width = f"input {load.input_size}, hidden {load.hidden_size}, {load.layers} layer{'s' * (load.layers > 1)}"
    pages = "with huge pages" if about["huge_pages"] else "without huge pages"
    return [
        f"Forward + backward, batch {load.batch}, {width}, {load.dtype}; {about['threads']} threads of {about['cpu']}.",
        f"torch {about['torch']}, minrnn {about['minrnn']}; torch's allocator {pages}.",
        f"Copy bandwidth {bandwidth / 1e9:.1f} GB/s, read + written.",
        "The limit: products-2H and -3H, a layer's own matrix products; for a mixer its own products and FFTs.",
        "",
        HEAD,
    ]


def refusal(name: str, load: Workload) -> str | None:
    """Why a system cannot run the workload (it is not installed; nn.LSTM may lack float16, a peer a width), or None."""
    if missing := SYSTEMS[name].missing():
        return missing
    load = replace(load, batch=1, length=2)
    try:
        measure.training_steps(build([name], load), load)[name]()
    except (RuntimeError, ValueError, AssertionError) as error:
        return str(error)
    return None


def at_length(sweep: Sweep, names: list[str], length: int) -> list[dict[str, object]]:
    """Measure and print these systems, all in turns, at one length."""
    load = replace(sweep.workload, length=length)
    modules = build(names, load)
    steps = measure.training_steps(modules, load)
    limits = {name: limit for name in names if (limit := SYSTEMS[name].limit) in names}
    for name in names:
        if SYSTEMS[name].mixes and (alone := products.alone(steps[name], load.device)):
            limits[name] = f"products of {name}"
            steps[limits[name]] = alone
    times = measure.alternate(steps, sweep.repeats, sweep.budget, measure.clock(load.device))
    points = []
    for name in names:
        others = [other for other in SYSTEMS[name].over if other in times]
        point = {
            "length": length,
            "system": name,
            "parameters": sum(parameter.numel() for parameter in modules[name].parameters()),
            "state_size": getattr(modules[name], "state_size", None),
            "seconds": asdict(measure.Summary.of(times[name])),
            "over_limit": asdict(measure.ratio(times, name, limits[name])) if name in limits else None,
            "speedup_over": {other: asdict(measure.ratio(times, other, name)) for other in others},
            "peak_bytes": _peak(name, load),
        }
        points.append(point)
        say(row(point))
    say()
    return points


def _peak(name: str, load: Workload) -> float | None:
    """Peak memory in bytes, or None and why on the terminal: a child that runs out of memory ends nothing else."""
    try:
        return measure.peak_memory(name, load)
    except RuntimeError as error:
        say(str(error))
        return None


def row(point: dict) -> str:
    """One line under `HEAD`."""
    seconds = point["seconds"]
    quartiles = f"{1e3 * seconds['q1']:.4g}-{1e3 * seconds['q3']:.4g}"
    limit = f"{point['over_limit']['median']:.2f}" if point["over_limit"] else ""
    peak = "-" if point["peak_bytes"] is None else f"{point['peak_bytes'] / measure.MEGABYTE:.1f}"
    speedups = ", ".join(f"{other} {ratio['median']:.3g}x" for other, ratio in point["speedup_over"].items())
    state = "" if point["state_size"] is None else f"{point['state_size']:,}"
    return (
        f"{point['length']:>7}  {point['system']:<18}{1e3 * seconds['median']:>10.4g}  {quartiles:<17}"
        f"{seconds['count']:>6}{limit:>9}{peak:>9}{point['parameters']:>11,}{state:>9}  {speedups}"
    ).rstrip()
