/* The kernels of selective.c for one type. Included once per type with REAL, KIND (its name) and its constants.
 *
 * A piece is a block of channels of a sequence. Its state lies as N rows of `width` channels, whole vectors, of which n are real; what is
 * computed for the others, from zeros, is nowhere written.
 */
#define FN(x) JOIN(x, KIND)
#define MADD JOIN(madd, KIND)
#define ROW(tensor, t) ((REAL *)(tensor) + ((b) * s->T + (t)) * s->E + c0)
#define COEFFS(tensor, t) ((REAL *)(tensor) + ((b) * s->T + (t)) * s->N)
#define SIMD(from, to, body) _Pragma("omp simd") for (int64_t j = from; j < to; j++) body

/* 2^x, saturated where the type ends; NaN stays. */
INLINE REAL FN(power)(REAL x)
{
    x = x < LEAST ? LEAST : x;
    const JOIN(pun, KIND) shifted = {.real = x + ROUNDER};
    const REAL r = x - (shifted.real - ROUNDER);
    const BITS n = shifted.bits < MOST ? shifted.bits : MOST;
    const JOIN(pun, KIND) scale = {.bits = (BITS)((UBITS)(n + EXPONENT_BIAS) << MANTISSA)};
    return scale.real * POWERS(r);
}

/* softplus(x) = max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(e / (2 + e)); and its slope, sigmoid(x). */
INLINE REAL FN(softplus)(REAL x, REAL *slope)
{
    const REAL e = JOIN(exp_negative, KIND)(x < 0 ? x : -x), s = e / (2 + e), square = s * s;
    REAL sum = 0;
    for (int k = TERMS; k > 0; k--) sum = MADD(sum, square, (REAL)1 / (2 * k + 1));
    *slope = (x < 0 ? e : (REAL)1) / (1 + e);
    return (x < 0 ? (REAL)0 : x) + 2 * MADD(sum * square, s, s);
}

static void FN(copy)(REAL *to, const REAL *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

/* The state of n channels, (E, N) in memory, as rows of channels, and back; or A by a factor. */
static void FN(enter)(REAL *rows, const REAL *state, REAL factor, int64_t states, int64_t width, int64_t n)
{
    for (int64_t k = 0; k < states; k++)
        for (int64_t j = 0; j < width; j++) rows[k * width + j] = j < n ? factor * state[j * states + k] : (REAL)0;
}

static void FN(leave)(REAL *state, const REAL *rows, int64_t states, int64_t width, int64_t n)
{
    for (int64_t k = 0; k < states; k++)
        for (int64_t j = 0; j < n; j++) state[j * states + k] = rows[k * width + j];
}

/* A step's inputs: Δ, its slope, and Δ u. What lies beyond n stays zero. */
typedef struct {
    _Alignas(LINE) REAL delta[BLOCK], slope[BLOCK], value[BLOCK];
} FN(inputs);

static void FN(read)(FN(inputs) *x, const REAL *bias, const REAL *u, const REAL *delta, int64_t n)
{
    if (bias) SIMD(0, n, x->delta[j] = FN(softplus)(delta[j] + bias[j], &x->slope[j]));
    else SIMD(0, n, (x->delta[j] = delta[j], x->slope[j] = 1));
    SIMD(0, n, x->value[j] = x->delta[j] * u[j]);
}

/* Ask for rows that will be needed. Never faults, so that what lies beyond the end needs no care. */
INLINE void FN(will_need)(const REAL *row, int64_t n)
{
    for (int64_t j = 0; j < n; j += LINE / (int64_t)sizeof(REAL)) __builtin_prefetch(row + j);
}

/* One step of one row of the state: kept = 2^(Δ rate) if wanted, after = kept before + in value, y += out after. */
INLINE void FN(step)(REAL *after, const REAL *before, REAL *kept, const FN(inputs) *x, const REAL *rate, REAL in, REAL out, REAL *y,
                     int64_t width)
{
    SIMD(0, width, {
        const REAL a = FN(power)(x->delta[j] * rate[j]);
        const REAL h = MADD(a, before[j], in * x->value[j]);
        if (kept) kept[j] = a;
        after[j] = h;
        if (y) y[j] = MADD(out, h, y[j]);
    });
}

static int FN(forward)(const selective *s, int64_t b, int64_t block, int64_t width)
{
    const int64_t N = s->N, c0 = block * width, n = min64(width, s->E - c0), size = N * width;
    void *const memory = malloc((size_t)(2 * size) * sizeof(REAL) + LINE);
    if (!memory) return 1;
    REAL *const state = on_line(memory), *const rates = state + size;
    REAL *mark = (REAL *)s->marks + (b * ceil_div(s->E, width) + block) * ceil_div(s->T, EVERY) * size;
    const REAL *const skip = (const REAL *)s->skip + c0, *const bias = s->bias ? (const REAL *)s->bias + c0 : 0;
    FN(inputs) x = {0};
    FN(enter)(rates, (const REAL *)s->rates + c0 * N, (REAL)1.44269504088896340736, N, width, n);
    FN(enter)(state, (const REAL *)s->initial + (b * s->E + c0) * N, 1, N, width, n);
    for (int64_t t = 0; t < s->T; t++) {
        const REAL *const u = ROW(s->u, t), *const in = COEFFS(s->in, t), *const out = COEFFS(s->out, t);
        _Alignas(LINE) REAL y[BLOCK];
        FN(will_need)(ROW(s->u, t + 4), n);
        FN(will_need)(ROW(s->delta, t + 4), n);
        if (s->reset && s->reset[b * s->T + t]) memset(state, 0, (size_t)size * sizeof(REAL));
        if (t % EVERY == 0) FN(copy)(mark, state, size), mark += size;
        FN(read)(&x, bias, u, ROW(s->delta, t), n);
        memset(y, 0, sizeof y);
        for (int64_t k = 0; k < N; k++)
            FN(step)(state + k * width, state + k * width, 0, &x, rates + k * width, in[k], out[k], y, width);
        REAL *const to = ROW(s->y, t);
        SIMD(0, n, to[j] = MADD(skip[j], u[j], y[j]));
    }
    FN(leave)((REAL *)s->last + (b * s->E + c0) * N, state, N, width, n);
    free(memory);
    return 0;
}

/* The gradients that a row of the state gathers on the way back. */
typedef struct {
    _Alignas(LINE) REAL value[BLOCK], delta[BLOCK]; /* dL/d(Δ u); dL/dΔ by the decays, over ln 2 */
    REAL *carry, *rates;                            /* dL/d(the state handed on), then dL/d(the state before); dL/dA */
} FN(gathered);

/* One step back of one row of the state. */
INLINE void FN(step_back)(FN(gathered) *g, int64_t row, const REAL *after, const REAL *before, const REAL *kept, const FN(inputs) *x,
                          const REAL *rate, REAL in, REAL out, const REAL *grad_y, REAL *grad_in, REAL *grad_out, int64_t width)
{
    REAL *const carry = g->carry + row, *const rates = g->rates + row, *const value = g->value, *const delta = g->delta;
    REAL sum_in = 0, sum_out = 0;
#pragma omp simd reduction(+ : sum_in, sum_out)
    for (int64_t j = 0; j < width; j++) {
        const REAL grad = MADD(out, grad_y[j], carry[j]), past = kept[j] * grad, slope = past * before[j];
        sum_in = MADD(grad, x->value[j], sum_in);
        sum_out = MADD(grad_y[j], after[j], sum_out);
        value[j] = MADD(grad, in, value[j]);
        delta[j] = MADD(slope, rate[j], delta[j]);
        rates[j] = MADD(slope, x->delta[j], rates[j]);
        carry[j] = past;
    }
    *grad_in = sum_in;
    *grad_out = sum_out;
}

static int FN(backward)(const selective *s, int64_t b, int64_t block, int64_t width)
{
    const int64_t N = s->N, c0 = block * width, n = min64(width, s->E - c0), size = N * width, blocks = ceil_div(s->E, width);
    const int64_t chunks = ceil_div(s->T, EVERY), parts = (block * s->B + b) * s->T;
    void *const memory = malloc((size_t)((2 * EVERY + 5) * size) * sizeof(REAL) + LINE);
    if (!memory) return 1;
    REAL *const rates = on_line(memory), *const zeros = rates + size, *const kept = zeros + size, *const states = kept + EVERY * size; /* EVERY + 1 of them */
    FN(gathered) g = {.rates = states + (EVERY + 1) * size, .carry = states + (EVERY + 2) * size};
    FN(inputs) x = {0};
    _Alignas(LINE) REAL grad_y[BLOCK] = {0}, grad_skip[BLOCK] = {0}, grad_bias[BLOCK] = {0};
    const REAL *const skip = (const REAL *)s->skip + c0, *const bias = s->bias ? (const REAL *)s->bias + c0 : 0;
    memset(zeros, 0, (size_t)size * sizeof(REAL));
    memset(g.rates, 0, (size_t)size * sizeof(REAL));
    FN(enter)(rates, (const REAL *)s->rates + c0 * N, (REAL)1.44269504088896340736, N, width, n);
    FN(enter)(g.carry, (const REAL *)s->grad_last + (b * s->E + c0) * N, 1, N, width, n);
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t t0 = chunk * EVERY, t1 = min64(t0 + EVERY, s->T);
        FN(copy)(states, (REAL *)s->marks + ((b * blocks + block) * chunks + chunk) * size, size);
        for (int64_t t = t0; t < t1; t++) {
            REAL *const before = states + (t - t0) * size, *const a = kept + (t - t0) * size;
            const REAL *const from = s->reset && s->reset[b * s->T + t] ? zeros : before, *const in = COEFFS(s->in, t);
            FN(will_need)(ROW(s->u, t - EVERY), n);
            FN(will_need)(ROW(s->delta, t - EVERY), n);
            FN(will_need)(ROW(s->grad_y, t), n);
            FN(read)(&x, bias, ROW(s->u, t), ROW(s->delta, t), n);
            for (int64_t k = 0, row = 0; k < N; k++, row += width)
                FN(step)(before + size + row, from + row, a + row, &x, rates + row, in[k], 0, 0, width);
        }
        for (int64_t t = t1 - 1; t >= t0; t--) {
            const int reset = s->reset && s->reset[b * s->T + t];
            const REAL *const after = states + (t + 1 - t0) * size, *const before = reset ? zeros : after - size;
            const REAL *const in = COEFFS(s->in, t), *const out = COEFFS(s->out, t), *const u = ROW(s->u, t);
            REAL *const grad_in = (REAL *)s->grad_in + (parts + t) * N, *const grad_out = (REAL *)s->grad_out + (parts + t) * N;
            FN(read)(&x, bias, u, ROW(s->delta, t), n);
            FN(copy)(grad_y, ROW(s->grad_y, t), n);
            memset(g.value, 0, sizeof g.value);
            memset(g.delta, 0, sizeof g.delta);
            for (int64_t k = 0, row = 0; k < N; k++, row += width)
                FN(step_back)(&g, row, after + row, before + row, kept + (t - t0) * size + row, &x, rates + row, in[k], out[k], grad_y,
                              grad_in + k, grad_out + k, width);
            REAL *const grad_u = ROW(s->grad_u, t), *const grad_delta = ROW(s->grad_delta, t);
            SIMD(0, n, {
                grad_u[j] = MADD(g.value[j], x.delta[j], grad_y[j] * skip[j]);
                grad_delta[j] = x.slope[j] * MADD(g.value[j], u[j], (REAL)0.693147180559945309417 * g.delta[j]);
                grad_skip[j] = MADD(grad_y[j], u[j], grad_skip[j]);
                grad_bias[j] += grad_delta[j];
            });
            if (reset) memset(g.carry, 0, (size_t)size * sizeof(REAL));
        }
    }
    FN(leave)((REAL *)s->grad_rates + (b * s->E + c0) * N, g.rates, N, width, n);
    FN(leave)((REAL *)s->grad_initial + (b * s->E + c0) * N, g.carry, N, width, n);
    FN(copy)((REAL *)s->grad_skip + b * s->E + c0, grad_skip, n);
    FN(copy)((REAL *)s->grad_bias + b * s->E + c0, grad_bias, n);
    free(memory);
    return 0;
}

#undef FN
#undef MADD
#undef ROW
#undef COEFFS
#undef SIMD
#undef REAL
#undef KIND
#undef BITS
#undef UBITS
#undef POWERS
#undef TERMS
#undef ROUNDER
#undef EXPONENT_BIAS
#undef MANTISSA
#undef LEAST
#undef MOST
