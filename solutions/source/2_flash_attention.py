# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises 2: Flash attention
# {{colab_badge}}
#
# You build exact attention that never writes the matrix of scores: the running softmax, the tiles,
# the mask, the merge, the backward pass, and at the end the kernel. In between you count bytes, and
# you write the tests that a guide's version should have had. Where that guide has code or a claim for
# the same thing, the exercise shows it: it runs, looks right and is not.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. Absorb a tile | 3 | 15 |
# | 2. Attention in tiles | 3 | 20 |
# | 3. Merge two parts | 2 | 10 |
# | 4. Works in training, blind in decoding | 2 | 8 |
# | 5. How many tiles? | 2 | 12 |
# | 6. How many bytes? | 2 | 12 |
# | 7. Green tests, wrong kernel | 3 | 15 |
# | 8. Two wrongs agree | 3 | 15 |
# | 9. The memory saver that doubles memory | 3 | 20 |
# | 10. Can it cheat? | 2 | 12 |
# | 11. The forward kernel in Triton | 5 | 40 |
# | together | 30 | 179 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("flash_attention.absorb", 1)` gives the first hint, `2` the
# second, stronger one. Hints cost no points.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.memory import load, store, tiles
from llmopt_lab.flash_attention import Partial, SoftmaxState, reference
from llmopt_lab.flash_attention.cases import guides_flash_attention
from llmopt_lab.flash_attention.io_model import Sizes, flash_traffic, naive_traffic, saved_nbytes
from llmopt_lab.grading import hint
from llmopt_lab.widgets.predict import Predict


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


# %% [markdown]
# ## 1. Absorb a tile (3 points, 15 minutes)
#
# The output of a query is a weighted mean of the values, and the weights are `exp(score) / total`.
# You may add up numerator and denominator key by key, in any order, and divide at the end. Only one
# thing stands in the way: `exp(100)` does not fit in a float32. So everything is summed relative to
# the largest score so far, `m`:
#
# ```text
# m      largest score so far
# total  sum of exp(score - m)
# acc    sum of exp(score - m) * value
# ```
#
# By hand, with one key a tile. The scores are 1 and 3, the values 10 and 20.
#
# ```text
#                  m    total              acc
# nothing yet     -inf  0                  0
# after key 0      1    1                  10
# after key 1      3    1 * 0.135 + 1      10 * 0.135 + 20       0.135 = exp(1 - 3)
# ```
#
# `acc / total` is 18.81, the softmax of 1 and 3 over 10 and 20. What if the largest score comes
# first? Then nothing needs rescaling, and a wrong version is right. Keep that in mind for exercise 7.
#
# Write the step for a tile: several queries (rows), each with its own `m`, and several keys. A score
# of `-inf` is a key that this query may not see. It may happen that a query has seen no key at all
# yet: then its `m` is `-inf`, its `total` and `acc` are 0, and nothing may become NaN.

# %% nbgrader={"grade_id": "flash_attention.absorb", "solution": true}
def absorb(state: SoftmaxState, scores: Tensor, values: Tensor) -> SoftmaxState:
    """Fold one tile of keys into the running softmax; `acc` stays undivided.

    Args:
        state: m (rows,), total (rows,), acc (rows, d_v); SoftmaxState(m, total, acc) makes one.
        scores: (rows, cols), scaled; -inf where a query may not look.
        values: (cols, d_v).
    """
    ### BEGIN SOLUTION
    m = torch.maximum(state.m, scores.amax(dim=1))
    base = torch.where(m == -torch.inf, 0.0, m)
    shrink = torch.exp(state.m - base)
    p = torch.exp(scores - base[:, None])
    total = shrink * state.total + p.sum(dim=1)
    return SoftmaxState(m, total, shrink[:, None] * state.acc + p @ values)
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.absorb-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("flash_attention.absorb", absorb)

# %% [markdown]
# ## 2. Attention in tiles (3 points, 20 minutes)
#
# A GPU has little memory on chip, and much slow memory beside it. What you `load` comes on chip, and
# what you `store` goes back. Everything else in your function is on chip.
#
# - `load("Q", q, rows)` returns `q[rows]` and counts the bytes;
# - `store("O", out, rows, value)` writes `out[rows] = value` and counts them;
# - `tiles(10, 4)` gives `slice(0, 4)`, `slice(4, 8)`, `slice(8, 10)`.
#
# On chip there is room for one tile of queries, one of keys and one of values. FlashAttention-2
# keeps a tile of queries there until it is done, and lets all tiles of keys and values pass by.
#
# You need not have solved exercise 1. `reference.absorb(state, scores, values)` is a finished one,
# `SoftmaxState.empty(q_i, d_v)` is the state before the first key, and `reference.finish(state)`
# divides: it returns a `Partial` with `.out` and `.lse`, which is `L = m + log(total)`.
#
# You are graded on the result and on the bytes. By hand, for 8 queries and 12 keys of width 4 in
# float64 (8 bytes), tiles of 4: Q is 256 bytes, K and V are 384 each. There are 2 tiles of queries,
# so 256 + 2 * 768 = 1,792 bytes are read, and 8 * (4 + 1) * 8 = 320 are written.
#
# Two traps from the guide's version wait here. It does not divide the scores by `sqrt(d_head)`, and
# it goes through the keys by the number of *queries*.

# %% nbgrader={"grade_id": "flash_attention.tiled_attention", "solution": true}
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile_q: int, tile_k: int
) -> None:
    """softmax(q k^T / sqrt(d_head)) v of one head, without a mask; written to `out` and `lse`.

    Args:
        q: (n_q, d_head). k: (n_k, d_head). v: (n_k, d_v). No length is a multiple of a tile.
        out: (n_q, d_v), to be stored as "O".
        lse: (n_q,), to be stored as "L".
    """
    ### BEGIN SOLUTION
    for rows in tiles(len(q), tile_q):
        q_i = load("Q", q, rows)
        state = SoftmaxState.empty(q_i, v.shape[1])
        for cols in tiles(len(k), tile_k):
            k_j, v_j = load("K", k, cols), load("V", v, cols)
            scores = q_i @ k_j.T * q.shape[1] ** -0.5
            state = reference.absorb(state, scores, v_j)
        result = reference.finish(state)
        store("O", out, rows, result.out)
        store("L", lse, rows, result.lse)
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.tiled_attention-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("flash_attention.tiled_attention", tiled_attention)

# %% [markdown]
# ## 3. Merge two parts (2 points, 10 minutes)
#
# In decoding there is one query. One tile of queries keeps one program busy, and a GPU has room for
# hundreds. So the keys are shared out: each program attends to a part of them and divides by *its*
# total. What comes out is a `Partial`: `out`, and `lse`, the log of the sum of `exp(score)`.
#
# Two such parts must become one. With one key each, the scores are 1 and 3 and the values 10 and 20:
#
# ```text
# a   out 10   lse 1
# b   out 20   lse 3
# ```

# %%
Predict(
    "What is the merged out?",
    answer=18.81,
    tolerance=0.005,
    explain="a's share is exp(1) / (exp(1) + exp(3)) = 0.119; 0.119 * 10 + 0.881 * 20 = 18.81.",
)

# %% [markdown]
# The result may be merged with a third part, so it needs its `lse`, too. Scores of 1,000 occur, and
# so do parts that saw no key: their `out` is 0 and their `lse` is `-inf`.

# %% nbgrader={"grade_id": "flash_attention.merge", "solution": true}
def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both parts. Each has out (rows, d_v) and lse (rows,)."""
    ### BEGIN SOLUTION
    lse = torch.logaddexp(a.lse, b.lse)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    of_a, of_b = torch.exp(a.lse - base), torch.exp(b.lse - base)
    return Partial(of_a[:, None] * a.out + of_b[:, None] * b.out, lse)
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.merge-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("flash_attention.merge", merge)

# %% [markdown]
# ## 4. Works in training, blind in decoding (2 points, 8 minutes)
#
# In training there are as many queries as keys. In decoding there is one query, the newest token,
# and all keys of the cache. Let us ask the guide's flash attention for that, and then torch, the way
# the guide calls it, with `is_causal=True`. Which keys does each of them see?

# %%
q, k, v = random(1, 1, 64), random(1, 300, 64, seed=1), random(1, 300, 64, seed=2)
guide = guides_flash_attention(q, k, v)  # it does not scale: neither do the oracles here
whole = F.scaled_dot_product_attention(q, k, v, scale=1.0)
first = F.scaled_dot_product_attention(q, k[:, :128], v[:, :128], scale=1.0)
print(f"guide against all 300 keys:      {relative(guide, whole):.0%} off")
print(f"guide against keys 0 to 127:     {relative(guide, first):.0%} off")
causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print(f"torch, is_causal=True, to v[0]:  {relative(causal, v[:, :1]):.0%} off")

# %% [markdown]
# The guide walks the keys by the number of queries: `range(0, 1, 128)` is one block of 128 keys, and
# the newest 172 are lost. Torch aligns its mask at the *top left*: query 0 stands at key 0. Nothing
# crashes in either case.
#
# Queries are the *newest* tokens, so the last query must stand at the last key: the mask is aligned
# at the *bottom right*. For 2 queries and 5 keys:
#
# ```text
#           key 0  1  2  3  4
# query 0       x  x  x  x  .
# query 1       x  x  x  x  x
# ```
#
# With more queries than keys, the first queries see nothing at all.
#
# Write the mask for a *tile*: only the queries in `rows` and the keys in `cols`.

# %% nbgrader={"grade_id": "flash_attention.causal_mask", "solution": true}
def causal_mask(rows: slice, cols: slice, n_q: int, n_k: int) -> Tensor:
    """(len(rows), len(cols)) bool: True where the query may see the key.

    Args:
        rows, cols: the tile's queries, of n_q, and keys, of n_k: slice(start, stop).
    """
    ### BEGIN SOLUTION
    query = torch.arange(rows.start, rows.stop)
    key = torch.arange(cols.start, cols.stop)
    return key <= query[:, None] + n_k - n_q
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.causal_mask-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("flash_attention.causal_mask", causal_mask)

# %% [markdown]
# ## 5. How many tiles? (2 points, 12 minutes)
#
# A tile in which no query may see any key is neither read nor computed. A tile that lies wholly in
# the past is computed without a mask. Only the tiles that the diagonal crosses need one. For 6
# queries and 8 keys, in tiles of 2 by 3 (the last ones are shorter):
#
# ```text
#            keys 0-2   3-5   6-7
# queries 0-1   x x x | . . . | . .        query 0 sees keys 0 to 2
#               x x x | x . . | . .
# queries 2-3   x x x | x x . | . .
#               x x x | x x x | . .
# queries 4-5   x x x | x x x | x .
#               x x x | x x x | x x
# ```
#
# 4 tiles are full, 3 need a mask, 2 are skipped. Find them before you go on.

# %%
Predict(
    "8,192 queries and keys, tiles of 128 by 128: 4,096 tiles. How many are visited, full or masked?",
    answer=2080,
    tolerance=0.001,
    unit="tiles",
    explain="1 + 2 + ... + 64 = 2,080. That is 50.8 %, a little more than half: tiles on the "
    "diagonal are visited whole.",
)

# %% [markdown]
# Now for any sizes. Your answer is compared with what the reference does: it records every tile that
# it absorbs or skips. The diagonal ends at the bottom right, as in exercise 4.

# %% nbgrader={"grade_id": "flash_attention.count_tiles", "solution": true}
def count_tiles(n_q: int, n_k: int, tile_q: int, tile_k: int) -> tuple[int, int, int]:
    """(full, masked, skipped): the tiles of a causal head of n_q queries and n_k keys.

    full: all of its queries see all of its keys. skipped: none sees any. masked: the others.
    """
    ### BEGIN SOLUTION
    full = masked = skipped = 0
    for rows in tiles(n_q, tile_q):
        for cols in tiles(n_k, tile_k):
            least, most = rows.start + n_k - n_q, rows.stop - 1 + n_k - n_q
            if cols.start > most:
                skipped += 1
            elif cols.stop - 1 <= least:
                full += 1
            else:
                masked += 1
    return full, masked, skipped
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.count_tiles-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("flash_attention.count_tiles", count_tiles)

# %% [markdown]
# ## 6. How many bytes? (2 points, 12 minutes)
#
# The guide says that flash attention is faster because of "better memory access patterns". You can
# be more precise. One head with 8,192 queries and keys, `d_head` 64, in float32. Naive attention
# writes and reads S and P, and moves 1.08 GB. Flash attention with a tile of `tile_q` queries reads
# all keys and values once for each such tile.

# %%
small = Predict(
    "With tiles of 16 queries, how many times as many bytes as naive attention does flash move?",
    unit="times",
)
small

# %%
sizes = Sizes(n_q=8192, n_k=8192, d_head=64, d_v=64)
naive = naive_traffic(sizes).total
ratios = {t: flash_traffic(sizes, tile_q=t, tile_k=64).total / naive for t in (16, 32, 128, 512)}
for tile_q, ratio in ratios.items():
    print(f"tile_q {tile_q:3}: {ratio:.2f} times the bytes of naive attention")
small.reveal(ratios[16])

# %% [markdown]
# Flash attention with small tiles moves *more*. The gain comes from the tile, and the tile from the
# memory on chip: hence the paper's bound, which has the size of that memory in the denominator.
#
# So plan one. On chip must be, at once: the tile of queries, one tile of keys, one of values, their
# scores (`tile_q` by `tile_k`), and for each query `m`, `total` and `acc`. Everything is float32, and
# values are as wide as keys, `d`. There is no mask.
#
# By hand: `d` 2, `tile_k` 3, 200 bytes. K_j and V_j are 2 * 3 * 2 = 12 numbers. One query adds 2 (its
# own), 3 (scores), 2 (acc) and 2 (m, total): 9. 200 bytes are 50 numbers, (50 - 12) / 9 = 4.2: a tile
# of 4 queries.

# %% nbgrader={"grade_id": "flash_attention.plan_tiles", "solution": true}
def plan_tiles(n_q: int, n_k: int, d: int, tile_k: int, budget: int) -> tuple[int, int]:
    """The largest tile_q that fits, at most n_q, and the bytes that the forward pass then moves.

    Args:
        budget: bytes on chip; at least one query fits.

    Bytes are those read (Q, K, V) and written (O, and L, one number a query), of one head.
    """
    ### BEGIN SOLUTION
    per_query = 2 * d + tile_k + 2
    tile_q = min(n_q, (budget // 4 - 2 * tile_k * d) // per_query)
    passes = -(-n_q // tile_q)
    return tile_q, 4 * (n_q * d + passes * 2 * n_k * d + n_q * (d + 1))
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.plan_tiles-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("flash_attention.plan_tiles", plan_tiles)

# %% [markdown]
# ## 7. Green tests, wrong kernel (3 points, 15 minutes)
#
# This is the guide's flash attention, word for word:
#
# ```python
# def flash_attention(Q, K, V, block_size=128):
#     """
#     Flash Attention: Compute attention in blocks
#
#     Never materialize full attention matrix
#     """
#     batch, seq_len, d_model = Q.shape
#     O = torch.zeros_like(Q)
#     l = torch.zeros(batch, seq_len, 1)  # Row sums
#     m = torch.full((batch, seq_len, 1), float('-inf'))  # Row maxes
#
#     # Process in blocks
#     for j in range(0, seq_len, block_size):
#         K_j = K[:, j:j+block_size, :]  # [batch, block_size, d_model]
#         V_j = V[:, j:j+block_size, :]
#
#         # Compute QK^T for this block
#         S_ij = torch.matmul(Q, K_j.transpose(-2, -1))  # [batch, seq_len, block_size]
#
#         # Update output incrementally (online softmax)
#         m_new = torch.maximum(m, S_ij.max(dim=-1, keepdim=True)[0])
#         alpha = torch.exp(m - m_new)
#         P_ij = torch.exp(S_ij - m_new)
#
#         l_new = alpha * l + P_ij.sum(dim=-1, keepdim=True)
#         O = (alpha * O + torch.matmul(P_ij, V_j)) / l_new
#
#         l = l_new
#         m = m_new
#
#     return O
# ```
#
# Its author may well have tested it, against the guide's own naive attention, with a few short
# sequences:

# %%
def naive_attention(Q, K, V):
    return F.softmax(Q @ K.transpose(-2, -1), dim=-1) @ V


for n in (16, 64, 128):
    Q, K, V = random(1, n, 64), random(1, n, 64, seed=1), random(1, n, 64, seed=2)
    error = (guides_flash_attention(Q, K, V) - naive_attention(Q, K, V)).abs().max()
    print(f"{n:4} tokens: {'ok' if error < 1e-4 else 'WRONG'}")

# %% [markdown]
# All green. Now think: what if all values are 1? A weighted mean of ones is 1, whatever the weights.

# %%
faded = Predict(
    "4,096 tokens, blocks of 128, all scores equal, all values 1. What does the guide return?"
)
faded

# %%
ones = torch.ones(1, 4096, 4)
result = guides_flash_attention(0 * ones, ones, ones)[0, 0, 0].item()
print(f"{result:.5f}, and 1 / 32 blocks is {1 / 32:.5f}")
faded.reveal(result)

# %% [markdown]
# `O` has been divided by the old `l` already. It is divided again in every block, so the earlier
# blocks fade away: what is left is about one block's share. Within one block nothing is left over to
# divide twice, and the tests were green.
#
# Write the test that the author should have had. It calls `attention(Q, K, V, block_size)` on inputs
# of your choice and raises an `AssertionError` if a result is wrong. You have no other attention to
# compare with, so choose inputs whose result you know *by hand*. Take as many queries as keys, and no
# scale, as the guide does: the weights are `softmax(Q K^T)`.
#
# Your test is run on attentions that are right, which must pass, and on several that are wrong in
# ways of their own. Values of 1 catch the guide. What do they not catch?

# %% nbgrader={"grade_id": "flash_attention.test_by_hand", "solution": true}
def test_by_hand(attention: Callable, block_size: int) -> None:
    """Raise AssertionError unless `attention` is right on inputs whose result is known by hand.

    Args:
        attention: attention(Q, K, V, block_size) -> (batch, n, d), like its arguments. No scale.
        block_size: at least 4. Keys are handled in blocks of so many.
    """
    ### BEGIN SOLUTION
    # block_size keys share one half of the weight, the last key has the other; 200 overflows exp
    n = block_size + 1
    scores = torch.full((1, n, 1), 200.0)
    scores[0, -1] += torch.log(torch.tensor(float(block_size)))
    values = torch.ones(1, n, 1)
    values[0, -1] = 3
    got = attention(torch.ones(1, n, 1), scores, values, block_size)
    assert torch.allclose(got, torch.full_like(got, 2.0), atol=1e-3), got
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.test_by_hand-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("flash_attention.test_by_hand", test_by_hand)

# %% [markdown]
# ## 8. Two wrongs agree (3 points, 15 minutes)
#
# The tests of exercise 7 compared the guide's flash attention with the guide's naive attention:
#
# ```python
# def standard_attention(Q, K, V):
#     S = torch.matmul(Q, K.transpose(-2, -1))
#     P = F.softmax(S, dim=-1)
#     return torch.matmul(P, V)
# ```
#
# Short sequences agree to six digits. And torch?

# %%
Q, K, V = random(1, 100, 64), random(1, 100, 64, seed=1), random(1, 100, 64, seed=2)
standard = F.softmax(Q @ K.transpose(-2, -1), dim=-1) @ V
guide = guides_flash_attention(Q, K, V)
oracle = F.scaled_dot_product_attention(Q, K, V)
print(f"flash against standard: {relative(guide, standard):.4%} off")
print(f"flash against torch:    {relative(guide, oracle):.0%} off")

# %% [markdown]
# Neither of them divides the scores by `sqrt(d_head)`. Two functions from one hand make the same
# mistake, so that they agree says nothing. An *oracle* is independent: it was written by somebody
# else, it shares no line with what it judges, and it is more precise.
#
# Write the comparison. It must say how wrong an attention is, for grouped heads (neighbouring query
# heads share a KV head) and with a cache (aligned at the bottom right, zeros for a query that sees no
# key). Each of these has a trap: think of exercise 4.

# %% nbgrader={"grade_id": "flash_attention.relative_error", "solution": true}
def relative_error(attention: Callable, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """|| attention - oracle || / || oracle ||, in float64, with the L2 norm over all elements.

    Args:
        attention: attention(q, k, v, causal=causal) -> (n_heads, n_q, d).
        q: (n_heads, n_q, d). k, v: (n_kv_heads, n_k, d); n_heads is a multiple of n_kv_heads.
    """
    ### BEGIN SOLUTION
    n_q, n_k = q.shape[1], k.shape[1]
    seen = torch.ones(n_q, n_k, dtype=torch.bool)
    if causal:
        seen = seen.tril(n_k - n_q)
    want = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=seen, enable_gqa=True
    )
    want = want.masked_fill(~seen.any(dim=1)[:, None], 0)
    got = attention(q, k, v, causal=causal).double()
    return ((got - want).norm() / want.norm()).item()
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.relative_error-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("flash_attention.relative_error", relative_error)

# %% [markdown]
# ## 9. The memory saver that doubles memory (3 points, 20 minutes)
#
# "Memory efficient: O(seq_len) instead of O(seq_len²)", says the guide. Its function never holds the
# whole matrix of scores. But in training, autograd keeps what the backward pass will need.

# %%
kept = Predict(
    "1,024 tokens, with gradients: how many times as many bytes does autograd keep for the guide's "
    "flash attention as for its standard attention?",
    unit="times",
)
kept

# %%
q, k, v = (random(1, 1024, 64, seed=s).requires_grad_() for s in range(3))
bytes_kept = {
    "standard": saved_nbytes(lambda: F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v),
    "the guide's flash": saved_nbytes(lambda: guides_flash_attention(q, k, v)),
    "with a backward of its own": saved_nbytes(
        lambda: reference.flash_attention(q, k, v, tile_q=256, tile_k=256)
    ),
}
for name, nbytes in bytes_kept.items():
    print(f"{name:27}{nbytes / 2**20:5.1f} MiB")
kept.reveal(bytes_kept["the guide's flash"] / bytes_kept["standard"])

# %% [markdown]
# Every `P_ij` is kept, and for every block two tensors of the size of `O`: the old `O`, and the sum
# before it is divided. At width 64 and blocks of 128 keys the two are together as large as `P_ij`. The
# way out: keep only q, k, v, the output O and one number a query, `L = m + log(total)`. Then each tile of P can be made again, without any running softmax,
# because the normaliser is known: `P = exp(S - L)`.
#
# Backwards through `O = P V`, `P = softmax(S)`, `S = scale * Q K^T`, with dO for the gradient of O:
#
# ```text
# dV = P^T dO
# dP = dO V^T
# dS = P * (dP - D)        D is one number a query: rowsum(dO * O)
# dQ = scale * dS K
# dK = scale * dS^T Q
# ```
#
# Where does D come from? The derivative of a softmax is `dS = P * (dP - rowsum(P * dP))`. That sum runs
# over *all* keys, and a tile has some of them. But `rowsum(P * dP)` = `rowsum(P * (dO V^T))` =
# `rowsum(dO * (P V))` = `rowsum(dO * O)`, and O is complete. Follow each step before you go on.
#
# Write the part of one tile of queries and one of keys. The check adds the parts of all tiles and
# compares with `torch.autograd`.

# %% nbgrader={"grade_id": "flash_attention.backward_tile", "solution": true}
def backward_tile(
    q_i: Tensor, k_j: Tensor, v_j: Tensor, out_i: Tensor, lse_i: Tensor, do_i: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What this tile adds to dQ (rows, d_head), dK (cols, d_head) and dV (cols, d_v).

    Args:
        q_i: (rows, d_head). k_j: (cols, d_head). v_j: (cols, d_v).
        out_i, lse_i: O (rows, d_v) and L (rows,) of these queries over ALL keys.
        do_i: gradient of O, (rows, d_v).
    """
    ### BEGIN SOLUTION
    p = torch.exp(scale * q_i @ k_j.T - lse_i[:, None])
    delta = (do_i * out_i).sum(dim=1)
    ds = p * (do_i @ v_j.T - delta[:, None])
    return scale * ds @ k_j, scale * ds.T @ q_i, p.T @ do_i
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.backward_tile-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("flash_attention.backward_tile", backward_tile)

# %% [markdown]
# ## 10. Can it cheat? (2 points, 12 minutes)
#
# A language model that sees the next token predicts it perfectly, until it is used. The loss looks
# wonderful and nothing crashes. You cannot see such a leak in the output, but you can provoke it:
# *change a token, and look who notices*. Whoever may not see the token must not move.
#
# You get an attention as a black box. It claims to be causal, aligned at the bottom right: query `i`
# sees the keys 0 to `i + n_k - n_q`. Write the test that says whether it cheats.
#
# By hand: 3 queries, 3 keys. You change key and value 2. Which queries may move? Only query 2. You
# change key and value 0: all of them may.
#
# Your test is run on honest attentions and on cheats: some use future values, some future keys only,
# some one single pair.

# %% nbgrader={"grade_id": "flash_attention.looks_ahead", "solution": true}
def looks_ahead(attention: Callable, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether some query's result depends on a key or value that it may not see.

    Args:
        attention: attention(q, k, v) -> (n_q, d_v), causal as it says.
        q: (n_q, d). k: (n_k, d). v: (n_k, d_v). n_q may be less or more than n_k.
    """
    ### BEGIN SOLUTION
    before = attention(q, k, v)
    for token in range(len(k)):
        keys, values = k.clone(), v.clone()
        keys[token] += 1
        values[token] += 1
        n_blind = max(0, token - (len(k) - len(q)))
        after = attention(q, keys, values)
        if not torch.allclose(after[:n_blind], before[:n_blind], rtol=0, atol=1e-9):
            return True
    return False
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.looks_ahead-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("flash_attention.looks_ahead", looks_ahead)

# %% [markdown]
# ## 11. The forward kernel in Triton (5 points, 40 minutes)
#
# *Needs section 7 of the lesson.*
#
# One program serves one tile of queries of one head: the outer loop of exercise 2 has become the grid.
# The program walks the keys in tiles, as there:
#
# ```text
# for each tile of keys:
#     scores = scale * q k^T               -inf for a key past the end, or in the future
#     m_new  = max(m, largest score)       one a query
#     shrink = exp(m - m_new)
#     p      = exp(scores - m_new)
#     total  = shrink * total + sum of p
#     acc    = shrink * acc + p v
#     m      = m_new
# out = acc / total,  L = m + log(total)
# ```
#
# All tensors are contiguous: element (h, i, j) of a tensor (A, B, C) is at `(h * B + i) * C + j`. The
# products are `tl.dot(q, tl.trans(k), input_precision="ieee")` and `tl.dot(p, v,
# input_precision="ieee")`; without that word a GPU rounds float32 to 10 bits and misses the tolerance.
#
# Four questions to answer before you write. What follows the last key of a head in memory, and what
# would a program read there? What is the score of a key of zeros? Which queries does the last program
# not own? What is `m - m_new` for a query that sees no key?
#
# You are graded in float32, on small and uneven shapes: 20 keys in tiles of 16, 37 queries, 3 queries
# with 41 keys, 21 queries with 9. You need no GPU: without one Triton interprets your kernel on the
# CPU.

# %% nbgrader={"grade_id": "flash_attention.forward_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    q_ptr,  # (n_heads, n_q, D) float32
    k_ptr, v_ptr,  # (n_heads / GROUP, n_k, D) float32, each
    out_ptr,  # (n_heads, n_q, D) float32; zeros for a query that sees no key
    lse_ptr,  # (n_heads, n_q) float32: L, -inf for a query that sees no key
    n_q, n_k,
    scale,  # of the scores
    GROUP: tl.constexpr,  # neighbouring query heads that share a KV head
    CAUSAL: tl.constexpr,  # query i sees the keys 0 to i + n_k - n_q
    D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):
    """One program: TILE_Q queries of one head against all keys that they see."""
    head = tl.program_id(1)
    row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)  # (TILE_Q,)
    d = tl.arange(0, D)  # (D,)
    at_q = (head * n_q + row[:, None]) * D + d[None, :]  # (TILE_Q, D)
    q = tl.load(q_ptr + at_q, (row < n_q)[:, None], other=0.0)
    m = tl.full((TILE_Q,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    ### BEGIN SOLUTION
    for first in range(0, n_k, TILE_K):
        col = first + tl.arange(0, TILE_K)  # (TILE_K,)
        at_k = ((head // GROUP) * n_k + col[:, None]) * D + d[None, :]  # (TILE_K, D)
        k = tl.load(k_ptr + at_k, (col < n_k)[:, None], other=0.0)
        v = tl.load(v_ptr + at_k, (col < n_k)[:, None], other=0.0)
        seen = (col < n_k)[None, :]
        if CAUSAL:
            seen = seen & (col[None, :] <= row[:, None] + n_k - n_q)
        scores = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc + tl.dot(p, v, input_precision="ieee")
        m = m_new
    total = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + at_q, acc / total[:, None], (row < n_q)[:, None])
    tl.store(lse_ptr + head * n_q + row, m + tl.log(total), row < n_q)
    ### END SOLUTION


# %% nbgrader={"grade_id": "flash_attention.forward_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("flash_attention.forward_kernel", forward_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/2_flash_attention.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/2_flash_attention.ipynb` has one answer to each exercise. Yours may look different.
#
# The kernels of this course are in `llmopt_lab/flash_attention/kernels.py`. Its forward kernel is
# yours, and does two things more: it stops at the last key that its queries see, and it compares
# `col` only in the tiles that need it. You have counted them in exercise 5.
