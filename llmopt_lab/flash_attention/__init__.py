"""Flash attention: exact attention that never writes the score matrix to slow memory.

Sources
    Dao et al. 2022, FlashAttention, https://arxiv.org/abs/2205.14135 (Algorithms 0, 1)
    Dao 2023, FlashAttention-2, https://arxiv.org/abs/2307.08691 (Algorithms 1, 2; followed here)
    Milakov and Gimelshein 2018, online softmax, https://arxiv.org/abs/1805.02867
    Dao et al. 2023, Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html

Symbols
    paper       here                shape               meaning
    N           n_q, n_k                                queries, keys; equal when nothing is cached
    d           d_head, d_v                             width of queries and keys, of values
    M           budget                                  bytes that fit on chip (SRAM)
    B_r, B_c    tile_q, tile_k                          queries, keys of one tile
    Q_i         q_i                 (tile_q, d_head)    one tile of queries
    K_j, V_j    k_j, v_j            (tile_k, d)         one tile of keys, of values
    S, S_ij     scores              (tile_q, tile_k)    scaled dot products
    P, P_ij     p                   (tile_q, tile_k)    their exponentials
    m_i         state.m             (tile_q,)           largest score so far
    l_i         state.total         (tile_q,)           sum of exp(score - m) so far
    O_i         state.acc, out      (tile_q, d_v)       weighted sum; divided by total at the end
    L_i         lse                 (tile_q,)           m + log(total), kept for the backward
    D_i         delta               (tile_q,)           rowsum(dO * O), of the backward
    e^(m-m')    shrink              (tile_q,)           rescales what was summed under an old m
"""

from llmopt_lab.flash_attention.records import Partial, SoftmaxState
from llmopt_lab.flash_attention.reference import absorb, flash_attention, naive_attention
from llmopt_lab.flash_attention.split_kv import merge, split_kv_attention
from llmopt_lab.flash_attention.varlen import flash_attention_varlen

__all__ = [
    "Partial", "SoftmaxState", "absorb", "flash_attention", "flash_attention_varlen", "merge",
    "naive_attention", "split_kv_attention",
]  # fmt: skip
