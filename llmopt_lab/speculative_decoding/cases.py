"""Inputs shared by tests, benchmarks and the notebook."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.speculative_decoding import reference
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
