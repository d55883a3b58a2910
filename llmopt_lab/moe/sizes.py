"""The calculator: parameters, all and active, and the bytes that a batch of tokens reads.

    size = ModelSize.from_hf(json.load(open("config.json")))
    size.total, size.active, size.bytes_read(n_tokens=16) / 16
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.errors import require


class Traffic(NamedTuple):
    """Bytes moved between slow and fast memory."""

    read: int
    written: int


def layer_traffic(
    *, n_tokens: int, n_experts: int, d: int, d_ff: int, n_visits: int, n_touched: int,
    itemsize: int, d_shared: int = 0,
) -> Traffic:
    """Of `moe_layer`, exactly. Dropped visits do not count; `n_touched` experts have visitors.

    Read: the router and the weights of the experts touched once; a token once for its logits and
    once a visit; each visit's result once, as it is summed. Written: each visit's result, and the
    sums.
    """
    weights = d * n_experts + n_touched * 3 * d * d_ff + 3 * d * d_shared
    read = weights + n_tokens * d + 2 * n_visits * d + (n_tokens * d if d_shared else 0)
    return Traffic(itemsize * read, itemsize * (n_visits * d + n_tokens * d))


def uniform_visits(n_experts: int, k: int) -> Tensor:
    """(n_experts,): the probability that a token visits each expert, if all are equally liked."""
    require(1 <= k <= n_experts, f"k must lie in [1, n_experts = {n_experts}]; got {k}")
    return torch.full((n_experts,), k / n_experts, dtype=torch.float64)


def expected_touched(probability: Tensor, n_tokens: int) -> float:
    """Distinct experts that `n_tokens` tokens visit, in expectation: sum of 1 - (1 - p_e)^n.

    Exact where tokens choose independently of each other, however one token's k choices depend on
    each other. With `uniform_visits` it is n_experts * (1 - (1 - k / n_experts)^n). Real tokens of
    one text are alike and like some experts more: they touch fewer, so this is what to plan for.

    Args:
        probability: (n_experts,), that a token visits each; sums to k.
    """
    require(
        probability.ndim == 1 and bool(((0 <= probability) & (probability <= 1)).all()),
        f"probability must be (n_experts,), each in [0, 1]; got {tuple(probability.shape)}",
    )
    require(n_tokens >= 0, f"n_tokens must not be negative; got {n_tokens}")
    return float((1 - (1 - probability.double()) ** n_tokens).sum())


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a mixture-of-experts model, split by who meets them."""

    d: int
    n_moe_layers: int
    n_experts: int          # that the router chooses among, in each of these layers
    k: int
    per_expert: int         # parameters of one expert of one layer
    always: int             # of all the rest: attention, norms, routers, shared experts, dense
                            # layers, embeddings
    input_table: int        # part of `always`: an embedding table of which a token reads one row

    @property
    def total(self) -> int:
        """What must be held in memory."""
        return self.always + self.n_moe_layers * self.n_experts * self.per_expert

    @property
    def active(self) -> int:
        """What one token meets, as model cards count it: with the whole embedding table."""
        return self.always + self.n_moe_layers * self.k * self.per_expert

    def touched(self, n_tokens: int) -> float:
        """Distinct experts of one layer that a batch visits, tokens choosing evenly, alone."""
        return expected_touched(uniform_visits(self.n_experts, self.k), n_tokens)

    def bytes_read(self, n_tokens: int, *, itemsize: float = 2.0) -> float:
        """Of weights, in one step over `n_tokens` tokens, expected as by `touched`.

        The first token reads about `active` parameters. With more, what all meet is read once for
        all, but the tokens choose other and other experts, until the step reads all there are.
        """
        require(n_tokens > 0, f"n_tokens must be positive; got {n_tokens}")
        rows = n_tokens * self.d if self.input_table else 0
        experts = self.n_moe_layers * self.touched(n_tokens) * self.per_expert
        return itemsize * (self.always - self.input_table + rows + experts)

    @classmethod
    def from_hf(cls, config_json: dict) -> "ModelSize":
        """Of the content of a Hugging Face config.json: model_type mixtral, qwen3_moe, deepseek_v2,
        deepseek_v3 or switch_transformers.

        DeepSeek's balancing bias and its extra prediction layer are not counted. A Switch
        Transformer has an encoder and a decoder; `active` is the sum over both, although a token
        passes one of them.

        Raises:
            BadInput: another family, or a field that is missing or that would change the count.
        """
        family = config_json.get("model_type")
        require(
            family in FAMILIES,
            f"model_type {family!r} is not counted here; {', '.join(FAMILIES)} are",
        )
        for key in ("attention_bias", "mlp_bias"):
            require(not config_json.get(key), f"{key} is true: biases are not counted here")
        return FAMILIES[family](_Config(config_json))


class _Config(dict):
    """A config.json that names what it lacks."""

    def __missing__(self, key: str):
        require(False, f"config.json needs {key!r} to count the parameters of this family")

    def __getitem__(self, key: str):
        value = super().__getitem__(key)
        require(
            isinstance(value, int) and value >= 0 or isinstance(value, list),
            f"config.json needs a whole number {key!r}; got {value!r}",
        )
        return value


def _mixtral(c: _Config) -> ModelSize:
    n_layers, experts = c["num_hidden_layers"], c["num_local_experts"]
    return _decoder(
        c, attention=_grouped_query(c), sparse=n_layers, n_experts=experts,
        d_expert=c["intermediate_size"], d_shared=0,
    )


def _qwen3_moe(c: _Config) -> ModelSize:
    only, step = c.get("mlp_only_layers") or [], c.get("decoder_sparse_step", 1)
    sparse = sum(i not in only and (i + 1) % step == 0 for i in range(c["num_hidden_layers"]))
    return _decoder(
        c, attention=_grouped_query(c) + 2 * c["head_dim"], sparse=sparse,
        n_experts=c["num_experts" if "num_experts" in c else "num_local_experts"],  # transformers 5
        d_expert=c["moe_intermediate_size"], d_shared=0,
    )


def _deepseek(c: _Config) -> ModelSize:
    dense = min(c["first_k_dense_replace"], c["num_hidden_layers"])
    require(
        c.get("moe_layer_freq", 1) == 1,
        f"moe_layer_freq must be 1; got {c.get('moe_layer_freq')}",
    )
    return _decoder(
        c, attention=_latent(c), sparse=c["num_hidden_layers"] - dense,
        n_experts=c["n_routed_experts"], d_expert=c["moe_intermediate_size"],
        d_shared=c["n_shared_experts"] * c["moe_intermediate_size"],
    )


def _grouped_query(c: _Config) -> int:
    """Projections of queries, keys, values and the output."""
    n_heads, d = c["num_attention_heads"], c["hidden_size"]
    d_head = c.get("head_dim") or d // n_heads
    return 2 * d * d_head * (n_heads + c["num_key_value_heads"])


def _latent(c: _Config) -> int:
    """Multi-head latent attention: queries and keys through a narrow middle, norms included."""
    n_heads, d, d_kv = c["num_attention_heads"], c["hidden_size"], c["kv_lora_rank"]
    d_q = n_heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    narrow = c.get("q_lora_rank")
    queries = d * d_q if narrow is None else narrow * (d + 1 + d_q)
    to_keys_values = n_heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    keys_values = d * (d_kv + c["qk_rope_head_dim"]) + d_kv * (1 + to_keys_values)
    return queries + keys_values + n_heads * c["v_head_dim"] * d


def _decoder(
    c: _Config, *, attention: int, sparse: int, n_experts: int, d_expert: int, d_shared: int
) -> ModelSize:
    """`sparse` of the layers route; the others have a dense SwiGLU."""
    d, n_layers = c["hidden_size"], c["num_hidden_layers"]
    table = c["vocab_size"] * d
    tied = bool(c.get("tie_word_embeddings", False))
    always = n_layers * (attention + 2 * d) + d + table * (1 if tied else 2)
    always += sparse * (d * n_experts + 3 * d * d_shared)
    if sparse < n_layers:
        always += (n_layers - sparse) * 3 * d * c["intermediate_size"]
    return ModelSize(
        d, sparse, n_experts, c["num_experts_per_tok"], 3 * d * d_expert, always,
        0 if tied else table,
    )


def _switch(c: _Config) -> ModelSize:
    """Encoder and decoder as in T5, ReLU experts of two matrices, one expert a token."""
    require(
        not c.get("is_gated_act") and not c.get("add_router_probs"),
        "gated activations and other routers are not counted here",
    )
    d, d_ff, n_experts = c["d_model"], c["d_ff"], c["num_experts"]
    attention = 4 * d * c["num_heads"] * c["d_kv"]
    always, n_sparse = 0, 0
    for layers, sparse, n_attentions in (
        ("num_layers", "num_sparse_encoder_layers", 1),
        ("num_decoder_layers", "num_sparse_decoder_layers", 2),
    ):
        n_layers = c[layers]
        step = n_layers // c[sparse] if c[sparse] else 0
        routed = sum(step == 1 or step > 1 and i % step == 1 for i in range(n_layers))
        always += n_layers * (n_attentions * attention + (n_attentions + 1) * d) + d
        always += c["relative_attention_num_buckets"] * c["num_heads"]
        always += (n_layers - routed) * 2 * d * d_ff + routed * d * n_experts
        n_sparse += routed
    table = c["vocab_size"] * d
    tied = bool(c.get("tie_word_embeddings", True))
    always += table * (1 if tied else 2)
    return ModelSize(
        d, n_sparse, n_experts, 1, 2 * d * d_ff, always, 0 if tied else table
    )


FAMILIES = {
    "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek, "switch_transformers": _switch,
}

# What the models' own config.json files say, as far as it is counted. Switch-C's is not published
# in this form: these sizes give the published 1,571 billion.
PUBLISHED = {
    "Mixtral 8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "num_hidden_layers": 48, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
        "num_hidden_layers": 61, "intermediate_size": 18432, "num_attention_heads": 128,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    },
    "Switch-C": {
        "model_type": "switch_transformers", "vocab_size": 32128, "d_model": 2080, "d_ff": 6144,
        "d_kv": 64, "num_heads": 32, "num_layers": 15, "num_decoder_layers": 15,
        "num_experts": 2048, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15,
        "relative_attention_num_buckets": 32,
    },
}
