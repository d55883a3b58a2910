"""The Triton kernels of quantization: right when interpreted and on a GPU, fit to compile.

The oracle multiplies the dequantised weight in float64; codes are the reference's, to the bit.
Memory nobody wrote reads as NaN (conftest).
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

pytest.importorskip("triton")

import aot

from llmopt_lab.core.bench import load_results
from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.quantization import kernels, reference
from llmopt_lab.quantization.kernels import (
    Tiles,
    choose_tiles,
    dequantize_int4,
    dequantize_rows,
    fp8_linear,
    pack_for_kernel,
    quantize_int4,
    quantize_rows,
    scaled_linear,
    tiles_for,
    w4a16_linear,
    w8a8_linear,
)
from llmopt_lab.quantization.records import Quantized

SHAPES = [  # n_tokens, n_rows, n_cols, group_size
    (1, 33, 704, 128),
    (1, 5, 100, 32),
    (3, 17, 704, 64),
    (19, 33, 100, None),
    (70, 19, 704, 128),
    (19, 1, 256, 32),  # whole blocks
    (2, 31, 640, 256),  # a group of several blocks
    (3, 40, 1, None),
]


def matrix(*shape, seed=0, dtype=torch.float32, device="cpu"):
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=rng, device=device).to(dtype)


def weight(n_rows, n_cols, *, seed=1, device="cpu"):
    """Off centre, so that zero points matter; outputs stay near 1, for which the table is made."""
    return (matrix(n_rows, n_cols, seed=seed, device=device) + 0.5) / n_cols**0.5


def quantized(n_rows, n_cols, group_size, *, symmetric=True, **kw) -> Quantized:
    w = weight(n_rows, n_cols, **kw)
    return reference.quantize(w, bits=4, group_size=group_size, symmetric=symmetric)


def dequantized(q: Quantized):
    """The weight in float64."""
    return reference.dequantize(replace(q, scales=q.scales.double()))


def check_w4a16(x, q, *, scale_dtype=None, what=""):
    packed, scales, zeros = pack_for_kernel(q, scale_dtype=scale_dtype)
    if scale_dtype:
        q = replace(q, scales=q.scales.to(scale_dtype))
    want = x.double() @ dequantized(q).T
    assert_close(w4a16_linear(x, packed, scales, zeros), want, f"w4a16 {what}")


def rounded_by_row(x, top=127):
    """Codes and scales of each row by plain torch, in float32 as documented."""
    scale = x.float().abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1, scale)
    return (x.float() / scale).round(), scale


def check_w8a8(x, w, *, per_tensor=False, what=""):
    q = reference.quantize(w, bits=8, per_tensor=per_tensor)
    codes, scale = rounded_by_row(x)
    want = (codes.double() * scale.double()) @ dequantized(q).T
    assert_close(w8a8_linear(x, q.codes, q.scales), want, f"w8a8 {what}")


# --- 4-bit weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w4a16_equals_the_product_with_the_dequantised_weight(shape, symmetric):
    n_tokens, n_rows, n_cols, group_size = shape
    q = quantized(n_rows, n_cols, group_size, symmetric=symmetric)
    check_w4a16(matrix(n_tokens, n_cols), q)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n_tokens=st.integers(0, 40),
    n_rows=st.integers(1, 40),
    n_cols=st.integers(1, 400),
    group_size=st.sampled_from([None, 32, 64, 96, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_w4a16_is_right_on_random_shapes(n_tokens, n_rows, n_cols, group_size, symmetric, seed):
    q = quantized(n_rows, n_cols, group_size, symmetric=symmetric, seed=seed)
    check_w4a16(matrix(n_tokens, n_cols), q)


@pytest.mark.parametrize("n_tokens", [1, 19])
@pytest.mark.parametrize("group_size", [32, 128])
def test_a_zero_outside_4_bits_is_exact(n_tokens, group_size):
    q = quantized(17, 300, group_size, symmetric=False)
    zeros = q.zeros.clone()
    zeros[::2], zeros[1::2] = 30, -29
    check_w4a16(matrix(n_tokens, 300), replace(q, zeros=zeros))


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_codes_of_fewer_bits_half_scales_and_one_scale_a_matrix_are_taken(n_tokens):
    x = matrix(n_tokens, 300)
    check_w4a16(x, reference.quantize(weight(17, 300), bits=2, group_size=64))
    check_w4a16(x, quantized(17, 300, 128), scale_dtype=torch.float16)
    check_w4a16(x, reference.quantize(weight(17, 300), bits=4, per_tensor=True))


@pytest.mark.parametrize("n_tokens", [1, 19])
def test_what_lies_around_x_is_not_read(n_tokens):
    q = quantized(17, 300, 128)
    wide = torch.full((n_tokens + 3, 320), torch.nan)
    wide[2:-1, 7:307] = matrix(n_tokens, 300)
    check_w4a16(wide[2:-1, 7:307], q)


def test_x_in_any_layout_gives_the_same_result():
    q = quantized(17, 300, 128)
    check_w4a16(matrix(300, 6).T, q, what="transposed")
    check_w4a16(matrix(1, 300).expand(5, 300), q, what="expanded")
    check_w4a16(matrix(2, 6, 300).transpose(0, 1), q, what="three dimensions")
    check_w4a16(matrix(300), q, what="one dimension")
    check_w4a16(matrix(3, 0, 300), q, what="no token")


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(32, 16, 128, 4, 1),
        Tiles(16, 32, 128, 4, 2, splits=9),
        Tiles(16, 16, 128, 4, 1, 3, True),
    ],
    ids=lambda tiles: f"{tiles.tile_n}x{tiles.tile_m}-{tiles.splits}{'-tma' if tiles.tma else ''}",
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_tiles_give_the_same_result(tiles, symmetric, monkeypatch):
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    check_w4a16(matrix(19, 704), quantized(33, 704, 32, symmetric=symmetric))
    check_w8a8(matrix(19, 704), weight(33, 704))


@pytest.mark.parametrize("n_tokens", [1, 19])
def test_two_runs_give_the_same_bits(n_tokens):
    args = matrix(n_tokens, 704), *pack_for_kernel(quantized(33, 704, 128, symmetric=False))
    assert torch.equal(w4a16_linear(*args), w4a16_linear(*args))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(33, 704), (5, 100), (3, 333), (1, 1), (16, 128)], ids=str)
def test_int4_rounding_and_back_are_the_references_to_the_bit(shape, group_size, symmetric):
    w = weight(*shape)
    w[0] = 0
    q = reference.quantize(w, bits=4, group_size=group_size, symmetric=symmetric)
    got = quantize_int4(w, group_size=group_size, symmetric=symmetric)
    for a, b in zip(got, pack_for_kernel(q), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(dequantize_int4(*got, shape[1]), reference.dequantize(q))
    half = dequantize_int4(*got, shape[1], torch.float16)
    assert torch.equal(half, reference.dequantize(q).half())


def test_the_packed_layout_is_as_documented():
    q = quantized(3, 200, 128)
    packed, scales, _ = pack_for_kernel(q)
    codes = pad(q.codes, (0, 56)).int() + 8
    for block, row, word, nibble in [(0, 0, 0, 0), (0, 2, 31, 3), (1, 1, 7, 1), (1, 2, 20, 3)]:
        found = int(packed[block, row, word]) >> 4 * nibble & 15
        assert found == codes[row, 128 * block + 32 * nibble + word]
    assert torch.equal(scales, q.scales.T)


# --- int8


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 33, 704), (3, 17, 100), (19, 1, 256), (70, 19, 704), (0, 5, 9), (3, 7, 1)],
    ids=str,
)
def test_w8a8_equals_the_product_of_the_rounded_operands(shape, per_tensor):
    n_tokens, n_rows, n_cols = shape
    check_w8a8(matrix(n_tokens, n_cols), weight(n_rows, n_cols), per_tensor=per_tensor)


def test_w8a8_takes_x_in_any_layout():
    w = weight(17, 300)
    check_w8a8(matrix(300, 6).T, w, what="transposed")
    check_w8a8(matrix(2, 6, 300).transpose(0, 1), w, what="three dimensions")
    wide = torch.full((9, 320), torch.nan)
    wide[2:-1, 7:307] = matrix(6, 300)
    check_w8a8(wide[2:-1, 7:307], w, what="in the middle of NaN")


def test_int8_sums_are_exact_at_the_largest_codes():
    n_cols = 4096
    x, w = (torch.full((n, n_cols), 127, dtype=torch.int8) for n in (3, 5))
    x[:, 1] = 126  # 4095 * 127^2 + 126 * 127 needs 26 bits: float32 would round it
    scales = [torch.ones(n, 1) for n in (3, 5)]
    got = scaled_linear(x, scales[0], w, scales[1], torch.float32)
    want = x.double() @ w.double().T
    assert torch.equal(got, want.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 704), (1, 1), (2, 3, 100), (4, 5000)], ids=str)
def test_rounding_by_row_is_the_references_to_the_bit(shape, dtype):
    x = matrix(*shape, dtype=dtype)
    x[0] = 0
    codes, scales = quantize_rows(x)
    want_codes, want_scales = reference.quantize_rows(x)
    assert torch.equal(codes, want_codes) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_come_back_to_the_bit(dtype):
    q = reference.quantize(weight(7, 2500), bits=8)
    assert torch.equal(dequantize_rows(q.codes, q.scales, dtype), reference.dequantize(q).to(dtype))
    one = reference.quantize(weight(7, 100), bits=8, per_tensor=True)
    wide = torch.zeros(7, 130, dtype=torch.int8)
    wide[:, 9:109] = one.codes
    assert torch.equal(dequantize_rows(wide[:, 9:109], one.scales), reference.dequantize(one))


def test_ties_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


# --- what is refused


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :200], r"packed must be \(2, n_rows, 32\) int16 for 200 columns"),
        ("x", lambda x: x.double(), "float32, float16 or bfloat16; got torch.float64"),
        ("x", lambda x: x.bfloat16(), "bfloat16 needs a GPU"),
        ("x", lambda x: x[:, :0], r"x must be \(.., n_cols\) with columns"),
        ("x", lambda x: x.clone().requires_grad_(), "this product has no gradient"),
        ("packed", lambda p: p.int(), "use pack_for_kernel"),
        ("packed", lambda p: p.mT.contiguous().mT, "packed must be contiguous"),
        ("scales", lambda s: s[:, :3], r"scales must be \(3 or 12, 17\) float32"),
        ("scales", lambda s: s.double(), "got .* torch.float64: use pack_for_kernel"),
        ("scales", lambda s: s.bfloat16(), "Use float32 scales"),
        ("zeros", lambda z: z.int(), r"zeros must be \(3, 17\) int16 like the scales"),
    ],
)
def test_bad_input_of_w4a16_is_refused(name, change, message):
    packed, scales, zeros = pack_for_kernel(quantized(17, 300, 128, symmetric=False))
    arguments = {"x": matrix(2, 300), "packed": packed, "scales": scales, "zeros": zeros}
    arguments[name] = change(arguments[name])
    with pytest.raises(BadInput, match=message):
        w4a16_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: replace(q, bits=8), "takes codes of 2 to 4 bits; got 8"),
        (lambda q: replace(q, codes=q.codes + 4), r"4-bit codes lie in \[-8, 8\)"),
        (lambda q: replace(q, codes=q.codes.int()), r"codes must be \(rows, cols\) int8"),
        (lambda q: replace(q, scales=q.scales[:, :2]), r"need scales \(17, 3\)"),
        (lambda q: replace(q, zeros=q.zeros[:3]), "zeros must be int16 and have the shape"),
        (
            lambda q: reference.quantize(weight(3, 90), bits=4, group_size=40),
            "group_size must be a multiple of 32, or one group a row; got 40",
        ),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(change, message):
    q = quantized(17, 300, 128, symmetric=False)
    with pytest.raises(BadInput, match=message):
        pack_for_kernel(change(q))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :200], r"x must be \(.., 300\) on cpu; got \(2, 200\)"),
        ("x", lambda x: x.bfloat16(), "bfloat16 needs a GPU"),
        ("x", lambda x: x.clone().requires_grad_(), "this product has no gradient"),
        ("w_int8", lambda w: w.int(), r"codes must be \(n_rows, n_cols\) torch.int8"),
        ("w_int8", lambda w: w.T.contiguous().T, "the last dimension contiguous"),
        ("w_scale", lambda s: s[:3], r"scales must be \(17, 1\) or \(1, 1\) float32"),
        ("w_scale", lambda s: s.double(), "got .* torch.float64"),
    ],
)
def test_bad_input_of_w8a8_is_refused(name, change, message):
    q = reference.quantize(weight(17, 300), bits=8)
    arguments = {"x": matrix(2, 300), "w_int8": q.codes, "w_scale": q.scales}
    arguments[name] = change(arguments[name])
    with pytest.raises(BadInput, match=message):
        w8a8_linear(**arguments)


def test_a_sum_that_may_overflow_int32_is_refused():
    w = torch.zeros(1, (1 << 17) + 1, dtype=torch.int8)
    with pytest.raises(BadInput, match="int32 sums hold 131,072 products of int8; got 131,073"):
        w8a8_linear(torch.ones(1, w.shape[1]), w, torch.ones(1, 1))


def test_bad_input_of_the_rounding_is_refused():
    with pytest.raises(BadInput, match="group_size must be 32, 64 or 128; got 48"):
        quantize_int4(weight(3, 90), group_size=48)
    with pytest.raises(BadInput, match=r"weight must be \(rows, cols\)"):
        quantize_int4(weight(3, 90)[0])
    with pytest.raises(BadInput, match="codes must be int8 or float8_e4m3fn; got torch.int16"):
        quantize_rows(matrix(2, 9), torch.int16)
    with pytest.raises(BadInput, match=r"packed must be \(2, n_rows, 32\) int16 for 200 columns"):
        dequantize_int4(*pack_for_kernel(quantized(3, 90, 32)), 200)


def test_fp8_is_refused_by_the_interpreter():
    w, scale = reference.quantize_fp8(weight(5, 40), per_row=True)
    for call in (
        lambda: fp8_linear(matrix(2, 40), w, scale),
        lambda: quantize_rows(matrix(2, 40), torch.float8_e4m3fn),
        lambda: dequantize_rows(w, scale),
    ):
        with pytest.raises(BadInput, match="float8 needs a GPU: .* 0.49 becomes 0.25"):
            call()


# --- compiled for GPUs that are not here

MODULE = "llmopt_lab.quantization.kernels"
CAPABILITIES = {
    "sm_75": (7, 5), "sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0),
    "gfx942": None,
}  # fmt: skip
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip
# target: (kernel, tokens, dtype); w4a16 with zeros, which take more registers
COMPILED = {
    "sm_75": [("w4a16", 1, "fp16"), ("w4a16", 19, "fp16")],
    "sm_80": [("w4a16", 300, "bf16"), ("scaled", 300, "i8")],
    "sm_89": [("scaled", 300, "fp8e4nv")],
    "sm_90": [("w4a16", 1, "bf16"), ("w4a16_slices", 64, "bf16"), ("w4a16", 300, "bf16"),
               ("w4a16_slices", 300, "bf16"), ("scaled", 300, "fp8e4nv")],
    "sm_100": [("w4a16", 300, "fp16")],
    "gfx942": [("w4a16", 300, "bf16"), ("scaled", 300, "i8")],
}  # fmt: skip


def kernel_spec(target: str, kernel: str, n_tokens: int, dtype: str) -> dict:
    capability = CAPABILITIES[target]
    tiles = tiles_for(kernel, n_tokens, DTYPES[dtype], capability)
    pdl = capability is not None and capability >= (9, 0)
    options = {"num_warps": tiles.n_warps} | ({"launch_pdl": True} if pdl else {})
    sizes = dict.fromkeys(["n_cols", "n_rows"], "i32")
    out = "fp16" if dtype == "fp16" else "bf16"
    if kernel == "scaled":
        name, options["num_stages"] = "_scaled_kernel", tiles.n_stages
        pointers = {"x_ptr": dtype, "w_ptr": dtype, "out_ptr": out}
        pointers |= {"x_scale_ptr": "fp32", "w_scale_ptr": "fp32"}
        rows = ["x_row", "w_row"]
        sizes |= dict.fromkeys(["n_tokens", *rows, "w_scale_row", "split_cols"], "i32")
        constexprs = {
            "TILE_N": tiles.tile_n, "TILE_M": tiles.tile_m, "TILE_K": tiles.tile_k,
            "SPLIT": False, "TMA": tiles.tma, "PDL": pdl,
        }  # fmt: skip
    else:
        pointers = {"x_ptr": dtype, "scale_ptr": "fp32", "zero_ptr": "i16", "out_ptr": out}
        constexprs = {
            "HAS_ZEROS": True,
            "PER_SLICE": kernel == "w4a16_slices",
            "STAGES": tiles.n_stages,
            "PDL": pdl,
        }
        sizes["n_blocks"] = "i32"
        rows = []
        if tiles.tile_m == 1:
            name, pointers["packed_ptr"] = "_one_token_kernel", "i32"
            constexprs |= {
                "ROWS": tiles.tile_n, "CHUNKS": tiles.tile_k // 32, "LOP3": capability is not None,
            }  # fmt: skip
        else:
            name, pointers["packed_ptr"] = "_w4a16_kernel", "i16"
            rows = ["x_row"]
            sizes |= dict.fromkeys(["n_tokens", "x_row", "split_blocks"], "i32")
            constexprs |= {
                "TILE_N": tiles.tile_n, "TILE_M": tiles.tile_m, "TMA": tiles.tma,
                "ASM": capability is not None, "PRECISION": "ieee",
            }  # fmt: skip
    return {
        "kernel": f"{MODULE}:{name}",
        "target": target,
        "signature": {k: f"*{v}" for k, v in pointers.items()} | sizes,
        "constexprs": constexprs,
        "aligned": ["n_cols", "n_rows", *rows],
        "options": options,
    }


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_and_fit_the_chip(target):
    specs = [kernel_spec(target, *what) for what in COMPILED[target]]
    for spec, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        what = f"{spec['kernel']} {spec['constexprs']}"
        assert facts["shared"] <= aot.TARGETS[target][3], f"{what}: shared memory {facts['shared']}"
        if target == "sm_90":
            assert facts["spills"] == 0, f"{what} spills {facts['spills']} bytes"


@pytest.mark.parametrize("scaled", [True, False])
def test_split_products_of_one_token_compile(scaled):
    """The launcher makes numbers that equal 1 constants, which the interpreter does not."""
    part = "i32" if scaled else "fp32"
    pointers = {"part_ptr": part, "x_scale_ptr": "fp32", "w_scale_ptr": "fp32", "out_ptr": "bf16"}
    spec = {
        "kernel": f"{MODULE}:_merge_kernel",
        "target": "sm_90",
        "signature": {k: f"*{v}" for k, v in pointers.items()} | {"n_rows": "i32"},
        "constexprs": {
            "n_tokens": 1, "w_scale_row": 1, "N_SPLITS": 4, "SCALED": scaled, "TILE": 256,
            "PDL": True,
        },
        "aligned": ["n_rows"],
        "options": {"num_warps": 2, "launch_pdl": True},
    }  # fmt: skip
    (facts,) = aot.compile_ahead([spec])
    assert facts["spills"] == 0


# --- as recorded


def recorded(title: str, **size) -> dict[str, dict]:
    """Results of one row on the H100, by contender."""
    (record,) = load_results("quantization")
    (case,) = (case for case in record["cases"] if case["title"].startswith(title))
    (row,) = (row for row in case["rows"] if row["size"] == size)
    return row["results"]


@pytest.mark.parametrize("n_tokens", [1, 16])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (16384, 16384)], ids=str)
def test_four_bit_weights_beat_bf16_as_the_bytes_promise(n_tokens, shape):
    n_rows, n_cols = shape
    row = recorded("4-bit weights", n_tokens=n_tokens, n_rows=n_rows, n_cols=n_cols)
    times = {name: result["median_ms"] for name, result in row.items()}
    assert times["unquantised"] / times["ours"] >= (2.5 if n_tokens == 1 else 1.3)
    assert times["torch int4 (tinygemm)"] > times["ours"]
    if n_tokens == 1:
        assert row["ours"]["share_of_roofline"] >= 0.6


def test_int8_beats_torch_and_bf16_on_a_large_product():
    size = {"n_tokens": 4096, "n_rows": 4096, "n_cols": 4096}
    whole, sums = recorded("int8 weights", **size), recorded("int8 product alone", **size)
    times = {name: result["median_ms"] for name, result in whole.items()}
    assert times["torch._int_mm, compiled"] >= times["ours"]
    assert times["unquantised"] >= 1.2 * times["ours"]
    assert sums["torch._int_mm"]["median_ms"] >= sums["ours"]["median_ms"]


# --- on a GPU


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_tokens=st.sampled_from([1, 2, 16, 17, 33, 64, 65, 200, 300]),
    n_rows=st.integers(1, 700),
    n_cols=st.integers(1, 3000),
    group_size=st.sampled_from([None, 32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_w4a16_is_right_on_a_gpu_on_random_shapes(
    n_tokens, n_rows, n_cols, group_size, symmetric, dtype, seed
):
    q = quantized(n_rows, n_cols, group_size, symmetric=symmetric, seed=seed, device="cuda")
    x = matrix(n_tokens, n_cols, dtype=dtype, device="cuda")
    check_w4a16(x, q, what=f"{(n_tokens, n_rows, n_cols, group_size)}")


def tensor_core_sum(x, w):
    """x w^T of float8_e4m3fn as a Hopper tensor core adds it up, bit for bit, in float64.

    An instruction takes 32 columns. Its products and the sum so far are cut to 13 bits below the
    largest exponent among them, a product's being the sum of its factors', and so is what they add
    up to. Seen to give every bit of cuBLAS's sum with fast accumulation on an H200.
    Source: Xie et al. 2025 (MMA-Sim, https://arxiv.org/abs/2511.10909).
    """

    def exponent(a):
        return torch.where(a == 0, -200.0, (torch.frexp(a.abs())[1] - 1).double())

    def cut(a, top):
        unit = torch.exp2(top - 13)
        return torch.trunc(a / unit) * unit

    x, w = x.double(), w.double()
    total = x.new_zeros(len(x), len(w))
    for first in range(0, x.shape[1], 32):
        a, b = x[:, None, first : first + 32], w[None, :, first : first + 32]
        top = torch.where(
            a * b == 0, -200.0, exponent(a).clamp(min=-6) + exponent(b).clamp(min=-6)
        ).amax(-1)
        top = torch.maximum(top, exponent(total))
        total = cut(a * b, top[..., None]).sum(-1) + cut(total, top)
        total = cut(total, exponent(total))
    return total


def check_fp8(x, w, what=""):
    """Against float64; on Hopper, against what its tensor cores make of exact products."""
    # on a GPU torch divides by a number as a product with its reciprocal: the oracle is on the CPU
    codes, scale = (y.cuda() for y in reference.quantize_fp8(x.cpu(), per_row=True))
    w_codes, w_scale = reference.quantize_fp8(w, per_row=True)
    got_codes, got_scale = quantize_rows(x, torch.float8_e4m3fn)
    assert torch.equal(got_codes.float(), codes.float()) and torch.equal(got_scale, scale)
    if torch.cuda.get_device_capability() == (9, 0):
        tiles = choose_tiles("scaled", len(x), *w.shape, w_codes.dtype)
        steps = ceil_div(w.shape[1], tiles.tile_k)
        part = ceil_div(steps, tiles.splits) * tiles.tile_k     # columns of a program
        parts = zip(codes.split(part, 1), w_codes.split(part, 1), strict=True)
        total = sum(tensor_core_sum(*pair) for pair in parts)
    else:
        total = codes.double() @ w_codes.double().T
    got = fp8_linear(x, w_codes, w_scale)
    assert_close(got, total * scale.double() * w_scale.double().T, what)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_tokens=st.sampled_from([1, 2, 17, 64, 65, 256, 300]),
    n_rows=st.integers(1, 700),
    n_cols=st.integers(1, 3000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_w8a8_and_fp8_are_right_on_a_gpu_on_random_shapes(n_tokens, n_rows, n_cols, dtype, seed):
    x = matrix(n_tokens, n_cols, dtype=dtype, device="cuda")
    w = weight(n_rows, n_cols, seed=seed, device="cuda")
    check_w8a8(x, w, what=f"{(n_tokens, n_rows, n_cols)}")
    check_fp8(x, w, what=f"fp8 {(n_tokens, n_rows, n_cols)}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5, 65, 300])
def test_ragged_cases_are_right_on_a_gpu(n_tokens, dtype):
    """Every launcher once on sizes that no tile divides: what compute-sanitizer runs."""
    n_rows, n_cols = 77, 333
    x = matrix(n_tokens, n_cols, dtype=dtype, device="cuda")
    for group_size, symmetric in ((64, True), (128, False)):
        q = quantized(n_rows, n_cols, group_size, symmetric=symmetric, device="cuda")
        check_w4a16(x, q)
        got = quantize_int4(weight(n_rows, n_cols).cuda(), group_size=group_size)
        back = dequantize_int4(*got, n_cols)
        assert back.shape == (n_rows, n_cols) and bool(back.isfinite().all())
    w = weight(n_rows, n_cols, device="cuda")
    check_w8a8(x, w)
    check_fp8(x, w)
    codes, scale = quantize_rows(x)
    assert_close(dequantize_rows(codes, scale, dtype), (codes * scale).to(dtype))
