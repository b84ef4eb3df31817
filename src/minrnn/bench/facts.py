"""Where and with what a benchmark ran: the facts that every result file begins with."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import minrnn
from minrnn.bench.memory import GPU_METHOD, METHOD
from minrnn.ops import describe

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
CHANGED = "-changed"
PEERS = ("minGRU-pytorch", "accelerated-scan", "mamba-ssm", "mambapy", "transformers", "xlstm")


def gather(device: str = "cpu") -> dict[str, object]:
    """Machine, versions, commit, threads and allocator setting of this process, and what the GPU is if it runs on
    one."""
    return {
        "machine": machine(device),
        "cpu": _cpu(),
        "cores": _cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": has_bf16(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "minrnn": minrnn.__version__,
        "commit": _commit(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "backends": describe(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "memory_method": METHOD if device == "cpu" else GPU_METHOD,
        "gpu": None if device == "cpu" else _gpu(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine(device: str = "cpu") -> str:
    """A name for result files: the processor and its cores, or the GPU."""
    name = f"{_cpu()} {_cores()} cores" if device == "cpu" else torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def huge_pages() -> bool:
    """Whether torch's CPU allocator asks for huge pages: its own setting, off unless the environment turns it on."""
    return os.environ.get(HUGE_PAGES) == "1"


def use_huge_pages() -> bool:
    """Give torch's CPU allocator huge pages unless the environment says otherwise, and return whether it has them.

    Fresh memory is a large part of a training step's time, and they take a third to a half of it away. torch reads the
    variable at its first allocation.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    return huge_pages()


def has_bf16() -> bool:
    """Whether the processor has bfloat16 instructions (x86-64: avx512_bf16, amx_bf16; Arm: bf16)."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_cpuinfo("flags", "Features").split()))


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first value under one of these keys of Linux's /proc/cpuinfo, or nothing."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(device: str) -> dict[str, object]:
    """The GPU, what drives it, and whether its float32 products are rounded to TF32: by torch's own settings."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "tf32_in_matmul": torch.get_float32_matmul_precision() != "highest",
        "tf32_in_cudnn": torch.backends.cudnn.allow_tf32,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def memory_gb() -> float | None:
    """The machine's memory in 10^9 bytes, if it says."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # what this process has loaded, whatever lies there later
def _commit() -> str | None:
    """The commit of the checkout that minrnn runs from, marked if sources were changed; None for an installed copy."""
    package = Path(minrnn.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return None
    return f"{git('rev-parse', 'HEAD')}{CHANGED if git('status', '--porcelain', '--', '.') else ''}"
