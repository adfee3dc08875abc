// Philox-4x32-10 and its normals, in blocks that a compiler turns into vector code.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counter is (counter, 0, 0, 0)
// and the key the two halves of the sample's seed, which is what Triton's randn4x(seed, offset) draws.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

namespace sqdf_fast {

constexpr int kPhiloxCounters = 64;                // counters a block
constexpr int kPhiloxBlock = 4 * kPhiloxCounters;  // elements a block

// words[lane][i] is lane `lane` of counter `first + i` (modulo 2^32).
SQDF_FAST_INLINE void philox_block(int64_t seed, uint32_t first, uint32_t words[4][kPhiloxCounters]) {
    constexpr uint64_t kWord = 0xffffffff;
    const uint64_t low = static_cast<uint64_t>(seed) & kWord, high = static_cast<uint64_t>(seed) >> 32;
    for (int i = 0; i < kPhiloxCounters; ++i) {
        // Words are kept in 64 bits, with leftovers in the upper half, so that all vectors have one element type.
        uint64_t c0 = first + static_cast<uint32_t>(i), c1 = 0, c2 = 0, c3 = 0, key0 = low, key1 = high;
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t product0 = 0xD2511F53u * (c0 & kWord);
            const uint64_t product2 = 0xCD9E8D57u * (c2 & kWord);
            c0 = (product2 >> 32) ^ c1 ^ key0;
            c2 = (product0 >> 32) ^ c3 ^ key1;
            c1 = product2;
            c3 = product0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words[0][i] = static_cast<uint32_t>(c0);
        words[1][i] = static_cast<uint32_t>(c1);
        words[2][i] = static_cast<uint32_t>(c2);
        words[3][i] = static_cast<uint32_t>(c3);
    }
}

// A word read as int32, folded to its non-negative half and scaled into [0, 1).
SQDF_FAST_INLINE float uniform(uint32_t word) {
    const int32_t value = static_cast<int32_t>(word);
    return static_cast<float>(value ^ (value >> 31)) * 4.6566127342e-10f;
}

// Natural logarithm of a normal positive float: u = m 2^e, m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m-1)/(m+1)).
SQDF_FAST_INLINE float log_positive(float u) {
    constexpr int32_t kSqrtHalf = 0x3f3504f3, kOne = 0x3f800000, kMantissa = 0x007fffff;
    const int32_t bits = as<int32_t>(u) + (kOne - kSqrtHalf);
    const float exponent = static_cast<float>((bits >> 23) - 127);
    const float f = as<float>((bits & kMantissa) + kSqrtHalf) - 1.0f;
    const float s = f / (2.0f + f);
    const float z = s * s;
    const float tail = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
    // 0.693359375 has few enough bits for an exact product with the exponent; the rest of log 2 follows.
    return exponent * 0.693359375f + (2.0f * s + (s * tail + exponent * -2.12194440e-4f));
}

// Box-Muller on one pair of words: cosine first, sine second.
SQDF_FAST_INLINE void box_muller(uint32_t word1, uint32_t word2, float* cosine, float* sine) {
    const float u1 = uniform(word1);
    // The builtin: a call of libc++'s std::sqrt keeps clang from vectorizing.
    const float radius = __builtin_sqrtf(-2.0f * log_positive(u1 < 1e-7f ? 1e-7f : u1));
    const float angle = 6.2831853f * uniform(word2);
    const int32_t quadrant = static_cast<int32_t>(angle * 0.63661977f + 0.5f);
    const float turns = static_cast<float>(quadrant);
    // pi/2 in three parts, the first two exact when multiplied by a quadrant number.
    const float y = ((angle - turns * 1.5703125f) - turns * 4.83751296997e-4f) - turns * 7.54978995489e-8f;
    const float z = y * y;
    const float s = y + y * z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))));
    const float c =
        1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
    const float unsigned_cosine = (quadrant & 1) ? s : c;
    const float unsigned_sine = (quadrant & 1) ? c : s;
    *cosine = radius * (((quadrant + 1) & 2) ? -unsigned_cosine : unsigned_cosine);
    *sine = radius * ((quadrant & 2) ? -unsigned_sine : unsigned_sine);
}

// The standard normals of elements 4 * first .. 4 * first + 255 of a sample.
SQDF_FAST_INLINE void normal_block(int64_t seed, uint32_t first, float normals[kPhiloxBlock]) {
    uint32_t words[4][kPhiloxCounters];
    philox_block(seed, first, words);
    for (int i = 0; i < kPhiloxCounters; ++i) {
        box_muller(words[0][i], words[1][i], normals + 4 * i, normals + 4 * i + 1);
        box_muller(words[2][i], words[3][i], normals + 4 * i + 2, normals + 4 * i + 3);
    }
}

}  // namespace sqdf_fast
