"""A model and the text it has read: it reads on, and it rewinds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.nn.generate import KVCache
from llmopt_lab.nn.transformer import rope_tables
from llmopt_lab.speculative_decoding.records import ROOT, Read, Rewound


class TreeCache(KVCache):
    """A KV cache whose last tokens may branch: `mask` says which of them each new token sees."""

    mask: Tensor | None = None  # (n, length + n) bool; the causal mask if None

    def visible(self, n: int, end: int, device: torch.device) -> Tensor | None:
        return super().visible(n, end, device) if self.mask is None else self.mask

    def keep(self, slots: Sequence[int], length: int) -> None:
        """Move the tokens in `slots` to the slots from `length` on, and forget all others there."""
        end = length + len(slots)
        for cached in (self.keys, self.values):
            cached[:, :, :, length:end] = cached[:, :, :, list(slots)]
        self.length = end


class Reader:
    """Reads tokens one pass at a time, and can go back. Speculation needs nothing else of a model.

        reader = Reader(lm.model, max_tokens=200, name="target")
        logits = reader.read(prompt, n_last=1)      # (1, n_vocab)
        reader.rewind(10)                           # as if it had read 10 tokens only

    Args:
        model: a Transformer.
        max_tokens: that the text may have, with guesses; KV for them is allocated at once.
        n_nodes: that a tree may have besides.
        name: stands in the records.

    `features`, (max_tokens + n_nodes, d_model), has what the last layer gave for each cached
    token, before the final norm: what a draft head reads.

    Raises:
        BadInput: at a call, no tokens, tokens out of range, or more than `max_tokens`.
    """

    def __init__(
        self, model: nn.Module, *, max_tokens: int, n_nodes: int = 0, name: str = "target"
    ):
        config = model.config
        require(
            max_tokens <= config.max_positions,
            f"the model knows {config.max_positions} positions; got max_tokens {max_tokens}",
        )
        self.model, self.name, self.n_vocab = model, name, config.n_vocab
        self.max_tokens, self.n_nodes = max_tokens, n_nodes
        where = {"dtype": model.dtype, "device": model.device}
        self.cache = TreeCache(config, max_tokens=max_tokens + n_nodes, **where)
        self.features = torch.zeros(max_tokens + n_nodes, config.d_model, **where)
        self.parents: list[int] = []  # of the tokens read as a tree since `length`

    @property
    def length(self) -> int:
        """Tokens of the text whose keys and values are cached; a tree does not count."""
        return self.cache.length - len(self.parents)

    def read(self, tokens: Sequence[int], *, n_last: int, parents: Sequence[int] = ()) -> Tensor:
        """Read on; the logits after each of the last `n_last` tokens, (n_last, n_vocab).

        parents: the last len(parents) tokens are nodes of a tree that branches off the text. A
            parent is the number of a node, or ROOT. Nodes are numbered on from call to call, so a
            draft reads its tree a depth at a time; `keep` or `rewind` closes the tree.

        Cost: one forward pass of len(tokens) tokens, whose weights are read once.
        """
        n_text, n_before = len(tokens) - len(parents), len(self.parents)
        ancestors = [*self.parents, *parents]
        require(
            n_text == 0 or n_before == 0,
            "a tree is open: keep a path of it, or rewind, and read on then",
        )
        require(
            0 < n_last <= len(tokens), f"n_last must be 1 to {len(tokens)} tokens; got {n_last}"
        )
        require(
            all(ROOT <= parent < node for node, parent in enumerate(ancestors)),
            f"a parent must be a node before its child, or {ROOT}; got {ancestors}",
        )
        require(
            all(0 <= token < self.n_vocab for token in tokens),
            f"tokens must lie in [0, {self.n_vocab}); got {list(tokens)}",
        )
        first = self.length
        root = first + n_text
        mask, depths = tree_mask(ancestors)
        if parents:
            text = torch.ones(len(tokens), root, dtype=torch.bool).tril(first)
            nodes = torch.cat((mask.new_zeros(n_text, len(ancestors)), mask[n_before:]))
            self.cache.mask = torch.cat((text, nodes), dim=1).to(self.model.device)
        try:
            positions = [*range(first, root), *(root + depth for depth in depths[n_before:])]
            before = [*range(first - 1, root - 1), *(root + parent for parent in parents)]
            logits = self._pass(tokens, positions, before, n_last)
        finally:
            self.cache.mask = None
        self.parents = ancestors
        record(Read(self.name, first, len(tokens)))
        return logits

    def keep(self, path: Sequence[int]) -> None:
        """Make the nodes of `path`, from the root down, part of the text; forget the others."""
        length, n_nodes = self.length, len(self.parents)
        slots = [length + node for node in path]
        self.cache.keep(slots, length)
        self.features[length : length + len(path)] = self.features[slots]
        self.parents = []
        record(Rewound(self.name, self.length, n_nodes - len(path)))

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on, if that many were read; and any tree."""
        dropped = self.cache.length - min(length, self.length)
        self.parents = []
        if dropped > 0:
            self.cache.truncate(self.cache.length - dropped)
            record(Rewound(self.name, self.cache.length, dropped))

    @torch.no_grad()
    def _pass(
        self, tokens: Sequence[int], positions: Sequence[int], before: Sequence[int], n_last: int
    ) -> Tensor:
        """before: the slot of the token before each; -1 has none."""
        model, slot = self.model, self.cache.length
        at = torch.tensor([list(positions)], device=model.device)
        x = torch.tensor([list(tokens)], device=model.device)
        hidden = model.hidden(x, *rope_tables(model.config, at, model.dtype), self.cache)
        self.features[slot : slot + len(tokens)] = hidden[0]
        return model.logits(hidden[:, -n_last:])[0]


def tree_mask(parents: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Which nodes each node sees, itself and its ancestors, (n_nodes, n_nodes); and the depths."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if parent != ROOT:
            mask[node] |= mask[parent]
        depths.append(0 if parent == ROOT else depths[parent] + 1)
    return mask, depths
