"""The GPU kernels, in Triton: compiled on the user's machine when first called, without nvcc.

What is here decides whether they can run and launches them; Triton itself is imported with the first kernel.
"""

import functools
import importlib
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

_OLDEST = (3, 6)  # the lowest Triton that the tests have run with
_CAPABILITY = (8, 0)  # what Triton supports, and what has bfloat16 and asynchronous copies


def interpreted() -> bool:
    """Whether Triton runs its kernels step by step on the CPU, as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot serve a tensor on `device`, in one sentence, or None."""
    if device.type == "cpu" and interpreted():
        return _no_triton()
    if device.type != "cuda":
        return f"the triton backend serves NVIDIA GPUs (a CPU only with TRITON_INTERPRET=1), got a tensor on {device}"
    if torch.version.hip:
        return "the triton backend serves NVIDIA GPUs, and this is a build of PyTorch for AMD"
    return _no_triton() or _no_compiler() or _too_old(device.index)


# A graph of torch.compile takes the answer as it is: it cannot trace the search for packages and devices.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _no_triton() -> str | None:
    # Asked of the module: not every package that brings it is called "triton", and one that is may not load.
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        missing = error.name == "triton"
        return "Triton is not installed (pip install triton)" if missing else f"Triton does not load ({error})"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton {version} is too old: {'.'.join(map(str, _OLDEST))} or newer is needed"
    return None


@functools.cache
def _no_compiler() -> str | None:
    """Triton builds the function that launches a kernel, a page of C, on the machine where it runs."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (install gcc or clang, or set CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for them
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").exists():
        return f"Triton finds no Python.h in {headers} (install Python's headers: python3-dev, python3-devel)"
    return None


@functools.cache
def _too_old(index: int | None) -> str | None:
    have = torch.cuda.get_device_capability(index)
    if have >= _CAPABILITY:
        return None
    return f"Triton needs a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, this has {have[0]}.{have[1]}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once without sharing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run `programs` programs of a kernel on the device of its tensors, in the current stream; none if there are none.

    One dimension of programs, since only the first may be longer than 65,535.
    """
    if programs == 0:
        return
    if device.type != "cuda":
        kernel[(programs,)](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **options)
