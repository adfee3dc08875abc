// The posterior mean, forward and backward; the op's Python side is kernels/posterior_mean/native.py.
#include "rows.h"

namespace {

using namespace sqdf_fast;

struct Forward {
    Input x, model_output;
    Output x0;
    Guidance guidance;
    int64_t batch, numel;
};

struct Backward {
    Input grad_x0;
    Output grad_x, grad_output;
    Guidance guidance;
    int64_t batch, numel;
};

SQDF_FAST_INLINE void mean_piece(const Forward& op, const float* posterior, int64_t row, int64_t begin, int64_t end) {
    alignas(64) float scratch[4][kBlock];
    const float a = posterior[0], b = posterior[1], g = op.guidance.scale;
    for (int64_t in_row = begin; in_row < end; in_row += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - in_row));
        const int64_t at = row * op.numel + in_row;
        float* __restrict x0 = place(op.x0, at, scratch[0]);
        const float* x = load(op.x, at, n, scratch[1]);
        if (b == 0) {
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) x0[i] = a * x[i];
                stream(op.x0, at + first, count, x0 + first);
            });
        } else if (op.guidance.on) {
            const float* m = load(op.model_output, at, n, scratch[2]);
            const float* conditional = load(op.model_output, at + op.batch * op.numel, n, scratch[3]);
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) {
                    x0[i] = a * x[i] + b * (m[i] + g * (conditional[i] - m[i]));
                }
                stream(op.x0, at + first, count, x0 + first);
            });
        } else {
            const float* m = load(op.model_output, at, n, scratch[2]);
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) x0[i] = a * x[i] + b * m[i];
                stream(op.x0, at + first, count, x0 + first);
            });
        }
        store(op.x0, at, n, x0);
    }
}

SQDF_FAST_INLINE void mean_gradient_piece(
    const Backward& op, const float* posterior, int64_t row, int64_t begin, int64_t end) {
    alignas(64) float scratch[4][kBlock];
    const float a = posterior[0], b = posterior[1], g = op.guidance.scale, complement = op.guidance.complement;
    for (int64_t in_row = begin; in_row < end; in_row += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - in_row));
        const int64_t at = row * op.numel + in_row, conditional = at + op.batch * op.numel;
        const float* grad = load(op.grad_x0, at, n, scratch[0]);
        if (op.grad_x.data != nullptr) {
            float* __restrict grad_x = place(op.grad_x, at, scratch[1]);
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) grad_x[i] = a * grad[i];
                stream(op.grad_x, at + first, count, grad_x + first);
            });
            store(op.grad_x, at, n, grad_x);
        }
        if (op.grad_output.data == nullptr) continue;
        float* __restrict grad_output = place(op.grad_output, at, scratch[2]);
        if (op.guidance.on) {
            float* __restrict grad_cond = place(op.grad_output, conditional, scratch[3]);
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) {
                    const float mean = b == 0 ? 0.0f : b * grad[i];  // 0 * inf
                    grad_output[i] = complement * mean;
                    grad_cond[i] = g * mean;
                }
                stream(op.grad_output, at + first, count, grad_output + first);
                stream(op.grad_output, conditional + first, count, grad_cond + first);
            });
            store(op.grad_output, conditional, n, grad_cond);
        } else {
            for_each_tile(n, [&](int first, int count) SQDF_FAST_INLINED {
#pragma omp simd
                for (int i = first; i < first + count; ++i) grad_output[i] = b == 0 ? 0.0f : b * grad[i];
                stream(op.grad_output, at + first, count, grad_output + first);
            });
        }
        store(op.grad_output, at, n, grad_output);
    }
}

}  // namespace

// Tensors are contiguous, dtypes numbers of sqdf_fast::Dtype. posterior: float32 [steps, 2]; index: [batch]. Returns 1
// if an index lies outside, else 0.
SQDF_FAST_EXPORT int32_t sqdf_fast_posterior_mean_forward(
    const void* x, int32_t x_dtype, const void* model_output, int32_t output_dtype, const float* posterior,
    int64_t steps, const int64_t* index, double guidance_scale, int64_t batch, int64_t numel, void* x0,
    int32_t x0_dtype, int32_t threads) {
    const Table table{posterior, steps, 2};
    if (!table.has(index, batch)) return 1;
    Forward op{{x, x_dtype}, {model_output, output_dtype}, {x0, x0_dtype}, guidance(guidance_scale), batch, numel};
    const int64_t count = batch * numel, guided = op.guidance.rows(batch) * numel;
    expect_writes(op.x0, batch, numel, bytes(op.x, count) + bytes(op.model_output, guided) + bytes(op.x0, count));
    const auto mean = [&](int64_t row, int64_t, int64_t begin, int64_t end) {
        dispatch<mean_piece>(op, table.row(index[row]), row, begin, end);
    };
    for_each_piece(batch, numel, threads, mean, op.x0.streamed);
    return 0;
}

// As above. A null grad_x or grad_output is not computed.
SQDF_FAST_EXPORT int32_t sqdf_fast_posterior_mean_backward(
    const void* grad_x0, int32_t grad_dtype, const float* posterior, int64_t steps, const int64_t* index,
    double guidance_scale, int64_t batch, int64_t numel, void* grad_x, int32_t x_dtype, void* grad_output,
    int32_t output_dtype, int32_t threads) {
    const Table table{posterior, steps, 2};
    if (!table.has(index, batch)) return 1;
    Backward op{{grad_x0, grad_dtype}, {grad_x, x_dtype}, {grad_output, output_dtype}, guidance(guidance_scale),
                batch, numel};
    const int64_t count = batch * numel, rows = op.guidance.rows(batch);
    const int64_t traffic = bytes(op.grad_x0, count) + bytes(op.grad_x, count) + bytes(op.grad_output, rows * numel);
    expect_writes(op.grad_x, batch, numel, traffic);
    expect_writes(op.grad_output, rows, numel, traffic);
    const auto gradient = [&](int64_t row, int64_t, int64_t begin, int64_t end) {
        dispatch<mean_gradient_piece>(op, table.row(index[row]), row, begin, end);
    };
    for_each_piece(batch, numel, threads, gradient, op.grad_x.streamed || op.grad_output.streamed);
    return 0;
}
