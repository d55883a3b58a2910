"""Flash attention's forward pass for Hopper in Gluon, in the shape of FlashAttention-3.

One warp moves tiles with TMA, two or three warpgroups of 64 query rows compute. The scores of the
next key tile are multiplied while the softmax of this one runs, and the warpgroups take turns, so
that one's softmax hides behind another's products. `kernels.py` calls `forward` on sm_90.
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
L2_BYTES = 24 << 20                 # keys and values that causal tiles of several heads may share


@dataclass(frozen=True)
class Plan:
    """What a kernel is built of; the lesson's ladder switches the last four on one by one."""

    tile_k: int
    stages: int                     # key and value tiles in flight
    groups: int                     # warpgroups that compute, 64 query rows each
    registers: int                  # a thread of theirs
    overlap: bool = True            # products of the next tile behind the softmax of this one
    turns: bool = True              # the warpgroups take turns at the tensor cores
    persistent: bool = True         # one program a multiprocessor, walking over the work


# the fastest of those measured on an H100, d_head 64 and 128
PLANS = {
    64: Plan(tile_k=128, stages=3, groups=3, registers=160, persistent=False),
    128: Plan(tile_k=128, stages=2, groups=2, registers=240, turns=False),
}
MAX_REGISTERS = {2: 168, 3: 128}    # a thread at the launch; the groups then trade among them


@jit
def _work(index, n_q, n_k, n_tiles, n_heads_all, section, CAUSAL: gl.constexpr,
          TILE_Q: gl.constexpr, TILE_K: gl.constexpr):
    """(first query, head of all batches, key tiles) of one piece of work, heavy pieces first.

    The heads go in sections whose keys and values fit in the L2; in a section the last query tile
    of every head comes first.
    """
    first_head = index // (section * n_tiles) * section
    rest = index % (section * n_tiles)
    width = gl.minimum(section, n_heads_all - first_head)
    first_q = (n_tiles - 1 - rest // width) * TILE_Q
    end = n_k
    if CAUSAL:
        end = gl.minimum(n_k, first_q + TILE_Q + n_k - n_q)
    return first_q, first_head + rest % width, gl.maximum(gl.cdiv(end, TILE_K), 1)


@jit
def _produce(descs, tiles, bars, sizes, counter_ptr, CAUSAL: gl.constexpr, GROUPS: gl.constexpr,
             PERSISTENT: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr):
    """One warp: queries, keys and values into shared memory as soon as their place is free."""
    q_desc, k_desc, v_desc, out_desc = descs
    q_s, k_s, v_s, out_s, next_s = tiles
    q_full, q_free, k_full, k_free, v_full, v_free, turn, next_full, next_free = bars
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, section = sizes
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_work = n_tiles * n_heads_all
    done = 0
    step = 0
    index = gl.program_id(0)
    while index < n_work:
        if PERSISTENT:
            following = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        else:
            following = n_work
        first_q, head, n_key_tiles = _work(
            index, n_q, n_k, n_tiles, n_heads_all, section, CAUSAL, GROUPS * 64, TILE_K)
        seq = head // n_heads
        head = head % n_heads
        kv_head = head // group
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(g), (done & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [seq, head, first_q + g * 64, 0], q_full.index(g), q_s.index(g))
        for i in range(n_key_tiles):
            first_k = (n_key_tiles - 1 - i) * TILE_K
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
        if PERSISTENT:
            mbarrier.wait(next_free, (done & 1) ^ 1)
            next_s.store(gl.full([1], following, gl.int32, ONE))
            mbarrier.arrive(next_full, count=1)
        index = following
        done += 1


@jit
def _row_parts(p, TILE_K: gl.constexpr):
    """(64, 4): the sums of what each of the four threads that share a row holds of it.

    They meet once, after the last key tile: no exchange between threads for the total in the loop.
    """
    return gl.sum(gl.sum(p.reshape([64, TILE_K // 8, 4, 2]), 3), 1)


@jit
def _absorb(scores, m, total, scale_log2, row, first_k, n_q, n_k, CAUSAL: gl.constexpr,
            MASKED: gl.constexpr, TILE_K: gl.constexpr, SCORES: gl.constexpr):
    """Online softmax: one tile of scores into the running maximum and total (64, 4)."""
    if MASKED:
        key = first_k + gl.arange(0, TILE_K, gl.SliceLayout(0, SCORES))
        ok = gl.expand_dims(key < n_k, 0)
        if CAUSAL:
            ok = ok & (gl.expand_dims(key, 0) <= gl.expand_dims(row, 1) + (n_k - n_q))
        scores = gl.where(ok, scores, -float("inf"))
    m_new = gl.maximum(m, gl.max(scores, 1) * scale_log2)
    base = m_new
    if MASKED:
        base = gl.where(m_new == -float("inf"), 0.0, m_new)     # a row that sees no key yet
    p = gl.exp2(scores * scale_log2 - gl.expand_dims(base, 1))
    shrink = gl.exp2(m - base)
    parts = _row_parts(p, TILE_K)
    shrink_parts = gl.convert_layout(shrink, gl.SliceLayout(1, parts.type.layout))
    total = gl.expand_dims(shrink_parts, 1) * total + parts
    return p, shrink, m_new, total


@jit
def _wait_for_turn(turn, step, WHO: gl.constexpr):
    """The groups multiply in a ring: 0 begins, each hands on to the next after every step."""
    if WHO == 0:
        mbarrier.wait(turn.index(0), (step & 1) ^ 1)
    else:
        mbarrier.wait(turn.index(WHO), step & 1)


@jit
def _step(q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, row, first_k, n_q, n_k,
          WHO: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
          D: gl.constexpr, OVERLAP: gl.constexpr, TURNS: gl.constexpr, TILE_K: gl.constexpr,
          STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr, P: gl.constexpr):
    """Scores of this key tile, and the weighted sum of the tile before it."""
    q_full, q_free, k_full, k_free, v_full, v_free, turn, next_full, next_free = bars
    dtype: gl.constexpr = q.dtype
    stage = step % STAGES
    before = (step - 1) % STAGES
    zeros = gl.zeros([64, TILE_K], gl.float32, SCORES)
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    if not OVERLAP:
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        acc = warpgroup_mma_wait(
            0, deps=[warpgroup_mma(p, v_s.index(before).reshape([TILE_K, D]), acc, is_async=True)])
        mbarrier.arrive(v_free.index(before), count=1)
    if TURNS:
        _wait_for_turn(turn, step, WHO)
    k = k_s.index(stage).reshape([TILE_K, D])
    pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if OVERLAP:
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        pending_out = warpgroup_mma(p, v_s.index(before).reshape([TILE_K, D]), acc, is_async=True)
        if TURNS:
            mbarrier.arrive(turn.index((WHO + 1) % GROUPS), count=1)
        scores = warpgroup_mma_wait(1, deps=[pending])
    else:
        scores = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(k_free.index(stage), count=1)
    p_new, shrink, m, total = _absorb(
        scores, m, total, scale_log2, row, first_k, n_q, n_k, CAUSAL, MASKED, TILE_K, SCORES)
    if OVERLAP:
        acc = warpgroup_mma_wait(0, deps=[pending_out])
        mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return gl.convert_layout(p_new.to(dtype), P), acc, m, total


@jit
def _consume(descs, tiles, bars, sizes, lse_ptr, scale_log2,
             WHO: gl.constexpr, CAUSAL: gl.constexpr, GROUPS: gl.constexpr, OVERLAP: gl.constexpr,
             TURNS: gl.constexpr, PERSISTENT: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr):
    """One warpgroup: 64 query rows against every key tile, from the last one back."""
    q_desc, k_desc, v_desc, out_desc = descs
    q_s, k_s, v_s, out_s, next_s = tiles
    q_full, q_free, k_full, k_free, v_full, v_free, turn, next_full, next_free = bars
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, section = sizes
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
        first_q, head, n_key_tiles = _work(
            index, n_q, n_k, n_tiles, n_heads_all, section, CAUSAL, GROUPS * 64, TILE_K)
        first_q += WHO * 64
        row = first_q + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        m = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, D], gl.float32, OUT)
        zeros = gl.zeros([64, TILE_K], gl.float32, SCORES)
        total = _row_parts(zeros, TILE_K)
        # the key tiles [n_whole, n_key_tiles) reach past a row's last key
        reach = n_k
        if CAUSAL:
            reach = gl.minimum(n_k, first_q + 1 + n_k - n_q)
        n_whole = gl.minimum(gl.maximum(reach, 0) // TILE_K, n_key_tiles - 1)

        mbarrier.wait(q_full.index(WHO), done & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        if TURNS:
            _wait_for_turn(turn, step, WHO)
        k = k_s.index(stage).reshape([TILE_K, D])
        pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        if TURNS:
            mbarrier.arrive(turn.index((WHO + 1) % GROUPS), count=1)
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(k_free.index(stage), count=1)
        p_new, shrink, m, total = _absorb(
            scores, m, total, scale_log2, row, (n_key_tiles - 1) * TILE_K, n_q, n_k,
            CAUSAL, True, TILE_K, SCORES)
        p = gl.convert_layout(p_new.to(dtype), P)
        step += 1
        for i in range(n_key_tiles - 1 - n_whole):
            first_k = (n_key_tiles - 2 - i) * TILE_K
            p, acc, m, total = _step(
                q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, row, first_k, n_q, n_k,
                WHO, GROUPS, CAUSAL, True, D, OVERLAP, TURNS, TILE_K, STAGES, SCORES, OUT, P)
            step += 1
        for _ in range(n_whole):
            p, acc, m, total = _step(
                q, k_s, v_s, bars, p, acc, m, total, step, scale_log2, row, 0, n_q, n_k,
                WHO, GROUPS, CAUSAL, False, D, OVERLAP, TURNS, TILE_K, STAGES, SCORES, OUT, P)
            step += 1
        mbarrier.arrive(q_free.index(WHO), count=1)
        before = (step - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        acc = warpgroup_mma_wait(
            0, deps=[warpgroup_mma(p, v_s.index(before).reshape([TILE_K, D]), acc, is_async=True)])
        mbarrier.arrive(v_free.index(before), count=1)

        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES))
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
        if PERSISTENT:
            mbarrier.wait(next_full, done & 1)
            index = gl.max(next_s.load(ONE), 0)
            mbarrier.arrive(next_free, count=1)
        else:
            index = n_work
        done += 1
    tma.store_wait(0)


# one compilation for every length
@partial(jit, do_not_specialize=(
    "n_q", "n_k", "n_heads", "group", "n_tiles", "n_heads_all", "section",
))
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, counter_ptr,
    n_q, n_k, n_heads, group, n_tiles, n_heads_all, section, scale_log2,
    CAUSAL: gl.constexpr, GROUPS: gl.constexpr, OVERLAP: gl.constexpr, TURNS: gl.constexpr,
    PERSISTENT: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SPARE: gl.constexpr,
):
    """One program: pieces of work, a (head, query tile) each; a warp for TMA, 64 rows a group."""
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, D], v_desc.layout)
    out_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, D], out_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_free.index(g), count=1)
        mbarrier.init(turn.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    next_s = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    next_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    next_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    mbarrier.init(next_full, count=1)
    mbarrier.init(next_free, count=GROUPS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, out_desc)
    tiles = (q_s, k_s, v_s, out_s, next_s)
    bars = (q_full, q_free, k_full, k_free, v_full, v_free, turn, next_full, next_free)
    sizes = (n_q, n_k, n_heads, group, n_tiles, n_heads_all, section)
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (descs, tiles, bars, sizes, lse_ptr, scale_log2,
                        0, CAUSAL, GROUPS, OVERLAP, TURNS, PERSISTENT, TILE_K, D, STAGES)),
            (_consume, (descs, tiles, bars, sizes, lse_ptr, scale_log2,
                        1, CAUSAL, GROUPS, OVERLAP, TURNS, PERSISTENT, TILE_K, D, STAGES)),
            (_produce, (descs, tiles, bars, sizes, counter_ptr,
                        CAUSAL, GROUPS, PERSISTENT, TILE_K, STAGES)),
        ], [4, 1], [REGISTERS, SPARE])
    else:
        gl.warp_specialize([
            (_consume, (descs, tiles, bars, sizes, lse_ptr, scale_log2,
                        0, CAUSAL, GROUPS, OVERLAP, TURNS, PERSISTENT, TILE_K, D, STAGES)),
            (_consume, (descs, tiles, bars, sizes, lse_ptr, scale_log2,
                        1, CAUSAL, GROUPS, OVERLAP, TURNS, PERSISTENT, TILE_K, D, STAGES)),
            (_consume, (descs, tiles, bars, sizes, lse_ptr, scale_log2,
                        2, CAUSAL, GROUPS, OVERLAP, TURNS, PERSISTENT, TILE_K, D, STAGES)),
            (_produce, (descs, tiles, bars, sizes, counter_ptr,
                        CAUSAL, GROUPS, PERSISTENT, TILE_K, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, SPARE])


def supports(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether `forward` takes them; kernels.py has the kernel for all else."""
    return (
        gpu_facts() is not None
        and torch.version.hip is None
        and gpu_facts().capability == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in PLANS
        and all(x.numel() > 0 and has_tma_strides(x) for x in (q, k, v, out))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    causal: bool, scale: float, plan: Plan | None = None,
) -> None:
    """Fill `out`, like q, and `lse` (batch, n_heads, n_q), natural and float32."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    plan = plan or PLANS[d_head]
    n_tiles = ceil_div(n_q, 64 * plan.groups)
    n_heads_all = batch * n_heads
    n_work = n_tiles * n_heads_all
    section = max(1, min(n_heads_all, L2_BYTES // (4 * n_k * d_head))) if causal else 1
    counter = torch.zeros(1, dtype=torch.int32, device=q.device) if plan.persistent else lse
    _forward_kernel[(min(n_work, gpu_facts().n_sms) if plan.persistent else n_work,)](
        descriptor_of(q, 64), descriptor_of(k, plan.tile_k), descriptor_of(v, plan.tile_k),
        descriptor_of(out, 64), lse, counter, n_q, n_k, n_heads, n_heads // n_kv_heads, n_tiles,
        n_heads_all, section, scale * LOG2_E, **constants(plan, d_head, causal),
        num_warps=4, maxnreg=MAX_REGISTERS[plan.groups],
    )  # fmt: skip


def constants(plan: Plan, d_head: int, causal: bool) -> dict:
    """What the kernel is compiled for."""
    return {
        "CAUSAL": causal, "GROUPS": plan.groups, "OVERLAP": plan.overlap,
        "TURNS": plan.overlap and plan.turns, "PERSISTENT": plan.persistent,
        "TILE_K": plan.tile_k, "D": d_head, "STAGES": plan.stages,
        "REGISTERS": plan.registers, "SPARE": 24 if plan.groups == 2 else 32,
    }  # fmt: skip
