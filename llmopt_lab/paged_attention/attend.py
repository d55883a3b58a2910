"""The Transformer's attention over a paged cache, and a server that runs requests through it.

    cache = PagedCache(cache_config(model.config, n_blocks=64, block_size=16))
    texts = serve(model, cache, [Request("A", prompt, n_new=32)])

On a GPU a decode step runs the Triton kernels; on a CPU a batched eager path gathers the blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import causal_mask, sample
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.paged_attention.records import CacheConfig
from llmopt_lab.paged_attention.reference import PagedCache
from llmopt_lab.paged_attention.scheduler import Request, Scheduler, Work


def cache_config(
    config: ModelConfig, *, n_blocks: int, block_size: int, dtype: torch.dtype = torch.float32
) -> CacheConfig:
    """Sizes of a paged cache for that model."""
    return CacheConfig(
        config.n_layers, n_blocks, block_size, config.n_kv_heads, config.d_head, dtype
    )


class PagedAttend:
    """The `attend` of one forward pass: write the new tokens into their slots, read the tables.

    Either one sequence with any number of new tokens (prefill) or several with one each (decode).
    The slots must come from `PagedCache.extend` or `admit`, so the lengths count the new tokens.
    """

    def __init__(self, cache: PagedCache, seqs: list[str], slots: Tensor):
        require(
            len(seqs) == 1 or len(slots) == len(seqs),
            f"one sequence may bring several tokens, several bring one each; got {len(seqs)} "
            f"sequences and {len(slots)} slots",
        )
        self.cache = cache
        self.slots = slots  # (n_tokens,)
        self.tables, self.lengths = cache.table_tensor(seqs)  # (batch, ..), (batch,)
        self.longest = max(cache.lengths[seq] for seq in seqs)  # known here without asking a GPU
        self.decode = _decode_with_kernel if _kernel_fits(cache) else _decode_eagerly

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """q (batch, n_heads, n, d_head), k and v (batch, n_kv_heads, n, d_head): out like q."""
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (n_tokens, ..)
        self._write(layer, keys, values)
        if q.shape[2] == 1:
            return self.decode(self, q, layer, scale)
        return self._prefill(q, layer, scale)

    def _write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if keys.is_cuda:
            from llmopt_lab.paged_attention.kernels import write_kv

            write_kv(keys, values, self.cache.keys[layer], self.cache.values[layer], self.slots)
        else:
            self.cache.write(layer, self.slots, keys, values)

    def _prefill(self, q: Tensor, layer: int, scale: float) -> Tensor:
        """The new tokens of one sequence against all its tokens, reused prefix included."""
        k, v = self._gather(layer)  # (1, n_kv_heads, length, d)
        n_q, n_k = q.shape[2], k.shape[2]
        mask = None if n_q == n_k else causal_mask(n_q, n_k, q.device)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    def _gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every sequence, copied out of the pool and padded to the longest."""
        return tuple(
            pool[layer][self.tables].flatten(1, 2)[:, : self.longest].transpose(1, 2)
            for pool in (self.cache.keys, self.cache.values)
        )  # (batch, n_kv_heads, longest, d_head) each


def _decode_eagerly(attend: PagedAttend, q: Tensor, layer: int, scale: float) -> Tensor:
    k, v = attend._gather(layer)
    written = torch.arange(k.shape[2], device=q.device) < attend.lengths[:, None]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=written[:, None, None], scale=scale, enable_gqa=True
    )


def _decode_with_kernel(attend: PagedAttend, q: Tensor, layer: int, scale: float) -> Tensor:
    from llmopt_lab.paged_attention.kernels import paged_attention_decode

    keys, values = attend.cache.keys[layer], attend.cache.values[layer]
    out = paged_attention_decode(
        q[:, :, 0], keys, values, attend.tables, attend.lengths, scale=scale
    )
    return out[:, :, None]


def _kernel_fits(cache: PagedCache) -> bool:
    c = cache.config
    return cache.keys.is_cuda and c.d_head in (64, 128) and c.block_size <= 256


@torch.no_grad()
def serve(
    model: Transformer,
    cache: PagedCache,
    requests: list[Request],
    *,
    max_running: int = 256,
    max_step_tokens: int = 2048,
    salt: str = "",
    on_step: Callable[[Scheduler], object] | None = None,
) -> dict[str, list[int]]:
    """Run requests to completion with continuous batching: name -> generated tokens.

    Samples of one request are called name, name#1, name#2, ... `on_step` is called after each
    pass of the model, with the scheduler as it then is.

    Raises:
        BadInput: see `Scheduler.submit`. Nothing ran.

    Cost: one forward pass of a prompt's uncached tokens per request (and again per preemption),
    one batched pass a step for all that decode.
    """
    scheduler = Scheduler(
        cache, max_running=max_running, max_step_tokens=max_step_tokens, salt=salt
    )
    scheduler.submit(requests)
    sampler = _Sampler()
    texts: dict[str, list[int]] = {}
    while scheduler.has_work:
        for work, logits in _forward(model, cache, scheduler.step()):
            for request in scheduler.family(work.request):
                texts[request.name] = request.generated
                scheduler.advance(request, sampler.draw(request, logits))
        if on_step is not None:
            on_step(scheduler)
    return texts


def _forward(model: Transformer, cache: PagedCache, works: list[Work]):
    """Logits (n_vocab,) after the last token of each work: decodes batched, prefills one by one."""
    decodes = [w for w in works if len(w.slots) == 1]
    batches = [[w] for w in works if len(w.slots) > 1] + ([decodes] if decodes else [])
    for batch in batches:
        names = [w.request.name for w in batch]
        slots = torch.cat([w.slots for w in batch])
        tokens = torch.tensor([w.tokens for w in batch], device=model.device)  # (batch, n)
        ends = torch.tensor([cache.lengths[name] for name in names], device=model.device)
        n = tokens.shape[1]
        positions = ends[:, None] - n + torch.arange(n, device=model.device)  # (batch, n)
        attend = PagedAttend(cache, names, slots)
        logits = model(tokens, positions, attend=attend, last_only=True)[:, -1]
        yield from zip(batch, logits, strict=True)


class _Sampler:
    """One generator a sample, so that batching and preemption do not change its draws."""

    def __init__(self) -> None:
        self.generators: dict[str, torch.Generator] = {}

    def draw(self, request: Request, logits: Tensor) -> int:
        if request.name not in self.generators:
            _, _, index = request.name.rpartition("#")
            index = int(index) if "#" in request.name else 0
            rng = torch.Generator().manual_seed(request.seed + index)
            self.generators[request.name] = rng
        rng = self.generators[request.name]
        return int(sample(logits, temperature=request.temperature, rng=rng))
