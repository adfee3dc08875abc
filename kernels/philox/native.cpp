// Whole rows of Philox words and normals; the op's Python side is kernels/philox/__init__.py.
#include "philox/philox.h"
#include "rows.h"

namespace {

using namespace sqdf_fast;

SQDF_FAST_INLINE void words_piece(int64_t seed, int64_t begin, int64_t end, uint32_t* row) {
    uint32_t words[4][kPhiloxCounters], block[kPhiloxBlock];
    for (int64_t at = begin; at < end; at += kPhiloxBlock) {
        philox_block(seed, static_cast<uint32_t>(at / 4), words);
        for (int i = 0; i < kPhiloxBlock; ++i) block[i] = words[i % 4][i / 4];
        std::memcpy(row + at, block, sizeof(uint32_t) * std::min<int64_t>(kPhiloxBlock, end - at));
    }
}

SQDF_FAST_INLINE void normal_piece(int64_t seed, int64_t begin, int64_t end, float* row) {
    float block[kPhiloxBlock];
    for (int64_t at = begin; at < end; at += kPhiloxBlock) {
        normal_block(seed, static_cast<uint32_t>(at / 4), block);
        std::memcpy(row + at, block, sizeof(float) * std::min<int64_t>(kPhiloxBlock, end - at));
    }
}

}  // namespace

// out: [batch, numel] uint32.
SQDF_FAST_EXPORT void sqdf_fast_philox_words(
    const int64_t* seed, int64_t batch, int64_t numel, uint32_t* out, int32_t threads) {
    for_each_piece(batch, numel, threads, [=](int64_t row, int64_t, int64_t begin, int64_t end) {
        dispatch<words_piece>(seed[row], begin, end, out + row * numel);
    });
}

// out: [batch, numel] float32.
SQDF_FAST_EXPORT void sqdf_fast_philox_normal(
    const int64_t* seed, int64_t batch, int64_t numel, float* out, int32_t threads) {
    for_each_piece(batch, numel, threads, [=](int64_t row, int64_t, int64_t begin, int64_t end) {
        dispatch<normal_piece>(seed[row], begin, end, out + row * numel);
    });
}
