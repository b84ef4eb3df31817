/* The kernels of wkv.c for one type. Included once per type with REAL, KIND (its name) and EXP. */

#define FN(x) JOIN(x, KIND)
#define ROW(tensor, b, t) ((REAL *)(tensor) + ((b) * s->T + (t)) * s->D + c0)
#define STATE(tensor, b) ((REAL *)(tensor) + (b) * s->D + c0)
#define MARK(b, t, i) ((REAL *)s->marks + (((b) * ceil_div(s->T, EVERY) + (t) / EVERY) * 3 + (i)) * s->D + c0)

static void FN(copy)(REAL *to, const REAL *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

static void FN(fill)(REAL *to, REAL value, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = value;
}

/* The state of n channels is average, weight, max, BLOCK apart. */
static void FN(enter)(REAL *state, const REAL *average, const REAL *weight, const REAL *max, int64_t n)
{
    FN(copy)(state, average, n);
    FN(copy)(state + BLOCK, weight, n);
    FN(copy)(state + 2 * BLOCK, max, n);
}

static void FN(restart)(REAL *state, int64_t n)
{
    FN(fill)(state, 0, n);
    FN(fill)(state + BLOCK, 0, n);
    FN(fill)(state + 2 * BLOCK, (REAL)-INFINITY, n);
}

/* `to` is the state after a step from `from`; they may be the same. The difference of the maxima is taken first: it is exact where they
 * are close, so that no rounding of the maxima becomes a decay. */
static void FN(advance)(REAL *to, const REAL *from, const REAL *k, const REAL *v, const REAL *w, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const REAL average = from[j], before = from[j + 2 * BLOCK], less = before - w[j], max = less > k[j] ? less : k[j];
        const REAL old = EXP(before - max - w[j]) * from[j + BLOCK], new = EXP(k[j] - max), weight = old + new;
        to[j] = average + new / weight * (v[j] - average);
        to[j + BLOCK] = weight;
        to[j + 2 * BLOCK] = max;
    }
}

static void FN(output)(REAL *y, const REAL *state, const REAL *k, const REAL *v, const REAL *u, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const REAL average = state[j], before = state[j + 2 * BLOCK], now = k[j] + u[j], max = before > now ? before : now;
        const REAL old = EXP(before - max) * state[j + BLOCK], new = EXP(now - max);
        y[j] = average + new / (old + new) * (v[j] - average);
    }
}

/* One step back. `carry` holds the gradient of average and weight after the step, and then of `state`, what was before it. Gradients of
 * keys are made from the difference of value and average; as one of two large sums they would be rounding errors where one key rules. */
static void FN(step_back)(const REAL *state, const REAL *k, const REAL *v, const REAL *w, const REAL *u, const REAL *grad_y,
                          REAL *carry, REAL *grad_k, REAL *grad_v, REAL *grad_w, REAL *grad_u, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const REAL weight = state[j + BLOCK], before = state[j + 2 * BLOCK], gap = v[j] - state[j];
        const REAL grad_average = carry[j], grad_weight = carry[j + BLOCK];

        /* The output: y = average + share gap. */
        const REAL now = k[j] + u[j], top = before > now ? before : now;
        const REAL past = EXP(before - top), here = EXP(now - top), once = 1 / (past * weight + here);
        const REAL share = here * once, rest = past * once, by_output = grad_y[j] * gap * share * rest;

        /* The next state: average + part gap, and its weight. */
        const REAL less = before - w[j], max = less > k[j] ? less : k[j];
        const REAL kept = EXP(before - max - w[j]), new = EXP(k[j] - max), inverse = 1 / (kept * weight + new);
        const REAL part = new * inverse, left = kept * inverse, by_state = grad_average * gap * part * left;

        grad_k[j] = (by_output + by_state) * weight + new * grad_weight;
        grad_v[j] = share * grad_y[j] + part * grad_average;
        grad_w[j] += (by_state - kept * grad_weight) * weight;
        grad_u[j] += by_output * weight;
        carry[j] = rest * weight * grad_y[j] + left * weight * grad_average;
        carry[j + BLOCK] = kept * grad_weight - by_output - by_state;
    }
}

/* Channels [c0, c0 + n) of sequence b. */
static void FN(forward)(const wkv *s, int64_t b, int64_t c0, int64_t n)
{
    REAL state[3 * BLOCK];
    FN(enter)(state, STATE(s->average, b), STATE(s->weight, b), STATE(s->max, b), n);
    for (int64_t t = 0; t < s->T; t++) {
        if (s->reset && s->reset[b * s->T + t]) FN(restart)(state, n);
        for (int i = 0; i < 3 && t % EVERY == 0; i++) FN(copy)(MARK(b, t, i), state + i * BLOCK, n);
        FN(output)(ROW(s->y, b, t), state, ROW(s->k, b, t), ROW(s->v, b, t), (const REAL *)s->u + c0, n);
        FN(advance)(state, state, ROW(s->k, b, t), ROW(s->v, b, t), (const REAL *)s->w + c0, n);
    }
    FN(copy)(STATE(s->last_average, b), state, n);
    FN(copy)(STATE(s->last_weight, b), state + BLOCK, n);
    FN(copy)(STATE(s->last_max, b), state + 2 * BLOCK, n);
}

/* The same from the end: from each mark on, the states before its steps are found again, and the steps taken back. */
static void FN(backward)(const wkv *s, int64_t b, int64_t c0, int64_t n)
{
    REAL states[EVERY][3 * BLOCK], carry[2 * BLOCK], grad_w[BLOCK], grad_u[BLOCK];
    const REAL *const w = (const REAL *)s->w + c0, *const u = (const REAL *)s->u + c0;
    FN(copy)(carry, STATE(s->grad_last_average, b), n);
    FN(copy)(carry + BLOCK, STATE(s->grad_last_weight, b), n);
    FN(fill)(grad_w, 0, n);
    FN(fill)(grad_u, 0, n);
    for (int64_t t0 = (ceil_div(s->T, EVERY) - 1) * EVERY; t0 >= 0; t0 -= EVERY) {
        const int64_t t1 = min64(t0 + EVERY, s->T);
        FN(enter)(states[0], MARK(b, t0, 0), MARK(b, t0, 1), MARK(b, t0, 2), n);
        for (int64_t t = t0 + 1; t < t1; t++) {
            if (s->reset && s->reset[b * s->T + t]) FN(restart)(states[t - t0], n);
            else FN(advance)(states[t - t0], states[t - t0 - 1], ROW(s->k, b, t - 1), ROW(s->v, b, t - 1), w, n);
        }
        for (int64_t t = t1 - 1; t >= t0; t--) {
            FN(step_back)(states[t - t0], ROW(s->k, b, t), ROW(s->v, b, t), w, u, ROW(s->grad_y, b, t), carry,
                          ROW(s->grad_k, b, t), ROW(s->grad_v, b, t), grad_w, grad_u, n);
            if (s->reset && s->reset[b * s->T + t]) FN(fill)(carry, 0, n), FN(fill)(carry + BLOCK, 0, n);
        }
    }
    FN(copy)(STATE(s->grad_average, b), carry, n);
    FN(copy)(STATE(s->grad_weight, b), carry + BLOCK, n);
    FN(copy)(STATE(s->grad_w, b), grad_w, n);
    FN(copy)(STATE(s->grad_u, b), grad_u, n);
}

#undef FN
#undef ROW
#undef STATE
#undef MARK
#undef REAL
#undef KIND
#undef EXP
