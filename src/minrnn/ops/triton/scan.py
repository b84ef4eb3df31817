"""Calls the kernels of the scans. Tensors in, tensors out, no autograd; the same contract as native.py's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn._shapes import accumulate_dtype, laid_out_like
from minrnn.ops import native
from minrnn.ops.gates import results, width
from minrnn.ops.triton import launch, multiprocessors
from minrnn.ops.triton.recurrence import backward_kernel, carry_kernel, forward_kernel, sum_kernel

_CHUNK = 1024  # steps at least: shorter chunks would not repay the second reading
_CHUNKS = 256  # at most: joining them is one program's work, and a single row of 2^20 steps is to fill a GPU
_AHEAD = 64 << 10  # bytes that a program may have on their way
_LENGTHS, _INITIAL, _RESTART, _ENTRY = 1, 2, 4, 8  # the bits of `given` in the kernels


class _Walk(NamedTuple):
    """How a walk over time is cut: S groups of L steps and C numbers of a row to a tile, `tiles` of them to a chunk. It
    follows from the length, the width and the dtype alone, because it decides in which order numbers are added up."""

    S: int
    L: int
    C: int
    tiles: int
    chunks: int
    stages: int
    programs: int  # over sequences and the blocks of a row
    each: int  # chunks to a program, which decides nothing

    @classmethod
    def plan(cls, time: int, rows: Tensor, like: Tensor, steps: int, tensors: int) -> "_Walk":
        """For states `rows` [B, numbers], `steps` in a tile, and series as `like` is, of which `tensors` are read."""
        (batch, numbers), size = rows.shape, like.element_size()
        if size == 8:
            steps = max(16, steps // 2)  # numbers take twice the registers
        C = min(128 // size, max(8, 1 << max(numbers - 1, 0).bit_length()))  # a row of memory's 128 bytes, or less
        S = max(4, 64 // C)
        whole = -(-time // steps)
        tiles = max(_CHUNK // steps, -(-whole // _CHUNKS), 1)
        chunks = max(-(-whole // tiles), 1)
        programs = batch * -(-numbers // C)
        # Time is divided only where a multiprocessor would have less than 2 of 8 warps: it costs a second reading.
        warps, full = programs * max(1, S * C // 64), 8 * multiprocessors(rows.device)
        each = chunks if 4 * warps >= full else max(1, chunks * warps // full)
        return cls(
            S, steps // S, C, tiles, chunks, 3 if 2 * steps * C * tensors * size <= _AHEAD else 2, programs, each
        )

    def run(self, kernel: Any, entry: Tensor | None, last: Tensor, given: int, **arguments: Any) -> None:
        """Launch a kernel for all chunks. `entry` [B, numbers] is what comes into the first, `last` what comes out of
        the last. Where programs have chunks of their own, these are first run as maps, and the maps joined."""
        sizes = {"tiles": self.tiles, "chunks": self.chunks, "units": last.shape[1] // arguments["UNIT"]}
        variant = {"S": self.S, "L": self.L, "C": self.C, "STAGES": self.stages}
        arguments |= sizes | variant | {"last": last, "num_warps": max(1, self.S * self.C // 64)}
        arguments["enable_fp_fusion"] = False  # or a map might be rounded otherwise than the steps it is made of
        stride = 0 if entry is None else _stride(entry, 0)
        if self.each < self.chunks:
            batch, numbers = last.shape
            totals = last.new_empty(batch, self.chunks, 3, numbers)
            entries = last.new_empty(batch, self.chunks, numbers)
            launch(
                *(kernel, self.programs * self.chunks, last.device),
                **arguments, given=given, each=1, totals=totals, TOTALS=True, entry=last, batch_e=0,
            )  # fmt: skip
            same = {name: arguments[name] for name in ("COMPLEX", "RESET", "C", "chunks")}
            launch(
                *(carry_kernel, self.programs, last.device),
                entry=last if entry is None else entry, given=int(entry is not None), batch=stride, H=numbers,
                totals=totals, entries=entries, num_warps=1, enable_fp_fusion=False, **same,
            )  # fmt: skip
            entry, stride = entries, self.chunks * numbers
        parts = -(-self.chunks // self.each)
        launch(
            *(kernel, self.programs * parts, last.device),
            **arguments, given=given | (0 if entry is None else _ENTRY), each=self.each, totals=last, TOTALS=False,
            entry=last if entry is None else entry, batch_e=stride,
        )  # fmt: skip


def forward(
    inputs: tuple, gates: str, activation: str, reverse: bool, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(h, last) of a scan; `inputs` as in rules.py. `out` gives the memory to write to, for measurements."""
    source, values, initial, *_ = inputs
    dense, out = native.dense_inputs(source, values), out or results(source, values, gates)
    series = {"x0": _numbers(dense[0]), "x1": _numbers(dense[-1]), "hidden": _numbers(out[0])}
    last = _numbers(out[1])
    walk = _Walk.plan(dense[-1].shape[1], last, series["x0"], 64, _blocks(gates))
    walk.run(
        forward_kernel, _state(initial), last, _given(inputs) & ~_INITIAL, flip=int(reverse),
        **_common(inputs, gates, activation, last), **_series(series, last.shape[1]),
    )  # fmt: skip
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
    source, values, initial, reset, restart, _ = inputs
    dense = native.dense_inputs(source, values)
    like, state = dense[-1], (hidden.shape[0], hidden.shape[2])
    grads = [laid_out_like(like, like.shape[2], like.dtype) for _ in dense]
    if out is not None:
        grads[0] = out
    if grad_hidden is None:
        grad_hidden = hidden.new_zeros(state[1]).expand(hidden.shape)
    series = {
        "x0": _numbers(dense[0]),
        "x1": _numbers(dense[-1]),
        "hidden": _numbers(native.contiguous_channels(hidden)),
        "grad_hidden": _numbers(native.contiguous_channels(grad_hidden.to(hidden.dtype))),
        "grad0": _numbers(grads[0]),
        "grad1": _numbers(grads[-1]),
    }
    grad_initial = hidden.new_empty(state, dtype=accumulate_dtype(hidden.dtype))
    first = _numbers(grad_initial)
    few = 16 if reset is not None or _blocks(gates) == 3 else 32  # more would not fit the registers
    walk = _Walk.plan(hidden.shape[1], first, series["x0"], few, _blocks(gates) + 2)
    begin = _state(initial)
    more = {"initial": first if begin is None else begin, "batch_i": 0 if begin is None else _stride(begin, 0)}
    # The gradient of what all chunks restart from comes in parts, which are added up in their order.
    shares = None if restart is None else hidden.new_zeros((state[0], walk.chunks, state[1]), dtype=grad_initial.dtype)
    more["grad_restart"] = first if shares is None else shares
    common = _common(inputs, gates, activation, first)
    common["RESET"] = 0 if reset is None else 1 if restart is None else 2
    walk.run(
        backward_kernel, _state(grad_last), first, _given(inputs), flip=int(not reverse),
        **common, **more, **_series(series, first.shape[1]),
    )  # fmt: skip
    grad_restart = shares
    if shares is not None:
        grad_restart = torch.empty_like(shares[:, 0])
        sums = -(-state[1] // 128) * state[0]
        launch(sum_kernel, sums, hidden.device, shares, grad_restart, walk.chunks, state[1], C=128, num_warps=4)
    grad_initial = None if initial is None else grad_initial
    if values is None:
        return grads[0], None, grad_initial, grad_restart
    return grads[0].sum_to_size(source.shape), grads[1], grad_initial, grad_restart


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor in real numbers: a complex one's last dimension is twice as long."""
    if not tensor.is_complex():
        return tensor
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:  # broadcast over channels
        tensor = tensor.contiguous()
    return torch.view_as_real(tensor).flatten(-2)


def _state(state: Tensor | None) -> Tensor | None:
    """A state [B, H] as the kernels read it."""
    state = native.contiguous_state(state)
    return None if state is None else _numbers(state)


def _stride(tensor: Tensor, dim: int) -> int:
    """Where there is one step only, its stride says nothing."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def _blocks(gates: str) -> int:
    """How many numbers of the inputs a step of one channel has."""
    return 2 if gates == "linear" else width(gates)


def _given(inputs: tuple) -> int:
    _, _, initial, _, restart, lengths = inputs
    pairs = ((lengths, _LENGTHS), (initial, _INITIAL), (restart, _RESTART))
    return sum(bit for tensor, bit in pairs if tensor is not None)


def _common(inputs: tuple, gates: str, activation: str, spare: Tensor) -> dict[str, Any]:
    """The arguments that say what is computed and what surrounds it; `spare` stands in for what is not there."""
    source, values, _, reset, restart, lengths = inputs
    start = _state(restart)
    return {
        "reset": spare if reset is None else reset.view(torch.uint8),
        **({"batch_r": 0, "time_r": 0} if reset is None else {"batch_r": reset.stride(0), "time_r": reset.stride(1)}),
        "restart": spare if start is None else start,
        "batch_s": 0 if start is None else _stride(start, 0),
        "lengths": spare if lengths is None else lengths,
        "batch_l": 0 if lengths is None else lengths.stride(0),
        "T": (source if values is None else values).shape[1],
        "GATES": gates,
        "ACTIVATION": activation,
        "COMPLEX": source.is_complex(),
        "RESET": int(reset is not None),
    }


_SUFFIX = {"x0": "0", "x1": "1", "hidden": "_h", "grad_hidden": "_g", "grad0": "_d0", "grad1": "_d1"}


def _series(series: dict[str, Tensor], numbers: int) -> dict[str, Any]:
    """The arguments that stand for series [B, T, numbers]. UNIT is the largest power of two, up to 16 bytes, at whose
    multiples all rows begin; strides come in it."""
    size = series["hidden"].element_size()
    channel = 0 if series["x0"].stride(2) == 0 and numbers > 1 else 1
    strides = {name: (_stride(t, 0), _stride(t, 1)) for name, t in series.items()}
    apart = [numbers, *(n for pair in strides.values() for n in pair)]
    unit = 16 // size
    while any(n % unit for n in apart) or any(t.data_ptr() % (unit * size) for t in series.values()):
        unit //= 2
    named = {f"batch{_SUFFIX[name]}": batch // unit for name, (batch, _) in strides.items()}
    named |= {f"time{_SUFFIX[name]}": time // unit for name, (_, time) in strides.items()}
    return {**series, **named, "UNIT": unit, "CHANNEL": channel}
