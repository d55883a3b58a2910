"""A draft head: one layer that goes on from the target's own features (EAGLE).

    target = Reader(lm.model, max_tokens=200)
    speculative_decode(target, HeadDraft(load_head(), target), prompt, k=4, n_new=100)

A small model starts from the tokens alone. The target has computed far more about the text: the
feature of a token is what its last layer gave, and the head predicts the next feature from it and
from the token that came next, which the feature alone does not know. The target's own output head
makes the guess of it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import SwiGLU
from llmopt_lab.nn.transformer import Attend, Block, RMSNorm, rope_tables
from llmopt_lab.speculative_decoding.reader import Reader
from llmopt_lab.speculative_decoding.reference import ModelDraft

FOLDER = Path(__file__).parent / "lab-target-head"  # the head that ships, and its card


class DraftHead(nn.Module):
    """From the feature before a token and the token itself to the token's own feature.

    Args:
        config: the target's; the layer is as one of its own.

    Source: Li et al. 2024, EAGLE (https://arxiv.org/abs/2401.15077); both inputs are normed, as in
    EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = replace(config, n_layers=1)
        self.feature_norm = RMSNorm(config.d_model, config.rms_eps)
        self.token_norm = RMSNorm(config.d_model, config.rms_eps)
        self.fc = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.layer = Block(self.config, 0, SwiGLU)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the features."""
        return self.fc.weight.dtype

    def forward(
        self, features: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """Row i reads token i.

        Args:
            features: (batch, n, d_model), of the token before each; zeros before the first one.
            embedded: (batch, n, d_model), each token by the target's embedding.
            cos, sin: `rope_tables` at the tokens' positions.
            attend: as for `Transformer`.

        Returns:
            (batch, n, d_model), as the target's `hidden` would give; `target.logits` takes it.
        """
        both = torch.cat((self.feature_norm(features), self.token_norm(embedded)), dim=-1)
        return self.layer(self.fc(both), cos, sin, attend)


class HeadDraft(ModelDraft):
    """A draft head as the draft, in chains and trees.

    Args:
        head: trained for the target's model.
        target: the reader that `speculative_decode` gets, too: the head reads its features. What
            the target has not read yet, the head has it read: a pass over the prompt.

    Where the target has read a token, the head takes its feature; for guesses its own. What it
    cached for guesses is forgotten at the end of a round, even if they are kept: the target's
    features of them are better.
    """

    def __init__(self, head: DraftHead, target: Reader, *, name: str = "draft"):
        model = target.model
        require(
            replace(model.config, n_layers=1) == head.config,
            f"this head is for another model: it has {head.config}, the target {model.config}",
        )
        require(
            (head.dtype, head.device) == (model.dtype, model.device),
            f"the head is {head.dtype} on {head.device}, the target {model.dtype} on "
            f"{model.device}: load both alike",
        )
        super().__init__(head, max_tokens=target.max_tokens, n_nodes=target.n_nodes, name=name)
        self.target = target
        self.n_true = 0  # tokens read with the target's features

    def read(self, tokens: Sequence[int], *, n_last: int, parents: Sequence[int] = ()) -> Tensor:
        n_text, first, target = len(tokens) - len(parents), self.length, self.target
        require(
            n_text == 0 or not parents, "a head reads the text first, then a tree a depth at a time"
        )
        require(
            all(parent < len(self.parents) for parent in parents),
            "a head reads a tree a depth at a time: a node's parent must be read before",
        )
        if n_text > 1 and target.length < first + n_text - 1:
            require(
                first <= target.length,
                f"the target has read {target.length} tokens and the head {first}: rewind it first",
            )
            target.read(tokens[target.length - first : n_text - 1], n_last=1)
        logits = super().read(tokens, n_last=n_last, parents=parents)
        if not parents and self.length <= target.length + 1:
            self.n_true = self.length
        return logits

    def rewind(self, length: int) -> None:
        self.n_true = min(self.n_true, length)
        super().rewind(self.n_true)

    @torch.no_grad()
    def _pass(
        self, tokens: Sequence[int], positions: Sequence[int], before: Sequence[int], n_last: int
    ) -> Tensor:
        target, head, slot = self.target, self.model, self.cache.length
        at = torch.tensor([list(positions)], device=head.device)
        x = torch.tensor([list(tokens)], device=head.device)
        last = torch.tensor(before, device=head.device)[:, None]  # (n, 1)
        features = torch.where(
            last < target.length, target.features[last[:, 0]], self.features[last[:, 0]]
        )
        features = features.masked_fill(last < 0, 0)[None]
        embedded = target.model.embed_tokens(x)
        tables = rope_tables(head.config, at, head.dtype)
        hidden = head(features, embedded, *tables, self.cache)  # (1, n, d_model)
        self.features[slot : slot + len(tokens)] = hidden[0]
        return target.model.logits(hidden[:, -n_last:])[0]


def load_head(
    folder: str | Path = FOLDER,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DraftHead:
    """lab-target's draft head, or another one that `train_head` wrote.

    Raises:
        BadInput: no head in this folder.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    require(
        (folder / "config.json").is_file() and (folder / "model.safetensors").is_file(),
        f"{folder} has no draft head: config.json and model.safetensors are missing",
    )
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head = DraftHead(ModelConfig.from_hf(settings))
    head.load_state_dict(load_file(folder / "model.safetensors"))
    return head.to(device, dtype).requires_grad_(False).eval()
