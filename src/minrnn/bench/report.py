"""What a benchmark leaves behind: lines on the terminal, a JSON file, and the paper's three-panel figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minrnn._files import replace_files

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and markers differ too.
STYLES = {
    "MinGRU": {"color": "#0072B2", "marker": "o", "linewidth": 2.4},
    "MinLSTM": {"color": "#D55E00", "marker": "s", "linewidth": 2.4},
    "nn.GRU": {"color": "#56B4E9", "marker": "o", "linestyle": "--"},
    "nn.LSTM": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "GRU-loop": {"color": "#56B4E9", "marker": "^", "linestyle": ":"},
    "LSTM-loop": {"color": "#E69F00", "marker": "v", "linestyle": ":"},
    "minGRU-pytorch": {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    "products-2H": {"color": "#999999", "linewidth": 1.2},
    "products-3H": {"color": "#999999", "linewidth": 1.2, "linestyle": (0, (1, 2))},
}


def say(line: str = "") -> None:
    """Write one line to the terminal."""
    print(line, flush=True)  # noqa: T201


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_json(path: Path, result: dict[str, object]) -> None:
    """Write `result`, in a directory that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: (json.dumps(result, indent=1) + "\n").encode()})


def host(about: dict) -> str:
    """What a figure says of where its numbers come from: the GPU, or the processor and its threads."""
    where = about["gpu"]["name"] if about.get("gpu") else f"{about['cpu']}, {threads(about['threads'])}"
    return f"{where}, torch {about['torch']}"


def threads(count: int) -> str:
    """A number of threads, in words."""
    return f"{count} thread{'s' * (count != 1)}"


def log_axes(axes: Any, title: str, lengths: Sequence[int]) -> None:
    """Both axes logarithmic, against length."""
    axes.set(title=title, xlabel="length", xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.yaxis.set_major_formatter("{x:g}")


def draw(path: Path, result: dict, styles: Mapping[str, dict] = STYLES) -> None:
    """Draw time, speed-up and peak memory against length (the paper's figure 1), from what `write_json` wrote."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    load, about = result["settings"]["workload"], result["facts"]
    series = {name: [p for p in result["points"] if p["system"] == name] for name in styles}
    figure = Figure(figsize=(13.5, 5), layout="constrained")
    time, speedup, memory = figure.subplots(1, 3)
    for name, points in series.items():
        if not points:
            continue
        lengths = [p["length"] for p in points]
        time.plot(lengths, [1e3 * p["seconds"]["median"] for p in points], label=name, **styles[name])
        peaks = {p["length"]: p["peak_bytes"] / 1e6 for p in points if p["peak_bytes"]}
        if peaks and not name.startswith("products"):
            memory.plot(list(peaks), list(peaks.values()), **styles[name])
        for other in points[0]["speedup_over"]:
            style = {**styles[other], "color": styles[name]["color"]}
            ratios = {p["length"]: p["speedup_over"][other] for p in points if other in p["speedup_over"]}
            speedup.plot(list(ratios), [r["median"] for r in ratios.values()], label=f"{name} over {other}", **style)
            quartiles = [r["q1"] for r in ratios.values()], [r["q3"] for r in ratios.values()]
            speedup.fill_between(list(ratios), *quartiles, color=style["color"], alpha=0.15, linewidth=0)
    speedup.axhline(1, color="black", linewidth=0.8)
    titles = {time: "time of one step, ms", speedup: "speed-up, times", memory: "peak memory of one step, MB"}
    lengths = result["settings"]["lengths"]
    for axes, title in titles.items():
        log_axes(axes, title, lengths)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), fontsize=9)
    if speedup.get_legend_handles_labels()[0]:
        low, high = speedup.get_ylim()
        speedup.set_ylim(low, high * (high / low) ** 0.35)  # room above the lines for what they are
        speedup.legend(fontsize=7, loc="upper center", ncols=2, columnspacing=1)
    figure.suptitle(
        f"Forward + backward: batch {load['batch']}, input {load['input_size']}, hidden {load['hidden_size']}, "
        f"layers {load['layers']}, {load['dtype']}; {host(about)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
