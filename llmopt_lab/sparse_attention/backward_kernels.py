"""The kernels of the backward pass: one owns a tile of queries, one a tile of keys.

A third makes the gradients of sinks from beyond the window in parts, which the owner of their keys
adds. `kernels.py` launches them.
"""

from llmopt_lab.core.attention_kernels import LOG2_E, load_rows, owned, rows_of, store_rows
from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.launch import jit
from llmopt_lab.sparse_attention.rule_kernels import (
    from_both_ends,
    keys_of,
    pairs_seen,
    queries_of,
    tile_at,
)
from llmopt_lab.sparse_attention.tiles import sized_jit

prepare_triton()

import triton.language as tl


@jit
def _absorb_queries(
    d_k, d_v, k, v, key, first_k,   # (TILE_K, D) each, (TILE_K,), int: this program's keys
    q_rows, d_out_rows, lse2_at, delta_at,                              # of all heads
    first_head, group, q_head, q_row, d_out_head, d_out_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_q, n_padded, n_k, scale_log2,
    MASKED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the full, or the partial, tiles of queries of one group of heads send to these keys.

    Scores lie keys by queries here, so that both sums can read them from registers. One loop runs
    over the tiles of all heads, not one a head: its pipeline does not run dry between two heads.
    Past the last query p is 0, whatever the keys: there lse2 is inf.
    """
    head, place = first_head - 1, n_tiles - 1       # one step before the first
    for _ in tl.range(0, group * n_tiles, num_stages=STAGES):
        place = tl.where(place == n_tiles - 1, 0, place + 1)
        head = tl.where(place == 0, head + 1, head)
        first = tile_at(
            place, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_Q, BLOCK_Q, LISTED,
        )
        at = tl.multiple_of(tl.cast(head, tl.int64) * n_padded + first, 16)
        at += tl.arange(0, TILE_Q)                                      # (TILE_Q,)
        q = load_rows(
            q_rows, head, first, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA, CHECKED=True
        )
        lse2 = tl.load(lse2_at + at)                                    # (TILE_Q,)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)      # (TILE_K, TILE_Q)
        p = tl.exp2(scores * scale_log2 - lse2[None, :])
        if MASKED:
            token = first + n_k - n_q + tl.arange(0, TILE_Q)            # (TILE_Q,)
            seen = pairs_seen(
                token, key, first + n_k - n_q, first_k, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, RULE, LOOP, True,
            )
            p = tl.where(seen, p, 0.0)
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


@sized_jit
def sink_parts_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,
    lse2_ptr, delta_ptr,            # as `backward_queries_kernel` makes them
    d_k_ptr, d_v_ptr,               # (batch * n_heads * n_parts, n_sinks, D_HEAD) float32
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row,
    n_heads, group, n_q, n_padded, n_k, part, low, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: what `part` queries of one head send to TILE_K sinks from beyond the window.

    Such pairs are a window of their own, [low, n_k]. Every later query sees the sinks: one program
    that walked them all would take a long text's whole backward pass.
    """
    n_tiles = tl.cdiv(n_sinks, TILE_K)
    n_parts = tl.cdiv(n_q, part)
    tile, head, batch = owned(n_tiles * n_parts, n_heads)
    first_k = tile % n_tiles * TILE_K
    first_q = tile // n_tiles * part
    k = load_rows(
        k_ptr + batch * k_batch, head // group, first_k, n_k, k_head, k_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    v = load_rows(
        v_ptr + batch * v_batch, head // group, first_k, n_k, v_head, v_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    q_at, d_out_at = q_ptr + batch * q_batch, d_out_ptr + batch * d_out_batch
    q_rows = rows_of(q_at, n_heads, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA)
    d_out_rows = rows_of(d_out_at, n_heads, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, TMA)
    begin = tl.maximum(first_k + low + n_q - n_k, first_q) // TILE_Q
    end = tl.maximum(tl.cdiv(tl.minimum(first_q + part, n_q), TILE_Q), begin)

    d_k = tl.zeros((TILE_K, D), tl.float32)
    d_v = tl.zeros((TILE_K, D), tl.float32)
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, first_k + tl.arange(0, TILE_K), first_k, q_rows, d_out_rows,
        lse2_ptr + batch * n_heads * n_padded, delta_ptr + batch * n_heads * n_padded,
        head, 1, q_head, q_row, d_out_head, d_out_row,
        end - begin, begin, end, end, end, None, 0,                     # no list
        None, 0, low, n_k, 0, n_q, n_padded, n_k, scale * LOG2_E,       # no terms
        True, TILE_Q, TILE_K, TILE_Q, False, False, (), False,          # a window
        D_HEAD, D, PRECISION, STAGES, TMA,
    )
    at = (batch * n_heads + head) * n_parts + tile // n_tiles
    part_size = n_sinks * D_HEAD
    store_rows(d_k_ptr, d_k, at, first_k, n_sinks, part_size, D_HEAD, TILE_K, D_HEAD, D)
    store_rows(d_v_ptr, d_v, at, first_k, n_sinks, part_size, D_HEAD, TILE_K, D_HEAD, D)


@jit
def _add_parts(
    total, parts_ptr, part, n_parts, first, n_sinks,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
):
    """Rows [first, first + ROWS) of so many parts, from `part` on, in their order."""
    for i in range(n_parts):
        total += load_rows(
            parts_ptr, part + i, first, n_sinks, n_sinks * D_HEAD, D_HEAD, ROWS, D_HEAD, D, False,
            CHECKED=True,
        )
    return total


@sized_jit
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr,
    lse2_ptr, delta_ptr,            # as `backward_queries_kernel` makes them
    d_k_ptr, d_v_ptr,               # like k and v
    sinks_d_k_ptr, sinks_d_v_ptr,   # parts, of `sink_parts_kernel`
    blocks_ptr, n_full_ptr, n_live_ptr, terms_ptr,      # lists of query blocks, terms
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row, d_k_batch, d_k_head, d_k_row, d_v_batch, d_v_head, d_v_row,
    n_kv_heads, group, n_q, n_padded, n_k, n_parts, list_head, n_terms, low, high, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: TILE_K keys of one KV head against every query of its group that sees them.

    Of sinks without lists it takes the window, and the rest from the parts that others made.
    """
    tile, kv_head, batch = owned(tl.cdiv(n_k, TILE_K), n_kv_heads)
    first_k = tile * TILE_K     # the first tile first: sinks and causal patterns make it heavy
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
    key = first_k + tl.arange(0, TILE_K)                                # (TILE_K,)
    q_at, d_out_at = q_ptr + batch * q_batch, d_out_ptr + batch * d_out_batch
    q_rows = rows_of(q_at, n_heads, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA)
    d_out_rows = rows_of(d_out_at, n_heads, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, TMA)
    rows_at = batch * n_heads * n_padded
    lse2_at, delta_at = lse2_ptr + rows_at, delta_ptr + rows_at
    list_at = (batch * n_kv_heads + kv_head) * list_head + first_k // BLOCK_K
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_q, BLOCK_Q)
    n_full, n_partial, begin, full_begin, full_end, end = queries_of(
        first_k, n_q, n_k, low, high, n_full_ptr, n_live_ptr, list_at,
        TILE_Q, TILE_K, BLOCK_Q, LISTED,
    )

    d_k = tl.zeros((TILE_K, D), tl.float32)
    d_v = tl.zeros((TILE_K, D), tl.float32)
    if SINKS and not LISTED:
        n_parts = tl.where(first_k < n_sinks, n_parts * group, 0)       # of this KV head
        part = (batch * n_kv_heads + kv_head) * n_parts
        d_k = _add_parts(d_k, sinks_d_k_ptr, part, n_parts, first_k, n_sinks, TILE_K, D_HEAD, D)
        d_v = _add_parts(d_v, sinks_d_v_ptr, part, n_parts, first_k, n_sinks, TILE_K, D_HEAD, D)
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, key, first_k, q_rows, d_out_rows, lse2_at, delta_at,
        kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
        n_full, begin, full_begin, full_end, end, blocks_at, 0,
        terms_ptr, n_terms, low, high, n_sinks, n_q, n_padded, n_k, scale_log2,
        False, TILE_Q, TILE_K, BLOCK_Q, LISTED, SINKS and LISTED, RULE, LOOP,
        D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, key, first_k, q_rows, d_out_rows, lse2_at, delta_at,
        kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_q, n_padded, n_k, scale_log2,
        True, TILE_Q, TILE_K, BLOCK_Q, LISTED, SINKS and LISTED, RULE, LOOP,
        D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_k_at, d_v_at = d_k_ptr + batch * d_k_batch, d_v_ptr + batch * d_v_batch
    store_rows(d_k_at, d_k * scale, kv_head, first_k, n_k, d_k_head, d_k_row, TILE_K, D_HEAD, D)
    store_rows(d_v_at, d_v, kv_head, first_k, n_k, d_v_head, d_v_row, TILE_K, D_HEAD, D)


@jit
def _absorb_keys(
    d_q, q, d_out,                  # (TILE_Q, D) each: this program's queries
    lse2, delta, token, top,        # (TILE_Q,) each, and the first token
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
    MASKED: tl.constexpr, TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the full, or the partial, tiles of keys send to these queries."""
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        first = tile_at(
            step, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_K, BLOCK_K, LISTED,
        )
        k = load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        p = tl.exp2(scores * scale_log2 - lse2[:, None])
        if MASKED:
            key = first + tl.arange(0, TILE_K)                          # (TILE_K,)
            seen = pairs_seen(
                token, key, top, first, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, RULE, LOOP, False,
            )
            p = tl.where(seen & (key < n_k)[None, :], p, 0.0)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)     # (TILE_Q, TILE_K)
        d_scores = p * (d_p - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)   # (TILE_Q, D)
    return d_q


@sized_jit
def backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr,
    lse_ptr, d_lse_ptr,             # (batch, n_heads, n_q) float32, contiguous
    d_q_ptr, lse2_ptr, delta_ptr,   # results: like q; (batch, n_heads, n_padded) float32, twice
    blocks_ptr, n_full_ptr, n_live_ptr, terms_ptr,      # lists of key blocks, terms
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row,
    d_q_batch, d_q_head, d_q_row,
    n_heads, group, n_q, n_padded, n_k, list_head, n_terms, low, high, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: the gradient of TILE_Q queries of one head, over the keys that they see.

    And for the other kernels, which need not look where the queries end, their log-sum-exp in base
    2, inf for those past the last, and delta = rowsum(d_out * out) - d_lse: dS is P * (dP - delta).
    """
    n_tiles = n_padded // TILE_Q
    tile, head, batch = owned(n_tiles, n_heads)
    kv_head = head // group
    first_q = from_both_ends(tile, n_tiles, LISTED) * TILE_Q
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
    at = (batch * n_heads + head) * n_q + row                           # (TILE_Q,)
    lse2 = tl.load(lse_ptr + at, row < n_q, other=float("inf")) * LOG2_E
    out = load_rows(
        out_ptr + batch * out_batch, head, first_q, n_q, out_head, out_row,
        TILE_Q, D_HEAD, D, False, CHECKED=True,
    )
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)   # (TILE_Q,)
    delta -= tl.load(d_lse_ptr + at, row < n_q, other=0.0)
    padded_at = (batch * n_heads + head) * n_padded + row               # (TILE_Q,)
    tl.store(lse2_ptr + padded_at, lse2)
    tl.store(delta_ptr + padded_at, delta)
    list_at = (batch * (n_heads // group) + kv_head) * list_head + first_q // BLOCK_Q
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_k, BLOCK_K)
    n_full, n_partial, begin, full_begin, full_end, end = keys_of(
        first_q, tl.minimum(first_q + TILE_Q, n_q) - 1, n_q, n_k, low, high, n_sinks,
        n_full_ptr, n_live_ptr, list_at, TILE_K, BLOCK_K, LISTED, SINKS,
    )

    d_q = tl.zeros((TILE_Q, D), tl.float32)
    d_q = _absorb_keys(
        d_q, q, d_out, lse2, delta, row + n_k - n_q, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_full, begin, full_begin, full_end, end, blocks_at, 0,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        False, TILE_K, BLOCK_K, LISTED, SINKS, RULE, LOOP, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_q = _absorb_keys(
        d_q, q, d_out, lse2, delta, row + n_k - n_q, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        True, TILE_K, BLOCK_K, LISTED, SINKS, RULE, LOOP, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_q_at = d_q_ptr + batch * d_q_batch
    store_rows(d_q_at, d_q * scale, head, first_q, n_q, d_q_head, d_q_row, TILE_Q, D_HEAD, D)
