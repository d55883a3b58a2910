"""Mixture of experts: many feed-forward layers, of which each token visits only k.

Sources
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538
    Lepikhin et al. 2020, GShard, https://arxiv.org/abs/2006.16668 (capacity, expert parallelism)
    Fedus et al. 2021, Switch Transformer, https://arxiv.org/abs/2101.03961
    Zoph et al. 2022, ST-MoE, https://arxiv.org/abs/2202.08906 (z-loss)
    Zhou et al. 2022, expert choice, https://arxiv.org/abs/2202.09368
    Jiang et al. 2024, Mixtral, https://arxiv.org/abs/2401.04088
    Dai et al. 2024, DeepSeekMoE, https://arxiv.org/abs/2401.06066 (shared, fine-grained experts)
    Wang et al. 2024, balancing by a bias, https://arxiv.org/abs/2408.15664

Symbols
    paper       here                shape                       meaning
    T, n        n_tokens
    E, N        n_experts
    k           k                                               experts a token visits
    W_g         router              (d, n_experts)
    h(x)        logits              (n_tokens, n_experts)       x W_g, in float32
    p, s        scores              (n_tokens, n_experts)       softmax, or sigmoid, of the logits
    G(x), g     weights             (n_tokens, k)               of the visits
    b           bias                (n_experts,)                changes who is chosen, not g
    C           capacity                                        visits that an expert takes
    f           expert_load         (n_experts,)                each expert's share of all visits
    P           mean of scores      (n_experts,)
"""

from llmopt_lab.moe.expert_choice import expert_choice_layer
from llmopt_lab.moe.records import Grouping, Routing
from llmopt_lab.moe.reference import capacity_of, group, moe_layer, route

__all__ = [
    "Grouping", "Routing", "capacity_of", "expert_choice_layer", "group", "moe_layer", "route",
]  # fmt: skip
