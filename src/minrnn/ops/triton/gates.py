"""The gates of ops/gates.py on the GPU: elementwise formulas in the state's type, and their slopes.

Every sigmoid comes with its complement, both to a relative 4e-6 in float32 (less near zero), from one exponential of a
number below zero: nothing overflows, and 1 - sigmoid never cancels.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false

import triton
import triton.language as tl

from minrnn.ops.triton import interpreted

# The interpreter knows no assembly.
_ASSEMBLY = tl.constexpr(not interpreted())


@triton.jit
def _exp(x):
    """exp(x)."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)


@triton.jit
def _inverse(x):
    """1 / x for x in [1, 4]; in float32 by the GPU's own instruction, which is right to the last bit but one."""
    if _ASSEMBLY and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x)."""
    small = _exp(-tl.abs(x))
    large = _inverse(1.0 + small)
    small = small * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The candidate's activation and its slope."""
    if ACTIVATION == "identity":
        return x, tl.full(x.shape, 1.0, x.dtype)
    elif ACTIVATION == "tanh":
        small = _exp(-2.0 * tl.abs(x))
        y = (1.0 - small) * _inverse(1.0 + small)
        y = tl.where(x < 0, -y, y)
        if x.dtype == tl.float32:  # near zero the difference above has few digits; Taylor's series has all
            s = x * x
            series = tl.fma(s, tl.fma(s, tl.fma(s, 62 / 2835, -17 / 315), 2 / 15), -1 / 3)
            y = tl.where(tl.abs(x) < 0.25, tl.fma(x * s, series, x), y)
        return y, tl.fma(-y, y, 1.0)
    else:
        small = _exp(tl.minimum(x, 0.0))
        inverse = _inverse(1.0 + small)
        below = small * inverse
        # A NaN takes the second.
        return tl.where(x < 0, below, x + 0.5), tl.where(x < 0, below * inverse, 1.0)


@triton.jit
def _shares(forget, into):
    """(f, i) / (f + i) for f = sigmoid(forget), i = sigmoid(into), and the two exponentials that they are made of.

    With u(x) = 1 + exp(-|x|), sigmoid(x) = exp(min(x, 0)) / u(x): only the difference of the two minima is needed, and
    neither quotient is 0/0 when both gates are shut.
    """
    e0 = _exp(-tl.abs(forget))
    e1 = _exp(-tl.abs(into))
    apart = tl.minimum(forget, 0.0) - tl.minimum(into, 0.0)
    less = _exp(-tl.abs(apart))
    weight0 = tl.where(apart < 0, less, 1.0) * (1.0 + e1)
    weight1 = tl.where(apart < 0, 1.0, less) * (1.0 + e0)
    whole = _inverse(weight0 + weight1)
    return weight0 * whole, weight1 * whole, e0, e1


@triton.jit
def _shut(x, e):
    """sigmoid(-x), given e = exp(-|x|)."""
    return tl.where(x < 0, 1.0, e) * _inverse(1.0 + e)


@triton.jit
def recurrence(x, GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """(a, b) of h = a h + b, from the inputs `x` of a step."""
    if GATES == "linear":
        return x[0], x[1]
    elif GATES == "mingru":
        write, keep = _sigmoids(x[0])
        value, _ = _activate(x[1], ACTIVATION)
        return keep, write * value
    else:
        value, _ = _activate(x[2], ACTIVATION)
        if GATES == "minlstm":
            keep, write, _, _ = _shares(x[0], x[1])
        else:
            keep, _ = _sigmoids(x[0])
            write, _ = _sigmoids(x[1])
        return keep, write * value


@triton.jit
def slopes(x, before, GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """a of h = a h + b, and the derivatives of h by the inputs `x` where `before` was carried in: (a, slopes)."""
    if GATES == "mingru":
        write, keep = _sigmoids(x[0])
        value, slope = _activate(x[1], ACTIVATION)
        return keep, ((value - before) * (write * keep), write * slope)
    else:
        value, slope = _activate(x[2], ACTIVATION)
        if GATES == "minlstm":
            keep, write, e0, e1 = _shares(x[0], x[1])
            both = (value - before) * (keep * write)
            return keep, (-both * _shut(x[0], e0), both * _shut(x[1], e1), write * slope)
        else:
            keep, shut = _sigmoids(x[0])
            write, closed = _sigmoids(x[1])
            return keep, (before * (keep * shut), value * (write * closed), write * slope)
