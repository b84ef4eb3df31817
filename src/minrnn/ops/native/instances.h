/* An op for each of its types, and its two entries: linear_forward, linear_backward, mingru_forward, ... They return 0, or 1 where memory
 * ran out. Included with OP, INPUTS and GATES_OF(R), the op's formulas for a type of state R, as recurrence.h asks for them.
 */
#include <stdlib.h>

/* Names by the type of the state, for JOIN. */
typedef float real32;
typedef double real64;
#define sigmoids_real32 sigmoids_f32
#define sigmoids_real64 sigmoids_f64
#define activate_real32 activate_f32
#define activate_real64 activate_f64
#define exp_negative_real32 exp_negative_f32
#define exp_negative_real64 exp_negative_f64

#define CONJ(x) (x)
GATES_OF(real32)
GATES_OF(real64)

#define TYPE f32
#define ACC real32
#define MADD madd_f32
#define GATES gates_real32
#define GRADS grads_real32
#include "recurrence.h"

#define CONJ(x) (x)
#define TYPE f64
#define ACC real64
#define MADD madd_f64
#define GATES gates_real64
#define GRADS grads_real64
#include "recurrence.h"

#define CONJ(x) (x)
#define TYPE bf16
#define ACC real32
#define MADD madd_f32
#define GATES gates_real32
#define GRADS grads_real32
#include "recurrence.h"

#define CONJ(x) (x)
#define TYPE f16
#define ACC real32
#define MADD madd_f32
#define GATES gates_real32
#define GRADS grads_real32
#include "recurrence.h"

#ifdef WITH_COMPLEX
typedef float complex complex64;
typedef double complex complex128;

#define CONJ(x) conjf(x)
GATES_OF(complex64)
#define TYPE c64
#define ACC complex64
#define MADD madd_c64
#define GATES gates_complex64
#define GRADS grads_complex64
#include "recurrence.h"

#define CONJ(x) conj(x)
GATES_OF(complex128)
#define TYPE c128
#define ACC complex128
#define MADD madd_c128
#define GATES gates_complex128
#define GRADS grads_complex128
#include "recurrence.h"
#endif

#define RUN(type) JOIN(run, JOIN(OP, type))(s, back)

static int run(const scan *s, int back)
{
    switch ((enum type)s->type) {
    case F32: return RUN(f32);
    case F64: return RUN(f64);
    case BF16: return RUN(bf16);
    case F16: return RUN(f16);
#ifdef WITH_COMPLEX
    case C64: return RUN(c64);
    case C128: return RUN(c128);
#endif
    default: return 2;
    }
}

EXPORT int JOIN(OP, forward)(const scan *s) { return run(s, 0); }
EXPORT int JOIN(OP, backward)(const scan *s) { return run(s, 1); }
