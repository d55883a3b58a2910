"""A language model served through the paged cache says exactly what it says without it."""

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load
from llmopt_lab.paged_attention import PagedCache, Request, admit
from llmopt_lab.paged_attention.attend import PagedAttend, cache_config, serve
from llmopt_lab.paged_attention.records import Admitted, CopiedOnWrite, Preempted, Stepped
from llmopt_lab.paged_attention.view import serving_frames

TINY = ModelConfig.from_hf(
    {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        "intermediate_size": 40, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(TINY).double().eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


def cache_of(model: Transformer, n_blocks: int, block_size: int) -> PagedCache:
    config = cache_config(model.config, n_blocks=n_blocks, block_size=block_size, dtype=model.dtype)
    return PagedCache(config)


STEM = [7, 3, 9, 11, 2, 5, 1, 30, 21, 4]
REQUESTS = [("A", [*STEM, 8], 9), ("B", [*STEM, 6, 6, 6], 12), ("C", [40], 14), ("D", STEM, 6)]


def alone(model, prompt, n_new, **kw) -> list[int]:
    return generate(model, torch.tensor(prompt), n_new, **kw)[len(prompt) :].tolist()


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("tight", [False, True])
def test_served_text_equals_the_unpaged_models(tiny, block_size, tight):
    longest = max(len(prompt) + n_new for _, prompt, n_new in REQUESTS)
    n_blocks = -(-longest // block_size) + 1 if tight else 200
    cache = cache_of(tiny, n_blocks, block_size)
    with recording(Preempted, Admitted) as trace:
        texts = serve(tiny, cache, [Request(*r) for r in REQUESTS], max_step_tokens=16)
    assert bool(trace.of(Preempted)) == tight
    for name, prompt, n_new in REQUESTS:
        assert texts[name] == alone(tiny, prompt, n_new), name
    assert not cache.tables and cache.pool.n_available == n_blocks


def test_samples_share_the_prompt_and_equal_independent_runs(tiny):
    prompt = [*STEM, 17, 18, 19]  # ends inside a block
    cache = cache_of(tiny, 60, 4)
    request = Request("A", prompt, 8, n_samples=4, temperature=0.9, seed=5)
    with recording(CopiedOnWrite) as trace:
        texts = serve(tiny, cache, [request])
    assert len(trace.of(CopiedOnWrite)) == 3, "four owners of one block: three must copy"
    for i, name in enumerate(["A", "A#1", "A#2", "A#3"]):
        rng = torch.Generator().manual_seed(5 + i)
        assert texts[name] == alone(tiny, prompt, 8, temperature=0.9, rng=rng), name
    assert len(set(map(tuple, texts.values()))) > 1


def test_a_preempted_sample_goes_on_with_its_own_draws(tiny):
    requests = lambda: [  # noqa: E731
        Request(n, [ord(n) % 50, 3, 4], 10, n_samples=2, temperature=1.0, seed=ord(n)) for n in "AB"
    ]
    roomy = serve(tiny, cache_of(tiny, 100, 2), requests())
    with recording(Preempted) as trace:
        tight = serve(tiny, cache_of(tiny, 13, 2), requests())
    assert trace.of(Preempted) and tight == roomy


def test_a_second_request_computes_only_what_the_prefix_cache_lacks(tiny):
    cache = cache_of(tiny, 50, 4)
    serve(tiny, cache, [Request("A", [*STEM, 8], 3)])
    with recording(Stepped) as trace:
        texts = serve(tiny, cache, [Request("B", [*STEM, 9], 3)])
    assert trace.of(Stepped)[0].work == (("B", 3),), "11 tokens, 8 of them in two cached blocks"
    assert texts["B"] == alone(tiny, [*STEM, 9], 3)


def test_salt_keeps_tenants_apart(tiny):
    cache = cache_of(tiny, 50, 4)
    serve(tiny, cache, [Request("A", STEM, 2)], salt="one")
    with recording(Admitted) as trace:
        serve(tiny, cache, [Request("B", STEM, 2)], salt="two")
    assert trace.of(Admitted)[0].n_reused == 0


def test_end_of_sequence_ends_a_request(tiny):
    free = alone(tiny, STEM, 12)
    eos = free[5]
    texts = serve(tiny, cache_of(tiny, 50, 4), [Request("A", STEM, 12, eos=frozenset({eos}))])
    assert texts["A"] == free[: free.index(eos) + 1]


def test_logits_equal_the_unpaged_models_whatever_else_is_in_the_pool(tiny):
    cache = cache_of(tiny, 20, 4)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    _, other = admit(cache, "other", [1, 2, 3])
    _, slots = admit(cache, "A", STEM)
    cache.write(0, other, *torch.full((2, 3, 2, 4), torch.nan, dtype=torch.float64))
    logits = tiny(torch.tensor([STEM]), attend=PagedAttend(cache, ["A"], slots))
    assert_close(logits, tiny(torch.tensor([STEM])))


def test_several_sequences_bring_one_token_each(tiny):
    cache = cache_of(tiny, 20, 4)
    _, a = admit(cache, "A", STEM)
    _, b = admit(cache, "B", STEM)
    with pytest.raises(BadInput, match="several bring one each; got 2 sequences and 20 slots"):
        PagedAttend(cache, ["A", "B"], torch.cat([a, b]))


def test_the_serving_view_has_a_frame_a_pass_and_names_what_happened(tiny):
    cache = cache_of(tiny, 9, 3)
    with recording() as trace:
        serve(tiny, cache, [Request(*r) for r in REQUESTS], max_step_tokens=16)
    frames = serving_frames(trace, n_blocks=9, block_size=3)
    assert len(frames) == len(trace.of(Stepped))
    told = " ".join(frame.caption for frame in frames)
    assert all(word in told for word in ("admit A", "preempt", "resume", "is done"))


@pytest.mark.slow
def test_smollm2_served_in_a_tight_pool_says_what_it_says_alone():
    lm = load("smollm2-135m")
    system = {"role": "system", "content": "Answer in one short sentence."}
    questions = ["What is the capital of France?", "Why is the sky blue?", "Name a colour."]
    chats = [lm.apply_chat([system, {"role": "user", "content": q}]) for q in questions]
    prompts = [lm.encode(chat).tolist() for chat in chats]
    requests = [Request(q, p, 10) for q, p in zip(questions, prompts, strict=True)]
    requests[1].n_samples = 2
    cache = PagedCache(cache_config(lm.config, n_blocks=11, block_size=8))
    with recording(Preempted, Admitted, CopiedOnWrite) as trace:
        texts = serve(lm.model, cache, requests, max_step_tokens=32)
    assert trace.of(Preempted) and trace.of(CopiedOnWrite)
    assert any(admitted.n_reused for admitted in trace.of(Admitted))
    for question, prompt in zip(questions, prompts, strict=True):
        assert texts[question] == alone(lm.model, prompt, 10), question
    assert texts[questions[1] + "#1"] == texts[questions[1]], "greedy samples are equal"
    assert "Paris" in lm.decode(texts[questions[0]])


@pytest.mark.gpu
def test_served_text_on_a_gpu_equals_the_unpaged_models():
    config = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
            "intermediate_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).cuda().eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    cache = PagedCache(cache_config(config, n_blocks=12, block_size=4), device="cuda")
    texts = serve(model, cache, [Request(*r) for r in REQUESTS], max_step_tokens=16)
    for name, prompt, n_new in REQUESTS:
        want = generate(model, torch.tensor(prompt, device="cuda"), n_new)[len(prompt) :].tolist()
        assert texts[name] == want, name
