"""The KV cache, sampling and decoding, against the full forward pass and the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import KVCache, NextToken, generate, sample, to_probabilities
from llmopt_lab.nn.transformer import Transformer

CONFIG = ModelConfig(
    n_vocab=41,
    d_model=24,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=10,
    d_ff=34,
    max_positions=64,
)


def build(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG).double().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.uniform_(-0.6, 0.6)
    return model


def tokens_of(n: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(41, (batch, n), generator=torch.Generator().manual_seed(seed))


def cache_of(max_tokens: int, batch: int = 1) -> KVCache:
    return KVCache(CONFIG, batch, max_tokens=max_tokens, dtype=torch.float64)


def feed(model: Transformer, cache: KVCache, tokens: torch.Tensor, pieces: list[int]):
    """Logits (batch, n, n_vocab) of `tokens`, given to the cache piece by piece."""
    return torch.cat(
        [
            model(piece, cache.next_positions(piece.shape[1]), attend=cache)
            for piece in tokens.split(pieces, dim=1)
        ],
        dim=1,
    )


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 7], [5, 1, 1, 3, 1], [1, 10], [10, 1]])
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_pieces_equal_one_full_forward_pass(pieces, batch):
    model, tokens = build(), tokens_of(11, batch)
    cache = cache_of(11, batch)
    assert_close(feed(model, cache, tokens, pieces), model(tokens))
    assert cache.length == 11


def test_truncating_forgets_exactly_what_came_after():
    model, tokens, other = build(), tokens_of(10), tokens_of(4, seed=7)
    cache = cache_of(12)
    feed(model, cache, tokens, [10])
    cache.truncate(6)
    assert cache.length == 6
    both = torch.cat([tokens[:, :6], other], dim=1)
    assert_close(feed(model, cache, other, [3, 1]), model(both)[:, 6:])


def test_a_full_cache_refuses_and_keeps_what_it_has():
    model, tokens = build(), tokens_of(6)
    cache = cache_of(6)
    feed(model, cache, tokens[:, :5], [5])
    with pytest.raises(BadInput, match="room for 6 tokens and holds 5; got 2 more"):
        model(tokens[:, :2], cache.next_positions(2), attend=cache)
    assert cache.length == 5
    last = model(tokens[:, 5:], cache.next_positions(1), attend=cache)
    assert_close(last, model(tokens)[:, 5:])


def test_a_pass_that_fails_half_way_leaves_the_cache_usable():
    model, tokens = build(), tokens_of(6)
    cache = cache_of(6)
    feed(model, cache, tokens[:, :3], [3])

    def fails_in_layer_1(q, k, v, *, layer, scale):
        if layer == 1:
            raise RuntimeError("interrupted")
        return cache(q, k, v, layer=layer, scale=scale)

    with pytest.raises(RuntimeError, match="interrupted"):
        model(tokens_of(3, seed=9), cache.next_positions(3), attend=fails_in_layer_1)
    assert_close(feed(model, cache, tokens[:, 3:], [3]), model(tokens)[:, 3:])


def test_the_cache_takes_the_bytes_of_the_formula():
    cache = KVCache(CONFIG, batch=3, max_tokens=17, dtype=torch.bfloat16)
    want = 3 * 17 * CONFIG.kv_bytes_per_token(torch.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == want


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KVCache(CONFIG, max_tokens=0), "max_tokens must be positive"),
        (lambda: KVCache(CONFIG, 0, max_tokens=4), "batch must be positive"),
        (lambda: cache_of(4).truncate(1), "got 1"),
        (lambda: cache_of(4).truncate(-1), "got -1"),
        (lambda: build()(tokens_of(3, batch=2), attend=cache_of(4)), "1 rows of 2 KV heads"),
        (lambda: build().float()(tokens_of(3), attend=cache_of(4)), "float64 on cpu.*float32"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(make, said):
    with pytest.raises(BadInput, match=said):
        make()


def full_greedy(model: Transformer, prompt: torch.Tensor, n_new: int) -> torch.Tensor:
    tokens = prompt
    for _ in range(n_new):
        tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
    return tokens


def test_greedy_decoding_equals_recomputing_everything():
    model, prompt = build(), tokens_of(5)[0]
    want = full_greedy(model, prompt, 20)
    assert len(set(want[5:].tolist())) > 3  # not one token forever
    assert torch.equal(generate(model, prompt, 20), want)


def test_generation_stops_after_any_end_token_and_keeps_it():
    model, prompt = build(), tokens_of(5)[0]
    text = full_greedy(model, prompt, 20).tolist()
    end = text[5 + 6]
    first = text.index(end, 5)
    assert generate(model, prompt, 20, eos=end).tolist() == text[: first + 1]
    assert generate(model, prompt, 20, eos=(999, end)).tolist() == text[: first + 1]
    assert generate(model, prompt, 20, eos=()).tolist() == text


def test_every_new_token_is_announced_in_order():
    model, prompt, heard = build(), tokens_of(5)[0], []
    out = generate(model, prompt, 7, on_token=heard.append)
    assert heard == out[5:].tolist()


def test_one_seed_gives_one_text_and_another_seed_another():
    model, prompt = build(), tokens_of(5)[0]

    def text(seed: int) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 20, temperature=1.0, rng=rng).tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_generation_does_not_touch_the_global_generator():
    model, prompt = build(), tokens_of(5)[0]
    before = torch.get_rng_state()
    generate(model, prompt, 3, temperature=1.0, rng=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_takes_a_cache_of_the_callers():
    model, prompt = build(), tokens_of(5)[0]
    cache = cache_of(40)
    assert torch.equal(generate(model, prompt, 8, cache=cache), generate(model, prompt, 8))
    assert cache.length == 5 + 8 - 1  # the last token was never fed


def test_generation_refuses_a_cache_that_holds_another_text():
    model, cache = build(), cache_of(20)
    feed(model, cache, tokens_of(2), [2])
    with pytest.raises(BadInput, match="holds 2 tokens"):
        generate(model, tokens_of(5)[0], 3, cache=cache)


def test_no_new_tokens_gives_the_prompt_back():
    prompt = tokens_of(5)[0]
    assert torch.equal(generate(build(), prompt, 0), prompt)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(prompt_tokens=torch.zeros(1, 3, dtype=torch.int64)), r"\(n,\) int64"),
        (dict(prompt_tokens=torch.zeros(0, dtype=torch.int64)), "n >= 1"),
        (dict(prompt_tokens=torch.zeros(3)), "int64"),
        (dict(n_new=-1), "n_new"),
        (dict(n_new=62), "64 positions; got a prompt of 3 and 62"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=0.5, rng=None), "rng"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
    ],
)
def test_a_generation_that_cannot_work_is_refused_before_any_work(change, said):
    class Untouched(Transformer):
        def forward(self, *args, **kwargs):
            raise AssertionError("the model ran")

    arguments = dict(prompt_tokens=torch.tensor([1, 2, 3]), n_new=4) | change
    with pytest.raises(BadInput, match=said):
        generate(Untouched(CONFIG), **arguments)


# probabilities 0.4, 0.3, 0.2, 0.1 in another order
P = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (dict(), [0.2, 0.4, 0.1, 0.3]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
        (dict(temperature=0.5), [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        (dict(temperature=1e-300), [0, 1, 0, 0]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=3), [2 / 9, 4 / 9, 0, 3 / 9]),
        (dict(top_k=99), [0.2, 0.4, 0.1, 0.3]),
        (dict(top_p=0.05), [0, 1, 0, 0]),
        (dict(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.71), [2 / 9, 4 / 9, 0, 3 / 9]),
        (dict(top_p=1.0), [0.2, 0.4, 0.1, 0.3]),
        # after top_k the mass is 4/7, 3/7: the nucleus of 0.5 is the first alone
        (dict(top_k=2, top_p=0.5), [0, 1, 0, 0]),
    ],
)
def test_the_sampled_distribution_is_the_defined_one(settings, want):
    got = to_probabilities(P.log(), **settings)
    assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_a_nucleus_ends_when_its_mass_is_reached():
    assert to_probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


def test_a_tie_goes_to_the_first_token():
    logits = torch.tensor([1.0, 3.0, 3.0])
    assert int(sample(logits)) == 1
    assert to_probabilities(logits, temperature=0.0).tolist() == [0, 1, 0]


def test_draws_follow_the_distribution():
    n = 20_000
    rng = torch.Generator().manual_seed(0)
    drawn = sample(P.log().expand(n, 4), temperature=1.0, top_k=3, rng=rng)
    share = torch.bincount(drawn, minlength=4) / n
    want = torch.tensor([2 / 9, 4 / 9, 0, 3 / 9])
    assert share[2] == 0
    assert ((share - want).abs() <= 4 * (want * (1 - want) / n).sqrt()).all()


def test_sampling_keeps_the_leading_shape():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits), logits.argmax(-1))
    rng = torch.Generator().manual_seed(0)
    assert sample(logits, temperature=1.0, rng=rng).shape == (2, 3)


@settings(max_examples=60, deadline=None)
@given(
    n_vocab=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5.0),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_a_nucleus_is_a_smallest_set_of_the_most_probable(n_vocab, seed, temperature, top_k, top_p):
    logits = torch.randn(
        n_vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    p = to_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert abs(float(p.sum()) - 1) < 1e-12
    kept = p > 0
    n_kept = int(kept.sum())
    assert 1 <= n_kept <= min(n_vocab, top_k or n_vocab)
    if n_kept < n_vocab:
        assert logits[kept].min() >= logits[~kept].max()
    if top_p is not None:
        before = to_probabilities(logits, temperature=temperature, top_k=top_k)
        assert before[kept].sum() >= top_p - 1e-12
        assert n_kept == 1 or before[kept].sum() - before[kept].min() < top_p + 1e-12


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (torch.tensor([0.0, float("nan")]), "NaN"),
        (torch.tensor([0.0, float("inf")]), "finite maximum"),
        (torch.full((3,), -float("inf")), "finite maximum"),
        (torch.zeros(2, 0), "n_vocab"),
        (torch.tensor([1, 2]), "floating point"),
    ],
)
def test_logits_that_are_none_are_refused(logits, said):
    with pytest.raises(BadInput, match=said):
        sample(logits)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(0, 3), min_size=1, max_size=5)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None)
def test_next_token_equals_the_full_forward_pass_however_the_text_changes(edits):
    model, text = build(), []
    next_token = NextToken(model, max_tokens=CONFIG.max_positions)
    for keep, new in edits:
        text = text[:keep] + new
        assert_close(next_token(text), model(torch.tensor([text]))[0, -1].softmax(-1))


def test_next_token_computes_only_what_the_texts_do_not_share():
    model, passes = build(), []
    model.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    next_token = NextToken(model, max_tokens=20)
    for text in ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6], [5, 6, 9, 8, 7], [1, 6, 9, 8, 7]):
        next_token(text)
    assert passes == [3, 1, 1, 1, 3, 5]


def test_next_token_takes_a_tensor_and_leads_generate_where_it_goes_greedily():
    model, prompt = build(), tokens_of(5)[0]
    next_token, text = NextToken(model, max_tokens=25), prompt
    for _ in range(20):
        text = torch.cat([text, next_token(text).argmax(-1, keepdim=True)])
    assert torch.equal(text, generate(model, prompt, 20))


def test_next_token_refuses_and_goes_on_as_if_nothing_had_been_asked():
    model = build()
    next_token = NextToken(model, max_tokens=4)
    want = next_token([1, 2, 3])
    for tokens, says in (
        ([], "no token to go on from"),
        ([1] * 5, "the text has 5 tokens, and there is room for 4"),
        ([1, 2, 41], r"must lie in \[0, 41\)"),
    ):
        with pytest.raises(BadInput, match=says):
            next_token(tokens)
    assert_close(next_token([1, 2, 3]), want)
    with pytest.raises(BadInput, match="knows 64 positions; got max_tokens 65"):
        NextToken(model, max_tokens=65)
