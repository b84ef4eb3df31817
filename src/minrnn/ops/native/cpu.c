/* What the machine can run, asked of the library that every machine can run. */
#include "scan.h"

/* Whether work is shared between threads. */
EXPORT int has_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* 0: the baseline; 1: x86-64-v3 (AVX2, FMA); 2: x86-64-v4 (AVX-512). */
EXPORT int cpu_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2"))
        return 1;
#endif
    return 0;
}
