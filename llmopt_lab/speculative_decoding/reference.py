"""Speculative decoding in plain PyTorch: a draft guesses, the target judges all guesses at once.

p is the target's distribution of the next token, q the draft's.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.nn.generate import to_probabilities
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.speculative_decoding.chance import Dice
from llmopt_lab.speculative_decoding.reader import Reader
from llmopt_lab.speculative_decoding.records import Added, Guessed, Judged
from llmopt_lab.speculative_decoding.speed import AdaptiveK


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits: the same for target and draft, or acceptance suffers."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """(n, n_vocab) to (n, n_vocab), float32 or wider; temperature 0 puts 1 on the largest."""
        return to_probabilities(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


class Guesses(NamedTuple):
    """What a draft guesses to come next, and what it drew each guess from."""

    tokens: list[int]
    q: Tensor       # (len(tokens), n_vocab)


@runtime_checkable
class Draft(Protocol):
    """Whatever guesses. A guess must be drawn from its row of q, given the guesses before it."""

    n_vocab: int

    def guess(self, text: list[int], k: int, sampling: Sampling, dice: Dice) -> Guesses:
        """Up to `k` tokens to follow `text`."""

    def rewind(self, length: int) -> None:
        """Forget what was read from token `length` on."""


def speculative_decode(
    target: Transformer | Reader, draft: Transformer | Draft, prompt: Tensor, *,
    k: int | AdaptiveK, n_new: int, rng: torch.Generator | Dice | None = None,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    eos: int | Collection[int] = (), stop: Callable[[Sequence[int]], bool] | None = None,
    on_token: Callable[[int], object] | None = None,
) -> Tensor:
    """Continue `prompt` as the target alone would: the same text if greedy, else the same
    distribution of texts.

    Args:
        target: the model whose text it is; a Reader of it that has read nothing, to see its cache.
        draft: a small model with the same vocabulary, or any `Draft` (drafts.py).
        prompt: (n,) int64, n >= 1.
        k: guesses a round.
        n_new: tokens to add.
        rng: the generator of all draws; not needed at temperature 0, which is greedy.
        temperature, top_k, top_p: of target and draft alike, as in `nn.generate.sample`.
        eos: stop after any of these tokens, wherever in a round it comes.
        stop: called with the new tokens after each one, `stop_strings(..)` for one; True ends.
        on_token: called with each new token that stays.

    Returns:
        The prompt and what follows, (n + up to n_new,) int64, the last token that of eos or stop.

    Raises:
        BadInput: other vocabularies, an empty or batched prompt, k or n_new out of range, a
            setting out of its range, a temperature above 0 without `rng`.

    Cost: a round is one pass of the target over the guesses and one token more, and k of the draft;
    it yields 1 to k + 1 tokens, `speed.expected_tokens`. A pass reads all the model's weights, so a
    round reads W_target + k W_draft bytes of weights.
    Source: Leviathan et al. 2023, Algorithm 1 (https://arxiv.org/abs/2211.17192); Chen et al. 2023,
    Algorithm 2 (https://arxiv.org/abs/2302.01318).
    """
    target, draft = check_input(target, draft, prompt, k, n_new)
    sampling, dice = Sampling(temperature, top_k, top_p), as_dice(rng)
    ends = at_token_or(eos, stop)
    text, n_prompt = prompt.tolist(), len(prompt)
    end, ended = n_prompt + n_new, n_new == 0
    while not ended:
        # the target adds a token of its own: guesses up to the end would be one too many
        ahead = min(k if isinstance(k, int) else k.choose(), end - len(text) - 1)
        guesses, q = draft.guess(text, ahead, sampling, dice)
        record(Guessed(len(text), torch.tensor(guesses, dtype=torch.int64), q))
        # row i judges guess i, and the last row is what follows when all are kept
        unread = text[target.length:] + guesses
        p = sampling.probabilities(target.read(unread, n_last=len(guesses) + 1))
        n_kept = judge(len(text), guesses, p, q, dice)
        bonus = n_kept == len(guesses)
        source = p[n_kept] if bonus else residual(p[n_kept], q[n_kept])     # (n_vocab,)
        token = dice.pick(source)
        record(Added(len(text) + n_kept, token, source, bonus))
        if not isinstance(k, int):
            k.learn(len(guesses), n_kept)
        for new in [*guesses[:n_kept], token]:      # an end among the guesses ends the text there
            text.append(new)
            if on_token is not None:
                on_token(new)
            ended = len(text) == end or ends(text[n_prompt:])
            if ended:
                break
        # the last token is not read yet; what was refused must leave both caches
        target.rewind(len(text) - 1)
        draft.rewind(len(text) - 1)
    return torch.tensor(text, device=prompt.device)


def guess(reader: Reader, text: list[int], k: int, sampling: Sampling, dice: Dice) -> Guesses:
    """k tokens from a model, one pass each; the first pass also reads what it has not read yet."""
    guesses, q = [], []
    unread = text[reader.length:]   # 2 tokens if all guesses were kept: it never read the last one
    for _ in range(k):
        q.append(sampling.probabilities(reader.read(unread, n_last=1))[0])  # (n_vocab,)
        guesses.append(dice.pick(q[-1]))
        unread = guesses[-1:]
    return Guesses(guesses, torch.stack(q) if q else torch.zeros(0, reader.n_vocab))


def judge(place: int, guesses: list[int], p: Tensor, q: Tensor, dice: Dice) -> int:
    """How many guesses are kept: up to the first that is refused.

    place: of the first guess in the text; p: (n + 1, n_vocab), q: (n, n_vocab).
    """
    for i, token in enumerate(guesses):
        accepted = dice.happens(chance_to_keep(token, p[i], q[i]))
        record(Judged(place + i, token, p[i], q[i], accepted))
        if not accepted:
            return i
    return len(guesses)


def chance_to_keep(token: int, p: Tensor, q: Tensor) -> float:
    """min(1, p(token) / q(token)). Over tokens drawn from q its mean is `overlap(p, q)`."""
    return min(1.0, float(p[token]) / float(q[token]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), made to sum to 1: what q offers too seldom, (n_vocab,).

    A guess of x is kept with probability min(p(x), q(x)). What is missing to p(x) is max(p - q, 0)
    there, and a refusal leaves exactly this mass to give.
    """
    missing = (p - q).clamp_min(0)
    total = missing.sum()
    return missing / total if total > 0 else p      # p = q: refused by rounding alone


def overlap(p: Tensor, q: Tensor) -> float:
    """sum of min(p, q) = 1 - TV(p, q): the chance that a guess drawn from q is kept."""
    return float(torch.minimum(p, q).sum())


class ModelDraft(Reader):
    """A small model as the draft."""

    def guess(self, text: list[int], k: int, sampling: Sampling, dice: Dice) -> Guesses:
        return guess(self, text, k, sampling, dice)


def stop_strings(
    strings: Sequence[str], decode: Callable[[list[int]], str]
) -> Callable[[Sequence[int]], bool]:
    """A `stop` that ends the text with the token that completes one of `strings`.

    decode: from tokens to text, such as `lm.decode`.
    """
    require(
        len(strings) > 0 and all(strings), f"give at least one string, none empty; got {strings}"
    )
    return lambda tokens: any(string in decode(list(tokens)) for string in strings)


def at_token_or(
    eos: int | Collection[int], stop: Callable[[Sequence[int]], bool] | None
) -> Callable[[Sequence[int]], bool]:
    """Whether a text ends with its last token."""
    last = {eos} if isinstance(eos, int) else set(eos)
    return lambda new: new[-1] in last or (stop is not None and stop(new))


def as_dice(rng: torch.Generator | Dice | None) -> Dice:
    return rng if isinstance(rng, Dice) else Dice(rng)


def check_input(
    target: Transformer | Reader, draft: Transformer | Draft, prompt: Tensor,
    k: int | AdaptiveK, n_new: int, *, n_nodes: int = 0,
) -> tuple[Reader, Draft]:
    """Refuse bad input before any work; back come the reader and the draft to use."""
    require(
        prompt.dim() == 1 and prompt.numel() > 0 and prompt.dtype == torch.int64,
        f"prompt must be (n,) int64 with n >= 1; got {prompt.dtype} {tuple(prompt.shape)}",
    )
    require(n_new >= 0, f"n_new must not be negative; got {n_new}")
    require(not isinstance(k, int) or k >= 0, f"k must not be negative; got {k}")
    n_vocabs = [m.config.n_vocab if isinstance(m, Transformer) else m.n_vocab
                for m in (target, draft)]
    require(
        n_vocabs[0] == n_vocabs[1],
        f"target and draft must share one vocabulary; theirs have {n_vocabs[0]:,} and "
        f"{n_vocabs[1]:,} tokens. Take a draft with the target's tokenizer.",
    )
    max_tokens = len(prompt) + n_new
    if isinstance(target, Transformer):
        target = Reader(target, max_tokens=max_tokens, n_nodes=n_nodes)
    if isinstance(draft, Transformer):
        draft = ModelDraft(draft, max_tokens=max_tokens, n_nodes=n_nodes, name="draft")
    require(
        target.length == 0,
        f"the target's reader has read {target.length} tokens already: rewind(0) first",
    )
    return target, draft
