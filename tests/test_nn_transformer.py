"""The Transformer on its own: contracts, positions, refusals. Parity is in test_nn_weights.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn.config import Llama3Scaling, ModelConfig
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables, rotate

SIZES = dict(n_vocab=53, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_head=10, d_ff=34)


def build(seed: int = 0, **switches) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | switches)).double().eval().requires_grad_(False)
    for weight in model.parameters():  # norms and biases too, so that forgetting one shows
        weight.uniform_(-0.6, 0.6)
    return model


def tokens_of(n: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(53, (batch, n), generator=torch.Generator().manual_seed(seed))


def test_a_later_token_does_not_change_an_earlier_logit():
    model, tokens = build(), tokens_of(9)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 53
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = build(), tokens_of(7, batch=3)
    alone = torch.cat([model(row[None]) for row in tokens])
    assert_close(model(tokens), alone)


def test_rope_sees_only_distances():
    model, tokens = build(max_positions=1024).float(), tokens_of(8)
    shifted = model(tokens, torch.arange(8)[None] + 64)
    assert_close(model(tokens), shifted)  # float32, as the angles are in the models' training code
    assert not torch.equal(model(tokens), model(tokens, torch.arange(8)[None] * 2))


def test_rotating_keeps_the_length_and_turns_by_the_position():
    config = ModelConfig(**SIZES)
    cos, sin = rope_tables(config, torch.tensor([[0, 3]]), torch.float64)
    x = torch.ones(1, 1, 2, 10, dtype=torch.float64)
    turned = rotate(x, cos, sin)
    assert_close(turned[0, 0, 0], x[0, 0, 0])
    assert abs(float(turned[0, 0, 1].norm()) - 10**0.5) < 1e-6
    # the pair (0, 5) turns by 3 radians: 1 radian a position at the highest frequency
    angle = torch.atan2(turned[0, 0, 1, 5], turned[0, 0, 1, 0])
    assert abs(float(angle) - (torch.pi / 4 + 3 - 2 * torch.pi)) < 1e-6


def test_last_only_is_the_last_row_of_all_logits():
    model, tokens = build(), tokens_of(5, batch=2)
    assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


def test_attend_gets_the_contract_and_its_result_is_used():
    calls = []

    def watch(q, k, v, *, layer, scale):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), layer, scale))
        return causal_attention(q, k, v, layer=layer, scale=scale)

    model, tokens = build(), tokens_of(5, batch=2)
    assert torch.equal(model(tokens, attend=watch), model(tokens))
    q, kv = (2, 6, 5, 10), (2, 2, 5, 10)
    assert calls == [(q, kv, kv, 0, 10**-0.5), (q, kv, kv, 1, 10**-0.5)]
    blind = model(tokens, attend=lambda q, k, v, *, layer, scale: torch.zeros_like(q))
    assert not torch.equal(blind, model(tokens))


def test_the_constructors_attend_is_used_unless_the_call_names_one():
    config = ModelConfig(**SIZES)
    zero = Transformer(config, attend=lambda q, k, v, *, layer, scale: torch.zeros_like(q))
    tokens = tokens_of(4)
    plain = Transformer(config)
    plain.load_state_dict(zero.state_dict())
    assert not torch.equal(zero(tokens), plain(tokens))
    assert torch.equal(zero(tokens, attend=causal_attention), plain(tokens))


def test_default_attention_is_softmax_over_repeated_kv_heads():
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 7, 4, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 4, generator=rng, dtype=torch.float64)
    scores = 0.3 * q @ k.repeat_interleave(3, dim=1).mT
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -float("inf"))
    want = scores.softmax(-1) @ v.repeat_interleave(3, dim=1)
    assert_close(causal_attention(q, k, v, layer=0, scale=0.3), want)


def test_feed_forward_is_a_factory_that_knows_its_layer():
    class Scale(nn.Module):
        def __init__(self, config, layer):
            super().__init__()
            self.factor = nn.Parameter(torch.full((config.d_model,), float(layer)))

        def forward(self, x):
            return self.factor * x

    model = Transformer(ModelConfig(**SIZES), feed_forward=Scale)
    assert [block.mlp.factor[0].item() for block in model.layers] == [0.0, 1.0]
    assert model(tokens_of(3)).shape == (1, 3, 53)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_parameter_count_is_right(tie_embeddings, qk_norm, bias):
    model = build(tie_embeddings=tie_embeddings, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias)
    assert sum(weight.numel() for weight in model.parameters()) == model.config.n_parameters


def test_bfloat16_stays_near_float32_at_far_positions():
    model, tokens = build(max_positions=8192), tokens_of(6)
    positions = torch.arange(6)[None] + 8001
    exact = model(tokens, positions)
    rough = model.bfloat16()(tokens, positions)
    assert rough.dtype == torch.bfloat16
    # bf16 positions would be whole multiples of 32 here: all six the same
    assert F.cosine_similarity(exact.flatten(), rough.double().flatten(), dim=0) > 0.999


def test_moving_to_half_precision_does_not_round_the_rope_frequencies():
    model = build()
    before = rope_tables(model.config, torch.tensor([[2047]]), torch.float32)
    model.bfloat16()
    after = rope_tables(model.config, torch.tensor([[2047]]), torch.float32)
    assert torch.equal(before[0], after[0])


def test_training_reaches_every_parameter():
    model = build(qkv_bias=True, out_bias=True, qk_norm=True).requires_grad_(True)
    model(tokens_of(5)).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("tokens", "positions", "said"),
    [
        (torch.zeros(4, dtype=torch.int64), None, r"One sequence is tokens\[None\]"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "must not be empty"),
        (torch.zeros(1, 4), None, "int64"),
        (torch.full((1, 4), 53), None, r"tokens must lie in \[0, 53\); got 53"),
        (torch.full((1, 4), -1), None, r"tokens must lie in \[0, 53\); got -1"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), "positions"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.arange(3)[None], "positions"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[16]]), r"positions .* \[0, 16\)"),
        (torch.zeros(1, 17, dtype=torch.int64), None, "16"),
        (torch.zeros(1, 4, dtype=torch.int64, device="meta"), None, "meta"),
    ],
)
def test_bad_tokens_and_positions_are_refused(tokens, positions, said):
    with pytest.raises(BadInput, match=said):
        build(max_positions=16)(tokens, positions)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_kv_heads=4), "multiple of n_kv_heads"),
        (dict(d_head=9), "even"),
        (dict(n_layers=0), "n_layers must be positive"),
        (dict(rms_eps=-1.0), "rms_eps"),
    ],
)
def test_impossible_sizes_are_refused(change, said):
    with pytest.raises(BadInput, match=said):
        ModelConfig(**SIZES | change)


def test_kv_bytes_are_two_tensors_a_layer():
    config = ModelConfig(**SIZES)
    assert config.kv_bytes_per_token(torch.bfloat16) == 2 * 2 * 2 * 10 * 2
    assert config.kv_bytes_per_token(torch.float32) == 2 * config.kv_bytes_per_token(torch.float16)
    assert config.group_size == 3


LLAMA = dict(
    model_type="llama",
    vocab_size=100,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def test_an_old_llama_config_gets_the_familys_defaults():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.n_kv_heads, config.d_head, config.rope_theta) == (4, 12, 10_000.0)
    assert (config.rms_eps, config.tie_embeddings, config.eos) == (1e-6, False, ())


def test_rope_settings_are_read_in_the_old_and_the_new_spelling():
    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    old = ModelConfig.from_hf(LLAMA | dict(rope_theta=5e5, rope_scaling=scaling))
    new = ModelConfig.from_hf(LLAMA | dict(rope_parameters=scaling | dict(rope_theta=5e5)))
    assert old == new
    assert old.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported; .*llama"),
        (dict(model_type=None), "model_type None"),
        (dict(hidden_size=None), "'hidden_size'"),
        (dict(hidden_act="gelu"), "hidden_act .*'gelu'"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(quantization_config={"bits": 4}), "quantized"),
        (dict(layer_types=["linear_attention"]), "linear_attention"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "'yarn'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_a_config_that_means_another_model_is_refused(change, said):
    with pytest.raises(BadInput, match=said):
        ModelConfig.from_hf(LLAMA | change)
