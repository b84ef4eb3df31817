"""How time, memory and bandwidth are measured: alternated rounds, paired ratios, peak memory in a fresh process."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from minrnn.bench.systems import Workload

MEGABYTE = 1e6
LEAST_ROUNDS = 3
LONG, SHORTEST = 0.25, 0.01  # seconds on a GPU: of a step that is timed alone, and of many steps together
PEAK_MEMORY = "from minrnn.bench import memory; memory.main()"
Times = dict[str, list[float]]  # seconds, one for each round that the system took part in
Step = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of `count` numbers."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, numbers: list[float]) -> "Summary":
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0], 1)
        q1, median, q3 = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, q1, q3, len(numbers))


def host_seconds(step: Step) -> float:
    """Seconds of one step by this machine's clock."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def gpu_seconds(step: Step) -> float:
    """Seconds of one step on the current GPU, between events: the mean of steps in a row, as a training run has them.

    They follow a step that is not counted, with which the allocator finds its blocks again after another system's turn;
    a step of more than `LONG` is counted at once.
    """

    def between(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    first = between(1)
    return first if first > LONG else between(math.ceil(SHORTEST / max(first, SHORTEST / 1000)))


def clock(device: str) -> Callable[[Step], float]:
    """What times a step on this device."""
    return host_seconds if device == "cpu" else gpu_seconds


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    budget: float | None = None,
    seconds: Callable[[Step], float] = host_seconds,
) -> Times:
    """Run the steps in turn, `rounds` times after one warm-up round, every second round backwards.

    A machine that slows down for a while then slows all sides, and `ratio` compares only what ran in the same round.
    A step that has used up its `budget` of seconds drops out once it has `LEAST_ROUNDS` rounds. `seconds` runs a step
    and says how long it takes.
    """
    times: Times = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for step in steps.values():
        step()
    for turn in range(rounds):
        names = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        for name in names:
            if budget is not None and turn >= LEAST_ROUNDS and spent[name] > budget:
                continue
            begin = time.perf_counter()
            times[name].append(seconds(steps[name]))
            spent[name] += time.perf_counter() - begin
    return times


def ratio(times: Times, above: str, below: str) -> Summary:
    """Summary of the paired ratios time(above) / time(below), over the rounds in which both ran."""
    return Summary.of([a / b for a, b in zip(times[above], times[below], strict=False)])


class Gradients(dict[tuple, Tensor]):
    """Output gradients, made once and shared: every system of a comparison is given the very same tensor."""

    def like(self, output: Tensor) -> Tensor:
        key = (output.shape, output.dtype)
        if key not in self:
            self[key] = torch.randn(output.shape, dtype=output.dtype, device=output.device)
        return self[key]


def outputs(module: nn.Module, input: Tensor, load: Workload) -> list[Tensor]:
    """The output of a layer, without its state, or all outputs of `Products`."""
    dtype = torch.float16 if load.dtype == "float16" else torch.bfloat16
    with torch.autocast(input.device.type, dtype, enabled=load.autocasts):
        result = module(input)
    if isinstance(result, tuple):
        result = result[0]
    return result if isinstance(result, list) else [result]


def training_step(module: nn.Module, input: Tensor, gradients: Gradients, load: Workload) -> Callable[[], None]:
    """Forward and backward of a module; fresh gradients of the weights and, if it needs one, of the input."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        input.grad = None
        results = outputs(module, input, load)
        torch.autograd.backward(results, [gradients.like(result) for result in results])

    return step


def training_steps(modules: Mapping[str, nn.Module], load: Workload) -> dict[str, Callable[[], None]]:
    """One step for each system, on the same input and the same output gradient."""
    input, gradients = load.input(), Gradients()
    return {name: training_step(module, input, gradients, load) for name, module in modules.items()}


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes per second, read and written, of `copy_` between two buffers that were touched before."""
    source = torch.randn(int(megabytes * MEGABYTE) // 4, device=device)
    target = torch.ones_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, 9, seconds=clock(device))["copy"]
    return 2 * source.nbytes / statistics.median(times)


def peak_memory(name: str, load: Workload) -> float:
    """Peak memory in bytes of one training step: see `minrnn.bench.memory`, which runs in a fresh process.

    Raises:
        RuntimeError: the process failed (out of memory, or a system that cannot run this workload).
    """
    arguments = json.dumps({"name": name, "threads": torch.get_num_threads(), "load": asdict(load)})
    child = subprocess.run([sys.executable, "-c", PEAK_MEMORY, arguments], capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"peak memory of {name}: {last_line(child.stderr, child.returncode)}")
    return float(child.stdout)


def last_line(errors: str, status: int) -> str:
    """Why a process failed: the end of what it wrote, or its exit status."""
    return (errors.strip().splitlines() or [f"exit status {status}"])[-1]
