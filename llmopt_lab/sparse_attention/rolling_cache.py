"""Endless text in constant memory: sinks, a rolling buffer of the last keys, places in the cache.

    cache = RollingCache(model.config, window=252, n_sinks=4)
    for part in tokens.split(64):
        logits = model(part[None], cache.next_positions(len(part)), attend=cache)

Source: Xiao et al. 2023, StreamingLLM, sections 3.2 and 3.3, https://arxiv.org/abs/2309.17453
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer, rope_tables, rotate
from llmopt_lab.sparse_attention.records import Rolled


class RollingCache:
    """An attend that caches the first `n_sinks` tokens and the last `window`, and no other.

    Positions are places in the cache, not in the text: a token's own place is at most
    n_sinks + window - 1, the keys of the window lie right before it, and the sinks stay at 0, 1, ..
    So distances never exceed what the model was trained on. Keys are kept as they were before RoPE
    and turned to their places at every call, as the paper does. Up to n_sinks + window tokens
    nothing is forgotten, and the result is that of causal attention.

    Args:
        config: the model's.
        window, n_sinks: how many tokens stay; n_sinks 0 is plain window attention.

    Raises:
        BadInput: sizes that are not positive or do not fit the model's positions; at a call, more
            tokens than there are positions left, or another shape, dtype or device.

    Memory: `nbytes`, allocated at once; a call of n tokens takes n more of each for its duration.
    Cost of a call: n (n_sinks + window) scores a head.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        *,
        window: int,
        n_sinks: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        require(batch > 0, f"batch must be positive; got {batch}")
        require(window > 0, f"window must be positive; got {window}")
        require(n_sinks >= 0, f"n_sinks must not be negative; got {n_sinks}")
        require(
            window + n_sinks <= config.max_positions,
            f"the model knows {config.max_positions} positions; got {n_sinks} sinks and a window "
            f"of {window}",
        )
        self.config, self.window, self.n_sinks = config, window, n_sinks
        shape = (config.n_layers, batch, config.n_kv_heads, n_sinks + window, config.d_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # before RoPE
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # tokens read so far

    @property
    def nbytes(self) -> int:
        """What it holds, whatever the length of the text."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def max_step(self) -> int:
        """Most tokens of one call."""
        return self.config.max_positions - self._first_place

    @property
    def _first_place(self) -> int:
        """The place of the next token."""
        return min(self.length, self.n_sinks + self.window - 1)

    def next_positions(self, n: int) -> Tensor:
        """Positions to give the model with the next `n` tokens, (batch, n) int64."""
        require(
            0 < n <= self.max_step,
            f"1 to {self.max_step} tokens fit in one call; got {n}: split them",
        )
        first, batch = self._first_place, self.keys.shape[1]
        return torch.arange(first, first + n, device=self.keys.device).expand(batch, n)

    def kept(self) -> list[int]:
        """Numbers of the tokens that the cache holds, oldest first."""
        oldest = max(self.length - self.window, min(self.n_sinks, self.length))
        return [*range(min(self.n_sinks, self.length)), *range(oldest, self.length)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """q (batch, n_heads, n, d_head), k and v (batch, n_kv_heads, n, d_head): out like q.

        q and k must have been turned by RoPE to `next_positions(n)`.
        """
        n, (batch, n_kv_heads) = k.shape[2], self.keys.shape[1:3]
        require(
            k.shape == v.shape == (batch, n_kv_heads, n, self.config.d_head),
            f"the cache holds {batch} rows of {n_kv_heads} KV heads of width "
            f"{self.config.d_head}; got k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
        require(
            k.dtype == self.keys.dtype and k.device == self.keys.device,
            f"the cache is {self.keys.dtype} on {self.keys.device}, the keys are {k.dtype} on "
            f"{k.device}: make the cache with the model's dtype and device",
        )
        positions = self.next_positions(n)[:1]
        new = self._turned(k.detach(), positions, back=True)
        before = torch.tensor(self.kept(), dtype=torch.int64, device=k.device)
        tokens = torch.cat(
            [before, self.length + torch.arange(n, device=k.device)]
        )  # (n_kept + n,)
        slots = self._slots(before)
        keys = torch.cat([self.keys[layer][:, :, slots], new], dim=2)
        values = torch.cat([self.values[layer][:, :, slots], v.detach()], dim=2)
        out = self._attend(q, keys, values, tokens, positions[0], scale)

        stay = (tokens[-n:] < self.n_sinks) | (tokens[-n:] >= self.length + n - self.window)
        self.keys[layer][:, :, self._slots(tokens[-n:][stay])] = new[:, :, stay]
        self.values[layer][:, :, self._slots(tokens[-n:][stay])] = v.detach()[:, :, stay]
        if layer == self.config.n_layers - 1:
            held = len(before)
            self.length += n
            record(Rolled(self.length - n, n, held + n - len(self.kept()), self.n_sinks,
                          max(self.n_sinks, self.length - self.window)))  # fmt: skip
        return out

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, places: Tensor, scale: float
    ) -> Tensor:
        """The new queries against `tokens`, sinks first: keys not turned yet."""
        n, n_sinks = q.shape[2], int((tokens < self.n_sinks).sum())
        rows = tokens[-n:]
        shift = rows[0] - places[0]  # from a token's number to its place while these are read
        seen = (tokens <= rows[:, None]) & (tokens > rows[:, None] - self.window)
        seen |= (tokens < self.n_sinks) & (tokens <= rows[:, None])
        near = self._turned(keys[:, :, n_sinks:], (tokens[n_sinks:] - shift)[None])
        sinks = self._turned(keys[:, :, :n_sinks], tokens[None, :n_sinks])
        # seen from the sinks no token is further than the last place of the cache
        own = rows.clamp(max=self.n_sinks + self.window - 1)
        far = self._turned(q, (own - places)[None])
        group = q.shape[1] // keys.shape[1]
        sinks, near, values = (x.repeat_interleave(group, 1) for x in (sinks, near, values))
        scores = scale * torch.cat([far @ sinks.mT, q @ near.mT], dim=-1)
        return F.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ values

    def _slots(self, tokens: Tensor) -> Tensor:
        """Where tokens lie: the sinks at their number, the others in a ring behind them."""
        ring = self.n_sinks + (tokens - self.n_sinks) % self.window
        return torch.where(tokens < self.n_sinks, tokens, ring)

    def _turned(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """RoPE by that many places further (or back): positions (1, n), of any sign."""
        cos, sin = rope_tables(self.config, positions, x.dtype)
        return rotate(x, cos, -sin if back else sin)


@torch.no_grad()
def stream_nats(
    model: Transformer, tokens: Tensor, cache: RollingCache, *, step: int = 64
) -> Tensor:
    """Surprise, in nats, of each token but the first of a text of any length: (n - 1,) float64.

    Args:
        tokens: (n,) int64, n > 1.
        cache: an empty one; the text leaves it full.
        step: tokens of one pass of the model. The result does not depend on it, up to rounding.

    Cost: n (n_sinks + window + step) scores a head and layer; memory does not grow with n.
    """
    require(
        tokens.dim() == 1 and len(tokens) > 1,
        f"tokens must be (n,) with n > 1; got {tuple(tokens.shape)}",
    )
    require(cache.length == 0, f"the cache must be empty; it has read {cache.length} tokens")
    nats = torch.empty(len(tokens) - 1, dtype=torch.float64)
    for first in range(0, len(tokens) - 1, step):
        part = tokens[first : first + step + 1]
        inputs, targets = part[: len(part) - 1], part[1:]
        logits = model(inputs[None], cache.next_positions(len(inputs)), attend=cache)[0]
        nats[first : first + len(targets)] = F.cross_entropy(
            logits.double(), targets, reduction="none"
        )
    return nats


@torch.no_grad()
def stream_greedy(
    model: Transformer, prompt: Tensor, n_new: int, cache: RollingCache, *, step: int = 64
) -> Tensor:
    """Continue a prompt greedily by `n_new` tokens, however many: (n + n_new,) int64.

    Cost: one pass a new token; memory does not grow with the text.
    """
    require(
        prompt.dim() == 1 and len(prompt) > 0 and n_new >= 0,
        f"the prompt must be (n,), n > 0, and n_new not negative; got {tuple(prompt.shape)} and "
        f"{n_new}",
    )
    require(cache.length == 0, f"the cache must be empty; it has read {cache.length} tokens")
    text, waiting = prompt.tolist(), prompt
    while len(text) < len(prompt) + n_new:
        for part in waiting.split(step):
            logits = model(
                part[None], cache.next_positions(len(part)), attend=cache, last_only=True
            )
        waiting = logits[0, -1:].argmax(-1)
        text.append(int(waiting))
    return torch.tensor(text, device=prompt.device)
