"""The recurrence of mLSTM, chunk by chunk: products of matrices within a chunk, a carried matrix between chunks.

B batch, T time, H heads, d channels of a head; L steps of a chunk, G = B H.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import accumulate_dtype
from minrnn.ops.fused import fused

EPSILON = 1e-6  # of the denominator, as the authors have it


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Tensor,
    forget: Tensor,
    matrix: Tensor,
    normalizer: Tensor,
    level: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_t = C_tᵀ q_t / (max(|n_t · q_t|, e^{-m_t}) + 1e-6), a matrix memory C with its normalizer n, per head.

    m_t = max(log f_t + m_{t-1}, i_t), a_t = e^{log f_t + m_{t-1} - m_t}, b_t = e^{i_t - m_t} / sqrt(d), log f = log
    sigmoid(forget): C_t = a_t C_{t-1} + b_t k_t v_tᵀ, n_t = a_t n_{t-1} + b_t k_t. What C and n really hold is
    e^{m_t} times as much; m, their level, keeps every exponential at most 1, and -inf says that they hold nothing.

    Args:
        q: (B, T, H, d).
        k, v: as q.
        into: i, (B, T, H), the logarithm of the input gate, in the dtype of `matrix`.
        forget: (B, T, H), before its sigmoid.
        matrix: C before the first step, (B, H, d, d), float32 where q is of 16 bits.
        normalizer: n, (B, H, d).
        level: m, (B, H); -inf at the beginning of a sequence.
        reset: bool (B, T). Where true, step t begins a new sequence.

    Returns:
        h, (B, T, H, d), in the dtype of q; and C, n, m after the last step. The cost is linear in T, and the memory
        that differentiation keeps is that of arguments and results.

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), section 2.3 and appendix A.3.
    """
    if not q.numel():
        return torch.zeros_like(q), matrix, normalizer, level
    with torch.autocast(q.device.type, enabled=False):
        h, matrix, normalizer, level = _operator(q, k, v, into, forget, matrix, normalizer, level, reset)
    return h, matrix, normalizer, level


class _Carry(NamedTuple):
    """What a chunk gets from those before it: C (G, d, d), n (G, d), m (G,)."""

    matrix: Tensor
    normalizer: Tensor
    level: Tensor

    def unless(self, fresh: Tensor | None, level: float) -> "_Carry":
        """Nothing, and this level, where a sequence begins."""
        if fresh is None:
            return self
        return _Carry(
            self.matrix.masked_fill(fresh[:, None, None], 0),
            self.normalizer.masked_fill(fresh[:, None], 0),
            self.level.masked_fill(fresh, level),
        )


class _Gates:
    """The weights of a chunk, (G, L): with S_t the sum of log f up to t, in the chunk, m_t = S_t + peak_t.

    Step t reads step j, at t or before it, by e^{source_j - peak_t} / sqrt(d), and what is carried by e^{m - peak_t}.
    """

    def __init__(self, into: Tensor, forget: Tensor, level: Tensor, size: int) -> None:
        self.shrink = -math.log(size) / 2
        self.total = F.logsigmoid(forget).cumsum(1)
        self.source = into - self.total
        self.own, self.where = self.source.cummax(1)
        self.peak = torch.maximum(self.own, level[:, None])
        self.carried = torch.exp(level[:, None] - self.peak)
        # By what the state after the chunk holds each step.
        self.last = torch.exp(self.source - self.peak[:, -1:] + self.shrink)

    def pairs(self) -> Tensor:
        """e^{source_j - peak_t} / sqrt(d) for j <= t, (G, t, j); masked before they might overflow."""
        time = self.source.shape[1]
        later = self.source.new_full((time, time), -torch.inf).triu(1) + self.shrink
        return torch.exp(self.source[:, None] - self.peak[:, :, None] + later)

    def floor(self) -> Tensor:
        """e^{-m_t}, kept finite."""
        limit = math.log(torch.finfo(self.peak.dtype).max) - 1
        return torch.exp((-self.total - self.peak).clamp(max=limit))

    def advance(self, k: Tensor, v: Tensor, carry: _Carry) -> _Carry:
        """What is carried after the chunk."""
        keys, decay = k * self.last[..., None], self.carried[:, -1]
        return _Carry(
            torch.baddbmm(carry.matrix * decay[:, None, None], keys.mT, v),
            carry.normalizer * decay[:, None] + keys.sum(1),
            self.total[:, -1] + self.peak[:, -1],
        )


class _Chunks:
    """Time cut into chunks. With resets, room is left before each, so that sequences begin where chunks do.

    Longer chunks cost more products within them and fewer between them: wide heads ask for longer ones, as measured.
    """

    def __init__(self, like: Tensor, reset: Tensor | None) -> None:
        self.batch, self.time, self.heads, size = like.shape
        self.length, self.dtype = min(max(size // 2, 64), 128), accumulate_dtype(like.dtype)
        self.places, self.fresh = None, None
        self.room = self.time
        if reset is not None:
            self._leave_room(reset)

    def _leave_room(self, reset: Tensor) -> None:
        """`places`, (B, T): where each step now stands; `fresh`, (G, chunks): those in which sequences begin."""
        time = torch.arange(self.time, device=reset.device)
        # Many resets, short chunks: about as many steps as there are between two resets of a row.
        between = self.time // (1 + int(reset[:, 1:].sum(1).max()))
        self.length = min(self.length, max(8, between))
        begin = torch.where(reset, time, 0).cummax(1).values
        ended = time - F.pad(begin[:, :-1], (1, 0))  # steps of the sequence before this step
        gap = torch.where(reset, -ended % self.length, 0)
        self.places = time + gap.cumsum(1)
        self.rows = torch.arange(self.batch, device=reset.device)[:, None]
        self.room = int(self.places.max()) + 1
        chunks = -(-self.room // self.length)
        fresh = reset.new_zeros(self.batch, chunks)
        fresh[self.rows.expand_as(reset)[reset], self.places[reset] // self.length] = True
        self.fresh = fresh.repeat_interleave(self.heads, 0)

    def spread(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """A series of steps with the room that resets need."""
        if self.places is None:
            return x
        return x.new_full((self.batch, self.room, *x.shape[2:]), fill).index_put((self.rows, self.places), x)

    def gather(self, pieces: list[Tensor]) -> Tensor:
        """The series of chunks (G, L, *), as (B, T, H, *)."""
        x = torch.cat([piece.unflatten(0, (self.batch, self.heads)).transpose(1, 2) for piece in pieces], 1)
        return x if self.places is None else x[self.rows, self.places]

    def cut(self, x: Tensor, i: int) -> Tensor:
        """Chunk i of a series (B, T, H, *) with its room, as (G, L, *)."""
        piece = x[:, i * self.length : (i + 1) * self.length].transpose(1, 2)
        return piece.to(self.dtype).flatten(0, 1)

    def begins(self, i: int) -> Tensor | None:
        """Which rows begin a sequence at chunk i, (G,); None if none can."""
        return None if self.fresh is None else self.fresh[:, i]

    def __iter__(self) -> Iterator[int]:
        return iter(range(-(-self.room // self.length)))


def _arrange(
    q: Tensor, k: Tensor, v: Tensor, into: Tensor, forget: Tensor, reset: Tensor | None
) -> tuple[_Chunks, list[Tensor]]:
    """The chunks, and the series with their room; steps in the room between write nothing and forget nothing."""
    chunks = _Chunks(q, reset)
    return chunks, [*map(chunks.spread, (q, k, v)), chunks.spread(into, -1e30), chunks.spread(forget, 1e4)]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Tensor,
    forget: Tensor,
    matrix: Tensor,
    normalizer: Tensor,
    level: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    chunks, series = _arrange(q, k, v, into, forget, reset)
    carry = _Carry(matrix.flatten(0, 1), normalizer.flatten(0, 1), level.flatten())
    pieces = []
    for i in chunks:
        q_, k_, v_, into_, forget_ = (chunks.cut(x, i) for x in series)
        carry = carry.unless(chunks.begins(i), -torch.inf)
        gates = _Gates(into_, forget_, carry.level, q.shape[3])
        read = q_ * gates.carried[..., None]
        weights = torch.bmm(q_, k_.mT) * gates.pairs()
        total = weights.sum(2) + torch.bmm(read, carry.normalizer[..., None])[..., 0]
        below = torch.maximum(total.abs(), gates.floor()) + EPSILON
        pieces.append(torch.baddbmm(torch.bmm(read, carry.matrix), weights, v_) / below[..., None])
        carry = gates.advance(k_, v_, carry)
    h = chunks.gather(pieces).to(q.dtype)
    return h, *(x.unflatten(0, level.shape).contiguous() for x in carry)


def _fake(q: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, *arguments[4:7]))


def _backward(grads: tuple, arguments: tuple, results: tuple) -> tuple[Tensor | None, ...]:
    with torch.autocast(results[0].device.type, enabled=False):  # of a backward pass in its reach
        return _backward_in_full(grads, arguments, results)


def _backward_in_full(grads: tuple, arguments: tuple, results: tuple) -> tuple[Tensor | None, ...]:
    q, k, v, into, forget, matrix, normalizer, level, reset = arguments
    h = results[0]
    chunks, series = _arrange(q, k, v, into, forget, reset)
    # What each chunk got from those before it is found again rather than kept.
    carry, carries = _Carry(*(x.flatten(0, 1) for x in (matrix, normalizer, level))), []
    for i in chunks:
        _, k_, v_, into_, forget_ = (chunks.cut(x, i) for x in series)
        carry = carry.unless(chunks.begins(i), -torch.inf)
        carries.append(carry)
        carry = _Gates(into_, forget_, carry.level, q.shape[3]).advance(k_, v_, carry)
    grad = _Carry(
        *(torch.zeros_like(x) if g is None else g.flatten(0, 1) for x, g in zip(carry, grads[1:], strict=True))
    )
    series += [chunks.spread(h), chunks.spread(torch.zeros_like(h) if grads[0] is None else grads[0])]
    held, pieces = _inner(carry, grad), []
    for i in reversed(range(len(carries))):
        piece, grad, held = _chunk_backward([chunks.cut(x, i) for x in series], carries[i], grad, held)
        pieces.append(piece)
        if (begins := chunks.begins(i)) is not None:
            grad, held = grad.unless(begins, 0), held.masked_fill(begins, 0)
    dq, dk, dv, dinto, dforget = (chunks.gather(list(reversed(x))) for x in zip(*pieces, strict=True))
    dq, dk, dv = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    return dq, dk, dv, dinto, dforget, *(x.unflatten(0, level.shape) for x in grad), None


def _inner(carry: _Carry, grad: _Carry) -> Tensor:
    """C · dC + n · dn, (G,): the derivative by the logarithm of a factor on both."""
    return (carry.matrix * grad.matrix).sum((1, 2)) + (carry.normalizer * grad.normalizer).sum(1)


def _chunk_backward(
    series: list[Tensor], carry: _Carry, grad: _Carry, held: Tensor
) -> tuple[list[Tensor], _Carry, Tensor]:
    """Back through a chunk.

    The gates are factors of what q reads and of what k writes, so that the derivatives by their logarithms are q · dq
    and k · dk; no matrix of weights is needed for them.

    Args:
        series: q, k, v, i, f of the chunk, (G, L, *), its h and dh.
        carry: what the chunk got.
        grad: of what it handed on.
        held: `_inner` of what it handed on and `grad`.

    Returns:
        The gradients of q, k, v, i, f, and of `carry`; and `_inner` of those two.
    """
    q, k, v, into, forget, h, dh = series
    gates = _Gates(into, forget, carry.level, q.shape[2])
    pairs, floor, carried = gates.pairs(), gates.floor(), gates.carried[..., None]
    weights = torch.bmm(q, k.mT) * pairs
    total = weights.sum(2) + (torch.bmm(q, carry.normalizer[..., None]) * carried)[..., 0]
    # h = over / below; below follows |total| or, where that is less, the floor.
    below = torch.maximum(total.abs(), floor) + EPSILON
    dover = dh / below[..., None]
    dbelow = -(dover * h).sum(2)
    dtotal = torch.where(total.abs() > floor, dbelow * total.sign(), 0)
    dlevel = torch.where(total.abs() > floor, 0, -dbelow * floor)

    dpairs = torch.baddbmm(dtotal[..., None], dover, v.mT) * pairs
    dread, dcarried = dover * carried, dtotal[..., None] * carried
    dq = torch.baddbmm(torch.baddbmm(dcarried * carry.normalizer[:, None], dread, carry.matrix.mT), dpairs, k)
    last, decay = gates.last[..., None], gates.carried[:, -1]
    dv = torch.baddbmm(torch.bmm(k * last, grad.matrix), weights.mT, dover)
    dk = torch.baddbmm(torch.baddbmm(grad.normalizer[:, None], v, grad.matrix.mT) * last, dpairs.mT, q)
    dmatrix = torch.baddbmm(grad.matrix * decay[:, None, None], q.mT, dread)
    dnormalizer = grad.normalizer * decay[:, None] + torch.bmm(q.mT, dcarried)[..., 0]

    # m_t = S_t + peak_t also enters by itself: in the floor, and as what the chunk hands on.
    dlevel[:, -1] += grad.level
    dpeak = dlevel - (q * dq).sum(2)
    dpeak[:, -1] -= held
    dsource = (k * dk).sum(2)
    kept = carry.level[:, None] > gates.own
    dsource = dsource.scatter_add(1, gates.where, dpeak.masked_fill(kept, 0))
    dtotals = dlevel - dsource
    dforget = dtotals.flip(1).cumsum(1).flip(1) * torch.sigmoid(-forget)
    before = _Carry(dmatrix, dnormalizer, dpeak.new_zeros(()))
    held = _inner(carry, before)
    before = before._replace(level=held + (dpeak * kept).sum(1))
    return [dq, dk, dv, dsource, dforget], before, held


_operator = fused(
    "mlstm",
    "Tensor q, Tensor k, Tensor v, Tensor into, Tensor forget, Tensor matrix, Tensor normalizer, Tensor level, "
    "Tensor? reset",
    4,
    0,
    _forward,
    _fake,
    _backward,
    _forward,
)
