"""Flash attention in Triton, forward and backward, as one differentiable torch operator.

The forward kernel has the loops of the reference: one program owns a tile of queries and absorbs
the keys and values tile by tile. The backward pass keeps no probabilities; two kernels compute
them again from the log-sum-exp of each row: one owns a tile of keys and walks the queries (dK and
dV), one owns a tile of queries and walks the keys (dQ). Every sum has one owner and one order, so
there are no atomics and two runs give the same bits.
"""

import torch
from torch import Tensor

from llmopt_lab.core.attention_kernels import (
    LOG2_E,
    TILES,
    Tiles,
    check_qkv,
    empty_like,
    is_walkable,
    load_rows,
    options_of,
    owned,
    padded,
    rows_of,
    scale_of,
    store_rows,
    strides_of,
    tiles_from,
)
from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.launch import jit, precision_of
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.flash_attention import hopper

prepare_triton()

import triton.language as tl


@jit
def _row_end(row, n_q, n_k, CAUSAL: tl.constexpr):
    """Row r sees the keys [0, end): all, or those up to its own place, aligned at the end."""
    end = tl.zeros_like(row) + n_k
    if CAUSAL:
        end = tl.minimum(row + 1 + n_k - n_q, n_k)
    return end


@jit
def _key_range(first_q, n_q, n_k, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CAUSAL: tl.constexpr):
    """All rows of a query tile see the keys [0, full), whole tiles; none sees a key from `end`."""
    full, end = n_k // TILE_K * TILE_K, n_k
    if CAUSAL:
        full = tl.maximum(tl.minimum(first_q + 1 + n_k - n_q, n_k), 0) // TILE_K * TILE_K
        end = tl.maximum(tl.minimum(first_q + TILE_Q + n_k - n_q, n_k), 0)
    return full, end


@jit
def _absorb(
    m, total, acc,                  # (TILE_Q,), (TILE_Q,), (TILE_Q, D): the softmax so far
    q, row_end,                     # (TILE_Q, D), (TILE_Q,)
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    begin, end, n_k, scale_log2,
    MASKED: tl.constexpr,           # whether some row sees only a part of these keys
    TILE_K: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """Fold the keys [begin, end) into the running softmax, TILE_K at a time."""
    for first in tl.range(begin, end, TILE_K, num_stages=STAGES):
        k = load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        if MASKED:
            token = first + tl.arange(0, TILE_K)                        # (TILE_K,)
            scores = tl.where(token[None, :] < row_end[:, None], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)      # (TILE_Q,)
        if MASKED:
            # a row that sees no key keeps m = -inf, and -inf - -inf would be NaN
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
        else:
            base = m_new
        shrink = tl.exp2(m - base)                                      # (TILE_Q,)
        p = tl.exp2(scores * scale_log2 - base[:, None])                # (TILE_Q, TILE_K)
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # (TILE_Q, D)
        m = m_new
    return m, total, acc


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr,            # (batch, n_heads, n_q, D_HEAD), (batch, n_kv_heads, n_k, ..)
    out_ptr, lse_ptr,               # like q; (batch, n_heads, n_q) float32
    q_batch, q_head, q_row,         # strides in elements; the last dimension is contiguous
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    n_heads, group, n_q, n_k, scale,
    CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: TILE_Q queries of one head against all the keys they see."""
    tile, head, batch = owned(tl.cdiv(n_q, TILE_Q), n_heads)
    kv_head = head // group
    # the last tile first: under a causal mask it has most work
    first_q = (tl.cdiv(n_q, TILE_Q) - 1 - tile) * TILE_Q
    scale_log2 = scale * LOG2_E
    k_at, v_at = k_ptr + batch * k_batch, v_ptr + batch * v_batch
    k_rows = rows_of(k_at, n_heads // group, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA)
    v_rows = rows_of(v_at, n_heads // group, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA)
    q_at = q_ptr + batch * q_batch
    q = load_rows(
        q_at, head, first_q, n_q, q_head, q_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )

    row = first_q + tl.arange(0, TILE_Q)                                # (TILE_Q,)
    row_end = _row_end(row, n_q, n_k, CAUSAL)                           # (TILE_Q,)
    full, end = _key_range(first_q, n_q, n_k, TILE_Q, TILE_K, CAUSAL)

    m = tl.full((TILE_Q,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    m, total, acc = _absorb(
        m, total, acc, q, row_end,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row, 0, full, n_k, scale_log2,
        False, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    m, total, acc = _absorb(
        m, total, acc, q, row_end,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row, full, end, n_k, scale_log2,
        True, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
    )

    total = tl.where(total == 0, 1.0, total)    # a row that saw no key: out 0, lse -inf (from m)
    out_at = out_ptr + batch * out_batch
    acc = acc / total[:, None]
    store_rows(out_at, acc, head, first_q, n_q, out_head, out_row, TILE_Q, D_HEAD, D)
    lse = (m + tl.log2(total)) / LOG2_E                                 # (TILE_Q,)
    tl.store(lse_ptr + (batch * n_heads + head) * n_q + row, lse, row < n_q)


@jit
def _backward_delta_kernel(
    out_ptr, d_out_ptr,             # (batch, n_heads, n_q, D_HEAD)
    lse_ptr, d_lse_ptr,             # (batch, n_heads, n_q) float32, contiguous
    lse2_ptr, delta_ptr,            # (batch, n_heads, n_padded) float32, the results
    out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row,
    n_heads, n_q, n_padded,
    D_HEAD: tl.constexpr, D: tl.constexpr, TILE_Q: tl.constexpr,
):
    """One program: delta = rowsum(d_out * out) - d_lse of TILE_Q rows; dS is P * (dP - delta).

    And their log-sum-exp in base 2, inf past the last row: the other kernels need not look where
    that is.
    """
    tile, head, batch = owned(n_padded // TILE_Q, n_heads)
    first = tile * TILE_Q
    row = first + tl.arange(0, TILE_Q)                                  # (TILE_Q,)
    out = load_rows(
        out_ptr + batch * out_batch, head, first, n_q, out_head, out_row,
        TILE_Q, D_HEAD, D, False, CHECKED=True,
    )
    d_out = load_rows(
        d_out_ptr + batch * d_out_batch, head, first, n_q, d_out_head, d_out_row,
        TILE_Q, D_HEAD, D, False, CHECKED=True,
    )
    at = (batch * n_heads + head) * n_q + row                           # (TILE_Q,)
    d_lse = tl.load(d_lse_ptr + at, row < n_q, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1) - d_lse
    lse2 = tl.load(lse_ptr + at, row < n_q, other=float("inf")) * LOG2_E
    padded_at = (batch * n_heads + head) * n_padded + row               # (TILE_Q,)
    tl.store(lse2_ptr + padded_at, lse2)
    tl.store(delta_ptr + padded_at, delta)


@jit
def _absorb_queries(
    d_k, d_v, k, v,                 # (TILE_K, D) each: this program's keys
    q_rows, d_out_rows, lse2_at, delta_at,                              # of all heads
    first_head, group, q_head, q_row, d_out_head, d_out_row,
    first_k, begin, end, n_q, n_padded, n_k, scale_log2,
    MASKED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the queries [begin, end) of the heads of one group send to these keys.

    Scores lie keys by queries here, so that both sums can read them from registers. One loop runs
    over the tiles of all heads, not one a head: its pipeline does not run dry between two heads.
    Past the last query p is 0, whatever the keys: there lse2 is inf.
    """
    n_tiles = tl.cdiv(end - begin, TILE_Q)
    head, place = first_head - 1, n_tiles - 1       # one step before the first
    for _ in tl.range(0, group * n_tiles, num_stages=STAGES):
        place = tl.where(place == n_tiles - 1, 0, place + 1)
        head = tl.where(place == 0, head + 1, head)
        first = begin + place * TILE_Q
        at = tl.multiple_of(tl.cast(head, tl.int64) * n_padded + first, 16)
        at += tl.arange(0, TILE_Q)                                      # (TILE_Q,)
        q = load_rows(
            q_rows, head, first, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA, CHECKED=True
        )
        lse2 = tl.load(lse2_at + at)                                    # (TILE_Q,)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)      # (TILE_K, TILE_Q)
        p = tl.exp2(scores * scale_log2 - lse2[None, :])
        if MASKED:
            row = first + tl.arange(0, TILE_Q)                          # (TILE_Q,)
            token = first_k + tl.arange(0, TILE_K)                      # (TILE_K,)
            p = tl.where(token[:, None] <= row[None, :] + (n_k - n_q), p, 0.0)
        d_out = load_rows(
            d_out_rows, head, first, n_q, d_out_head, d_out_row,
            TILE_Q, D_HEAD, D, TMA, CHECKED=True,
        )
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        delta = tl.load(delta_at + at)                                  # (TILE_Q,)
        # dS = P * (dP - delta): the product starts at -delta, which costs no registers later
        d_p = tl.zeros((TILE_K, TILE_Q), tl.float32) - delta[None, :]
        d_p = tl.dot(v, tl.trans(d_out), d_p, input_precision=PRECISION)    # (TILE_K, TILE_Q)
        d_scores = p * d_p
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@jit
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,
    lse2_ptr, delta_ptr,            # as `_backward_delta_kernel` makes them
    d_k_ptr, d_v_ptr,               # like k and v
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row, d_k_batch, d_k_head, d_k_row, d_v_batch, d_v_head, d_v_row,
    n_kv_heads, group, n_q, n_padded, n_k, scale,
    CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: TILE_K keys of one KV head against every query of its group that sees them."""
    tile, kv_head, batch = owned(tl.cdiv(n_k, TILE_K), n_kv_heads)
    first_k = tile * TILE_K     # the first tile first: under a causal mask most queries see it
    scale_log2 = scale * LOG2_E
    n_heads = n_kv_heads * group
    k = load_rows(
        k_ptr + batch * k_batch, kv_head, first_k, n_k, k_head, k_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    v = load_rows(
        v_ptr + batch * v_batch, kv_head, first_k, n_k, v_head, v_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    q_at, d_out_at = q_ptr + batch * q_batch, d_out_ptr + batch * d_out_batch
    q_rows = rows_of(q_at, n_heads, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA)
    d_out_rows = rows_of(d_out_at, n_heads, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, TMA)
    rows_at = batch * n_heads * n_padded
    lse2_at, delta_at = lse2_ptr + rows_at, delta_ptr + rows_at

    d_k = tl.zeros((TILE_K, D), tl.float32)
    d_v = tl.zeros((TILE_K, D), tl.float32)
    full = 0
    if CAUSAL:
        # rows before `begin` see none of these keys, rows from `full` on see all of them
        begin = tl.maximum(first_k + n_q - n_k, 0) // TILE_Q * TILE_Q
        full = tl.cdiv(tl.maximum(first_k + TILE_K - 1 + n_q - n_k, 0), TILE_Q) * TILE_Q
        full = tl.minimum(full, n_q)
        d_k, d_v = _absorb_queries(
            d_k, d_v, k, v, q_rows, d_out_rows, lse2_at, delta_at,
            kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
            first_k, begin, full, n_q, n_padded, n_k, scale_log2,
            True, TILE_Q, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
        )
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, q_rows, d_out_rows, lse2_at, delta_at,
        kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
        first_k, full, n_q, n_q, n_padded, n_k, scale_log2,
        False, TILE_Q, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_k_at, d_v_at = d_k_ptr + batch * d_k_batch, d_v_ptr + batch * d_v_batch
    store_rows(d_k_at, d_k * scale, kv_head, first_k, n_k, d_k_head, d_k_row, TILE_K, D_HEAD, D)
    store_rows(d_v_at, d_v, kv_head, first_k, n_k, d_v_head, d_v_row, TILE_K, D_HEAD, D)


@jit
def _absorb_keys(
    d_q, q, d_out,                  # (TILE_Q, D) each: this program's queries
    lse2, delta, row_end,           # (TILE_Q,) each
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    begin, end, n_k, scale_log2,
    MASKED: tl.constexpr, TILE_K: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the keys [begin, end) send to these queries."""
    for first in tl.range(begin, end, TILE_K, num_stages=STAGES):
        k = load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        p = tl.exp2(scores * scale_log2 - lse2[:, None])
        if MASKED:
            token = first + tl.arange(0, TILE_K)                        # (TILE_K,)
            p = tl.where(token[None, :] < row_end[:, None], p, 0.0)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)     # (TILE_Q, TILE_K)
        d_scores = p * (d_p - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)   # (TILE_Q, D)
    return d_q


@jit
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,
    lse2_ptr, delta_ptr,            # as `_backward_delta_kernel` makes them
    d_q_ptr,                        # like q
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row, d_q_batch, d_q_head, d_q_row,
    n_heads, group, n_q, n_padded, n_k, scale,
    CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: the gradient of TILE_Q queries of one head, over all the keys they see."""
    tile, head, batch = owned(tl.cdiv(n_q, TILE_Q), n_heads)
    kv_head = head // group
    # the last tile first: under a causal mask it has most work
    first_q = (tl.cdiv(n_q, TILE_Q) - 1 - tile) * TILE_Q
    scale_log2 = scale * LOG2_E
    k_at, v_at = k_ptr + batch * k_batch, v_ptr + batch * v_batch
    k_rows = rows_of(k_at, n_heads // group, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA)
    v_rows = rows_of(v_at, n_heads // group, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA)
    q_at = q_ptr + batch * q_batch
    q = load_rows(
        q_at, head, first_q, n_q, q_head, q_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    d_out_at = d_out_ptr + batch * d_out_batch
    d_out = load_rows(
        d_out_at, head, first_q, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    row = first_q + tl.arange(0, TILE_Q)                                # (TILE_Q,)
    at = (batch * n_heads + head) * n_padded + row                      # (TILE_Q,)
    lse2, delta = tl.load(lse2_ptr + at), tl.load(delta_ptr + at)

    row_end = _row_end(row, n_q, n_k, CAUSAL)                           # (TILE_Q,)
    full, end = _key_range(first_q, n_q, n_k, TILE_Q, TILE_K, CAUSAL)
    d_q = tl.zeros((TILE_Q, D), tl.float32)
    d_q = _absorb_keys(
        d_q, q, d_out, lse2, delta, row_end,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row, 0, full, n_k, scale_log2,
        False, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_q = _absorb_keys(
        d_q, q, d_out, lse2, delta, row_end,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row, full, end, n_k, scale_log2,
        True, TILE_K, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_q_at = d_q_ptr + batch * d_q_batch
    store_rows(d_q_at, d_q * scale, head, first_q, n_q, d_q_head, d_q_row, TILE_Q, D_HEAD, D)


def flash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V without the score matrix in memory, forward and backward.

    Args:
        q: (batch, n_heads, n_q, d_head); float32, float16 or bfloat16; d_head a multiple of 8 up
            to 256. Powers of two waste nothing, others run at the next power of two.
        k, v: (batch, n_kv_heads, n_k, d_head), the dtype of `q`; n_kv_heads divides n_heads
            (grouped-query attention). Only the last dimension of each must be contiguous.
        causal: query i sees the keys up to i + n_k - n_q: the last query sees every key.
        scale: of the scores, positive; 1/sqrt(d_head) if None.
        return_lse: also return the log-sum-exp of each row's scaled scores.

    Returns:
        (batch, n_heads, n_q, d_head), the dtype of `q`, and with `return_lse` the natural
        log-sum-exp, (batch, n_heads, n_q) float32. Both are differentiable, once. A row that sees
        no key (causal and n_q > n_k, or n_k = 0) gives 0 and -inf. Two runs give the same bits.
        The backward pass reads the rounded output. In half precision that error shows in d_q and
        d_k of a row with nearly all its weight on one key, whose exact gradients are near 0.

    Raises:
        BadInput: a shape, dtype, device, layout or scale is wrong.

    Cost: forward 4 * batch * n_heads * n_q * n_k * d_head operations, about half of it causal;
    backward 3.5 times that, since both of its kernels compute the scores again. Memory: lse, and
    two more of its size in the backward pass, beside inputs, results and gradients.
    Source: Dao 2023 (FlashAttention-2), Algorithms 1 and 2; two kernels instead of atomics.
    """
    out, lse = _flash_attention(q, k, v, causal, scale)
    return (out, lse) if return_lse else out


@torch.library.custom_op("llmopt_lab::flash_attention", mutates_args=())
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v, scale)
    return _forward(q, k, v, causal, scale_of(q, scale))


@_flash_attention.register_fake
def _(q, k, v, causal, scale):
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmopt_lab::flash_attention_backward", mutates_args=())
def _flash_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor,
    causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(q, k, v, out, lse, d_out, d_lse, causal, scale_of(q, scale))


@_flash_attention_backward.register_fake
def _(q, k, v, out, lse, d_out, d_lse, causal, scale):
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, d_out, d_lse):
    grads = _flash_attention_backward(*ctx.saved_tensors, d_out, d_lse, ctx.causal, ctx.scale)
    return *grads, None, None


_flash_attention.register_autograd(_gradients, setup_context=_save)


def _forward(q, k, v, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse, by the Hopper kernel where it can run."""
    out = empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if hopper.supports(q, k, v, out):
        hopper.forward(q, k, v, out, lse, causal=causal, scale=scale)
    else:
        forward_into(out, lse, q, k, v, causal=causal, scale=scale)
    return out, lse


def forward_into(
    out, lse, q, k, v, *, causal: bool, scale: float, tiles: Tiles | None = None
) -> None:
    """The Triton kernel on any GPU, into given tensors; arguments as `flash_attention_triton`."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    d, precision = padded(d_head), precision_of(q.dtype)
    sizes = {"CAUSAL": causal, "D_HEAD": d_head, "D": d, "PRECISION": precision}
    tiles = tiles or choose_tiles("forward", d_head, q.dtype)
    _forward_kernel[(ceil_div(n_q, tiles.tile_q) * n_heads * batch,)](
        q, k, v, out, lse, *strides_of(q, k, v, out),
        n_heads, n_heads // n_kv_heads, n_q, n_k, scale, **sizes, **options_of(tiles, k, v),
    )  # fmt: skip


def _backward(q, k, v, out, lse, d_out, d_lse, causal: bool, scale: float):
    """d_q, d_k and d_v."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    d_out = d_out if is_walkable(d_out) else d_out.contiguous()    # an expanded scalar, often
    d_q, d_k, d_v = empty_like(q), empty_like(k), empty_like(v)
    d, precision = padded(d_head), precision_of(q.dtype)
    sizes = {"CAUSAL": causal, "D_HEAD": d_head, "D": d, "PRECISION": precision}
    rows = 64 if d <= 128 else 32
    to_keys = choose_tiles("backward_keys", d_head, q.dtype)
    to_queries = choose_tiles("backward_queries", d_head, q.dtype)
    most = max(rows, to_keys.tile_q, to_queries.tile_q)
    n_padded = ceil_div(n_q, most) * most
    lse2, delta = q.new_empty((2, batch, n_heads, n_padded), dtype=torch.float32)
    _backward_delta_kernel[(n_padded // rows * n_heads * batch,)](
        out, d_out, lse, d_lse.contiguous(), lse2, delta, *strides_of(out, d_out),
        n_heads, n_q, n_padded, D_HEAD=d_head, D=d, TILE_Q=rows,
    )  # fmt: skip
    _backward_keys_kernel[(ceil_div(n_k, to_keys.tile_k) * n_kv_heads * batch,)](
        q, k, v, d_out, lse2, delta, d_k, d_v, *strides_of(q, k, v, d_out, d_k, d_v),
        n_kv_heads, n_heads // n_kv_heads, n_q, n_padded, n_k, scale,
        **sizes, **options_of(to_keys, q, d_out),
    )  # fmt: skip
    _backward_queries_kernel[(ceil_div(n_q, to_queries.tile_q) * n_heads * batch,)](
        q, k, v, d_out, lse2, delta, d_q, *strides_of(q, k, v, d_out, d_q),
        n_heads, n_heads // n_kv_heads, n_q, n_padded, n_k, scale,
        **sizes, **options_of(to_queries, k, v),
    )  # fmt: skip
    return d_q, d_k, d_v


def choose_tiles(kernel: str, d_head: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the "forward", "backward_keys" or "backward_queries" kernel on the current GPU."""
    gpu = gpu_facts()
    if gpu is None:
        return Tiles(32, 16, 4, 1)      # interpreted: small, so that small examples have several
    capability = None if torch.version.hip is not None else gpu.capability
    return tiles_for(kernel, d_head, dtype, capability)


def tiles_for(
    kernel: str, d_head: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds."""
    return tiles_from(TILES, kernel, d_head, dtype, capability)
