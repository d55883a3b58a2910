"""Inputs shared by tests, benchmarks and the notebook, and the benchmark with its peers."""

import torch
from torch import Tensor

from llmopt_lab.core.bench import Case
from llmopt_lab.quantization.block_formats import dequantize_blocks, quantize_blocks
from llmopt_lab.quantization.gptq import gptq, hessian_of
from llmopt_lab.quantization.input_scales import awq_scales
from llmopt_lab.quantization.peers import FP8, INT8_SUMS, W4A16, W8A8


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
    blocks = dequantize_blocks(quantize_blocks(weight, "nvfp4"))
    return [*(reference.dequantize(q) for q in (rounded, grouped, ordered)), scales, blocks]


# The benchmark: bf16 activations on a GPU. All contenders of a table compute one function: the
# activations of the 8-bit tables are codes times a power of two, which rounding leaves alone.


def four_bit_oracle(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The product with the dequantised weight, in float64."""
    groups = codes.double().view(len(codes), scales.shape[1], -1) * scales.double()[..., None]
    return x.double() @ groups.flatten(1).T


def eight_bit_oracle(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The same for 8-bit weights with a scale a row."""
    return x.double() @ (w.double() * w_scale.double()).T


def sums_oracle(x: Tensor, w: Tensor) -> Tensor:
    """Sums of int8 products, exact in float64."""
    return x.double() @ w.double().T


def _four_bit_inputs(device, *, n_tokens: int, n_rows: int, n_cols: int) -> tuple:
    dtype = _float_of(device)
    rng = torch.Generator(device).manual_seed(0)
    size = (n_rows, n_cols)
    codes = torch.randint(-8, 8, size, generator=rng, device=device, dtype=torch.int8)
    scales = torch.rand(n_rows, n_cols // 128, generator=rng, device=device) + 0.5
    x = torch.randn(n_tokens, n_cols, generator=rng, device=device)
    return x.to(dtype), codes, (scales / 5 / n_cols**0.5).to(dtype)


def _eight_bit_inputs(code: torch.dtype):
    top = 127 if code == torch.int8 else 448

    def inputs(device, *, n_tokens: int, n_rows: int, n_cols: int) -> tuple:
        rng = torch.Generator(device).manual_seed(0)
        x, w = (
            (torch.randn(n, n_cols, generator=rng, device=device) * top / 6).clamp_(-top, top)
            for n in (n_tokens, n_rows)
        )
        x[:, 0] = top  # so that the scale of a row is a power of two
        x, w = (y.round() if code == torch.int8 else y.to(code).float() for y in (x, w))
        w_scale = (torch.rand(n_rows, 1, generator=rng, device=device) + 0.5) * 36 / top
        return (x / 128).to(_float_of(device)), w.to(code), w_scale * 128 / top / n_cols**0.5

    return inputs


def _int8_inputs(device, **size) -> tuple:
    x, w, _ = _eight_bit_inputs(torch.int8)(device, **size)
    return (x * 128).to(torch.int8), w


def _float_of(device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _case(title, inputs, oracle, contenders, sizes, *, weight_bytes, x_bytes=2, out_bytes=2):
    def flops(*, n_tokens, n_rows, n_cols):
        return 2 * n_tokens * n_rows * n_cols

    def min_bytes(*, n_tokens, n_rows, n_cols):
        activations = n_tokens * (x_bytes * n_cols + out_bytes * n_rows)
        return int(weight_bytes * n_rows * n_cols) + activations

    return Case(
        title=title, sizes=sizes, inputs=inputs, oracle=oracle, contenders=contenders,
        flops=flops, min_bytes=min_bytes,
        cpu_sizes=({"n_tokens": 19, "n_rows": 48, "n_cols": 256},),
    )  # fmt: skip


def _sizes(n_tokens: tuple[int, ...], *weights: tuple[int, int]) -> tuple[dict, ...]:
    return tuple(
        {"n_tokens": n, "n_rows": rows, "n_cols": cols} for rows, cols in weights for n in n_tokens
    )


# (out, in) of Llama-3-8B's attention and feed-forward layers, and one larger than any L2
SQUARE, UP, DOWN, LARGE = (4096, 4096), (14336, 4096), (4096, 14336), (16384, 16384)
CASES = (
    _case(
        "4-bit weights, group 128 (floor: packed codes and scales)",
        _four_bit_inputs, four_bit_oracle, W4A16,
        _sizes((1, 16), SQUARE, DOWN, LARGE) + _sizes((1, 2, 4, 8, 16, 32, 64, 256, 4096), UP),
        weight_bytes=0.5 + 2 / 128,
    ),
    _case(
        "int8 weights and activations, rounding included",
        _eight_bit_inputs(torch.int8), eight_bit_oracle, W8A8,
        _sizes((32, 256, 1024, 4096), SQUARE) + _sizes((4096,), UP),
        weight_bytes=1,
    ),
    _case(
        "int8 product alone: codes in, sums of 4 bytes out",
        _int8_inputs, sums_oracle, INT8_SUMS,
        _sizes((32, 256, 1024, 4096), SQUARE) + _sizes((4096,), UP),
        weight_bytes=1, x_bytes=1, out_bytes=4,
    ),
    _case(
        "fp8 weights and activations",
        _eight_bit_inputs(torch.float8_e4m3fn), eight_bit_oracle, FP8,
        _sizes((32, 256, 1024, 4096), SQUARE) + _sizes((4096,), UP),
        weight_bytes=1,
    ),
)  # fmt: skip
