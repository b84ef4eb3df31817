/* Drives every entry of the C library over memory of exactly the size that it may touch, for the address and undefined-behaviour
 * sanitizers, with no Python in the process. Shapes: odd sizes, one, none; several chunks of time; both memory orders. The result of the
 * linear scan is compared with a loop. Prints the number of calls.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "scan.h"

int linear_forward(const scan *), linear_backward(const scan *), mingru_forward(const scan *), mingru_backward(const scan *),
    minlstm_forward(const scan *), minlstm_backward(const scan *), minlstm_unnormalized_forward(const scan *),
    minlstm_unnormalized_backward(const scan *);

typedef int entry(const scan *);
static const struct {
    entry *forward, *backward;
    int inputs, types;
} ops[] = {{linear_forward, linear_backward, 2, 6},
           {mingru_forward, mingru_backward, 2, 4},
           {minlstm_forward, minlstm_backward, 3, 4},
           {minlstm_unnormalized_forward, minlstm_unnormalized_backward, 3, 4}};
static const int64_t io_size[] = {4, 8, 2, 2, 8, 16}, state_size[] = {4, 8, 4, 4, 8, 16};

static uint32_t seed = 1;
static uint32_t next(void) { return seed = seed * 1664525u + 1013904223u; }

/* n numbers between 0 and 1 of a type, or of its state's type. */
static char *numbers(int type, int state, int64_t n)
{
    const int64_t size = (state ? state_size : io_size)[type];
    char *data = malloc((size_t)(n * size) + !n);
    for (int64_t i = 0; i < n; i++) {
        const float x = (float)(next() >> 8) / 16777216.0f;
        if (!state && type == BF16) {
            uint32_t bits;
            memcpy(&bits, &x, 4);
            const uint16_t high = (uint16_t)(bits >> 16);
            memcpy(data + i * size, &high, 2);
        } else if (!state && type == F16) {
            const uint16_t half = (uint16_t)(next() % 0x3c00);
            memcpy(data + i * size, &half, 2);
        } else
            for (int64_t part = 0; part < (type >= C64 ? 2 : 1); part++) {
                const double wide = x;
                if (type == F64 || type == C128) memcpy(data + i * size + part * 8, &wide, 8);
                else memcpy(data + i * size + part * 4, &x, 4);
            }
    }
    return data;
}

static tensor series(char *data, int64_t B, int64_t T, int64_t H, int time_major)
{
    return time_major ? (tensor){data, H, B * H} : (tensor){data, T * H, H};
}

static void check_linear(const scan *s)
{
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t j = 0; j < s->H; j++) {
            double h = 0;
            for (int64_t p = 0; p < s->T; p++) {
                const int64_t t = s->reverse ? s->T - 1 - p : p;
                h = ((double *)s->in[0].data)[b * s->in[0].batch + t * s->in[0].time + j] * h +
                    ((double *)s->in[1].data)[b * s->in[1].batch + t * s->in[1].time + j];
                const double error = ((double *)s->h.data)[b * s->h.batch + t * s->h.time + j] - h;
                if (error > 1e-9 || error < -1e-9) {
                    printf("wrong: b %d t %d j %d: off by %g\n", (int)b, (int)t, (int)j, error);
                    exit(1);
                }
            }
        }
}

static void drive(int op, int type, int64_t B, int64_t T, int64_t H, int variant)
{
    const int time_major = variant & 1, full = variant & 2, inputs = ops[op].inputs;
    scan s = {.B = B, .T = T, .H = H, .type = type, .activation = variant % 3, .reverse = variant >> 2 & 1, .threads = 2, .channel = 1};
    char *given[32];
    int count = 0;
#define KEEP(data) (given[count++] = (data))
    for (int i = 0; i < inputs; i++) {
        s.in[i] = series(KEEP(numbers(type, 0, B * T * H)), B, T, H, time_major);
        s.grad_in[i] = series(KEEP(numbers(type, 0, B * T * H)), B, T, H, time_major);
    }
    s.h = series(KEEP(numbers(type, 0, B * T * H)), B, T, H, time_major);
    s.last = (tensor){KEEP(numbers(type, 1, B * H)), H, 0};
    if (full) {
        s.grad_h = series(KEEP(numbers(type, 0, B * T * H)), B, T, H, time_major);
        tensor *const states[] = {&s.initial, &s.restart, &s.grad_last, &s.grad_initial, &s.grad_restart};
        for (int i = 0; i < 5; i++) *states[i] = (tensor){KEEP(numbers(type, 1, B * H)), H, 0};
        s.reset = (tensor){KEEP(malloc((size_t)(B * T) + 1)), T, 1};
        for (int64_t i = 0; i < B * T; i++) s.reset.data[i] = next() % 50 == 0;
        s.lengths = (tensor){KEEP(malloc((size_t)B * 8 + 1)), 1, 0};
        for (int64_t b = 0; b < B; b++) {
            const int64_t length = (int64_t)(next() % (uint32_t)(T + 1));
            memcpy(s.lengths.data + b * 8, &length, 8);
        }
    }
    if (ops[op].forward(&s) || (op == 0 && type == F64 && !full ? check_linear(&s), 0 : 0) || ops[op].backward(&s)) exit(1);
    while (count) free(given[--count]);
}

/* The other ops: sizes, type, threads, and then the tensors, each contiguous and of so many numbers; a reset has bytes. */
typedef struct {
    int64_t sizes[5];
    int64_t counts[40];
    int reset, tensors, width;
} layout;

int wkv_forward(const void *), wkv_backward(const void *), selective_forward(const void *), selective_backward(const void *),
    slstm_forward(const void *), slstm_backward(const void *);

static void drive_layout(const layout *l, int type, int with_reset, int (*forward)(const void *), int (*backward)(const void *))
{
    struct {
        int64_t sizes[4];
        int32_t type, threads;
        char *tensors[40];
    } wide = {.type = type, .threads = 2};
    memcpy(wide.sizes, l->sizes, sizeof wide.sizes);
    for (int i = 0; i < l->tensors; i++) {
        if (i != l->reset) wide.tensors[i] = numbers(type, 0, l->counts[i]);
        else if (with_reset) {
            wide.tensors[i] = malloc((size_t)l->counts[i] + 1);
            for (int64_t j = 0; j < l->counts[i]; j++) wide.tensors[i][j] = next() % 9 == 0;
        }
    }
    /* An op of three sizes has no fourth. */
    const size_t head = (size_t)l->width * 8;
    char packed[sizeof wide];
    memcpy(packed, wide.sizes, head);
    memcpy(packed + head, &wide.type, sizeof wide - sizeof wide.sizes);
    if (forward(packed) || backward(packed)) exit(1);
    for (int i = 0; i < l->tensors; i++) free(wide.tensors[i]);
}

#define COUNTS(...) .counts = {__VA_ARGS__}, .tensors = sizeof(int64_t[]){__VA_ARGS__} / 8

static int drive_others(int64_t B, int64_t T, int64_t D)
{
    const int64_t x = B * T * D, h = B * D, m16 = B * ((T + 15) / 16) * 3 * D, m8 = B * ((T + 7) / 8) * 3 * D, N = 5, heads = D % 4 ? 1 : 4;
    const int64_t blocks = D ? (D + 127) / 128 : 0, own = blocks ? ((D + blocks - 1) / blocks + 15) / 16 * 16 : 0;
    const int64_t m32 = B * blocks * ((T + 31) / 32) * N * own, in = B * T * N, R = 4 * D * (D / heads);
    const layout wkv = {.sizes = {B, T, D}, .width = 3, .reset = 7,
                        COUNTS(x, x, D, D, h, h, h, B * T, x, h, h, h, m16, x, h, h, x, x, h, h, h, h)};
    const layout selective = {.sizes = {B, T, D, N}, .width = 4, .reset = 7,
                              COUNTS(x, x, D * N, in, in, D, h * N, B * T, D, x, h * N, m32, x, h * N, x, x, h * N, h * N, h, h, blocks * in,
                                     blocks * in)};
    const layout slstm = {.sizes = {B, T, D, heads}, .width = 4, .reset = 10,
                          COUNTS(x, x, x, x, R, 4 * D, h, h, h, h, B * T, x, h, h, h, h, m8, R, x, h, h, h, x, x, x, x, R, 4 * h, h, h, h)};
    for (int type = F32; type <= F64; type++)
        for (int reset = 0; reset < 2; reset++) {
            drive_layout(&wkv, type, reset, wkv_forward, wkv_backward);
            drive_layout(&selective, type, reset, selective_forward, selective_backward);
            drive_layout(&slstm, type, reset, slstm_forward, slstm_backward);
        }
    return 12;
}

typedef struct {
    int64_t B, T, D, K;
    int32_t type, threads;
    tensor x, past, y, tail, grad_y, grad_tail, grad_x, grad_past;
    char *reset, *weight, *bias, *parts, *grad_weight, *grad_bias;
} conv;

int short_conv_forward(const conv *), short_conv_backward(const conv *);

static int drive_conv(int64_t B, int64_t T, int64_t D, int64_t K)
{
    const int64_t parts = B * (T > 128 ? (T + 127) / 128 : 1) * (K + 1) * D;
    for (int type = F32; type <= F16; type++)
        for (int full = 0; full < 2; full++) {
            conv s = {.B = B, .T = T, .D = D, .K = K, .type = type, .threads = 2};
            tensor *const series[] = {&s.x, &s.y, &s.grad_y, &s.grad_x}, *const states[] = {&s.past, &s.tail, &s.grad_tail, &s.grad_past};
            for (int i = 0; i < 4; i++) {
                *series[i] = (tensor){numbers(type, 0, B * T * D), T * D, D};
                *states[i] = (tensor){numbers(type, 0, B * (K - 1) * D), (K - 1) * D, D};
            }
            s.weight = numbers(type, 0, K * D), s.grad_weight = numbers(type, 0, K * D);
            s.grad_bias = numbers(type, 0, D), s.parts = numbers(type, 1, parts);
            if (full) {
                s.bias = numbers(type, 0, D), s.reset = malloc((size_t)(B * T) + 1);
                for (int64_t i = 0; i < B * T; i++) s.reset[i] = next() % 5 == 0;
            }
            if (short_conv_forward(&s) || short_conv_backward(&s)) exit(1);
            for (int i = 0; i < 4; i++) free(series[i]->data), free(states[i]->data);
            char *const flat[] = {s.weight, s.grad_weight, s.grad_bias, s.parts, s.bias, s.reset};
            for (int i = 0; i < 6; i++) free(flat[i]);
        }
    return 8;
}

int main(void)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 0, 5}, {2, 7, 16}, {2, 9, 100}, {1, 2, 530}, {20, 3, 17}, {1, 2 * CHUNK + 5, 1}};
    int calls = 0;
    for (int op = 0; op < 4; op++)
        for (int type = 0; type < ops[op].types; type++)
            for (unsigned shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
                for (int variant = 0; variant < 8; variant++, calls++)
                    drive(op, type, shapes[shape][0], shapes[shape][1], shapes[shape][2], variant);
    static const int64_t others[][3] = {{1, 1, 1}, {3, 0, 5}, {2, 7, 16}, {2, 70, 100}, {1, 33, 260}, {11, 9, 12}};
    for (unsigned i = 0; i < sizeof others / sizeof *others; i++) calls += drive_others(others[i][0], others[i][1], others[i][2]);
    for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
        for (int64_t K = 1; K <= 4; K++) calls += drive_conv(others[i][0], i == 4 ? 300 : others[i][1], others[i][2], K);
    printf("%d calls\n", calls);
    return 0;
}
