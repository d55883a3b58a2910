"""What `llmopt bench quantization` times: our kernels and their peers, one function each.

Each takes the inputs of a case and gives the call to time. Layouts and codes of a weight are made
before the clock starts, as a server makes them when it loads a model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing

Call = Callable[[], Tensor]


# 4-bit weights: x (n_tokens, n_cols), codes (n_rows, n_cols) int8, scales (n_rows, n_groups)


def w4a16(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    from llmopt_lab.quantization.kernels import pack_for_kernel, w4a16_linear
    from llmopt_lab.quantization.records import Quantized

    group_size = codes.shape[1] // scales.shape[1]
    q = Quantized(codes, scales, None, bits=4, group_size=group_size)
    packed, kernel_scales, _ = pack_for_kernel(q, scale_dtype=scales.dtype)
    return lambda: w4a16_linear(x, packed, kernel_scales)


def tinygemm(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """torch's own int4 product."""
    if not x.is_cuda:
        raise Missing("torch's int4 product on a CPU takes another layout")
    group_size = codes.shape[1] // scales.shape[1]
    pairs = (codes + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], 8)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return lambda: torch._weight_int4pack_mm(x, packed, group_size, both)


def grouped_float(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """What was there before: the unquantised product."""
    n_rows, n_cols = codes.shape
    groups = codes.view(n_rows, scales.shape[1], -1).float() * scales.float()[..., None]
    w = groups.view(n_rows, n_cols).to(x.dtype)
    return lambda: linear(x, w)


# 8 bits on both sides: x (n_tokens, n_cols), w (n_rows, n_cols) int8 or fp8, w_scale (n_rows, 1)


def rounded_product(x: Tensor, w: Tensor, w_scale: Tensor) -> Call:
    """Our rounding of the activations, then our product."""
    from llmopt_lab.quantization.kernels import fp8_linear, w8a8_linear

    _require_gpu_for_fp8(w)
    product = w8a8_linear if w.dtype == torch.int8 else fp8_linear
    return lambda: product(x, w, w_scale)


def product_alone(x: Tensor, w: Tensor, w_scale: Tensor) -> Call:
    """Our product of codes that are there already."""
    from llmopt_lab.quantization.kernels import quantize_rows, scaled_linear

    _require_gpu_for_fp8(w)
    codes, scale = quantize_rows(x, w.dtype)
    return lambda: scaled_linear(codes, scale, w, w_scale, x.dtype)


def int_mm_around(x: Tensor, w: Tensor, w_scale: Tensor) -> Call:
    """torch._int_mm with the rounding and the scales compiled around it."""
    if gpu_facts() is None:
        raise Missing("torch.compile is only timed on a GPU here")

    def product(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        codes = (x.float() / scale).round().to(torch.int8)
        return (torch._int_mm(codes, w.T).float() * scale * w_scale.T).to(x.dtype)

    compiled = torch.compile(product, dynamic=False)
    return lambda: compiled(x, w, w_scale)


def scaled_mm_alone(x: Tensor, w: Tensor, w_scale: Tensor) -> Call:
    """torch's fp8 product (row-wise scales) of codes that are there already."""
    from llmopt_lab.quantization.kernels import quantize_rows

    _require_gpu_for_fp8(w)
    codes, scale = quantize_rows(x, w.dtype)
    return lambda: torch._scaled_mm(
        codes, w.T, scale_a=scale, scale_b=w_scale.T, out_dtype=x.dtype, use_fast_accum=True
    )


def float_product(x: Tensor, w: Tensor, w_scale: Tensor) -> Call:
    wide = (w.float() * w_scale).to(x.dtype)
    return lambda: linear(x, wide)


def _require_gpu_for_fp8(w: Tensor) -> None:
    if w.dtype == torch.float8_e4m3fn and not w.is_cuda:
        raise Missing("float8 needs a GPU")


# Sums of int8 products, unscaled: x and w int8


def sums(x: Tensor, w: Tensor) -> Call:
    """Our product with scales of one: the sums, as float32."""
    from llmopt_lab.quantization.kernels import scaled_linear

    ones = [torch.ones(len(side), 1, device=x.device) for side in (x, w)]
    return lambda: scaled_linear(x, ones[0], w, ones[1], torch.float32)


def int_mm(x: Tensor, w: Tensor) -> Call:
    return lambda: torch._int_mm(x, w.T)


W4A16 = (
    Contender("ours", w4a16, ours=True),
    Contender("torch int4 (tinygemm)", tinygemm),
    Contender("unquantised", grouped_float),
)
W8A8 = (
    Contender("ours", rounded_product, ours=True),
    Contender("torch._int_mm, compiled", int_mm_around),
    Contender("unquantised", float_product),
)
FP8 = (
    Contender("ours", rounded_product, ours=True),
    Contender("ours, product alone", product_alone),
    Contender("torch._scaled_mm alone", scaled_mm_alone),
    Contender("unquantised", float_product),
)
INT8_SUMS = (Contender("ours", sums, ours=True), Contender("torch._int_mm", int_mm))
