"""Read a GGUF file, llama.cpp's format: its config, its tokenizer and its tensors, dequantized.

Source: the GGUF specification in ggml (docs/gguf.md); llama.cpp's convert_hf_to_gguf.py.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from llmopt_lab.core.errors import BadInput, require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.nn.config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama.cpp calls Mistral "llama", too

_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How llama.cpp's named pre-tokenizers cut text before BPE: each is a list of steps.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": [_GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2],
    "qwen2": _split(_CONTRACTIONS + _WORDS % ""),
    "llama-bpe": _split(_CONTRACTIONS + _WORDS % "{1,3}"),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in the file, and how."""

    shape: tuple[int, ...]  # as PyTorch writes it; the file has it reversed
    kind: GGMLQuantizationType
    start: int  # byte in the file
    row_nbytes: int

    @property
    def n_rows(self) -> int:
        """Rows of the last dimension; a vector is one row."""
        return prod(self.shape[:-1])


class GgufFile:
    """One GGUF file: `config`, `tokenizer`, `chat_template`, `shapes` and `read(name)`.

    Tensor names are those of `Transformer.state_dict()`. The header is read here and not with
    gguf.GGUFReader, which makes a numpy view for every token: seconds and 170 MB for 49,152.

    Raises:
        BadInput: not a GGUF file, a damaged one, an architecture or tokenizer that is not read.
    """

    def __init__(self, path: Path):
        self.path = path
        fields, self._tensors = _read_header(path)
        self.architecture = fields.get("general.architecture")
        require(
            self.architecture in ARCHITECTURES,
            f"{path} holds the architecture {self.architecture!r}; "
            f"this model reads {', '.join(ARCHITECTURES)}",
        )
        self.chat_template: str | None = fields.get("tokenizer.chat_template")
        self.config = self._read_config(fields)
        self.tokenizer = _build_tokenizer(fields, path)
        self._source = {_our_name(name): name for name in self._tensors}
        self.shapes = {ours: self._tensors[name].shape for ours, name in self._source.items()}

    def _read_config(self, fields: dict) -> ModelConfig:
        def read(key: str, default=None):
            value = fields.get(f"{self.architecture}.{key}", default)
            require(value is not None, f"{self.path} lacks the field {self.architecture}.{key}")
            return value

        scaling = read("rope.scaling.type", "none")
        require(scaling == "none", f"{self.path}: RoPE scaling {scaling!r} is not read from GGUF")
        n_experts = read("expert_count", 0)
        require(n_experts == 0, f"{self.path} is a mixture of {n_experts} experts; not read")
        n_heads = read("attention.head_count")
        d_model = read("embedding_length")
        d_head = read("attention.key_length", d_model // n_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            width = read(key, d_head)
            require(width == d_head, f"{self.path}: {key} is {width}, the head width {d_head}")
        eos = fields.get("tokenizer.ggml.eos_token_id")
        return ModelConfig(
            n_vocab=len(fields.get("tokenizer.ggml.tokens", ())),
            d_model=d_model,
            n_layers=read("block_count"),
            n_heads=n_heads,
            n_kv_heads=read("attention.head_count_kv", n_heads),
            d_head=d_head,
            d_ff=read("feed_forward_length"),
            rope_theta=read("rope.freq_base", 10_000.0),
            rms_eps=read("attention.layer_norm_rms_epsilon"),
            max_positions=min(read("context_length"), read("attention.sliding_window", 1 << 62)),
            tie_embeddings="output.weight" not in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            out_bias="blk.0.attn_output.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            bos=fields.get("tokenizer.ggml.bos_token_id"),
            eos=() if eos is None else (eos,),
        )

    def read(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """One tensor, dequantized to float32, some rows at a time: (rows, their values).

        In pieces, because a whole dequantized embedding is a fifth of a small model.
        """
        tensor = self._tensors[self._source[name]]
        heads = self._heads_to_unpermute(name)
        piece = tensor.n_rows if heads else 4096
        for rows in tiles(tensor.n_rows, piece):
            stored = np.fromfile(
                self.path,
                np.uint8,
                count=(rows.stop - rows.start) * tensor.row_nbytes,
                offset=tensor.start + rows.start * tensor.row_nbytes,
            ).reshape(-1, tensor.row_nbytes)
            try:
                values = torch.from_numpy(dequantize(stored, tensor.kind))
            except NotImplementedError as unknown:
                raise BadInput(
                    f"{self.path}: {name} is stored as {tensor.kind.name}, "
                    "which the gguf package cannot dequantize"
                ) from unknown
            if len(tensor.shape) == 1:
                rows, values = slice(None), values[0]
            if heads:
                values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield rows, values

    def _heads_to_unpermute(self, name: str) -> int | None:
        """Heads whose rows are interleaved, or None.

        For the llama architecture alone, llama.cpp stores each head's rows as RoPE pairs them,
        (i, i + d_head/2) side by side; Hugging Face keeps the two halves apart.
        """
        if self.architecture != "llama":
            return None
        if ".q_proj." in name:
            return self.config.n_heads
        if ".k_proj." in name:
            return self.config.n_kv_heads
        return None


def _read_header(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The metadata fields and the tensors of a GGUF file, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = _Header(file, size)
            require(
                header.take(4) == b"GGUF", f"{path} is no GGUF file: it does not begin with GGUF"
            )
            version = header.number("I")
            require(version in (2, 3), f"{path}: GGUF version {version} is not read, only 2 and 3")
            n_tensors, n_fields = header.number("Q"), header.number("Q")
            fields = {}
            for _ in range(n_fields):
                key = header.text()
                fields[key] = header.value(header.number("I"))
            infos = {}
            for _ in range(n_tensors):
                name = header.text()
                dims = [header.number("Q") for _ in range(header.number("I"))]
                kind, offset = header.number("I"), header.number("Q")
                infos[name] = (tuple(reversed(dims)), GGMLQuantizationType(kind), offset)
        except BadInput:
            raise
        except (EOFError, ValueError, KeyError) as broken:
            raise BadInput(
                f"{path} is truncated or damaged ({size:,} bytes): {broken}. Get the file again."
            ) from broken
        alignment = fields.get("general.alignment", 32)
        data = ceil_div(file.tell(), alignment) * alignment

    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        block, block_nbytes = GGML_QUANT_SIZES[kind]
        tensor = StoredTensor(shape, kind, data + offset, shape[-1] // block * block_nbytes)
        end = tensor.start + tensor.n_rows * tensor.row_nbytes
        require(
            end <= size,
            f"{path} is truncated: {name} ends at byte {end:,}, the file at {size:,}. "
            "Get the file again.",
        )
        tensors[name] = tensor
    return fields, tensors


class _Header:
    """Little-endian values, one after the other."""

    string, array = 8, 9  # numbers of the format's value types
    scalars = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size

    def take(self, n: int) -> bytes:
        # a damaged length may be anything: never ask for more than there is
        taken = self.file.read(min(n, self.size))
        if len(taken) < n:
            raise EOFError(f"the header ends at byte {self.file.tell():,}")
        return taken

    def number(self, code: str) -> int | float | bool:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int):
        if kind == self.string:
            return self.text()
        if kind != self.array:
            return self.number(self.scalars[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in self.scalars:
            code = self.scalars[kind]
            width = struct.calcsize(f"<{code}")
            return list(struct.unpack(f"<{length}{code}", self.take(length * width)))
        return [self.value(kind) for _ in range(length)]


def _our_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `layers.3.self_attn.q_proj.weight`; unknown names stay."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _IN_LAYER:
            return f"layers.{layer}.{_IN_LAYER[part]}.{kind}"
    return name


def _build_tokenizer(fields: dict, path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer that the file's metadata describe."""
    kind = fields.get("tokenizer.ggml.model")
    require(
        kind == "gpt2",
        f"{path}: tokenizer {kind!r} is not read from GGUF, only byte-level BPE ('gpt2'). "
        "Load the Hugging Face folder with its tokenizer.json instead.",
    )
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    require(
        pre in PRE_TOKENIZERS,
        f"{path}: pre-tokenizer {pre!r} is not read from GGUF, only {', '.join(PRE_TOKENIZERS)}. "
        "Load the Hugging Face folder with its tokenizer.json instead.",
    )
    for key in ("tokens", "merges"):
        require(f"tokenizer.ggml.{key}" in fields, f"{path} lacks the field tokenizer.ggml.{key}")
    words = fields["tokenizer.ggml.tokens"]
    try:
        bpe = models.BPE(
            vocab={word: token for token, word in enumerate(words)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as broken:  # the library raises nothing narrower
        raise BadInput(f"{path} holds a damaged vocabulary: {broken}. Get it again.") from broken
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # tokenizer.ggml.token_type
    types = fields.get("tokenizer.ggml.token_type", [1] * len(words))
    tokenizer.add_special_tokens(
        [AddedToken(w, normalized=False) for w, t in zip(words, types, strict=True) if t == control]
    )
    tokenizer.add_tokens(
        [
            AddedToken(w, normalized=False)
            for w, t in zip(words, types, strict=True)
            if t == user_defined
        ]
    )
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{words[bos]} $A", special_tokens=[(words[bos], bos)]
        )
    return tokenizer
