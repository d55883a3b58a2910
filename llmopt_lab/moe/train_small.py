"""Train a small mixture in seconds on a CPU, balanced in one of three ways, and watch its loads.

    runs = {way: SmallTraining(way, text) for way in WAYS}
    for _ in range(20):
        for way, run in runs.items():
            print(run.advance(15))

A language model of two layers that reads bytes: with 256 symbols instead of 4,096 the output head
is cheap, and the minute goes into the experts.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.moe.balance import moved_bias
from llmopt_lab.moe.records import TrainingReport
from llmopt_lab.moe.reference import route
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import MixtureOfExperts, expert_load
from llmopt_lab.nn.transformer import Transformer

WAYS = ("none", "loss", "bias")
CONFIG = ModelConfig(
    n_vocab=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=32,
    n_experts=8, top_k=2, max_positions=128, tie_embeddings=True,
)  # fmt: skip
BATCH = 8  # windows of max_positions bytes a step
LEARNING_RATE = 3e-3  # AdamW's
LOSS_WEIGHT = 0.01  # of the balance loss, as in Switch
BIAS_RATE = 0.01  # 1e-3 in the paper, whose runs have a hundred times as many steps


class BiasedMixture(MixtureOfExperts):
    """MixtureOfExperts whose choice, and nothing else, sees a bias that no gradient moves."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.register_buffer("bias", torch.zeros(config.n_experts))
        self.visited: Tensor | None = None  # (n_tokens, top_k), by the last forward pass

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x).flatten(0, -2)
        routing = route(logits, self.top_k, bias=self.bias)
        self.visited = routing.experts
        return tuple(
            t.view(*x.shape[:-1], -1) for t in (routing.scores, routing.weights, routing.experts)
        )


class SmallTraining:
    """One run. Runs of one seed start from the same weights and read the same text.

    Args:
        way: of balancing: "none", "loss" (the auxiliary loss of Switch) or "bias" (no loss).
        text: what to learn; random windows of it, n_vocab must be 256.
        seed: of the weights and the windows.
        config: sizes of the model, with experts.

    Raises:
        BadInput: another way, a text shorter than a window, a config that does not fit.
    """

    def __init__(self, way: str, text: bytes, *, seed: int = 0, config: ModelConfig = CONFIG):
        require(way in WAYS, f"way must be one of {', '.join(WAYS)}; got {way!r}")
        require(
            config.n_experts is not None and config.n_vocab == 256,
            "the config must have experts, and 256 symbols, one a byte; got "
            f"n_experts {config.n_experts}, n_vocab {config.n_vocab}",
        )
        self.way, self.step = way, 0
        self.bytes = _as_tokens(text, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Transformer(config, feed_forward=BiasedMixture)
        self.rng = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    @property
    def mixtures(self) -> list[BiasedMixture]:
        """One a layer."""
        return [block.mlp for block in self.model.layers]

    def advance(self, n_steps: int) -> TrainingReport:
        """Train for `n_steps` more steps."""
        require(n_steps > 0, f"n_steps must be positive; got {n_steps}")
        config, nats = self.model.config, 0.0
        load = torch.zeros(config.n_layers, config.n_experts, dtype=torch.float64)
        self.model.train()
        for _ in range(n_steps):
            starts = torch.randint(
                len(self.bytes) - config.max_positions, (BATCH,), generator=self.rng
            )
            offsets = torch.arange(config.max_positions + 1)
            rows = self.bytes[starts[:, None] + offsets]  # (BATCH, window + 1)
            loss = _nats(self.model, rows).mean()
            balance = sum(m.balance for m in self.mixtures) / config.n_layers
            (loss + (LOSS_WEIGHT * balance if self.way == "loss" else 0.0)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            nats += float(loss.detach())
            for layer, mixture in enumerate(self.mixtures):
                load[layer] += expert_load(mixture.visited, config.n_experts)
                if self.way == "bias":
                    mixture.bias = moved_bias(mixture.bias, mixture.visited, rate=BIAS_RATE)
        self.step += n_steps
        return TrainingReport(self.way, self.step, nats / n_steps / log(2), load / n_steps)

    @torch.no_grad()
    def bits_per_byte(self, text: bytes) -> float:
        """Of a text, in windows of max_positions that are read each on its own."""
        window = self.model.config.max_positions
        tokens = _as_tokens(text, self.model.config)
        self.model.eval()
        rows = tokens[: (len(tokens) - 1) // window * window + 1].unfold(0, window + 1, window)
        return float(torch.cat([_nats(self.model, part) for part in rows.split(32)]).mean()) / log(
            2
        )


def _as_tokens(text: bytes, config: ModelConfig) -> Tensor:
    require(
        isinstance(text, bytes) and len(text) > config.max_positions,
        f"text must be bytes, more than a window of {config.max_positions}; got "
        f"{type(text).__name__} of length {len(text)}",
    )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _nats(model: Transformer, rows: Tensor) -> Tensor:
    """Of every symbol of rows[:, 1:], flat."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
