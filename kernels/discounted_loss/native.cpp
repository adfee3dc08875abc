// The discounted loss and its gradients in one pass; the op's Python side is kernels/discounted_loss/native.py.
#include <cmath>

#include "native.h"

// reward, kl, grad_reward, grad_kl: float32 [count]; remaining: [count]; loss: one float32.
SQDF_FAST_EXPORT void sqdf_fast_discounted_loss(
    const float* reward, const float* kl, const int64_t* remaining, int64_t count, double gamma, double alpha,
    int32_t mask_nonpositive, double denominator, float* loss, float* grad_reward, float* grad_kl) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const bool masked = mask_nonpositive != 0 && reward[i] <= 0;
        const double weight = masked ? 0.0 : std::pow(gamma, static_cast<double>(remaining[i]));
        if (!masked) sum += alpha * kl[i] - weight * reward[i];
        grad_reward[i] = static_cast<float>(-weight / denominator);
        grad_kl[i] = masked ? 0.0f : static_cast<float>(alpha / denominator);
    }
    *loss = static_cast<float>(sum / denominator);
}
