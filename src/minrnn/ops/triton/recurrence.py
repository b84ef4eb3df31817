"""The recurrence on the GPU, once for all scans: h = a h + b, and its adjoint C = a (g + C).

A program owns C neighbouring numbers of a row (channels, or parts of complex channels) of one sequence and walks it
tile by tile, R = S L steps each, with the next tiles on their way to shared memory. Each of S groups of threads takes
the gates of L steps at once and composes the steps one after the other; the maps of the S groups are joined; then every
step is applied to what came into its group. A thread holds two neighbouring numbers of L steps.

Steps count in the order of the walk: step q is time q, or n-1-q in a walk against time, n being the sequence's length.
Tiles form chunks. What comes into a chunk is what the maps of the chunks before make of the first state, and what comes
into a tile what those of its chunk's tiles before make of that: whether one program walks all chunks of a sequence or
each has its own, with their maps found first, does not change a bit.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# ruff: noqa: RUF005  (Triton's language has no starred expressions)

import triton
import triton.language as tl

from minrnn.ops.triton.gates import recurrence, slopes
from minrnn.ops.triton.maps import (
    add,
    advance,
    apply,
    choose,
    conj,
    identity,
    join,
    load_map,
    load_pair,
    of_groups,
    pair,
    row,
    store_map,
    store_pair,
    times,
)
from minrnn.ops.triton.tiles import fill, load_steps, of_bytes, place, resets, rows, store_step, unstack


@triton.jit
def _inputs(x, i: tl.constexpr, INPUTS: tl.constexpr):
    """The inputs of number i of a tile."""
    return (x[0][i], x[1][i]) if INPUTS == 2 else (x[0][i], x[1][i], x[2][i])


# What makes no variant of a kernel: all but the formulas, the sizes of tiles and the series. What is absent is not
# read; another tensor stands in for it.
_RUNTIME = [
    *("reset", "restart", "lengths", "initial", "entry", "last", "totals", "grad_restart"),
    *("T", "units", "chunks", "tiles", "each", "flip", "given"),
    *("batch0", "time0", "batch1", "time1", "batch_h", "time_h", "batch_g", "time_g"),
    *("batch_d0", "time_d0", "batch_d1", "time_d1"),
    *("batch_r", "time_r", "batch_s", "batch_l", "batch_i", "batch_e"),
]


@triton.jit
def _next_chunk(i, tiles, begin, prefix, entry, P: tl.constexpr, COMPLEX: tl.constexpr, RESET: tl.constexpr):
    """At a chunk's first tile, other than a program's: (identity, what comes into the chunk)."""
    fresh = (i % tiles == 0) & (i > begin)
    none = identity([P], [P], entry[0].dtype, COMPLEX)
    entry = choose(fresh, apply(prefix, entry, COMPLEX, RESET), entry)
    prefix = (choose(fresh, none[0], prefix[0]), choose(fresh, none[1], prefix[1]), tl.where(fresh, none[2], prefix[2]))
    return prefix, entry


@triton.jit(do_not_specialize=_RUNTIME)
def forward_kernel(
    x0, x1, hidden, reset: tl.pointer_type(tl.uint8), restart, lengths: tl.pointer_type(tl.int64), entry, last, totals,
    T: tl.int32, units: tl.int32, chunks: tl.int32, tiles: tl.int32, each: tl.int32, flip: tl.int32, given: tl.int32,
    batch0: tl.int64, time0: tl.int64, batch1: tl.int64, time1: tl.int64, batch_h: tl.int64, time_h: tl.int64,
    batch_r: tl.int64, time_r: tl.int64, batch_s: tl.int64, batch_l: tl.int64, batch_e: tl.int64,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, COMPLEX: tl.constexpr, RESET: tl.constexpr, TOTALS: tl.constexpr,
    UNIT: tl.constexpr, CHANNEL: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of all steps and the last state; or, with TOTALS, the map that each chunk is."""
    TYPE: tl.constexpr = last.dtype.element_ty
    INPUTS: tl.constexpr = 2 if GATES == "linear" or GATES == "mingru" else 3
    R: tl.constexpr = S * L
    P: tl.constexpr = C // 2
    H = units * UNIT
    b, c, first, end, n = place(T, H, chunks, each, lengths, batch_l, given, C)
    cols, pairs = c + tl.arange(0, C), c + 2 * tl.arange(0, P)
    channels, own, odd = (cols < H)[None, :], pairs < H, pairs + 1 < H
    direction, origin = 1 - 2 * flip, flip * (n - 1)
    begin, stop = first * tiles, tl.minimum(end * tiles, tl.cdiv(n, R))
    steps, group = tl.arange(0, R), tl.arange(0, S)[:, None] * L

    start, state = pair(0.0, [P], TYPE, COMPLEX), pair(0.0, [P], TYPE, COMPLEX)
    if RESET:
        has = (given & 4) != 0
        start = load_pair(restart + b * batch_s + pairs, own & has, odd & has, 0.0, COMPLEX)
        upcoming = resets(reset, b, batch_r, begin * R + steps, n, origin, direction, time_r)
    if not TOTALS:
        has = (given & 8) != 0
        state = load_pair(entry + b * batch_e + first * H + pairs, own & has, odd & has, 0.0, COMPLEX)
        if (n == 0) & (first == 0):
            store_pair(last + b * H + pairs, state, own, odd)
    if TOTALS and end == chunks:  # nothing comes after it
        stop = begin
    prefix = identity([P], [P], TYPE, COMPLEX)
    for i in tl.range(begin, stop, num_stages=STAGES):
        q, left = i * R + steps, n - i * R
        t, mask = origin + direction * q, (q < n)[:, None] & channels
        if RESET:
            cuts = of_bytes(upcoming, S, L)
            upcoming = resets(reset, b, batch_r, q + R, n, origin, direction, time_r)
        if GATES == "linear":
            x = (
                load_steps(x0, b, batch0, t, time0, cols * CHANNEL, mask, S, L, TYPE, UNIT),
                load_steps(x1, b, batch1, t, time1, cols, mask, S, L, TYPE, UNIT),
            )
        else:
            x = (
                load_steps(x0, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),
                load_steps(x0 + H, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),
            )
            if INPUTS == 3:
                x = x + (load_steps(x0 + 2 * H, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),)

        A, B, cut = identity([S, P], [S, 1], TYPE, COMPLEX)
        maps = ()
        for j in tl.static_range(L):
            a0, b0 = recurrence(_inputs(x, 2 * j, INPUTS), GATES, ACTIVATION)
            a1, b1 = recurrence(_inputs(x, 2 * j + 1, INPUTS), GATES, ACTIVATION)
            carried = B
            if RESET:
                carried = choose(cuts[j] != 0, row(start), B)
                cut = cut | cuts[j]
            A, B = times(A, (a0, a1), COMPLEX), advance((a0, a1), carried, (b0, b1), COMPLEX)
            maps = maps + ((A, B, cut),)

        prefix, state = _next_chunk(i, tiles, begin, prefix, state, P, COMPLEX, RESET)
        maps_of = of_groups((A, B, cut), S, P, RESET, not TOTALS)
        into, prefix = join(maps_of, prefix, state, S, P, COMPLEX, RESET)
        if not TOTALS:
            address = rows(hidden, b, batch_h, origin + direction * (i * R + tl.arange(0, S) * L), time_h, cols, UNIT)
            for j in tl.static_range(L):
                h = apply(maps[j], into, COMPLEX, RESET)
                store_step(address + j * direction * (time_h.to(tl.int64) * UNIT), h, (group < left - j) & channels)
            if left <= R:
                h = into
                for j in tl.static_range(L):
                    h = choose(group == left - 1 - j, apply(maps[j], into, COMPLEX, RESET), h)
                here = (group < left) & (left <= group + L)
                store_pair(last + b * H + pairs[None, :] + 0 * group, h, here & own[None, :], here & odd[None, :])
    if TOTALS:
        store_map(totals, b * chunks + first, prefix, pairs, H, RESET)
    else:
        top, bottom = tl.maximum(n, begin * R), tl.minimum(T, end * tiles * R)
        fill(hidden, b, batch_h, top, bottom, time_h, cols, channels, R, UNIT)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_kernel(
    x0, x1, hidden, grad_hidden, grad0, grad1, reset: tl.pointer_type(tl.uint8), restart,
    lengths: tl.pointer_type(tl.int64), initial, entry, last, totals, grad_restart,
    T: tl.int32, units: tl.int32, chunks: tl.int32, tiles: tl.int32, each: tl.int32, flip: tl.int32, given: tl.int32,
    batch0: tl.int64, time0: tl.int64, batch1: tl.int64, time1: tl.int64, batch_h: tl.int64, time_h: tl.int64,
    batch_g: tl.int64, time_g: tl.int64, batch_d0: tl.int64, time_d0: tl.int64, batch_d1: tl.int64, time_d1: tl.int64,
    batch_r: tl.int64, time_r: tl.int64, batch_s: tl.int64, batch_l: tl.int64, batch_i: tl.int64, batch_e: tl.int64,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, COMPLEX: tl.constexpr, RESET: tl.constexpr, TOTALS: tl.constexpr,
    UNIT: tl.constexpr, CHANNEL: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of a step's inputs and of the first state, which goes to `last`, for the walk is the scan's against
    its time; or, with TOTALS, the map that each chunk is. With RESET = 2 each chunk's share of restart's gradient, too.

    A step takes C, the gradient of the state that it hands on, to G = g + C, that of h, and to a G, that of what was
    carried into it. `entry` is C of the walk's first step: the gradient of the last state.
    """
    TYPE: tl.constexpr = last.dtype.element_ty
    INPUTS: tl.constexpr = 2 if GATES == "linear" or GATES == "mingru" else 3
    R: tl.constexpr = S * L
    P: tl.constexpr = C // 2
    H = units * UNIT
    b, c, first, end, n = place(T, H, chunks, each, lengths, batch_l, given, C)
    cols, pairs = c + tl.arange(0, C), c + 2 * tl.arange(0, P)
    channels, own, odd = (cols < H)[None, :], pairs < H, pairs + 1 < H
    direction, origin = 1 - 2 * flip, flip * (n - 1)
    begin, stop = first * tiles, tl.minimum(end * tiles, tl.cdiv(n, R))
    steps, group = tl.arange(0, R), tl.arange(0, S)[:, None] * L

    has = (given & 2) != 0
    initials = load_pair(initial + b * batch_i + pairs, own & has, odd & has, 0.0, COMPLEX)
    start, state = pair(0.0, [P], TYPE, COMPLEX), pair(0.0, [P], TYPE, COMPLEX)
    if RESET:
        has = (given & 4) != 0
        start = load_pair(restart + b * batch_s + pairs, own & has, odd & has, 0.0, COMPLEX)
        upcoming = resets(reset, b, batch_r, begin * R + steps, n, origin, direction, time_r)
    if not TOTALS:
        has = (given & 8) != 0
        state = load_pair(entry + b * batch_e + first * H + pairs, own & has, odd & has, 0.0, COMPLEX)
    if TOTALS and end == chunks:  # nothing comes after it
        stop = begin
    prefix = identity([P], [P], TYPE, COMPLEX)
    shares = pair(0.0, [S, P], TYPE, COMPLEX)
    for i in tl.range(begin, stop, num_stages=STAGES):
        q, left = i * R + steps, n - i * R
        t, mask = origin + direction * q, (q < n)[:, None] & channels
        if RESET:
            cuts = of_bytes(upcoming, S, L)
            upcoming = resets(reset, b, batch_r, q + R, n, origin, direction, time_r)
        if GATES == "linear":
            x = (
                load_steps(x0, b, batch0, t, time0, cols * CHANNEL, mask, S, L, TYPE, UNIT),
                load_steps(x1, b, batch1, t, time1, cols, mask, S, L, TYPE, UNIT),
            )
        else:
            x = (
                load_steps(x0, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),
                load_steps(x0 + H, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),
            )
            if INPUTS == 3:
                x = x + (load_steps(x0 + 2 * H, b, batch0, t, time0, cols, mask, S, L, TYPE, UNIT),)
        # The state before a step is that of the walk's next step.
        behind = (q + 1 < n)[:, None] & channels
        h = load_steps(hidden, b, batch_h, t + direction, time_h, cols, behind, S, L, TYPE, UNIT)
        g = load_steps(grad_hidden, b, batch_g, t, time_g, cols, mask, S, L, TYPE, UNIT)

        A, B, cut = identity([S, P], [S, 1], TYPE, COMPLEX)
        kept = ()
        for j in tl.static_range(L):
            before = choose(group == left - 1 - j, row(initials), (h[2 * j], h[2 * j + 1]))
            if RESET:
                before = choose(cuts[j] != 0, row(start), before)
            if GATES == "linear":
                a = conj((x[0][2 * j], x[0][2 * j + 1]), COMPLEX)
                d0, d1 = (before[0],), (before[1],)
            else:
                a0, d0 = slopes(_inputs(x, 2 * j, INPUTS), before[0], GATES, ACTIVATION)
                a1, d1 = slopes(_inputs(x, 2 * j + 1, INPUTS), before[1], GATES, ACTIVATION)
                a = (a0, a1)
            # Steps beyond the end hand on what they get: the gradient of the first state.
            a = choose(group < left - j, a, pair(1.0, [S, P], TYPE, COMPLEX))
            G = add((g[2 * j], g[2 * j + 1]), B)
            kept = kept + ((A, G, cut, a, d0, d1),)
            A, B = times(A, a, COMPLEX), times(a, G, COMPLEX)
            if RESET:
                B = choose(cuts[j] != 0, pair(0.0, [S, P], TYPE, COMPLEX), B)
                cut = cut | cuts[j]

        prefix, state = _next_chunk(i, tiles, begin, prefix, state, P, COMPLEX, RESET)
        maps_of = of_groups((A, B, cut), S, P, RESET, not TOTALS)
        into, prefix = join(maps_of, prefix, state, S, P, COMPLEX, RESET)
        if not TOTALS:
            at = origin + direction * (i * R + tl.arange(0, S) * L)
            to0 = rows(grad0, b, batch_d0, at, time_d0, cols, UNIT)
            to1 = rows(grad1, b, batch_d1, at, time_d1, cols, UNIT)
            for j in tl.static_range(L):
                A, G, cut, a, d0, d1 = kept[j]
                G = apply((A, G, cut), into, COMPLEX, RESET)
                here = (group < left - j) & channels
                offset = j * direction * (time_d0.to(tl.int64) * UNIT)
                if GATES == "linear":
                    store_step(to0 + offset, times(G, conj((d0[0], d1[0]), COMPLEX), COMPLEX), here)
                    store_step(to1 + j * direction * (time_d1.to(tl.int64) * UNIT), G, here)
                else:
                    for k in tl.static_range(INPUTS):
                        store_step(to0 + (offset + k * H), (G[0] * d0[k], G[1] * d1[k]), here)
                if RESET == 2:
                    carried = times(a, G, COMPLEX)
                    shares = choose(cuts[j] != 0, add(shares, carried), shares)
            if RESET == 2:
                if ((i + 1) % tiles == 0) | (i + 1 == stop):
                    share = pair(0.0, [P], TYPE, COMPLEX)
                    even, uneven = unstack(tl.permute(shares[0], (1, 0)), S), unstack(tl.permute(shares[1], (1, 0)), S)
                    for s in tl.static_range(S):
                        share = add(share, (even[s], uneven[s]))
                    store_pair(grad_restart + (b * chunks + i // tiles) * H + pairs, share, own, odd)
                done = (i + 1) % tiles == 0
                shares = choose(done, pair(0.0, [S, P], TYPE, COMPLEX), shares)
    if TOTALS:
        store_map(totals, b * chunks + first, prefix, pairs, H, RESET)
    else:
        # The chunk with the walk's last step knows the gradient of the first state.
        if (tl.maximum(n, 1) > begin * R) & (n <= end * tiles * R):
            store_pair(last + b * H + pairs, apply(prefix, state, COMPLEX, RESET), own, odd)
        top, bottom = tl.maximum(n, begin * R), tl.minimum(T, end * tiles * R)
        if GATES == "linear":
            fill(grad0, b, batch_d0, top, bottom, time_d0, cols, channels, R, UNIT)
            fill(grad1, b, batch_d1, top, bottom, time_d1, cols, channels, R, UNIT)
        else:
            for k in tl.static_range(INPUTS):
                fill(grad0 + k * H, b, batch_d0, top, bottom, time_d0, cols, channels, R, UNIT)


@triton.jit(do_not_specialize=["entry", "totals", "entries", "chunks", "H", "batch", "given"])
def carry_kernel(
    entry, totals, entries, chunks: tl.int32, H: tl.int32, batch: tl.int64, given: tl.int32,
    COMPLEX: tl.constexpr, RESET: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """entries [B, chunks, H], what comes into each chunk: the maps in `totals` applied to `entry` [B, H] one after the
    other. Eight maps are asked for at once."""
    P: tl.constexpr = C // 2
    program, blocks = tl.program_id(0), tl.cdiv(H, C)
    pairs, b = program % blocks * C + 2 * tl.arange(0, P), (program // blocks).to(tl.int64)
    own, odd = pairs < H, pairs + 1 < H
    state = load_pair(entry + b * batch + pairs, own & (given != 0), odd & (given != 0), 0.0, COMPLEX)
    store_pair(entries + b * chunks * H + pairs, state, own, odd)
    for k0 in range(0, chunks - 1, 8):
        maps = ()
        for k in tl.static_range(8):
            more = k0 + k < chunks - 1
            maps = maps + (load_map(totals, b * chunks + k0 + k, pairs, own & more, odd & more, H, COMPLEX, RESET),)
        for k in tl.static_range(8):
            more = k0 + k < chunks - 1
            state = apply(maps[k], state, COMPLEX, RESET)
            store_pair(entries + (b * chunks + k0 + k + 1) * H + pairs, state, own & more, odd & more)


@triton.jit(do_not_specialize=["parts", "total", "chunks", "H"])
def sum_kernel(parts, total, chunks: tl.int32, H: tl.int32, C: tl.constexpr):
    """total [B, H] = the parts [B, chunks, H] of each sequence, one after the other."""
    program, blocks = tl.program_id(0), tl.cdiv(H, C)
    cols, b = program % blocks * C + tl.arange(0, C), (program // blocks).to(tl.int64)
    value = tl.zeros([C], total.dtype.element_ty)
    for k in range(chunks):
        value += tl.load(parts + (b * chunks + k) * H + cols, mask=cols < H, other=0)
    tl.store(total + b * H + cols, value, mask=cols < H)
