"""A quantized model on the Triton kernels, which never write the float weight.

model = use_kernels(quantize_model(model, bits=4, group_size=128))
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.quantization.linear import CodedLinear, W8A8Linear


def use_kernels(model: nn.Module, *, keep_codes: bool = True) -> nn.Module:
    """Let every quantized layer of `model` multiply with its kernel from now on; returns `model`.

    Weight-only layers take `w4a16_linear`, W8A8Linear takes `w8a8_linear`.

    Args:
        keep_codes: False drops 4-bit codes and scales in the layout of `pack_int4`: such a layer
            can multiply, and nothing else; it cannot be saved or dequantized any more.

    Raises:
        BadInput: no layer holds integer codes; weight-only codes of more than 4 bits; groups that
            are no multiple of 32 columns and not whole rows. No layer is changed then.

    Cost: with `keep_codes`, 4-bit codes are held a second time, in the kernel's layout.
    """
    layers = [module for module in model.modules() if isinstance(module, CodedLinear)]
    require(
        len(layers) > 0,
        "no layer holds integer codes: quantize_model first, and not mxfp4, nvfp4 or nf4",
    )
    products = [_kernel_of(layer) for layer in layers]
    for layer, product in zip(layers, products, strict=True):
        layer.multiply = product
        if not keep_codes and not isinstance(layer, W8A8Linear):
            layer.packed = layer.scales = layer.zeros = None
    return model


def _kernel_of(layer: CodedLinear) -> Callable[[Tensor], Tensor]:
    from llmopt_lab.quantization.kernels import pack_for_kernel, w4a16_linear, w8a8_linear

    if isinstance(layer, W8A8Linear):
        return partial(w8a8_linear, w_int8=layer.packed, w_scale=layer.scales)
    require(
        layer.bits <= 4,
        f"w4a16_linear takes codes of up to 4 bits; got {layer.bits}. Leave this model as it is.",
    )
    packed, scales, zeros = pack_for_kernel(layer.quantized)
    return partial(w4a16_linear, packed=packed, scales=scales, zeros=zeros)
