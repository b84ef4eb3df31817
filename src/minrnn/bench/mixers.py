"""`minrnn bench --mixers`: every system of the comparison side by side, what is promised of them, and how their cost
grows with the length."""

from dataclasses import asdict, replace
from pathlib import Path

from minrnn.bench.measure import Summary
from minrnn.bench.report import host, log_axes, say, write_json
from minrnn.bench.sweep import Sweep
from minrnn.bench.systems import Workload
from minrnn.bench.table import Line
from minrnn.mixers import MIXERS

WORKLOAD = Workload(batch=8, length=2048, input_size=256, hidden_size=256)
# From two that follow each other comes what a system would take at the next, and whether it is too slow for that.
LENGTHS = (128, 256, 512, WORKLOAD.length)
SPEEDS = (  # time of the first over the second
    ("mambapy", "mamba", ">=", 3),
    ("transformers-mamba", "mamba", ">=", 10),
    ("xlstm-slstm", "slstm", ">=", 5),
    ("aaren", "mingru", "<=", 2),
)
MEMORY = ("mamba", "mambapy", "<=", 0.25)
FAMILIES = {  # Okabe and Ito's colours
    "T": "#0072B2",
    "T log T": "#009E73",
    "T^2": "#D55E00",
    "T, sequential": "#CC79A7",
}
MARKERS = "osD^v<>PX*hp"


def promises(result: dict) -> list[Line]:
    """What is promised at `WORKLOAD`, and what came, of a result of `sweep.run` that measured it.

    Where a peer is so slow that it was left out there, its ratio is that of the longest series that it could do.
    """
    points = {(point["system"], point["length"]): point for point in result["points"]}
    lengths = sorted(length for length in result["settings"]["lengths"] if length <= WORKLOAD.length)
    shape = "({}, {}, {})".format(WORKLOAD.batch, "{}", WORKLOAD.hidden_size)
    lines = []
    for above, below, sign, bound in SPEEDS:
        both = [length for length in lengths if above in points.get((below, length), {}).get("speedup_over", {})]
        if both:
            medians = {name: points[name, both[-1]]["seconds"]["median"] for name in (above, below)}
            came = Summary(**points[below, both[-1]]["speedup_over"][above])
            lines.append(Line(f"{above} / {below} at {shape.format(both[-1])}", sign, bound, came, medians))
    at_length = {name: point for (name, length), point in points.items() if length == WORKLOAD.length}
    above, below, sign, bound = MEMORY
    peaks = {name: at_length[name]["peak_bytes"] for name in (above, below) if name in at_length}
    if len(peaks) == 2 and all(peaks.values()):
        came = Summary.of([peaks[above] / peaks[below]])
        lines.append(
            Line(f"peak memory, {above} / {below} at {shape.format(WORKLOAD.length)}", sign, bound, came, peaks)
        )
    for name, entry in MIXERS.items():
        # No products of a sequential mixer could be its limit.
        if name in at_length and entry.cost != "T, sequential" and (over := at_length[name]["over_limit"]):
            medians = {name: at_length[name]["seconds"]["median"]}
            lines.append(Line(f"{name} / its own products", "<=", 3, Summary(**over), medians))
    return lines


def of_workload(sweep: Sweep) -> bool:
    """Whether a sweep measures what is promised."""
    return WORKLOAD.length in sweep.lengths and replace(sweep.workload, length=WORKLOAD.length) == WORKLOAD


def judge(result: dict, path: Path) -> bool:
    """Print what is promised and what came, add it to the result's file; whether all of it holds."""
    lines = promises(result)
    for line in lines:
        say(str(line))
    write_json(path, {**result, "lines": [asdict(line) for line in lines]})
    return all(line.met for line in lines)


def draw(path: Path, result: dict) -> None:
    """Draw time and peak memory of a training step against length, a line for each mixer, a colour for each cost."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    load, about = result["settings"]["workload"], result["facts"]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, name in enumerate(MIXERS):
        points = [point for point in result["points"] if point["system"] == name]
        looks = {"marker": MARKERS[i % len(MARKERS)], "linestyle": ("-", "--")[i // len(MARKERS)], "markersize": 5}
        style = {"color": FAMILIES[MIXERS[name].cost], "label": name, **looks}
        lengths = [point["length"] for point in points]
        panels[0].plot(lengths, [1e3 * point["seconds"]["median"] for point in points], **style)
        peaks = {point["length"]: point["peak_bytes"] / 1e6 for point in points if point["peak_bytes"]}
        if peaks:  # Matplotlib finds no ticks for a logarithm of nothing
            panels[1].plot(list(peaks), list(peaks.values()), **style)
    lengths = result["settings"]["lengths"]
    for axes, title in zip(panels, ("time of one step, ms", "peak memory of one step, MB"), strict=True):
        log_axes(axes, title, lengths)
    costs = [Line2D([], [], color=color, label=f"cost {cost}") for cost, color in FAMILIES.items()]
    panels[1].legend(handles=costs, fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=8)
    figure.suptitle(
        f"Forward + backward: batch {load['batch']}, D = {load['hidden_size']}, {load['dtype']}; {host(about)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
