"""Sparse attention: each query reads a few keys, and blocks that no query needs are never loaded.

Sources
    Child et al. 2019, Sparse Transformer, https://arxiv.org/abs/1904.10509
    Beltagy et al. 2020, Longformer, https://arxiv.org/abs/2004.05150
    Zaheer et al. 2020, BigBird, https://arxiv.org/abs/2007.14062
    Dao et al. 2022, FlashAttention, https://arxiv.org/abs/2205.14135 (section 3.3, Algorithm 5)
    Xiao et al. 2023, StreamingLLM, https://arxiv.org/abs/2309.17453
    Tang et al. 2024, Quest, https://arxiv.org/abs/2406.10774
    Yuan et al. 2025, Native Sparse Attention (NSA), https://arxiv.org/abs/2502.11089
    Lu et al. 2025, MoBA, https://arxiv.org/abs/2502.13189

Files beside reference.py
    patterns.py     rules            block_lists.py  covers           select.py     chosen blocks
    nsa.py          three branches   attend.py       in the model     recall.py     what is lost
    io_model.py     bytes and FLOPs  measure.py      on a CPU         rolling_cache.py  endless text

Symbols
    paper           here                shape           meaning
    N               n_q, n_k                            queries, keys; equal when nothing is cached
    w               width                               keys of a window
    l (Sparse Tr.)  stride                              distance between strided keys
    g               GlobalTokens                        tokens that see all and are seen by all
    S_i, A_i        pattern.allowed     (r, c)          which keys query i sees
    M (block mask)  lists               (row_blocks, ..)  live blocks of each block of queries
    B_r, B_c        tile_q, tile_k                      queries, keys of one block
    m_i, l_i        m, total            (tile_q,)       running maximum and sum of the softmax
"""

from llmopt_lab.sparse_attention.block_lists import cover
from llmopt_lab.sparse_attention.patterns import (
    Causal,
    GlobalTokens,
    Sinks,
    SlidingWindow,
    streaming,
)
from llmopt_lab.sparse_attention.reference import sparse_attention

__all__ = [
    "Causal", "GlobalTokens", "Sinks", "SlidingWindow", "cover", "sparse_attention", "streaming",
]  # fmt: skip
