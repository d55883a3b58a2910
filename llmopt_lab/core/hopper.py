"""What Gluon kernels for Hopper share: how TMA finds the rows of heads."""

import inspect

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton

prepare_triton()

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def jit(fn, **options):
    """gluon.jit of the function itself, which a test's type checker may have wrapped."""
    return gluon.jit(inspect.unwrap(fn), **options)


def tile_layout(rows: int, d_head: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How TMA lays (rows, d_head) of one head into shared memory."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, d_head], element)


def descriptor_of(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA copies (rows, d_head) of one head; rows past the end read as 0 and are not written."""
    d_head = x.shape[3]
    return TensorDescriptor(
        x, list(x.shape), _strides(x), [1, 1, rows, d_head], tile_layout(rows, d_head, x.dtype)
    )


def has_tma_strides(x: Tensor) -> bool:
    """TMA needs the address and every stride in steps of 16 bytes."""
    *strides, last = _strides(x)
    steps = [x.data_ptr(), *(stride * x.itemsize for stride in strides)]
    return last == 1 and all(step % 16 == 0 for step in steps)


def _strides(x: Tensor) -> list[int]:
    """Its strides; those of dimensions of size 1 may be anything, so they become a row's length."""
    sizes = zip(x.shape[:3], x.stride()[:3], strict=True)
    return [stride if n > 1 else x.shape[3] for n, stride in sizes] + [x.stride(3)]
