"""Drafts besides a small model: the text itself, and the target with layers left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import LanguageModel
from llmopt_lab.speculative_decoding.chance import Dice
from llmopt_lab.speculative_decoding.reference import Guesses, Sampling


@dataclass(frozen=True)
class PromptLookup:
    """Guesses that the text repeats itself: what followed its last few tokens the last time.

    It looks for the last `longest` tokens earlier in the text, then for one less, down to
    `shortest`, and takes the latest place. No match, no guess. It is sure of its guesses, so q is 1
    on each, and a guess is kept with chance p.

    Source: Saxena 2023, prompt lookup decoding; in vLLM and transformers as n-gram speculation.
    """

    n_vocab: int
    longest: int = 3
    shortest: int = 1

    def __post_init__(self):
        require(
            1 <= self.shortest <= self.longest,
            f"need 1 <= shortest <= longest; got {self.shortest} and {self.longest}",
        )

    def guess(self, text: list[int], k: int, sampling: Sampling, dice: Dice) -> Guesses:
        found = self._continuation(text)[:k]
        q = F.one_hot(torch.tensor(found, dtype=torch.int64), self.n_vocab).to(torch.float32)
        return Guesses(found, q)

    def rewind(self, length: int) -> None:
        """Nothing is kept between calls."""

    def _continuation(self, text: list[int]) -> list[int]:
        for n in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            for start in range(len(text) - n - 1, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return text[start + n :]
        return []


def skip_layers(model: Transformer, keep: Sequence[int]) -> Transformer:
    """The model with the layers `keep` only, on the same weights: a draft that costs no memory.

    Its cache is its own: what a layer caches depends on the layers before it.
    Source: Zhang et al. 2024, Draft & Verify (https://arxiv.org/abs/2309.08168).
    """
    n_layers = model.config.n_layers
    require(
        0 < len(keep) and list(keep) == sorted(set(keep)) and 0 <= keep[0] and keep[-1] < n_layers,
        f"keep some of the layers 0 to {n_layers - 1}, in order; got {list(keep)}",
    )
    with torch.device("meta"):
        short = Transformer(replace(model.config, n_layers=len(keep)))
    weights = {}
    for name, weight in model.state_dict().items():
        part, _, rest = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers."):
            weights[name] = weight
        elif int(part) in keep:
            weights[f"layers.{list(keep).index(int(part))}.{rest}"] = weight
    short.load_state_dict(weights, assign=True)
    return short.requires_grad_(False)


def check_same_vocabulary(target: LanguageModel, draft: LanguageModel) -> None:
    """Refuse two tokenizers that give one token different numbers.

    Raises:
        BadInput: names the first token they disagree on. Equal sizes prove nothing.
    """
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        require(
            theirs.get(token) == number,
            f"{target.name} and {draft.name} have different vocabularies: {token!r} is token "
            f"{number} of the one and {theirs.get(token, 'no token')} of the other. Speculation "
            "compares probabilities token by token; take a draft with the target's tokenizer.",
        )
    require(
        len(ours) == len(theirs),
        f"{draft.name} has {len(theirs) - len(ours)} tokens that {target.name} does not have",
    )
