// One denoising step and its KL, forward and backward; the op's Python side is kernels/denoise_step/native.py.
#include <cmath>
#include <vector>

#include "philox/philox.h"
#include "rows.h"

namespace {

using namespace sqdf_fast;

static_assert(kBlock == kPhiloxBlock, "the noise of a block is drawn at once");

struct Forward {
    Input x, policy, reference, noise;  // noise.data null: drawn from seed
    const int64_t* seed;
    Output x_prev, delta;
    Guidance guidance;
    int64_t batch, numel;
};

// kl_scale q^2 / sigma^2; 0 where q = 0.
double kl_weight(const float* transition, double kl_scale) {
    const double q = transition[1], sigma = transition[2];
    return q == 0 ? 0.0 : kl_scale * (q / sigma) * (q / sigma);
}

SQDF_FAST_INLINE const float* draw(int64_t seed, int64_t at, float normals[kBlock]) {
    normal_block(seed, static_cast<uint32_t>(at / 4), normals);
    return normals;
}

SQDF_FAST_INLINE double sum_of(const float values[kBlock]) {
    constexpr int kLanes = 16;
    double lanes[kLanes] = {}, sum = 0;
    for (int i = 0; i < kBlock; i += kLanes) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
    }
    for (double lane : lanes) sum += lane;
    return sum;
}

// Writes x_prev and delta of one piece; returns the sum of delta^2.
SQDF_FAST_INLINE double step_piece(
    const Forward& op, const float* transition, int64_t row, int64_t begin, int64_t end) {
    alignas(64) float scratch[8][kBlock];
    alignas(64) float squares[kBlock] = {};
    const float p = transition[0], q = transition[1], sigma = transition[2], g = op.guidance.scale;
    for (int64_t in_row = begin; in_row < end; in_row += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - in_row));
        const int64_t at = row * op.numel + in_row, conditional = at + op.batch * op.numel;
        const Block to_x_prev(op.x_prev, at, scratch[0]), to_delta(op.delta, at, scratch[1]);
        float *__restrict x_prev = to_x_prev.values, *__restrict delta = to_delta.values;
        const float* x = load(op.x, at, n, scratch[2]);
        const float* z = op.noise.data != nullptr ? load(op.noise, at, n, scratch[3])
                                                  : draw(op.seed[row], in_row, scratch[3]);
        const float* policy = load(op.policy, at, n, scratch[4]);
        const float* reference = load(op.reference, at, n, scratch[5]);
        const auto write = [&](int i, float m, float difference) SQDF_FAST_INLINED {
            x_prev[i] = p * x[i] + q * m + sigma * z[i];
            delta[i] = difference;
            squares[i] += difference * difference;
        };
        if (op.guidance.on) {
            const float* policy_cond = load(op.policy, conditional, n, scratch[6]);
            const float* reference_cond = load(op.reference, conditional, n, scratch[7]);
            const auto guided = [&](int i) SQDF_FAST_INLINED {
                // Differences before guidance: those of nearby floats are exact.
                const float difference = policy[i] - reference[i];
                const float m = policy[i] + g * (policy_cond[i] - policy[i]);
                write(i, m, difference + g * ((policy_cond[i] - reference_cond[i]) - difference));
            };
            compute(n, guided, to_x_prev, to_delta);
        } else {
            const auto alone = [&](int i) SQDF_FAST_INLINED { write(i, policy[i], policy[i] - reference[i]); };
            compute(n, alone, to_x_prev, to_delta);
        }
    }
    return sum_of(squares);
}

// pull = d loss / d delta over delta.
SQDF_FAST_INLINE void step_gradient_piece(
    const Gradients& op, const float* transition, float pull, int64_t row, int64_t begin, int64_t end) {
    const float q = transition[1];
    const auto mean = [=](float grad, float delta) SQDF_FAST_INLINED {
        return q * grad + (delta == 0 ? 0.0f : pull * delta);  // 0 * inf
    };
    gradient_piece(op, transition[0], row, begin, end, mean);
}

}  // namespace

// Tensors are contiguous, dtypes numbers of sqdf_fast::Dtype. transition: float32 [steps, 3]; index: [batch]; exactly
// one of noise and seed [batch] is null; kl: float32 [batch]; delta may be null. Returns 1 if an index lies outside the
// table, else 0.
SQDF_FAST_EXPORT int32_t sqdf_fast_denoise_step_forward(
    const void* x, int32_t x_dtype, const void* policy, int32_t policy_dtype, const void* reference,
    int32_t reference_dtype, const void* noise, int32_t noise_dtype, const int64_t* seed, const float* transition,
    int64_t steps, const int64_t* index, double guidance_scale, double kl_scale, int64_t batch, int64_t numel,
    void* x_prev, float* kl, void* delta, int32_t threads) {
    const Table table{transition, steps, 3};
    if (!table.has(index, batch)) return 1;
    Forward op{{x, x_dtype}, {policy, policy_dtype}, {reference, reference_dtype}, {noise, noise_dtype}, seed,
               {x_prev, x_dtype}, {delta, policy_dtype}, guidance(guidance_scale), batch, numel};
    const int64_t count = batch * numel, guided = op.guidance.rows(batch) * numel;
    const int64_t traffic = bytes(op.x, count) + bytes(op.policy, guided) + bytes(op.reference, guided) +
                            bytes(op.noise, count) + bytes(op.x_prev, count) + bytes(op.delta, count);
    expect_writes(op.x_prev, batch, numel, traffic);
    expect_writes(op.delta, batch, numel, traffic);
    const int64_t pieces = pieces_of(numel);
    std::vector<double> sums(batch * pieces);
    const auto step = [&](int64_t row, int64_t number, int64_t begin, int64_t end) {
        sums[row * pieces + number] = dispatch<step_piece>(op, table.row(index[row]), row, begin, end);
    };
    for_each_piece(batch, numel, threads, step, op.x_prev.streamed || op.delta.streamed);
    for (int64_t row = 0; row < batch; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < pieces; ++i) sum += sums[row * pieces + i];
        // 0 * inf: equal outputs cost nothing even where sigma is 0
        kl[row] = sum == 0 ? 0.0f : static_cast<float>(kl_weight(table.row(index[row]), kl_scale) * (sum / numel));
    }
    return 0;
}

// As above; grad_kl: float32 [batch]. A null grad_x or grad_policy is not computed; delta is read for the latter alone.
SQDF_FAST_EXPORT int32_t sqdf_fast_denoise_step_backward(
    const void* grad_x_prev, int32_t grad_dtype, const float* grad_kl, const void* delta, int32_t delta_dtype,
    const float* transition, int64_t steps, const int64_t* index, double guidance_scale, double kl_scale, int64_t batch,
    int64_t numel, void* grad_x, int32_t x_dtype, void* grad_policy, int32_t policy_dtype, int32_t threads) {
    const Table table{transition, steps, 3};
    if (!table.has(index, batch)) return 1;
    Gradients op{{grad_x_prev, grad_dtype}, {delta, delta_dtype}, {grad_x, x_dtype}, {grad_policy, policy_dtype},
                 guidance(guidance_scale), batch, numel};
    const bool streamed = op.expect();
    const auto step = [&](int64_t row, int64_t, int64_t begin, int64_t end) {
        const float* coefficients = table.row(index[row]);
        // 0 * inf: where sigma is 0 and the KL is not part of the loss
        const double weight = grad_kl[row] == 0 ? 0.0 : grad_kl[row] * kl_weight(coefficients, kl_scale);
        const double pull = weight * 2 / static_cast<double>(numel);
        dispatch<step_gradient_piece>(op, coefficients, static_cast<float>(pull), row, begin, end);
    };
    for_each_piece(batch, numel, threads, step, streamed);
    return 0;
}
