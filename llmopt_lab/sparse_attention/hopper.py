"""The forward pass over windows and over listed blocks for Hopper, in Gluon.

As in FlashAttention-3, one warp moves tiles with TMA and two warpgroups of 64 query rows compute;
the scores of the next tile are multiplied while the softmax of this one runs. The tiles of keys are
those of a window, and of the sinks before it, or those of a list. Partial tiles come first, so that
two loops are enough: with the rule, and without it. `kernels.py` calls `forward` on sm_90.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.hopper import descriptor_of, has_tma_strides, jit
from llmopt_lab.core.memory import ceil_div

prepare_triton()

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
TILE_Q = gl.constexpr(128)              # two warpgroups of 64 rows
MAX_REGISTERS = 168                     # a thread at the launch; the groups then trade among them


@dataclass(frozen=True)
class Plan:
    """What a kernel is built of."""

    tile_k: int = 128
    stages: int = 2                     # key and value tiles in flight
    registers: int = 240                # a thread of the warpgroups that compute


PLANS = {64: Plan(stages=3), 128: Plan()}


@jit
def _work(index, sizes, lists, rule, TILE_K: gl.constexpr, LISTED: gl.constexpr,
          SINKS: gl.constexpr):
    """One piece of work: (first query, head of all batches, list), then the tiles of keys.

    Tiles: how many, how many of them are partial, and what `_first_key` needs to number them.
    """
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, list_head, n_walked = sizes
    blocks_ptr, n_full_ptr, n_live_ptr = lists
    low, high, n_sinks = rule
    head = index // n_tiles
    tile = n_tiles - 1 - index % n_tiles
    first_q = tile * TILE_Q
    kv_head = (head // n_heads) * (n_heads // group) + head % n_heads // group
    list_at = kv_head.to(gl.int64) * list_head + tile
    if LISTED:
        n_live = gl.load(n_live_ptr + list_at)
        n_partial = n_live - gl.load(n_full_ptr + list_at)
        begin, full_begin, full_end, end = 0, 0, 0, 0
    else:
        first = first_q + n_k - n_q                                     # tokens
        last = gl.minimum(first_q + TILE_Q, n_q) - 1 + n_k - n_q
        begin = gl.maximum(first - high, 0) // TILE_K
        end = gl.maximum(gl.cdiv(gl.minimum(last - low + 1, n_k), TILE_K), begin)
        full_begin = gl.minimum(
            gl.maximum(gl.cdiv(gl.maximum(last - high, 0), TILE_K), begin), end)
        full_end = gl.maximum(gl.minimum(first - low + 1, n_k), 0) // TILE_K
        full_end = gl.minimum(gl.maximum(full_end, full_begin), end)
        n_partial = end - begin - (full_end - full_begin)
        if SINKS:
            n_partial += gl.minimum(gl.cdiv(gl.minimum(n_sinks, n_k), TILE_K), begin)
        n_live = n_partial + full_end - full_begin
    return first_q, head, list_at * n_walked, n_live, n_partial, begin, full_begin, full_end, end


@jit
def _first_key(i, n_live, n_partial, begin, full_begin, full_end, end, list_at, lists,
               TILE_K: gl.constexpr, LISTED: gl.constexpr):
    """First key of the i-th tile: the partial ones come first, diagonal, far edge, sinks."""
    blocks_ptr, n_full_ptr, n_live_ptr = lists
    if LISTED:
        tile = gl.load(blocks_ptr + list_at + n_live - 1 - i)           # they end the list
    else:
        edge = i - (end - full_end)
        sink = edge - (full_begin - begin)
        tile = gl.where(edge < 0, full_end + i, gl.where(sink < 0, begin + edge, sink))
        tile = gl.where(i < n_partial, tile, full_begin + i - n_partial)
    return tile * TILE_K


@jit
def _produce(descs, tiles, bars, sizes, lists, rule, counter_ptr, TILE_K: gl.constexpr,
             STAGES: gl.constexpr, LISTED: gl.constexpr, SINKS: gl.constexpr):
    """One warp: queries, keys and values into shared memory as soon as their place is free."""
    q_desc, k_desc, v_desc, out_desc = descs
    q_s, k_s, v_s, out_s, next_s = tiles
    q_full, q_free, k_full, k_free, v_full, v_free, next_full, next_free = bars
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, list_head, n_walked = sizes
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_work = n_tiles * n_heads_all
    done = 0
    step = 0
    index = gl.program_id(0)
    while index < n_work:
        following = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        first_q, head, list_at, n_live, n_partial, begin, full_begin, full_end, end = _work(
            index, sizes, lists, rule, TILE_K, LISTED, SINKS)
        seq = head // n_heads
        head = head % n_heads
        kv_head = head // group
        for g in gl.static_range(2):
            mbarrier.wait(q_free.index(g), (done & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [seq, head, first_q + g * 64, 0], q_full.index(g), q_s.index(g))
        for i in range(n_live):
            first_k = _first_key(i, n_live, n_partial, begin, full_begin, full_end, end,
                                 list_at, lists, TILE_K, LISTED)
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [seq, kv_head, first_k, 0], k_full.index(stage), k_s.index(stage))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [seq, kv_head, first_k, 0], v_full.index(stage), v_s.index(stage))
            step += 1
        mbarrier.wait(next_free, (done & 1) ^ 1)
        next_s.store(gl.full([1], following, gl.int32, ONE))
        mbarrier.arrive(next_full, count=1)
        index = following
        done += 1


@jit
def _absorb(scores, m, total, scale_log2, token, first_k, n_k, rule, MASKED: gl.constexpr,
            SINKS: gl.constexpr, TILE_K: gl.constexpr, SCORES: gl.constexpr):
    """Online softmax: one tile of scores into the running maximum and total."""
    if MASKED:
        low, high, n_sinks = rule
        key = first_k + gl.arange(0, TILE_K, gl.SliceLayout(0, SCORES))
        back = gl.expand_dims(token, 1) - gl.expand_dims(key, 0)
        ok = (back >= low) & (back <= high)
        if SINKS:
            ok = ok | ((back >= 0) & gl.expand_dims(key < n_sinks, 0))
        scores = gl.where(ok & gl.expand_dims(key < n_k, 0), scores, -float("inf"))
    m_new = gl.maximum(m, gl.max(scores, 1) * scale_log2)
    base = m_new
    if MASKED:
        base = gl.where(m_new == -float("inf"), 0.0, m_new)     # a row that sees no key yet
    p = gl.exp2(scores * scale_log2 - gl.expand_dims(base, 1))
    shrink = gl.exp2(m - base)
    total = shrink * total + gl.sum(p, 1)
    return p, shrink, m_new, total


@jit
def _step(q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, token, first_k, n_k, rule,
          MASKED: gl.constexpr, SINKS: gl.constexpr, D: gl.constexpr, TILE_K: gl.constexpr,
          STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr, P: gl.constexpr):
    """Scores of this key tile, and the weighted sum of the tile before it."""
    q_full, q_free, k_full, k_free, v_full, v_free, next_full, next_free = bars
    dtype: gl.constexpr = q.dtype
    stage = step % STAGES
    before = (step - 1) % STAGES
    zeros = gl.zeros([64, TILE_K], gl.float32, SCORES)
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    k = k_s.index(stage).reshape([TILE_K, D])
    pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    pending_out = warpgroup_mma(p, v_s.index(before).reshape([TILE_K, D]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[pending])
    mbarrier.arrive(k_free.index(stage), count=1)
    p_new, shrink, m, total = _absorb(
        scores, m, total, scale_log2, token, first_k, n_k, rule, MASKED, SINKS, TILE_K, SCORES)
    acc = warpgroup_mma_wait(0, deps=[pending_out])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return gl.convert_layout(p_new.to(dtype), P), acc, m, total


@jit
def _consume(descs, tiles, bars, sizes, lists, rule, lse_ptr, scale_log2,
             WHO: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
             LISTED: gl.constexpr, SINKS: gl.constexpr):
    """One warpgroup: 64 query rows against every live tile of keys."""
    q_desc, k_desc, v_desc, out_desc = descs
    q_s, k_s, v_s, out_s, next_s = tiles
    q_full, q_free, k_full, k_free, v_full, v_free, next_full, next_free = bars
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, list_head, n_walked = sizes
    dtype: gl.constexpr = q_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    q = q_s.index(WHO).reshape([64, D])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    n_work = n_tiles * n_heads_all
    done = 0
    step = 0
    index = gl.program_id(0)
    while index < n_work:
        first_q, head, list_at, n_live, n_partial, begin, full_begin, full_end, end = _work(
            index, sizes, lists, rule, TILE_K, LISTED, SINKS)
        first_q += WHO * 64
        row = first_q + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        token = row + (n_k - n_q)
        m = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, D], gl.float32, OUT)
        zeros = gl.zeros([64, TILE_K], gl.float32, SCORES)
        mbarrier.wait(q_full.index(WHO), done & 1)
        if n_live > 0:
            first_k = _first_key(0, n_live, n_partial, begin, full_begin, full_end, end,
                                 list_at, lists, TILE_K, LISTED)
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            k = k_s.index(stage).reshape([TILE_K, D])
            pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(k_free.index(stage), count=1)
            # whether it is partial or not: a full tile passes the rule unharmed
            p_new, shrink, m, total = _absorb(
                scores, m, total, scale_log2, token, first_k, n_k, rule,
                True, SINKS, TILE_K, SCORES)
            p = gl.convert_layout(p_new.to(dtype), P)
            step += 1
            for i in range(1, n_partial):
                first_k = _first_key(i, n_live, n_partial, begin, full_begin, full_end, end,
                                     list_at, lists, TILE_K, LISTED)
                p, acc, m, total = _step(
                    q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, token, first_k, n_k,
                    rule, True, SINKS, D, TILE_K, STAGES, SCORES, OUT, P)
                step += 1
            for _ in range(gl.maximum(n_partial, 1), n_live):
                p, acc, m, total = _step(
                    q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, token, 0, n_k,
                    rule, False, SINKS, D, TILE_K, STAGES, SCORES, OUT, P)
                step += 1
            before = (step - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
            acc = warpgroup_mma_wait(0, deps=[
                warpgroup_mma(p, v_s.index(before).reshape([TILE_K, D]), acc, is_async=True)])
            mbarrier.arrive(v_free.index(before), count=1)
        mbarrier.arrive(q_free.index(WHO), count=1)

        some = total > 0
        lse = gl.where(some, LN_2 * (m + gl.log2(total)), -float("inf"))
        gl.store(lse_ptr + head.to(gl.int64) * n_q + row, lse, row < n_q)
        inverse = gl.where(some, 1.0 / total, 0.0)
        acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OUT)), 1)
        tma.store_wait(0)           # the last result has left its place in shared memory
        out_s.index(WHO).reshape([64, D]).store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out_desc, [head // n_heads, head % n_heads, first_q, 0], out_s.index(WHO))
        mbarrier.wait(next_full, done & 1)
        index = gl.max(next_s.load(ONE), 0)
        mbarrier.arrive(next_free, count=1)
        done += 1
    tma.store_wait(0)


# one compilation for every length and every width
@partial(jit, do_not_specialize=(
    "n_q", "n_k", "n_heads", "group", "n_tiles", "n_heads_all", "list_head", "n_walked",
    "low", "high", "n_sinks",
))
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, counter_ptr, blocks_ptr, n_full_ptr, n_live_ptr,
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, list_head, n_walked, low, high, n_sinks,
    scale_log2,
    TILE_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
    SINKS: gl.constexpr, REGISTERS: gl.constexpr,
):
    """One program: pieces of work, a (head, query tile) each; a warp for TMA, 64 rows a group."""
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, D], v_desc.layout)
    out_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    next_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    next_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for g in gl.static_range(2):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_free.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    mbarrier.init(next_full, count=1)
    mbarrier.init(next_free, count=2)
    next_s = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, out_desc)
    tiles = (q_s, k_s, v_s, out_s, next_s)
    bars = (q_full, q_free, k_full, k_free, v_full, v_free, next_full, next_free)
    sizes = (n_q, n_k, n_heads, group, n_tiles, n_heads_all, list_head, n_walked)
    lists = (blocks_ptr, n_full_ptr, n_live_ptr)
    rule = (low, high, n_sinks)
    gl.warp_specialize([
        (_consume, (descs, tiles, bars, sizes, lists, rule, lse_ptr, scale_log2,
                    0, TILE_K, D, STAGES, LISTED, SINKS)),
        (_consume, (descs, tiles, bars, sizes, lists, rule, lse_ptr, scale_log2,
                    1, TILE_K, D, STAGES, LISTED, SINKS)),
        (_produce, (descs, tiles, bars, sizes, lists, rule, counter_ptr,
                    TILE_K, STAGES, LISTED, SINKS)),
    ], [4, 1], [REGISTERS, 24])


def supports(q: Tensor, k: Tensor, v: Tensor, out: Tensor, walk) -> bool:
    """Whether `forward` takes them; kernels.py has the kernel for all else."""
    return (
        gpu_facts() is not None
        and torch.version.hip is None
        and gpu_facts().capability == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in PLANS
        and (not walk.listed or (walk.block_q, walk.block_k) == (128, PLANS[q.shape[3]].tile_k))
        and all(has_tma_strides(x) for x in (q, k, v, out))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    walk, lists: tuple[Tensor, Tensor, Tensor, int] | None, scale: float, plan: Plan | None = None,
) -> None:
    """Fill `out`, like q, and `lse` (batch, n_heads, n_q), natural and float32.

    walk: `block_list_kernels.Walk` of a window, with or without sinks. lists: its lists of key
    blocks, if it has any.
    """
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    plan = plan or PLANS[d_head]
    n_tiles = ceil_div(n_q, TILE_Q.value)
    n_work = n_tiles * batch * n_heads
    blocks, n_full, n_live, list_head = lists or (walk.terms, walk.terms, walk.terms, 0)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _forward_kernel[(min(n_work, gpu_facts().n_sms),)](
        descriptor_of(q, 64), descriptor_of(k, plan.tile_k), descriptor_of(v, plan.tile_k),
        descriptor_of(out, 64), lse, counter, blocks, n_full, n_live,
        n_q, n_k, n_heads, n_heads // n_kv_heads, n_tiles, batch * n_heads,
        list_head, ceil_div(n_k, walk.block_k), walk.low, walk.high, walk.n_sinks, scale * LOG2_E,
        **constants(plan, d_head, listed=walk.listed, sinks=walk.n_sinks > 0),
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def constants(plan: Plan, d_head: int, *, listed: bool, sinks: bool) -> dict:
    """What the kernel is compiled for."""
    return {
        "TILE_K": plan.tile_k, "D": d_head, "STAGES": plan.stages, "LISTED": listed,
        "SINKS": sinks, "REGISTERS": plan.registers,
    }  # fmt: skip
