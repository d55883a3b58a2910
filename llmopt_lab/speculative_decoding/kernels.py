"""Verification in Triton: attention of a few new tokens over the paged cache, and the sampler.

Verifying k guesses is a decode step of k + 1 tokens. Both kernels wait for memory: the attention
reads every cached key and value once, for however many new tokens; the sampler reads every logit
once, and those of one place once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import (
    check_dtype,
    check_last_dimension,
    dependent_launch,
    jit,
    merge_warps,
)
from llmopt_lab.core.memory import ceil_div

prepare_triton()

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = 1.4426950408889634     # exp(x) == exp2(x * LOG2_E), and exp2 is one instruction
MIN_DOT_ROWS = 16               # tl.dot wants at least 16 rows: smaller tiles are padded
MAX_NEW = 64                    # new tokens of a sequence: a tree's mask is one 64-bit word a token
MAX_SPLITS = 128
MAX_SPAN = 4096                 # tokens


# Attention of the new tokens


@jit
def _verify_kernel(
    q_ptr, k_ptr, v_ptr,            # (batch, n_new, n_heads, D); (n_blocks, BLOCK_SIZE, n_kv, D)
    table_ptr, length_ptr,          # (batch, max_blocks), (batch,); int32
    tree_ptr,                       # (batch, n_new) int64, see `pack_tree`
    out_ptr, lse_ptr,               # (batch, n_new, n_heads, n_splits, D), (.., n_splits)
    q_seq, q_new, q_head,           # strides in elements; the last dimension is contiguous
    k_block, k_slot, k_head,
    v_block, v_slot, v_head,
    table_seq,
    scale_log2,                     # LOG2_E * scale
    span,                           # tokens a split, a multiple of TILE
    n_new,
    SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TREE: tl.constexpr,
    PDL: tl.constexpr,              # programmatic dependent launch, see the launcher
):
    """One program: ROWS (new token, query head) pairs of one KV head over one split of a sequence.

    The pairs of a KV head read the same keys and values, so they share one tile: new tokens cost
    rows of a product that waits for memory anyway.
    """
    kv_head = tl.program_id(0) // ROW_TILES
    row_tile = tl.program_id(0) % ROW_TILES
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    seq = tl.program_id(2).to(tl.int64)
    n_heads = tl.num_programs(0) // ROW_TILES * GROUP

    if PDL:
        gdc_wait()                  # until what the previous kernel wrote is there
    length = tl.load(length_ptr + seq)
    # this split walks tokens [start, end)
    start = split * span
    end = tl.minimum(start + span, length)
    if SPLIT:  # noqa: SIM102  a constant; Triton wants the run-time condition by itself
        if start >= end:
            return                  # the merge does not read a split past the end
    first_new = length - n_new      # new token i is token first_new + i

    row = row_tile * ROWS + tl.arange(0, ROWS)                          # (ROWS,)
    new = row // GROUP                                                  # (ROWS,)
    head = kv_head * GROUP + row % GROUP                                # (ROWS,)
    row_ok = new < n_new                                                # (ROWS,)
    d = tl.arange(0, D)                                                 # (D,)
    q_at = seq * q_seq + new * q_new + head * q_head                    # (ROWS,)
    q = tl.load(q_ptr + q_at[:, None] + d, row_ok[:, None], other=0.0)
    if TREE:
        bits = tl.load(tree_ptr + seq * n_new + new, row_ok, other=0)   # (ROWS,)

    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)                              # (TILE,)
        ok = token < end                                                # (TILE,)
        entry = tl.where(ok, token // BLOCK_SIZE, 0)                    # (TILE,)
        block = tl.load(table_ptr + seq * table_seq + entry, ok, other=0).to(tl.int64)
        slot = token % BLOCK_SIZE                                       # (TILE,)
        k_at = block * k_block + slot * k_slot + kv_head * k_head       # (TILE,)
        v_at = block * v_block + slot * v_slot + kv_head * v_head       # (TILE,)
        k = tl.load(k_ptr + k_at[:, None] + d, ok[:, None], other=0.0)  # (TILE, D)
        v = tl.load(v_ptr + v_at[:, None] + d, ok[:, None], other=0.0)  # (TILE, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2     # (ROWS, TILE)
        ahead = token - first_new                                       # (TILE,)  < 0: the text
        if TREE:
            bit = bits[:, None] >> tl.maximum(ahead, 0)[None, :].to(tl.int64)
            seen = (ahead < 0)[None, :] | (bit & 1 == 1)                # (ROWS, TILE)
        else:
            seen = ahead[None, :] <= new[:, None]                       # (ROWS, TILE)
        scores = tl.where(seen & ok[None, :], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))                   # (ROWS,)
        # a row may see nothing of the last tiles: -inf minus -inf would be NaN
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)           # (ROWS,)
        shrink = tl.exp2(m - finite)                                    # (ROWS,)
        p = tl.exp2(scores - finite[:, None])                           # (ROWS, TILE)
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)      # (ROWS, D)
        m = m_new

    if PDL:
        gdc_launch_dependents()     # the merge may be put on the GPU now; it waits for our stores
    out = acc / tl.where(total > 0, total, 1.0)[:, None]                # a row that saw nothing: 0
    lse = m + tl.log2(tl.maximum(total, 1e-30))                         # (ROWS,)
    at = ((seq * n_new + new) * n_heads + head) * n_splits + split      # (ROWS,)
    tl.store(out_ptr + at[:, None] * D + d, out, row_ok[:, None])
    if SPLIT:
        tl.store(lse_ptr + at, lse, row_ok)


@jit
def _merge_kernel(
    part_ptr, lse_ptr, length_ptr,  # (batch, n_new, n_heads, n_splits, D), (.., n_splits), (batch,)
    out_ptr,                        # (batch, n_new, n_heads, D)
    span, n_splits,
    SPLITS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):
    """One program: the splits of one row, weighted by their share of the softmax's sum."""
    seq = tl.program_id(1)
    row = seq.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    n_used = tl.cdiv(tl.load(length_ptr + seq), span)
    split = tl.arange(0, SPLITS)                                        # (SPLITS,), n_splits padded
    d = tl.arange(0, D)
    ok = split < n_used
    if PDL:
        gdc_wait()                  # until every split is stored
    lse = tl.load(lse_ptr + row * n_splits + split, ok, other=-float("inf"))
    part = tl.load(part_ptr + (row * n_splits + split)[:, None] * D + d, ok[:, None], other=0.0)
    top = tl.max(lse, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(lse - top)                                         # (SPLITS,)  0 where unused
    total = tl.sum(weight, axis=0)
    out = tl.sum(weight[:, None] * part, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + d, out)


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    tree: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest tokens of each sequence over its paged keys and values.

    Args:
        q: (batch, n_new, n_heads, d_head), of the last n_new of each sequence's tokens, 1 to 64;
            float32, float16 or bfloat16; d_head 64 or 128.
        k_cache, v_cache: (n_blocks, block_size, n_kv_heads, d_head), the dtype of `q`, the new
            tokens' keys and values in it already; block_size 1 to 256; n_kv_heads divides n_heads.
        block_tables: (batch, max_blocks) int32; token t of a sequence is in slot
            t % block_size of block block_tables[seq, t // block_size]. Entries past the
            sequence's last block may hold anything.
        lengths: (batch,) int32, tokens of each sequence, the new ones included; at least n_new,
            or 0, which gives zeros.
        tree: (batch, n_new) int64 from `pack_tree`: which of the new tokens each new token sees.
            None: a chain, each sees itself and those before it. All see all of the text before.
        scale: of the scores; 1/sqrt(d_head) if None.

    Returns:
        (batch, n_new, n_heads, d_head), the dtype of `q`; sums in float32.

    Raises:
        BadInput: a shape, dtype, device or layout is wrong. On a CPU the block numbers and
            lengths are checked too; on a GPU that would cost a synchronisation, and a block
            number outside the pool reads foreign memory.

    Cost: reads 2 * lengths.sum() * n_kv_heads * d_head elements, however many rows are verified,
    while n_new * group query rows fit one tile of 64; a larger tree reads them once a tile.
    Source: Kwon et al. 2023, section 4.3; Flash-Decoding (Dao et al. 2023) for the split; Miao et
    al. 2023, SpecInfer, for the tree mask.
    """
    batch, n_new, n_heads, d_head = _check_attention(
        q, k_cache, v_cache, block_tables, lengths, tree, scale
    )
    scale = d_head**-0.5 if scale is None else scale
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch == 0:
        return out
    block_size, n_kv_heads = k_cache.shape[1:3]
    group = n_heads // n_kv_heads
    capacity = block_tables.shape[1] * block_size
    plan = choose_plan(batch * n_kv_heads, n_new * group, capacity, q.dtype)
    n_splits = max(1, ceil_div(capacity, plan.span))
    if n_splits == 1:
        part, lse = out, out    # one split is the result; the kernel writes no log-sum-exp then
    else:
        part = q.new_empty(batch, n_new, n_heads, n_splits, d_head, dtype=torch.float32)
        lse = q.new_empty(batch, n_new, n_heads, n_splits, dtype=torch.float32)
    launch = dependent_launch(q.device)
    row_tiles = ceil_div(n_new * group, plan.rows)
    _verify_kernel[(n_kv_heads * row_tiles, n_splits, batch)](
        q, k_cache, v_cache, block_tables, lengths, lengths if tree is None else tree, part, lse,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        block_tables.stride(0), scale * LOG2_E, plan.span, n_new,
        SPLIT=n_splits > 1, BLOCK_SIZE=block_size, GROUP=group, ROWS=plan.rows,
        ROW_TILES=row_tiles, D=d_head, TILE=plan.tile,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=plan.n_stages,
        TREE=tree is not None, num_warps=plan.n_warps, **launch,
    )  # fmt: skip
    if n_splits > 1:
        splits = triton.next_power_of_2(n_splits)
        _merge_kernel[(n_new * n_heads, batch)](
            part, lse, lengths, out, plan.span, n_splits,
            SPLITS=splits, D=d_head,
            num_warps=merge_warps(splits, d_head), **launch,
        )  # fmt: skip
    return out


def pack_tree(mask: Tensor) -> Tensor:
    """A tree's mask as `verify_attention` takes it: one 64-bit word a new token.

    Args:
        mask: (..., n_new, n_new) bool, True where row i sees new token j; n_new at most 64.

    Returns:
        (..., n_new) int64; bit j of word i is mask[..., i, j].
    """
    require(
        mask.dtype == torch.bool and mask.ndim >= 2 and mask.shape[-1] == mask.shape[-2],
        f"mask must be (..., n_new, n_new) bool; got {mask.dtype} {tuple(mask.shape)}",
    )
    n_new = mask.shape[-1]
    require(1 <= n_new <= MAX_NEW, f"a tree has 1 to {MAX_NEW} new tokens; got {n_new}")
    # bit 63 is the sign: the sum wraps to the negative number that has it
    return (mask.long() << torch.arange(n_new, device=mask.device)).sum(-1)


class Plan(NamedTuple):
    """How one verification runs."""

    rows: int           # (new token, query head) pairs a program
    tile: int           # tokens
    n_warps: int
    n_stages: int       # of the pipeline that copies keys and values
    span: int           # tokens a split


def choose_plan(n_programs: int, n_rows: int, capacity: int, dtype: torch.dtype) -> Plan:
    """The plan for `n_programs` (sequence, KV head) pairs with `n_rows` query rows each."""
    gpu = gpu_facts()
    # exact float32 products run without tensor cores: more rows or fewer warps spill registers
    exact = dtype == torch.float32
    rows = min(
        max(MIN_DOT_ROWS, triton.next_power_of_2(n_rows)), MIN_DOT_ROWS if exact else 64
    )
    tile, n_warps = (32, 8) if exact else (64, 4)
    hopper = gpu is not None and torch.version.hip is None and gpu.capability >= (9, 0)
    # programs that a multiprocessor holds at once: their registers decide
    per_sm = 3 if exact else {16: 4, 32: 3, 64: 2}[rows]
    span = choose_span(n_programs * ceil_div(n_rows, rows), capacity, tile, per_sm)
    return Plan(rows, tile, n_warps, 3 if hopper and not exact else 2, span)


def choose_span(n_programs: int, capacity: int, tile: int, per_sm: int) -> int:
    """Tokens a split, a multiple of `tile`: so that the programs fill one, two or three waves of
    the GPU, the fewest that are nearly full.

    At most MAX_SPAN, so that one long sequence does not keep the GPU waiting.
    """
    gpu = gpu_facts()
    # the interpreter walks programs one by one: keep it short
    slots = per_sm * (gpu.n_sms if gpu else 4)
    n_splits, best = 1, 0.0
    for waves in (1, 2, 3):
        n = waves * slots // max(n_programs, 1)
        full = n * n_programs / (waves * slots)
        if full > best + 0.1:
            n_splits, best = n, full
    span = min(ceil_div(capacity, n_splits), MAX_SPAN)
    span = max(span, ceil_div(capacity, MAX_SPLITS), 1)
    return ceil_div(span, tile) * tile


# The rejection sampler


@jit
def _merged(max_at, sum_at, ok):
    """log2 of the sum of each row's chunks, (ROWS,)."""
    m = tl.load(max_at, ok, other=-float("inf"))
    s = tl.load(sum_at, ok, other=0.0)
    top = tl.max(m, axis=1)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(s * tl.exp2(m - top[:, None]), axis=1)
    return top + tl.log2(tl.where(total > 0, total, 1.0))               # a padded row: 0


@jit
def _weight(p_at, q_at, x, ok, subtract, lse_p, lse_q, scale_log2):
    """What the tokens `x` of one row weigh: max(p - q, 0), or p where nothing is to `subtract`."""
    p = tl.load(p_at + x, ok, other=-float("inf")).to(tl.float32)
    q = tl.load(q_at + x, ok & subtract, other=-float("inf")).to(tl.float32)
    weight = tl.exp2(p * scale_log2 - lse_p) - tl.exp2(q * scale_log2 - lse_q)
    return tl.maximum(weight, 0.0)


@jit
def _where(weight, drawn):
    """The place at which the running sum of `weight` passes its share `drawn`; never one of 0."""
    place = tl.arange(0, weight.shape[0])
    running = tl.cumsum(weight, axis=0)
    passed = (running > drawn * tl.sum(weight, axis=0)) & (weight > 0)
    first = tl.min(tl.where(passed, place, weight.shape[0]), axis=0)
    # rounding may leave the last sum below the share
    last = tl.max(tl.where(weight > 0, place, 0), axis=0)
    return tl.minimum(first, last)


@jit
def _softmax_parts_kernel(
    p_ptr, q_ptr,                   # (batch, K + 1, n_vocab), (batch, K, n_vocab) logits
    max_ptr, sum_ptr,               # (2, batch, K + 1, n_chunks) float32: of p, then of q
    p_seq, p_row, q_seq, q_row,     # strides in elements; the last dimension is contiguous
    n_vocab, n_chunks,
    scale_log2,                     # LOG2_E / temperature
    K: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):
    """One program: the largest logit and the sum of exp2 of one chunk of a row of p, and of q."""
    at = tl.program_id(0)           # in max and sum
    chunk = at % n_chunks
    row = at // n_chunks
    seq = (row // (K + 1)).to(tl.int64)
    i = row % (K + 1)
    x = chunk * CHUNK + tl.arange(0, CHUNK)                             # (CHUNK,)
    ok = x < n_vocab
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    p = tl.load(p_ptr + seq * p_seq + i * p_row + x, ok, other=-float("inf")).to(tl.float32)
    # the bonus row has no q
    q = tl.load(q_ptr + seq * q_seq + i * q_row + x, ok & (i < K), other=-float("inf"))
    p, q = p * scale_log2, q.to(tl.float32) * scale_log2
    m_p, m_q = tl.max(p, axis=0), tl.max(q, axis=0)
    tl.store(max_ptr + at, m_p)
    tl.store(max_ptr + tl.num_programs(0) + at, m_q)
    # a chunk of which all is cut off has the sum 0: -inf minus -inf would be NaN
    s_p = tl.sum(tl.exp2(p - tl.where(m_p == -float("inf"), 0.0, m_p)), axis=0)
    s_q = tl.sum(tl.exp2(q - tl.where(m_q == -float("inf"), 0.0, m_q)), axis=0)
    tl.store(sum_ptr + at, s_p)
    tl.store(sum_ptr + tl.num_programs(0) + at, s_q)


@jit
def _judge_kernel(
    p_ptr, q_ptr, guess_ptr,        # logits as above; (batch, K) int64
    max_ptr, sum_ptr,               # (2, batch, K + 1, n_chunks)
    chance_ptr,                     # (batch, K) float32
    kept_ptr,                       # (batch,) int32
    lse_ptr,                        # (2, batch) float32: of p and q in the place to draw for
    mass_ptr,                       # (batch, n_chunks) float32
    p_seq, p_row, q_seq, q_row, guess_seq,
    n_vocab, n_chunks, seed,
    scale_log2,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: how many guesses of a sequence are kept, and what one chunk of the vocabulary
    weighs in the place after them: sum of max(p - q, 0), or of p if all are kept.

    Every chunk's program judges anew: K numbers from the cache cost less than another kernel.
    """
    seq = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n_rows = tl.num_programs(0) * (K + 1)
    if PDL:
        gdc_wait()                  # until every chunk's softmax is stored
        gdc_launch_dependents()
    i = tl.arange(0, ROWS)                                              # (ROWS,), K + 1 padded
    c = tl.arange(0, CHUNKS)                                            # (CHUNKS,), padded
    ok = (i <= K)[:, None] & (c < n_chunks)[None, :]
    at = (seq * (K + 1) + i)[:, None] * n_chunks + c[None, :]           # (ROWS, CHUNKS)
    lse_p = _merged(max_ptr + at, sum_ptr + at, ok)                     # (ROWS,), log2
    at_q = n_rows.to(tl.int64) * n_chunks + at
    lse_q = _merged(max_ptr + at_q, sum_ptr + at_q, ok & (i < K)[:, None])

    judged = i < K
    guess = tl.load(guess_ptr + seq * guess_seq + i, judged, other=0)   # (ROWS,)
    p_x = tl.load(p_ptr + seq * p_seq + i * p_row + guess, judged, other=0.0).to(tl.float32)
    q_x = tl.load(q_ptr + seq * q_seq + i * q_row + guess, judged, other=0.0).to(tl.float32)
    log_p = p_x * scale_log2 - lse_p
    log_q = q_x * scale_log2 - lse_q
    chance = tl.exp2(tl.minimum(log_p - log_q, 0.0))                    # min(1, p / q)
    chance = tl.where(log_p == -float("inf"), 0.0, chance)              # 0 / 0 as well
    drawn = tl.rand(seed, seq * (K + 2) + i)
    refused = judged & (drawn >= chance)
    n_kept = tl.min(tl.where(refused, i, K), axis=0)

    here = i == n_kept
    here_p = tl.sum(tl.where(here, lse_p, 0.0), axis=0)
    here_q = tl.sum(tl.where(here & judged, lse_q, 0.0), axis=0)
    x = chunk * CHUNK + tl.arange(0, CHUNK)
    w = _weight(p_ptr + seq * p_seq + n_kept * p_row, q_ptr + seq * q_seq + n_kept * q_row, x,
                x < n_vocab, n_kept < K, here_p, here_q, scale_log2)
    tl.store(mass_ptr + seq * n_chunks + chunk, tl.sum(w, axis=0))
    if chunk == 0:
        tl.store(chance_ptr + seq * K + i, chance, judged)
        tl.store(kept_ptr + seq, n_kept)
        tl.store(lse_ptr + seq, here_p)
        tl.store(lse_ptr + tl.num_programs(0) + seq, here_q)


@jit
def _draw_kernel(
    p_ptr, q_ptr, guess_ptr, max_ptr, sum_ptr, kept_ptr, lse_ptr, mass_ptr,
    token_ptr,                      # (batch, K + 1) int64
    p_seq, p_row, q_seq, q_row, guess_seq,
    n_vocab, n_chunks, seed,
    scale_log2,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the token after the kept guesses of one sequence, by inverse CDF in two steps,
    each with a draw of its own: a chunk by its mass, and a token of the chunk by its weight.

    One draw of 24 bits for a token of 128k would miss the rare ones' probabilities by percents.
    """
    seq = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
    n_kept = tl.load(kept_ptr + seq)
    lse_p = tl.load(lse_ptr + seq)
    lse_q = tl.load(lse_ptr + tl.num_programs(0) + seq)
    c = tl.arange(0, CHUNKS)                                            # (CHUNKS,)
    there = c < n_chunks
    mass = tl.load(mass_ptr + seq * n_chunks + c, there, other=0.0)
    # p and q equal, refused by rounding alone: the residual is empty, draw from p
    at = (seq * (K + 1) + n_kept) * n_chunks + c
    top = tl.load(max_ptr + at, there, other=-float("inf"))
    mass_p = tl.load(sum_ptr + at, there, other=0.0) * tl.exp2(top - lse_p)
    subtract = (n_kept < K) & (tl.sum(mass, axis=0) > 0)
    mass = tl.where(subtract | (n_kept == K), mass, mass_p)
    chunk = _where(mass, tl.rand(seed, seq * (K + 2) + K))

    x = chunk * CHUNK + tl.arange(0, CHUNK)
    w = _weight(p_ptr + seq * p_seq + n_kept * p_row, q_ptr + seq * q_seq + n_kept * q_row, x,
                x < n_vocab, subtract, lse_p, lse_q, scale_log2)
    token = chunk * CHUNK + _where(w, tl.rand(seed, seq * (K + 2) + K + 1))

    i = tl.arange(0, ROWS)
    guess = tl.load(guess_ptr + seq * guess_seq + i, i < n_kept, other=-1)
    tokens = tl.where(i == n_kept, token.to(tl.int64), guess)
    tl.store(token_ptr + seq * (K + 1) + i, tokens, i <= K)


class Sampled(NamedTuple):
    """What `rejection_sample` gives."""

    tokens: Tensor      # (batch, k + 1) int64: the kept guesses, the token drawn after them, -1s
    n_kept: Tensor      # (batch,) int32, guesses kept
    chances: Tensor     # (batch, k) float32, min(1, p / q) of each guess


def rejection_sample(
    p_logits: Tensor,
    q_logits: Tensor,
    guesses: Tensor,
    rng_seed: int,
    *,
    temperature: float = 1.0,
) -> Sampled:
    """Judge the guesses of a batch, and draw the token that follows those that are kept.

    Args:
        p_logits: (batch, k + 1, n_vocab), the target's after the text and after each guess;
            float32, float16 or bfloat16; -inf is allowed, but not for a whole row.
        q_logits: (batch, k, n_vocab), what the guesses were drawn from, the dtype of `p_logits`.
        guesses: (batch, k) int64, k 1 to 64.
        rng_seed: 0 to 2^63 - 1; all draws follow from it and their place (Philox). Take another
            one for each round: the same seed gives the same draws again.
        temperature: both sides are divided by it; above 0. Greedy decoding needs no sampler.

    Returns:
        `Sampled`: tokens, n_kept, chances. tokens[b, : n_kept[b] + 1] is distributed as the
        target's own next tokens, if each guess was drawn from softmax(q_logits / temperature).

    Raises:
        BadInput: a shape, dtype, device or layout is wrong, a seed or temperature out of range.
            On a CPU the guesses and logits are checked too.

    Cost: one pass over both logits, batch * (2 k + 1) * n_vocab elements, and a second one over the
    one place of each sequence that is drawn for: the residual needs both softmaxes' sums first.
    Source: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.
    """
    batch, k, n_vocab = _check_sampler(p_logits, q_logits, guesses, rng_seed, temperature)
    device = p_logits.device
    tokens = torch.empty(batch, k + 1, dtype=torch.int64, device=device)
    n_kept = torch.empty(batch, dtype=torch.int32, device=device)
    chances = torch.empty(batch, k, dtype=torch.float32, device=device)
    if batch == 0:
        return Sampled(tokens, n_kept, chances)
    chunk, n_warps = choose_chunk(n_vocab)
    n_chunks = ceil_div(n_vocab, chunk)
    parts = torch.empty(2, 2, batch, k + 1, n_chunks, dtype=torch.float32, device=device)
    mass = torch.empty(batch, n_chunks, dtype=torch.float32, device=device)
    lse = torch.empty(2, batch, dtype=torch.float32, device=device)
    launch = dependent_launch(device)
    strides = (*p_logits.stride()[:2], *q_logits.stride()[:2])
    scale_log2 = LOG2_E / temperature
    _softmax_parts_kernel[(n_chunks * batch * (k + 1),)](
        p_logits, q_logits, parts[0], parts[1], *strides, n_vocab, n_chunks, scale_log2,
        K=k, CHUNK=chunk, num_warps=n_warps, **launch,
    )  # fmt: skip
    sizes = {
        "K": k, "ROWS": triton.next_power_of_2(k + 1), "CHUNKS": triton.next_power_of_2(n_chunks),
        "CHUNK": chunk, "num_warps": n_warps, **launch,
    }  # fmt: skip
    numbers = (*strides, guesses.stride(0), n_vocab, n_chunks, rng_seed, scale_log2)
    _judge_kernel[(batch, n_chunks)](
        p_logits, q_logits, guesses, parts[0], parts[1], chances, n_kept, lse, mass,
        *numbers, **sizes,
    )  # fmt: skip
    _draw_kernel[(batch,)](
        p_logits, q_logits, guesses, parts[0], parts[1], n_kept, lse, mass, tokens,
        *numbers, **sizes,
    )  # fmt: skip
    return Sampled(tokens, n_kept, chances)


def choose_chunk(n_vocab: int) -> tuple[int, int]:
    """Tokens of the vocabulary a program, and its warps: some 30 chunks, 16 logits a thread."""
    chunk = min(max(triton.next_power_of_2(ceil_div(n_vocab, 32)), 16), 4096)
    return chunk, max(1, chunk // 512)


# Checks


def _check_attention(
    q, k_cache, v_cache, block_tables, lengths, tree, scale
) -> tuple[int, int, int, int]:
    """Refuse bad input before any work: (batch, n_new, n_heads, d_head)."""
    require(q.ndim == 4, f"q must be (batch, n_new, n_heads, d_head); got {tuple(q.shape)}")
    batch, n_new, n_heads, d_head = q.shape
    require(d_head in (64, 128), f"d_head must be 64 or 128; got {d_head}")
    require(1 <= n_new <= MAX_NEW, f"n_new must be 1 to {MAX_NEW}; got {n_new}")
    require(
        k_cache.ndim == 4 and k_cache.shape == v_cache.shape and k_cache.shape[3] == d_head,
        f"k_cache and v_cache must both be (n_blocks, block_size, n_kv_heads, {d_head}); "
        f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}",
    )
    n_blocks, block_size, n_kv_heads, _ = k_cache.shape
    require(
        n_kv_heads > 0 and n_heads > 0 and n_heads % n_kv_heads == 0,
        f"n_heads must be a multiple of n_kv_heads; got {n_heads} and {n_kv_heads}",
    )
    require(1 <= block_size <= 256, f"block_size must be 1 to 256; got {block_size}")
    _check_floats(q, k_cache=k_cache, v_cache=v_cache)
    check_last_dimension(q=q, k_cache=k_cache, v_cache=v_cache)
    integers = {"block_tables": block_tables, "lengths": lengths}
    integers |= {} if tree is None else {"tree": tree}
    for name, tensor in integers.items():
        dtype = torch.int64 if name == "tree" else torch.int32
        ndim = 1 if name == "lengths" else 2
        require(
            tensor.ndim == ndim and tensor.shape[0] == batch,
            f"{name} must have {ndim} dimension(s), the first of {batch} sequences; "
            f"got {tuple(tensor.shape)}",
        )
        require(
            tensor.dtype == dtype and tensor.device == q.device,
            f"{name} must be {dtype} on {q.device}; got {tensor.dtype} on {tensor.device}",
        )
    require(
        tree is None or tree.shape == (batch, n_new) and tree.is_contiguous(),
        f"tree must be ({batch}, {n_new}) and contiguous: one word a new token, from pack_tree",
    )
    require(
        lengths.is_contiguous() and (block_tables.numel() == 0 or block_tables.stride(1) == 1),
        "lengths and the rows of block_tables must be contiguous: call .contiguous()",
    )
    require(
        scale is None or scale == scale and abs(scale) != float("inf"),
        f"scale must be a finite number; got {scale}",
    )
    if not q.is_cuda and batch:
        _check_values(block_tables, lengths, n_blocks, block_size, n_new)
    return batch, n_new, n_heads, d_head


def _check_values(block_tables, lengths, n_blocks: int, block_size: int, n_new: int) -> None:
    capacity = block_tables.shape[1] * block_size
    longest = int(lengths.max())
    short = lengths[(lengths != 0) & (lengths < n_new)]
    require(
        len(short) == 0,
        f"a sequence must have its {n_new} new tokens, or none at all; got a length of "
        f"{short[:1].tolist()}",
    )
    require(
        longest <= capacity,
        f"a sequence of {longest} tokens does not fit its block table: "
        f"{block_tables.shape[1]} blocks of {block_size} hold {capacity}",
    )
    n_used = (lengths + block_size - 1) // block_size
    blocks = block_tables[torch.arange(block_tables.shape[1]) < n_used[:, None]]
    require(
        blocks.numel() == 0 or 0 <= int(blocks.min()) and int(blocks.max()) < n_blocks,
        f"block_tables names a block outside the pool of {n_blocks}",
    )


def _check_sampler(p_logits, q_logits, guesses, rng_seed, temperature) -> tuple[int, int, int]:
    """Refuse bad input before any work: (batch, k, n_vocab)."""
    require(
        p_logits.ndim == 3 and p_logits.shape[1] >= 2 and p_logits.shape[2] >= 1,
        f"p_logits must be (batch, k + 1, n_vocab) with k >= 1; got {tuple(p_logits.shape)}",
    )
    batch, k, n_vocab = p_logits.shape[0], p_logits.shape[1] - 1, p_logits.shape[2]
    require(k <= MAX_NEW, f"k must be at most {MAX_NEW}; got {k}")
    require(
        q_logits.shape == (batch, k, n_vocab),
        f"q_logits must be (batch, k, n_vocab) = {(batch, k, n_vocab)}: p has one row more, for "
        f"the token after all guesses; got {tuple(q_logits.shape)}",
    )
    require(
        guesses.shape == (batch, k) and guesses.dtype == torch.int64
        and guesses.device == p_logits.device and (k == 1 or guesses.stride(1) == 1),
        f"guesses must be {(batch, k)} int64 on {p_logits.device}, its rows contiguous; "
        f"got {tuple(guesses.shape)} {guesses.dtype} on {guesses.device}",
    )
    _check_floats(p_logits, q_logits=q_logits)
    check_last_dimension(p_logits=p_logits, q_logits=q_logits)
    require(0 <= rng_seed < 1 << 63, f"rng_seed must be 0 to 2^63 - 1; got {rng_seed}")
    require(
        0 < temperature < float("inf"),
        f"temperature must be a positive finite number; got {temperature}. Greedy decoding takes "
        "the largest logit and needs no sampler.",
    )
    if not p_logits.is_cuda and batch:
        low, high = int(guesses.min()), int(guesses.max())
        require(
            low >= 0 and high < n_vocab, f"guesses must lie in [0, {n_vocab}); got {low} to {high}"
        )
        for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
            require(
                bool(logits.amax(-1).isfinite().all()),
                f"each row of {name} needs a finite maximum and no NaN",
            )
    return batch, k, n_vocab


def _check_floats(first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        require(
            tensor.dtype == first.dtype and tensor.device == first.device,
            f"{name} must be {first.dtype} on {first.device}; got {tensor.dtype} on "
            f"{tensor.device}",
        )
    check_dtype(first.dtype, first)
