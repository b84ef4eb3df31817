"""The parts of benchmarks/gpu.py: what is checked, measured and judged on an NVIDIA GPU.

A part takes a `Run` and adds to its result. All but the CUDA graph does without a GPU too: where the device is the CPU,
time is that of the host's clock, and memory that of the resident set.
"""

import contextlib
import gc
import importlib.util
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.bench import check, facts, first_call, measure, memory, report, sweep, systems, table
from minrnn.bench.measure import Step, Summary, Times
from minrnn.bench.report import say
from minrnn.bench.systems import SYSTEMS, Workload
from minrnn.bench.table import Line, Skipped
from minrnn.ops import last_backend, mingru_scan

LOOPS = ("GRU-loop", "LSTM-loop")
# Of the time that is left, what one system may take at one shape, and how many of its steps that is.
SHARES, PASSES = {"MinGRU": 0.25, "nn.GRU": 0.25}, 8
PEERS = ("minGRU_pytorch", "accelerated_scan", "mamba_ssm", "mambapy")
THEIRS = (*LOOPS, "nn.", "products", "minGRU-pytorch", "accelerated_scan", "mamba_ssm", "mambapy")  # names begin so
# What a training step's scan moves at least, in (B, T, H): forward and backward read the projection, one of them h and
# its gradient too; h and the projection's gradient are written.
MOVED = {"MinGRU": 3 + 6, "MinLSTM": 4 + 8}


@dataclass
class Run:
    """What is measured where, until when, and what was found so far.

    The result's keys: facts, missing (packages), seed (of the checks), copy_gb_per_s, checks, points (of layers),
    scans, lines (promised and what came), left_out (and why), errors (those of it that are ours), backends, seconds;
    first_call and graph if they ran.
    """

    device: str
    path: Path  # of the JSON
    end: float  # by time.monotonic
    rounds: int = 9
    budget: float = 0.5  # seconds of a system at one shape, after which it drops out of the rounds
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
        self.result |= {"facts": facts.gather(self.device), "missing": missing, "seed": random.randrange(2**31)}
        self.result |= {key: [] for key in ("checks", "points", "scans", "lines", "left_out", "errors")}
        self.result |= {"backends": {}, "seconds": 0.0}
        megabytes = 4 if self.device == "cpu" else 1024
        self.result["copy_gb_per_s"] = measure.copy_bandwidth(megabytes, device=self.device) / 1e9
        self.release()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def save(self) -> None:
        report.write_json(self.path, self.result)

    def leave_out(self, what: str, why: object) -> None:
        """Name what is not measured. An exception in what is ours, except want of memory, is an error of the run."""
        text = (str(why).splitlines() or [""])[0][:200]
        expected = not isinstance(why, Exception) or isinstance(why, Skipped | torch.OutOfMemoryError)
        entry = f"{what}: {text if expected else f'{type(why).__name__}: {text}'}"
        self.result["left_out"].append(entry)
        if not expected and not what.startswith(THEIRS):
            self.result["errors"].append(entry)
        say(f"left out: {entry}")

    def ran(self, name: str) -> None:
        """Keep on what backend the scan ran that was just called."""
        self.result["backends"][name] = last_backend()

    def judge(self, line: Line) -> None:
        self.result["lines"].append({**asdict(line), "met": line.met})
        say(str(line))

    def alternate(self, steps: Mapping[str, Step]) -> Times:
        return measure.alternate(steps, self.rounds, self.budget, measure.clock(self.device))

    def release(self) -> None:
        """Give back what no one holds any more."""
        gc.collect()
        if self.device != "cpu":
            with contextlib.suppress(RuntimeError):  # CUDA is gone after an illegal access; what was found is not
                torch.cuda.empty_cache()


def correct(run: Run, cases: list[check.Case], workers: int, backend: str | None = None) -> None:
    """All ops against the step loop."""
    seed, results = run.result["seed"], run.result["checks"]
    for result in check.run(cases, run.device, seed, 0.35 * run.left(), workers, backend):
        results.append(result)
        if result["status"] != "right":
            say(f"{result['status']}: {result['case']}: {result['why']}")
        run.save()
    if len(results) < len(cases):
        done = {result["case"] for result in results}
        names = [str(case) for case in cases if str(case) not in done]
        run.leave_out(f"{len(names)} of {len(cases)} checks, from {names[0]} on", "no time")


def bandwidth(run: Run, shape: tuple[int, int, int], dtype: str, bound: float) -> None:
    """mingru_scan against a copy of as many bytes as its inputs and outputs have, forward and backward."""
    batch, length, hidden = shape
    projection = torch.randn(batch, length, 2 * hidden, dtype=systems.DTYPES[dtype], device=run.device)
    projection.requires_grad_()
    states, _ = mingru_scan(projection)
    run.ran("mingru_scan")
    gradient = torch.randn_like(states)

    def forward() -> None:
        with torch.no_grad():
            mingru_scan(projection)

    def backward() -> None:
        torch.autograd.grad(states, projection, gradient, retain_graph=True)

    source = torch.randn(3 * gradient.nbytes // 4, device=run.device)
    target = torch.empty_like(source)
    for name, moved, step in (("forward", 3, forward), ("backward", 6, backward)):
        half = moved * gradient.nbytes // 8  # in float32, read and written
        times = run.alternate({"copy_": lambda n=half: target[:n].copy_(source[:n]), "mingru_scan": step})
        where = f"{shape} {dtype}"
        run.judge(table.compared(times, ">=", bound, "copy_", "mingru_scan", where, f"bandwidth {name}: "))


def layers(run: Run, load: Workload, names: Iterable[str], tf32: bool = False) -> None:
    """Time and memory of one training step, and time of a forward pass alone, of every system that can do it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else before)
    try:
        _layers(run, load, names, "tf32" if tf32 else load.dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def _layers(run: Run, load: Workload, names: Iterable[str], dtype: str) -> None:
    where = f"{table.at(load)} {dtype}"
    peaks: dict[str, float] = {}
    for name in names:
        cost = PASSES * _expected(run, name, load, dtype)
        if SYSTEMS[name].missing():
            continue
        if cost > SHARES.get(name, 0.1) * run.left():
            run.leave_out(f"{name} at {where}", f"no time for the {cost:.0f} s that it would take")
        elif _too_wide(run, name, load):
            run.leave_out(f"{name} at {where}", "no memory for its gradient beside the others'")
        else:
            try:
                peaks[name] = memory.of_one_step(name, load)
                if name in (*MOVED, "mamba"):
                    run.ran(name)
            except Exception as error:
                run.leave_out(f"{name} at {where}", error)
            run.release()
    times, forwards, modules = _timed(run, load, peaks, where)
    points = []
    for name in times:
        over = [other for other in SYSTEMS[name].over if other in times]
        limit = SYSTEMS[name].limit
        point = {
            **{key: getattr(load, key) for key in ("batch", "length", "input_size", "hidden_size")},
            "dtype": dtype,
            "system": name,
            "gives": _output_dtype(modules[name], load),
            "parameters": sum(parameter.numel() for parameter in modules[name].parameters()),
            "state_size": None,
            "seconds": asdict(Summary.of(times[name])),
            "forward": asdict(Summary.of(forwards[name])) if name in forwards else None,
            "over_limit": asdict(measure.ratio(times, name, limit)) if limit in times else None,
            "over_floor": _over_floor(run, load, times, name),
            "speedup_over": {other: asdict(measure.ratio(times, other, name)) for other in over},
            "peak_bytes": peaks[name],
        }
        points.append(point)
        say(sweep.row(point))
    run.result["points"] += points
    judge_layers(run, load, times, peaks, where)


def _timed(run: Run, load: Workload, peaks: dict[str, float], where: str) -> tuple[Times, Times, dict[str, nn.Module]]:
    """`_together`; who fails is left out, and where there is no room for all, the largest first."""
    while peaks:
        try:
            return _together(run, load, peaks)
        except Exception as error:
            full, named = isinstance(error, torch.OutOfMemoryError), getattr(error, "__notes__", [])
            if not full and not named:
                raise
            name = max(peaks, key=peaks.__getitem__) if full else named[0]
            run.leave_out(f"{name} at {where}", error)
            del peaks[name]
        run.release()
    return {}, {}, {}


def _together(run: Run, load: Workload, names: Iterable[str]) -> tuple[Times, Times, dict[str, nn.Module]]:
    """Times of training steps and of forward passes, and the systems."""
    modules, x, gradients = systems.build(names, load), load.input(), measure.Gradients()
    steps = {name: measure.training_step(module, x, gradients, load) for name, module in modules.items()}
    forwards = {name: _forward(module, x, load) for name, module in modules.items() if name not in LOOPS}
    both = ({name: partial(_named, name, step) for name, step in own.items()} for own in (steps, forwards))
    times, forward_times = map(run.alternate, both)
    return times, forward_times, modules


def _named(name: str, step: Step) -> None:
    """A step whose exception says whose it is."""
    try:
        step()
    except Exception as error:
        error.add_note(name)
        raise


def _forward(module: nn.Module, x: Tensor, load: Workload) -> Step:
    def step() -> None:
        with torch.no_grad():
            measure.outputs(module, x, load)

    return step


def _output_dtype(module: nn.Module, load: Workload) -> str:
    """What an output is: under autocast to bfloat16, cuDNN's layers may compute in float16."""
    load = replace(load, batch=1, length=2)
    with torch.no_grad():
        return str(measure.outputs(module, load.input(), load)[0].dtype).removeprefix("torch.")


def _expected(run: Run, name: str, load: Workload, dtype: str) -> float:
    """Seconds of a step, by how long one was at the longest length so far."""
    shape = (load.batch, load.input_size, load.hidden_size, dtype)
    seen = [
        (point["length"], point["seconds"]["median"])
        for point in run.result["points"]
        if point["system"] == name
        and (point["batch"], point["input_size"], point["hidden_size"], point["dtype"]) == shape
    ]
    length, seconds = max(seen, default=(1, 0.0))
    return seconds * load.length / length


def _too_wide(run: Run, name: str, load: Workload) -> bool:
    """Whether the gradient of a limit's output, which stays while all are measured, would crowd out the systems."""
    if not name.startswith("products") or run.device == "cpu":
        return False
    width = int(name[-2]) * load.hidden_size * (2 if load.autocasts else 4)
    return load.batch * load.length * width > torch.cuda.get_device_properties(run.device).total_memory / 16


def _over_floor(run: Run, load: Workload, times: Times, name: str) -> float | None:
    """Time over that of the products and of a copy of what the scan must move."""
    limit = SYSTEMS[name].limit
    if limit not in times:
        return None
    moved = MOVED[name] * load.batch * load.length * load.hidden_size * (2 if load.autocasts else 4)
    floor = Summary.of(times[limit]).median + moved / run.result["copy_gb_per_s"] / 1e9
    return Summary.of(times[name]).median / floor


def judge_layers(run: Run, load: Workload, times: Times, peaks: Mapping[str, float], where: str) -> None:
    """What is promised of MinGRU against nn.GRU at every shape, and against the loop at one."""
    if {"MinGRU", "nn.GRU"} <= times.keys():
        bound = 10 if (load.length, load.hidden_size) == (4096, 256) else 1
        run.judge(table.compared(times, ">=", bound, "nn.GRU", "MinGRU", where))
        both = {name: peaks[name] for name in ("MinGRU", "nn.GRU")}
        came = Summary.of([both["MinGRU"] / max(both["nn.GRU"], 1)])
        run.judge(Line(f"peak memory, MinGRU / nn.GRU at {where}", "<=", 0.6, came, both))
    if {"MinGRU", "GRU-loop"} <= times.keys() and (load.length, load.hidden_size) == (4096, 64):
        run.judge(table.compared(times, ">=", 1000, "GRU-loop", "MinGRU", where))


def first_calls(run: Run, hidden: int = 256) -> None:
    """What a first call costs, and that a new batch size or length compiles nothing."""
    run.result["first_call"] = found = first_call.measure(run.device, hidden, run.left())
    for name, bound, values in (
        ("first training step of MinGRU, nothing compiled before, s", 3, found["first"].values()),
        ("kernels compiled for a new B or T", 0, [found["kernels_of_new"]]),
    ):
        run.judge(Line(name, "<=", bound, Summary.of([float(max(values))]), {}))


def graph(run: Run, load: Workload) -> None:
    """A training step of MinGRU as a CUDA graph: the same gradients on new input, and the time of a replay."""
    if run.device == "cpu":
        raise Skipped("a CPU has no CUDA graphs")
    module, x = systems.build(["MinGRU"], load)["MinGRU"], load.input()
    step = measure.training_step(module, x, measure.Gradients(), load)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    own = _gradients(x, module)  # the graph writes here
    with torch.no_grad():
        x.normal_()
    captured.replay()
    replayed = [grad.clone() for grad in own]
    step()
    off = max(check.error(a, b) for a, b in zip(replayed, _gradients(x, module), strict=True))
    times = run.alternate({"replay": captured.replay, "eager": step})
    medians = {name: Summary.of(seconds).median for name, seconds in times.items()}
    run.result["graph"] = {"where": table.at(load), "error": off, "seconds": medians}
    run.judge(
        Line(f"CUDA graph: gradients of a replay, off by, at {table.at(load)}", "<=", 1e-5, Summary.of([off]), {})
    )


def _gradients(x: Tensor, module: nn.Module) -> list[Tensor]:
    return [leaf.grad for leaf in (x, *module.parameters()) if leaf.grad is not None]
