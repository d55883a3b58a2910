"""The mixture of experts, against a loop over tokens and choices; its balance loss, by hand."""

import pytest
import torch
import torch.nn.functional as F

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import MixtureOfExperts, SwiGLU, balance_loss, expert_load
from llmopt_lab.nn.transformer import Transformer

SIZES = dict(n_vocab=31, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_head=4, d_ff=7)


def build(n_experts: int, top_k: int, seed: int = 0) -> MixtureOfExperts:
    config = ModelConfig(**SIZES, n_experts=n_experts, top_k=top_k)
    torch.manual_seed(seed)
    mixture = MixtureOfExperts(config, 0).double().eval()
    for weight in mixture.parameters():
        weight.data.uniform_(-0.9, 0.9)
    return mixture


def token_by_token(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition: for one token after the other, its best experts one after the other."""
    out = torch.zeros_like(x)
    for place in range(x.shape[0] * x.shape[1]):
        row, column = divmod(place, x.shape[1])
        token = x[row, column]
        scores = [float(router @ token) for router in mixture.gate.weight.detach()]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: mixture.top_k]
        shares = torch.tensor([scores[e] for e in best], dtype=torch.float64).softmax(0)
        for share, e in zip(shares, best, strict=True):
            hidden = F.silu(mixture.gate_proj[e] @ token) * (mixture.up_proj[e] @ token)
            out[row, column] += share * (mixture.down_proj[e] @ hidden)
    return out


@pytest.mark.parametrize(("n_experts", "top_k"), [(5, 2), (8, 2), (4, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(n_experts, top_k, shape, training):
    mixture = build(n_experts, top_k).train(training)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 12, generator=rng, dtype=torch.float64)
    assert_close(mixture(x), token_by_token(mixture, x))


def test_training_and_inference_have_the_same_gradients():
    mixture = build(5, 2)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for training in (True, False):
        mixture.train(training).zero_grad()
        mixture(x).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in mixture.parameters()])
    for name, one, other in zip(dict(mixture.named_parameters()), *gradients, strict=True):
        assert_close(one, other, name)


def test_a_mixture_of_one_expert_is_swiglu():
    mixture = build(1, 1)
    plain = SwiGLU(ModelConfig(**SIZES), 0).double()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(plain, name).weight.data.copy_(getattr(mixture, name)[0])
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(mixture(x), plain(x))


def test_the_balance_loss_is_one_when_even_and_n_when_all_go_one_way():
    even = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    experts = torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)
    assert_close(balance_loss(even, experts), torch.tensor(1.0, dtype=torch.float64))
    one_way = torch.tensor([[1.0, 0.0, 0.0]] * 6, dtype=torch.float64)
    all_first = torch.zeros(6, 1, dtype=torch.int64)
    assert_close(balance_loss(one_way, all_first), torch.tensor(3.0, dtype=torch.float64))


def test_the_balance_loss_is_that_of_transformers_over_top_k():
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))  # theirs is float32
    probabilities = logits.softmax(-1)
    theirs = transformers.load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    assert_close(balance_loss(probabilities, probabilities.topk(2).indices) * 2, theirs)


def test_the_balance_loss_pushes_the_router_away_from_the_busy_expert():
    mixture = build(4, 1).train()
    with torch.no_grad():
        mixture.gate.weight.mul_(0.01)[2] = 0.5
    x = torch.rand(1, 50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixture(x)
    before = float(mixture.balance.detach())
    mixture.balance.backward()
    with torch.no_grad():
        mixture.gate.weight -= 0.1 * mixture.gate.weight.grad
    mixture(x)
    assert float(mixture.balance.detach()) < before
    assert mixture.gate_proj.grad is None


def test_the_load_counts_visits():
    experts = torch.tensor([[[0, 3], [3, 1]], [[3, 0], [1, 3]]])
    assert expert_load(experts, 5).tolist() == [0.25, 0.25, 0.0, 0.5, 0.0]


def test_a_config_with_experts_builds_them_unless_another_layer_is_asked_for():
    config = ModelConfig(**SIZES, n_experts=4, top_k=2)
    assert isinstance(Transformer(config).layers[1].mlp, MixtureOfExperts)
    assert isinstance(Transformer(config, feed_forward=SwiGLU).layers[1].mlp, SwiGLU)
    assert isinstance(Transformer(ModelConfig(**SIZES)).layers[1].mlp, SwiGLU)


def test_all_and_active_parameters_are_counted():
    config = ModelConfig(**SIZES, n_experts=4, top_k=2)
    total = sum(weight.numel() for weight in Transformer(config).parameters())
    assert config.n_parameters == total
    assert config.n_active_parameters == total - 2 * 2 * 3 * 12 * 7  # two experts of two layers
    dense = ModelConfig(**SIZES)
    assert dense.n_active_parameters == dense.n_parameters


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (dict(n_experts=4), "top_k"),
        (dict(n_experts=4, top_k=5), r"\[1, n_experts = 4\]; got 5"),
        (dict(n_experts=4, top_k=0), "got 0"),
        (dict(n_experts=0, top_k=1), "n_experts must be positive"),
        (dict(top_k=2), "no experts"),
    ],
)
def test_experts_that_make_no_sense_are_refused(experts, said):
    with pytest.raises(BadInput, match=said):
        ModelConfig(**SIZES, **experts)
