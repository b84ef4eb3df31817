/* What every scan of this library is called with, and how its work is divided. Plain C11, no PyTorch headers.
 *
 * Letters: B batch, T time, H channels. Strides count elements of the tensor's own type; channels are contiguous, but for the first
 * input, whose channel stride may be 0 (a coefficient that all channels share).
 */
#ifndef MINRNN_SCAN_H
#define MINRNN_SCAN_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    char *data; /* NULL: not given, or not wanted */
    int64_t batch, time;
} tensor;

typedef struct {
    int64_t B, T, H;
    int32_t type;       /* enum type: of the inputs, h and their gradients */
    int32_t activation; /* enum activation */
    int32_t reverse;
    int32_t threads;
    int64_t channel; /* the channel stride of in[0] */
    tensor in[3];    /* the blocks of the projection; or coefficients, values */
    tensor h;
    tensor reset;   /* uint8 (B, T) */
    tensor initial; /* (B, H), in the type of the state; time unused, as in the next five */
    tensor restart; /* (B, H) */
    tensor lengths; /* int64 (B,), of any stride */
    tensor last;    /* (B, H) */
    tensor grad_h;
    tensor grad_last;
    tensor grad_in[3];
    tensor grad_initial;
    tensor grad_restart;
} scan;

enum type { F32, F64, BF16, F16, C64, C128 };
enum activation { G, IDENTITY, TANH };

/* How many channels, and how many numbers of state, one piece of work holds at most. */
enum { WIDTH = 512, TILE = 4096 };

/* A step's arithmetic takes as long as its memory, and by itself a processor does not look far enough ahead to do both at once. So rows
 * are asked for some KiB (AHEAD bytes) before they are needed, a few lines of the cache (LINE bytes) at a time: between strips of a row,
 * because more at once than a core can wait for would stall it. */
enum { AHEAD = 2048, STRIP = 64, LINE = 64 };

/* Where few channels would leave the cores of a large machine idle, T is cut into chunks, solved at once and joined. The cut depends on
 * (T, H) alone, so that no result depends on the batch or on the number of threads. It costs a second read of the inputs. */
enum { CHUNK = 4096, FEW_CHANNELS = 32 };

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A grid of pieces: groups of sequences × blocks of channels × chunks of time. How it is cut never changes a result, except for the
 * chunks: each channel of each sequence goes through the same operations in the same order. */
typedef struct {
    int64_t group, groups, width, blocks, chunk, chunks;
    int threads;
} grid;

INLINE grid divide(const scan *s, int time_major)
{
    grid g;
    const int64_t threads = max64(s->threads, 1);
    g.chunks = s->H <= FEW_CHANNELS && s->T >= 2 * CHUNK ? ceil_div(s->T, CHUNK) : 1;
    g.chunk = g.chunks > 1 ? CHUNK : s->T;
    const int64_t wanted = ceil_div(threads, max64(s->B, 1));
    g.width = max64(16, min64(WIDTH, ceil_div(ceil_div(s->H, wanted), 16) * 16));
    g.blocks = ceil_div(s->H, g.width);
    /* Time-major memory is read best many sequences at a time; else they are taken together only where one alone is little work. */
    const int64_t together = time_major ? ceil_div(s->B, ceil_div(threads, g.blocks)) : (1 << 14) / max64(g.chunk * g.width, 1);
    g.group = max64(1, min64(min64(together, s->B), TILE / g.width));
    g.groups = ceil_div(s->B, g.group);
    const int64_t pieces = g.groups * g.blocks * g.chunks;
    g.threads = (int)(s->B * s->T * s->H < (1 << 14) ? 1 : min64(threads, pieces));
    return g;
}

#endif
