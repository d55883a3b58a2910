"""The kernels of mixture of experts, compiled for GPUs that are not here."""

import aot
import pytest
import torch

pytest.importorskip("triton")

from llmopt_lab.moe import few_token_kernels, kernels, route_kernels
from llmopt_lab.moe.tiles import Sizes, rows_for, tiles_for

CAPABILITIES = {
    "sm_75": (7, 5), "sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0),
    "gfx942": None,
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
GROUPS = dict.fromkeys(
    ("visits_ptr", "starts_ptr", "tile_expert_ptr", "tile_first_ptr", "n_used_ptr"), "*i32"
)
COUNTS = dict.fromkeys(
    ("n_row_tiles", "n_visits", "n_tokens", "n_token_tiles", "n_parts",
     "n_arrived"), "i32"
)  # fmt: skip
PRODUCTS = ("gate_up", "project", "hidden_gradient", "weight_gradient")
PREFILL, DECODE = Sizes(4096, 4096, 8, 14336, 2), Sizes(8, 2048, 128, 768, 8)
FEW = DECODE._replace(n_tokens=4)
MIDDLE = PREFILL._replace(n_tokens=64)  # row tiles that an expert does not fill


def spec(
    target: str,
    dtype: str,
    kernel: str,
    sizes: Sizes,
    *,
    transposed: bool = False,
    module=kernels,
) -> dict:
    """One kernel as its launcher calls it on that GPU."""
    capability = CAPABILITIES[target]
    by_table = kernel if kernel in PRODUCTS else "route"
    tiles = tiles_for(by_table, sizes, DTYPES[dtype], capability)
    on_hopper = capability is not None and capability >= (9, 0)
    few = sizes.n_tokens <= tiles.rows if by_table == "route" else sizes.n_tokens <= 64
    n, d, n_experts, d_ff, k = sizes
    tma = tiles.tma and kernel in ("gate_up", "project", "hidden_gradient")

    def tensor(*block: int) -> str:
        return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" if tma else f"*{dtype}"

    rows, cols, step = tiles.rows, tiles.cols, tiles.step
    turned = transposed or kernel == "hidden_gradient"
    e = max(16, 1 << (n_experts - 1).bit_length())
    signature = {
        "w": tensor(1, cols, step) if turned else tensor(1, step, cols),
        "rows": tensor(rows, step),
        "parts_ptr": "*fp32" if few or module is route_kernels else f"*{dtype}",
    }
    signature |= dict.fromkeys(
        ("x_ptr", "out_ptr", "router_ptr", "hidden_ptr", "gate_up_ptr", "d_out_ptr",
         "d_gate_up_ptr", "weighted_ptr", "a_ptr", "b_ptr", "d_w_ptr", "d_logits_ptr"), f"*{dtype}"
    )  # fmt: skip
    signature |= dict.fromkeys(
        ("weights_ptr", "probabilities_ptr", "d_weights_ptr", "logits_ptr"), "*fp32"
    )
    signature |= dict.fromkeys(
        ("experts_ptr", "rank_ptr", "tile_counts_ptr", "begin_ptr", "arrived_ptr"), "*i32"
    )
    constexprs = {
        "D": d, "N_EXPERTS": n_experts, "E": e, "K": k, "K_PADDED": 1 << (k - 1).bit_length(),
        "D_FF": d_ff, "SAVE": True, "SOLO": few, "N_PARTS": 8 if few else 0,
        "TILE_TOKENS": rows, "TILE_D": step, "TILE_ROWS": rows_for(sizes, DTYPES[dtype]),
        "ROWS": rows, "COLS": cols, "STEP": step, "STAGES": tiles.n_stages, "TMA": tma,
        "N_IN": 2 * d_ff if transposed else d_ff, "N_OUT": d, "TRANSPOSED": transposed,
        "WEIGHTED": not transposed, "SPLITS": 2 if few and not transposed else 1,
        "M": d, "N": 2 * d_ff, "GATHER_A": True, "PDL": on_hopper,
        "LENGTH": 256, "LOGIT_ROWS": 16, "TOKENS": 4, "ARRIVED": 64,
        "PRECISION": "tf32x3" if dtype == "fp32" and on_hopper else "ieee",
    }  # fmt: skip
    n_warps = tiles.n_warps
    if kernel == "combine":
        constexprs["TILE_D"], n_warps = min(1024, 1 << (d - 1).bit_length()), 4
    elif kernel == "logit_gradient":
        constexprs["TILE_TOKENS"], n_warps = max(1, 4096 // e), 4
    elif kernel == "scan":
        constexprs["TILE"], n_warps = route_kernels.SCAN // e, 8
    elif kernel == "place":
        constexprs["TILE"], n_warps = 256, 4
    return {
        "kernel": f"{module.__name__}:_{kernel}_kernel",
        "target": target,
        "signature": _named(module, kernel, signature | GROUPS | COUNTS),
        "constexprs": _named(module, kernel, constexprs),
        "options": {"num_warps": n_warps},
    }


def _named(module, kernel: str, values: dict) -> dict:
    """Those that the kernel has."""
    names = getattr(module, f"_{kernel}_kernel").arg_names
    return {name: value for name, value in values.items() if name in names}


def specs_of(target: str) -> list[dict]:
    """Forward and backward, every kernel: few tokens in fp16, many in bf16 where it is there.

    On Hopper also in between, and in fp32.
    """
    many = "fp16" if target == "sm_75" else "bf16"
    specs = [spec(target, "fp16", name, DECODE) for name in PRODUCTS]
    specs += [spec(target, many, name, PREFILL) for name in PRODUCTS]
    for name in ("combine", "logit_gradient"):
        specs += [spec(target, "fp16", name, DECODE), spec(target, many, name, PREFILL)]
    specs.append(spec(target, many, "logit_gradient", PREFILL._replace(k=1)))
    for name in ("logits", "route"):
        specs.append(spec(target, "fp16", name, DECODE, module=route_kernels))
    for name in ("route", "scan", "place"):
        specs.append(spec(target, many, name, PREFILL, module=route_kernels))
    for name in ("gate_up", "project"):
        specs.append(spec(target, "fp16", name, FEW, module=few_token_kernels))
    if target == "sm_90":
        specs += [spec(target, "bf16", name, MIDDLE) for name in PRODUCTS]
        specs += [spec(target, "bf16", "project", PREFILL, transposed=True)]
        specs += [spec(target, "fp32", name, PREFILL) for name in ("gate_up", "hidden_gradient")]
    return specs


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_and_fit_the_chip(target):
    specs = specs_of(target)
    for one, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        what = f"{one['kernel']} {one['constexprs']}"
        assert facts["shared"] <= aot.TARGETS[target][3], f"{what}: shared memory {facts['shared']}"
        if target == "sm_90":
            assert facts["spills"] == 0, f"{what} spills {facts['spills']} bytes"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0), None])
def test_tiles_are_powers_of_two_that_a_product_takes(capability):
    for kernel in ("route", "gate_up", "project", "hidden_gradient", "weight_gradient"):
        for n_tokens in (1, 30, 64, 65, 1000, 100_000):
            for n_experts, k in ((1, 1), (8, 2), (256, 16)):
                for dtype in DTYPES.values():
                    sizes = Sizes(n_tokens, 1024, n_experts, 512, k)
                    tiles = tiles_for(kernel, sizes, dtype, capability)
                    for size in (tiles.rows, tiles.cols, tiles.step):
                        assert size in (16, 32, 64, 128, 256), (kernel, sizes, tiles)
                    assert tiles.n_stages >= 2
                    on_hopper = capability is not None and capability >= (9, 0)
                    assert tiles.tma == (on_hopper and kernel != "route")
