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
    axes.annotate(f"{last:.3f}", (last_step, last), xytext=(0, 8), textcoords="offset points", ha="right")
    losses = [value for _, value in train + held_out]
    axes.set_ylim(min(losses) - 0.1, min(max(losses) + 0.1, min(losses) + 2))  # the first steps' lie far above
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
