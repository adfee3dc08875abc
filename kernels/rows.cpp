// What happens around a block: conversion of the half precisions, memory for outputs.
#include "rows.h"

#include <atomic>
#include <fstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sqdf_fast {
namespace {

SQDF_FAST_INLINE float from_bfloat16(uint16_t value) { return as<float>(uint32_t{value} << 16); }

SQDF_FAST_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

SQDF_FAST_INLINE float from_float16(uint16_t value) {
    constexpr uint32_t kRebias = 112u << 23, kLargest = 31u << 23, kSmallestNormal = 113u << 23;
    const uint32_t magnitude = (value & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & kLargest;
    const uint32_t normal = magnitude + kRebias + (exponent == kLargest ? kRebias : 0);  // twice: infinity and NaN
    // A subnormal gets the exponent of 2^-14 and with it a leading one, which is subtracted again.
    const uint32_t subnormal = as<uint32_t>(as<float>(magnitude + kSmallestNormal) - as<float>(kSmallestNormal));
    return as<float>((exponent == 0 ? subnormal : normal) | (value & 0x8000u) << 16);
}

SQDF_FAST_INLINE uint16_t to_float16(float value) {
    constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23;
    constexpr uint32_t kOverflow = 143u << 23, kInfinity = 255u << 23;
    const uint32_t bits = as<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1)) >> 13;  // to nearest, ties to even
    // Near 1/2 the last bit of a float is 2^-24, that of a subnormal: the addition rounds.
    const uint32_t subnormal = as<uint32_t>(as<float>(magnitude) + 0.5f) - as<uint32_t>(0.5f);
    const uint32_t special = magnitude > kInfinity ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
    const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
    return static_cast<uint16_t>((magnitude >= kOverflow ? special : finite) | ((bits >> 16) & 0x8000u));
}

template <auto convert>
SQDF_FAST_INLINE void read_each(const uint16_t* __restrict source, int n, float* __restrict values) {
#pragma omp simd
    for (int i = 0; i < n; ++i) values[i] = convert(source[i]);
}

template <auto convert>
SQDF_FAST_INLINE void write_each(const float* __restrict values, int n, uint16_t* __restrict destination) {
#pragma omp simd
    for (int i = 0; i < n; ++i) destination[i] = convert(values[i]);
}

#if defined(__x86_64__)
// Every processor with AVX2 has the instructions that convert float16.
__attribute__((target("avx,f16c"))) void read_float16(const uint16_t* source, int n, float* values) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm256_storeu_ps(values + i, _mm256_cvtph_ps(halves));
    }
    for (; i < n; ++i) values[i] = from_float16(source[i]);
}

__attribute__((target("avx,f16c"))) void write_float16(const float* values, int n, uint16_t* destination) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(destination + i), halves);
    }
    for (; i < n; ++i) destination[i] = to_float16(values[i]);
}

#endif

// Bytes of the last-level cache according to Linux; on a virtual machine sysconf often reports the whole host's.
int64_t last_level_cache() {
    long kibibytes = 0;
    for (const char* level : {"2", "3"}) {
        const std::string path = std::string("/sys/devices/system/cpu/cpu0/cache/index") + level + "/size";
        std::ifstream(path) >> kibibytes;  // "32768K"; a file that cannot be read leaves the previous level
    }
    return int64_t{kibibytes > 0 ? kibibytes : 32768} << 10;
}

// Bytes of cache that a call may use per core. A virtual machine with a few cores reports the whole cache of its
// processor. The third level of Intel's servers holds what the second evicts and lies behind a mesh: on Sapphire
// Rapids, streaming was faster from 2 MiB of traffic on (bench/, SD1.5: by an eighth, SDXL: by a quarter).
int64_t cache_of_a_core() {
#if defined(__x86_64__)
    if (__builtin_cpu_is("intel")) return int64_t{512} << 10;
#endif
    return int64_t{8} << 20;
}

// Traffic that a call may leave in the cache.
int64_t cached_traffic() {
    const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    return std::min(last_level_cache() / 2, cores * cache_of_a_core());
}

std::atomic<int64_t> most_traffic_in_cache{cached_traffic()};

}  // namespace

void read_halves(const uint16_t* source, int32_t dtype, int n, float* values) {
    if (dtype == kBFloat16) return dispatch<read_each<from_bfloat16>>(source, n, values);
#if defined(__x86_64__)
    if (instruction_set() >= kAvx2) return read_float16(source, n, values);
#endif
    read_each<from_float16>(source, n, values);
}

void write_halves(const float* values, int n, uint16_t* destination, int32_t dtype) {
    if (dtype == kBFloat16) return dispatch<write_each<to_bfloat16>>(values, n, destination);
#if defined(__x86_64__)
    if (instruction_set() >= kAvx2) return write_float16(values, n, destination);
#endif
    write_each<to_float16>(values, n, destination);
}

void expect_writes(Output& output, int64_t rows, int64_t numel, int64_t traffic) {
    if (output.data == nullptr) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(output.data);
#if defined(__x86_64__)
    constexpr int kLine = 64;
    const bool whole_lines = begin % kLine == 0 && numel % (kLine / sizeof(float)) == 0;
    output.streamed = output.dtype == kFloat32 && whole_lines && traffic > most_traffic_in_cache;
#endif
#if defined(__linux__)
    constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
    const uintptr_t end = begin + static_cast<uintptr_t>(bytes(output, rows * numel));
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    (void)begin, (void)rows, (void)numel, (void)traffic;
}

}  // namespace sqdf_fast

// Makes calls that move more than `bytes` write past the cache; negative: the default of this processor.
SQDF_FAST_EXPORT void sqdf_fast_limit_cached_traffic(int64_t bytes) {
    sqdf_fast::most_traffic_in_cache = bytes < 0 ? sqdf_fast::cached_traffic() : bytes;
}
