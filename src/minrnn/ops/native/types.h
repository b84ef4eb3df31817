/* The types of the scans: how an element is stored (IO), in what its state is kept (ACC), and the way between.
 * 16-bit types are converted as they are read and written; their states are float32.
 */
#ifndef MINRNN_TYPES_H
#define MINRNN_TYPES_H

#include <complex.h>
#include <math.h>
#include "scan.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

/* 1/2! + r/3! + r^2/4! + ...: (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2, to the type's precision. Horner's rule from the inside. */
#define MADD32(p, k) madd_f32(p, r, 1.0f / k)
#define MADD64(p, k) madd_f64(p, r, 1.0 / k)
#define TAYLOR32(r) MADD32(MADD32(MADD32(MADD32(MADD32(1.0f / 5040, 720), 120), 24), 6), 2)
#define TAYLOR64(r)                                                                                                                  \
    MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(MADD64(1.0 / 6227020800, 479001600), 39916800), 3628800), \
                                                            362880), 40320), 5040), 720), 120), 24), 6), 2)

#define REAL float
#define BITS int32_t
#define UBITS uint32_t
#define NAME(x) JOIN(x, f32)
#define BUILTIN(x) __builtin_##x##f
#define TAYLOR TAYLOR32
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
#define EXPONENT_BIAS (127 - 0x4b400000)
#define MANTISSA 23
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.42860682030941723212e-6f
#define SMALLEST_LOG -87.3f
#include "real.h"
#undef REAL
#undef BITS
#undef UBITS
#undef NAME
#undef BUILTIN
#undef TAYLOR
#undef ROUNDER
#undef EXPONENT_BIAS
#undef MANTISSA
#undef LN2_HIGH
#undef LN2_LOW
#undef SMALLEST_LOG

#define REAL double
#define BITS int64_t
#define UBITS uint64_t
#define NAME(x) JOIN(x, f64)
#define BUILTIN(x) __builtin_##x
#define TAYLOR TAYLOR64
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52 */
#define EXPONENT_BIAS (1023 - 0x4338000000000000)
#define MANTISSA 52
#define LN2_HIGH 6.93147180369123816490e-1
#define LN2_LOW 1.90821492927058770002e-10
#define SMALLEST_LOG -708.0
#include "real.h"
#undef REAL
#undef BITS
#undef UBITS
#undef NAME
#undef BUILTIN
#undef TAYLOR
#undef ROUNDER
#undef EXPONENT_BIAS
#undef MANTISSA
#undef LN2_HIGH
#undef LN2_LOW
#undef SMALLEST_LOG

INLINE float complex madd_c64(float complex a, float complex x, float complex b) { return a * x + b; }
INLINE double complex madd_c128(double complex a, double complex x, double complex b) { return a * x + b; }

typedef float io_f32;
typedef double io_f64;
typedef uint16_t io_bf16;
typedef uint16_t io_f16;
typedef float complex io_c64;
typedef double complex io_c128;

INLINE float load_f32(io_f32 x) { return x; }
INLINE double load_f64(io_f64 x) { return x; }
INLINE float complex load_c64(io_c64 x) { return x; }
INLINE double complex load_c128(io_c128 x) { return x; }
INLINE io_f32 store_f32(float x) { return x; }
INLINE io_f64 store_f64(double x) { return x; }
INLINE io_c64 store_c64(float complex x) { return x; }
INLINE io_c128 store_c128(double complex x) { return x; }

INLINE float as_float(uint32_t bits)
{
    const union { uint32_t bits; float real; } x = {.bits = bits};
    return x.real;
}

INLINE uint32_t as_bits(float real)
{
    const union { float real; uint32_t bits; } x = {.real = real};
    return x.bits;
}

INLINE float load_bf16(io_bf16 x) { return as_float((uint32_t)x << 16); }

INLINE io_bf16 store_bf16(float x) /* to nearest, ties to even; NaN stays one */
{
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (io_bf16)(x != x ? (bits >> 16) | 0x40 : rounded);
}

INLINE float load_f16(io_f16 x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t finite = as_bits(as_float(rest) * 0x1p112f); /* subnormals come out right by the product */
    return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : finite));
}

INLINE io_f16 store_f16(float x) /* to nearest, ties to even; NaN stays one */
{
    const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    const uint32_t normal = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
    const uint32_t subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000; /* the sum rounds at 2^-24 */
    const uint32_t finite = size < 0x38800000 ? subnormal : normal;
    return (io_f16)(sign | (size > 0x7f800000 ? 0x7e00 : size >= 0x477ff000 ? 0x7c00 : finite));
}

#endif
