"""Flash attention inside models: ours, by argument, and any of transformers', by name.

    model = Transformer(config, attend=flash_attend)

    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="llmopt_tiled")

On a GPU with Triton both run its kernel, forward and backward. Elsewhere, and for a dtype or width
that the kernel does not take, the first calls torch's `scaled_dot_product_attention` and the second
the reference.
"""

import torch
from torch import Tensor

from llmopt_lab.core.device import version_of
from llmopt_lab.core.errors import Missing, require
from llmopt_lab.flash_attention.reference import flash_attention
from llmopt_lab.nn.transformer import causal_attention

NAME = "llmopt_tiled"  # transformers takes any name with "flash" in it for the flash-attn package
TILE = 128  # of the reference, in transformers' models: few large steps
HAS_TRITON = version_of("triton") is not None


def flash_attend(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
    """An `attend` of `nn.Transformer`: causal, stateless, differentiable.

    q (batch, n_heads, n, d_head), k and v (batch, n_kv_heads, n, d_head): out like q.
    """
    if not _kernel_fits(q):
        return causal_attention(q, k, v, layer=layer, scale=scale)
    from llmopt_lab.flash_attention.kernels import flash_attention_triton

    return flash_attention_triton(q, k, v, causal=True, scale=scale)


def register_with_transformers() -> None:
    """Make `attn_implementation="llmopt_tiled"` known to transformers, under which models run ours.

    Raises:
        Missing: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as absent:
        raise Missing("this needs transformers: pip install 'transformers>=5'") from absent
    AttentionInterface.register(NAME, transformers_attention)
    # without a mask function of its own, transformers would drop padding without a word
    AttentionMaskInterface.register(NAME, transformers_mask)


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: attention of the new tokens over all of them.

    Args:
        module: the layer; `module.is_causal` says whether it masks the future (True if absent).
        query: (batch, n_heads, n_q, d_head).
        key, value: (batch, n_kv_heads, n_k, d_head), those of the cache included.
        attention_mask: None; the causal mask needs no tensor.
        scaling: of the scores; 1/sqrt(d_head) if None.

    Returns:
        (batch, n_q, n_heads, d_head), and None for the probabilities, which are never made.

    Raises:
        BadInput: a mask, dropout, a sliding window that cuts something off, or a term in the scores
            that this attention does not have.
    """
    require(
        attention_mask is None,
        f"{NAME} knows no mask but the causal one, and got an attention_mask. Give it none, or "
        "take another attn_implementation.",
    )
    require(dropout == 0, f"{NAME} has no dropout; got {dropout}: call model.eval()")
    window = kwargs.get("sliding_window")
    require(
        window is None or window >= key.shape[2],
        f"{NAME} has no sliding window; got one of {window} tokens over {key.shape[2]}",
    )
    for name in ("softcap", "s_aux", "position_bias"):
        require(kwargs.get(name) is None, f"{NAME} does not compute {name}, which this model needs")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if _kernel_fits(query):
        from llmopt_lab.flash_attention.kernels import flash_attention_triton

        out = flash_attention_triton(query, key, value, causal=is_causal, scale=scaling)
    else:
        out = flash_attention(
            query, key, value, causal=is_causal, scale=scaling, tile_q=TILE, tile_k=TILE
        )
    return out.transpose(1, 2).contiguous(), None


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> None:
    """What transformers calls once a forward pass, instead of building the mask: None, or refusal.

    Raises:
        BadInput: the model asks for more than causal or full attention over tokens that are all
            there: padding, packed sequences, a sliding window, a cache with unused places.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    require(
        attention_mask is None or bool(attention_mask.all()),
        f"{NAME} knows no padding, and the attention_mask hides tokens. Run sequences of one "
        "length together, or take another attn_implementation.",
    )
    require(
        mask_function in (None, causal_mask_function, bidirectional_mask_function),
        f"{NAME} attends causally or to everything; this input asks for another pattern (packed "
        "sequences, a sliding window, blocks)",
    )
    if mask_function is not bidirectional_mask_function:
        # query i sees the keys up to i + n_k - n_q: the last new token is the last key
        require(
            int(q_offset) + q_length == kv_offset + kv_length,
            f"{NAME} needs a cache that holds the tokens so far and no more (a DynamicCache); got "
            f"{kv_length} keys for {int(q_offset) + q_length} tokens",
        )


def _kernel_fits(q: Tensor) -> bool:
    wide_enough = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and wide_enough and q.dtype != torch.float64 and HAS_TRITON
