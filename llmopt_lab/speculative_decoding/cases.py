"""Inputs shared by tests, benchmarks and the notebook, and the benchmark."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llmopt_lab.core.bench import Case
from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import record
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.speculative_decoding import peers, reference
from llmopt_lab.speculative_decoding.chance import Dice
from llmopt_lab.speculative_decoding.drafts import skip_layers
from llmopt_lab.speculative_decoding.records import ROOT, Read, Rewound
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree


class TableModel(reference.ModelDraft):
    """A model in name only: the logits after a text are random numbers that belong to this text.

    Nothing about one text says anything about another, so a distribution of texts that comes out
    right did not come out right by chance. Reads, rewinds and drafts like a Reader.

    Args:
        n_vocab: 3 or so, where all outcomes are to be listed.
        seed: another seed, another model.
        like: a second model and a number from 0 to 1: how much to resemble it.
    """

    def __init__(
        self, n_vocab: int, seed: int, *,
        like: tuple["TableModel", float] | None = None, peak: float = 1.5, name: str = "target",
    ):  # fmt: skip
        self.n_vocab, self.seed, self.like, self.peak, self.name = n_vocab, seed, like, peak, name
        self.text: list[int] = []
        self.nodes: list[tuple[int, int]] = []  # (token, parent)

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self.text)

    def logits(self, text: Sequence[int]) -> Tensor:
        """After `text`, (n_vocab,) float64."""
        own = self.peak * random_row(self.n_vocab, self.seed, tuple(text))
        if self.like is None:
            return own
        other, share = self.like
        return share * other.logits(text) + (1 - share) * own

    def read(self, tokens: Sequence[int], *, n_last: int, parents: Sequence[int] = ()) -> Tensor:
        n_text = len(tokens) - len(parents)
        require(n_text == 0 or not self.nodes, "a tree is open")
        first, n_before = len(self.text), len(self.nodes)
        self.text.extend(tokens[:n_text])
        self.nodes.extend(zip(tokens[n_text:], parents, strict=True))
        record(Read(self.name, first, len(tokens)))
        texts = [self.text[:end] for end in range(first + 1, len(self.text) + 1)]
        texts += [self.text + self._path(node) for node in range(n_before, len(self.nodes))]
        return torch.stack([self.logits(text) for text in texts[-n_last:]])

    def keep(self, path: Sequence[int]) -> None:
        dropped = len(self.nodes) - len(path)
        self.text.extend(self.nodes[node][0] for node in path)
        self.nodes = []
        record(Rewound(self.name, len(self.text), dropped))

    def rewind(self, length: int) -> None:
        dropped = len(self.nodes) + max(0, len(self.text) - length)
        self.nodes = []
        del self.text[length:]
        if dropped:
            record(Rewound(self.name, len(self.text), dropped))

    def _path(self, node: int) -> list[int]:
        tokens: list[int] = []
        while node != ROOT:
            token, node = self.nodes[node]
            tokens.append(token)
        return tokens[::-1]


@lru_cache(maxsize=1 << 16)
def random_row(n_vocab: int, seed: int, text: tuple[int, ...]) -> Tensor:
    """Normal numbers, (n_vocab,) float64, that depend on the seed and every token."""
    number = seed
    for token in text:
        number = (number * (n_vocab + 1) + token + 1) % (2**61 - 1)
    rng = torch.Generator().manual_seed(number)
    return torch.randn(n_vocab, generator=rng, dtype=torch.float64)


class Chooser:
    """A model in name only that always takes its likeliest token: a text has one continuation.

    Args:
        n_vocab, seed: another seed, another model.
        like: a second one, and the chance that this one chooses as that does.
        most_calls: refuse to go on after so many passes: some loop has no end.
    """

    def __init__(
        self, n_vocab: int, seed: int, *, like: tuple["Chooser", float] | None = None,
        most_calls: int = 100_000,
    ):  # fmt: skip
        self.n_vocab, self.seed, self.like, self.most_calls = n_vocab, seed, like, most_calls
        self.n_calls = 0

    def choices(self, text: Sequence[int], n_last: int) -> list[int]:
        """One forward pass: what it would put after each of the last `n_last` tokens of `text`."""
        require(
            1 <= n_last <= len(text),
            f"n_last must be 1 to {len(text)}, the tokens that were given; got {n_last}",
        )
        require(
            self.n_calls < self.most_calls,
            f"{self.n_calls:,} passes and no end in sight: does every round add a token?",
        )
        self.n_calls += 1
        return [self._choice(text[:end]) for end in range(len(text) - n_last + 1, len(text) + 1)]

    def _choice(self, text: Sequence[int]) -> int:
        row = random_row(self.n_vocab, self.seed, tuple(text))
        if self.like is None:
            return int(row.argmax())
        other, accuracy = self.like
        right = other._choice(text)
        drawn = (1 + math.erf(float(row[0]) / math.sqrt(2))) / 2  # uniform from 0 to 1
        return right if drawn < accuracy else (right + 1 + int(row[1:].argmax())) % self.n_vocab


def guides_speculative_decode(
    small: Chooser, large: Chooser, prompt: list[int], k: int, n_new: int
) -> list[int]:
    """The guide's loop, its bug included; at least `n_new` tokens after `prompt`.

    Changed to run: the prompt is not nested, `done` is a length, `accept_token` is equality, and
    `verify` gets the whole text where the guide sends it the guesses alone.
    """
    tokens = [*prompt]
    while len(tokens) < len(prompt) + n_new:
        speculative_tokens = []
        for _ in range(k):
            next_token = small.choices(tokens, 1)[0]
            speculative_tokens.append(next_token)
            tokens.append(next_token)
        verified_tokens = large.choices(tokens[:-1], k)
        accepted = 0
        for spec, verif in zip(speculative_tokens, verified_tokens, strict=True):
            if spec == verif:
                accepted += 1
            else:
                break
        if accepted < k:
            tokens[-1] = verified_tokens[accepted]
    return tokens


# What to make of a guess that was drawn from q: (the token, whether it is the guess that was kept)
Rule = Callable[[int, Tensor, Tensor, Dice], tuple[int, bool]]


def kept_or_residual(guess: int, p: Tensor, q: Tensor, dice: Dice) -> tuple[int, bool]:
    """Kept with chance min(1, p/q); if not, drawn from max(p - q, 0) / its sum."""
    if dice.happens(reference.chance_to_keep(guess, p, q)):
        return guess, True
    return dice.pick(reference.residual(p, q)), False


def kept_or_fresh(guess: int, p: Tensor, q: Tensor, dice: Dice) -> tuple[int, bool]:
    """Kept with chance min(1, p/q); if not, drawn from p."""
    if dice.happens(reference.chance_to_keep(guess, p, q)):
        return guess, True
    return dice.pick(p), False


def likely_or_fresh(guess: int, p: Tensor, q: Tensor, dice: Dice) -> tuple[int, bool]:
    """Kept where p is above 0.1; if not, drawn from p."""
    if p[guess] > 0.1:
        return guess, True
    return dice.pick(p), False


def same_as_a_sample(guess: int, p: Tensor, q: Tensor, dice: Dice) -> tuple[int, bool]:
    """A token is drawn from p; the guess is kept where it is that token."""
    token = dice.pick(p)
    return token, token == guess


RULES: dict[str, Rule] = {
    "min(1, p/q), else the residual": kept_or_residual,
    "min(1, p/q), else p": kept_or_fresh,
    "p above 0.1, else p": likely_or_fresh,
    "if a sample of p is the same": same_as_a_sample,
}


def strip_example(module) -> dict[str, Tensor]:
    """Some rounds of every kind, greedy and sampled; `module` is the room's reference."""
    prompt, rng = torch.tensor([0, 2]), torch.Generator().manual_seed(1)

    def pair() -> tuple[TableModel, TableModel]:
        target = TableModel(5, seed=1)
        return target, TableModel(5, seed=2, like=(TableModel(5, seed=1), 0.6), name="draft")

    model = random_model()
    settings = {"n_new": 12, "rng": rng, "temperature": 1.0}
    return {
        "chain": module.speculative_decode(*pair(), prompt, k=3, **settings),
        "tree": speculative_decode_tree(*pair(), prompt, widths=(2, 2), **settings),
        "model": module.speculative_decode(model, skip_layers(model, [1]), prompt, k=3, n_new=12),
        "model_tree": speculative_decode_tree(
            model, skip_layers(model, [1]), prompt, widths=(2, 1), n_new=12, proposals="top"
        ),
    }


def random_model(n_layers: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A small Llama of random weights large enough to prefer something, (23 tokens, GQA)."""
    config = ModelConfig(
        n_vocab=23, d_model=16, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_head=4, d_ff=24,
        max_positions=200, rope_theta=100.0, rms_eps=1e-5, tie_embeddings=False,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 1.0 if "embed" in name else 2 * weight.shape[1] ** -0.5
            weight.data = scale * torch.randn(weight.shape, generator=rng)
    return model.to(dtype).requires_grad_(False)


# What the kernels take


def verify_inputs(
    lengths: Sequence[int],
    *,
    n_new: int,
    n_heads: int,
    n_kv_heads: int,
    d_head: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    peak: float = 2.0,
    poison: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache, block_tables, lengths of a verification, with scattered blocks.

    With `poison`, all that a right kernel never reads is hostile: slots past a sequence's end and
    blocks of nobody hold NaN, entries past the last block name a block outside the pool. `peak`
    scales the queries: at 2 a few keys dominate, and a result of wrong keys is far off.
    """
    rng = torch.Generator(device).manual_seed(seed)
    counts = [ceil_div(n, block_size) for n in lengths]
    n_blocks = sum(counts) + 2
    shape = (n_blocks, block_size, n_kv_heads, d_head)
    k, v = (torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(len(lengths), n_new, n_heads, d_head, generator=rng, device=device, dtype=dtype)
    order = torch.randperm(n_blocks, generator=rng, device=device).int()
    width = max(counts, default=0) + poison
    nowhere = 1 << 30 if poison else 0
    tables = torch.full((len(lengths), width), nowhere, dtype=torch.int32, device=device)
    first = 0
    for seq, count in enumerate(counts):
        tables[seq, :count] = order[first : first + count]
        first += count
    if poison:
        for cache in (k, v):
            cache[order[first:].long()] = torch.nan
            for seq, n in enumerate(lengths):
                if n % block_size:
                    cache[int(tables[seq, counts[seq] - 1]), n % block_size :] = torch.nan
    return peak * q, k, v, tables, torch.tensor(lengths, dtype=torch.int32, device=device)


def tree_masks(batch: int, n_new: int, *, seed: int = 0) -> Tensor:
    """Masks of random trees, (batch, n_new, n_new) bool: the parent of each node is any before it.

    The first new token is the text's last one, the root of all.
    """
    rng = torch.Generator().manual_seed(seed)
    masks = torch.eye(n_new, dtype=torch.bool).repeat(batch, 1, 1)
    for mask in masks:
        for node in range(1, n_new):
            mask[node] |= mask[int(torch.randint(node, (1,), generator=rng))]
    return masks


def sampler_inputs(
    device, *, batch: int, k: int, n_vocab: int, dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """p_logits, q_logits and guesses that are drawn from q, which resembles p.

    bfloat16 on a GPU and float32 on a CPU if `dtype` is None.
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(seed)
    p = torch.empty(batch, k + 1, n_vocab, dtype=dtype, device=device)
    q = torch.empty(batch, k, n_vocab, dtype=dtype, device=device)
    for p_seq, q_seq in zip(p, q, strict=True):  # a sequence at a time: float32 takes room
        common = 2 * torch.randn(k + 1, n_vocab, generator=rng, device=device)
        p_seq.copy_(common)
        q_seq.copy_(common[:k] + 0.7 * torch.randn(k, n_vocab, generator=rng, device=device))
    noise = torch.rand(batch, k, n_vocab, generator=rng, device=device)
    guesses = (q.float() - noise.clamp_min(1e-30).log().neg().log()).argmax(-1)
    return p, q, guesses


def _layer_inputs(device, *, batch: int, n_new: int, n_tokens: int, tree: bool = False) -> tuple:
    """One layer of a Llama-3-8B-like model: 32 query heads, 8 KV heads, d_head 128."""
    on_gpu = torch.device(device).type == "cuda"
    inputs = verify_inputs(
        [n_tokens] * batch, n_new=n_new, n_heads=32, n_kv_heads=8, d_head=128, block_size=16,
        dtype=torch.bfloat16 if on_gpu else torch.float32, device=device, poison=False,
    )  # fmt: skip
    return *inputs, tree_masks(batch, n_new).to(device) if tree else None


def _layer_flops(*, batch: int, n_new: int, n_tokens: int, tree: bool = False) -> int:
    return 4 * 32 * 128 * batch * n_new * n_tokens


def _layer_bytes(*, batch: int, n_new: int, n_tokens: int, tree: bool = False) -> int:
    """Keys and values once, queries and results, in bf16."""
    return 2 * batch * (2 * 8 * 128 * n_tokens + 2 * 32 * 128 * n_new)


CASES = (
    Case(
        title="verification attention, 32 query and 8 KV heads, d 128, blocks of 16",
        sizes=tuple(
            {"batch": batch, "n_new": n_new, "n_tokens": 4096}
            for batch in (1, 4, 8, 16, 32)
            for n_new in ((1, 2, 5, 8) if batch in (1, 32) else (1, 5))
        ),
        cpu_sizes=({"batch": 2, "n_new": 3, "n_tokens": 100},),
        inputs=_layer_inputs,
        oracle=peers.attention_oracle,
        contenders=peers.CHAIN,
        flops=_layer_flops,
        min_bytes=_layer_bytes,
    ),
    Case(
        title="verification attention of a tree of 64",
        sizes=tuple(
            {"batch": batch, "n_new": 64, "n_tokens": 4096, "tree": True} for batch in (1, 8, 32)
        ),
        cpu_sizes=({"batch": 2, "n_new": 9, "n_tokens": 100, "tree": True},),
        inputs=_layer_inputs,
        oracle=peers.attention_oracle,
        contenders=peers.TREE,
        flops=_layer_flops,
        min_bytes=_layer_bytes,
    ),
    Case(
        title="rejection sampler: softmaxes, verdicts and the token after (result: the chances)",
        sizes=tuple(
            {"batch": batch, "k": k, "n_vocab": 131_072}
            for batch, k in ((1, 4), (8, 4), (64, 4), (64, 16))
        ),
        cpu_sizes=({"batch": 2, "k": 3, "n_vocab": 1000},),
        inputs=sampler_inputs,
        oracle=peers.chances_oracle,
        contenders=peers.SAMPLER,
        flops=lambda *, batch, k, n_vocab: 4 * batch * (2 * k + 1) * n_vocab,
        min_bytes=lambda *, batch, k, n_vocab: 2 * batch * (2 * k + 1) * n_vocab,
    ),
)
