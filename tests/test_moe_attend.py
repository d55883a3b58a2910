"""A language model whose mixtures of experts run on the kernels, interpreted here."""

import pytest
import torch

pytest.importorskip("triton")

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe.attend import PackedExperts, use_kernels
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer

SIZES = dict(n_vocab=31, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_head=4, d_ff=7)


def build(**moe: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SIZES, **moe)).eval()


@torch.no_grad()
def test_a_models_logits_stay_what_they_were():
    model = build(n_experts=5, top_k=2)
    for weight in model.parameters():
        weight.mul_(1.5)  # at 3, plain float32 is as far off as the tolerance on some processors
    tokens = torch.arange(14).view(2, 7)
    want = model.double()(tokens)
    got = use_kernels(model.float())(tokens)
    assert all(isinstance(block.mlp, PackedExperts) for block in model.layers)
    assert_close(got, want)


def test_a_model_that_the_kernels_cannot_run_is_refused_and_left_alone():
    with pytest.raises(BadInput, match="no mixture of experts"):
        use_kernels(build())
    model = build(n_experts=4, top_k=1)
    mixtures = [block.mlp for block in model.layers]
    with pytest.raises(BadInput, match="top_k must be 2 or more; got 1"):
        use_kernels(model)
    assert [block.mlp for block in model.layers] == mixtures
