// Facts about the library itself.
#include "native.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

SQDF_FAST_EXPORT int32_t sqdf_fast_abi_version() { return SQDF_FAST_ABI_VERSION; }

// Threads an op may use at most; 1 when the library was built without OpenMP.
SQDF_FAST_EXPORT int32_t sqdf_fast_max_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// The instruction set that the cloned functions run with on this processor.
SQDF_FAST_EXPORT const char* sqdf_fast_instruction_set() {
#if defined(SQDF_FAST_CLONES_BY_LEVEL) || defined(SQDF_FAST_CLONES_BY_FEATURE)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return "AVX-512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
    return "baseline";
}

// Bytes of the last-level cache, 32 MiB where the system does not say.
SQDF_FAST_EXPORT int64_t sqdf_fast_cache_bytes() {
    long bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : int64_t{32} << 20;
}
