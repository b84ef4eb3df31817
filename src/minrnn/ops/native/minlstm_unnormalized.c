/* minLSTM without the scaling by f + i: h_t = sigmoid(x[0]) h_{t-1} + sigmoid(x[1]) act(x[2]). */
#include "types.h"

#define GATES_OF(R)                                                                                      \
    INLINE R JOIN(gates, R)(const R *x, int act, R *b)                                                   \
    {                                                                                                    \
        R forget, into, shut_forget, shut_into, slope;                                                   \
        JOIN(sigmoids, R)(x[0], &forget, &shut_forget);                                                  \
        JOIN(sigmoids, R)(x[1], &into, &shut_into);                                                      \
        *b = into * JOIN(activate, R)(x[2], act, &slope);                                                \
        return forget;                                                                                   \
    }                                                                                                    \
    INLINE R JOIN(grads, R)(const R *x, int act, R g, R prev, R *d)                                      \
    {                                                                                                    \
        R forget, into, shut_forget, shut_into, slope;                                                   \
        JOIN(sigmoids, R)(x[0], &forget, &shut_forget);                                                  \
        JOIN(sigmoids, R)(x[1], &into, &shut_into);                                                      \
        const R value = JOIN(activate, R)(x[2], act, &slope);                                            \
        d[0] = g * prev * (forget * shut_forget);                                                        \
        d[1] = g * value * (into * shut_into);                                                           \
        d[2] = g * (into * slope);                                                                       \
        return forget;                                                                                   \
    }
#define OP minlstm_unnormalized
#define INPUTS 3
#include "instances.h"
