"""Linear layers with the memory of bitsandbytes' quantised ones, for simulation: they compute nothing.

bitsandbytes' own layers do not run on fake tensors. These hold the same tensors, make the same temporaries in the same
order and keep the same ones for the backward pass; a test compares the bytes with the real layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64


class Nf4Linear(nn.Linear):
    """A stand-in for bitsandbytes.nn.Linear4bit(quant_type="nf4", compress_statistics=False), as diffusers makes it.

    Frozen, [N, K] packed: N K / 2 bytes of numbers, a float32 scale a block of 64 and the code book.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        device, numbers = linear.weight.device, linear.weight.numel()
        self.bias = linear.bias
        self.weight = nn.Parameter(
            torch.empty((numbers + 1) // 2, 1, dtype=torch.uint8, device=device), requires_grad=False
        )
        self.register_buffer("scales", torch.empty(-(-numbers // BLOCK), device=device, dtype=torch.float32))
        self.register_buffer("code", torch.empty(16, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return nn.functional.linear(x, self.dequantised(x.dtype), self.bias)
        result: Tensor = _Nf4Product.apply(x, self)
        return result

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """A tensor [N, K] without meaningful values."""
        # Read and written by an operator, so that the bytes moved are counted.
        return self.weight.new_zeros(self.out_features, self.in_features, dtype=dtype)


class _Nf4Product(torch.autograd.Function):
    # bitsandbytes.autograd.MatMul4Bit: the input is not kept, the weight is dequantised twice.
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grads[0], ctx.layer.dequantised(grads[0].dtype)), None


class Int8Linear(nn.Linear):
    """A stand-in for bitsandbytes.nn.Linear8bitLt(has_fp16_weights=False): frozen, int8 rows and scales.

    The few outlier columns that the real layer multiplies apart depend on values and are left out.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        device = linear.weight.device
        self.bias = linear.bias
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Int8Product.apply(x, self)
        return result


class _Int8Product(torch.autograd.Function):
    # bitsandbytes.autograd.MatMul8bitLt on CUDA: quantised input, int32 product, its conversion; the input is kept.
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        rows = x.reshape(-1, x.shape[-1])
        ctx.x = rows
        half = rows.to(torch.float16)
        quantised = rows.new_empty(rows.shape, dtype=torch.int8)
        scales = rows.new_empty(len(rows), dtype=torch.float32)
        del half
        # A real product, so that its arithmetic is counted.
        product = torch.mm(quantised.to(torch.int8), layer.weight.t()).to(torch.int32)
        output = product.to(x.dtype)
        del scales
        if layer.bias is not None:
            output += layer.bias
        return output.reshape(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, layer = grads[0].reshape(-1, grads[0].shape[-1]), ctx.layer
        weight = layer.weight.to(grad.dtype, copy=True)
        weight.mul_(layer.get_buffer("scales").unsqueeze(1).mul(1 / 127))
        return torch.matmul(grad, weight).view(ctx.shape), None


def quantise(module: nn.Module, kind: str, keep: tuple[str, ...] = ()) -> int:
    """Replace every linear layer below ``module`` by a stand-in; returns their number.

    Args:
        kind: "nf4" or "int8"; keep: name suffixes of layers that stay as they are.
    """
    stand_in = {"nf4": Nf4Linear, "int8": Int8Linear}[kind]
    found = 0
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not f"{prefix}.{name}".endswith(keep or ("\0",)):
                setattr(parent, name, stand_in(child))
                found += 1
    return found
