"""What the first calls on a GPU cost: a process of its own, with an empty Triton cache, trains MinGRU once, then with
other batch sizes and lengths, and counts the kernels that are compiled."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minrnn.bench.measure import last_line
from minrnn.layers import MinGRU

CACHE = "TRITON_CACHE_DIR"
CHILD = "from minrnn.bench import first_call; first_call.main()"
# (B, T): the first, and new ones; where sequences fill a GPU, and where time is divided, which has kernels of its own.
SHAPES = (((64, 512), (64, 513), (65, 4097), (24, 640)), ((1, 8192), (2, 5001), (3, 4096)))


def measure(device: str, hidden: int, timeout: float) -> dict[str, Any]:
    """Seconds of the first training steps and of later ones, and seconds and compiled kernels of new shapes.

    Raises:
        RuntimeError: the process failed.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", CHILD, json.dumps({"device": device, "hidden": hidden})]
        about: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
        child = subprocess.run(command, env={**os.environ, CACHE: cache}, **about)
    if child.returncode:
        raise RuntimeError(last_line(child.stderr, child.returncode))
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Measure in this process what the JSON on the command line says, and print it as JSON."""
    words = json.loads(sys.argv[1])
    device, hidden = words["device"], words["hidden"]
    layer = MinGRU(hidden, hidden, batch_first=True, device=device)
    linear = nn.Linear(hidden, 2 * hidden, device=device)

    def seconds(module: nn.Module, batch: int, length: int) -> float:
        x = torch.randn(batch, length, hidden, device=device, requires_grad=True)
        _wait(device)
        begin = time.perf_counter()
        result = module(x)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        _wait(device)
        return time.perf_counter() - begin

    found: dict[str, Any] = {"first": {}, "again": {}, "new": {}, "kernels": 0, "kernels_of_new": 0}
    for first, *new in SHAPES:
        for shape in (first, *new):  # the device and the products, which are not ours, are there before
            seconds(linear, *shape)
        before = _kernels()
        for key in ("first", "again"):
            found[key][str(first)] = seconds(layer, *first)
        compiled = _kernels()
        found["new"] |= {str(shape): seconds(layer, *shape) for shape in new}
        found["kernels"] += compiled - before
        found["kernels_of_new"] += _kernels() - compiled
    sys.stdout.write(json.dumps(found) + "\n")


def _kernels() -> int:
    """Compiled kernels in the cache."""
    return len(list(Path(os.environ[CACHE]).glob("*/*.cubin")))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
