"""What the launchers of Triton kernels share: how a kernel is made and started, what is refused."""

import inspect

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, interpreting, pick_device, prepare_triton
from llmopt_lab.core.errors import require

prepare_triton()

import triton


def jit(fn, **options):
    """triton.jit of the function itself, which a test's type checker may have wrapped."""
    return triton.jit(inspect.unwrap(fn), **options)


def precision_of(dtype: torch.dtype) -> str:
    """Of float32 products: three tf32 products are nearly as exact and run on tensor cores."""
    gpu = gpu_facts()
    has_tf32 = torch.version.hip is None and gpu is not None and gpu.capability >= (8, 0)
    return "tf32x3" if dtype == torch.float32 and has_tf32 else "ieee"


def dependent_launch(device: torch.device) -> dict:
    """Options of a kernel whose start hides behind the end of the one before it (sm_90 on)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    pdl = nvidia and gpu_facts().capability >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def allow_descriptors() -> None:
    """Before a launch of a kernel that makes TMA descriptors: every thread has its own setting."""
    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=pick_device())


def shared_bytes(capability: tuple[int, int] | None) -> int:
    """Most shared memory of one program on a GPU of that capability (None: AMD)."""
    if capability is None or capability < (8, 0):
        return 64 << 10
    if capability[0] in (9, 10):
        return 227 << 10
    return 163 << 10 if capability in ((8, 0), (8, 7)) else 99 << 10


def merge_warps(splits: int, d_head: int) -> int:
    """Enough warps to hold (splits, d_head) partial results in registers, 64 a thread."""
    return max(1, min(8, splits * d_head // 2048))


def check_dtype(dtype: torch.dtype, like: Tensor) -> None:
    """Refuse a dtype, or a place of its tensor `like`, that no kernel computes on."""
    require(
        dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"the dtype must be float32, float16 or bfloat16; got {dtype}",
    )
    require(
        like.is_cuda or interpreting(),
        f"a tensor is on the {like.device} but Triton compiles for the GPU in this session: "
        "move it there",
    )
    require(
        like.is_cuda or dtype != torch.bfloat16,
        "bfloat16 needs a GPU: Triton's CPU interpreter computes on its bit pattern "
        "and returns wrong numbers. Use float32.",
    )


def check_last_dimension(**tensors: Tensor) -> None:
    """Refuse tensors whose rows are not contiguous."""
    for name, tensor in tensors.items():
        require(
            tensor.numel() == 0 or tensor.stride(-1) == 1,
            f"the last dimension of {name} must be contiguous: call .contiguous()",
        )
