/* The linear scan: h_t = x[0] h_{t-1} + x[1], real or complex. */
#include "types.h"

#define GATES_OF(R)                                                                                      \
    INLINE R JOIN(gates, R)(const R *x, int act, R *b)                                                   \
    {                                                                                                    \
        (void)act;                                                                                       \
        *b = x[1];                                                                                       \
        return x[0];                                                                                     \
    }                                                                                                    \
    INLINE R JOIN(grads, R)(const R *x, int act, R g, R prev, R *d)                                      \
    {                                                                                                    \
        (void)act;                                                                                       \
        d[0] = g * CONJ(prev);                                                                           \
        d[1] = g;                                                                                        \
        return x[0];                                                                                     \
    }
#define OP linear
#define INPUTS 2
#define WITH_COMPLEX
#include "instances.h"
