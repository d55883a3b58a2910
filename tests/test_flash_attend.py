"""Models with flash attention inside say what they say without it."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.flash_attention import attend, measure
from llmopt_lab.flash_attention.attend import flash_attend, register_with_transformers
from llmopt_lab.flash_attention.cases import long_text
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer, rope_tables

TINY = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 40, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
TOKENS = torch.tensor([[7, 3, 9, 11, 2, 5, 1, 30, 21, 4, 8], [1, 0, 4, 4, 9, 2, 17, 3, 3, 40, 6]])
LONG = torch.randint(49, (1, 300), generator=torch.Generator().manual_seed(0))  # 49 pads
assert LONG.shape[1] > 2 * attend.TILE


def tiny(device="cpu", dtype=torch.float32) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(ModelConfig.from_hf(TINY)).to(device, dtype)
    return model


def loss_and_gradients(model, tokens, attention):
    """Next-token loss and the gradient of every parameter."""
    logits = model(tokens, attend=attention)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def test_a_transformer_learns_the_same_with_it(monkeypatch):
    monkeypatch.setattr(attend, "_kernel_fits", lambda q: True)  # as on a GPU
    monkeypatch.setattr(attend, "causal_attention", None)  # so that nothing else can answer
    tokens = LONG[:, :50]  # tiles of the interpreted kernel: 32 queries, 16 keys
    model = tiny()
    loss, gradients = loss_and_gradients(model, tokens, flash_attend)
    want_loss, want_gradients = loss_and_gradients(model.double(), tokens, None)
    assert_close(loss, want_loss)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert_close(got, want)


@pytest.mark.gpu
def test_a_transformer_learns_the_same_with_it_on_a_gpu():
    tokens = LONG.cuda()
    loss, gradients = loss_and_gradients(tiny("cuda"), tokens, flash_attend)
    wide = tiny("cuda").double()
    want_loss, want_gradients = loss_and_gradients(wide, tokens, None)
    assert_close(loss, want_loss)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert_close(got, want)


@torch.no_grad()
def check_a_compiled_model(device, **options):
    """All layers in one graph: `hidden` is the part of a model that is made to be compiled."""
    model, tokens = tiny(device), LONG[:, :50].to(device)
    positions = torch.arange(50, device=device)[None]
    tables = rope_tables(model.config, positions, model.dtype)
    compiled = torch.compile(
        lambda x: model.hidden(x, *tables, flash_attend), fullgraph=True, **options
    )
    assert_close(model.logits(compiled(tokens)), model(tokens, attend=flash_attend))


def test_a_compiled_model_has_no_graph_break(monkeypatch):
    monkeypatch.setattr(attend, "_kernel_fits", lambda q: True)  # as on a GPU
    check_a_compiled_model("cpu", backend="aot_eager")


@pytest.mark.gpu
def test_a_compiled_model_has_no_graph_break_on_a_gpu():
    check_a_compiled_model("cuda")


def test_the_kernel_is_taken_on_a_gpu_with_triton_and_only_there(monkeypatch):
    def fits(d_head=64, dtype=torch.bfloat16, device="cuda"):
        with FakeTensorMode():  # a tensor of a GPU that need not be there
            return attend._kernel_fits(torch.empty(1, 2, 5, d_head, dtype=dtype, device=device))

    monkeypatch.setattr(attend, "HAS_TRITON", True)
    assert fits()
    assert not fits(device="cpu")
    assert not fits(d_head=20) and not fits(d_head=264)
    assert not fits(dtype=torch.float64)
    monkeypatch.setattr(attend, "HAS_TRITON", False)
    assert not fits()


# --- as an attention implementation of transformers


def llama(implementation: str):
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY, attn_implementation=implementation)
        model = transformers.LlamaForCausalLM(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def ours():
    return llama("llmopt_tiled")


@pytest.fixture(scope="module")
def eager():
    return llama("eager")


def greedy(model, tokens, n_new, **kw):
    return model.generate(
        tokens, max_new_tokens=n_new, do_sample=False, pad_token_id=49, eos_token_id=None, **kw
    )


def test_logits_and_greedy_tokens_of_a_llama_equal_its_eager_ones(ours, eager):
    for tokens in (TOKENS, LONG):
        want = eager.double()(tokens).logits
        eager.float()
        assert_close(ours(tokens).logits, want)
        assert torch.equal(greedy(ours, tokens, 12), greedy(eager, tokens, 12))


@pytest.mark.parametrize(("tokens", "n_first"), [(TOKENS, 4), (LONG, 140)], ids=["short", "long"])
def test_a_chunk_of_new_tokens_sees_the_cache(ours, eager, tokens, n_first):
    def in_two_chunks(model):
        first = model(tokens[:, :n_first], use_cache=True)
        return model(tokens[:, n_first:], past_key_values=first.past_key_values).logits

    want = eager.double()(tokens).logits[:, n_first:]
    eager.float()
    assert_close(in_two_chunks(ours), want)


@pytest.mark.parametrize("tokens", [TOKENS, LONG], ids=["short", "long"])
def test_a_llama_learns_the_same_with_it(ours, eager, tokens):
    def gradients(model):
        loss = model(tokens, labels=tokens).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    want = gradients(eager.double())
    eager.float()
    for got, right in zip(gradients(ours), want, strict=True):
        assert_close(got, right)


def test_a_mask_without_padding_is_no_mask(ours):
    assert torch.equal(ours(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits,
                       ours(TOKENS).logits)  # fmt: skip


def test_padding_is_refused_and_not_dropped(ours):
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with pytest.raises(BadInput, match="llmopt_tiled knows no padding"):
        ours(TOKENS, attention_mask=mask)


def test_a_ready_made_mask_is_refused(ours):
    mask = torch.ones(2, 1, 11, 11).tril().bool()
    with pytest.raises(BadInput, match="no mask but the causal one, and got an attention_mask"):
        ours(TOKENS, attention_mask=mask)


def test_packed_sequences_are_refused(ours):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]).expand(2, -1)
    with pytest.raises(BadInput, match="asks for another pattern"):
        ours(TOKENS, position_ids=positions, use_cache=False)


def test_a_cache_with_unused_places_is_refused(ours):
    with pytest.raises(BadInput, match="needs a cache that holds the tokens so far and no more"):
        greedy(ours, TOKENS, 4, cache_implementation="static")


def test_dropout_is_refused():
    model = llama("llmopt_tiled").train()
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.1
    with pytest.raises(BadInput, match="no dropout; got 0.1"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sliding_window": 5}, "no sliding window; got one of 5 tokens over 9"),
        ({"softcap": 30.0}, "does not compute softcap"),
        ({"s_aux": torch.zeros(4)}, "does not compute s_aux"),
    ],
)
def test_what_it_does_not_compute_is_refused(extra, message):
    from llmopt_lab.flash_attention.attend import transformers_attention

    q, k, v = torch.randn(3, 1, 4, 9, 16)
    with pytest.raises(BadInput, match=message):
        transformers_attention(torch.nn.Identity(), q, k, v, None, **extra)


def test_an_encoder_attends_to_everything():
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 40, "max_position_embeddings": 64,
    }  # fmt: skip
    models = []
    for implementation in ("llmopt_tiled", "eager"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.BertConfig(**sizes, attn_implementation=implementation)
            models.append(transformers.BertModel(config).eval())
    got, want = (model(TOKENS).last_hidden_state for model in (models[0], models[1].double()))
    assert_close(got, want)


def test_the_kernel_itself_runs_under_transformers(ours, eager, monkeypatch):
    monkeypatch.setattr(attend, "_kernel_fits", lambda q: True)  # as on a GPU
    tokens = LONG[:, :50]
    want = eager.double()(tokens).logits
    eager.float()
    assert_close(ours(tokens).logits, want)
    assert torch.equal(greedy(ours, tokens, 2), greedy(eager, tokens, 2))


@pytest.mark.slow
def test_smollm2_writes_the_same_16_tokens_with_it():
    from llmopt_lab.nn.weights import load

    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    ours = load("smollm2-135m", device="cpu")
    c = ours.config
    config = transformers.LlamaConfig(
        vocab_size=c.n_vocab, hidden_size=c.d_model, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.d_head,
        intermediate_size=c.d_ff, max_position_embeddings=c.max_positions,
        rms_norm_eps=c.rms_eps, rope_theta=c.rope_theta, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {f"model.{name}": x for name, x in ours.model.state_dict().items()}
    left = model.load_state_dict(weights, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    model.tie_weights()
    tokens = ours.encode("The capital of France is Paris. The capital of Italy is")[None]
    written = {}
    for implementation in ("eager", "llmopt_tiled"):
        model.set_attn_implementation(implementation)
        written[implementation] = greedy(model, tokens, 16)
    assert "Rome" in ours.decode(written["eager"][0])
    assert torch.equal(written["llmopt_tiled"], written["eager"])


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_gives_every_token_of_a_long_text_the_same_logits_with_it():
    from llmopt_lab.nn.weights import load

    def as_transformers_calls_it(q, k, v, *, layer, scale):
        out, _ = attend.transformers_attention(layers, q, k, v, None, scaling=scale)
        return out.transpose(1, 2)

    lm = load("smollm2-135m", device="cpu", dtype=torch.float64)  # 30 layers: no rounding to allow
    layers = lm.model.layers  # any module: it has no `is_causal`
    tokens = lm.encode(long_text()[:4000])[None, :300]
    assert tokens.shape[1] == 300 > 2 * attend.TILE
    assert_close(lm.model(tokens, attend=as_transformers_calls_it), lm.model(tokens))


def test_what_lesson_2_says_of_smollm2_is_what_was_recorded():
    recorded = json.loads(measure.RESULTS.read_text())
    nats = list(recorded["nats"].values())
    assert len(nats) == 3 and max(nats) - min(nats) < 1e-5
    moved = {int(n): share for n, share in recorded["moved"].items()}
    assert all((share > 0.01) == (n > 128) for n, share in moved.items())
    held = {(row["n"], row["name"]): row["peak_bytes"] for row in recorded["costs"]}
    doubled = {name: [] for _, name in held}
    for (n, name), nbytes in held.items():
        if (2 * n, name) in held and n >= 1024:
            doubled[name].append(held[2 * n, name] / nbytes)
    assert all(3.9 < ratio < 4.1 for ratio in doubled.pop("naive"))
    assert all(ratio <= 2.01 for ratios in doubled.values() for ratio in ratios)
