// AdamW on the CPU with 8-bit or 32-bit moments, and the sum of squares of many gradients; the op's Python side is
// kernels/adamw_8bit/native.py, its meaning kernels/adamw_8bit/reference.py.
//
// Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022.
#include <cfloat>
#include <cstring>
#include <vector>

#include "philox/philox.h"
#include "rows.h"

namespace {

using namespace sqdf_fast;

constexpr int kZeroCode = 127;  // of the signed map: 127 negative values lie below it, 128 positive ones above
static_assert(kBlock == 256, "a block of quantized moments has one scale and is handled at once");
static_assert(kBlock == kPhiloxBlock && kPiece % (2 * kBlock) == 0, "a Philox block rounds two blocks");

// In the order of maps.py.
struct Coefficients {
    float gradient_scale, beta1, complement1, beta2, complement2, root, eps, step_size, decay;
};

// A map and how the nearest of its magnitudes is found. An entry of `lookup` covers all floats that share their upper
// half word: its upper half is the number of the magnitude nearest to the lowest of them, its lower half the lower half
// word after which the next magnitude is nearer.
struct Map {
    const int32_t* values;  // [256], the bits of float32
    const int32_t* lookup;
    int32_t first, cells;  // upper half word of the first entry; entries
};

struct Step {
    void* parameter;
    int32_t parameter_dtype;
    Input gradient;
    void *state1, *state2;     // codes where there is an absmax, else moments in float32
    float *absmax1, *absmax2;  // of every block, or null
    Map map1, map2;
    Coefficients coefficients;
    int64_t seed, numel;
};

// found[i] = table[indices[i]]. Compilers extract vector elements one by one here; gathers are twice as fast.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) void look_up_avx512(
    const int32_t* table, const int32_t* indices, int n, int32_t* found) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i index = _mm512_loadu_si512(indices + i);
        // The mask selects every lane: for the unmasked form GCC 12 warns about its own header.
        const __m512i values = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, index, table, 4);
        _mm512_storeu_si512(found + i, values);
    }
    for (; i < n; ++i) found[i] = table[indices[i]];
}

__attribute__((target("avx2"))) void look_up_avx2(
    const int32_t* table, const int32_t* indices, int n, int32_t* found) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + i), _mm256_i32gather_epi32(table, index, 4));
    }
    for (; i < n; ++i) found[i] = table[indices[i]];
}
#endif

void look_up(const int32_t* table, const int32_t* indices, int n, int32_t* found) {
#if defined(__x86_64__)
    if (instruction_set() == kAvx512) return look_up_avx512(table, indices, n, found);
    if (instruction_set() == kAvx2) return look_up_avx2(table, indices, n, found);
#endif
    for (int i = 0; i < n; ++i) found[i] = table[indices[i]];
}

SQDF_FAST_INLINE void dequantize(
    const uint8_t* __restrict codes, const Map& map, float scale, int n, float* __restrict moments) {
    alignas(64) int32_t indices[kBlock], values[kBlock];
#pragma omp simd
    for (int i = 0; i < n; ++i) indices[i] = codes[i];
    look_up(map.values, indices, n, values);
#pragma omp simd
    for (int i = 0; i < n; ++i) moments[i] = as<float>(values[i]) * scale;
}

// The scale of a block: its largest magnitude, 0 where the reciprocal would overflow. As integers magnitudes have the
// order of the floats, and a NaN is the largest.
SQDF_FAST_INLINE float largest(const float* moments, int n) {
    int32_t bits = 0;
#pragma omp simd reduction(max : bits)
    for (int i = 0; i < n; ++i) {
        const int32_t magnitude = as<int32_t>(moments[i]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    const float found = as<float>(bits);
    return found < FLT_MIN ? 0.0f : found;
}

template <bool has_sign>
SQDF_FAST_INLINE float quantize(const float* __restrict moments, const Map& map, int n, uint8_t* __restrict codes) {
    const float scale = largest(moments, n), reciprocal = scale == 0 ? 0.0f : 1.0f / scale;
    const int32_t first = map.first, last = map.cells - 1;
    alignas(64) int32_t scaled[kBlock], indices[kBlock], entries[kBlock];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        scaled[i] = as<int32_t>(moments[i] * reciprocal);
        int32_t cell = ((scaled[i] & 0x7fffffff) >> 16) - first;
        cell = cell < 0 ? 0 : cell;
        indices[i] = cell > last ? last : cell;
    }
    look_up(map.lookup, indices, n, entries);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const int32_t nearer = (scaled[i] & 0xffff) > (entries[i] & 0xffff) ? 1 : 0;
        int32_t level = (entries[i] >> 16) + nearer;
        if (!has_sign) level = level == 0 && scaled[i] != 0 ? 1 : level;
        const int32_t below = kZeroCode - (level > kZeroCode ? kZeroCode : level);
        codes[i] = static_cast<uint8_t>(!has_sign ? level : scaled[i] < 0 ? below : kZeroCode + level);
    }
    return scale;
}

SQDF_FAST_INLINE void update(
    const Coefficients& given, int n, const float* __restrict gradient, float* __restrict moments1,
    float* __restrict moments2, float* __restrict parameter) {
    const Coefficients c = given;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const float g = c.gradient_scale * gradient[i];
        const float first = c.beta1 * moments1[i] + c.complement1 * g;
        const float second = c.beta2 * moments2[i] + c.complement2 * (g * g);
        moments1[i] = first;
        moments2[i] = second;
        parameter[i] = c.decay * parameter[i] - c.step_size * (first / (c.root * __builtin_sqrtf(second) + c.eps));
    }
}

// Rounds to one of the two bfloat16 neighbors, the nearer with the higher probability: 16 random bits may carry.
SQDF_FAST_INLINE void round_stochastically(
    const float* __restrict values, const uint32_t* __restrict words, int shift, int n, uint16_t* __restrict rounded) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = as<uint32_t>(values[i]);
        const uint32_t carried = (bits + ((words[i] >> shift) & 0xffffu)) >> 16;
        rounded[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : carried);
    }
}

SQDF_FAST_INLINE void step_piece(const Step& op, int64_t begin, int64_t end) {
    alignas(64) float gradients[kBlock], parameters[kBlock], first[kBlock], second[kBlock];
    uint32_t drawn[4][kPhiloxCounters], words[kBlock];
    const bool full = op.parameter_dtype == kFloat32, quantized = op.absmax1 != nullptr;
    for (int64_t at = begin; at < end; at += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
        const int64_t block = at / kBlock;
        const float* gradient = load(op.gradient, at, n, gradients);
        uint8_t *codes1 = static_cast<uint8_t*>(op.state1) + at, *codes2 = static_cast<uint8_t*>(op.state2) + at;
        float* moments1 = quantized ? first : static_cast<float*>(op.state1) + at;
        float* moments2 = quantized ? second : static_cast<float*>(op.state2) + at;
        if (quantized) {
            dequantize(codes1, op.map1, op.absmax1[block], n, moments1);
            dequantize(codes2, op.map2, op.absmax2[block], n, moments2);
        }
        uint16_t* halves = full ? nullptr : static_cast<uint16_t*>(op.parameter) + at;
        float* parameter = full ? static_cast<float*>(op.parameter) + at : parameters;
        if (!full) read_halves(halves, kBFloat16, n, parameters);
        update(op.coefficients, n, gradient, moments1, moments2, parameter);
        if (quantized) {
            op.absmax1[block] = quantize<true>(moments1, op.map1, n, codes1);
            op.absmax2[block] = quantize<false>(moments2, op.map2, n, codes2);
        }
        if (full) continue;
        if (block % 2 == 0) {  // two blocks share the words of a Philox block, half a word per element
            philox_block(op.seed, static_cast<uint32_t>(block / 2 * kPhiloxCounters), drawn);
            std::memcpy(words, drawn, sizeof words);
        }
        round_stochastically(parameters, words, block % 2 == 0 ? 0 : 16, n, halves);
    }
}

SQDF_FAST_INLINE double squares_of_piece(const Input& input, int64_t begin, int64_t end) {
    constexpr int kLanes = 16;
    alignas(64) float scratch[kBlock];
    double lanes[kLanes] = {}, sum = 0;
    for (int64_t at = begin; at < end; at += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
        const float* values = load(input, at, n, scratch);
        int i = 0;
        for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
            for (int lane = 0; lane < kLanes; ++lane) {
                const double value = values[i + lane];
                lanes[lane] += value * value;
            }
        }
        for (; i < n; ++i) {
            const double value = values[i];
            lanes[i % kLanes] += value * value;
        }
    }
    for (double lane : lanes) sum += lane;
    return sum;
}

}  // namespace

// One step of one tensor of numel elements. parameter: float32 or bfloat16, the latter rounded stochastically with the
// words of `seed`. state: uint8 [numel] with absmax float32 [ceil(numel / 256)], or float32 [numel] with null. values:
// the bits of float32 [256]; lookup: int32 [cells], the entry for upper half words up to `first` first. coefficients:
// those of the struct.
SQDF_FAST_EXPORT void sqdf_fast_adamw(
    void* parameter, int32_t parameter_dtype, const void* gradient, int32_t gradient_dtype, void* state1, void* state2,
    float* absmax1, float* absmax2, const int32_t* values1, const int32_t* lookup1, const int32_t* values2,
    const int32_t* lookup2, int32_t first, int32_t cells, const float* coefficients, int64_t seed, int64_t numel,
    int32_t threads) {
    Step op{parameter, parameter_dtype, {gradient, gradient_dtype}, state1, state2, absmax1, absmax2,
            {values1, lookup1, first, cells}, {values2, lookup2, first, cells}, {}, seed, numel};
    std::memcpy(&op.coefficients, coefficients, sizeof op.coefficients);
    for_each_piece(1, numel, threads, [&op](int64_t, int64_t, int64_t begin, int64_t end) {
        dispatch<step_piece>(op, begin, end);
    });
}

// The sum of squares of all elements of `count` tensors, in float64; the same bits whatever the number of threads.
SQDF_FAST_EXPORT double sqdf_fast_sum_of_squares(
    const int64_t* addresses, const int64_t* dtypes, const int64_t* numels, int64_t count, int32_t threads) {
    struct Piece {
        Input input;
        int64_t begin, end;
    };
    std::vector<Piece> pieces;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Input input{reinterpret_cast<const void*>(addresses[i]), static_cast<int32_t>(dtypes[i])};
        for (int64_t begin = 0; begin < numels[i]; begin += kPiece) {
            pieces.push_back({input, begin, std::min(begin + kPiece, numels[i])});
        }
        elements += numels[i];
    }
    std::vector<double> sums(pieces.size());
    const int64_t number = static_cast<int64_t>(pieces.size());
#pragma omp parallel for schedule(static) num_threads(threads) if (elements > kSerial)
    for (int64_t i = 0; i < number; ++i) {
        sums[i] = dispatch<squares_of_piece>(pieces[i].input, pieces[i].begin, pieces[i].end);
    }
    double total = 0;
    for (double sum : sums) total += sum;
    (void)threads, (void)elements;
    return total;
}
