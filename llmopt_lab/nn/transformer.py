"""A Llama-shaped Transformer that takes its attention and its feed-forward layers by argument.

Parameters are named as in Hugging Face checkpoints without their `model.` prefix.
Sources: Touvron et al. 2023 (LLaMA); Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA);
Zhang and Sennrich 2019 (RMSNorm).
"""

from collections.abc import Callable
from functools import lru_cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import MixtureOfExperts, SwiGLU

# attend(q, k, v, *, layer, scale) -> out: what a chapter replaces. After RoPE, of the NEW tokens:
#   q, out  (batch, n_heads, n, d_head)        k, v  (batch, n_kv_heads, n, d_head)
# An attend that caches owns its state. Query head h reads KV head h // group_size.
Attend = Callable[..., Tensor]
# feed_forward(config, layer) -> a module from (batch, n, d_model) to the same shape
FeedForward = Callable[..., nn.Module]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
    """The stateless default: each of the n tokens sees itself and those before it, nothing else."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square; half precision is squared in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Projections, optional QK-norm and RoPE around an `attend`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.d_head = config.d_head
        self.scale = config.d_head**-0.5
        d_q, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = nn.Linear(config.d_model, d_q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d_q, config.d_model, bias=config.out_bias)
        norm = RMSNorm if config.qk_norm else lambda width, eps: nn.Identity()
        self.q_norm = norm(config.d_head, config.rms_eps)
        self.k_norm = norm(config.d_head, config.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = (*x.shape[:2], -1, self.d_head)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (batch, n_heads, n, d_head)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (batch, n_kv_heads, n, ..)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, layer=self.layer, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, layer: int, feed_forward: FeedForward):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Tokens in, logits out.

    Args:
        config: sizes and switches.
        attend: `attend(q, k, v, *, layer, scale) -> out`, on the new tokens after RoPE: q and out
            (batch, n_heads, n, d_head), k and v (batch, n_kv_heads, n, d_head).
        feed_forward: `feed_forward(config, layer) -> nn.Module`, (batch, n, d_model) to the same;
            if None, SwiGLU, or MixtureOfExperts where the config has experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attend: Attend = causal_attention,
        feed_forward: FeedForward | None = None,
    ):
        super().__init__()
        if feed_forward is None:
            feed_forward = SwiGLU if config.n_experts is None else MixtureOfExperts
        self.config = config
        self.attend = attend
        # standard deviation 0.02; not normal_, which on the meta device imports 140 MB of torch
        start = torch.empty(config.n_vocab, config.d_model).uniform_(-(0.0012**0.5), 0.0012**0.5)
        self.embed_tokens = nn.Embedding.from_pretrained(start, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, layer, feed_forward) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.rms_eps)
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.n_vocab, bias=False)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, and so of the activations and logits."""
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        attend: Attend | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token after each of `tokens`.

        Args:
            tokens: (batch, n) int64.
            positions: (batch, n) int64; 0 .. n-1 in every row if None.
            attend: replaces the constructor's for this call.
            last_only: make logits of the last position only, which for a long prompt and a big
                vocabulary saves most of the memory.

        Returns:
            (batch, n, n_vocab) in the model's dtype; (batch, 1, n_vocab) with `last_only`.

        Raises:
            BadInput: a wrong shape, dtype or device, more tokens than max_positions, and on a CPU
                a token or position out of range (on a GPU the kernels check the tokens).
        """
        if positions is None and tokens.dim() == 2:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        self._check(tokens, positions)
        cos, sin = rope_tables(self.config, positions, self.dtype)
        x = self.hidden(tokens, cos, sin, attend or self.attend)
        return self.logits(x[:, -1:] if last_only else x)

    def hidden(self, tokens: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`forward` up to the last layer's output (batch, n, d_model), with nothing checked.

        For torch.compile: no look at the tokens, and RoPE's tables are made once by the caller.
        """
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The final norm and the output head, on `hidden`'s result."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.norm(x), head.weight)

    def _check(self, tokens: Tensor, positions: Tensor | None) -> None:
        limits = {"tokens": self.config.n_vocab, "positions": self.config.max_positions}
        for name, given in (("tokens", tokens), ("positions", positions)):
            require(
                given is not None and given.dim() == 2 and given.shape == tokens.shape,
                f"tokens and positions must both be (batch, n); got tokens {tuple(tokens.shape)}"
                + ("" if positions is None else f", positions {tuple(positions.shape)}")
                + ". One sequence is tokens[None].",
            )
            require(tokens.numel() > 0, f"tokens must not be empty; got {tuple(tokens.shape)}")
            require(
                given.dtype == torch.int64, f"{name} must be int64; got {given.dtype}: use .long()"
            )
            require(
                given.device == self.device,
                f"{name} are on {given.device}, the model on {self.device}: move one of them",
            )
            if given.device.type == "cpu":  # on a GPU this would wait for the stream
                low, high = int(given.min()), int(given.max())
                require(
                    low >= 0 and high < limits[name],
                    f"{name} must lie in [0, {limits[name]}); got {low} to {high}",
                )
        require(
            tokens.shape[1] <= self.config.max_positions,
            f"the model knows {self.config.max_positions} positions; got {tokens.shape[1]} tokens",
        )


def rope_tables(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles at `positions` (batch, n): (batch, 1, n, d_head) each.

    Angles are float32 whatever the model's dtype, as in the models' own training code: in half
    precision position 2049 would be position 2048.
    """
    frequencies = _inverse_frequencies(config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies  # (batch, 1, n, d_head / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (batch, heads, n, d_head), in pairs (i, i + d_head/2) as Hugging Face does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@lru_cache(maxsize=64)
def _inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(d_head / 2,) float32, radians a position. No buffer: .to(bfloat16) would round a buffer."""
    exponents = torch.arange(0, config.d_head, 2, device="cpu").float() / config.d_head
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_positions / (2 * pi / frequencies)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return frequencies.to(device)
