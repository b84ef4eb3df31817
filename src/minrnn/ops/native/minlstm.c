/* minLSTM: h_t = f' h_{t-1} + i' act(x[2]), (f', i') = (f, i) / (f + i), f = sigmoid(x[0]), i = sigmoid(x[1]).
 * Feng et al. (2024), section 3.2.
 *
 * With m(x) = min(x, 0) and u(x) = 1 + exp(-|x|), sigmoid(x) = exp(m(x)) / u(x), so that f/(f + i) needs only the difference
 * m(x[0]) - m(x[1]) and neither quotient is 0/0 when both gates are shut.
 */
#include "types.h"

#define GATES_OF(R)                                                                                      \
    INLINE void JOIN(shares, R)(const R *x, R *forget, R *into, R *shut_forget, R *shut_into)            \
    {                                                                                                    \
        const R low0 = x[0] > 0 ? 0 : x[0], low1 = x[1] > 0 ? 0 : x[1]; /* NaN stays */                  \
        const R e0 = JOIN(exp_negative, R)(x[0] < 0 ? x[0] : -x[0]);                                     \
        const R e1 = JOIN(exp_negative, R)(x[1] < 0 ? x[1] : -x[1]);                                     \
        const R apart = low0 - low1;                                                                     \
        const R less = JOIN(exp_negative, R)(apart < 0 ? apart : -apart);                                \
        const R weight0 = (apart < 0 ? less : 1) * (1 + e1), weight1 = (apart < 0 ? 1 : less) * (1 + e0); \
        const R whole = 1 / (weight0 + weight1);                                                         \
        *forget = weight0 * whole;                                                                       \
        *into = weight1 * whole;                                                                         \
        *shut_forget = (x[0] < 0 ? 1 : e0) / (1 + e0);                                                   \
        *shut_into = (x[1] < 0 ? 1 : e1) / (1 + e1);                                                     \
    }                                                                                                    \
    INLINE R JOIN(gates, R)(const R *x, int act, R *b)                                                   \
    {                                                                                                    \
        R forget, into, shut_forget, shut_into, slope;                                                   \
        JOIN(shares, R)(x, &forget, &into, &shut_forget, &shut_into);                                    \
        *b = into * JOIN(activate, R)(x[2], act, &slope);                                                \
        return forget;                                                                                   \
    }                                                                                                    \
    INLINE R JOIN(grads, R)(const R *x, int act, R g, R prev, R *d)                                      \
    {                                                                                                    \
        R forget, into, shut_forget, shut_into, slope;                                                   \
        JOIN(shares, R)(x, &forget, &into, &shut_forget, &shut_into);                                    \
        const R value = JOIN(activate, R)(x[2], act, &slope);                                            \
        const R both = g * (value - prev) * (forget * into);                                             \
        d[0] = -both * shut_forget;                                                                      \
        d[1] = both * shut_into;                                                                         \
        d[2] = g * (into * slope);                                                                       \
        return forget;                                                                                   \
    }
#define OP minlstm
#define INPUTS 3
#include "instances.h"
