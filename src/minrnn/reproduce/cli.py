"""The command line of `minrnn reproduce`."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from minrnn._console import say
from minrnn.reproduce import report
from minrnn.reproduce.cells import SCALES, Cell, Results, Scale
from minrnn.reproduce.experiments import EXPERIMENTS, cells
from minrnn.reproduce.page import find
from minrnn.reproduce.runner import run

EPILOG = f"""\
Experiments:
{chr(10).join(f"  {name:<10}{each.title} ({each.source})" for name, each in EXPERIMENTS.items())}

Every cell, one system with one seed, is a JSON file in the folder of results. One that is there is not measured again;
one that was interrupted goes on where it was. The report can be built in the middle of a run: --report.
"""


def main(argv: list[str]) -> int:
    """Run `minrnn reproduce` with these arguments and return its exit status.

    0: all cells are there; 1: some failed. Bad arguments exit with 2 and a sentence, as argparse does.
    """
    parser = argparse.ArgumentParser(
        "minrnn reproduce",
        description="Repeat the experiments of the paper; report.html and report.md have its numbers beside ours.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which experiments (default: all)")
    parser.add_argument("--scale", default="laptop", help=f"{', '.join(SCALES)} (default: laptop)")
    parser.add_argument("--systems", nargs="+", default=[], metavar="SYSTEM", help="only these systems")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/SCALE)")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="for lm and best, Tiny Shakespeare (default: it is downloaded); for rl at scale paper, a directory of "
        "D4RL's files",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process (default: 1)")
    parser.add_argument("--report", action="store_true", help="measure nothing, build the report from what is there")
    given = parser.parse_args(argv)
    if given.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {given.jobs}")
    try:
        wanted = cells(given.experiments or list(EXPERIMENTS), given.scale, given.systems)
    except ValueError as error:
        parser.error(str(error))
    if given.report and (given.experiments or given.systems or given.data):
        parser.error("argument --report: the page is of all that is there; leave out EXPERIMENT, --systems and --data")
    if given.data:
        kinds = {cell.reads for cell in wanted} - {None}
        if not kinds:
            parser.error("argument --data: none of these experiments reads it at this scale; leave it out")
        if len(kinds) > 1:
            parser.error("argument --data: a file for lm and best, a directory for rl: name them apart")
        (kind,) = kinds
        if not (Path(given.data).is_file() if kind == "file" else Path(given.data).is_dir()):
            parser.error(f"argument --data: must be a {kind}, got {given.data!r}")
    console = Console()
    out = given.out or Path("results") / given.scale
    results, of_scale = Results(out), cells(list(EXPERIMENTS), given.scale)
    if others := _of_other_scales(results, given.scale, of_scale):
        parser.error(f"argument --out: must be a folder of scale {given.scale}, got {out}, which has {others[0]}")
    failed = 0
    if not given.report:
        with _ended_as_by_ctrl_c():
            records = run(wanted, results, jobs=given.jobs, data=given.data, console=console)
        failed = sum("error" in record for record in records)
    with results.claim("report", console):
        report.build(results, given.scale, of_scale, out)
    say(console, f"{out / 'report.html'} has the results")
    if failed:
        say(console, f"{failed} cells failed: the report names them; the same command tries them again")
    return 1 if failed else 0


def _of_other_scales(results: Results, scale: Scale, of_scale: Sequence[Cell]) -> list[str]:
    """What the folder has of cells that are not of this scale, in words."""
    return [
        f"{cell.name} of scale {other}: results are not mixed"
        for other in SCALES if other != scale
        for cell in cells(list(EXPERIMENTS), other)
        if cell not in of_scale and find(results, cell).state not in ("missing", "refused")
    ]  # fmt: skip


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that goes away, end the process by an exception, so that all is saved."""
    wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {each: handler for each in wanted if (handler := signal.getsignal(each)) != signal.SIG_IGN}  # by nohup

    def end(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGTERM:  # a terminal may say it more than once; who sends SIGTERM again wants it at once
            signal.signal(signum, signal.SIG_IGN)
        sys.exit(128 + signum)

    for signum in before:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
