"""Which backend serves a tensor. It follows from the tensor's device and dtype; `MINRNN_BACKEND` or an argument forces
one."""

import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from minrnn._shapes import check_device, check_shape, check_tensor, shape_error
from minrnn.ops import native, triton

BACKENDS = ("native", "triton", "parallel", "reference")
_COMPLEX = (torch.complex64, torch.complex128)
_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_last: str | None = None
_warned: set[str] = set()


def why_not(backend: str, tensor: Tensor, *, gpu: bool = True) -> str | None:
    """One sentence that says why `backend` cannot serve `tensor`, or None if it can; `gpu`: whether the operation has
    GPU kernels."""
    if backend == "triton":
        return triton.unavailable(tensor.device) if gpu else "it has no GPU kernels"
    if backend != "native":
        return None
    if tensor.device.type != "cpu":
        return f"the native backend serves CPU tensors, got one on {tensor.device}"
    return native.unavailable()


def forced(argument: str | None) -> str | None:
    """The backend that the caller or else the environment asks for, if either does."""
    return argument or os.environ.get("MINRNN_BACKEND") or None


def choose(forced: str | None, tensor: Tensor, caller: str, *, gpu: bool = True) -> str:
    """The backend for `tensor`: the forced one, or the fastest that serves its device; `gpu`: whether the operation has
    GPU kernels.

    Raises ValueError for a name that is not a backend, and for a forced backend that cannot serve the tensor.
    """
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"{caller}: backend must be one of {BACKENDS}, got {forced!r}")
        reason = why_not(forced, tensor, gpu=gpu)
        if reason:
            raise ValueError(f"{caller}: backend {forced!r} was asked for, but {reason}")
        return _ran(forced)
    if tensor.device.type == "cpu":
        reason = native.unavailable()
        if reason is None:
            return _ran("native")
        _warn_once(f"minrnn runs on plain PyTorch, several times slower than its C library, because {reason}")
    elif gpu and tensor.device.type == "cuda":
        reason = triton.unavailable(tensor.device)
        if reason is None:
            return _ran("triton")
        _warn_once(f"minrnn runs on plain PyTorch, several times slower than its GPU kernels, because {reason}")
    return _ran("parallel")


def last_backend() -> str | None:
    """The backend that the latest scan in this process ran on, or None before the first."""
    return _last


def describe() -> dict[str, str]:
    """What each backend says of itself, for `minrnn info`."""
    if name := forced(None):
        return {name: "in use for every tensor: forced by MINRNN_BACKEND"}
    return {
        "native": native.unavailable()
        or f"in use for CPU tensors (C, {native.instruction_set()}, {native.threading()})",
        "triton": _gpu(),
        "parallel": "in use for every other device" + ("" if native.unavailable() is None else ", and for CPU tensors"),
        "reference": "the step loop: on request only",
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU is there for it"
    device = torch.device("cuda", torch.cuda.current_device())
    return triton.unavailable(device) or f"in use for CUDA tensors ({torch.cuda.get_device_name(device)})"


def check_dtype(caller: str, name: str, tensor: Tensor, *, real: bool = True) -> None:
    """Raise TypeError unless the scans take the tensor's dtype."""
    if tensor.dtype not in (_REAL if real else _REAL + _COMPLEX):
        kinds = "float32, float64, bfloat16 or float16" + ("" if real else ", complex64 or complex128")
        raise TypeError(f"{caller}: {name} must be {kinds}, got {tensor.dtype}")


def check_series(caller: str, name: str, series: Tensor, letters: str) -> None:
    """Raise TypeError or ValueError unless it is a tensor of three dimensions and of a real dtype that scans take."""
    check_tensor(caller, name, series)
    if series.dim() != 3:
        raise shape_error(caller, name, letters, "three dimensions", tuple(series.shape))
    check_dtype(caller, name, series)


def check_operands(caller: str, like: Tensor, operands: Mapping[str, tuple[Tensor, str, tuple[int, ...]]]) -> None:
    """Raise TypeError or ValueError unless each is a tensor of this shape, told by these letters, of a real dtype that
    scans take, and on the device of `like`."""
    for name, (tensor, letters, shape) in operands.items():
        check_tensor(caller, name, tensor)
        check_shape(caller, name, tensor, letters, shape)
        check_dtype(caller, name, tensor)
        check_device(caller, like, **{name: tensor})


def _ran(backend: str) -> str:
    global _last
    _last = backend
    return backend


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# torch.compile cannot trace a warning: it is given while the graph is made.
_warn_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
