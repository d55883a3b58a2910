"""Paged attention: a KV cache cut into fixed blocks, so that memory is given out as it is needed.

Sources
    Kwon et al. 2023, PagedAttention (vLLM), https://arxiv.org/abs/2309.06180 (section 4)
    Dao et al. 2023, Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
    Yu et al. 2022, Orca (continuous batching), https://www.usenix.org/conference/osdi22/presentation/yu

Symbols
    paper                     here                  meaning
    KV block size, B          block_size            tokens a block
    logical KV block          logical               position of a block within one sequence
    physical KV block         block                 position of a block within the pool
    block table               cache.tables[seq]     tables[seq][logical] == block
    reference count           pool.owners[block]    block tables that hold the block
    slot (vLLM)               slot                  block * block_size + offset in the block
"""

from llmopt_lab.paged_attention.prefix import admit, publish
from llmopt_lab.paged_attention.records import CacheConfig
from llmopt_lab.paged_attention.reference import BlockPool, PagedCache, paged_attention
from llmopt_lab.paged_attention.scheduler import Request, Scheduler

__all__ = [
    "BlockPool", "CacheConfig", "PagedCache", "Request", "Scheduler",
    "admit", "paged_attention", "publish",
]  # fmt: skip
