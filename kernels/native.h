// What every native op shares: how a function is exported, how it is compiled for several instruction sets.
// For GCC and Clang; another compiler fails here, and the package installs without the library.
#pragma once

#include <cstdint>

// Raised whenever the signature or the meaning of an exported function changes; kernels/native.py checks it.
#define SQDF_FAST_ABI_VERSION 2

#define SQDF_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// SQDF_FAST_CLONES marks the inner loop of an op: it is compiled for AVX-512, AVX2 and the baseline, and the loader picks
// one. OpenMP regions belong in the caller, because their outlined bodies are not cloned. Such a function has a name of its
// own in the whole library: clang exports its resolver even out of an unnamed namespace.
#if defined(SQDF_FAST_CLONES_BY_LEVEL)
#define SQDF_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(SQDF_FAST_CLONES_BY_FEATURE)
#define SQDF_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SQDF_FAST_CLONES
#endif

// A function called from a cloned one must be inlined into it to be compiled for its instruction set.
#define SQDF_FAST_INLINE static inline __attribute__((always_inline))
