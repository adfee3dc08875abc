// Whole rows of Philox words and normals; the op's Python side is kernels/philox/__init__.py.
#include "philox/philox.h"

#include <algorithm>

namespace {

using sqdf_fast::kPhiloxBlock;

constexpr int64_t kPiece = 64 * kPhiloxBlock;  // elements that one thread takes at a time

SQDF_FAST_CLONES void words_piece(int64_t seed, int64_t begin, int64_t end, uint32_t* row) {
    uint32_t block[kPhiloxBlock];
    for (int64_t at = begin; at < end; at += kPhiloxBlock) {
        sqdf_fast::philox_block(seed, static_cast<uint32_t>(at / 4), block);
        std::memcpy(row + at, block, sizeof(uint32_t) * std::min<int64_t>(kPhiloxBlock, end - at));
    }
}

SQDF_FAST_CLONES void normal_piece(int64_t seed, int64_t begin, int64_t end, float* row) {
    float block[kPhiloxBlock];
    for (int64_t at = begin; at < end; at += kPhiloxBlock) {
        sqdf_fast::normal_block(seed, static_cast<uint32_t>(at / 4), block);
        std::memcpy(row + at, block, sizeof(float) * std::min<int64_t>(kPhiloxBlock, end - at));
    }
}

// Splits batch rows of numel elements into pieces and hands them to the threads.
template <typename Element, typename Piece>
void fill(const int64_t* seed, int64_t batch, int64_t numel, Element* out, int32_t threads, Piece piece) {
    const int64_t pieces = (numel + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static) if (batch * numel > kPiece)
    for (int64_t i = 0; i < batch * pieces; ++i) {
        const int64_t row = i / pieces, begin = i % pieces * kPiece;
        piece(seed[row], begin, std::min(begin + kPiece, numel), out + row * numel);
    }
    (void)threads;
}

}  // namespace

// out: [batch, numel] uint32.
SQDF_FAST_EXPORT void sqdf_fast_philox_words(const int64_t* seed, int64_t batch, int64_t numel, uint32_t* out,
                                             int32_t threads) {
    fill(seed, batch, numel, out, threads, words_piece);
}

// out: [batch, numel] float32.
SQDF_FAST_EXPORT void sqdf_fast_philox_normal(const int64_t* seed, int64_t batch, int64_t numel, float* out,
                                              int32_t threads) {
    fill(seed, batch, numel, out, threads, normal_piece);
}
