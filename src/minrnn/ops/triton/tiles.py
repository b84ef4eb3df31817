"""Where a program's numbers are, and how a tile of them is taken apart: S groups of L steps, P pairs of numbers."""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# ruff: noqa: RUF005  (Triton's language has no starred expressions)

import triton
import triton.language as tl


@triton.jit
def unstack(x, N: tl.constexpr):
    """The N tensors [...] of x [..., N]."""
    if N == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + (N // 2, 2)))
        even = unstack(even, N // 2)
        odd = unstack(odd, N // 2)
        found = ()
        for i in tl.static_range(N // 2):
            found = found + (even[i], odd[i])
        return found


@triton.jit
def of_steps(tile, S: tl.constexpr, L: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr):
    """[S L, 2 P] as 2 L tensors [S, P]: the even and the odd numbers of each step of the groups."""
    steps = tl.permute(tl.reshape(tile, [S, L, P, 2]), (0, 2, 1, 3))
    numbers = unstack(tl.reshape(steps, [S, P, 2 * L]), 2 * L)
    wide = ()
    for i in tl.static_range(2 * L):
        wide = wide + (numbers[i].to(TYPE),)
    return wide


@triton.jit
def of_bytes(flags, S: tl.constexpr, L: tl.constexpr):
    """A tile's flags, [S L] bytes, as L tensors [S, 1]."""
    steps = unstack(tl.reshape(flags, [S, L]), L)
    wide = ()
    for j in tl.static_range(L):
        wide = wide + (steps[j].to(tl.int32)[:, None],)
    return wide


@triton.jit
def place(T, H, chunks, each, lengths, batch_l, given, C: tl.constexpr):
    """What a program owns: sequence b, numbers from c on, chunks `first` to `end`; and the sequence's length."""
    program = tl.program_id(0)
    blocks, parts = tl.cdiv(H, C), tl.cdiv(chunks, each)
    c = program % blocks * C
    first = program // blocks % parts * each
    b = (program // blocks // parts).to(tl.int64)
    n = tl.load(lengths + b * batch_l, mask=(given & 1) != 0, other=T)
    return b, c, first, tl.minimum(first + each, chunks), tl.minimum(tl.maximum(n, 0), T).to(tl.int32)


@triton.jit
def rows(tensor, b, batch, t, time, cols, UNIT: tl.constexpr):
    """Addresses of the numbers `cols` [C] of the steps `t` [R] of sequence b. Strides come in units of UNIT numbers, by
    which the compiler sees how wide it may read and write."""
    batch, time = batch.to(tl.int64) * UNIT, time.to(tl.int64) * UNIT
    return tensor + b * batch + t.to(tl.int64)[:, None] * time + cols[None, :]


@triton.jit
def load_steps(
    tensor, b, batch, t, time, cols, mask, S: tl.constexpr, L: tl.constexpr, TYPE: tl.constexpr, UNIT: tl.constexpr
):
    """The steps `t` [S L] as of_steps gives them; zeros outside the mask."""
    tile = tl.load(rows(tensor, b, batch, t, time, cols, UNIT), mask=mask, other=0)
    return of_steps(tile, S, L, cols.shape[0] // 2, TYPE)


@triton.jit
def store_step(rows, x, mask):
    """A pair [S, P] to the addresses `rows` [S, 2 P]."""
    tile = tl.reshape(tl.join(x[0], x[1]), rows.shape)
    tl.store(rows, tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def fill(tensor, b, batch, begin, end, time, cols, mask, R: tl.constexpr, UNIT: tl.constexpr):
    """Zeros to the steps from `begin` to `end`: padding."""
    zeros = tl.zeros([R, cols.shape[0]], tensor.dtype.element_ty)
    for first in range(begin, end, R):
        t = first + tl.arange(0, R)
        tl.store(rows(tensor, b, batch, t, time, cols, UNIT), zeros, mask=(t < end)[:, None] & mask)


@triton.jit
def resets(reset, b, batch, q, n, origin, direction, time):
    """The resets of the steps q [R]. No copy to shared memory is as short as a byte, so that the next tile's are read a
    tile ahead."""
    return tl.load(reset + b * batch + (origin + direction * q).to(tl.int64) * time, mask=q < n, other=0)
