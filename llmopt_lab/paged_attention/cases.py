"""Inputs shared by tests, benchmarks and the notebook, and the benchmark with its peers."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Case, Contender
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.paged_attention.records import CacheConfig
from llmopt_lab.paged_attention.scheduler import Request, Scheduler

NOWHERE = 1 << 30  # a block number far outside any pool
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def decode_inputs(
    lengths: list[int],
    *,
    n_heads: int,
    n_kv_heads: int,
    d_head: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    peak: float = 2.0,
    poison: bool = True,
) -> Inputs:
    """q, k_cache, v_cache, block_tables, lengths of a decode step, with scattered blocks.

    Blocks are handed out in random order. With `poison`, everything a correct kernel never reads
    is hostile: slots past a sequence's end and blocks of nobody hold NaN, and table entries past
    the last block name a block far outside the pool. `peak` scales the queries: at 2 a few keys
    dominate, so that a result built from wrong keys is far off.
    """
    rng = torch.Generator(device).manual_seed(seed)
    batch = len(lengths)
    counts = [ceil_div(n, block_size) for n in lengths]
    n_blocks = sum(counts) + 2
    shape = (n_blocks, block_size, n_kv_heads, d_head)
    k, v = (torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(2))
    q = peak * torch.randn(batch, n_heads, d_head, generator=rng, device=device, dtype=dtype)
    order = torch.randperm(n_blocks, generator=rng, device=device)
    tables = torch.full((batch, max(counts, default=0) + 1), NOWHERE, dtype=torch.int32)
    tables = tables.to(device)
    first = 0
    for seq, count in enumerate(counts):
        tables[seq, :count] = order[first : first + count]
        first += count
    if poison:
        for cache in (k, v):
            cache[order[first:]] = torch.nan
            for seq, n in enumerate(lengths):
                if n % block_size:
                    cache[tables[seq, counts[seq] - 1], n % block_size :] = torch.nan
    return q, k, v, tables, torch.tensor(lengths, dtype=torch.int32, device=device)


def decode_oracle(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """What a decode step must give, in float64: torch's attention over each gathered sequence."""
    n_groups = q.shape[1] // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for seq, n in enumerate(lengths.tolist()):
        if n:
            blocks = tables[seq, : ceil_div(n, k.shape[1])].long()
            keys, values = (
                cache[blocks].flatten(0, 1)[:n].transpose(0, 1).repeat_interleave(n_groups, 0)
                for cache in (k, v)
            )  # (n_heads, n, d_head)
            out[seq] = scaled_dot_product_attention(
                q[seq, :, None].double(), keys.double(), values.double()
            )[:, 0]
    return out


def strip_example(reference) -> tuple[Tensor, Tensor]:
    """A run that reaches every `record(...)` of the room: what attention gave, what is cached.

    Three requests share a prefix in a pool too small for them, one of them forks; so there are
    hits, copies on write, refusals, preemptions, resumptions and evictions.
    """
    rng = torch.Generator().manual_seed(0)
    cache = reference.PagedCache(
        CacheConfig(n_layers=2, n_blocks=7, block_size=2, n_kv_heads=2, d_head=4)
    )
    scheduler = Scheduler(cache, max_step_tokens=8)
    prompts = {"A": [1, 2, 3, 4, 5], "B": [1, 2, 3, 4, 6, 7], "C": [8, 9, 10]}
    scheduler.submit(Request(name, prompt, n_new=5) for name, prompt in prompts.items())
    outs = []
    while scheduler.has_work:
        for work in scheduler.step():
            for layer in range(2):
                shape = (len(work.slots), 2, 4)
                keys, values = (torch.randn(shape, generator=rng) for _ in range(2))
                cache.write(layer, work.slots, keys, values)
            tables, lengths = cache.table_tensor([work.request.name])
            q = torch.randn(4, 4, generator=rng)
            outs.append(
                reference.paged_attention(
                    q, cache.keys[1], cache.values[1], tables[0], int(lengths[0])
                )
            )
            if work.request.name == "A" and not work.request.generated:
                scheduler.advance(scheduler.fork(work.request, "A#1"), 11)
            scheduler.advance(work.request, 12 + len(outs))
    return torch.stack(outs), cache.keys


def gather(cache: Tensor, tables: Tensor, n: int) -> Tensor:
    """The first n tokens of every sequence, copied out of the pool: (batch, n_kv_heads, n, d)."""
    blocks = tables[:, : ceil_div(n, cache.shape[1])].long()
    return cache[blocks].flatten(1, 2)[:, :n].transpose(1, 2).contiguous()


def _layer_inputs(device, lengths: list[int], block_size: int = 16) -> Inputs:
    """One layer of a Llama-3-8B-like model: 32 query heads, 8 KV heads, d_head 128."""
    on_gpu = torch.device(device).type == "cuda"
    return decode_inputs(
        lengths, n_heads=32, n_kv_heads=8, d_head=128, block_size=block_size,
        dtype=torch.bfloat16 if on_gpu else torch.float32, device=device, poison=False,
    )  # fmt: skip


def _layer_flops(lengths: list[int]) -> int:
    return 4 * 32 * 128 * sum(lengths)


def _layer_bytes(lengths: list[int]) -> int:
    """Keys, values, queries and results in bf16."""
    return 2 * (2 * 8 * 128 * sum(lengths) + 2 * 32 * 128 * len(lengths))


def _equal(*, batch: int, n_tokens: int) -> list[int]:
    return [n_tokens] * batch


def _uniform(*, batch: int, longest: int) -> list[int]:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(1, longest + 1, (batch,), generator=rng).tolist()


def _one_long(*, longest: int, others: int, n_others: int) -> list[int]:
    return [longest] + [others] * n_others


def _trimmed(tables: Tensor) -> Tensor:
    """As wide as the longest sequence needs, padded with block 0, as a server would."""
    return tables[:, :-1].masked_fill(tables[:, :-1] == NOWHERE, 0).contiguous()


def _ours(q, k, v, tables, lengths):
    from llmopt_lab.paged_attention.kernels import paged_attention_decode

    tables = _trimmed(tables)
    return lambda: paged_attention_decode(q, k, v, tables, lengths)


def _flash_attention_3(q, k, v, tables, lengths):
    from flash_attn_interface import flash_attn_with_kvcache

    tables, q4 = _trimmed(tables), q[:, None]
    return lambda: flash_attn_with_kvcache(
        q4, k, v, cache_seqlens=lengths, page_table=tables
    ).squeeze(1)


def _flashinfer(q, k, v, tables, lengths):
    import flashinfer

    counts = ((lengths + k.shape[1] - 1) // k.shape[1]).tolist()
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.tensor([0, *counts], device=q.device).cumsum(0).int(),
        torch.cat([row[:n] for row, n in zip(tables, counts, strict=True)]),
        ((lengths - 1) % k.shape[1] + 1).int(),
        q.shape[1], k.shape[2], q.shape[2], k.shape[1],
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v))


def _sdpa_contiguous(q, k, v, tables, lengths):
    keys, values = (gather(cache, tables, int(lengths[0])) for cache in (k, v))
    q4 = q[:, :, None]
    return lambda: scaled_dot_product_attention(q4, keys, values, enable_gqa=True)[:, :, 0]


def _gather_then_sdpa(q, k, v, tables, lengths):
    n, q4 = int(lengths[0]), q[:, :, None]
    return lambda: scaled_dot_product_attention(
        q4, gather(k, tables, n), gather(v, tables, n), enable_gqa=True
    )[:, :, 0]


PAGED = (
    Contender("ours (Triton)", _ours, ours=True),
    Contender("FlashAttention-3 paged", _flash_attention_3),
    Contender("FlashInfer paged", _flashinfer),
)
CONTIGUOUS = (
    Contender("SDPA, contiguous", _sdpa_contiguous),
    Contender("gather, then SDPA", _gather_then_sdpa),
)


def _case(title: str, lengths_of, sizes: list[dict], cpu_size: dict, contenders) -> Case:
    """A decode step of one layer over sequences of `lengths_of(**size)` tokens, blocks of 16."""
    return Case(
        title=title,
        sizes=tuple(sizes),
        cpu_sizes=(cpu_size,),
        inputs=lambda device, **size: _layer_inputs(device, lengths_of(**size)),
        oracle=decode_oracle,
        contenders=contenders,
        flops=lambda **size: _layer_flops(lengths_of(**size)),
        min_bytes=lambda **size: _layer_bytes(lengths_of(**size)),
    )


# Llama-3-8B's layer: 32 query heads, 8 KV heads, d_head 128, bf16, blocks of 16
CASES = (
    _case(
        "decode, all sequences of one length",
        _equal,
        [
            {"batch": b, "n_tokens": n}
            for b in (1, 4, 16, 32, 64, 128)
            for n in ((4096, 32768) if b == 1 else (2048, 4096))
        ],
        {"batch": 2, "n_tokens": 40},
        PAGED + CONTIGUOUS,
    ),
    _case(
        "decode, lengths uniform from 1 to the longest",
        _uniform,
        [{"batch": b, "longest": n} for b, n in ((16, 2048), (16, 4096), (64, 4096), (64, 16384))],
        {"batch": 3, "longest": 40},
        PAGED,
    ),
    _case(
        "decode, one long sequence among short ones",
        _one_long,
        [{"longest": 32768, "others": 1024, "n_others": 31}],
        {"longest": 100, "others": 10, "n_others": 2},
        PAGED,
    ),
)
