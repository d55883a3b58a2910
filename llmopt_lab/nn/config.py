"""The shape of a Llama-like model, read from a Hugging Face config.json."""

from dataclasses import dataclass

import torch

from llmopt_lab.core.errors import require

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of RoPE: long wavelengths by `factor`, short ones not, a ramp between.

    A frequency that turns more than `high_freq_factor` times within `original_max_positions` is
    kept; one that turns less than `low_freq_factor` times is divided by `factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        require(self.factor >= 1, f"RoPE scaling factor must be at least 1; got {self.factor}")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "RoPE scaling needs 0 < low_freq_factor < high_freq_factor; got "
            f"{self.low_freq_factor} and {self.high_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one Transformer. Frozen and hashable.

    Raises:
        BadInput: a size that is not positive, heads that do not divide, an odd head width.
    """

    n_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # grouped-query attention when fewer than n_heads
    d_head: int
    d_ff: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    rms_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE (Qwen3)
    n_experts: int | None = None  # in each layer, of width d_ff each; None is one SwiGLU (Mixtral)
    top_k: int | None = None  # experts that a token visits
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self):
        for name, size in vars(self).items():
            if size is None and name == "n_experts":
                continue
            if name.startswith(("n_", "d_")) or name in ("max_positions", "rope_theta"):
                require(size > 0, f"{name} must be positive; got {size}")
        require(self.rms_eps >= 0, f"rms_eps must not be negative; got {self.rms_eps}")
        require(
            self.n_heads % self.n_kv_heads == 0,
            "n_heads must be a multiple of n_kv_heads, so that each KV head serves equally many "
            f"query heads; got {self.n_heads} and {self.n_kv_heads}",
        )
        require(
            self.d_head % 2 == 0,
            f"d_head must be even, because RoPE rotates pairs; got {self.d_head}",
        )
        if self.n_experts is None:
            require(
                self.top_k is None, f"top_k is {self.top_k}, but there are no experts: n_experts"
            )
        else:
            require(
                self.top_k is not None and 1 <= self.top_k <= self.n_experts,
                f"top_k must lie in [1, n_experts = {self.n_experts}]; got {self.top_k}",
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_parameters(self) -> int:
        """Weights of the whole model with its own feed-forward; tied embeddings count once."""
        return self._n_parameters(self.n_experts or 1)

    @property
    def n_active_parameters(self) -> int:
        """Weights that one token meets: of a mixture of experts, top_k experts a layer."""
        return self._n_parameters(self.top_k or 1)

    def _n_parameters(self, n_experts: int) -> int:
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        attention = 2 * self.d_model * (d_q + d_kv)
        attention += self.qkv_bias * (d_q + 2 * d_kv) + self.out_bias * self.d_model
        attention += self.qk_norm * 2 * self.d_head
        feed_forward = n_experts * 3 * self.d_model * self.d_ff
        feed_forward += self.d_model * (self.n_experts or 0)  # the router
        layer = attention + feed_forward + 2 * self.d_model
        embeddings = self.n_vocab * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.d_model

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head * dtype.itemsize

    @classmethod
    def from_hf(cls, config_json: dict) -> "ModelConfig":
        """Read the content of a Hugging Face config.json of a Llama, Mistral, Mixtral, Qwen2 or
        Qwen3 model.

        A sliding window is honoured by lowering `max_positions` to it: within the window the
        result is the same as with full attention, and beyond it the model refuses.

        Raises:
            BadInput: another architecture, a missing field, or a field that would change the
                result and that this model does not have.
        """
        c = config_json
        family = c.get("model_type")
        require(
            family in FAMILIES,
            f"model_type {family!r} is not supported; this model reads {', '.join(FAMILIES)}",
        )
        keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        keys += ["num_attention_heads"]
        keys += ["num_local_experts", "num_experts_per_tok"] * (family == "mixtral")
        for key in keys:
            require(
                isinstance(c.get(key), int),
                f"config.json needs a whole number {key!r}; got {c.get(key)!r}",
            )
        _refuse_what_changes_the_result(c)

        n_heads = c["num_attention_heads"]
        d_head = c.get("head_dim") or (128 if family == "qwen3" else c["hidden_size"] // n_heads)
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        all_biased = family in ("llama", "qwen3") and bool(c.get("attention_bias", False))
        eos = c.get("eos_token_id")
        return cls(
            n_vocab=c["vocab_size"],
            d_model=c["hidden_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=c.get("num_key_value_heads") or n_heads,
            d_head=d_head,
            d_ff=c["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0),
            rope_scaling=_rope_scaling(rope),
            rms_eps=float(c.get("rms_norm_eps", 1e-6)),
            max_positions=min(c.get("max_position_embeddings", 2048), _window(c)),
            tie_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=all_biased or family == "qwen2",
            out_bias=all_biased,
            qk_norm=family == "qwen3",
            n_experts=c["num_local_experts"] if family == "mixtral" else None,
            top_k=c["num_experts_per_tok"] if family == "mixtral" else None,
            bos=c.get("bos_token_id"),
            eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def to_hf(self) -> dict:
        """The content of a Hugging Face config.json that `from_hf` reads back as this config.

        Raises:
            BadInput: switches that no architecture of FAMILIES has together.
        """
        family = (
            "mixtral" if self.n_experts
            else "qwen3" if self.qk_norm
            else "qwen2" if self.qkv_bias and not self.out_bias
            else "llama"
        )  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            s = self.rope_scaling
            rope |= {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_positions,
            }
        content = {
            "architectures": [f"{family.capitalize()}ForCausalLM"],
            "model_type": family,
            "vocab_size": self.n_vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.d_head,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_eps,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": rope,  # transformers 5
            "rope_theta": self.rope_theta,  # and those before it
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos[0] if len(self.eos) == 1 else list(self.eos) or None,
        }
        if family in ("llama", "qwen3"):
            content["attention_bias"] = self.qkv_bias
        if family == "mixtral":
            content |= {"num_local_experts": self.n_experts, "num_experts_per_tok": self.top_k}
            content["sliding_window"] = None
        require(
            ModelConfig.from_hf(content) == self,
            f"no Hugging Face architecture of {', '.join(FAMILIES)} has all of: {self}",
        )
        return content


def _refuse_what_changes_the_result(c: dict) -> None:
    activation = c.get("hidden_act", "silu")
    require(
        activation in ("silu", "swish"),
        f"hidden_act must be 'silu' (SwiGLU); got {activation!r}. Use a model with SwiGLU layers.",
    )
    require(
        not c.get("mlp_bias"),
        "mlp_bias is true, but SwiGLU here has no bias; pass your own feed_forward= to Transformer",
    )
    require(
        c.get("quantization_config") is None,
        "the weights are stored quantized (quantization_config); use the unquantized model or GGUF",
    )
    kinds = set(c.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    require(not kinds, f"layer_types has {sorted(kinds)}; only full and sliding attention are read")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    require(part == 1.0, f"partial_rotary_factor must be 1: RoPE turns whole heads; got {part}")


def _window(c: dict) -> int:
    """Positions within which sliding-window attention equals full attention."""
    if c["model_type"] in ("mistral", "mixtral") or c.get("use_sliding_window"):
        window = c.get("sliding_window", 4096)
    else:
        window = None
    return c.get("max_position_embeddings", 2048) if window is None else window


def _rope_scaling(rope: dict) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"RoPE scaling {kind!r} is not supported; only 'default' and 'llama3' are",
    )
    if kind == "default":
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in keys:
        require(isinstance(rope.get(key), int | float), f"llama3 RoPE scaling lacks {key!r}")
    return Llama3Scaling(*(rope[key] for key in keys))
