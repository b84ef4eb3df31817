/* xLSTM's scalar memory with recurrent weights, forward and backward, one step after the other. ../slstm.py has the equations.
 *
 * A piece of work is one head of some sequences, taken together so that the head's weights are read once for all of them. The states are
 * not kept for the way back, but for one in EVERY; between these they are computed again. Each sequence goes through the same operations
 * in the same order, whatever the batch, the pieces and the number of threads.
 */
#include <stdlib.h>
#include "types.h"

/* Sequences in a piece; steps between the states that are kept, as in slstm.py; steps whose part of the weights' gradient is summed
 * at once; rows of a product that are summed at once. */
enum { GROUP = 8, EVERY = 8, CHUNK_STEPS = 64, ROWS = 4 };

/* The columns of a product that are summed at once, in bytes: as many as the registers hold for ROWS rows. */
#if defined(__AVX512F__)
enum { PANEL_BYTES = 256 };
#elif defined(__AVX2__)
enum { PANEL_BYTES = 64 };
#else
enum { PANEL_BYTES = 32 };
#endif

/* Contiguous tensors: (B, T, D), or (B, D) for states. In the order of slstm.py. */
typedef struct {
    int64_t B, T, D, heads;
    int32_t type, threads;    /* F32 or F64 */
    const char *in[4];        /* before the recurrent part is added: input gate, forget gate, candidate, output gate */
    const char *recurrent;    /* (heads, d, 4, d), d = D / heads, from channels of h to gates */
    const char *bias;         /* (4, D) */
    const char *initial[4];   /* h, c, n, m */
    const uint8_t *reset;     /* (B, T), or NULL */
    char *h, *last[4], *marks; /* marks (B, ceil(T / EVERY), 3, D): c, n, m */
    const char *transposed;   /* (heads, 4, d, d), from gates to channels of h */
    const char *grad_h, *grad_last[3];
    char *grad_in[4], *grad_recurrent, *grad_bias, *grad_initial[3]; /* grad_bias (B, 4, D): each sequence's part */
} slstm;

#define REAL float
#define KIND f32
#include "slstm.h"

#define REAL double
#define KIND f64
#include "slstm.h"

/* `count` sequences from the first on, or gates of the weights' gradient, of one head; 1 if memory ran out. */
typedef int piece(const slstm *, int64_t head, int64_t first, int64_t count);

static int run(const slstm *s, piece *body, int64_t total, int64_t count)
{
    const int threads = (int)(s->B * s->T * s->D < (1 << 12) ? 1 : max64(s->threads, 1));
    int failed = 0;
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1) reduction(| : failed)
    for (int64_t i = 0; i < ceil_div(total, count) * s->heads; i++) {
        const int64_t first = i / s->heads * count;
        failed |= body(s, i % s->heads, first, min64(count, total - first));
    }
    return failed;
}

/* Sequences in a piece: as many as use the weights well, fewer where threads would have nothing to do. */
static int64_t group(const slstm *s) { return ceil_div(s->B, GROUP) * s->heads >= s->threads ? GROUP : ROWS; }

EXPORT int slstm_forward(const slstm *s) { return run(s, s->type == F32 ? forward_f32 : forward_f64, s->B, group(s)); }

EXPORT int slstm_backward(const slstm *s)
{
    return run(s, s->type == F32 ? backward_f32 : backward_f64, s->B, group(s)) ||
           run(s, s->type == F32 ? weights_f32 : weights_f64, 4, 1);
}
