"""Peak memory of one training step: on a CPU in a process of its own, which `measure.peak_memory` starts.

A step at (1, 2, input) comes first, so that code, thread pools and weights are there; the input is made; then one step
at the full shape, the output held. Its gradient, unlike that of `y.sum()`, has a number for each of its own; it is made
on the way back and owned by nobody, as that of a loss or of the next layer. What counts is the peak during that step
less the level before it: of the resident set, or of what torch's allocator has given out on a GPU.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minrnn.bench import measure, systems

STATUS = Path("/proc/self/status")
METHOD = "VmHWM reset through /proc/self/clear_refs" if STATUS.exists() else "ru_maxrss"
GPU_METHOD = "torch.cuda.max_memory_allocated"


def level(device: str) -> int:
    """Bytes in use now: allocated on a GPU, resident on a CPU (Linux), else the highest level so far."""
    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if STATUS.exists() else _highest()


def reset_peak(device: str) -> None:
    """Forget the highest level so far, where the system can."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes in use at the highest since `reset_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else _highest()


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _highest() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_one_step(name: str, load: systems.Workload) -> int:
    """Bytes that one step of the named system adds at its peak."""
    module = systems.build([name], load)[name]
    _step(module, replace(load, batch=1, length=2).input(), load)
    input = load.input()
    before = level(load.device)
    reset_peak(load.device)
    _step(module, input, load)
    return peak(load.device) - before


def _step(module: nn.Module, input: torch.Tensor, load: systems.Workload) -> None:
    held = measure.outputs(module, input, load)
    _Loss.apply(*held).backward()


class _Loss(torch.autograd.Function):
    """The sum of all numbers, but with a gradient that takes memory."""

    @staticmethod
    def forward(ctx: Any, *results: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*results)
        return torch.stack([result.sum() for result in results]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ones_like(result) for result in ctx.saved_tensors)


def main() -> None:
    """Print the bytes for the step that the JSON on the command line describes."""
    arguments = json.loads(sys.argv[1])
    if torch.get_num_threads() != arguments["threads"]:  # to set what is set already adds 5% to nn.GRU's peak
        torch.set_num_threads(arguments["threads"])
    sys.stdout.write(f"{of_one_step(arguments['name'], systems.Workload(**arguments['load']))}\n")
