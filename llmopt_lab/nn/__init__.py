"""One Llama-shaped language model for all chapters: config, Transformer, decoding, weights.

    from llmopt_lab.nn import generate, load

    lm = load("smollm2-135m")
    print(lm.decode(generate(lm.model, lm.encode("Gravity is"), 20)))

A chapter enters the model by argument: `Transformer(config, attend=..., feed_forward=...)`, or
`attend=` at a call.
"""

from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import KVCache, generate, sample
from llmopt_lab.nn.transformer import Transformer, causal_attention

__all__ = [
    "KVCache",
    "LanguageModel",
    "ModelConfig",
    "Transformer",
    "causal_attention",
    "generate",
    "load",
    "sample",
]


def __getattr__(name: str):
    """Import weights.py at first use: a GPU machine may have torch and no tokenizers or gguf."""
    if name in ("LanguageModel", "load"):
        from llmopt_lab.nn import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
