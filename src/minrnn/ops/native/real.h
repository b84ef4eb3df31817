/* Elementary functions for one real type, written so that the compiler turns loops over them into vector code.
 * Included once per type with REAL, BITS (its integer), NAME(x), and the constants of the type.
 *
 * No operation is left to the compiler's taste (contraction is off, fused multiply-adds are spelled out where the machine has them), so
 * that a channel gets the same bits in a vector lane and in a remainder loop.
 */

INLINE REAL NAME(madd)(REAL a, REAL x, REAL b)
{
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return BUILTIN(fma)(a, x, b);
#else
    return a * x + b;
#endif
}

typedef union {
    REAL real;
    BITS bits;
} NAME(pun);

/* exp(x) = 2^n (1 + p), |ln 2^n - x| <= ln(2)/2, for x <= 0; beyond the type's range it saturates at the smallest normal number. */
INLINE REAL NAME(split)(REAL x, REAL *scale)
{
    x = x < SMALLEST_LOG ? SMALLEST_LOG : x; /* NaN stays */
    NAME(pun) shifted = {.real = NAME(madd)(x, (REAL)1.44269504088896340736, ROUNDER)};
    const REAL n = shifted.real - ROUNDER;
    const REAL r = NAME(madd)(n, -LN2_LOW, NAME(madd)(n, -LN2_HIGH, x));
    NAME(pun) power = {.bits = (BITS)((UBITS)(shifted.bits + EXPONENT_BIAS) << MANTISSA)};
    *scale = power.real;
    return NAME(madd)(TAYLOR(r) * r, r, r);
}

INLINE REAL NAME(exp_negative)(REAL x)
{
    REAL scale;
    const REAL p = NAME(split)(x, &scale);
    return NAME(madd)(scale, p, scale);
}

/* sigmoid(x) and sigmoid(-x), both to full relative precision. */
INLINE void NAME(sigmoids)(REAL x, REAL *positive, REAL *negative)
{
    const REAL e = NAME(exp_negative)(-BUILTIN(fabs)(x));
    const REAL large = 1 / (1 + e), small = e * large;
    *positive = x >= 0 ? large : small;
    *negative = x >= 0 ? small : large;
}

INLINE REAL NAME(tanh_)(REAL x)
{
    REAL scale;
    const REAL p = NAME(split)(-2 * BUILTIN(fabs)(x), &scale);
    const REAL minus = NAME(madd)(scale, p, scale - 1); /* exp(-2|x|) - 1 */
    const REAL size = -minus / (2 + minus);
    return x < 0 ? -size : size;
}

/* The candidate's activation and its slope. `kind` is a constant wherever this is inlined. */
INLINE REAL NAME(activate)(REAL x, int kind, REAL *slope)
{
    if (kind == IDENTITY) {
        *slope = 1;
        return x;
    }
    if (kind == TANH) {
        const REAL y = NAME(tanh_)(x);
        *slope = NAME(madd)(-y, y, 1);
        return y;
    }
    const REAL e = NAME(exp_negative)(x < 0 ? x : -x);
    const REAL below = e / (1 + e);
    *slope = x < 0 ? below / (1 + e) : (REAL)1;
    return x < 0 ? below : x + (REAL)0.5; /* NaN takes the second */
}
