"""Loads and calls the C library of the scans (native/). Tensors in, tensors out, no autograd.

The library is reached by ctypes, which releases the GIL and ties it to no version of Python or PyTorch. Loaded after torch, it runs in the
thread pool that torch has, where both ask for the same OpenMP.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import minrnn.ops
from minrnn._shapes import accumulate_dtype, laid_out_like

_LEVELS = ("baseline", "avx2", "avx512")
# In the order of native/scan.h: enum type, enum activation, struct scan.
_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 4,
    torch.complex128: 5,
}
_ACTIVATIONS = {"g": 0, "identity": 1, "tanh": 2, "": 1}
_SCAN = struct.Struct("@3q4iq" + 16 * "3q")
_NONE = (0, 0, 0)

_forked = False


def _after_fork() -> None:
    # The threads of the pool stay with the parent; OpenMP in the child would wait for them.
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library for this machine and its instruction set, or None and the reason."""
    folders = [Path(folder) / "native" for folder in minrnn.ops.__path__]
    folder = next((f for f in folders if (f / "minrnn_baseline.so").exists()), None)
    if folder is None:
        return None, "no C library was built when minrnn was installed"
    try:
        level = ctypes.CDLL(str(folder / "minrnn_baseline.so")).cpu_level()
        name = next(n for n in reversed(_LEVELS[: level + 1]) if (folder / f"minrnn_{n}.so").exists())
        return ctypes.CDLL(str(folder / f"minrnn_{name}.so")), name
    except OSError as error:
        return None, f"its C library does not load ({error})"


@functools.cache
def _entry(name: str):
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"minrnn: the native backend was called though {reason}")
    function = getattr(library, name)
    function.argtypes = [ctypes.c_char_p]
    return function


def unavailable() -> str | None:
    """Why the C library cannot be used, or None."""
    library, reason = _load()
    return None if library else reason


def instruction_set() -> str | None:
    """The instruction set whose code is in use: "baseline", "avx2" or "avx512"; None without the library."""
    library, name = _load()
    return name if library else None


def forward(
    inputs: tuple, gates: str | None, activation: str, reverse: bool, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(h, last) of a scan; `inputs` as in scan.py. `out` gives the memory to write to, for measurements."""
    source, values, initial, reset, restart, lengths = inputs
    like = source if values is None else values
    blocks = _blocks(source, values, gates)
    hidden = blocks[-1].shape[2]
    if out is None:
        last = like.new_empty((like.shape[0], hidden), dtype=accumulate_dtype(like.dtype))
        out = laid_out_like(like, hidden, like.dtype), last
    context = (_series(reset), _state(initial), _state(restart), _state(lengths), _state(out[1]))
    _run(
        "forward",
        gates,
        activation,
        reverse,
        blocks,
        _series(out[0]),
        *context,
        *[_NONE] * 7,
        keep=(blocks, inputs, out),
    )
    return out


def backward(
    grad_hidden: Tensor | None,
    grad_last: Tensor | None,
    inputs: tuple,
    hidden: Tensor,
    gates: str | None,
    activation: str,
    reverse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of (source, values, initial, restart). `out` gives the memory of the first, for measurements."""
    source, values, initial, reset, restart, lengths = inputs
    like = source if values is None else values
    blocks = _blocks(source, values, gates)
    grad_hidden = None if grad_hidden is None else _rows(grad_hidden.to(hidden.dtype))
    grad_last = None if grad_last is None else grad_last.contiguous()
    if values is None:
        grad_source = laid_out_like(like, like.shape[2], like.dtype) if out is None else out
        grad_values, grad_blocks = None, _split(grad_source, len(blocks))
    else:
        grad_source, grad_values = (laid_out_like(like, like.shape[2], like.dtype) for _ in range(2))
        grad_blocks = [grad_source, grad_values]
    grad_initial, grad_restart = (
        None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (initial, restart)
    )
    hidden = _rows(hidden)
    grads = [_series(g) for g in grad_blocks] + [_NONE] * (3 - len(blocks))
    _run(
        "backward", gates, activation, reverse, blocks,
        _series(hidden), _series(reset), _state(initial), _state(restart), _state(lengths), _NONE,
        _series(grad_hidden), _state(grad_last), *grads, _state(grad_initial), _state(grad_restart),
        keep=(blocks, inputs, hidden, grad_hidden, grad_last, grad_blocks),
    )  # fmt: skip
    if values is not None:
        grad_source = grad_source.sum_to_size(source.shape)
    return grad_source, grad_values, grad_initial, grad_restart


def _run(
    direction: str, gates: str | None, activation: str, reverse: bool, blocks: list[Tensor], *tensors, keep
) -> None:
    """Call the library. `keep` holds what the pointers point to."""
    batch, time, hidden = blocks[-1].shape
    if batch == 0 or hidden == 0:
        return
    first = blocks[0]
    packed = _SCAN.pack(
        batch, time, hidden,
        _TYPES[first.dtype], _ACTIVATIONS[activation], reverse, 1 if _forked else torch.get_num_threads(),
        first.stride(2) if hidden > 1 else 0 if len(blocks) == 2 and gates is None else 1,
        *_flat([_series(block) for block in blocks] + [_NONE] * (3 - len(blocks))),
        *_flat(tensors),
    )  # fmt: skip
    if _entry(f"{gates or 'linear'}_{direction}")(packed):
        raise MemoryError(f"{gates or 'linear'} scan: no memory to join chunks of time at {(batch, time, hidden)}")
    del keep


def _flat(triples: Iterable[tuple[int, int, int]]) -> list[int]:
    return [number for triple in triples for number in triple]


def _blocks(source: Tensor, values: Tensor | None, gates: str | None) -> list[Tensor]:
    """The inputs of a step as (B, T, H) each: blocks of the projection; or coefficients and values."""
    if values is None:
        return _split(_rows(source), 2 if gates == "mingru" else 3)
    coeffs = source.expand(values.shape).resolve_conj().resolve_neg()
    return [coeffs if coeffs.stride(2) == 0 else _rows(coeffs), _rows(values)]


def _split(projection: Tensor, blocks: int) -> list[Tensor]:
    hidden = projection.shape[2] // blocks
    return [projection.narrow(2, i * hidden, hidden) for i in range(blocks)]


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous channels. What is broadcast over batch or time is not written out."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.stride(2) == 1 or tensor.shape[2] <= 1:
        return tensor
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()[:2])]
    return once.contiguous().expand(tensor.shape)


def _series(tensor: Tensor | None) -> tuple[int, int, int]:
    return _NONE if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _state(tensor: Tensor | None) -> tuple[int, int, int]:
    return _NONE if tensor is None else (tensor.data_ptr(), tensor.stride(0), 0)
