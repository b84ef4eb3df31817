/* The recurrence, once for all scans: h_t = a_t h_{t-1} + b_t and its adjoint. Included once per op and type, with
 *
 *   OP, TYPE       names, e.g. mingru and bf16        ACC, CONJ   the type of the state; the conjugate, where that is complex
 *   INPUTS         how many input rows a step has
 *   GATES(x, act, &b) -> a            from the inputs x[0..INPUTS) of one element to its recurrence
 *   GRADS(x, act, g, prev, d) -> a    the gradients d[0..INPUTS) of the inputs, given g = dL/dh_t and prev = what was carried in
 *
 * Positions count in the order of the scan: position p is time p, or T-1-p in reverse.
 */

#define FN(x) JOIN(x, JOIN(OP, TYPE))
#define IO JOIN(io, TYPE)
#define LOAD JOIN(load, TYPE)
#define STORE JOIN(store, TYPE)
#define AT(tensor, b, t) ((tensor).data + ((b) * (tensor).batch + (t) * (tensor).time) * (int64_t)sizeof(IO))
#define STATE(tensor, b) ((ACC *)(tensor).data + (b) * (tensor).batch)

INLINE int64_t FN(length)(const scan *s, int64_t b)
{
    return s->lengths.data ? min64(((const int64_t *)s->lengths.data)[b * s->lengths.batch], s->T) : s->T;
}

INLINE int FN(is_reset)(const scan *s, int64_t b, int64_t t)
{
    return s->reset.data && s->reset.data[b * s->reset.batch + t * s->reset.time];
}

static const ACC FN(zeros)[WIDTH];

/* What a sequence restarts from, channels from c on. */
INLINE const ACC *FN(restart)(const scan *s, int64_t b, int64_t c) { return s->restart.data ? STATE(s->restart, b) + c : FN(zeros); }
INLINE const ACC *FN(begin)(const scan *s, int64_t b, int64_t c) { return s->initial.data ? STATE(s->initial, b) + c : FN(zeros); }

typedef struct {
    const IO *row[INPUTS];
} FN(inputs);

INLINE FN(inputs) FN(read)(const scan *s, int64_t b, int64_t t, int64_t c)
{
    FN(inputs) in;
    for (int i = 0; i < INPUTS; i++) in.row[i] = (const IO *)AT(s->in[i], b, t) + c * (i ? 1 : s->channel);
    return in;
}

#define LOAD_INPUTS                                                           \
    ACC x[3];                                                                 \
    x[0] = LOAD(in.row[0][j * channel]), x[1] = LOAD(in.row[1][j]);           \
    if (INPUTS == 3) x[2] = LOAD(in.row[INPUTS - 1][j]);

/* Element j of the loops below. In functions of their own, because a variable of a simd loop's body whose address is taken would be made
 * an array, and the loop not vectorised. */

INLINE void FN(step_one)(FN(inputs) in, const ACC *carried, ACC *state, IO *h, int64_t j, const int act, const int64_t channel)
{
    LOAD_INPUTS
    ACC b;
    const ACC a = GATES(x, act, &b);
    const ACC new = MADD(a, carried[j], b);
    state[j] = new;
    h[j] = STORE(new);
}

INLINE void FN(compose_one)(FN(inputs) in, ACC *product, ACC *sum, int64_t j, const int act, const int64_t channel)
{
    LOAD_INPUTS
    ACC b;
    const ACC a = GATES(x, act, &b);
    sum[j] = MADD(a, sum[j], b);
    product[j] = a * product[j];
}

INLINE void FN(step_back_one)(FN(inputs) in, const ACC *prev, const IO *grad_h, ACC *carry, IO *const *grad_in, int64_t j, const int act,
                              const int64_t channel)
{
    LOAD_INPUTS
    ACC d[3];
    const ACC g = LOAD(grad_h[j]) + carry[j];
    const ACC a = GRADS(x, act, g, prev[j], d);
    carry[j] = CONJ(a) * g;
    grad_in[0][j] = STORE(d[0]);
    grad_in[1][j] = STORE(d[1]);
    if (INPUTS == 3) grad_in[2][j] = STORE(d[2]);
}

INLINE void FN(compose_back_one)(FN(inputs) in, const IO *grad_h, ACC *product, ACC *sum, int64_t j, const int act, const int64_t channel)
{
    LOAD_INPUTS
    ACC b;
    const ACC a = CONJ(GATES(x, act, &b));
    sum[j] = a * (sum[j] + LOAD(grad_h[j]));
    product[j] = a * product[j];
}

#define SIMD(from, to, body) _Pragma("omp simd") for (int64_t j = from; j < to; j++) body

/* Loops over n channels: whole vectors, then what is left by fours, which is much of a narrow layer. */
#define CHANNELS(body)                                \
    do {                                              \
        const int64_t whole = n / 16 * 16;            \
        SIMD(0, whole, body);                         \
        int64_t k = whole;                            \
        for (; k + 4 <= n; k += 4) SIMD(k, k + 4, body); \
        for (int64_t j = k; j < n; j++) body;         \
    } while (0)

/* One step of n channels: state = a * carried + b, written to h. */
INLINE void FN(step)(FN(inputs) in, const ACC *carried, ACC *state, IO *h, int64_t n, const int act, const int64_t channel)
{
    CHANNELS(FN(step_one)(in, carried, state, h, j, act, channel));
}

/* The same step, as a map of whatever comes in: (product, sum) after it. */
INLINE void FN(compose)(FN(inputs) in, ACC *product, ACC *sum, int64_t n, const int act, const int64_t channel)
{
    SIMD(0, n, FN(compose_one)(in, product, sum, j, act, channel));
}

/* One step back from prev, what was carried into step t: carry holds dL/d(what step t handed on), and then dL/d(prev). */
INLINE void FN(step_back)(FN(inputs) in, const ACC *prev, const IO *grad_h, ACC *carry, IO *const *grad_in, int64_t n, const int act,
                          const int64_t channel)
{
    IO *const own[3] = {grad_in[0], grad_in[1], grad_in[2]};
    CHANNELS(FN(step_back_one)(in, prev, grad_h, carry, own, j, act, channel));
}

/* The adjoint's own recurrence, c <- a (c + grad_t), as a map of whatever comes in. */
INLINE void FN(compose_back)(FN(inputs) in, const IO *grad_h, ACC *product, ACC *sum, int64_t n, const int act, const int64_t channel)
{
    SIMD(0, n, FN(compose_back_one)(in, grad_h, product, sum, j, act, channel));
}

/* Calls body with the activation and the channel stride as constants, so that each loop is compiled for its own. */
#define SPECIALIZE(body, ...)                                                                     \
    do {                                                                                          \
        if (INPUTS == 2 && s->channel == 0) body(__VA_ARGS__, IDENTITY, 0);                       \
        else if (s->activation == G) body(__VA_ARGS__, G, 1);                                     \
        else if (s->activation == IDENTITY) body(__VA_ARGS__, IDENTITY, 1);                       \
        else body(__VA_ARGS__, TANH, 1);                                                          \
    } while (0)

/* A piece of work: sequences [b0, b1), channels [c0, c0 + n), positions [p0, p1). */
typedef struct {
    int64_t b0, b1, c0, n, p0, p1;
} FN(piece);

INLINE int64_t FN(time)(const scan *s, int64_t p) { return s->reverse ? s->T - 1 - p : p; }

INLINE void FN(copy)(ACC *to, const ACC *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

INLINE void FN(widen)(ACC *to, const IO *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) to[j] = LOAD(from[j]);
}

/* Ask for the n elements of a row that will be read, or written. Never faults, so that what lies beyond the end needs no care. */
INLINE void FN(will_read)(const tensor *x, int64_t b, int64_t t, int64_t c, int64_t n)
{
    for (int64_t j = 0; j < n; j += LINE / (int64_t)sizeof(IO)) __builtin_prefetch((const IO *)AT(*x, b, t) + c + j);
}

INLINE void FN(will_write)(const tensor *x, int64_t b, int64_t t, int64_t c, int64_t n)
{
    for (int64_t j = 0; j < n; j += LINE / (int64_t)sizeof(IO)) __builtin_prefetch((const IO *)AT(*x, b, t) + c + j, 1);
}

/* How many steps ahead. */
INLINE int64_t FN(ahead)(FN(piece) w) { return ceil_div(AHEAD, (w.b1 - w.b0) * w.n * (int64_t)sizeof(IO)); }

/* state (b1 - b0, n) holds what comes in, and then what goes out. */
static void FN(forward_piece)(const scan *s, FN(piece) w, ACC *state)
{
    const int64_t ahead = FN(ahead)(w);
    for (int64_t p = w.p0; p < w.p1; p++) {
        const int64_t t = FN(time)(s, p), next = FN(time)(s, p + ahead);
        for (int64_t b = w.b0; b < w.b1; b++) {
            const int over = t >= FN(length)(s, b), reset = FN(is_reset)(s, b, t);
            for (int64_t c = w.c0; c < w.c0 + w.n; c += STRIP) {
                const int64_t n = min64(STRIP, w.c0 + w.n - c);
                ACC *const own = state + (b - w.b0) * w.n + c - w.c0;
                IO *const h = (IO *)AT(s->h, b, t) + c;
                FN(will_write)(&s->h, b, next, c, n);
                if (over) {
                    for (int64_t j = 0; j < n; j++) h[j] = 0;
                    continue;
                }
                for (int i = 0; i < INPUTS; i++) FN(will_read)(&s->in[i], b, next, c, n);
                SPECIALIZE(FN(step), FN(read)(s, b, t, c), reset ? FN(restart)(s, b, c) : own, own, h, n);
            }
        }
    }
}

/* What a chunk does to whatever comes in: state -> product * state + sum; or just sum, where a reset cuts. Back: the adjoint's. */
static int FN(compose_piece)(const scan *s, FN(piece) w, ACC *product, ACC *sum, int back)
{
    const int64_t b = w.b0;
    int cut = 0;
    for (int64_t j = 0; j < w.n; j++) product[j] = 1, sum[j] = 0;
    for (int64_t i = 0; i < w.p1 - w.p0; i++) {
        const int64_t t = FN(time)(s, back ? w.p1 - 1 - i : w.p0 + i);
        if (t >= FN(length)(s, b)) continue;
        const int reset = FN(is_reset)(s, b, t);
        cut |= reset;
        if (back) {
            const IO *const grad_h = s->grad_h.data ? (const IO *)AT(s->grad_h, b, t) + w.c0 : (const IO *)FN(zeros);
            SPECIALIZE(FN(compose_back), FN(read)(s, b, t, w.c0), grad_h, product, sum, w.n);
            if (reset)
                for (int64_t j = 0; j < w.n; j++) sum[j] = 0;
        } else {
            if (reset)
                for (int64_t j = 0; j < w.n; j++) sum[j] = FN(restart)(s, b, w.c0)[j];
            SPECIALIZE(FN(compose), FN(read)(s, b, t, w.c0), product, sum, w.n);
        }
    }
    return cut;
}

/* carry (b1 - b0, n) holds dL/d(what the piece hands on), and then dL/d(what comes in). restarts, if any, gathers dL/d(restart). */
static void FN(backward_piece)(const scan *s, FN(piece) w, ACC *carry, ACC *restarts)
{
    const int64_t ahead = FN(ahead)(w), behind = s->reverse ? 1 : -1; /* from t to where the step's state came from */
    for (int64_t p = w.p1 - 1; p >= w.p0; p--) {
        const int64_t t = FN(time)(s, p), next = FN(time)(s, p - ahead);
        for (int64_t b = w.b0; b < w.b1; b++) {
            const int64_t length = FN(length)(s, b);
            const int over = t >= length, reset = FN(is_reset)(s, b, t), first = t == (s->reverse ? length - 1 : 0);
            for (int64_t c = w.c0; c < w.c0 + w.n; c += STRIP) {
                const int64_t n = min64(STRIP, w.c0 + w.n - c), at = (b - w.b0) * w.n + c - w.c0;
                IO *grad_in[3] = {0};
                for (int i = 0; i < INPUTS; i++) {
                    grad_in[i] = (IO *)AT(s->grad_in[i], b, t) + c;
                    FN(will_write)(&s->grad_in[i], b, next, c, n);
                    for (int64_t j = 0; over && j < n; j++) grad_in[i][j] = 0;
                }
                if (over) continue;
                for (int i = 0; i < INPUTS; i++) FN(will_read)(&s->in[i], b, next, c, n);
                FN(will_read)(&s->h, b, next + behind, c, n);
                if (s->grad_h.data) FN(will_read)(&s->grad_h, b, next, c, n);

                const IO *const grad_h = s->grad_h.data ? (const IO *)AT(s->grad_h, b, t) + c : (const IO *)FN(zeros);
                ACC prev[STRIP];
                if (reset || first)
                    FN(copy)(prev, reset ? FN(restart)(s, b, c) : FN(begin)(s, b, c), n);
                else
                    FN(widen)(prev, (const IO *)AT(s->h, b, t + behind) + c, n);
                SPECIALIZE(FN(step_back), FN(read)(s, b, t, c), prev, grad_h, carry + at, grad_in, n);
                for (int64_t j = at; reset && j < at + n; j++) {
                    if (restarts) restarts[j] += carry[j];
                    carry[j] = 0;
                }
            }
        }
    }
}

/* Both directions: enter a piece with its state, run it, hand the state on. With one chunk that is all; with several, pass one finds what
 * each chunk does, pass two joins them, pass three runs each from its true beginning. */
static int FN(run)(const scan *s, int back)
{
    const tensor *const order = &s->in[INPUTS - 1];
    const grid g = divide(s, s->B > 1 && order->batch < order->time);
    const int64_t chunks = g.chunks, row = s->H;
    const tensor *const source = back ? &s->grad_last : &s->initial, *const sink = back ? &s->grad_initial : &s->last;
    ACC *products = 0, *sums = 0;
    char *cuts = 0;
    if (chunks > 1) {
        products = malloc((size_t)(s->B * chunks * row) * sizeof(ACC));
        sums = malloc((size_t)(s->B * chunks * row) * sizeof(ACC));
        cuts = malloc((size_t)(s->B * chunks));
        if (!products || !sums || !cuts) {
            free(products), free(sums), free(cuts);
            return 1;
        }
        /* Few channels: one block holds them all. */
#pragma omp parallel for num_threads(g.threads) schedule(dynamic) if (g.threads > 1)
        for (int64_t i = 0; i < s->B * chunks; i++) {
            const int64_t b = i / chunks, k = i % chunks;
            const FN(piece) w = {b, b + 1, 0, row, k * g.chunk, min64((k + 1) * g.chunk, s->T)};
            cuts[i] = (char)FN(compose_piece)(s, w, products + i * row, sums + i * row, back);
        }
        for (int64_t b = 0; b < s->B; b++) { /* sums become what comes into each chunk */
            ACC state[FEW_CHANNELS];
            FN(copy)(state, source->data ? STATE(*source, b) : FN(zeros), row);
            for (int64_t k = 0; k < chunks; k++) {
                const int64_t i = b * chunks + (back ? chunks - 1 - k : k);
                for (int64_t j = 0; j < row; j++) {
                    const ACC in = state[j], sum = sums[i * row + j];
                    state[j] = cuts[i] ? sum : MADD(products[i * row + j], in, sum);
                    sums[i * row + j] = in;
                }
            }
        }
    }
    ACC *const restarts = chunks > 1 && back && s->grad_restart.data ? products : 0; /* one per chunk, added up in order below */
#pragma omp parallel for num_threads(g.threads) schedule(dynamic) if (g.threads > 1)
    for (int64_t i = 0; i < g.groups * g.blocks * chunks; i++) {
        ACC state[TILE], local[TILE];
        const int64_t k = i % chunks, c0 = i / chunks % g.blocks * g.width, b0 = i / chunks / g.blocks * g.group;
        FN(piece) w = {b0, min64(b0 + g.group, s->B), c0, min64(g.width, s->H - c0), k * g.chunk, min64((k + 1) * g.chunk, s->T)};
        const int64_t count = w.b1 - w.b0;
        for (int64_t b = 0; b < count; b++) {
            const ACC *const in = chunks > 1 ? sums + ((b0 + b) * chunks + k) * row + c0
                                  : source->data ? STATE(*source, b0 + b) + c0 : FN(zeros);
            FN(copy)(state + b * w.n, in, w.n);
        }
        if (back) {
            const int wanted = s->grad_restart.data != 0;
            for (int64_t j = 0; wanted && j < count * w.n; j++) local[j] = 0;
            FN(backward_piece)(s, w, state, wanted ? local : 0);
            for (int64_t b = 0; wanted && b < count; b++)
                FN(copy)(restarts ? restarts + ((b0 + b) * chunks + k) * row + c0 : STATE(s->grad_restart, b0 + b) + c0, local + b * w.n, w.n);
        } else
            FN(forward_piece)(s, w, state);
        if (k == (back ? 0 : chunks - 1))
            for (int64_t b = 0; sink->data && b < count; b++) FN(copy)(STATE(*sink, b0 + b) + c0, state + b * w.n, w.n);
    }
    if (restarts)
        for (int64_t b = 0; b < s->B; b++)
            for (int64_t j = 0; j < row; j++) {
                ACC sum = 0;
                for (int64_t k = 0; k < chunks; k++) sum += restarts[(b * chunks + k) * row + j];
                STATE(s->grad_restart, b)[j] = sum;
            }
    free(products), free(sums), free(cuts);
    return 0;
}

#undef FN
#undef IO
#undef LOAD
#undef STORE
#undef TYPE
#undef ACC
#undef MADD
#undef GATES
#undef GRADS
#undef CONJ
#undef AT
#undef STATE
#undef LOAD_INPUTS
#undef SIMD
#undef CHANNELS
#undef SPECIALIZE
