"""A quantized model as a file that others load: compressed-tensors' pack-quantized format."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import stored_pieces, write_folder
from llmopt_lab.quantization.linear import CodedLinear, QuantizedLinear


def save_pack_quantized(
    model: Transformer,
    folder: str | Path,
    tokenizer_files: Sequence[str | Path] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a model of `quantize_model` in the format that vLLM and transformers load.

    A linear layer becomes weight_packed (rows, ceil(cols * bits / 32)) int32, weight_scale (rows,
    n_groups), weight_shape (2,), and with zero points weight_zero_point, packed along the rows.
    All else is written in `dtype`, scales included: that rounding is all that is lost. To read zero
    points, transformers 5.23 needs quantization_config=CompressedTensorsConfig(dequantize=True).

    Args:
        folder, tokenizer_files: as for `nn.weights.save`.

    Raises:
        BadInput: a block's linear layer is not weight-only quantized, two differ in bits or group
            size, or a group does not divide the columns: the format knows no shorter last group.

    Format: github.com/vllm-project/compressed-tensors, compressors/pack_quantized.
    """
    coded = {
        name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)
    }
    scheme = _scheme(list(coded.values()))
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        if owner in coded and last != "bias":
            continue
        for stored, piece in stored_pieces(name, tensor.detach()).items():
            tensors[stored] = piece.to("cpu", dtype).contiguous()
    for name, module in coded.items():
        for part, tensor in _stored_linear(module, dtype).items():
            tensors[f"model.{name}.{part}"] = tensor.cpu().contiguous()
    config = model.config.to_hf() | {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        },
    }
    write_folder(folder, config, tensors, tokenizer_files)


def _scheme(layers: list[CodedLinear]) -> dict:
    """What all `layers` share, in the format's words."""
    require(
        len(layers) > 0 and all(isinstance(layer, QuantizedLinear) for layer in layers),
        "pack-quantized files hold weight-only codes: quantize_model with rtn, gptq or awq first",
    )
    first = layers[0]
    whole_rows = all(layer.group_size >= layer.in_features for layer in layers)
    for layer in layers:
        require(
            whole_rows or layer.in_features % layer.group_size == 0,
            f"groups of {layer.group_size} do not divide {layer.in_features} columns, as the "
            "format asks: quantize with a group_size that does, or None",
        )
        require(
            (layer.bits, layer.zeros is None) == (first.bits, first.zeros is None)
            and (whole_rows or layer.group_size == first.group_size),
            "all layers must have the same bits, group size and kind of code",
        )
    return {
        "num_bits": first.bits,
        "type": "int",
        "symmetric": first.zeros is None,
        **(
            {"strategy": "channel"}
            if whole_rows
            else {"strategy": "group", "group_size": first.group_size}
        ),
    }


def _stored_linear(module: CodedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    q = module.quantized
    stored = {
        "weight_packed": pack_int32(q.codes, q.bits),
        "weight_scale": q.scales.to(dtype),
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if q.zeros is not None:
        stored["weight_zero_point"] = pack_int32(q.zeros.T, q.bits).T
    return stored


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) in [-2^(bits-1), 2^(bits-1)), `bits` each without gaps, into int32 words.

    A code is stored as code + 2^(bits-1), its lowest bit first: (rows, ceil(n * bits / 32)).
    """
    unsigned = codes.long() + (1 << bits - 1)
    require(
        bool((unsigned >= 0).all() and (unsigned < 1 << bits).all()),
        f"a code or zero point does not fit {bits} bits",
    )
    stream = (unsigned[..., None] >> torch.arange(bits, device=codes.device) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (stream << torch.arange(32, device=codes.device)).sum(-1)  # [0, 2^32)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
