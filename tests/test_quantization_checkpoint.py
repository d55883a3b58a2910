"""Quantized checkpoints: what is written here, transformers loads through compressed-tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn import ModelConfig, Transformer, load
from llmopt_lab.quantization.checkpoint import pack_int32, save_pack_quantized
from llmopt_lab.quantization.linear import CodedLinear
from llmopt_lab.quantization.model import quantize_model


@pytest.fixture(scope="module")
def lab_target() -> Transformer:
    return load("lab-target", device="cpu").model


def with_rounded_scales(model: Transformer, dtype: torch.dtype) -> Transformer:
    for module in model.modules():
        if isinstance(module, CodedLinear):
            module.scales = module.scales.to(dtype).float()
    return model


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4, "group_size": 64},
        {"bits": 4, "group_size": 32, "symmetric": False},
        {"bits": 3, "group_size": 64, "symmetric": False},
        {"bits": 8, "group_size": None},
    ],
)
@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
def test_transformers_loads_a_quantized_model_and_gives_the_same_logits(how, lab_target, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    ours = quantize_model(lab_target, progress=False, **how)
    save_pack_quantized(ours, tmp_path, dtype=torch.float32)
    # transformers 5.23 cannot keep packed zero points packed: it must dequantize as it loads
    zero_points = not how.get("symmetric", True)
    loading = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, **(loading if zero_points else {})
    )
    tokens = torch.arange(60).view(2, 30) * 37 % lab_target.config.n_vocab
    with torch.no_grad():
        assert_close(theirs(tokens).logits, ours(tokens))
        assert (ours(tokens) - lab_target(tokens)).abs().max() > 0.01


def test_a_bfloat16_file_loses_no_more_than_the_rounding_of_its_scales(lab_target, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = quantize_model(lab_target, bits=4, group_size=64, progress=False)
    save_pack_quantized(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(60).view(2, 30) * 37 % lab_target.config.n_vocab
    with torch.no_grad():
        # lab-target's own weights are bfloat16 numbers: only the scales are rounded
        assert_close(theirs(tokens).logits, with_rounded_scales(ours, torch.bfloat16)(tokens))
    stored = load_file(tmp_path / "model.safetensors")
    shape = stored["model.layers.0.mlp.down_proj.weight_packed"].shape
    assert shape == (lab_target.config.d_model, lab_target.config.d_ff * 4 // 32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_without_gaps_as_compressed_tensors_unpacks_them(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    low = -(1 << bits - 1)
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, -low, (5, 37), generator=rng, dtype=torch.int8)
    packed = pack_int32(codes, bits)
    assert packed.shape == (5, -(-37 * bits // 32))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    with pytest.raises(BadInput, match=f"does not fit {bits} bits"):
        pack_int32(codes.int() - low + 1, bits)


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(lab_target, tmp_path):
    mixed = quantize_model(lab_target, bits=4, group_size=64, progress=False)
    other = quantize_model(lab_target, bits=3, group_size=64, progress=False)
    mixed.layers[1] = other.layers[1]
    config = {"n_vocab": 9, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    ragged = Transformer(ModelConfig(**config, d_head=4, d_ff=12)).requires_grad_(False)
    for model, message in (
        (lab_target, "weight-only codes"),
        (quantize_model(lab_target, method="w8a8", bits=8, progress=False), "weight-only codes"),
        (mixed, "the same bits"),
        (quantize_model(ragged, group_size=8, progress=False), "groups of 8 do not divide 12"),
    ):
        with pytest.raises(BadInput, match=message):
            save_pack_quantized(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_files_name_the_format(lab_target, tmp_path):
    save_pack_quantized(quantize_model(lab_target, bits=4, progress=False), tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["format"] == "pack-quantized" and found["ignore"] == ["lm_head"]
    weights = found["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
