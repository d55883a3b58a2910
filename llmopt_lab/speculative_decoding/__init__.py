"""Speculative decoding: a draft guesses some tokens, and the target judges them all in one pass.

Sources
    Leviathan et al. 2023, https://arxiv.org/abs/2211.17192 (Algorithm 1; this room follows it)
    Chen et al. 2023, https://arxiv.org/abs/2302.01318
    Miao et al. 2023, SpecInfer, https://arxiv.org/abs/2305.09781 (trees)
    Li et al. 2024, EAGLE, https://arxiv.org/abs/2401.15077 (draft heads)

Symbols (beware: code on the web swaps p and q)
    paper       here            meaning
    M_p, p(x)   target, p       the large model, its distribution of the next token
    M_q, q(x)   draft, q        the small model, its distribution of the next token
    gamma       k               guesses a round
    alpha       alpha           chance that a guess is kept; overlap(p, q) = 1 - TV(p, q) in a place
    c           c               time of a draft's pass over a target's
    p'(x)       residual(p, q)  what is drawn from after a refusal
"""

from llmopt_lab.speculative_decoding.drafts import PromptLookup, skip_layers
from llmopt_lab.speculative_decoding.reference import residual, speculative_decode
from llmopt_lab.speculative_decoding.speed import best_k, expected_tokens, speedup

__all__ = [
    "PromptLookup", "best_k", "expected_tokens", "residual", "skip_layers", "speculative_decode",
    "speedup",
]  # fmt: skip
