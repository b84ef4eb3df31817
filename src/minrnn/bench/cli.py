"""The command line of `minrnn bench`."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import torch

from minrnn.bench import facts, mixers, report, sweep, table
from minrnn.bench.systems import DTYPES, SYSTEMS, Workload, installed

DEFAULT_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SWEEP_ONLY = {"mixers", "batch", "lengths", "input_size", "hidden_size", "layers", "dtype", "systems"}
EPILOG = f"""\
Measured: forward + backward with the same output gradient for all, systems alternated round by round in one
process, medians and quartiles; peak memory of one step in a fresh process each. torch's allocator is given huge
pages, for all systems alike; {facts.HUGE_PAGES}=0 in the environment leaves it without. The result says which it was.
Layers and peers: {", ".join(name for name in SYSTEMS if not SYSTEMS[name].mixes)}.
Mixers and peers: {", ".join(name for name in SYSTEMS if SYSTEMS[name].mixes)}.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `minrnn bench` with these arguments (None: those of the process) and return its exit status.

    0: done; 1: something that `--table` or `--mixers` promises did not come. Bad arguments exit with 2 and a sentence,
    as argparse does.
    """
    parser = _parser()
    given = vars(parser.parse_args(argv))  # only what was given: nothing that --table would ignore passes unnoticed
    directory, repeats = given.get("out", Path("minrnn-bench")), given.get("repeats", 15)
    as_table = given.get("table", False)
    if ignored := given.keys() & (SWEEP_ONLY if as_table else {"rows"}):
        flag = "--" + sorted(ignored)[0].replace("_", "-")
        parser.error(f"{flag} has no meaning {'with' if as_table else 'without'} --table")
    if directory.exists() and not directory.is_dir():
        parser.error(f"argument --out: must be a directory, got {directory}")
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    if as_table:
        plan = table.Plan(repeats, given.get("first_layer", False))
        return 0 if table.run(given.get("rows"), plan, directory / f"{facts.machine()}.json") else 1
    as_mixers = given.get("mixers", False)
    names = given.get("systems", installed(mixes=as_mixers))
    for name in names:
        if reason := SYSTEMS[name].missing():
            parser.error(f"argument --systems: {reason}")
        if SYSTEMS[name].mixes != as_mixers:
            parser.error(f"argument --systems: {name} is compared {'without' if as_mixers else 'with'} --mixers")
    fields = ("batch", "input_size", "hidden_size", "layers", "dtype", "first_layer")
    lengths = tuple(dict.fromkeys(given.get("lengths", mixers.LENGTHS if as_mixers else DEFAULT_LENGTHS)))
    default = mixers.WORKLOAD if as_mixers else Workload()
    load = dataclasses.replace(default, **{name: given[name] for name in fields if name in given})
    if as_mixers and (load.input_size != load.hidden_size or load.layers != 1):
        parser.error("a mixer has one layer, and --hidden-size is its --input-size")
    plan = sweep.Sweep(load, lengths, tuple(names), repeats)
    as_growth = "lengths" in given or not as_mixers
    stem = directory / f"{facts.machine()}{'-mixers' if as_mixers else ''}{'-lengths' if as_growth else ''}"
    result = sweep.run(plan, stem.with_suffix(".json"))
    kept = not (as_mixers and mixers.of_workload(plan)) or mixers.judge(result, stem.with_suffix(".json"))
    report.say(f"wrote {stem.with_suffix('.json')}")
    if not as_growth:
        return 0 if kept else 1
    if importlib.util.find_spec("matplotlib"):
        draw = mixers.draw if as_mixers else report.draw
        draw(stem.with_suffix(".png"), result)
        report.say(f"wrote {stem.with_suffix('.png')}")
    else:
        report.say("no figure: matplotlib is not installed (pip install minrnn[train])")
    return 0 if kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "minrnn bench",
        description="Time and peak memory of a training step against length: minrnn's layers or mixers, and others.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = Workload()

    def number(flag: str, default: object, text: str) -> None:
        parser.add_argument(flag, type=_positive, metavar="N", help=f"{text} (default {default})")

    number("--batch", defaults.batch, "sequences in a batch")
    text = f"lengths to measure (default {' '.join(map(str, DEFAULT_LENGTHS))})"
    parser.add_argument("--lengths", type=_positive, nargs="+", metavar="N", help=text)
    number("--input-size", defaults.input_size, "width of the input")
    number("--hidden-size", defaults.hidden_size, "width of the state")
    number("--layers", defaults.layers, "layers")
    text = f"bfloat16 and float16: under autocast, with float32 weights (default {defaults.dtype})"
    parser.add_argument("--dtype", choices=list(DTYPES), help=text)
    text = "the input needs no gradient, as in a network's first layer (default: it does)"
    parser.add_argument("--first-layer", action="store_true", help=text)
    text = "what to compare; the products alone, their limit, are always measured too (default: all that are installed)"
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), metavar="NAME", help=text)
    text = "compare the mixers instead, at batch 8, length 2048, width 256; with --lengths, draw how their cost grows"
    parser.add_argument("--mixers", action="store_true", help=text)
    number("--threads", "torch's", "threads")
    number("--repeats", 15, "paired repeats; slow systems get fewer")
    text = "where the JSON and the figure go (default minrnn-bench)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "measure the table of what minrnn promises instead; goes on where an earlier run stopped"
    parser.add_argument("--table", action="store_true", help=text)
    text = f"with --table: only these rows, again if need be ({', '.join(table.ROWS)})"
    parser.add_argument("--rows", nargs="+", choices=list(table.ROWS), metavar="ROW", help=text)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number
