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

// Bytes of `count` elements of an input or output; 0 without a tensor.
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

// The results of a block on their way to an output from `at` on; where they are computed: in place or in `scratch`.
struct Block {
    const Output& output;
    int64_t at;
    float* values;

    SQDF_FAST_INLINED Block(const Output& output, int64_t at, float* scratch) : output(output), at(at) {
        const bool in_place = output.data != nullptr && output.dtype == kFloat32 && !output.streamed;
        values = in_place ? static_cast<float*>(output.data) + at : scratch;
    }
};

// Writes results of a streamed output past the cache: a store that does not fetch the line first saves a third of an
// output's traffic.
SQDF_FAST_INLINE void stream(const Block& block, int first, int count) {
    if (!block.output.streamed) return;
#if defined(__x86_64__)
    float* destination = static_cast<float*>(block.output.data) + block.at;
    for (int i = first; i < first + count; i += 4) _mm_stream_ps(destination + i, _mm_load_ps(block.values + i));
#else
    (void)first, (void)count;
#endif
}

// Writes the n results of a half-precision output.
SQDF_FAST_INLINE void store(const Block& block, int n) {
    const Output& output = block.output;
    if (output.data == nullptr || output.dtype == kFloat32) return;
    write_halves(block.values, n, static_cast<uint16_t*>(output.data) + block.at, output.dtype);
}

// Computes n elements, formula(i) the values of element i in every block, and writes the blocks to their outputs.
template <typename Formula, typename... Blocks>
SQDF_FAST_INLINE void compute(int n, Formula formula, const Blocks&... blocks) {
    const auto tile = [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
        for (int i = first; i < first + count; ++i) formula(i);
        (stream(blocks, first, count), ...);
    };
    int first = 0;
    for (; first + kTile <= n; first += kTile) tile(first, kTile);  // a count that the compiler knows
    if (first < n) tile(first, n - first);
    (store(blocks, n), ...);
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

// The gradients of an op that is affine in x and in the guided network output.
struct Gradients {
    Input grad, delta;  // of the result; what else `mean` reads, or null
    Output grad_x, grad_output;
    Guidance guidance;
    int64_t batch, numel;

    // Prepares the outputs; returns whether they are streamed.
    bool expect() {
        const int64_t count = batch * numel, rows = guidance.rows(batch);
        const int64_t traffic =
            bytes(grad, count) + bytes(delta, count) + bytes(grad_x, count) + bytes(grad_output, rows * numel);
        expect_writes(grad_x, batch, numel, traffic);
        expect_writes(grad_output, rows, numel, traffic);
        return grad_x.streamed || grad_output.streamed;
    }
};

// Writes one piece of grad_x = scale_x grad, and of grad_output from the gradient mean(grad, delta) of the guided output.
template <typename Mean>
SQDF_FAST_INLINE void gradient_piece(
    const Gradients& op, float scale_x, int64_t row, int64_t begin, int64_t end, Mean mean) {
    alignas(64) float scratch[5][kBlock];
    const float g = op.guidance.scale, complement = op.guidance.complement;
    for (int64_t in_row = begin; in_row < end; in_row += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - in_row));
        const int64_t at = row * op.numel + in_row, conditional = at + op.batch * op.numel;
        const float* grad = load(op.grad, at, n, scratch[0]);
        if (op.grad_x.data != nullptr) {
            const Block to_x(op.grad_x, at, scratch[1]);
            float* __restrict grad_x = to_x.values;
            compute(n, [&](int i) SQDF_FAST_INLINED { grad_x[i] = scale_x * grad[i]; }, to_x);
        }
        if (op.grad_output.data == nullptr) continue;
        const float* delta = op.delta.data != nullptr ? load(op.delta, at, n, scratch[2]) : grad;
        const Block to_output(op.grad_output, at, scratch[3]);
        float* __restrict grad_output = to_output.values;
        if (op.guidance.on) {
            const Block to_cond(op.grad_output, conditional, scratch[4]);
            float* __restrict grad_cond = to_cond.values;
            const auto halves = [&](int i) SQDF_FAST_INLINED {
                const float both = mean(grad[i], delta[i]);
                grad_output[i] = complement * both;
                grad_cond[i] = g * both;
            };
            compute(n, halves, to_output, to_cond);
        } else {
            compute(n, [&](int i) SQDF_FAST_INLINED { grad_output[i] = mean(grad[i], delta[i]); }, to_output);
        }
    }
}

}  // namespace sqdf_fast
