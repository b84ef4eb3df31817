"""minrnn on an NVIDIA GPU: are the scans right there, how fast are they and the layers, and is what is promised kept.

Every op is checked on fresh random inputs against the step loop in float64. Then layers and scans are measured beside
what they replace, beside public code and beside the machine's limits, in turns in one process; where a measure has a
bound, it is judged. The parts come in the order of their importance, and what the minutes do not suffice for is named.
Packages to compare with are taken where they are installed. The exit status is 0 where nothing is wrong and all that
was judged is met.

Written to the folder: GPU.json, as it goes; then GPU.md, and the paper's figure 1 for this GPU as GPU.png.

    python benchmarks/gpu.py
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minrnn.bench import check, facts, gpu, gpu_report, gpu_scans, report, sweep, table
from minrnn.bench.gpu import Run
from minrnn.bench.report import say
from minrnn.bench.systems import Workload

BEGIN = time.monotonic()
PAPER = Workload(64, 4096, 256, 256, device="cuda")  # of figure 1 the batch; its width is not known
LENGTHS = tuple(2**power for power in range(7, 17))
LAYERS = ("MinGRU", "nn.GRU", "products-2H", "MinLSTM", "nn.LSTM", "products-3H", "minGRU-pytorch", "mamba")
LOOPS_TO = 4096  # steps
STYLES = report.STYLES | {"mamba": {"color": "#009E73", "marker": "P", "linewidth": 1.6}}


@dataclass(frozen=True)
class Part:
    """A part of the run: its name for --only, what it is about, and the seconds below which it is not begun."""

    name: str
    about: str
    least: float
    measure: Callable[[Run], None]


def plan() -> list[Part]:
    """What is done on a GPU, in the order of its importance."""
    dtypes = ("float32", "bfloat16")
    workers = max(1, min(12, 3 * (os.cpu_count() or 1) // 4))
    measured = partial(gpu.correct, cases=check.cases(), workers=workers)
    parts = [Part("check", "all ops against the step loop", 30, measured)]
    for shape, bound in (((64, 4096, 256), 0.8), ((1, 2**20, 64), 0.45)):
        for dtype in dtypes:
            measured = partial(gpu.bandwidth, shape=shape, dtype=dtype, bound=bound)
            parts.append(Part("bandwidth", f"mingru_scan at {shape} {dtype}", 5, measured))

    def at(load: Workload, dtype: str, least: float, tf32: bool = False) -> Part:
        load = replace(load, dtype=dtype)
        loops = gpu.LOOPS if dtype == "float32" and load.length <= LOOPS_TO and not tf32 else ()
        names = [name for name in (*LAYERS, *loops) if name != "mamba" or load.input_size == load.hidden_size]
        about = f"layers at {table.at(load)} {'tf32' if tf32 else dtype}"
        return Part("layers", about, least, partial(gpu.layers, load=load, names=names, tf32=tf32))

    for load in (PAPER, replace(PAPER, length=1000, input_size=10, hidden_size=100)):
        parts += [at(load, dtype, 10) for dtype in dtypes]
    parts += [at(replace(PAPER, input_size=64, hidden_size=64), dtype, 10) for dtype in dtypes]
    for power in range(11, 17):
        about = f"linear_scan at (8, {2**power}, 1536)"
        parts.append(Part("scan", about, 5, partial(gpu_scans.public_scan, batch=8, channels=1536, length=2**power)))
    parts.append(Part("first-call", "the first calls, and new shapes", 20, gpu.first_calls))
    load = replace(PAPER, length=512)
    parts.append(Part("graph", f"MinGRU as a CUDA graph at {table.at(load)}", 5, partial(gpu.graph, load=load)))
    for dtype in dtypes:
        measured = partial(gpu_scans.selective, batch=8, length=2048, width=1024, states=16, dtype=dtype)
        parts.append(Part("selective", f"selective_scan at (8, 2048, 1024) {dtype}", 10, measured))
    parts.append(at(PAPER, "float32", 10, tf32=True))
    for length in LENGTHS:  # the longest last: they take the most time and memory, and may be too much for a peer
        parts += [at(replace(PAPER, length=length), dtype, 5) for dtype in dtypes if length != PAPER.length]
    return parts


def execute(run: Run, parts: Iterable[Part]) -> bool:
    """Measure the parts that there is time for, write all files, print the short table; whether all is right."""
    say(sweep.HEAD)
    for part in parts:
        if run.left() < part.least:
            run.leave_out(part.about, f"not begun, {run.left():.0f} s were left")
            continue
        say(f"# {part.about} ({run.left():.0f} s left)")
        try:
            part.measure(run)
        except Exception as error:  # of a peer, of a kernel: the other parts may do
            run.leave_out(part.about, error)
        run.release()
        run.result["seconds"] = time.monotonic() - BEGIN
        run.save()
    try:
        draw(run)
    except Exception as error:  # the table is still to come
        run.leave_out("the figure", error)
    run.save()
    result = run.result
    run.path.with_suffix(".md").write_text(gpu_report.markdown(result), encoding="utf-8")
    say("\n" + "\n".join(gpu_report.short(result)))
    wrong = any(each["status"] == "wrong" for each in result["checks"])
    return not wrong and not result["errors"] and all(line["met"] for line in result["lines"])


def draw(run: Run) -> None:
    """The paper's figure 1, time, speed-up and memory against length, float32, at the width with most lengths."""
    points = [point for point in run.result["points"] if point["dtype"] == "float32"]
    widths = [(point["batch"], point["input_size"], point["hidden_size"]) for point in points]
    if not points or importlib.util.find_spec("matplotlib") is None:
        run.leave_out("the figure", "matplotlib is not installed" if points else "no layers were measured")
        return
    most = max(widths, key=widths.count)
    points = sorted((p for p, width in zip(points, widths, strict=True) if width == most), key=lambda p: p["length"])
    batch, inputs, hidden = most
    workload = asdict(Workload(batch, 1, inputs, hidden, device=run.device))
    settings = {"workload": workload, "lengths": sorted({point["length"] for point in points})}
    report.draw(
        run.path.with_suffix(".png"), {"facts": run.result["facts"], "settings": settings, "points": points}, STYLES
    )


def main() -> int:
    parts = plan()
    parser = argparse.ArgumentParser(
        description="Check and measure minrnn on an NVIDIA GPU, and judge what is promised."
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all may take (default: %(default)s)")
    names = list(dict.fromkeys(part.name for part in parts))
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--commit", help="of the sources, for a copy of them that git knows nothing of")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu.py: this needs an NVIDIA GPU, and torch {torch.__version__} finds none")
    stem = "-".join([facts.machine("cuda"), *(given.only or [])])
    run = Run("cuda", given.out / f"{stem}.json", BEGIN + 60 * given.minutes - 20)  # to import torch, and for the files
    run.result["facts"]["commit"] = run.result["facts"]["commit"] or given.commit
    return 0 if execute(run, [part for part in parts if part.name in (given.only or names)]) else 1


if __name__ == "__main__":
    sys.exit(main())
