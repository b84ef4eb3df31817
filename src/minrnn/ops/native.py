"""Loads and calls the C library of the scans (native/). Tensors in, tensors out, no autograd.

The library is reached by ctypes, which releases the GIL and ties it to no version of Python or PyTorch. Loaded after
torch, it runs in the thread pool that torch has, where both ask for the same OpenMP.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import minrnn.ops
from minrnn._shapes import laid_out_like
from minrnn.ops.gates import results, width

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
_ACTIVATIONS = {"g": 0, "identity": 1, "tanh": 2}
_SCAN = struct.Struct("@3q4iq" + 16 * "3q")
_WORDS = 32  # at least as many as the struct of any other kernel has
_Triple = tuple[int, int, int]  # address, stride over the batch, stride over time
_NONE = (0, 0, 0)

_forked = False


def _after_fork() -> None:
    # The threads of the pool stay with the parent; OpenMP in the child would wait for them.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
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
def entry(name: str):
    """The function `name` of the library, which takes one pointer and returns 0 unless memory ran out."""
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


# A graph of torch.compile takes the answer as it is: it cannot trace the search for a library.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def instruction_set() -> str | None:
    """The instruction set whose code is in use: "baseline", "avx2" or "avx512"; None without the library."""
    library, name = _load()
    return name if library else None


def threading() -> str:
    """Whether the library was built to run on several threads."""
    return "threads by OpenMP" if entry("has_openmp")(None) else "one thread, built without OpenMP"


def forward(
    inputs: tuple, gates: str, activation: str, reverse: bool, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(h, last) of a scan; `inputs` as in rules.py. `out` gives the memory to write to, for measurements."""
    source, values, initial, reset, restart, lengths = inputs
    dense = dense_inputs(source, values)
    out = out or results(source, values, gates)
    initial, restart = contiguous_state(initial), contiguous_state(restart)
    context = (layout(reset), _state(initial), _state(restart), _state(lengths), _state(out[1]))
    _run("forward", gates, activation, reverse, dense, out[0].shape[2], layout(out[0]), *context, *[_NONE] * 7)
    return out


def backward(
    grad_hidden: Tensor | None,
    grad_last: Tensor | None,
    inputs: tuple,
    hidden: Tensor,
    gates: str,
    activation: str,
    reverse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of (source, values, initial, restart). `out` gives the memory of the first, for measurements."""
    source, values, initial, reset, restart, lengths = inputs
    dense = dense_inputs(source, values)
    like, hidden = dense[-1], contiguous_channels(hidden)
    grad_hidden = None if grad_hidden is None else contiguous_channels(grad_hidden.to(hidden.dtype))
    grad_last, starts, restarts = (contiguous_state(x) for x in (grad_last, initial, restart))
    grads = [laid_out_like(like, like.shape[2], like.dtype) for _ in dense]
    if out is not None:
        grads[0] = out
    grad_initial, grad_restart = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (starts, restarts)
    )
    _run(
        "backward", gates, activation, reverse, dense, hidden.shape[2],
        layout(hidden), layout(reset), _state(starts), _state(restarts), _state(lengths), _NONE,
        layout(grad_hidden), _state(grad_last),
        *_blocks(grads, gates, hidden.shape[2]), _state(grad_initial), _state(grad_restart),
    )  # fmt: skip
    if values is None:
        return grads[0], None, grad_initial, grad_restart
    return grads[0].sum_to_size(source.shape), grads[1], grad_initial, grad_restart


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def call(name: str, sizes: Iterable[int], dtype: torch.dtype, words: Iterable[int]) -> None:
    """Call a kernel that is given a struct of sizes, type and threads, and then words: addresses and strides.

    What the words are of must be kept alive by the caller. Fewer words than the struct has mean that its last ones are
    zero.

    Raises:
        MemoryError: the kernel found no memory to work in.
    """
    sizes, words = tuple(sizes), tuple(words)
    layout = f"@{len(sizes)}q2i{max(len(words), _WORDS)}q"
    rest = [0] * (_WORDS - len(words))
    if entry(name)(struct.pack(layout, *sizes, _TYPES[dtype], _threads(), *words, *rest)):
        raise MemoryError(f"{name}: no memory to work in for sizes {sizes}")


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _run(
    direction: str,
    gates: str,
    activation: str,
    reverse: bool,
    dense: list[Tensor],
    hidden: int,
    *tensors: _Triple,
) -> None:
    """Call the library; the caller keeps alive what the triples point to."""
    first = dense[0]
    batch, time, _ = first.shape
    if batch == 0 or hidden == 0:
        return
    packed = _SCAN.pack(
        batch, time, hidden,
        _TYPES[first.dtype], _ACTIVATIONS[activation], reverse, _threads(),
        first.stride(2) if hidden > 1 else int(gates != "linear"),
        *chain.from_iterable((*_blocks(dense, gates, hidden), *tensors)),
    )  # fmt: skip
    if entry(f"{gates}_{direction}")(packed):
        raise MemoryError(f"{gates} scan: no memory to join the chunks of {(batch, time, hidden)}")


def dense_inputs(source: Tensor, values: Tensor | None) -> list[Tensor]:
    """[projection], or [coefficients, values] of one shape, with contiguous channels."""
    if values is None:
        return [contiguous_channels(source)]
    coeffs = source.expand(values.shape)
    return [_written(coeffs) if coeffs.stride(2) == 0 else contiguous_channels(coeffs), contiguous_channels(values)]


def _blocks(dense: list[Tensor], gates: str, hidden: int) -> list[_Triple]:
    """The three inputs of a step: blocks of the one projection; or coefficients and values."""
    if gates == "linear":
        return [*map(layout, dense), _NONE]
    address, batch, time = layout(dense[0])
    step = hidden * dense[0].element_size()
    return [(address + i * step, batch, time) if i < width(gates) else _NONE for i in range(3)]


def contiguous_state(state: Tensor | None) -> Tensor | None:
    """A state with contiguous channels; what is broadcast over the batch is not written out."""
    if state is None:
        return None
    state = _written(state)
    return state if state.stride(1) == 1 or state.shape[1] <= 1 else state.contiguous()


def contiguous_channels(tensor: Tensor) -> Tensor:
    """The tensor with contiguous channels. What is broadcast over batch or time is not written out."""
    tensor = _written(tensor)
    if tensor.stride(2) == 1 or tensor.shape[2] <= 1:
        return tensor
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()[:2])]
    return once.contiguous().expand(tensor.shape)


def _written(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in memory: not conjugated or negated when read, nor forward mode's zero."""
    return (tensor.clone() if tensor._is_zerotensor() else tensor).resolve_conj().resolve_neg()


def layout(tensor: Tensor | None) -> _Triple:
    return _NONE if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _state(tensor: Tensor | None) -> _Triple:
    return _NONE if tensor is None else (tensor.data_ptr(), tensor.stride(0), 0)
