"""The steps of a scan as maps x -> A x + B on the GPU, and how maps are composed.

A map is a triple (A, B, cut): with a `cut`, a reset, in it, the result is B whatever comes in, by selection. A and B
are pairs: two neighbouring channels, or the two parts of a complex number. Multiply-adds are written out, so that no
kernel rounds otherwise than another.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# ruff: noqa: RUF005  (Triton's language has no starred expressions)

import triton
import triton.language as tl

from minrnn.ops.triton.tiles import unstack


@triton.jit
def pair(x, shape: tl.constexpr, TYPE: tl.constexpr, COMPLEX: tl.constexpr):
    """The number x twice, or as a complex one."""
    return tl.full(shape, x, TYPE), tl.full(shape, 0.0 if COMPLEX else x, TYPE)


@triton.jit
def identity(shape: tl.constexpr, flags: tl.constexpr, TYPE: tl.constexpr, COMPLEX: tl.constexpr):
    """The map that changes nothing."""
    return pair(1.0, shape, TYPE, COMPLEX), pair(0.0, shape, TYPE, COMPLEX), tl.zeros(flags, tl.int32)


@triton.jit
def row(x):
    return x[0][None, :], x[1][None, :]


@triton.jit
def conj(x, COMPLEX: tl.constexpr):
    return (x[0], -x[1]) if COMPLEX else x


@triton.jit
def choose(where, x, y):
    return tl.where(where, x[0], y[0]), tl.where(where, x[1], y[1])


@triton.jit
def add(x, y):
    return x[0] + y[0], x[1] + y[1]


@triton.jit
def times(x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return tl.fma(-x[1], y[1], x[0] * y[0]), tl.fma(x[0], y[1], x[1] * y[0])
    else:
        return x[0] * y[0], x[1] * y[1]


@triton.jit
def advance(a, x, b, COMPLEX: tl.constexpr):
    """a x + b."""
    if COMPLEX:
        return tl.fma(a[0], x[0], tl.fma(-a[1], x[1], b[0])), tl.fma(a[0], x[1], tl.fma(a[1], x[0], b[1]))
    else:
        return tl.fma(a[0], x[0], b[0]), tl.fma(a[1], x[1], b[1])


@triton.jit
def apply(step, x, COMPLEX: tl.constexpr, RESET: tl.constexpr):
    """What the map `step` makes of x."""
    y = advance(step[0], x, step[1], COMPLEX)
    return choose(step[2] != 0, step[1], y) if RESET else y


@triton.jit
def follow(before, step, COMPLEX: tl.constexpr, RESET: tl.constexpr):
    """The map `step` after the map `before`."""
    return times(before[0], step[0], COMPLEX), apply(step, before[1], COMPLEX, RESET), before[2] | step[2]


@triton.jit
def of_groups(step, S: tl.constexpr, P: tl.constexpr, RESET: tl.constexpr, ONCE: tl.constexpr):
    """The maps of the S groups, [S, P] each, as S maps [P] known to all threads; through shared memory, all numbers at
    once or one by one.

    Numbers that go there together must be wanted where they are made, too: otherwise the compiler has each thread make
    those of all groups by itself, which takes S times as long. With them goes the flag, for the same reason.
    """
    A, B, cut = step
    flag = tl.broadcast_to(cut.to(A[0].dtype), [S, P])
    maps = ()
    if ONCE:
        numbers = tl.join(tl.join(A[0], B[0]), tl.join(A[1], B[1]))
        if RESET:
            numbers = tl.join(numbers, tl.join(tl.join(flag, flag), tl.join(flag, flag)))
        WIDTH: tl.constexpr = 8 if RESET else 4
        groups = unstack(tl.permute(tl.reshape(numbers, [S, P, WIDTH]), (1, 2, 0)), S)
        for s in tl.static_range(S):
            x = unstack(groups[s], WIDTH)
            if RESET:
                maps = maps + (((x[0], x[2]), (x[4], x[6]), x[1].to(tl.int32)),)
            else:
                maps = maps + (((x[0], x[1]), (x[2], x[3]), tl.zeros([P], tl.int32)),)
    else:
        A0, A1 = unstack(tl.permute(A[0], (1, 0)), S), unstack(tl.permute(A[1], (1, 0)), S)
        B0, B1 = unstack(tl.permute(B[0], (1, 0)), S), unstack(tl.permute(B[1], (1, 0)), S)
        flags = unstack(tl.permute(flag, (1, 0)), S)
        for s in tl.static_range(S):
            maps = maps + (((A0[s], A1[s]), (B0[s], B1[s]), flags[s].to(tl.int32)),)
    return maps


@triton.jit
def join(maps, prefix, entry, S: tl.constexpr, P: tl.constexpr, COMPLEX: tl.constexpr, RESET: tl.constexpr):
    """(what comes into each group [S, P], the map from the chunk's beginning to the tile's end): `maps` of the groups,
    `prefix` of the tiles before, `entry` [P] what comes into the chunk."""
    group = tl.arange(0, S)[:, None]
    into = pair(0.0, [S, P], entry[0].dtype, COMPLEX)
    for s in tl.static_range(S):
        into = choose(group == s, row(apply(prefix, entry, COMPLEX, RESET)), into)
        prefix = follow(prefix, maps[s], COMPLEX, RESET)
    return into, prefix


@triton.jit
def load_pair(address, own, odd, other, COMPLEX: tl.constexpr):
    """The pair at each address, where the masks `own` and `odd` say that there is one; elsewhere the number `other`."""
    second = 0.0 if COMPLEX else other
    return tl.load(address, mask=own, other=other), tl.load(address + 1, mask=odd, other=second)


@triton.jit
def store_pair(address, x, own, odd):
    tl.store(address, x[0], mask=own)
    tl.store(address + 1, x[1], mask=odd)


@triton.jit
def load_map(totals, place, pairs, own, odd, H, COMPLEX: tl.constexpr, RESET: tl.constexpr):
    """The map number `place` of `totals`, each of which is three rows: A, B, cut."""
    address = totals + place * 3 * H + pairs
    cut = tl.zeros(pairs.shape, tl.int32)
    if RESET:
        cut = tl.load(address + 2 * H, mask=own, other=0).to(tl.int32)
    A = load_pair(address, own, odd, 0.0, COMPLEX)
    return A, load_pair(address + H, own, odd, 0.0, COMPLEX), cut


@triton.jit
def store_map(totals, place, step, pairs, H, RESET: tl.constexpr):
    """As load_map reads it."""
    address = totals + place * 3 * H + pairs
    store_pair(address, step[0], pairs < H, pairs + 1 < H)
    store_pair(address + H, step[1], pairs < H, pairs + 1 < H)
    if RESET:
        tl.store(address + 2 * H, step[2].to(totals.dtype.element_ty), mask=pairs < H)
