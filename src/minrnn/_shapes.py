"""The letters of every shape, their tensor types, what public functions check of tensors, and how series lie in memory.

B batch, T time, D model width, H hidden width, N state size per channel.
"""

from typing import TypeAlias

import torch
from jaxtyping import Bool, Inexact, Int
from torch import Tensor

Series: TypeAlias = Inexact[Tensor, "B T H"]
Projection: TypeAlias = Inexact[Tensor, "B T P"]  # P = 2H (minGRU) or 3H (minLSTM)
State: TypeAlias = Inexact[Tensor, "B H"]
Reset: TypeAlias = Bool[Tensor, "B T"]
Lengths: TypeAlias = Int[Tensor, " B"]


def shape_error(caller: str, name: str, letters: str, wanted: object, got: object) -> ValueError:
    """The one form of a shape complaint: who, which argument, what was wanted, what came."""
    return ValueError(f"{caller}: {name} must be {letters} = {wanted}, got {got}")


def check_shape(caller: str, name: str, tensor: Tensor, letters: str, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has exactly the shape `wanted`."""
    if tuple(tensor.shape) != wanted:
        raise shape_error(caller, name, letters, wanted, tuple(tensor.shape))


def check_tensor(caller: str, name: str, tensor: object) -> None:
    """Raise TypeError unless `tensor` is a torch.Tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_device(caller: str, like: Tensor, whose: str = "the input is", /, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all of these that are given are on the device of `like`; `whose` that is, for people."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{caller}: {name} must be on {like.device} as {whose}, got {tensor.device}")


def check_reset(caller: str, reset: Tensor | None, series: Tensor) -> None:
    """Raise TypeError or ValueError unless `reset`, if given, is bool (B, T), on the device of a series (B, T, *)."""
    if reset is not None:
        check_tensor(caller, "reset", reset)
        check_shape(caller, "reset", reset, "(B, T)", tuple(series.shape[:2]))
        if reset.dtype != torch.bool:
            raise TypeError(f"{caller}: reset must be torch.bool, got {reset.dtype}")
        check_device(caller, series, reset=reset)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a recurrent state is kept: float32 for 16-bit input, otherwise the input's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def castable(tensor: Tensor, like: Tensor) -> bool:
    """Whether autocast is going to make one dtype of these: of floating ones, but it leaves float64 as it is."""
    one = (tensor.dtype == torch.float64) == (like.dtype == torch.float64)
    return tensor.is_floating_point() and one and autocasts(tensor.device.type)


def time_major(series: Tensor) -> bool:
    """Whether a (B, T, *) tensor lies in memory as (T, B, *)."""
    batch, time, *_ = series.stride()
    if isinstance(batch, int) and isinstance(time, int):
        return batch < time
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # with sympy; only symbolic shapes need it

    return not guard_or_false(time <= batch)  # of sizes that only the data tell: as `batch_first=False` lays out


def laid_out_like(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (B, T, width) in the memory order of `like`, (B, T, *)."""
    batch, time, _ = like.shape
    # Not the view of a tensor: forward mode asserts that the tangent of a view is laid out as the view is.
    strides = (width, batch * width, 1) if time_major(like) else (time * width, width, 1)
    return torch.empty_strided((batch, time, width), strides, dtype=dtype, device=like.device)
