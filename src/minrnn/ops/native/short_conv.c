/* Short causal convolutions, each channel along time: forward and backward each in one pass over memory. ../short_conv.py has the
 * equation.
 *
 * Each number comes of the same operations in the same order, whatever the number of threads: the sums over sequences and time, which
 * the gradients of the weights are, are made piece by piece, and the pieces, cut by the sizes alone, are added up in their order.
 */
#include <stddef.h>
#include "types.h"

/* Steps and channels of a piece, small enough that its rows of K steps stay in the nearest cache; the most taps, as in short_conv.py. */
enum { STEPS = 128, BLOCK = 512, MOST = 4 };

/* In the order of short_conv.py. The taps of a kernel are counted by age in what follows, the youngest first: weight K-1-a is of age a. */
typedef struct {
    int64_t B, T, D, K;
    int32_t type, threads;
    tensor x, past, y, tail, grad_y, grad_tail, grad_x, grad_past; /* (B, T, D) or (B, K-1, D) */
    const uint8_t *reset;                                          /* (B, T), or NULL */
    const char *weight, *bias;                                     /* (K, D); (D), or NULL */
    char *parts;                                                   /* (B, chunks, K + 1, D), in the type of sums */
    char *grad_weight, *grad_bias;                                 /* (K, D); (D) */
} conv;

INLINE int64_t chunks_of(const conv *s) { return max64(1, ceil_div(s->T, STEPS)); }

INLINE int begins(const conv *s, int64_t b, int64_t t) { return s->reset && t >= 0 && t < s->T && s->reset[b * s->T + t]; }

/* How many of the last K inputs step t sees. */
INLINE int64_t seen(const conv *s, int64_t b, int64_t t)
{
    int64_t n = 1;
    while (n < s->K && !begins(s, b, t - n + 1)) n++;
    return n;
}

/* How many of the K steps from i on belong to its sequence; those after the end, to which the state will be carried, among them. */
INLINE int64_t lasts(const conv *s, int64_t b, int64_t i)
{
    int64_t n = 1;
    while (n < s->K && !begins(s, b, i + n)) n++;
    return n;
}

/* body(n) with n as a constant. */
#define UNROLLED(n, body)     \
    switch (n) {              \
    case 0: body(0); break;   \
    case 1: body(1); break;   \
    case 2: body(2); break;   \
    case 3: body(3); break;   \
    default: body(4); break;  \
    }
#define TERMS TERM(0) TERM(1) TERM(2) TERM(3)

#define KIND f32
#define ACC float
#define MADD madd_f32
#include "short_conv.h"

#define KIND f64
#define ACC double
#define MADD madd_f64
#include "short_conv.h"

#define KIND bf16
#define ACC float
#define MADD madd_f32
#include "short_conv.h"

#define KIND f16
#define ACC float
#define MADD madd_f32
#include "short_conv.h"

typedef void piece(const conv *, int64_t b, int64_t chunk, int64_t c0, int64_t width);
typedef void total(const conv *, int64_t c0, int64_t width);

static int run(const conv *s, piece *body)
{
    const int64_t chunks = chunks_of(s), blocks = ceil_div(s->D, BLOCK), pieces = s->B * chunks * blocks;
    const int threads = (int)(s->B * s->T * s->D < (1 << 14) ? 1 : min64(max64(s->threads, 1), pieces));
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t c0 = i % blocks * BLOCK, row = i / blocks;
        body(s, row / chunks, row % chunks, c0, min64(BLOCK, s->D - c0));
    }
    return 0;
}

EXPORT int short_conv_forward(const conv *s)
{
    piece *const of_type[] = {forward_f32, forward_f64, forward_bf16, forward_f16};
    return run(s, of_type[s->type]);
}

EXPORT int short_conv_backward(const conv *s)
{
    piece *const of_type[] = {backward_f32, backward_f64, backward_bf16, backward_f16};
    total *const sum_of_type[] = {total_f32, total_f64, total_bf16, total_f16};
    run(s, of_type[s->type]);
    for (int64_t c0 = 0; c0 < s->D; c0 += BLOCK) sum_of_type[s->type](s, c0, min64(BLOCK, s->D - c0));
    return 0;
}
