"""Time and peak memory against length, for every system: what `minrnn bench` measures without `--table`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minrnn.bench import facts, measure
from minrnn.bench.report import say, write_json
from minrnn.bench.systems import SYSTEMS, Workload, with_limits

COLUMNS = f"{'length':>7}  {'system':<15}{'time, ms':>10}  {'quartiles':<17}{'rounds':>6}{'x limit':>9}{'MB':>9}"
HEAD = f"{COLUMNS}  speed-up over"


@dataclass(frozen=True)
class Sweep:
    """What to measure: the workload at each of `lengths`, for each of `systems`."""

    workload: Workload
    lengths: tuple[int, ...]
    systems: tuple[str, ...]
    repeats: int = 15
    budget: float = 20.0  # seconds per system and length, after which it drops out of the rounds


def run(sweep: Sweep, path: Path) -> dict[str, object]:
    """Measure, printing rows as they come; returns what stands in the JSON file, which is written after each length."""
    about = facts.gather()
    bandwidth = measure.copy_bandwidth()
    for line in _introduction(sweep, about, bandwidth):
        say(line)
    points: list[dict[str, object]] = []
    result = {"facts": about, "settings": asdict(sweep), "copy_gb_per_s": bandwidth / 1e9, "points": points}
    names = [name for name in with_limits(sweep.systems) if _runs(name, sweep.workload)]
    for length in sweep.lengths:
        points += _at_length(sweep, names, length)
        write_json(path, result)
    return result


def _introduction(sweep: Sweep, about: dict, bandwidth: float) -> list[str]:
    load = sweep.workload
    width = f"input {load.input_size}, hidden {load.hidden_size}, {load.layers} layer{'s' * (load.layers > 1)}"
    pages = "with huge pages" if about["huge_pages"] else "without huge pages"
    return [
        f"Forward + backward, batch {load.batch}, {width}, {load.dtype}; {about['threads']} threads of {about['cpu']}.",
        f"torch {about['torch']}, minrnn {about['minrnn']}; torch's allocator {pages}.",
        f"Copy bandwidth {bandwidth / 1e9:.1f} GB/s, read + written.",
        "products-2H and -3H are the layers' own matrix products, the limit of their time.",
        "",
        HEAD,
    ]


def _runs(name: str, load: Workload) -> bool:
    """Whether a system can run the workload (nn.LSTM may lack float16); if not, the terminal says why."""
    load = replace(load, batch=1, length=2)
    try:
        measure.training_steps([name], load)[name]()
    except RuntimeError as error:
        say(f"{name} is left out: {error}")
        return False
    return True


def _at_length(sweep: Sweep, names: list[str], length: int) -> list[dict[str, object]]:
    """Measure and print every system at one length."""
    load = replace(sweep.workload, length=length)
    times = measure.alternate(measure.training_steps(names, load), sweep.repeats, sweep.budget)
    points = []
    for name in names:
        system = SYSTEMS[name]
        others = [other for other in system.over if other in times]
        point = {
            "length": length,
            "system": name,
            "seconds": asdict(measure.Summary.of(times[name])),
            "over_limit": asdict(measure.ratio(times, name, system.limit)) if system.limit in times else None,
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
    return (
        f"{point['length']:>7}  {point['system']:<15}{1e3 * seconds['median']:>10.4g}  {quartiles:<17}"
        f"{seconds['count']:>6}{limit:>9}{peak:>9}  {speedups}"
    ).rstrip()
