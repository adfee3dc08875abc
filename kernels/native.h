// What every native op shares: how a function is exported, how it is compiled for several instruction sets.
// For GCC and Clang; another compiler fails here, and the package installs without the library.
#pragma once

#include <cstdint>
#include <cstring>

// Raised whenever the signature or the meaning of an exported function changes; kernels/native.py checks it.
#define SQDF_FAST_ABI_VERSION 5

#define SQDF_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// A function called from one that runs on several instruction sets must be inlined to be compiled for them.
#define SQDF_FAST_INLINE static inline __attribute__((always_inline))
// The same for a lambda in one.
#define SQDF_FAST_INLINED __attribute__((always_inline))

namespace sqdf_fast {

// The bits of a value as those of another type.
template <typename To, typename From>
SQDF_FAST_INLINE To as(From value) {
    To result;
    static_assert(sizeof result == sizeof value, "the bits stay");
    std::memcpy(&result, &value, sizeof result);
    return result;
}

enum InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that this processor has, up to the limit set.
InstructionSet instruction_set();

#if defined(__x86_64__)
template <auto body, typename... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))
auto on_avx512(const Arguments&... arguments) {
    return body(arguments...);
}

template <auto body, typename... Arguments>
__attribute__((target("avx2,fma,bmi2")))
auto on_avx2(const Arguments&... arguments) {
    return body(arguments...);
}
#endif

// Runs the SQDF_FAST_INLINE function `body`, the inner loop of an op, as compiled for the instruction set in use. Its
// caller holds the OpenMP region. Not target_clones: clang 14 takes the baseline for "arch=x86-64-v4" on every
// processor, and the loader resolves clones before a sanitizer is up.
template <auto body, typename... Arguments>
auto dispatch(const Arguments&... arguments) {
#if defined(__x86_64__)
    switch (instruction_set()) {
        case kAvx512:
            return on_avx512<body>(arguments...);
        case kAvx2:
            return on_avx2<body>(arguments...);
        case kBaseline:
            break;
    }
#endif
    return body(arguments...);
}

}  // namespace sqdf_fast
