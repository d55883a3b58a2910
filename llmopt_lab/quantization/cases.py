"""Inputs shared by tests, benchmarks and the notebook."""

import torch
from torch import Tensor

from llmopt_lab.quantization.gptq import gptq, hessian_of
from llmopt_lab.quantization.input_scales import awq_scales


def layer(
    rows: int, cols: int, n: int, *, correlated: bool, dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A random weight (rows, cols) and inputs (n, cols): white, or of falling, mixed variances."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng, dtype=dtype)
    x = torch.randn(n, cols, generator=rng, dtype=dtype)
    if correlated:
        mix = torch.linalg.qr(torch.randn(cols, cols, generator=rng, dtype=dtype))[0]
        x = x * torch.logspace(0, -2, cols, dtype=dtype) @ mix
    return weight, x


def strip_example(reference) -> list[Tensor]:
    """A run that reaches every `record(...)` of the room."""
    weight, x = layer(3, 10, 40, correlated=True)
    hessian = hessian_of(x)
    rounded = reference.quantize(weight, bits=4, group_size=4, symmetric=False)
    grouped = gptq(weight, hessian, bits=4, group_size=4)
    ordered = gptq(weight, hessian, bits=3, act_order=True, tile=4)
    scales = awq_scales(weight, x.abs().mean(0), hessian, bits=3, n_grid=4)
    return [*(reference.dequantize(q) for q in (rounded, grouped, ordered)), scales]
