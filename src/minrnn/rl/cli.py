"""The command line of `minrnn rl`. Each command imports what it needs."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

USAGE = """\
usage: minrnn rl COMMAND ...

  collect    make a dataset of Hopper, HalfCheetah or Walker2d, by seed and checked by hash
  evaluate   let a trained policy act: returns, scores, microseconds per action
  watch      film it

`minrnn rl COMMAND --help` tells more about each. `minrnn train --config rl/...` trains.
"""


def main(arguments: list[str]) -> int:
    """Run `minrnn rl` with these arguments and return its exit status, as `minrnn` itself does."""
    name, *rest = arguments or ["--help"]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(USAGE if asked else f"{USAGE}\nminrnn rl: no command {name!r}\n")
        return 0 if asked else 2
    return COMMANDS[name](rest)


def collect(arguments: list[str]) -> int:
    """Roll behaviour policies, those that come with minrnn or others, into a Minari dataset."""
    parser = argparse.ArgumentParser(
        "minrnn rl collect",
        description=collect.__doc__,
        epilog="What was killed goes on where it was. The number of processes does not change the data.",
    )
    parser.add_argument("--env", required=True, help="such as Hopper-v5, HalfCheetah-v5 or Walker2d-v5")
    parser.add_argument("--quality", default="medium", help="medium or medium-replay (default: medium)")
    parser.add_argument("--steps", type=int, help="at least so many (default: 200000, of medium-replay 100000)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other episodes (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the dataset (default: in Minari's own directory)")
    text = "folder of behaviour policies by environment; where it has none, they are trained into it"
    parser.add_argument("--behaviours", type=Path, metavar="DIR", help=text)
    parser.add_argument("--processes", type=int, default=_cores(), help="that roll at once (default: one per core)")
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"argument --processes: must be at least 1, got {given.processes}")

    from rich.console import Console

    from minrnn.rl.collect import CollectConfig
    from minrnn.rl.collect import collect as run_collect

    config = CollectConfig(given.env, given.quality, given.steps, given.seed)
    run_collect(config, out=given.out, behaviours=given.behaviours, processes=given.processes, console=Console())
    return 0


def evaluate(arguments: list[str]) -> int:
    """`minrnn rl evaluate`, which reads its own arguments."""
    from minrnn.rl.evaluate import main as run_evaluate

    return run_evaluate(arguments)


def watch(arguments: list[str]) -> int:
    """`minrnn rl watch`, which reads its own arguments."""
    from minrnn.rl.watch import main as run_watch

    return run_watch(arguments)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "collect": collect,
    "evaluate": evaluate,
    "watch": watch,
}
