"""Paged attention in Triton: the page walk of the reference, and the write into slots.

A decode step reads every cached key and value once and does little arithmetic with it, so its
floor is bytes / bandwidth. One program owns one (sequence, KV head, split): it loads the query
heads of its group once and walks its share of the block table.
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
    merge_warps,
)
from llmopt_lab.core.memory import ceil_div

prepare_triton()

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = 1.4426950408889634     # exp(x) == exp2(x * LOG2_E), and exp2 is one instruction
MIN_DOT_ROWS = 16               # tl.dot wants at least 16 rows: smaller groups are padded
MAX_SPLITS = 128
MAX_SPAN = 1024                 # tokens
ONE_WAVE_TOKENS = 2048          # of the longest sequence that one multiprocessor walks by itself
MAX_TABLE = 512                 # entries of the table that a program keeps


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr,            # (batch, n_heads, D); (n_blocks, BLOCK_SIZE, n_kv_heads, D)
    table_ptr, length_ptr,          # (batch, max_blocks), (batch,); int32
    out_ptr, lse_ptr,               # (batch, n_heads, n_splits, D), (batch, n_heads, n_splits)
    q_seq, q_head,                  # strides in elements; the last dimension is contiguous
    k_block, k_slot, k_head,
    v_block, v_slot, v_head,
    table_seq,
    scale_log2,                     # LOG2_E * scale
    span,                           # tokens a split, a multiple of TILE
    max_blocks,                     # entries in a row of the table
    N_SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TABLE: tl.constexpr,            # max_blocks, padded: one wave, see `choose_plan`; else 0
    PDL: tl.constexpr,              # programmatic dependent launch, see the launcher
):
    """One program: the GROUP query heads of one KV head over one split of one sequence's tokens."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    n_heads = tl.num_programs(0) * GROUP

    if PDL:
        gdc_wait()                  # until what the previous kernel wrote is there
        if TABLE > 0:
            gdc_launch_dependents()     # no merge: the next kernel may take what falls free
    if TABLE > 0:                   # the whole row at once, without waiting for the length
        every = tl.arange(0, TABLE)
        blocks = tl.load(table_ptr + seq * table_seq + every, every < max_blocks, other=0)
    length = tl.load(length_ptr + seq)
    # this split walks tokens [start, end)
    start = split * span
    end = tl.minimum(start + span, length)
    if N_SPLITS > 1:  # noqa: SIM102  a constant; Triton wants the run-time condition by itself
        if start >= end:
            return                  # the merge does not read a split past the end

    row = tl.arange(0, ROWS)                                            # (ROWS,)  GROUP, padded
    head = kv_head * GROUP + row                                        # (ROWS,)
    row_ok = row < GROUP                                                # (ROWS,)
    d = tl.arange(0, D)                                                 # (D,)
    q = tl.load(q_ptr + seq * q_seq + head[:, None] * q_head + d, row_ok[:, None], other=0.0)

    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)                              # (TILE,)
        ok = token < end                                                # (TILE,)
        entry = tl.where(ok, token // BLOCK_SIZE, 0)                    # (TILE,)
        if TABLE > 0:
            block = tl.gather(blocks, entry, 0).to(tl.int64)
        else:
            block = tl.load(table_ptr + seq * table_seq + entry, ok, other=0).to(tl.int64)
        slot = token % BLOCK_SIZE                                       # (TILE,)
        k_at = block * k_block + slot * k_slot + kv_head * k_head       # (TILE,)
        v_at = block * v_block + slot * v_slot + kv_head * v_head       # (TILE,)
        k = tl.load(k_ptr + k_at[:, None] + d, ok[:, None], other=0.0)  # (TILE, D)
        v = tl.load(v_ptr + v_at[:, None] + d, ok[:, None], other=0.0)  # (TILE, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2     # (ROWS, TILE)
        # a slot past the end was read as 0 and would score 0: it must not take part
        scores = tl.where(ok[None, :], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))                   # (ROWS,)
        shrink = tl.exp2(m - m_new)                                     # (ROWS,)
        p = tl.exp2(scores - m_new[:, None])                            # (ROWS, TILE)
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)      # (ROWS, D)
        m = m_new

    if PDL and TABLE == 0:
        gdc_launch_dependents()     # the merge may be put on the GPU now; it waits for our stores
    out = acc / tl.where(total > 0, total, 1.0)[:, None]                # an empty sequence gives 0
    lse = m + tl.log2(tl.maximum(total, 1e-30))                         # (ROWS,)
    at = (seq * n_heads + head) * N_SPLITS + split                      # (ROWS,)
    tl.store(out_ptr + at[:, None] * D + d, out, row_ok[:, None])
    if N_SPLITS > 1:
        tl.store(lse_ptr + at, lse, row_ok)


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, length_ptr,  # (batch, n_heads, n_splits, D), (.., n_splits), (batch,)
    out_ptr,                        # (batch, n_heads, D)
    span,
    N_SPLITS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):
    """One program: the splits of one query head, weighted by their share of the softmax's sum."""
    seq = tl.program_id(1)
    head = seq.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    n_used = tl.cdiv(tl.load(length_ptr + seq), span)
    split = tl.arange(0, SPLITS)                                        # (SPLITS,), N_SPLITS padded
    d = tl.arange(0, D)
    ok = split < n_used
    if PDL:
        gdc_wait()                  # until every split is stored
    lse = tl.load(lse_ptr + head * N_SPLITS + split, ok, other=-float("inf"))
    part = tl.load(part_ptr + (head * N_SPLITS + split)[:, None] * D + d, ok[:, None], other=0.0)
    top = tl.where(n_used > 0, tl.max(lse, axis=0), 0.0)
    weight = tl.exp2(lse - top)                                         # (SPLITS,)  0 where unused
    total = tl.sum(weight, axis=0)
    out = tl.sum(weight[:, None] * part, axis=0) / tl.where(n_used > 0, total, 1.0)
    tl.store(out_ptr + head * D + d, out)


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new query per sequence over its paged keys and values, read in place.

    Args:
        q: (batch, n_heads, d_head); float32, float16 or bfloat16; d_head 64 or 128.
        k_cache, v_cache: (n_blocks, block_size, n_kv_heads, d_head), the dtype of `q`;
            block_size 1 to 256; n_kv_heads divides n_heads (grouped-query attention).
        block_tables: (batch, max_blocks) int32; token t of a sequence is in slot
            t % block_size of block block_tables[seq, t // block_size]. Entries past the
            sequence's last block may hold anything. Its width bounds the longest sequence: a
            narrow table lets the launcher plan better.
        lengths: (batch,) int32, tokens to attend to; 0 gives zeros.
        scale: of the scores; 1/sqrt(d_head) if None.

    Returns:
        (batch, n_heads, d_head), the dtype of `q`; sums in float32.

    Raises:
        BadInput: a shape, dtype, device or layout is wrong. On a CPU the block numbers and
            lengths are checked too; on a GPU that would cost a synchronisation, and a block
            number outside the pool reads foreign memory.

    Cost: reads 2 * lengths.sum() * n_kv_heads * d_head elements. When batch * n_kv_heads programs
    cannot fill the GPU, the tokens are split and a second kernel merges by log-sum-exp.
    Source: Kwon et al. 2023, section 4.3; Flash-Decoding (Dao et al. 2023) for the split.
    """
    batch, n_heads, d_head, n_kv_heads, block_size = _check(
        q, k_cache, v_cache, block_tables, lengths, scale
    )
    scale = d_head**-0.5 if scale is None else scale
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch == 0:
        return out
    group = n_heads // n_kv_heads
    max_blocks = block_tables.shape[1]
    plan = choose_plan(batch * n_kv_heads, max_blocks, block_size, q.dtype)
    n_splits = max(1, ceil_div(max_blocks * block_size, plan.span))
    if n_splits == 1:
        part, lse = out, out    # one split is the result; the kernel writes no log-sum-exp then
    else:
        part = q.new_empty(batch, n_heads, n_splits, d_head, dtype=torch.float32)
        lse = q.new_empty(batch, n_heads, n_splits, dtype=torch.float32)
    launch = dependent_launch(q.device)
    _decode_kernel[(n_kv_heads, n_splits, batch)](
        q, k_cache, v_cache, block_tables, lengths, part, lse,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        block_tables.stride(0), scale * LOG2_E, plan.span, max_blocks,
        N_SPLITS=n_splits, BLOCK_SIZE=block_size, GROUP=group,
        ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)), D=d_head, TILE=plan.tile,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=plan.n_stages,
        TABLE=plan.table, num_warps=plan.n_warps, **launch,
    )  # fmt: skip
    if n_splits > 1:
        splits = triton.next_power_of_2(n_splits)
        _merge_kernel[(n_heads, batch)](
            part, lse, lengths, out, plan.span,
            N_SPLITS=n_splits, SPLITS=splits, D=d_head,
            num_warps=merge_warps(splits, d_head), **launch,
        )  # fmt: skip
    return out


class Plan(NamedTuple):
    """How one decode step runs."""

    tile: int           # tokens
    n_warps: int
    n_stages: int       # of the pipeline that copies keys and values
    span: int           # tokens a split
    table: int = 0      # entries of its row of the table that a program loads at once


def choose_plan(n_programs: int, max_blocks: int, block_size: int, dtype: torch.dtype) -> Plan:
    """The plan for `n_programs` (sequence, KV head) pairs.

    One wave: where the pairs are just as many as a Hopper has multiprocessors, each walks its
    whole sequence, with a deeper pipeline and its row of the table in registers. Nothing is
    merged. It wins where lengths are alike and loses where they are not, so it is kept to tables
    of ONE_WAVE_TOKENS. Otherwise the tokens are split (`choose_span`), several programs to a
    multiprocessor.
    """
    gpu = gpu_facts()
    capacity = max_blocks * block_size
    table = triton.next_power_of_2(max(max_blocks, 1))
    hopper = gpu is not None and torch.version.hip is None and gpu.capability[0] in (9, 10)
    one_wave = hopper and 0.9 * gpu.n_sms <= n_programs <= gpu.n_sms
    if one_wave and dtype.itemsize == 2 and capacity <= ONE_WAVE_TOKENS and table <= MAX_TABLE:
        return Plan(64, 4, 4, max(1, ceil_div(capacity, 64)) * 64, table)
    # exact float32 products run without tensor cores: 4 warps would spill registers
    tile, n_warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return Plan(tile, n_warps, 2, choose_span(n_programs, capacity, tile))


def choose_span(n_programs: int, capacity: int, tile: int) -> int:
    """Tokens a split, a multiple of `tile`, for `n_programs` (sequence, KV head) pairs.

    Short enough that every multiprocessor has its three programs, and at most MAX_SPAN, so that
    one long sequence among short ones does not keep the GPU waiting.
    """
    gpu = gpu_facts()
    n_sms = gpu.n_sms if gpu else 4     # the interpreter walks programs one by one: keep it short
    wanted = max(1, 3 * n_sms // max(n_programs, 1))
    span = min(ceil_div(capacity, wanted), MAX_SPAN)
    span = max(span, ceil_div(capacity, MAX_SPLITS), 1)
    return ceil_div(span, tile) * tile


@triton.jit
def _write_kernel(
    k_ptr, v_ptr,                   # (n_tokens, N_HEADS, D), twice: the new keys and values
    k_cache_ptr, v_cache_ptr,       # (n_blocks, BLOCK_SIZE, N_HEADS, D), twice
    slots_ptr,                      # (n_tokens,) int64
    k_token, k_head, v_token, v_head,                                   # strides in elements
    k_block, k_slot, k_cache_head, v_block, v_slot, v_cache_head,
    BLOCK_SIZE: tl.constexpr, N_HEADS: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, DIMS: tl.constexpr,                            # N_HEADS and D, padded
):
    """One program: the keys and values of one token, all KV heads."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(slots_ptr + token).to(tl.int64)
    block = at // BLOCK_SIZE
    slot = at % BLOCK_SIZE
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)                    # (HEADS, 1)
    d = tl.arange(0, DIMS)                                              # (DIMS,)
    ok = (head < N_HEADS) & (d < D) & (at >= 0)                         # (HEADS, DIMS)
    k = tl.load(k_ptr + token * k_token + head * k_head + d, ok)
    v = tl.load(v_ptr + token * v_token + head * v_head + d, ok)
    tl.store(k_cache_ptr + block * k_block + slot * k_slot + head * k_cache_head + d, k, ok)
    tl.store(v_cache_ptr + block * v_block + slot * v_slot + head * v_cache_head + d, v, ok)


def write_kv(
    keys: Tensor, values: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Write the keys and values of new tokens into their slots, in place.

    Args:
        keys, values: (n_tokens, n_kv_heads, d_head), the dtype of the caches.
        k_cache, v_cache: (n_blocks, block_size, n_kv_heads, d_head).
        slots: (n_tokens,) int64, block * block_size + offset within the block; a negative slot
            writes nothing (padding). No slot may appear twice.

    Raises:
        BadInput: a shape, dtype, device or layout is wrong; on a CPU also a slot past the end.

    Cost: reads and writes 2 * n_tokens * n_kv_heads * d_head elements.
    """
    require(
        keys.ndim == 3 and keys.shape == values.shape,
        "keys and values must both be (n_tokens, n_kv_heads, d_head); "
        f"got {tuple(keys.shape)} and {tuple(values.shape)}",
    )
    n_tokens, n_kv_heads, d_head = keys.shape
    _check_caches(keys, k_cache, v_cache, n_kv_heads, d_head)
    require(
        slots.shape == (n_tokens,) and slots.dtype == torch.int64 and slots.device == keys.device,
        f"slots must be ({n_tokens},) int64 on {keys.device}; "
        f"got {tuple(slots.shape)} {slots.dtype} on {slots.device}",
    )
    require(slots.is_contiguous(), "slots must be contiguous: call .contiguous()")
    check_last_dimension(keys=keys, values=values)
    n_slots = k_cache.shape[0] * k_cache.shape[1]
    if n_tokens == 0:
        return
    if not slots.is_cuda:
        require(
            int(slots.max()) < n_slots,
            f"slot {int(slots.max())} does not exist: the cache has slots 0 to {n_slots - 1}",
        )
    _write_kernel[(n_tokens,)](
        keys, values, k_cache, v_cache, slots,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        BLOCK_SIZE=k_cache.shape[1], N_HEADS=n_kv_heads, D=d_head,
        HEADS=triton.next_power_of_2(n_kv_heads), DIMS=triton.next_power_of_2(d_head),
    )  # fmt: skip


def _check(q, k_cache, v_cache, block_tables, lengths, scale) -> tuple[int, int, int, int, int]:
    """Refuse bad input before any work: (batch, n_heads, d_head, n_kv_heads, block_size)."""
    require(q.ndim == 3, f"q must be (batch, n_heads, d_head); got {tuple(q.shape)}")
    batch, n_heads, d_head = q.shape
    require(d_head in (64, 128), f"d_head must be 64 or 128; got {d_head}")
    require(k_cache.ndim == 4, f"k_cache must have 4 dimensions; got {tuple(k_cache.shape)}")
    n_blocks, block_size, n_kv_heads, _ = k_cache.shape
    _check_caches(q, k_cache, v_cache, n_kv_heads, d_head)
    require(
        n_kv_heads > 0 and n_heads > 0 and n_heads % n_kv_heads == 0,
        f"n_heads must be a multiple of n_kv_heads; got {n_heads} and {n_kv_heads}",
    )
    require(1 <= block_size <= 256, f"block_size must be 1 to 256; got {block_size}")
    for name, tensor, ndim in (("block_tables", block_tables, 2), ("lengths", lengths, 1)):
        require(
            tensor.ndim == ndim and tensor.shape[0] == batch,
            f"{name} must have {ndim} dimension(s), the first of {batch} sequences; "
            f"got {tuple(tensor.shape)}",
        )
        require(
            tensor.dtype == torch.int32 and tensor.device == q.device,
            f"{name} must be int32 on {q.device}; got {tensor.dtype} on {tensor.device}",
        )
    require(
        lengths.is_contiguous() and (block_tables.numel() == 0 or block_tables.stride(1) == 1),
        "lengths and the rows of block_tables must be contiguous: call .contiguous()",
    )
    check_last_dimension(q=q)
    require(
        scale is None or scale == scale and abs(scale) != float("inf"),
        f"scale must be a finite number; got {scale}",
    )
    if not q.is_cuda and batch:
        _check_values(block_tables, lengths, n_blocks, block_size)
    return batch, n_heads, d_head, n_kv_heads, block_size


def _check_caches(new: Tensor, k_cache: Tensor, v_cache: Tensor, n_kv_heads: int, d_head: int):
    require(
        k_cache.ndim == 4 and k_cache.shape == v_cache.shape,
        "k_cache and v_cache must both be (n_blocks, block_size, n_kv_heads, d_head); "
        f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}",
    )
    require(
        k_cache.shape[2:] == (n_kv_heads, d_head),
        f"the caches must end in (n_kv_heads, d_head) = ({n_kv_heads}, {d_head}); "
        f"got {tuple(k_cache.shape[2:])}",
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            cache.dtype == new.dtype and cache.device == new.device,
            f"{name} must be {new.dtype} on {new.device} like the new tensors; "
            f"got {cache.dtype} on {cache.device}",
        )
    check_dtype(new.dtype, new)
    check_last_dimension(k_cache=k_cache, v_cache=v_cache)


def _check_values(block_tables: Tensor, lengths: Tensor, n_blocks: int, block_size: int) -> None:
    capacity = block_tables.shape[1] * block_size
    longest, shortest = int(lengths.max()), int(lengths.min())
    require(shortest >= 0, f"lengths must not be negative; got {shortest}")
    require(
        longest <= capacity,
        f"a sequence of {longest} tokens does not fit its block table: "
        f"{block_tables.shape[1]} blocks of {block_size} hold {capacity}",
    )
    n_used = (lengths + block_size - 1) // block_size
    used = torch.arange(block_tables.shape[1]) < n_used[:, None]
    blocks = block_tables[used]
    require(
        blocks.numel() == 0 or 0 <= int(blocks.min()) and int(blocks.max()) < n_blocks,
        f"block_tables names a block outside the pool of {n_blocks}",
    )
