/* minGRU: z = sigmoid(x[0]), h_t = (1 - z) h_{t-1} + z act(x[1]). Feng et al. (2024), section 3.1. */
#include "types.h"

#define GATES_OF(R)                                                                                      \
    INLINE R JOIN(gates, R)(const R *x, int act, R *b)                                                   \
    {                                                                                                    \
        R write, keep, slope;                                                                            \
        JOIN(sigmoids, R)(x[0], &write, &keep);                                                          \
        *b = write * JOIN(activate, R)(x[1], act, &slope);                                               \
        return keep;                                                                                     \
    }                                                                                                    \
    INLINE R JOIN(grads, R)(const R *x, int act, R g, R prev, R *d)                                      \
    {                                                                                                    \
        R write, keep, slope;                                                                            \
        JOIN(sigmoids, R)(x[0], &write, &keep);                                                          \
        const R value = JOIN(activate, R)(x[1], act, &slope);                                            \
        d[0] = g * (value - prev) * (write * keep);                                                      \
        d[1] = g * (write * slope);                                                                      \
        return keep;                                                                                     \
    }
#define OP mingru
#define INPUTS 2
#include "instances.h"
