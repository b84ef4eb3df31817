"""The learning curve of a run as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_curve(lines: list[dict[str, float]], path: Path, title: str, unit: str) -> None:
    """Training and held-out loss against steps, from the lines of metrics.jsonl, as a PNG."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training, one batch")
    axes.plot(*zip(*held_out, strict=True), color="#d94801", marker="o", markersize=4, label="held out, all of it")
    last_step, last = held_out[-1]
    axes.annotate(f"{last:.4g}", (last_step, last), xytext=(0, 8), textcoords="offset points", ha="right")
    training, measured = (sorted(value for _, value in each) for each in (train, held_out))
    # The first steps' training losses lie far above all else.
    low, high = min(training[0], measured[0]), max(training[9 * (len(training) - 1) // 10], measured[-1])
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="step", ylabel=unit)
    axes.set_title(title, parse_math=False)  # it has the name of a file
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
