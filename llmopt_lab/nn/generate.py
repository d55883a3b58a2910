"""Decoding with a contiguous KV cache: greedy and sampled, the generator as an argument."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer


class KVCache:
    """Keys and values of all layers in one contiguous block each: an attend that caches.

        cache = KVCache(config, max_tokens=100)
        logits = model(prompt, cache.next_positions(n), attend=cache)

    Every row of the batch has the same length. `length` grows when the last layer has attended,
    so a forward pass that fails half-way leaves the cache as it was.

    Cost: `config.kv_bytes_per_token(dtype) * batch * max_tokens` bytes, allocated at once.

    Raises:
        BadInput: at a call, new tokens that do not fit or have another shape, dtype or device.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        *,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        require(batch > 0, f"batch must be positive; got {batch}")
        require(max_tokens > 0, f"max_tokens must be positive; got {max_tokens}")
        shape = (config.n_layers, batch, config.n_kv_heads, max_tokens, config.d_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[3]

    def next_positions(self, n: int) -> Tensor:
        """Positions of the next `n` tokens, (batch, n) int64."""
        batch = self.keys.shape[1]
        return torch.arange(self.length, self.length + n, device=self.keys.device).expand(batch, n)

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on. The bytes stay until overwritten."""
        require(
            0 <= length <= self.length,
            f"can keep 0 to {self.length} tokens of {self.length}; got {length}",
        )
        self.length = length

    def visible(self, n: int, end: int, device: torch.device) -> Tensor | None:
        """Which of `end` tokens each of the last `n` sees, (n, end); None: causal, or all."""
        return None if n in (1, end) else causal_mask(n, end, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Append k and v, (batch, n_kv_heads, n, d_head), and attend to all tokens so far."""
        n_layers, batch, n_kv_heads, max_tokens, d_head = self.keys.shape
        n = k.shape[2]
        end = self.length + n
        require(
            k.shape == v.shape == (batch, n_kv_heads, n, d_head),
            f"the cache holds {batch} rows of {n_kv_heads} KV heads of width {d_head}; "
            f"got k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
        require(
            k.dtype == self.keys.dtype and k.device == self.keys.device,
            f"the cache is {self.keys.dtype} on {self.keys.device}, the keys are {k.dtype} on "
            f"{k.device}: make the cache with the model's dtype and device",
        )
        require(
            end <= max_tokens,
            f"the cache has room for {max_tokens} tokens and holds {self.length}; got {n} more. "
            "Make it with a larger max_tokens.",
        )
        self.keys[layer, :, :, self.length : end] = k.detach()
        self.values[layer, :, :, self.length : end] = v.detach()
        mask = self.visible(n, end, q.device)
        out = F.scaled_dot_product_attention(
            q,
            self.keys[layer, :, :, :end],
            self.values[layer, :, :, :end],
            attn_mask=mask,
            is_causal=mask is None and n == end,
            scale=scale,
            enable_gqa=True,
        )
        if layer == n_layers - 1:
            self.length = end
        return out


def causal_mask(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """True where the last `n_q` of `n_k` tokens may look, (n_q, n_k).

    Aligned at the bottom right: the last query sees every key.
    """
    rows = torch.arange(n_k - n_q, n_k, device=device)
    return torch.arange(n_k, device=device) <= rows[:, None]


def to_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The distribution that `sample` draws from, (..., n_vocab) like `logits`, float32 or wider.

    In this order: divide by `temperature` (0: all mass on the largest logit, the first of equals);
    keep the `top_k` largest and what equals the last of them; keep the smallest set of most
    probable tokens whose mass reaches `top_p` (nucleus sampling, Holtzman et al. 2020).

    Raises:
        BadInput: an empty vocabulary, NaN, or a setting out of its range.
    """
    _check_sampling(temperature, top_k, top_p)
    require(
        logits.dim() > 0 and logits.shape[-1] > 0 and logits.is_floating_point(),
        "logits must be floating point of shape (..., n_vocab); "
        f"got {logits.dtype} {tuple(logits.shape)}",
    )
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(-1, keepdim=True)  # NaN where a row holds one
    require(
        bool(largest.isfinite().all()),
        "each row of logits needs a finite maximum and no NaN; the forward pass went wrong before",
    )
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = (logits - largest) / temperature  # never +inf, however small the temperature
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < last, -float("inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, tokens = p.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(-1) - ordered
        keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, tokens, mass_before < top_p)
        p = p.masked_fill(~keep, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of `logits` (..., n_vocab): int64 of shape (...).

    Temperature 0 takes the largest logit and needs no `rng`. Otherwise the draw is made on the
    generator's device, so a CPU generator gives one text on every machine, up to rounding.

    Raises:
        BadInput: as `to_probabilities`; a temperature above 0 without `rng`.
    """
    require(
        temperature == 0 or rng is not None,
        "sampling at a temperature above 0 needs rng=torch.Generator().manual_seed(...)",
    )
    p = to_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return p.argmax(-1)
    flat = p.reshape(-1, p.shape[-1]).to(rng.device)
    drawn = torch.multinomial(flat, 1, generator=rng)
    return drawn.reshape(p.shape[:-1]).to(logits.device)


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_tokens: Tensor,
    n_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: torch.Generator | None = None,
    eos: int | Sequence[int] | None = None,
    on_token: Callable[[int], object] | None = None,
    cache: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Continue one prompt by up to `n_new` tokens.

    Args:
        model: any Transformer; its own attend is not used.
        prompt_tokens: (n,) int64, n >= 1.
        temperature, top_k, top_p, rng: as for `sample`; temperature 0 is greedy.
        eos: stop after any of these tokens; the token itself is part of the result.
        on_token: called with each new token as it appears.
        cache: an empty attend that caches; a `KVCache` of just the right size if None.

    Returns:
        The prompt and what follows it, (n + up to n_new,) int64 on the prompt's device.

    Raises:
        BadInput: an empty or batched prompt, a negative n_new, more tokens than max_positions, a
            sampling setting out of range.

    Cost: one forward pass of n tokens and one of 1 token for each new token but the last.
    """
    config = model.config
    require(
        prompt_tokens.dim() == 1
        and prompt_tokens.numel() > 0
        and prompt_tokens.dtype == torch.int64,
        "prompt_tokens must be (n,) int64 with n >= 1; "
        f"got {prompt_tokens.dtype} {tuple(prompt_tokens.shape)}",
    )
    require(n_new >= 0, f"n_new must not be negative; got {n_new}")
    n_total = len(prompt_tokens) + n_new
    require(
        n_total <= config.max_positions,
        f"the model knows {config.max_positions} positions; "
        f"got a prompt of {len(prompt_tokens)} and {n_new} new tokens",
    )
    _check_sampling(temperature, top_k, top_p)
    require(temperature == 0 or rng is not None, "a temperature above 0 needs rng=torch.Generator")
    held = getattr(cache, "length", 0)
    require(held == 0, f"the cache must be empty: it holds {held} tokens; truncate(0) empties it")
    stop = {eos} if isinstance(eos, int) else set(eos or ())

    device = prompt_tokens.device
    if cache is None:
        cache = KVCache(config, max_tokens=n_total, dtype=model.dtype, device=model.device)
    tokens = prompt_tokens.to(model.device)[None]  # (1, n) new to the model
    text = prompt_tokens.tolist()
    for _ in range(n_new):
        start = len(text) - tokens.shape[1]
        positions = torch.arange(start, len(text), device=model.device)[None]
        logits = model(tokens, positions, attend=cache, last_only=True)[0, -1]  # (n_vocab,)
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
        tokens = token.view(1, 1)
        text.append(int(token))
        if on_token is not None:
            on_token(text[-1])
        if text[-1] in stop:
            break
    return torch.tensor(text, device=device)


class NextToken:
    """What a model expects next, for a text that grows, shrinks or changes between calls.

        next_token = NextToken(lm.model)
        p = next_token(lm.encode("Gravity is"))  # (n_vocab,)

    It keeps the keys and values of the last text, and a call computes only what comes after the
    part that both texts begin with: one forward pass of 1 token for a text that is 1 token longer.

    Args:
        max_tokens: that a text may have; the KV cache for them is allocated at once.

    Raises:
        BadInput: more tokens than the model has positions; at a call, no tokens or too many.
    """

    def __init__(self, model: Transformer, *, max_tokens: int = 512):
        require(
            max_tokens <= model.config.max_positions,
            f"the model knows {model.config.max_positions} positions; got max_tokens {max_tokens}",
        )
        self.model = model
        self.cache = KVCache(
            model.config, max_tokens=max_tokens, dtype=model.dtype, device=model.device
        )
        self._cached: list[int] = []

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Probabilities of the token after `tokens` (n,), (n_vocab,) float32 or wider."""
        tokens = torch.as_tensor(tokens).tolist()
        require(len(tokens) > 0, "there is no token to go on from; give one at least")
        require(
            len(tokens) <= self.cache.max_tokens,
            f"the text has {len(tokens):,} tokens, and there is room for "
            f"{self.cache.max_tokens:,}: make it shorter",
        )
        pairs = zip(self._cached, tokens, strict=False)
        n_kept = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        n_kept = min(len(self._cached), len(tokens)) if n_kept is None else n_kept
        n_kept = min(n_kept, len(tokens) - 1)  # the last one is read again for its logits
        self.cache.truncate(n_kept)
        self._cached = tokens[:n_kept]
        new = torch.tensor([tokens[n_kept:]], device=self.model.device)
        positions = self.cache.next_positions(len(tokens) - n_kept)
        logits = self.model(new, positions, attend=self.cache, last_only=True)[0, -1]
        self._cached = tokens
        return to_probabilities(logits)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    require(
        0 <= temperature < float("inf"),
        f"temperature must be 0 (greedy) or a positive finite number; got {temperature}",
    )
    require(top_k is None or top_k >= 1, f"top_k must be at least 1, or None; got {top_k}")
    require(top_p is None or 0 < top_p <= 1, f"top_p must lie in (0, 1], or be None; got {top_p}")
