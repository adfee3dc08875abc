"""What CPU kernels allocate inside, against the profiler."""

from __future__ import annotations

import pytest
import torch

from sqdf_fast.kernels.adamw_8bit import Coefficients, adamw_32bit, reference
from sqdf_fast.kernels.adamw_8bit.maps import Step
from sqdf_fast.plan import workspace
from sqdf_fast.plan.memory import MemoryCount

aten = torch.ops.aten


def predicted_and_real(op, arguments, allocated_peak):
    def call():
        return op(*arguments)

    result = call()
    tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    outputs = sum(t.untyped_storage().nbytes() for t in tensors)
    del result, tensors
    return outputs + workspace.on_cpu(op.default, arguments), allocated_peak(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys", "width"), [(256, 256, 16), (64, 77, 16), (1024, 1024, 40)])
def test_flash_attention(queries, keys, width, dtype, allocated_peak):
    q, k = torch.randn(2, 4, queries, width, dtype=dtype), torch.randn(2, 4, keys, width, dtype=dtype)
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    predicted, real = predicted_and_real(forward, (q, k, k), allocated_peak)
    assert predicted == real
    output, statistics = forward(q, k, k)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    arguments = torch.randn_like(output).contiguous(), q, k, k, output, statistics, 0.0, False
    predicted, real = predicted_and_real(backward, arguments, allocated_peak)
    assert predicted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "size", "kernel"), [(2, 16, 3), (1, 16, 3), (4, 16, 3), (2, 64, 3)])
def test_convolution(batch, size, kernel, dtype, allocated_peak):
    x, weight = torch.randn(batch, 32, size, size, dtype=dtype), torch.randn(64, 32, kernel, kernel, dtype=dtype)
    pad = kernel // 2
    arguments = x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1
    predicted, real = predicted_and_real(aten.convolution, arguments, allocated_peak)
    assert predicted == pytest.approx(real, rel=0.02)
    grad = torch.randn(batch, 64, size, size, dtype=dtype)
    arguments = grad, x, weight, [64], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, False, False]
    predicted, real = predicted_and_real(aten.convolution_backward, arguments, allocated_peak)
    assert predicted == pytest.approx(real, rel=0.02)


def test_cuda_flash_attention_accumulates_query_gradients_in_float32():
    grad = torch.empty(2, 8, 4096, 64, dtype=torch.bfloat16, device="meta")
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert workspace.on_cuda(op, (grad, grad)) == 4 * 2 * 8 * 4096 * (64 + 1)


def test_a_cuda_step_of_adamw_on_bfloat16_holds_what_the_reference_makes():
    elements = 2**18
    parameter, gradient = torch.randn(2, elements, dtype=torch.bfloat16)
    states = torch.zeros(elements), torch.zeros(elements)
    coefficients = Coefficients.of(1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)
    with MemoryCount() as count:
        count.register([parameter, gradient, *states], "weights")
        before = count.live_bytes
        reference.update(Step(parameter, gradient, *states, None, None, coefficients, 1))
    op = torch.ops.sqdf_fast.adamw.default
    assert workspace.on_cuda(op, (parameter, gradient, *states)) == count.peak_bytes - before
    with MemoryCount() as count:
        # Parameter and gradient in float32, as bitsandbytes' step of a bfloat16 parameter makes them.
        wide, wide_gradient = parameter.float(), gradient.float()
        reference.round_stochastically(wide, 1)
        del wide_gradient
    codes = torch.zeros(2, elements, dtype=torch.uint8)
    assert workspace.on_cuda(op, (parameter, gradient, *codes)) == count.peak_bytes
    for moments in (states, codes):
        assert workspace.on_cuda(op, (wide, gradient, *moments)) == 0
        assert workspace.on_cpu(op, (parameter, gradient, *moments)) == 0


def test_what_an_operator_without_outputs_holds_is_counted():
    parameter = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    states = torch.empty(2, 1000, device="meta")
    with MemoryCount("meta", workspace=workspace.on_cuda) as count:
        adamw_32bit(parameter, parameter, *states, Coefficients.of(1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0))
    assert count.peak_bytes == 32 * 1000


def test_other_operators_have_none():
    assert workspace.on_cpu(aten.mm.default, (torch.zeros(2, 2), torch.zeros(2, 2))) == 0
    assert workspace.on_cuda(aten.mm.default, (torch.zeros(2, 2), torch.zeros(2, 2))) == 0
