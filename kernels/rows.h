// How the elementwise ops walk a batch of rows: float32 blocks that stay in the L1 cache, fixed pieces, threads.
//
// A row is a sample of numel elements. Which of them form a piece and a block follows from numel alone, so that neither
// the batch nor the number of threads changes a bit of a row's result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sqdf_fast {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // kernels/native.py has the same numbers

constexpr int kBlock = 256;              // elements of a stream handled at once; more would not stay in the L1 cache
constexpr int kTile = 64;                // elements computed before their results are streamed: long bursts stall reads
constexpr int64_t kPiece = 32 * kBlock;  // elements that one thread takes at a time
constexpr int64_t kSerial = 4 * kPiece;  // elements of a batch up to which one thread computes it

struct Input {
    const void* data;
    int32_t dtype;
};

struct Output {
    void* data;  // null: not wanted
    int32_t dtype;
    bool streamed = false;  // written past the cache; every row begins and ends at a cache line
};

inline int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Bytes of `count` elements of an input or output; none where there is no tensor.
template <typename Tensor>
int64_t bytes(const Tensor& tensor, int64_t count) {
    return tensor.data == nullptr ? 0 : count * element_size(tensor.dtype);
}

// Classifier-free guidance, m_uncond + g (m_cond - m_uncond).
struct Guidance {
    bool on;                  // two rows per sample, all unconditional ones first; one for g = 1
    float scale, complement;  // g, 1 - g

    int64_t rows(int64_t batch) const { return on ? 2 * batch : batch; }
};

inline Guidance guidance(double scale) {
    return {scale != 1, static_cast<float>(scale), static_cast<float>(1 - scale)};
}

// n values of a half precision to float32 and back, rounded to nearest, ties to even.
void read_halves(const uint16_t* source, int32_t dtype, int n, float* values);
void write_halves(const float* values, int n, uint16_t* destination, int32_t dtype);

// Prefetches the block after the one at `at`: a processor does not track six streams by itself.
SQDF_FAST_INLINE void prefetch_next(const Input& input, int64_t at) {
    constexpr int64_t kLine = 64;
    const int64_t size = kBlock * element_size(input.dtype);
    const char* next = static_cast<const char*>(input.data) + at * element_size(input.dtype) + size;
    for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(next + i);  // harmless past the end
}

// The float32 values of n <= kBlock elements from `at` on: in place, or converted into `scratch`.
SQDF_FAST_INLINE const float* load(const Input& input, int64_t at, int n, float* scratch) {
    prefetch_next(input, at);
    if (input.dtype == kFloat32) return static_cast<const float*>(input.data) + at;
    read_halves(static_cast<const uint16_t*>(input.data) + at, input.dtype, n, scratch);
    return scratch;
}

// Where to write the float32 results from `at` on, before `stream` and `store`: to the output, or into `scratch`.
SQDF_FAST_INLINE float* place(const Output& output, int64_t at, float* scratch) {
    const bool direct = output.data != nullptr && output.dtype == kFloat32 && !output.streamed;
    return direct ? static_cast<float*>(output.data) + at : scratch;
}

// Writes n results of a streamed output past the cache: a store that does not fetch the line first saves a third of an
// output's traffic.
SQDF_FAST_INLINE void stream(const Output& output, int64_t at, int n, const float* values) {
    if (!output.streamed) return;
#if defined(__x86_64__)
    float* destination = static_cast<float*>(output.data) + at;
    for (int i = 0; i < n; i += 4) _mm_stream_ps(destination + i, _mm_load_ps(values + i));
#else
    (void)at, (void)n, (void)values;
#endif
}

// Writes n results of a half-precision output.
SQDF_FAST_INLINE void store(const Output& output, int64_t at, int n, const float* values) {
    if (output.data == nullptr || output.dtype == kFloat32) return;
    write_halves(values, n, static_cast<uint16_t*>(output.data) + at, output.dtype);
}

// Calls tile(first, count) for a block of n elements; the count of a full tile is known to the compiler.
template <typename Tile>
SQDF_FAST_INLINE void for_each_tile(int n, Tile tile) {
    int first = 0;
    for (; first + kTile <= n; first += kTile) tile(first, kTile);
    if (first < n) tile(first, n - first);
}

// Prepares an output of `rows` rows for a call that writes all of it and moves `traffic` bytes in all: huge pages for
// large outputs, since mapping a new output in pages of 4 KiB takes several times as long as the op; streaming where
// the cache could not hold it.
void expect_writes(Output& output, int64_t rows, int64_t numel, int64_t traffic);

SQDF_FAST_INLINE int64_t pieces_of(int64_t numel) { return (numel + kPiece - 1) / kPiece; }

// Calls piece(row, number, begin, end) for every piece of every row, on several threads; `streamed`: pieces stream.
template <typename Piece>
void for_each_piece(int64_t batch, int64_t numel, int32_t threads, Piece piece, bool streamed = false) {
    const int64_t pieces = pieces_of(numel);
#pragma omp parallel num_threads(threads) if (batch * numel > kSerial)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < batch * pieces; ++i) {
            const int64_t number = i % pieces, begin = number * kPiece;
            piece(i / pieces, number, begin, std::min(begin + kPiece, numel));
        }
#if defined(__x86_64__)
        if (streamed) _mm_sfence();  // nothing else orders streamed stores
#endif
    }
    (void)threads, (void)streamed;
}

// A table of coefficients, float32 [steps, columns]; a negative index counts from the end, as in PyTorch.
struct Table {
    const float* data;
    int64_t steps, columns;

    bool has(const int64_t* index, int64_t batch) const {
        return std::all_of(index, index + batch, [this](int64_t i) { return -steps <= i && i < steps; });
    }
    const float* row(int64_t index) const { return data + (index < 0 ? index + steps : index) * columns; }
};

}  // namespace sqdf_fast
