/* The scan whose decay depends on the input, h <- exp(Δ A) h + (Δ u) B, y = C h + D u, its forward and its backward pass.
 * ../selective.py has the equation.
 *
 * A channel has N numbers of state, and (B, T, E, N) numbers are never in memory: on the way forward a state is kept in EVERY steps, on
 * the way back the states between two of these are computed again, where the cache holds them. Each channel of each sequence goes through
 * the same operations in the same order, and what is summed over channels is summed in blocks that depend on E alone, so that no result
 * depends on the number of threads, nor that of a sequence on its batch.
 */
#include <stdlib.h>
#include <string.h>
#include "types.h"

/* The most channels that are taken together, in whole VECTORs; steps between the states that are kept. As in selective.py. */
enum { BLOCK = 128, VECTOR = 16, EVERY = 32 };

/* Contiguous tensors: (B, T, E) u, delta, y and their gradients; (E, N) A; (B, T, N) B and C; (E) D and the bias; (B, E, N) states. In the
 * order of selective.py. */
typedef struct {
    int64_t B, T, E, N;
    int32_t type, threads;                                     /* F32 or F64 */
    const char *u, *delta, *rates, *in, *out, *skip, *initial; /* A, B, C and D are rates, in, out and skip */
    const uint8_t *reset;                                      /* (B, T), or NULL */
    const char *bias;                                          /* Δ = softplus(delta + bias); or NULL: Δ = delta */
    char *y, *last, *marks; /* marks (B, blocks, ceil(T / EVERY), N, width of a block) */
    const char *grad_y, *grad_last;
    char *grad_u, *grad_delta, *grad_initial;
    char *grad_rates, *grad_skip, *grad_bias; /* (B, E, N) and (B, E): of each sequence */
    char *grad_in, *grad_out;                 /* (blocks, B, T, N): of each block */
} selective;

/* 2^r for |r| <= 1/2, by the polynomial of least relative error: 2e-9 and 4e-20. Horner's rule from the inside. */
#define POWER32(p, k) madd_f32(p, r, k##f)
#define POWER64(p, k) madd_f64(p, r, k)
#define POWERS32(r)                                                                                                                  \
    POWER32(POWER32(POWER32(POWER32(POWER32(POWER32(0.000153458121613116298f, 0.0013399931177239738), 0.00961848895633118162),       \
                                            0.055503287771053248), 0.240226468906455207), 0.693147205737195751), 1.0)
#define POWERS64(r)                                                                                                                  \
    POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(POWER64(                                 \
        2.5623409293273941e-11, 4.45662770457034571e-10), 7.05497687232160262e-9), 1.01780515201645806e-7), 1.32154865844655957e-6),  \
        1.5252733855476381e-5), 1.54035303936621528e-4), 0.00133335581463914452), 0.00961812910762830818), 0.055504108664821695),    \
        0.240226506959100716), 0.693147180559945308), 1.0)

/* The first address from `memory` on that begins a line of the cache: vectors that lie across two cost twice. */
INLINE void *on_line(void *memory) { return (void *)(((uintptr_t)memory + LINE - 1) / LINE * LINE); }

#define REAL float
#define KIND f32
#define BITS int32_t
#define UBITS uint32_t
#define POWERS POWERS32
#define TERMS 8 /* of artanh(s) / s, s <= 1/3 */
#define ROUNDER 12582912.0f /* as in types.h */
#define EXPONENT_BIAS (127 - 0x4b400000)
#define MANTISSA 23
#define LEAST -125.0f
#define MOST (0x4b400000 + 127)
#include "selective.h"

#define REAL double
#define KIND f64
#define BITS int64_t
#define UBITS uint64_t
#define POWERS POWERS64
#define TERMS 17
#define ROUNDER 6755399441055744.0
#define EXPONENT_BIAS (1023 - 0x4338000000000000)
#define MANTISSA 52
#define LEAST -1021.0
#define MOST (0x4338000000000000 + 1023)
#include "selective.h"

INLINE int64_t width_of(const selective *s) /* of a block, in whole vectors */
{
    return ceil_div(ceil_div(s->E, ceil_div(s->E, BLOCK)), VECTOR) * VECTOR;
}

typedef int piece(const selective *, int64_t b, int64_t block, int64_t width);

static int run(const selective *s, piece *body)
{
    if (s->B == 0 || s->E == 0) return 0;
    const int64_t width = width_of(s), blocks = ceil_div(s->E, width), pieces = s->B * blocks;
    const int threads = (int)(s->B * s->T * s->E * s->N < (1 << 15) ? 1 : min64(max64(s->threads, 1), pieces));
    int failed = 0;
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) failed |= body(s, i / blocks, i % blocks, width);
    return failed;
}

EXPORT int selective_forward(const selective *s) { return run(s, s->type == F32 ? forward_f32 : forward_f64); }
EXPORT int selective_backward(const selective *s) { return run(s, s->type == F32 ? backward_f32 : backward_f64); }
