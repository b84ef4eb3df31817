"""The table of what minrnn promises, measured: `minrnn bench --table`. A line is a measure, its bound and what came.

A row of `ROWS` measures one thing and gives one or more lines. They are kept in the result file as they come: an
interrupted run goes on where it stopped, and single rows can be measured again. Facts that changed (commit, versions,
threads) start a new file.
"""

import json
import subprocess
import sys
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minrnn.bench import facts, measure
from minrnn.bench.measure import Summary, Times
from minrnn.bench.report import say, write_json
from minrnn.bench.systems import SYSTEMS, Workload, build
from minrnn.layers import MinGRUCell
from minrnn.ops import mingru_scan, native

HEAD = f"{'':<8}{'measure':<64}{'bound':<9}came (quartiles, pairs)"


@dataclass(frozen=True)
class Line:
    """One line of the table: the median that `came` must be at most, or at least, `bound`."""

    measure: str
    sign: str  # "<=" or ">="
    bound: float
    came: Summary
    medians: dict[str, float]  # what the measure was formed from: seconds, or bytes of memory

    @property
    def met(self) -> bool:
        return self.came.median <= self.bound if self.sign == "<=" else self.came.median >= self.bound

    def __str__(self) -> str:
        came = f"{self.came.median:.3g} ({self.came.q1:.3g}-{self.came.q3:.3g}, {self.came.count})"
        return f"{'met' if self.met else 'NOT MET':<8}{self.measure:<64}{self.sign} {self.bound:<6g}{came}"


class Skipped(Exception):
    """Why a row cannot be measured on this machine."""


@dataclass(frozen=True)
class Plan:
    """What all rows share: paired repeats, and whether the inputs of layers need a gradient (see `Workload`)."""

    repeats: int = 15
    first_layer: bool = False


Row = Callable[[Plan], list[Line]]


def layers(load: Workload, limit: float, gru: float, lstm: float, plan: Plan) -> list[Line]:
    """MinGRU against its own matrix products and nn.GRU, MinLSTM against nn.LSTM."""
    names = ["products-2H", "MinGRU", "nn.GRU", "nn.LSTM", "MinLSTM"]
    times = _alternate_systems(names, load, plan)
    return [
        compared(times, "<=", limit, "MinGRU", "products-2H", load),
        compared(times, ">=", gru, "nn.GRU", "MinGRU", load),
        compared(times, ">=", lstm, "nn.LSTM", "MinLSTM", load),
    ]


def peer(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """The public implementation against MinGRU."""
    missing = SYSTEMS["minGRU-pytorch"].missing()
    if missing:
        raise Skipped(missing)
    times = _alternate_systems(["MinGRU", "minGRU-pytorch"], load, plan)
    return [compared(times, ">=", bound, "minGRU-pytorch", "MinGRU", load)]


def scan(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """The C scans on preallocated buffers against `copy_` that reads and writes as many bytes.

    Counted once each: forward reads the projection (or coefficients and values) and writes h; backward reads the
    projection, h and its gradient, and writes the projection's gradient.
    """
    if reason := native.unavailable():
        raise Skipped(reason)
    series = (load.batch, load.length, load.hidden_size)
    projection, grad_projection = (torch.randn(*series[:2], 2 * load.hidden_size) for _ in range(2))
    coeffs, values = torch.rand(series), torch.randn(series)
    hidden, grad_hidden = torch.zeros(series), torch.randn(series)
    out = hidden, torch.zeros(load.batch, load.hidden_size)
    gated, linear = (projection, *[None] * 5), (coeffs, values, *[None] * 4)
    scans = {
        "linear_scan forward": (3, lambda: native.forward(linear, "linear", "identity", False, out)),
        "mingru_scan forward": (3, lambda: native.forward(gated, "mingru", "g", False, out)),
        "mingru_scan backward": (
            6,
            lambda: native.backward(grad_hidden, None, gated, hidden, "mingru", "g", False, grad_projection),
        ),
    }
    source, target = torch.ones(3 * hidden.numel()), torch.ones(3 * hidden.numel())
    lines = []
    for name, (moved, step) in scans.items():
        half = moved * hidden.numel() // 2
        copy = f"copy_ of {2 * half * 4 / measure.MEGABYTE:.0f} MB"
        times = measure.alternate({copy: lambda n=half: target[:n].copy_(source[:n]), name: step}, plan.repeats)
        medians = {key: Summary.of(seconds).median for key, seconds in times.items()}
        lines.append(Line(f"bandwidth: {name} / copy_", ">=", bound, measure.ratio(times, copy, name), medians))
    return lines


def sigmoid(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """The public fused op against torch.sigmoid that reads and writes as many bytes; both return fresh memory."""
    projection = torch.randn(load.batch, load.length, 2 * load.hidden_size)
    flat = torch.randn(projection.numel() * 3 // 4)  # read 2, write 1: in all 3 H; sigmoid reads and writes 1.5 H each
    with torch.inference_mode():
        times = measure.alternate(
            {"torch.sigmoid": lambda: torch.sigmoid(flat), "mingru_scan": lambda: mingru_scan(projection)}, plan.repeats
        )
    return [compared(times, "<=", bound, "mingru_scan", "torch.sigmoid", load)]


def memory(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """Peak memory of one step of MinGRU over nn.GRU's, each in a fresh process."""
    peaks: Times = {"MinGRU": [], "nn.GRU": []}
    for _ in range(3):
        for name, values in peaks.items():
            values.append(measure.peak_memory(name, _planned(load, plan)))
    return [compared(peaks, "<=", bound, "MinGRU", "nn.GRU", load, "peak memory, ")]


def bfloat16(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """What autocast to bfloat16 gains MinGRU, over what it gains nn.Linear of the same width."""
    if not facts.has_bf16():
        raise Skipped("this processor has no bfloat16 instructions")
    steps = {}
    for dtype in ("float32", "bfloat16"):
        made = _training_steps(["products-2H", "MinGRU"], replace(load, dtype=dtype), plan)
        steps |= {f"{name} {dtype}": step for name, step in made.items()}
    times = measure.alternate(steps, plan.repeats)
    return [_gain("bfloat16 gain", ">=", bound, times, "float32", "bfloat16", load)]


def threads(load: Workload, bound: float, plan: Plan) -> list[Line]:
    """Time with two threads over time with one, for MinGRU over nn.Linear of the same width."""
    before = torch.get_num_threads()
    if before < 2:
        raise Skipped("it needs two threads")

    def on(count: int, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(count)
            step()

        return run

    made = _training_steps(["products-2H", "MinGRU"], load, plan)
    steps = {f"{name} on {count}": on(count, step) for count in (1, 2) for name, step in made.items()}
    try:
        times = measure.alternate(steps, plan.repeats)
    finally:
        torch.set_num_threads(before)
    return [_gain("2 threads over 1", "<=", bound, times, "on 2", "on 1", load)]


def cell(hidden: int, bound: float, plan: Plan, calls: int = 500) -> list[Line]:
    """One step of MinGRUCell over nn.GRUCell's, batch 1: without gradients, and forward + backward."""
    x, h, gradient = torch.randn(1, hidden), torch.zeros(1, hidden), torch.randn(1, hidden)
    cells = {"MinGRUCell": MinGRUCell(hidden, hidden), "nn.GRUCell": nn.GRUCell(hidden, hidden)}

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(x, h)

    def training(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        module(x, h).backward(gradient)

    lines = []
    for kind, step in (("no_grad", forward), ("forward + backward", training)):
        many = {name: partial(timeit.timeit, partial(step, module), number=calls) for name, module in cells.items()}
        times = {name: [t / calls for t in ts] for name, ts in measure.alternate(many, plan.repeats).items()}
        lines.append(compared(times, "<=", bound, "MinGRUCell", "nn.GRUCell", f"1 step, H = {hidden}, {kind}"))
    return lines


def importing(bound: float, plan: Plan) -> list[Line]:
    """Seconds that `import minrnn` takes after `import torch`, in fresh processes."""
    code = "import torch, time; begin = time.perf_counter(); import minrnn; print(time.perf_counter() - begin)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(plan.repeats)
    ]
    came = Summary.of(seconds)
    return [Line("import minrnn beyond import torch, s", "<=", bound, came, {"import minrnn": came.median})]


FIRST, SECOND, THIRD = Workload(64, 512, 256, 256), Workload(64, 1000, 10, 100), Workload(1, 65536, 128, 128)

ROWS: dict[str, Row] = {
    "first": partial(layers, FIRST, 1.12, 3, 2),
    "second": partial(layers, SECOND, 1.4, 4, 2),
    "third": partial(layers, THIRD, 1.15, 50, 3.5),
    "peer": partial(peer, FIRST, 5),
    "scan": partial(scan, Workload(64, 1024, 512, 512), 0.7),
    "sigmoid": partial(sigmoid, Workload(64, 1024, 512, 512), 1.1),
    "memory": partial(memory, Workload(16, 2048, 256, 256), 0.45),
    "bfloat16": partial(bfloat16, Workload(64, 512, 512, 512), 0.9),
    "cell": partial(cell, 256, 1.0),
    "import": partial(importing, 0.15),
    "threads": partial(threads, THIRD, 1.1),  # the last: setting the number of threads outlasts its being set back
}


def run(rows: list[str] | None, plan: Plan, path: Path) -> bool:
    """Measure `rows`, print and keep their lines; None: those that the result file does not hold for this very commit.

    Returns whether all lines in the file are met.
    """
    result = _resumed(path, {**facts.gather(), "plan": asdict(plan)})
    about, kept = result["facts"], result["rows"]
    say(f"{about['threads']} threads of {about['cpu']}")
    say(f"torch {about['torch']}, minrnn {about['minrnn']}, commit {about['commit']}")
    say(f"huge pages in torch's allocator: {'on' if about['huge_pages'] else 'off'}")
    say(f"\n{HEAD}")
    # Whether lines in the file are of this very code.
    unsure = about["commit"] is None or about["commit"].endswith(facts.CHANGED)
    for name in rows or [name for name in ROWS if unsure or name not in kept]:
        try:
            lines = ROWS[name](plan)
        except Skipped as reason:
            say(f"{'-':<8}{name}: not measured, {reason}")
            continue
        for line in lines:
            say(str(line))
        kept[name] = [{**asdict(line), "met": line.met} for line in lines]
        write_json(path, result)
    flat = [line for lines in kept.values() for line in lines]
    say(f"\n{sum(line['met'] for line in flat)} of {len(flat)} lines met")
    return all(line["met"] for line in flat)


def _resumed(path: Path, about: dict) -> dict:
    """The result file at `path` if the same code ran there under the same conditions, otherwise a new one."""
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if {**earlier["facts"], "date": None} == {**about, "date": None}:
            return {"facts": about, "rows": earlier["rows"]}
        say(f"{path} is of another commit or setting: it will be replaced")
    return {"facts": about, "rows": {}}


def _training_steps(names: list[str], load: Workload, plan: Plan) -> dict[str, Callable[[], None]]:
    load = _planned(load, plan)
    return measure.training_steps(build(names, load), load)


def _planned(load: Workload, plan: Plan) -> Workload:
    return replace(load, first_layer=plan.first_layer)


def _alternate_systems(names: list[str], load: Workload, plan: Plan) -> Times:
    return measure.alternate(_training_steps(names, load, plan), plan.repeats)


def compared(
    values: Times, sign: str, bound: float, above: str, below: str, where: Workload | str, what: str = ""
) -> Line:
    """The line that sets the paired ratios of `above` over `below` against a bound."""
    medians = {name: Summary.of(values[name]).median for name in (above, below)}
    return Line(f"{what}{above} / {below} at {at(where)}", sign, bound, measure.ratio(values, above, below), medians)


def _gain(what: str, sign: str, bound: float, times: Times, above: str, below: str, load: Workload) -> Line:
    """The line that sets a quotient of two of MinGRU's times, over that of nn.Linear's, against a bound."""
    ours, limit = (
        [a / b for a, b in zip(times[f"{name} {above}"], times[f"{name} {below}"], strict=True)]
        for name in ("MinGRU", "products-2H")
    )
    medians = {name: Summary.of(values).median for name, values in times.items()}
    came = Summary.of([a / b for a, b in zip(ours, limit, strict=True)])
    return Line(f"{what}: MinGRU / nn.Linear at {at(load)}", sign, bound, came, medians)


def at(where: Workload | str) -> str:
    """A shape in the words of the table."""
    if isinstance(where, str):
        return where
    return f"({where.batch}, {where.length}, {where.input_size}, {where.hidden_size})"
