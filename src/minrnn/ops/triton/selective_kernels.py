"""The kernels of the selective scan; ../selective.py has the equation.

A program owns BLOCK neighbouring channels of one piece of one sequence and walks it with their states, [STATES, BLOCK]
numbers, in registers: B and C are read once for all its channels, and (B, T, E, N) numbers are nowhere. What is read
from afar is asked for several steps before it is used.

Forward keeps the state of every EVERY-th step. Backward takes EVERY steps at a time: it goes forward over them to keep
the state of every SPAN-th in a scratch of its own, then back, span by span, and makes the states of a span again in
registers. What is summed over channels or over sequences comes in parts, one of each program, which are added in their
order: no result depends on which program is first, nor that of a sequence on its batch.

Where there are few channels and many steps, a sequence is cut into pieces that run at the same time. Each is first run
from zeros, for its end alone: it hands on what comes in times exp(A ΣΔ), plus that end. Backward does so against time.

States are rows of channels in memory, [N, E], filled up to whole blocks. Forward, a thread has all N numbers of its
channel, and no sum crosses threads. Backward, where sums go over channels too, a thread has four of the N numbers of
each of four channels, and `gather` brings the vectors of a step there, by shuffles.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005 - Triton knows no unpacking in a tuple

import triton
import triton.language as tl

EVERY = tl.constexpr(32)  # steps between the states that forward keeps
AHEAD = tl.constexpr(8)  # steps by which u and Δ are asked for in advance
SPAN = tl.constexpr(4)  # steps that backward keeps in registers
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _delta(raw, shift, TYPE: tl.constexpr, BIAS: tl.constexpr):
    """Δ and its slope: of softplus(x) = max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(e / (2 + e))."""
    x = raw.to(TYPE)
    if not BIAS:
        return x, tl.full(x.shape, 1.0, TYPE)
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    x += shift
    e = tl.exp2(tl.abs(x) * (-1 / LN2))
    s = e / (2 + e)
    square = s * s
    total = tl.zeros_like(x)
    for k in tl.static_range(TERMS, -1, -1):
        total = total * square + 1 / (2 * k + 1)
    return tl.maximum(x, 0.0) + 2 * s * total, tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _step(h, x, step, b, rate, cut, RESET: tl.constexpr):
    """The state after a step with Δ = `step` and u = `x`, [BLOCK], and B = `b`, [STATES]."""
    if RESET:
        h = tl.where(cut != 0, 0.0, h)
    return tl.exp2(step[None, :] * rate) * h + (step * x)[None, :] * b[:, None]


@triton.jit
def _through(h, piece, rate, ends, totals, cuts, square, e, real, pitch, N: tl.constexpr):
    """What comes out of a piece into which `h` comes."""
    passed = tl.exp2(tl.load(totals + piece * pitch + e)[None, :] * rate) * h
    passed = tl.where(tl.load(cuts + piece) != 0, 0.0, passed)
    return passed + tl.load(ends + piece * N * pitch + square, real, 0.0)


# Only the formulas and the sizes of states make variants. Of E it must not be known that it is a multiple of anything,
# or forward would spread a channel over threads.
_SIZES = ["T", "E", "batch", "blocks", "pitch", "pieces", "length", "units"]
_SERIES = ["u", "delta", "skip", "reset", "bias", "y", "grad_y", "grad_u", "grad_delta"]


@triton.jit(do_not_specialize=_SIZES + _SERIES)
def forward_kernel(
    u, delta, rates, into, out, skip, reset, bias, initial, ends, totals, cuts, y, last, marks,
    T: tl.int32, E: tl.int32, pitch: tl.int32, pieces: tl.int32, length: tl.int32,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """y, the last state, and the states that are kept."""
    TYPE: tl.constexpr = rates.dtype.element_ty
    blocks, program = pitch // BLOCK, tl.program_id(0)
    piece = program // blocks % pieces
    b = (program // blocks // pieces).to(tl.int64)
    e, n = program % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    own, has = e < E, n < N
    real, square = has[:, None], (n * pitch)[:, None] + e[None, :]
    rate, by = tl.load(rates + square, real, 0.0), tl.load(skip + e, own, 0.0)
    shift = tl.load(bias + e, own, 0.0) if BIAS else by
    h = tl.load(initial + b * N * pitch + square, real, 0.0)
    for earlier in range(piece):
        h = _through(h, b * (pieces - 1) + earlier, rate, ends, totals, cuts, square, e, real, pitch, N)

    first = piece * length
    steps = tl.minimum(length, T - first)
    row = b * T + first
    u, delta, y = u + row * E + e, delta + row * E + e, y + row * E + e
    into, out, reset = into + row * N + n, out + row * N + n, reset + row
    marks += (b * tl.cdiv(T, EVERY) + first // EVERY) * N * pitch
    whole = steps // AHEAD * AHEAD
    us, ds, bs, cs = (), (), (), ()
    for j in tl.static_range(AHEAD):
        us += (tl.load(u + j * E, own & (whole > 0), 0.0),)
        ds += (tl.load(delta + j * E, own & (whole > 0), 0.0),)
    for j in tl.static_range(2):
        bs += (tl.load(into + j * N, has & (whole > 0), 0.0),)
        cs += (tl.load(out + j * N, has & (whole > 0), 0.0),)
    for t in range(0, whole, AHEAD):
        if t // EVERY * EVERY == t:
            tl.store(marks + square, h, real)
            marks += N * pitch.to(tl.int64)
        u += AHEAD * E
        delta += AHEAD * E
        more = t + AHEAD < whole
        for j in tl.static_range(AHEAD):
            near = more if j + 2 >= AHEAD else True
            bs += (tl.load(into + (j + 2) * N, has & near, 0.0),)
            cs += (tl.load(out + (j + 2) * N, has & near, 0.0),)
            cut = tl.load(reset + t + j) if RESET else 0
            x = us[0].to(TYPE)
            step, _ = _delta(ds[0], shift, TYPE, BIAS)
            h = _step(h, x, step, bs[0], rate, cut, RESET)
            tl.store(y + j * E, (tl.sum(h * cs[0][:, None], 0) + by * x).to(y.dtype.element_ty), own)
            us = us[1:] + (tl.load(u + j * E, own & more, 0.0),)
            ds = ds[1:] + (tl.load(delta + j * E, own & more, 0.0),)
            bs, cs = bs[1:], cs[1:]
        y += AHEAD * E
        into += AHEAD * N
        out += AHEAD * N
    for t in range(whole, steps):
        if t // EVERY * EVERY == t:
            tl.store(marks + square, h, real)
        cut = tl.load(reset + t) if RESET else 0
        x = tl.load(u, own, 0.0).to(TYPE)
        step, _ = _delta(tl.load(delta, own, 0.0), shift, TYPE, BIAS)
        h = _step(h, x, step, tl.load(into, has, 0.0), rate, cut, RESET)
        tl.store(y, (tl.sum(h * tl.load(out, has, 0.0)[:, None], 0) + by * x).to(y.dtype.element_ty), own)
        u, delta, y, into, out = u + E, delta + E, y + E, into + N, out + N
    if piece == pieces - 1:
        tl.store(last + b * N * pitch + square, h, real)


@triton.jit(do_not_specialize=[*_SIZES, *_SERIES, "values"])
def ends_kernel(
    values, delta, rates, coeffs, reset, bias, ends, totals, cuts,
    T: tl.int32, E: tl.int32, pitch: tl.int32, pieces: tl.int32, length: tl.int32,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """What pieces make of zeros: forward of u and B, all but the last; backward of dL/dy and C, all but the first. And
    what else `_through` needs: ΣΔ, and whether a reset lies between."""
    TYPE: tl.constexpr = rates.dtype.element_ty
    blocks, program = pitch // BLOCK, tl.program_id(0)
    job = (program // blocks).to(tl.int64)  # one of pieces - 1 for each sequence
    b, piece = job // (pieces - 1), (job % (pieces - 1)).to(tl.int32) + BACK
    e, n = program % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    own, has = e < E, n < N
    real, square = has[:, None], (n * pitch)[:, None] + e[None, :]
    rate = tl.load(rates + square, real, 0.0)
    shift = tl.load(bias + e, own, 0.0) if BIAS else e
    h, total, any_cut = tl.zeros_like(rate), tl.zeros([BLOCK], TYPE), False

    # Step k of the walk is time first + k d. All steps exist but at the end of the last piece, where nothing happens.
    first = piece * length + (length - 1) * BACK
    d: tl.constexpr = 1 - 2 * BACK
    row = b * T + first
    values, delta, coeffs, reset = values + row * E + e, delta + row * E + e, coeffs + row * N + n, reset + row
    vs, ds, cs = (), (), ()
    for j in tl.static_range(AHEAD):
        vs += (tl.load(values + j * d * E, own & (first + j * d < T), 0.0),)
        ds += (tl.load(delta + j * d * E, own & (first + j * d < T), 0.0),)
        if j < 2:
            cs += (tl.load(coeffs + j * d * N, has & (first + j * d < T), 0.0),)
    for k in range(0, length, AHEAD):
        values += AHEAD * d * E
        delta += AHEAD * d * E
        for j in tl.static_range(AHEAD):
            t = first + (k + j) * d
            cs += (tl.load(coeffs + (j + 2) * d * N, has & (t + 2 * d < T) & (k + j + 2 < length), 0.0),)
            cut = tl.load(reset + (k + j) * d, t < T, 0) if RESET else 0
            step, _ = _delta(ds[0], shift, TYPE, BIAS)
            step = tl.where(t < T, step, 0.0)
            x = vs[0].to(TYPE)
            if BACK:
                h = tl.exp2(step[None, :] * rate) * (h + x[None, :] * cs[0][:, None])
                if RESET:
                    h = tl.where(cut != 0, 0.0, h)
            else:
                h = _step(h, x, step, cs[0], rate, cut, RESET)
            total += step
            any_cut = any_cut | (cut != 0)
            more = (t + AHEAD * d < T) & (k + AHEAD < length)
            vs = vs[1:] + (tl.load(values + j * d * E, own & more, 0.0),)
            ds = ds[1:] + (tl.load(delta + j * d * E, own & more, 0.0),)
            cs = cs[1:]
        coeffs += AHEAD * d * N
    tl.store(ends + job * N * pitch + square, h, real)
    tl.store(totals + job * pitch + e, total)
    tl.store(cuts + job, any_cut.to(tl.uint8) if RESET else 0)


@triton.jit
def _rows(tensor, row, t, left, E, e, own):
    """The rows of a span that begins at step t of those left, as they are in memory; zeros outside."""
    tensor += (row + t) * E + e
    rows = ()
    for j in tl.static_range(SPAN):
        rows += (tl.load(tensor + j * E, own & (t >= 0) & (t + j < left), 0.0),)
    return rows


@triton.jit
def _advance(
    h, us, ds, into, reset, rate, shift, has, lanes,
    N: tl.constexpr, TYPE: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """The state a span later."""
    bs, cuts = (), ()
    for j in tl.static_range(SPAN):
        bs += (tl.load(into + j * N, has, 0.0),)
        cuts += (tl.load(reset + j) if RESET else 0,)
    for j in tl.static_range(SPAN):
        step, _ = _delta(ds[j], shift, TYPE, BIAS)
        value = tl.gather(step * us[j].to(TYPE), lanes, 0)
        step = tl.gather(step, lanes, 0)
        if RESET:
            h = tl.where(cuts[j] != 0, 0.0, h)
        h = tl.exp2(step[None, :] * rate) * h + value[None, :] * bs[j][:, None]
    return h


@triton.jit
def _span(
    h, carry, sums, us, ds, gs, into, out, reset, grad_u, grad_delta, grad_into, grad_out, left, E, rate, by, shift,
    own, has, lanes, n, N: tl.constexpr, TYPE: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """A span of steps back, from the state before it, `h`, and minus the gradient of the state after it, `carry`. Only
    `left` steps are left; the others do nothing."""
    bs, cuts = (), ()
    for j in tl.static_range(SPAN):
        bs += (tl.load(into + j * N, has & (j < left), 0.0),)
        cuts += (tl.load(reset + j, j < left, 0) if RESET else 0,)
    xs, steps, slopes, kept, found = (), (), (), (), ()
    for j in tl.static_range(SPAN):
        step, slope = _delta(ds[j], shift, TYPE, BIAS)
        step, x = tl.where(j < left, step, 0.0), us[j].to(TYPE)
        xs, steps, slopes = xs + (x,), steps + (step,), slopes + (slope,)
        value = tl.gather(step * x, lanes, 0)
        step = tl.gather(step, lanes, 0)
        if RESET:
            h = tl.where(cuts[j] != 0, 0.0, h)
        decayed = tl.exp2(step[None, :] * rate) * h
        h = decayed + value[None, :] * bs[j][:, None]
        kept += (decayed,)
        found += (tl.gather(tl.sum(tl.gather(gs[j].to(TYPE), lanes, 0)[None, :] * h, 1), n, 0),)
    for j in tl.static_range(SPAN):
        tl.store(grad_out + j * N, found[j], has & (j < left))
    c = tl.load(out + (SPAN - 1) * N, has & (left >= SPAN), 0.0)
    grad_rate, grad_by, grad_shift = sums
    # With all signs turned: else the compiler would keep what it has gathered above, and run out of registers.
    for j in tl.static_range(SPAN - 1, -1, -1):
        x, grad_y, there = xs[j], gs[j].to(TYPE), own & (j < left)
        value = tl.gather(-steps[j] * x, lanes, 0)
        step = tl.gather(-steps[j], lanes, 0)
        grad = c[:, None] * tl.gather(-grad_y, lanes, 0)[None, :] + carry
        if j > 0:
            c = tl.load(out + (j - 1) * N, has & (j <= left), 0.0)
        carry = tl.exp2(-(step[None, :] * rate)) * grad
        if RESET:
            carry = tl.where(cuts[j] != 0, 0.0, carry)
        slope = grad * kept[j]
        grad_rate += slope * step[None, :]
        grad_value = -tl.gather(tl.sum(grad * bs[j][:, None], 0), lanes, 0)
        grad_step = (grad_value * x - LN2 * tl.gather(tl.sum(slope * rate, 0), lanes, 0)) * slopes[j]
        grad_shift += tl.where(there, grad_step, 0.0)
        grad_by += grad_y * x
        tl.store(grad_into + j * N, tl.gather(tl.sum(grad * value[None, :], 1), n, 0), has & (j < left))
        tl.store(grad_u + j * E, (grad_value * steps[j] + grad_y * by).to(grad_u.dtype.element_ty), there)
        tl.store(grad_delta + j * E, grad_step.to(grad_delta.dtype.element_ty), there)
    return carry, (grad_rate, grad_by, grad_shift)


@triton.jit(do_not_specialize=_SIZES + _SERIES)
def backward_kernel(
    u, delta, rates, into, out, skip, reset, bias, marks, grad_y, grad_last, ends, totals, cuts, scratch,
    grad_u, grad_delta, grad_initial, grad_into, grad_out, grad_channels,
    T: tl.int32, E: tl.int32, pitch: tl.int32, pieces: tl.int32, length: tl.int32, batch: tl.int32, blocks: tl.int32,
    units: tl.int32, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    RESET: tl.constexpr,
):  # fmt: skip
    """The gradients: those of B and C for each block of channels, those of A, D and the bias for each piece."""
    TYPE: tl.constexpr = rates.dtype.element_ty
    program = tl.program_id(0)
    block, piece = program % blocks, program // blocks % pieces
    b, pitch = (program // blocks // pieces).to(tl.int64), blocks * BLOCK  # so the compiler knows its factors
    lanes, n = tl.arange(0, BLOCK), tl.arange(0, STATES)
    e = block * BLOCK + lanes
    own, has = e < E, n < N
    real, square = has[:, None], (n * pitch)[:, None] + e[None, :]
    rate, by = tl.load(rates + square, real, 0.0), tl.load(skip + e, own, 0.0)
    shift = tl.load(bias + e, own, 0.0) if BIAS else by
    carry = tl.load(grad_last + b * N * pitch + square, real, 0.0)
    for later in range(pieces - 1 - piece):
        q = b * (pieces - 1) + pieces - 2 - later
        carry = _through(carry, q, rate, ends, totals, cuts, square, e, real, pitch, N)
    carry = -carry  # as _span has it
    zero = tl.zeros([BLOCK], TYPE)
    sums = (tl.zeros_like(rate), zero, zero)
    scratch += program.to(tl.int64) * units * (N * BLOCK) + (n * BLOCK)[:, None] + lanes[None, :]
    parts = (block * batch + b) * T * N
    grad_into, grad_out = grad_into + parts + n, grad_out + parts + n

    first = piece * length
    stop = tl.minimum(first + length, T)
    chunks = tl.cdiv(stop - first, EVERY)
    for done in range(chunks):
        begin = first + (chunks - 1 - done) * EVERY
        row = b * T + begin
        left = tl.minimum(EVERY, stop - begin)
        spans = tl.cdiv(left, SPAN)
        own_into, own_reset, near = into + row * N + n, reset + row, (spans - 1) * SPAN
        gs = _rows(grad_y, row, near, left, E, e, own)
        h = tl.load(marks + (b * tl.cdiv(T, EVERY) + begin // EVERY) * N * pitch + square, real, 0.0)
        us, ds = _rows(u, row, 0, left, E, e, own), _rows(delta, row, 0, left, E, e, own)
        for k in range(1, spans):
            t = k * SPAN
            tl.store(scratch + (k - 1) * (N * BLOCK), h, real)
            next_us, next_ds = _rows(u, row, t, left, E, e, own), _rows(delta, row, t, left, E, e, own)
            before = own_into + (t - SPAN) * N
            h = _advance(h, us, ds, before, own_reset + t - SPAN, rate, shift, has, lanes, N, TYPE, BIAS, RESET)
            us, ds = next_us, next_ds
        tl.store(scratch + (spans - 1) * (N * BLOCK), h, real)
        tl.debug_barrier()
        for k in range(spans):
            t = near - k * SPAN
            h = tl.load(scratch + (spans - 1 - k) * (N * BLOCK), real, 0.0)
            us, ds = _rows(u, row, t, left, E, e, own), _rows(delta, row, t, left, E, e, own)
            next_gs = _rows(grad_y, row, t - SPAN, left, E, e, own)
            at, series = (begin + t).to(tl.int64) * N, (row + t) * E + e
            carry, sums = _span(
                h, carry, sums, us, ds, gs, own_into + t * N, out + (row + t) * N + n, own_reset + t, grad_u + series,
                grad_delta + series, grad_into + at, grad_out + at, left - t, E, rate, by, shift, own, has, lanes, n,
                N, TYPE, BIAS, RESET,
            )  # fmt: skip
            gs = next_gs
        tl.debug_barrier()

    if piece == 0:
        tl.store(grad_initial + b * N * pitch + square, -carry, real)
    grad_channels += (b * pieces + piece) * (N + 2) * pitch
    tl.store(grad_channels + square, sums[0], real)
    tl.store(grad_channels + N * pitch + e, sums[1])
    tl.store(grad_channels + (N + 1) * pitch + e, sums[2])


@triton.jit(do_not_specialize=["count", "size"])
def sum_kernel(parts, total, count: tl.int32, size: tl.int64, BLOCK: tl.constexpr):
    """The sum of `count` parts, one after the other."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], total.dtype.element_ty)
    for _ in range(count):
        x += tl.load(parts + i, i < size, 0.0)
        parts += size
    tl.store(total + i, x, i < size)
