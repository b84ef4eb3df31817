"""Calls the kernels of the selective scan: as `fused` wants them, tensors in, tensors out, no autograd."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minrnn.ops.triton import launch
from minrnn.ops.triton import selective_kernels as kernels

_EVERY, _SPAN = kernels.EVERY.value, kernels.SPAN.value
_THREAD, _PROGRAM = 16, 4096  # numbers of state that a thread and that a program have at most
# Of at most so many channels, at least so many steps are cut, into at most so many pieces of at least so many steps.
_FEW, _LONG, _PIECES, _PIECE = 256, 4096, 64, 1024
_SUMS = 1024  # numbers that one program sums


class _Call:
    """The arguments of a kernel, and how its work is divided: by T, E, N and the type alone, so that no result depends
    on the batch.

    Attributes:
        pitch: the channels of all blocks.
        pieces: how many pieces of a sequence there are; `sizes` are T, E, pitch, pieces, and the steps of a piece.
        programs: one for each block of channels of each piece of each sequence.
        absent: which of reset and bias are not given; they are not read, another stands in.
    """

    def __init__(self, inputs: tuple) -> None:
        tensors = [None if x is None else x.contiguous() for x in inputs]
        self.u, self.delta, self.A, self.B, self.C, self.D, self.initial = (x for x in tensors[:7] if x is not None)
        self.absent = tensors[7] is None, tensors[8] is None
        self.reset = self.u if tensors[7] is None else tensors[7]
        self.bias = self.D if tensors[8] is None else tensors[8]
        (self.batch, self.time, self.width), self.N = self.u.shape, self.A.shape[1]
        states = 1 << max(self.N - 1, 0).bit_length()
        own = _THREAD // 4 if self.A.dtype == torch.float64 else _THREAD if states <= _THREAD else _THREAD // 2
        self.block = max(min(2 * own, _PROGRAM // states), 1)
        self.blocks = -(-self.width // self.block)
        self.pitch = self.blocks * self.block
        self.options: dict[str, Any] = {"N": self.N, "STATES": states, "BLOCK": self.block}
        self.options |= {"RESET": not self.absent[0], "BIAS": not self.absent[1]}
        self.options["num_warps"] = min(max(states * self.block // (32 * own), 1), 8)

    # Found when a kernel is called: what only asks for shapes, of a graph, must not depend on how long T is.

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        length = max(self.time, 1)
        if self.width <= _FEW and self.time >= _LONG:
            length = max(_PIECE, -(-self.time // (_PIECES * _EVERY)) * _EVERY)
        return self.time, self.width, self.pitch, max(-(-self.time // length), 1), length

    @property
    def pieces(self) -> int:
        return self.sizes[3]

    @property
    def programs(self) -> int:
        return self.batch * self.pieces * self.blocks

    def rows(self, states: Tensor) -> Tensor:
        """States (..., E, N) as the kernels have them, (..., N, pitch)."""
        rows = states.new_zeros(*states.shape[:-2], self.N, self.pitch)
        rows[..., : self.width] = states.mT
        return rows

    def columns(self, rows: Tensor) -> Tensor:
        """The way back."""
        return rows[..., : self.width].mT.clone(memory_format=torch.contiguous_format)

    def rates(self) -> Tensor:
        """A by the binary logarithm of e, for powers of two."""
        return self.rows(self.A / math.log(2))

    def ends(self, values: Tensor, coeffs: Tensor, rates: Tensor, back: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What the pieces make of what comes into them; empty if there is only one."""
        joints = self.pieces - 1
        ends = rates.new_empty(self.batch, joints, self.N, self.pitch)
        totals = rates.new_empty(self.batch, joints, self.pitch)
        cuts = torch.empty(self.batch, joints, dtype=torch.uint8, device=rates.device)
        launch(
            kernels.ends_kernel, self.batch * joints * self.blocks, rates.device,
            values, self.delta, rates, coeffs, self.reset, self.bias, ends, totals, cuts,
            *self.sizes, BACK=int(back), **self.options,
        )  # fmt: skip
        return ends, totals, cuts

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for y, the last state, and the states that are kept for the way back."""
        marks = self.A.new_empty(self.batch, -(-self.time // _EVERY), self.N, self.pitch)
        return torch.empty_like(self.u), torch.empty_like(self.initial), marks


def results(*inputs: Any) -> tuple[Tensor, ...]:
    """Memory for what `forward` gives."""
    return _Call(inputs).results()


def forward(*inputs: Any) -> tuple[Tensor, ...]:
    """y, the last state, and the states that are kept."""
    call = _Call(inputs)
    y, _, marks = call.results()
    rates, initial = call.rates(), call.rows(call.initial)
    last = torch.empty_like(initial)
    launch(
        kernels.forward_kernel, call.programs, y.device,
        call.u, call.delta, rates, call.B, call.C, call.D, call.reset, call.bias, initial,
        *call.ends(call.u, call.B, rates, back=False), y, last, marks, *call.sizes, **call.options,
    )  # fmt: skip
    return y, call.columns(last), marks


def backward(grads: tuple, inputs: tuple, out: tuple) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, None for those that have none."""
    call = _Call(inputs)
    grad_y, grad_last = (torch.zeros_like(x) if g is None else g for g, x in zip(grads[:2], out[:2], strict=True))
    grad_y, rates, A = grad_y.contiguous(), call.rates(), call.A
    units = -(-min(call.time, _EVERY) // _SPAN)
    scratch = A.new_empty(call.programs, units, call.N, call.block)
    grad_u, grad_delta = torch.empty_like(call.u), torch.empty_like(call.delta)
    grad_initial = A.new_empty(call.batch, call.N, call.pitch)
    grad_into, grad_out = (A.new_empty(call.blocks, *x.shape) for x in (call.B, call.C))
    grad_channels = A.new_empty(call.batch * call.pieces, call.N + 2, call.pitch)
    launch(
        kernels.backward_kernel, call.programs, A.device,
        call.u, call.delta, rates, call.B, call.C, call.D, call.reset, call.bias, out[2], grad_y, call.rows(grad_last),
        *call.ends(grad_y, call.C, rates, back=True), scratch,
        grad_u, grad_delta, grad_initial, grad_into, grad_out, grad_channels,
        *call.sizes, call.batch, call.blocks, units, **call.options,
    )  # fmt: skip
    channels = _sum(grad_channels)
    grad_skip, grad_bias = (x[: call.width].clone() for x in channels[call.N :])
    return (
        grad_u, grad_delta, call.columns(channels[: call.N]), _sum(grad_into), _sum(grad_out), grad_skip,
        call.columns(grad_initial), None, None if call.absent[1] else grad_bias,
    )  # fmt: skip


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    if len(parts) == 1:
        return parts[0]
    total = parts.new_empty(parts.shape[1:])
    programs = -(-total.numel() // _SUMS)
    launch(kernels.sum_kernel, programs, parts.device, parts, total, len(parts), total.numel(), BLOCK=_SUMS)
    return total
