// How the elementwise ops walk a batch of rows: float32 blocks that stay in the L1 cache, fixed pieces, threads.
//
// A row is a sample of numel elements. Which elements form a piece and a block follows from numel alone, so that neither
// the batch nor the number of threads changes a bit of a row's result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "native.h"

namespace sqdf_fast {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // kernels/native.py has the same numbers

constexpr int kBlock = 512;              // elements of a stream that are handled at once
constexpr int64_t kPiece = 16 * kBlock;  // elements that one thread takes at a time
constexpr int64_t kSerial = 4 * kPiece;  // a batch of at most so many elements is not worth waking threads for

struct Input {
    const void* data;
    int32_t dtype;
};

struct Output {
    void* data;  // null: not wanted
    int32_t dtype;
};

SQDF_FAST_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SQDF_FAST_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

SQDF_FAST_INLINE float from_bfloat16(uint16_t value) { return float_of(uint32_t{value} << 16); }

SQDF_FAST_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

SQDF_FAST_INLINE float from_float16(uint16_t value) {
    constexpr uint32_t kRebias = 112u << 23, kLargest = 31u << 23, kSmallestNormal = 113u << 23;
    const uint32_t magnitude = (value & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & kLargest;
    const uint32_t normal = magnitude + kRebias + (exponent == kLargest ? kRebias : 0);  // twice: infinity and NaN
    // A subnormal gets the exponent of 2^-14 and with it a leading one, which is taken off again.
    const uint32_t subnormal = bits_of(float_of(magnitude + kSmallestNormal) - float_of(kSmallestNormal));
    return float_of((exponent == 0 ? subnormal : normal) | (value & 0x8000u) << 16);
}

SQDF_FAST_INLINE uint16_t to_float16(float value) {
    constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23, kOverflow = 143u << 23, kInfinity = 255u << 23;
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1)) >> 13;  // to nearest, ties to even
    // Next to 1/2 a float's last bit is worth 2^-24, a subnormal's: the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
    return static_cast<uint16_t>((magnitude >= kOverflow ? special : finite) | ((bits >> 16) & 0x8000u));
}

// The float32 values of n elements from `at` on: in place, or converted into `scratch`.
SQDF_FAST_INLINE const float* load(const Input& input, int64_t at, int n, float* __restrict scratch) {
    if (input.dtype == kFloat32) return static_cast<const float*>(input.data) + at;
    const uint16_t* __restrict source = static_cast<const uint16_t*>(input.data) + at;
    if (input.dtype == kFloat16) {
#pragma omp simd
        for (int i = 0; i < n; ++i) scratch[i] = from_float16(source[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) scratch[i] = from_bfloat16(source[i]);
    }
    return scratch;
}

// Where the float32 results for `at` on go, before `store`: to their place, or into `scratch`.
SQDF_FAST_INLINE float* place(const Output& output, int64_t at, float* scratch) {
    return output.data != nullptr && output.dtype == kFloat32 ? static_cast<float*>(output.data) + at : scratch;
}

// Brings n results from `place` home.
SQDF_FAST_INLINE void store(const Output& output, int64_t at, int n, const float* __restrict values) {
    if (output.data == nullptr || output.dtype == kFloat32) return;
    uint16_t* __restrict home = static_cast<uint16_t*>(output.data) + at;
    if (output.dtype == kFloat16) {
#pragma omp simd
        for (int i = 0; i < n; ++i) home[i] = to_float16(values[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) home[i] = to_bfloat16(values[i]);
    }
}

SQDF_FAST_INLINE int64_t pieces_of(int64_t numel) { return (numel + kPiece - 1) / kPiece; }

// Calls piece(row, number, begin, end) for every piece of every row, on several threads.
template <typename Piece>
void for_each_piece(int64_t batch, int64_t numel, int32_t threads, Piece piece) {
    const int64_t pieces = pieces_of(numel);
#pragma omp parallel for num_threads(threads) schedule(static) if (batch * numel > kSerial)
    for (int64_t i = 0; i < batch * pieces; ++i) {
        const int64_t number = i % pieces, begin = number * kPiece;
        piece(i / pieces, number, begin, std::min(begin + kPiece, numel));
    }
    (void)threads;
}

// A table of coefficients, float32 [steps, columns]; an index counts from the end when it is negative, as in PyTorch.
struct Table {
    const float* data;
    int64_t steps, columns;

    bool has(const int64_t* index, int64_t batch) const {
        return std::all_of(index, index + batch, [this](int64_t i) { return -steps <= i && i < steps; });
    }
    const float* row(int64_t index) const { return data + (index < 0 ? index + steps : index) * columns; }
};

}  // namespace sqdf_fast
