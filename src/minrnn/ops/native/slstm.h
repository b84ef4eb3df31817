/* The kernels of slstm.c for one type. Included once per type with REAL and KIND (its name). d = D / heads channels of one head. */

#define FN(x) JOIN(x, KIND)
#define PANEL ((int)(PANEL_BYTES / sizeof(REAL)))
#define SERIES(tensor, b, t) ((REAL *)(tensor) + ((b) * s->T + (t)) * s->D + head * d)
#define STATE(tensor, b) ((REAL *)(tensor) + (b) * s->D + head * d)
#define MARK(b, t, i) ((REAL *)s->marks + (((b) * ceil_div(s->T, EVERY) + (t) / EVERY) * 3 + (i)) * s->D + head * d)

static void FN(copy_row)(REAL *to, const REAL *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

static void FN(fill_row)(REAL *to, REAL value, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = value;
}

/* out += x matrix for `count` rows and n columns, x of K columns. Strides are of rows, and of columns too for x. Where count and n are
 * constants, the sums stay in registers. */
INLINE void FN(panel)(REAL *out, int64_t out_row, const REAL *x, int64_t x_row, int64_t x_column, const REAL *matrix, int64_t matrix_row,
                      int64_t K, int count, int n)
{
    REAL sum[ROWS][PANEL];
    for (int r = 0; r < count; r++)
        for (int j = 0; j < n; j++) sum[r][j] = 0;
    for (int64_t k = 0; k < K; k++)
#pragma GCC unroll 4
        for (int r = 0; r < count; r++)
#pragma omp simd
            for (int j = 0; j < n; j++) sum[r][j] = FN(madd)(x[r * x_row + k * x_column], matrix[k * matrix_row + j], sum[r][j]);
    for (int r = 0; r < count; r++)
        for (int j = 0; j < n; j++) out[r * out_row + j] += sum[r][j];
}

INLINE void FN(columns)(REAL *out, int64_t out_row, const REAL *x, int64_t x_row, int64_t x_column, const REAL *matrix,
                        int64_t matrix_row, int64_t rows, int64_t K, int n)
{
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        FN(panel)(out + r * out_row, out_row, x + r * x_row, x_row, x_column, matrix, matrix_row, K, ROWS, n);
    for (; r < rows; r++) FN(panel)(out + r * out_row, out_row, x + r * x_row, x_row, x_column, matrix, matrix_row, K, 1, n);
}

/* out (rows, N) += x (rows, K) matrix (K, N), every sum in the order of K. */
static void FN(multiply)(REAL *out, int64_t out_row, const REAL *x, int64_t x_row, int64_t x_column, const REAL *matrix,
                         int64_t matrix_row, int64_t rows, int64_t K, int64_t N)
{
    int64_t j = 0;
    for (; j + PANEL <= N; j += PANEL)
        FN(columns)(out + j, out_row, x, x_row, x_column, matrix + j, matrix_row, rows, K, PANEL);
    for (; j + PANEL / 4 <= N; j += PANEL / 4)
        FN(columns)(out + j, out_row, x, x_row, x_column, matrix + j, matrix_row, rows, K, PANEL / 4);
    if (j < N) FN(columns)(out + j, out_row, x, x_row, x_column, matrix + j, matrix_row, rows, K, (int)(N - j));
}

static REAL *FN(scratch)(int64_t n) { return aligned_alloc(64, (size_t)ceil_div(n * (int64_t)sizeof(REAL), 64) * 64); }

/* log(1 + u) = 2 atanh(u / (2 + u)) for u in [0, 1]: its series, in powers of at most 1/9. */
INLINE REAL FN(log1p_)(REAL u)
{
    enum { TERMS = sizeof(REAL) == 4 ? 7 : 16 };
    const REAL s = u / (2 + u), square = s * s;
    REAL sum = (REAL)1 / (2 * TERMS + 1);
#pragma GCC unroll 16
    for (int i = TERMS - 1; i >= 0; i--) sum = FN(madd)(sum, square, (REAL)1 / (2 * i + 1));
    return 2 * s * sum;
}

/* The state of a row is h, c, n, m, d numbers each. */
static void FN(restart)(REAL *state, int64_t d)
{
    FN(fill_row)(state, 0, 3 * d);
    FN(fill_row)(state + 3 * d, (REAL)-INFINITY, d);
}

/* h_{t-1}, zero where step t begins a sequence. */
static void FN(read_before)(REAL *h, const slstm *s, int64_t b, int64_t t, int64_t head, int64_t d)
{
    if (s->reset && s->reset[b * s->T + t]) FN(fill_row)(h, 0, d);
    else FN(copy_row)(h, t ? SERIES(s->h, b, t - 1) : STATE(s->initial[0], b), d);
}

/* The gates of step t before the recurrent part is added. */
static void FN(read_gates)(REAL *gates, const slstm *s, int64_t b, int64_t t, int64_t head, int64_t d)
{
    for (int i = 0; i < 4; i++) {
        const REAL *const in = SERIES(s->in[i], b, t), *const bias = (const REAL *)s->bias + i * s->D + head * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) gates[i * d + j] = in[j] + bias[j];
    }
}

/* `to` is the state after a step from `from`; they may be the same. `kept` is for the way back: by what c and n were multiplied, the weight
 * and the value of the candidate, the output gate, one minus the two sigmoids, c / n and 1 / n. The difference of the maxima is taken
 * first: it is exact where they are close, so that no rounding of the maxima becomes a decay. */
static void FN(step)(REAL *to, const REAL *from, const REAL *gates, REAL *kept, int64_t d)
{
#pragma omp simd
    for (int64_t j = 0; j < d; j++) {
        const REAL in = gates[j], forget = gates[d + j], before = from[3 * d + j];
        const REAL e = FN(exp_negative)(forget < 0 ? forget : -forget), l = FN(log1p_)(e);
        const REAL log_forget = forget < 0 ? forget - l : -l; /* NaN takes the second */
        const REAL aged = before + log_forget, max = aged > in ? aged : in;
        const REAL f = FN(exp_negative)((before - max) + log_forget), i = FN(exp_negative)(in - max);
        const REAL z = FN(tanh_)(gates[2 * d + j]);
        REAL o, not_o;
        FN(sigmoids)(gates[3 * d + j], &o, &not_o);
        const REAL c = FN(madd)(f, from[d + j], i * z), n = FN(madd)(f, from[2 * d + j], i), once = 1 / n;
        to[j] = o * (c * once);
        to[d + j] = c;
        to[2 * d + j] = n;
        to[3 * d + j] = max;
        kept[j] = f;
        kept[d + j] = i;
        kept[2 * d + j] = z;
        kept[3 * d + j] = o;
        kept[4 * d + j] = (forget < 0 ? (REAL)1 : e) / (1 + e);
        kept[5 * d + j] = not_o;
        kept[6 * d + j] = c * once;
        kept[7 * d + j] = once;
    }
}

/* One step back. `carry` holds the gradients of c and n after the step, and then of those before it; `grad` becomes that of the gates. */
static void FN(step_back)(REAL *grad, REAL *carry, const REAL *grad_h, const REAL *grad_y, const REAL *from, const REAL *kept, int64_t d)
{
#pragma omp simd
    for (int64_t j = 0; j < d; j++) {
        const REAL f = kept[j], i = kept[d + j], z = kept[2 * d + j], o = kept[3 * d + j], not_f = kept[4 * d + j];
        const REAL mean = kept[6 * d + j], once = kept[7 * d + j], grad_mean = (grad_h[j] + grad_y[j]) * o;
        const REAL grad_c = FN(madd)(grad_mean, once, carry[j]), grad_n = FN(madd)(-grad_mean * once, mean, carry[d + j]);
        grad[j] = i * FN(madd)(grad_c, z, grad_n);
        grad[d + j] = f * not_f * FN(madd)(grad_c, from[d + j], grad_n * from[2 * d + j]);
        grad[2 * d + j] = grad_c * i * FN(madd)(-z, z, 1);
        grad[3 * d + j] = grad_mean * mean * kept[5 * d + j];
        carry[j] = f * grad_c;
        carry[d + j] = f * grad_n;
    }
}

/* One head of the sequences [b0, b0 + count). */
static int FN(forward)(const slstm *s, int64_t head, int64_t b0, int64_t count)
{
    const int64_t d = s->D / s->heads;
    const REAL *const weight = (const REAL *)s->recurrent + head * 4 * d * d;
    REAL *const gates = FN(scratch)(count * 9 * d + 8 * d);
    if (!gates) return 1;
    REAL *const h = gates + count * 4 * d, *const states = h + count * d, *const kept = states + count * 4 * d;
    for (int64_t r = 0; r < count; r++)
        for (int i = 0; i < 4; i++) FN(copy_row)(states + (r * 4 + i) * d, STATE(s->initial[i], b0 + r), d);
    for (int64_t t = 0; t < s->T; t++) {
        for (int64_t r = 0; r < count; r++) {
            const int64_t b = b0 + r;
            REAL *const state = states + r * 4 * d;
            if (s->reset && s->reset[b * s->T + t]) FN(restart)(state, d);
            for (int i = 0; i < 3 && t % EVERY == 0; i++) FN(copy_row)(MARK(b, t, i), state + (i + 1) * d, d);
            FN(copy_row)(h + r * d, state, d);
            FN(read_gates)(gates + r * 4 * d, s, b, t, head, d);
        }
        FN(multiply)(gates, 4 * d, h, d, 1, weight, 4 * d, count, d, 4 * d);
        for (int64_t r = 0; r < count; r++) {
            REAL *const state = states + r * 4 * d;
            FN(step)(state, state, gates + r * 4 * d, kept, d);
            FN(copy_row)(SERIES(s->h, b0 + r, t), state, d);
        }
    }
    for (int64_t r = 0; r < count; r++)
        for (int i = 0; i < 4; i++) FN(copy_row)(STATE(s->last[i], b0 + r), states + (r * 4 + i) * d, d);
    free(gates);
    return 0;
}

/* The same from the end: from each mark on, the gates and states of its steps are found again, all h being known, and the steps taken
 * back. Rows of the scratch memory are (step, sequence). */
static int FN(backward)(const slstm *s, int64_t head, int64_t b0, int64_t count)
{
    const int64_t d = s->D / s->heads, rows = EVERY * count;
    const REAL *const weight = (const REAL *)s->recurrent + head * 4 * d * d;
    const REAL *const transposed = (const REAL *)s->transposed + head * 4 * d * d;
    REAL *const gates = FN(scratch)((rows * 17 + count * 11) * d);
    if (!gates) return 1;
    REAL *const before = gates + rows * 4 * d, *const kept = before + rows * d, *const states = kept + rows * 8 * d;
    REAL *const carry = states + (rows + count) * 4 * d, *const carry_h = carry + count * 2 * d, *const bias = carry_h + count * d;
    FN(fill_row)(bias, 0, count * 4 * d);
    for (int64_t r = 0; r < count; r++) {
        FN(copy_row)(carry_h + r * d, STATE(s->grad_last[0], b0 + r), d);
        for (int i = 0; i < 2; i++) FN(copy_row)(carry + (r * 2 + i) * d, STATE(s->grad_last[i + 1], b0 + r), d);
    }
    for (int64_t t1 = s->T, t0; t1 > 0; t1 = t0) {
        t0 = (t1 - 1) / EVERY * EVERY;
        for (int64_t row = 0; row < (t1 - t0) * count; row++) {
            const int64_t t = t0 + row / count, b = b0 + row % count;
            FN(read_before)(before + row * d, s, b, t, head, d);
            FN(read_gates)(gates + row * 4 * d, s, b, t, head, d);
        }
        FN(multiply)(gates, 4 * d, before, d, 1, weight, 4 * d, (t1 - t0) * count, d, 4 * d);
        for (int64_t r = 0; r < count; r++)
            for (int i = 0; i < 3; i++) FN(copy_row)(states + (r * 4 + i + 1) * d, MARK(b0 + r, t0, i), d);
        for (int64_t row = 0; row < (t1 - t0) * count; row++) {
            REAL *const state = states + row * 4 * d;
            const int64_t t = t0 + row / count, b = b0 + row % count;
            if (t > t0 && s->reset && s->reset[b * s->T + t]) FN(restart)(state, d);
            FN(step)(state + count * 4 * d, state, gates + row * 4 * d, kept + row * 8 * d, d);
        }
        for (int64_t t = t1 - 1; t >= t0; t--) {
            REAL *const grads = gates + (t - t0) * count * 4 * d;
            for (int64_t r = 0; r < count; r++) {
                REAL *const grad = grads + r * 4 * d, *const sum = bias + r * 4 * d;
                const int64_t row = (t - t0) * count + r;
                FN(step_back)(grad, carry + r * 2 * d, carry_h + r * d, SERIES(s->grad_h, b0 + r, t), states + row * 4 * d,
                              kept + row * 8 * d, d);
                for (int i = 0; i < 4; i++) FN(copy_row)(SERIES(s->grad_in[i], b0 + r, t), grad + i * d, d);
                for (int64_t j = 0; j < 4 * d; j++) sum[j] += grad[j];
            }
            FN(fill_row)(carry_h, 0, count * d);
            FN(multiply)(carry_h, d, grads, 4 * d, 1, transposed, d, count, 4 * d, d);
            for (int64_t r = 0; r < count; r++)
                if (s->reset && s->reset[(b0 + r) * s->T + t]) {
                    FN(fill_row)(carry_h + r * d, 0, d);
                    FN(fill_row)(carry + r * 2 * d, 0, 2 * d);
                }
        }
    }
    for (int64_t r = 0; r < count; r++) {
        FN(copy_row)(STATE(s->grad_initial[0], b0 + r), carry_h + r * d, d);
        for (int i = 0; i < 2; i++) FN(copy_row)(STATE(s->grad_initial[i + 1], b0 + r), carry + (r * 2 + i) * d, d);
        for (int i = 0; i < 4; i++)
            FN(copy_row)((REAL *)s->grad_bias + ((b0 + r) * 4 + i) * s->D + head * d, bias + (r * 4 + i) * d, d);
    }
    free(gates);
    return 0;
}

/* The gradient of the weights from one head to `count` of its gates: the sum over all steps of h_{t-1} times that of the gate. */
static int FN(weights)(const slstm *s, int64_t head, int64_t gate, int64_t count)
{
    const int64_t d = s->D / s->heads, steps = s->B * s->T;
    REAL *const before = FN(scratch)(CHUNK_STEPS * d), *const out = (REAL *)s->grad_recurrent + head * 4 * d * d;
    if (!before) return 1;
    for (int64_t i = gate; i < gate + count; i++) {
        for (int64_t k = 0; k < d; k++) FN(fill_row)(out + (k * 4 + i) * d, 0, d);
        for (int64_t k0 = 0; k0 < steps; k0 += CHUNK_STEPS) {
            const int64_t some = min64(CHUNK_STEPS, steps - k0);
            for (int64_t k = 0; k < some; k++) FN(read_before)(before + k * d, s, (k0 + k) / s->T, (k0 + k) % s->T, head, d);
            FN(multiply)(out + i * d, 4 * d, before, 1, d, SERIES(s->grad_in[i], 0, k0), s->D, d, some, d);
        }
    }
    free(before);
    return 0;
}

#undef FN
#undef PANEL
#undef SERIES
#undef STATE
#undef MARK
#undef REAL
#undef KIND
