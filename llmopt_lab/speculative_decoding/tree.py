"""Guesses that branch: the target judges a whole tree of continuations in one pass."""

from collections.abc import Callable, Collection, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.speculative_decoding.chance import Dice
from llmopt_lab.speculative_decoding.reader import Reader
from llmopt_lab.speculative_decoding.records import ROOT, Added, Judged, Tree
from llmopt_lab.speculative_decoding.reference import (
    ModelDraft,
    Sampling,
    as_dice,
    at_token_or,
    chance_to_keep,
    check_input,
    residual,
)

PROPOSALS = ("distinct", "independent", "top")


def speculative_decode_tree(
    target: Transformer | Reader,
    draft: Transformer | ModelDraft,
    prompt: Tensor,
    *,
    widths: Sequence[int],
    n_new: int,
    proposals: str = "distinct",
    rng: torch.Generator | Dice | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Collection[int] = (),
    stop: Callable[[Sequence[int]], bool] | None = None,
) -> Tensor:
    """`speculative_decode` with a tree of guesses: each node at depth i has widths[i] children.

    Args:
        widths: (2, 1, 1) is two chains of three. (1,) * k is a chain of k.
        proposals: how siblings are drawn: "distinct" from q without replacement, "independent"
            from q, "top" the likeliest ones, as if the draft were sure of each.
        others: as for `speculative_decode`; the draft is a model.

    Cost: a round is one pass of the target over all nodes and what it has not read, and one of the
    draft for each depth.
    Source: Miao et al. 2023, SpecInfer (https://arxiv.org/abs/2305.09781), for the tree mask and
    independent siblings; Jeon et al. 2024 (https://arxiv.org/abs/2402.14160) for distinct ones.
    """
    require(
        len(widths) > 0 and min(widths) > 0, f"widths must be positive, one a depth; got {widths}"
    )
    require(proposals in PROPOSALS, f"proposals must be one of {PROPOSALS}; got {proposals!r}")
    n_nodes = sum(prod(widths[: depth + 1]) for depth in range(len(widths)))
    target, draft = check_input(target, draft, prompt, len(widths), n_new, n_nodes=n_nodes)
    sampling, dice = Sampling(temperature, top_k, top_p), as_dice(rng)
    ends = at_token_or(eos, stop)
    text, n_prompt = prompt.tolist(), len(prompt)
    end, ended = n_prompt + n_new, n_new == 0
    while not ended:
        ahead = widths[: end - len(text) - 1]
        tree = grow(draft, text, ahead, sampling, dice, proposals)
        record(tree)
        nodes, parents = tree.tokens.tolist(), tree.parents.tolist()
        unread = text[target.length :] + nodes
        logits = target.read(unread, n_last=1 + len(nodes), parents=parents)
        p = sampling.probabilities(logits)  # (1 + n_nodes, n_vocab)
        path, source = judge_tree(len(text), tree, p, dice)
        token = dice.pick(source)
        leaf = path[-1] if path else ROOT
        bonus = leaf not in parents  # no child of it was refused
        record(Added(len(text) + len(path), token, source, bonus))
        target.keep(path)
        draft.rewind(len(text))  # the pass that starts its next tree reads the path again
        for new in [*(nodes[node] for node in path), token]:
            text.append(new)
            ended = len(text) == end or ends(text[n_prompt:])
            if ended:
                break
        target.rewind(len(text) - 1)
    return torch.tensor(text, device=prompt.device)


def grow(
    reader: Reader,
    text: list[int],
    widths: Sequence[int],
    sampling: Sampling,
    dice: Dice,
    proposals: str,
) -> Tree:
    """A tree of guesses, read by the draft a depth at a time: its leaves need not be read."""
    tokens, parents, q = [], [], []
    level = [ROOT]
    for depth, width in enumerate(widths):
        if depth == 0:
            logits = reader.read(text[reader.length :], n_last=1)  # (1, n_vocab)
        else:
            logits = reader.read(
                [tokens[n] for n in level], n_last=len(level), parents=[parents[n] for n in level]
            )
        children = []
        for parent, row in zip(level, logits, strict=True):
            for token, proposal in propose(row, width, sampling, dice, proposals):
                children.append(len(tokens))
                tokens.append(token)
                parents.append(parent)
                q.append(proposal)
        level = children
    return Tree(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(parents, dtype=torch.int64),
        torch.stack(q) if q else torch.zeros(0, reader.n_vocab),
    )


def propose(
    logits: Tensor, width: int, sampling: Sampling, dice: Dice, proposals: str
) -> list[tuple[int, Tensor]]:
    """Up to `width` siblings, each with the distribution that it was drawn from, (n_vocab,)."""
    if proposals == "top":
        top = logits.sort(descending=True, stable=True).indices[:width]
        return [(int(t), F.one_hot(t, len(logits)).to(torch.float32)) for t in top]
    q = sampling.probabilities(logits)
    siblings = []
    for _ in range(width):
        siblings.append((dice.pick(q), q))
        if proposals == "distinct":
            q = q.index_fill(0, torch.tensor(siblings[-1][0], device=q.device), 0)
            if not q.any():  # fewer tokens are possible than `width`
                break
            q = q / q.sum()
    return siblings


def judge_tree(place: int, tree: Tree, p: Tensor, dice: Dice) -> tuple[list[int], Tensor]:
    """The path of nodes that is kept, and what to draw the token after it from, (n_vocab,).

    At each node the children are judged in order. A refused child leaves the residual of what is
    still to give, and the next sibling is judged against that.

    p: (1 + n_nodes, n_vocab), after the text and after each node.
    """
    path: list[int] = []
    at = ROOT
    while True:
        source = p[1 + at]  # (n_vocab,)
        for child in (tree.parents == at).nonzero().flatten().tolist():
            token, q = int(tree.tokens[child]), tree.q[child]
            accepted = dice.happens(chance_to_keep(token, source, q))
            record(Judged(place + len(path), token, source, q, accepted))
            if accepted:
                path.append(child)
                at = child
                break
            source = residual(source, q)
        else:
            return path, source
