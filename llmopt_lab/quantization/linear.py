"""Linear layers that hold codes: 4-bit weights, and int8 weights with int8 activations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.quantization.block_formats import (
    dequantize_blocks,
    pack_blocks,
    unpack_blocks,
)
from llmopt_lab.quantization.records import BlockCoded, Quantized
from llmopt_lab.quantization.reference import dequantize, pack_int4, quantize_rows, unpack_int4


class CodedLinear(nn.Module):
    """What both layers share: codes and scales in buffers, a bias, and another way to multiply.

    `multiply`, if set, is called with x instead of the product here; a GPU run sets it to a kernel
    that never writes the float weight (attend.py, `use_kernels`).
    """

    def __init__(self, q: Quantized, bias: Tensor | None = None):
        super().__init__()
        require(
            bias is None or bias.shape == (len(q.codes),),
            f"bias must be ({len(q.codes)},), one an output; got "
            f"{None if bias is None else tuple(bias.shape)}",
        )
        self.out_features, self.in_features = q.codes.shape
        self.bits, self.group_size = q.bits, q.group_size
        self.register_buffer("packed", pack_int4(q.codes) if q.bits <= 4 else q.codes)
        self.register_buffer("scales", q.scales)
        self.register_buffer("zeros", q.zeros)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.multiply: Callable[[Tensor], Tensor] | None = None

    @property
    def quantized(self) -> Quantized:
        """Codes, one a byte, and scales.

        Raises:
            BadInput: `use_kernels(.., keep_codes=False)` dropped them.
        """
        require(
            self.packed is not None,
            "the codes are in the kernel's layout only: use_kernels(model) keeps both",
        )
        codes = unpack_int4(self.packed, self.in_features) if self.bits <= 4 else self.packed
        return Quantized(codes, self.scales, self.zeros, self.bits, self.group_size)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, (out_features, in_features)."""
        return dequantize(self.quantized)

    @property
    def nbytes(self) -> int:
        """Bytes held: of codes, scales, zero points and bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x) if self.multiply is None else self.multiply(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


class QuantizedLinear(CodedLinear):
    """Weight-only: the codes are dequantised at every call, and multiplied in x's dtype.

    Args:
        q: codes of up to 4 bits are held two a byte, wider ones one a byte.
        bias: (out_features,).

    Cost: the float weight is written and read at every call, so on its own this saves memory at
    rest and no time. A kernel that dequantises in registers reads the codes only.
    """

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class W8A8Linear(CodedLinear):
    """int8 weights times int8 activations: scale of the token * scale of the row * their int32 sum.

    Every token (row of x) gets its scale at run time. Source: Xiao et al. 2022, SmoothQuant O1
    (https://arxiv.org/abs/2211.10438).

    Raises:
        BadInput: the weight is not symmetric int8 with one scale a row; at a call, NaN or infinity.
    """

    def __init__(self, q: Quantized, bias: Tensor | None = None):
        require(
            q.bits == 8 and q.zeros is None and q.scales.shape[1] == 1,
            "int8 products need symmetric 8-bit weights with one scale a row: a scale that changes "
            "inside a row cannot leave the int32 sum",
        )
        super().__init__(q, bias)

    def product(self, x: Tensor) -> Tensor:
        codes, scales = quantize_rows(x)
        total = torch._int_mm(codes.view(-1, self.in_features), self.packed.T)  # int32, exact
        return (total.view(*x.shape[:-1], -1) * scales * self.scales[:, 0]).to(x.dtype)


class BlockLinear(nn.Module):
    """Weight-only in MXFP4, NVFP4 or NF4: looked up at every call, and multiplied in x's dtype.

    Codes are held two a byte, scales as the format has them. There is no kernel for it here: e2m1
    is multiplied by the tensor cores of Blackwell GPUs, which an H100 does not have.
    """

    def __init__(self, q: BlockCoded, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = q.codes.shape
        self.kind = q.kind
        self.register_buffer("packed", pack_blocks(q.codes))
        self.register_buffer("scales", q.scales)
        self.register_buffer("second", q.second)
        self.register_buffer("mean", q.mean)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def quantized(self) -> BlockCoded:
        """Codes, one a byte, and scales."""
        codes = unpack_blocks(self.packed, self.in_features)
        return BlockCoded(codes, self.scales, self.second, self.mean, self.kind)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, (out_features, in_features)."""
        return dequantize_blocks(self.quantized)

    @property
    def nbytes(self) -> int:
        """Bytes held: of codes, all scales and bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"
