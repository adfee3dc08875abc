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

SQDF_FAST_INLINE void mean_piece(const Forward& op, const float* posterior, int64_t row, int64_t begin, int64_t end) {
    alignas(64) float scratch[4][kBlock];
    const float a = posterior[0], b = posterior[1], g = op.guidance.scale;
    for (int64_t in_row = begin; in_row < end; in_row += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - in_row));
        const int64_t at = row * op.numel + in_row;
        const Block to_x0(op.x0, at, scratch[0]);
        float* __restrict x0 = to_x0.values;
        const float* x = load(op.x, at, n, scratch[1]);
        if (b == 0) {
            compute(n, [&](int i) SQDF_FAST_INLINED { x0[i] = a * x[i]; }, to_x0);
            continue;
        }
        const float* m = load(op.model_output, at, n, scratch[2]);
        if (op.guidance.on) {
            const float* conditional = load(op.model_output, at + op.batch * op.numel, n, scratch[3]);
            const auto guided = [&](int i) SQDF_FAST_INLINED {
                x0[i] = a * x[i] + b * (m[i] + g * (conditional[i] - m[i]));
            };
            compute(n, guided, to_x0);
        } else {
            compute(n, [&](int i) SQDF_FAST_INLINED { x0[i] = a * x[i] + b * m[i]; }, to_x0);
        }
    }
}

SQDF_FAST_INLINE void mean_gradient_piece(
    const Gradients& op, const float* posterior, int64_t row, int64_t begin, int64_t end) {
    const float b = posterior[1];
    const auto mean = [=](float grad, float) SQDF_FAST_INLINED { return b == 0 ? 0.0f : b * grad; };  // 0 * inf
    gradient_piece(op, posterior[0], row, begin, end, mean);
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
    Gradients op{{grad_x0, grad_dtype}, {nullptr, 0}, {grad_x, x_dtype}, {grad_output, output_dtype},
                 guidance(guidance_scale), batch, numel};
    const bool streamed = op.expect();
    const auto gradient = [&](int64_t row, int64_t, int64_t begin, int64_t end) {
        dispatch<mean_gradient_piece>(op, table.row(index[row]), row, begin, end);
    };
    for_each_piece(batch, numel, threads, gradient, streamed);
    return 0;
}
