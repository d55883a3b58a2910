"""Patterns inside the Transformer: what each layer may see, and what no token may ever see."""

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn import ModelConfig, Transformer
from llmopt_lab.sparse_attention import sparse_attention
from llmopt_lab.sparse_attention.attend import PatternAttend, TopBlocksAttend, attend
from llmopt_lab.sparse_attention.block_lists import lists_of
from llmopt_lab.sparse_attention.cases import Sizes, attention_inputs, patterns
from llmopt_lab.sparse_attention.patterns import Causal, SlidingWindow, longformer, streaming
from llmopt_lab.sparse_attention.select import top_blocks

CONFIG = ModelConfig(37, 32, 4, 4, 2, 8, 32, max_positions=64)


def model() -> Transformer:
    torch.manual_seed(0)
    built = Transformer(CONFIG).double()
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return built.requires_grad_(False)


def text(n: int) -> torch.Tensor:
    return torch.randint(37, (1, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(patterns(1)))
def test_it_equals_the_reference_on_a_cpu(name):
    q, k, v = attention_inputs(Sizes(23, 31, 8, 8, batch=2, n_heads=4, n_kv_heads=2))
    pattern = patterns(31)[name]
    want = sparse_attention(q, k, v, pattern, scale=0.3)
    assert_close(attend(q, k, v, pattern, scale=0.3), want)


def test_chosen_blocks_equal_the_reference_on_a_cpu():
    q, k, v = attention_inputs(Sizes(31, 31, 8, 8, batch=2, n_heads=4, n_kv_heads=2))
    always = streaming(4, 1)
    chosen = TopBlocksAttend(2, 5, always=always)
    lists = top_blocks(q, k, Causal(), n_blocks=2, tile_q=5, tile_k=5, always=always)
    want = sparse_attention(q, k, v, Causal(), lists=lists, scale=0.3)
    assert_close(chosen(q, k, v, layer=0, scale=0.3), want)


def test_lists_that_all_heads_share_equal_the_reference_on_a_cpu():
    q, k, v = attention_inputs(Sizes(23, 23, 8, 8, batch=2, n_heads=4, n_kv_heads=2))
    live = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    lists = lists_of(live, torch.zeros_like(live), 23, 23, 5, 5)
    want = sparse_attention(q, k, v, Causal(), lists=lists, scale=0.3)
    assert_close(attend(q, k, v, Causal(), scale=0.3, lists=lists), want)


def test_a_causal_pattern_gives_the_models_own_logits():
    lm, tokens = model(), text(30)
    assert_close(lm(tokens, attend=PatternAttend(Causal())), lm(tokens))
    assert_close(lm(tokens, attend=TopBlocksAttend(99, 7)), lm(tokens))


def first_token_that_counts(lm, attend, n: int) -> int:
    """The oldest token whose change moves the last logits."""
    tokens = text(n)
    before = lm(tokens, attend=attend)[0, -1]
    for i in range(n):
        other = tokens.clone()
        other[0, i] = (other[0, i] + 1) % 37
        if not torch.equal(lm(other, attend=attend)[0, -1], before):
            return i
    return n


def test_every_layer_reaches_a_window_further():
    lm, n = model(), 40
    assert first_token_that_counts(lm, PatternAttend(SlidingWindow(5)), n) == n - 1 - 4 * 4
    assert first_token_that_counts(lm, PatternAttend(SlidingWindow(1)), n) == n - 1
    interleaved = PatternAttend(SlidingWindow(5), SlidingWindow(5), SlidingWindow(5), Causal())
    assert first_token_that_counts(lm, interleaved, n) == 0


def test_layers_take_turns_with_the_patterns():
    seen = []

    class Spy(Causal):
        def mask(self, n_q, n_k, *, device="cpu"):
            seen.append(self)
            return super().mask(n_q, n_k, device=device)

    a, b = Spy(), SlidingWindow(3)
    model()(text(9), attend=PatternAttend(a, b))
    assert seen == [a]  # asked for once, and kept for the other layers


def test_a_symmetric_pattern_leaks_the_future_and_its_causal_part_does_not():
    lm, tokens = model(), text(20)
    other = tokens.clone()
    other[0, 15] = (other[0, 15] + 1) % 37
    moved = {}
    for name, pattern in (
        ("leaks", longformer(4, (0,))), ("safe", longformer(4, (0,)) & Causal())
    ):  # fmt: skip
        attend = PatternAttend(pattern)
        change = (lm(tokens, attend=attend) != lm(other, attend=attend)).any(-1)[0]
        moved[name] = int(change.nonzero()[0])
    assert moved["leaks"] < 15 <= moved["safe"]


def test_no_pattern_is_refused():
    with pytest.raises(BadInput, match="one pattern at least"):
        PatternAttend()


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_gives_what_the_cpu_gives():
    lm, tokens = model().float(), text(50)
    for each in (PatternAttend(streaming(9, 2), Causal()), TopBlocksAttend(2, 16)):
        want = lm(tokens, attend=each)
        got = lm.cuda()(tokens.cuda(), attend=each)
        assert_close(got.cpu(), want)
        lm.cpu()
