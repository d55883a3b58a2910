"""A kernel small enough that a wrong answer means a broken Triton. Needs Triton to import."""

import torch

from llmopt_lab.core.device import pick_device, prepare_triton

prepare_triton()

import triton
import triton.language as tl


@triton.jit
def _row_sums(x_ptr, out_ptr, n_cols, COLS: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, COLS)
    x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


def kernel_error() -> float:
    """Largest error of row sums of a ragged 3 x 5 matrix; 0.0 when Triton works."""
    x = torch.arange(15, dtype=torch.float32, device=pick_device()).view(3, 5)
    out = torch.full((3,), float("nan"), device=x.device)
    _row_sums[(3,)](x, out, n_cols=5, COLS=8)
    return (out - x.sum(dim=1)).abs().max().item()
