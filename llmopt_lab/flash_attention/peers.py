"""What `llmopt bench flash_attention` times: our kernels and their peers, one function each.

Each takes the inputs of a case and gives the call to time. All work on (batch, n_heads, n, d_head);
a peer with another layout gets a copy in it before the clock starts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing

Call = Callable[[], Tensor | tuple[Tensor, ...]]
ROWS = 2048  # query rows that the oracle computes at a time


def forward_oracle(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention in float64, some rows of one head at a time: no score matrix of a whole head."""
    out = torch.empty_like(q, dtype=torch.float64)
    for seq in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = k[seq, head].double(), v[seq, head].double()
            for first in range(0, q.shape[2], ROWS):
                rows = slice(first, first + ROWS)
                out[seq, head, rows] = _dense(
                    q[seq, head, rows].double(), keys, values, first, causal
                )
    return out


def backward_oracle(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool) -> Tensor:
    """d_q, d_k and d_v in float64 by autograd, one behind the other as one vector."""
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for seq in range(q.shape[0]):
        for head in range(q.shape[1]):
            for first in range(0, q.shape[2], ROWS):
                rows = slice(first, first + ROWS)
                wide = [x[seq, head].double().requires_grad_() for x in (q, k, v)]
                out = _dense(wide[0][rows], wide[1], wide[2], first, causal)
                part = torch.autograd.grad(out, wide, d_out[seq, head, rows].double())
                for grad, more in zip(grads, part, strict=True):
                    grad[seq, head] += more
    return torch.cat([grad.flatten() for grad in grads])


def _dense(q: Tensor, k: Tensor, v: Tensor, first: int, causal: bool) -> Tensor:
    scores = q @ k.T * q.shape[-1] ** -0.5
    if causal:
        row = torch.arange(first, first + len(q), device=q.device)
        key = torch.arange(len(k), device=q.device)
        scores = scores.masked_fill(key > row[:, None], -torch.inf)
    return scores.softmax(-1) @ v


# Forward


def ours(q, k, v, causal) -> Call:
    from llmopt_lab.flash_attention.kernels import flash_attention_triton

    return lambda: flash_attention_triton(q, k, v, causal=causal)


def ours_in_triton(q, k, v, causal, *, tma: bool | None = None) -> Call:
    """The teaching kernel; `tma` False or True instead of what its table of tiles says."""
    from llmopt_lab.flash_attention.kernels import choose_tiles, forward_into

    tiles = choose_tiles("forward", q.shape[3], q.dtype)
    tiles = tiles if tma is None else tiles._replace(tma=tma)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def call() -> Tensor:
        scale = q.shape[3] ** -0.5
        forward_into(out, lse, q, k, v, causal=causal, scale=scale, tiles=tiles)
        return out

    return call


def ours_for_hopper(q, k, v, causal, **changes) -> Call:
    """The Hopper kernel with some steps of its plan switched."""
    from dataclasses import replace

    from llmopt_lab.flash_attention import hopper

    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if not hopper.supports(q, k, v, out):
        raise Missing("the Hopper kernel needs an sm_90 GPU and bf16 or fp16")
    plan = replace(hopper.PLANS[q.shape[3]], **changes)

    def call() -> Tensor:
        hopper.forward(q, k, v, out, lse, causal=causal, scale=q.shape[3] ** -0.5, plan=plan)
        return out

    return call


def sdpa(backend: SDPBackend, q, k, v, causal) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def flash_attention_3(q, k, v, causal) -> Call:
    from flash_attn_interface import flash_attn_func

    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: flash_attn_func(*rows_first, causal=causal).transpose(1, 2)


def flex(q, k, v, causal) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if gpu_facts() is None:
        raise Missing("flex_attention is only compiled for a GPU here")
    n_q, n_k = q.shape[2], k.shape[2]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, n_q, n_k, device=q.device)
    torch.compiler.reset()  # or the ninth size is past its limit and runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def naive(q, k, v, causal) -> Call:
    """Three operators with the score matrix between them."""

    def call() -> Tensor:
        scores = q @ k.mT * q.shape[3] ** -0.5
        if causal:
            ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill_(ahead, -torch.inf)
        return scores.softmax(-1) @ v

    return call


# Backward: the gradient alone, from what the forward pass kept


def ours_backward(q, k, v, d_out, causal) -> Call:
    from llmopt_lab.flash_attention.kernels import flash_attention_triton

    out, lse = flash_attention_triton(q, k, v, causal=causal, return_lse=True)
    d_lse = torch.zeros_like(lse)
    backward = torch.ops.llmopt_lab.flash_attention_backward
    return lambda: backward(q, k, v, out, lse, d_out, d_lse, causal, q.shape[3] ** -0.5)


def flash_attention_2_backward(q, k, v, d_out, causal) -> Call:
    if not q.is_cuda:
        raise Missing("SDPA's FlashAttention-2 needs a GPU")
    out, lse, start_q, start_k, most_q, most_k, seed, offset, _ = (
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    )
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return lambda: backward(
        d_out, q, k, v, out, lse, start_q, start_k, most_q, most_k, 0.0, causal, seed, offset
    )


def cudnn_backward(q, k, v, d_out, causal) -> Call:
    if not q.is_cuda:
        raise Missing("SDPA's cuDNN backend needs a GPU")
    out, lse, start_q, start_k, most_q, most_k, seed, offset, _ = (
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    )
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return lambda: backward(
        d_out, q, k, v, out, lse, seed, offset, None,
        start_q, start_k, most_q, most_k, 0.0, causal,
    )  # fmt: skip


OURS = Contender("ours", ours, ours=True)
TRITON = Contender("ours in Triton", ours_in_triton, ours=True)
FLASH_2 = Contender("SDPA, FlashAttention-2", partial(sdpa, SDPBackend.FLASH_ATTENTION))
NAIVE = Contender("naive", naive)
FORWARD = (
    OURS,
    TRITON,
    FLASH_2,
    Contender("SDPA, cuDNN", partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    Contender("flex_attention", flex),
    Contender("FlashAttention-3", flash_attention_3),
)
BACKWARD = (
    Contender("ours", ours_backward, ours=True),
    Contender("SDPA, FlashAttention-2", flash_attention_2_backward),
    Contender("SDPA, cuDNN", cudnn_backward),
)
STEP = {"persistent": False, "turns": False, "overlap": False}
LADDER = (
    Contender("Triton, pointers", partial(ours_in_triton, tma=False), ours=True),
    Contender("+ async TMA", partial(ours_in_triton, tma=True)),
    Contender("+ warp specialisation", partial(ours_for_hopper, **STEP)),
    Contender("+ overlap", partial(ours_for_hopper, **STEP | {"overlap": True})),
    Contender("+ ping-pong", partial(ours_for_hopper, overlap=True, turns=True, persistent=False)),
    Contender("+ persistence", partial(ours_for_hopper, overlap=True, turns=True, persistent=True)),
    Contender("as shipped", ours_for_hopper),
)
