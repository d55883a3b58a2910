"""The calculator, against transformers' own models on the meta device and published sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe.sizes import PUBLISHED, ModelSize, expected_touched, uniform_visits

MIXTRAL_8X7B, QWEN3_30B_A3B, DEEPSEEK_V3, SWITCH_C = PUBLISHED.values()


def test_published_sizes_come_out():
    mixtral, qwen, switch = map(ModelSize.from_hf, (MIXTRAL_8X7B, QWEN3_30B_A3B, SWITCH_C))
    assert (mixtral.total, mixtral.active) == (46_702_792_704, 12_879_925_248)
    assert (qwen.total, qwen.active) == (30_532_122_624, 3_353_032_704)
    assert round(switch.total / 1e9) == 1571
    deepseek = ModelSize.from_hf(DEEPSEEK_V3)
    assert (round(deepseek.total / 1e9), round(deepseek.active / 1e9)) == (671, 38)


def test_the_guides_160_is_909_for_switch_c_and_its_memory_is_not_reduced_at_all():
    switch = ModelSize.from_hf(SWITCH_C)
    assert round(switch.active / 1e9, 2) == 1.73
    assert round(switch.total / switch.active) == 909
    # with a batch the reading comes back: 2,048 tokens read most of the experts
    assert switch.bytes_read(2048) > 0.6 * 2 * switch.total


def of_transformers(family: str):
    transformers = pytest.importorskip("transformers")
    small = dict(vocab_size=50, hidden_size=24, num_hidden_layers=5, intermediate_size=28)
    heads = dict(num_attention_heads=6, num_key_value_heads=2)
    latent = dict(
        num_attention_heads=6, num_key_value_heads=6, kv_lora_rank=7, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, n_routed_experts=8, n_shared_experts=2,
        num_experts_per_tok=3, moe_intermediate_size=9, first_k_dense_replace=2, n_group=1,
        topk_group=1,
    )  # fmt: skip
    name, options = {
        "mixtral": ("Mixtral", small | heads | dict(num_local_experts=7, num_experts_per_tok=3)),
        "tied": (
            "Mixtral",
            small | heads | dict(num_local_experts=3, num_experts_per_tok=1)
            | dict(tie_word_embeddings=True),
        ),
        "qwen3_moe": (
            "Qwen3Moe",
            small | heads | dict(head_dim=10, num_experts=9, num_experts_per_tok=4)
            | dict(moe_intermediate_size=11, mlp_only_layers=[1], decoder_sparse_step=2),
        ),
        "deepseek_v3": ("DeepseekV3", small | latent | dict(q_lora_rank=11)),
        "deepseek_v2": ("DeepseekV2", small | latent | dict(q_lora_rank=None)),
        "switch": (
            "SwitchTransformers",
            dict(vocab_size=50, d_model=24, d_ff=20, d_kv=5, num_heads=3, num_layers=4)
            | dict(num_decoder_layers=6, num_experts=7, num_sparse_encoder_layers=2)
            | dict(num_sparse_decoder_layers=3),
        ),
    }[family]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**options)
    kind = "ForConditionalGeneration" if family == "switch" else "ForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, name + kind)(config)
    return config.to_dict(), sum(weight.numel() for weight in model.parameters())


FAMILIES = ["mixtral", "tied", "qwen3_moe", "deepseek_v3", "deepseek_v2", "switch"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_total_is_what_transformers_builds(family):
    config, total = of_transformers(family)
    assert ModelSize.from_hf(config).total == total


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 30), st.data())
def test_distinct_experts_follow_the_closed_form(n_experts, n_tokens, data):
    k = data.draw(st.integers(1, n_experts))
    got = expected_touched(uniform_visits(n_experts, k), n_tokens)
    assert abs(got - n_experts * (1 - (1 - k / n_experts) ** n_tokens)) < 1e-9


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_distinct_experts_are_those_of_simulated_tokens(skew):
    """Gumbel top-k: k distinct experts a token, which depend on each other; tokens do not."""
    n_experts, k, n_tokens, n_runs = 8, 2, 6, 4000
    rng = torch.Generator().manual_seed(0)
    liking = skew * torch.linspace(-1, 1, n_experts)

    def draw(*shape):
        gumbel = -torch.empty(*shape, n_experts).exponential_(generator=rng).log()
        return (liking + gumbel).topk(k).indices

    visits = torch.zeros(n_runs, n_experts)
    visits.scatter_(1, draw(n_runs, n_tokens).flatten(1), 1)
    touched = visits.sum(1)
    # from tokens of their own
    probability = draw(200_000).flatten().bincount(minlength=n_experts).double() / 200_000
    spread = float(touched.std()) / n_runs**0.5
    assert abs(float(touched.mean()) - expected_touched(probability, n_tokens)) < 4 * spread
    if skew:
        assert touched.mean() < expected_touched(uniform_visits(n_experts, k), n_tokens) - 0.3


def test_bytes_read_start_near_active_and_end_at_total():
    size = ModelSize.from_hf(MIXTRAL_8X7B)
    assert [round(size.touched(n), 2) for n in (1, 4, 16)] == [2.0, 5.47, 7.92]
    table = size.input_table
    assert size.bytes_read(1) == 2 * (size.active - table + 4096)
    assert abs(size.bytes_read(1000) / (2 * (size.total - table + 1000 * 4096)) - 1) < 1e-9
    assert size.bytes_read(16, itemsize=1.0) * 2 == size.bytes_read(16)


@pytest.mark.parametrize(
    ("said", "config"),
    [
        ("model_type 'llama'", {"model_type": "llama"}),
        ("needs 'num_local_experts'",
         {k: v for k, v in MIXTRAL_8X7B.items() if k != "num_local_experts"}),
        ("whole number 'vocab_size'", MIXTRAL_8X7B | {"vocab_size": None}),
        ("attention_bias", QWEN3_30B_A3B | {"attention_bias": True}),
        ("gated", SWITCH_C | {"is_gated_act": True}),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_counted_are_refused(said, config):
    with pytest.raises(BadInput, match=said):
        ModelSize.from_hf(config)
    with pytest.raises(BadInput, match="k must lie"):
        uniform_visits(4, 5)
    with pytest.raises(BadInput, match="each in"):
        expected_touched(torch.full((3,), 1.5), 2)
