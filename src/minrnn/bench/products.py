"""The limit of a system: its own matrix products, FFTs and attention kernels alone, recorded from a training step and
run again on tensors of the same shapes and strides."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from minrnn.ops.fused import KERNELS

# What no system of the comparison can do without: PyTorch's own kernels for large products and transforms.
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_fft_r2c",
    "_fft_c2r",
    "_fft_c2c",
    "fft_rfft",  # as operators call them that have kernels of their own
    "fft_irfft",
    "matmul",
    "linear",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}


class _Shape(tuple):
    """(shape, strides, dtype) of a tensor that was an argument."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kernel := KERNELS.get(func._schema.name):
            with self:  # what it calls counts too
                return kernel(*args, **kwargs)
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            note = lambda x: _Shape((tuple(x.shape), x.stride(), x.dtype))  # noqa: E731
            self.calls.append((func, *tree_map_only(Tensor, note, (args, kwargs))))
        return func(*args, **kwargs)


def alone(step: Callable[[], object], device: str = "cpu") -> Callable[[], None] | None:
    """The products of `step` alone, on the same device: the same calls in the same order. None if it has none.

    Their arguments are views of memory that all calls share, one piece for each place in an argument list. So they
    are a lower limit: a real step finds less of its data in the caches.
    """
    with _Recorder() as recorder:
        step()
    if not recorder.calls:
        return None
    sizes: dict[tuple[int, torch.dtype], int] = defaultdict(int)
    for _, args, _ in recorder.calls:
        for place, shape, extent in _tensors(args):
            sizes[place, shape[2]] = max(sizes[place, shape[2]], extent)
    memory = {
        key: (torch.randn if _floats(key[1]) else torch.zeros)(size, dtype=key[1], device=device)
        for key, size in sizes.items()
    }
    calls = []
    for func, args, kwargs in recorder.calls:
        views = {place: memory[place, shape[2]].as_strided(shape[0], shape[1]) for place, shape, _ in _tensors(args)}
        calls.append((func, tuple(views.get(i, x) for i, x in enumerate(args)), kwargs))

    def again() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return again


def _tensors(args: tuple) -> list[tuple[int, _Shape, int]]:
    """The recorded tensors among arguments: place, shape and how much memory each spans."""
    return [
        (place, arg, 1 + sum(max(size - 1, 0) * stride for size, stride in zip(arg[0], arg[1], strict=True)))
        for place, arg in enumerate(args)
        if isinstance(arg, _Shape)
    ]


def _floats(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
