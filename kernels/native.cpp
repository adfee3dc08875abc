// Facts about the library itself.
#include "native.h"

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sqdf_fast {
namespace {

InstructionSet supported() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return !avx2 ? kBaseline : avx512 ? kAvx512 : kAvx2;
#else
    return kBaseline;
#endif
}

std::atomic<InstructionSet> in_use{supported()};

}  // namespace

InstructionSet instruction_set() { return in_use.load(std::memory_order_relaxed); }

}  // namespace sqdf_fast

SQDF_FAST_EXPORT int32_t sqdf_fast_abi_version() { return SQDF_FAST_ABI_VERSION; }

// Threads an op may use at most; 1 when the library was built without OpenMP.
SQDF_FAST_EXPORT int32_t sqdf_fast_max_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Instruction set of the inner loops, a sqdf_fast::InstructionSet.
SQDF_FAST_EXPORT int32_t sqdf_fast_instruction_set() { return sqdf_fast::instruction_set(); }

// Makes the inner loops use the best instruction set of the processor up to `limit`.
SQDF_FAST_EXPORT void sqdf_fast_limit_instruction_set(int32_t limit) {
    sqdf_fast::in_use = std::min(sqdf_fast::supported(), static_cast<sqdf_fast::InstructionSet>(limit));
}
