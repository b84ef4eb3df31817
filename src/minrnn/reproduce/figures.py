"""Figures of the report: SVG as text, the same bytes for the same numbers.

Lines are told apart by colour, dashes and markers. The ink is `currentColor`: the page decides on it, light or dark.
"""

import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart, and the markers, by the first word of a system's
# name in small letters. Where two share a colour, no figure has both.
FAMILIES = {
    "mingru": ("#0072B2", "o"),
    "minlstm": ("#D55E00", "s"),
    "gru": ("#56B4E9", "^"),
    "lstm": ("#E69F00", "v"),
    "mamba": ("#009E73", "D"),
    "transformer": ("#CC79A7", "P"),
    "attention": ("#CC79A7", "P"),
    "s4": ("#999999", "X"),
    "h3": ("#CC79A7", "p"),
    "rwkv": ("#56B4E9", "h"),
    "xlstm": ("#E69F00", "*"),
    "hyena": ("#999999", "d"),
}
# Of names that are no system's: one after the other.
OTHERS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "D"),
    ("#CC79A7", "P"),
    ("#E69F00", "v"),
    ("#56B4E9", "^"),
    ("#999999", "X"),
)
# Dashes and filling of the markers: the first, second ... system of one family.
VARIANTS: tuple[tuple[Any, Any], ...] = (
    ("-", "full"),
    ((0, (5, 2)), "none"),
    ((0, (1, 1.5)), "left"),
    ((0, (5, 1.5, 1, 1.5)), "bottom"),
    ((0, (9, 3)), "top"),
    ((0, (3, 1, 1, 1, 1, 1)), "right"),
    ((0, (2, 2)), "full"),
)
INK = "#010203"  # what becomes currentColor: a colour that nothing else has
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Series:
    """One line: of a system, or of one seed of it."""

    system: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: above it.
        ylabel: its unit.
        series: the lines.
        levels: for a system, the paper's number: a dashed line with the system's marker at its right end.
        points: for a system, the paper's numbers with where they are: large markers.
        reach: how far above the lowest value the axis goes; None: as far as the numbers go.
        floor: what needs no model: a dotted line.
    """

    title: str
    ylabel: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    points: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    reach: float | None = None
    floor: float | None = None


def draw(name: str, title: str, panels: Sequence[Panel], xlabel: str, *, logarithmic: bool = False) -> str:
    """Panels side by side, with one legend, as SVG.

    Args:
        name: of the figure; no two on a page may have the same.
        title: what it shows, for readers who cannot see it.
        panels: at least one, with at least one series among them.
        xlabel: what all of them have on the other axis.
        logarithmic: both axes, with a tick for every x.

    Returns:
        An <svg> element.
    """
    styles = _styles(dict.fromkeys(series.system for panel in panels for series in panel.series))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.6 if across == 1 else 3.3 * across, 0.6 + 2.9 * down), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for panel, each in zip(panels, axes, strict=False):
            _draw_panel(each, panel, styles, logarithmic)
            each.set_xlabel(xlabel)
        for each in axes[len(panels) :]:
            each.remove()
        _add_legend(figure, styles)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Title": title})
    return _embeddable(written.getvalue())


def _add_legend(figure: Figure, styles: Mapping[str, dict[str, Any]]) -> None:
    """One legend below, in as many columns as there is room for."""
    handles = [Line2D([], [], label=system, markersize=5, **style) for system, style in styles.items()]
    for columns in range(5, 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, handlelength=4, frameon=False
        )
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _styles(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How the lines of each system look."""
    seen: Counter[str] = Counter()
    styles = {}
    for system in systems:
        family = re.sub(r"[^a-z0-9].*", "", system.lower().removeprefix("nn."))
        family = family if family in FAMILIES else ""
        color, marker = FAMILIES.get(family, OTHERS[seen[family] % len(OTHERS)])
        variant = seen[family] if family else seen[family] // len(OTHERS)
        dashes, filling = VARIANTS[variant % len(VARIANTS)]
        styles[system] = {"color": color, "marker": marker, "linestyle": dashes, "fillstyle": filling}
        seen[family] += 1
    return styles


def _draw_panel(axes: Any, panel: Panel, styles: Mapping[str, dict[str, Any]], logarithmic: bool) -> None:
    for series in panel.series:
        every = max(1, len(series.x) // 8)
        axes.plot(series.x, series.y, **styles[series.system], linewidth=1.4, markersize=4, markevery=every)
    for system, level in panel.levels.items():
        axes.axhline(level, color=styles[system]["color"], linestyle=(0, (4, 4)), linewidth=0.9, alpha=0.8)
        edge = styles[system] | {"linestyle": "", "markersize": 6, "clip_on": False}
        axes.plot([1], [level], transform=axes.get_yaxis_transform(), **edge)
    if panel.floor is not None:
        axes.axhline(panel.floor, color=INK, linestyle=":", linewidth=0.9, alpha=0.7)
    for system, points in panel.points.items():
        axes.plot(*zip(*points, strict=True), **styles[system] | {"linestyle": "", "markersize": 9}, alpha=0.65)
    if logarithmic:
        ticks = sorted({x for series in panel.series for x in series.x})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.reach is not None and panel.series:
        low = min([*panel.levels.values(), *(y for series in panel.series for y in series.y)])
        axes.set_ylim(low - 0.1 * panel.reach, low + panel.reach)
    axes.set_title(textwrap.fill(panel.title, 36), fontsize=10)
    axes.set_ylabel(panel.ylabel)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _embeddable(svg: str) -> str:
    """The element alone: nothing before it, no date, no id that nothing refers to, and the ink of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].replace(INK, "currentColor"), flags=re.S)
    used = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1).strip()


def standalone(svg: str) -> str:
    """The element as a file: dark on white, whatever page shows it."""
    return svg.replace("<svg ", '<svg style="color:#1f2328;background:#fff" ', 1) + "\n"
