/* The kernels of short_conv.c for one type. Included once per type with KIND (its name), ACC (what its sums are made in) and MADD. */

#define FN(x) JOIN(x, KIND)
#define IO JOIN(io, KIND)
#define LOAD JOIN(load, KIND)
#define STORE JOIN(store, KIND)
#define ROW(tensor, b, t) ((IO *)(tensor).data + (b) * (tensor).batch + (t) * (tensor).time + c0)
#define INPUT(now, past, b, i) ((i) < 0 ? ROW(past, b, (i) + s->K - 1) : ROW(now, b, i))

static void FN(widen)(ACC *to, const IO *from, int64_t width) /* zeros from NULL */
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) to[j] = from ? LOAD(from[j]) : 0;
}

static void FN(narrow)(IO *to, const ACC *from, int64_t width)
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) to[j] = STORE(from[j]);
}

static void FN(enter)(const conv *s, ACC (*weight)[BLOCK], int64_t c0, int64_t width)
{
    for (int64_t a = 0; a < s->K; a++) FN(widen)(weight[a], (const IO *)s->weight + (s->K - 1 - a) * s->D + c0, width);
}

typedef struct {
    const IO *of[MOST];
} FN(rows);

/* out = start + sum over m < n of weight_m ⊙ row_m. */
INLINE void FN(combine)(const int n, FN(rows) row, const ACC (*weight)[BLOCK], const ACC *start, IO *out, int64_t width)
{
#define TERM(m) if (m < n) sum = MADD(weight[m][j], LOAD(row.of[m][j]), sum);
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        ACC sum = start[j];
        TERMS
        out[j] = STORE(sum);
    }
#undef TERM
}

/* grad_m += x ⊙ row_m for m < n. */
INLINE void FN(correlate)(const int n, FN(rows) row, const IO *x, ACC (*grad)[BLOCK], int64_t width)
{
#define TERM(m) if (m < n) grad[m][j] = MADD(now, LOAD(row.of[m][j]), grad[m][j]);
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        const ACC now = LOAD(x[j]);
        TERMS
    }
#undef TERM
}

static void FN(add)(ACC *sum, const IO *row, int64_t width)
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) sum[j] += LOAD(row[j]);
}

static void FN(forward)(const conv *s, int64_t b, int64_t chunk, int64_t c0, int64_t width)
{
    ACC weight[MOST][BLOCK], bias[BLOCK];
    FN(enter)(s, weight, c0, width);
    FN(widen)(bias, s->bias ? (const IO *)s->bias + c0 : NULL, width);
    const int64_t end = min64(s->T, (chunk + 1) * STEPS);
    for (int64_t t = chunk * STEPS; t < end; t++) {
        const int64_t n = seen(s, b, t);
        FN(rows) inputs;
        for (int64_t a = 0; a < n; a++) inputs.of[a] = INPUT(s->x, s->past, b, t - a);
#define BODY(n) FN(combine)(n, inputs, weight, bias, ROW(s->y, b, t), width)
        UNROLLED(n, BODY)
#undef BODY
    }
    for (int64_t i = s->T - s->K + 1; end == s->T && i < s->T; i++) {
        IO *const to = ROW(s->tail, b, i - (s->T - s->K + 1));
        const IO *const from = lasts(s, b, i) == s->K ? INPUT(s->x, s->past, b, i) : NULL;
        for (int64_t j = 0; j < width; j++) to[j] = from ? from[j] : 0;
    }
}

static void FN(backward)(const conv *s, int64_t b, int64_t chunk, int64_t c0, int64_t width)
{
    ACC weight[MOST][BLOCK], grad[MOST + 1][BLOCK], start[BLOCK]; /* the last row of grad is the bias's */
    FN(enter)(s, weight, c0, width);
    for (int64_t a = 0; a <= s->K; a++) FN(widen)(grad[a], NULL, width);
    FN(widen)(start, NULL, width);
    const int64_t end = min64(s->T, (chunk + 1) * STEPS), tail = s->T - s->K + 1;
    for (int64_t i = chunk ? chunk * STEPS : 1 - s->K; i < end; i++) {
        const int64_t belong = lasts(s, b, i), first = max64(0, -i), n = max64(0, min64(belong, s->T - i) - first);
        FN(rows) grads;
        for (int64_t a = 0; a < n; a++) grads.of[a] = ROW(s->grad_y, b, i + first + a);
        if (i >= tail) FN(widen)(start, belong == s->K ? ROW(s->grad_tail, b, i - tail) : NULL, width);
#define BODY(n) FN(combine)(n, grads, weight + first, start, INPUT(s->grad_x, s->grad_past, b, i), width)
        UNROLLED(n, BODY)
#undef BODY
#define BODY(n) FN(correlate)(n, grads, INPUT(s->x, s->past, b, i), grad + first, width)
        UNROLLED(n, BODY)
#undef BODY
        if (i >= 0) FN(add)(grad[s->K], grads.of[0], width);
    }
    ACC *part = (ACC *)s->parts + (b * chunks_of(s) + chunk) * (s->K + 1) * s->D + c0;
    for (int64_t a = 0; a <= s->K; a++, part += s->D)
        for (int64_t j = 0; j < width; j++) part[j] = grad[a][j];
}

/* The gradients of weight and bias from their parts. */
static void FN(total)(const conv *s, int64_t c0, int64_t width)
{
    for (int64_t a = 0; a <= s->K; a++) {
        ACC sum[BLOCK];
        FN(widen)(sum, NULL, width);
        for (int64_t i = 0; i < s->B * chunks_of(s); i++) {
            const ACC *const part = (const ACC *)s->parts + (i * (s->K + 1) + a) * s->D + c0;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) sum[j] += part[j];
        }
        FN(narrow)((IO *)(a < s->K ? s->grad_weight : s->grad_bias) + (a < s->K ? (s->K - 1 - a) * s->D : 0) + c0, sum, width);
    }
}

#undef FN
#undef IO
#undef LOAD
#undef STORE
#undef ROW
#undef INPUT
#undef KIND
#undef ACC
#undef MADD
