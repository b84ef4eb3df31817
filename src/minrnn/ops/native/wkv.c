/* RWKV's weighted average of values, its forward and its backward pass, each in one sweep over time. ../wkv.py has the equation.
 *
 * The states are not kept for the way back, but for one in EVERY; between these they are computed again. Each channel of each sequence
 * goes through the same operations in the same order, whatever the batch and the number of threads.
 */
#include "types.h"

/* Channels that are taken together; steps between the states that are kept, as in wkv.py. */
enum { BLOCK = 128, EVERY = 16 };

/* Contiguous tensors: (B, T, D), or (B, D) for states, or (D) for w and u; marks (B, ceil(T / EVERY), 3, D). In the order of wkv.py. */
typedef struct {
    int64_t B, T, D;
    int32_t type, threads; /* F32 or F64 */
    const char *k, *v, *w, *u, *average, *weight, *max;
    const uint8_t *reset; /* (B, T), or NULL */
    char *y, *last_average, *last_weight, *last_max, *marks;
    const char *grad_y, *grad_last_average, *grad_last_weight;
    char *grad_k, *grad_v, *grad_w, *grad_u, *grad_average, *grad_weight; /* of w and u (B, D): each sequence's part */
} wkv;

#define REAL float
#define KIND f32
#define EXP exp_negative_f32
#include "wkv.h"

#define REAL double
#define KIND f64
#define EXP exp_negative_f64
#include "wkv.h"

typedef void piece(const wkv *, int64_t, int64_t, int64_t);

static int run(const wkv *s, piece *body)
{
    const int64_t blocks = ceil_div(s->D, BLOCK), pieces = s->B * blocks;
    const int threads = (int)(s->B * s->T * s->D < (1 << 14) ? 1 : min64(max64(s->threads, 1), pieces));
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t c0 = i % blocks * BLOCK;
        body(s, i / blocks, c0, min64(BLOCK, s->D - c0));
    }
    return 0;
}

EXPORT int wkv_forward(const wkv *s) { return run(s, s->type == F32 ? forward_f32 : forward_f64); }
EXPORT int wkv_backward(const wkv *s) { return run(s, s->type == F32 ? backward_f32 : backward_f64); }
