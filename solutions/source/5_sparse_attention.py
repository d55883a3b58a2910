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
# # Exercises 5: Sparse attention
# {{colab_badge}}
#
# You draw the mask that an attention really has, whatever it says of itself, and mend three patterns
# of a guide. You find leaks that take two layers, and derive how far layers reach and which stride is
# best. Then blocks: cover a mask without losing a pair, count what is read, and read no more than
# that. You keep endless text in a buffer of fixed size, measure a choice of blocks against the best
# one there is, and end with the kernel that skips.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. Draw the real mask | 3 | 15 |
# | 2. Window 1, window 3 | 3 | 15 |
# | 3. Global means both ways | 2 | 8 |
# | 4. Can it cheat? In two layers | 3 | 12 |
# | 5. How far does it see? | 2 | 10 |
# | 6. The best stride | 2 | 12 |
# | 7. A cover that loses nothing | 3 | 15 |
# | 8. Count live blocks | 3 | 15 |
# | 9. The loop over live blocks | 3 | 20 |
# | 10. Evict the sink | 3 | 15 |
# | 11. The best blocks, and yours | 3 | 15 |
# | 12. The kernel that skips, in Triton | 5 | 40 |
# | together | 35 | 192 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("sparse_attention.real_mask", 1)` gives the first hint, `2` the
# second, stronger one. Hints cost no points.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.grading import hint
from llmopt_lab.sparse_attention import reference
from llmopt_lab.sparse_attention.cases import (
    guides_local_attention,
    guides_longformer_attention,
    guides_strided_attention,
)
from llmopt_lab.widgets.predict import Predict


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(mask: Tensor) -> None:
    """x where a query (row) sees a key (column)."""
    for row, sees in enumerate(mask.tolist()):
        print(f"query {row:2}  " + " ".join("x" if seen else "." for seen in sees))


# %% [markdown]
# ## 1. Draw the real mask (3 points, 15 minutes)
#
# A sparse pattern is easy to write and hard to see. Its result has the right shape whatever it reads.
# Here are two of a guide's three functions, as they stand there.
#
# ```python
# def strided_attention(Q, K, V, stride=4):
#     """Attend to tokens at regular intervals"""
#     seq_len = Q.size(1)
#     # Only compute attention for strided positions
#     strided_indices = torch.arange(0, seq_len, stride)
#     Q_strided = Q[:, strided_indices, :]
#     K_strided = K[:, strided_indices, :]
#     V_strided = V[:, strided_indices, :]
#     # Standard attention on strided tokens
#     output_strided = scaled_dot_product_attention(Q_strided, K_strided, V_strided)
#     # Interpolate for non-strided positions
#     output = interpolate(output_strided, seq_len)
#     return output
#
# def longformer_attention(Q, K, V, window_size=512, global_indices=[0, -1]):
#     seq_len = Q.size(1)
#     output = torch.zeros_like(Q)
#     for i in range(seq_len):
#         if i in global_indices:
#             # Global attention (attend to all)
#             Q_i = Q[:, i:i+1, :]
#             attn = scaled_dot_product_attention(Q_i, K, V)
#             output[:, i, :] = attn.squeeze(1)
#         else:
#             # Local attention (sliding window)
#             start = max(0, i - window_size // 2)
#             end = min(seq_len, i + window_size // 2)
#             ...
# ```

# %%
strided = Predict(
    "16 tokens, stride 4. New random q, k AND v for 12 of them, all but 0, 4, 8, 12: how many of the "
    "16 rows of the guide's strided attention change?",
    unit="rows",
)
strided

# %%
q, k, v = random(1, 16, 8), random(1, 16, 8, seed=1), random(1, 16, 8, seed=2)
before = guides_strided_attention(q, k, v, stride=4)
others = torch.arange(16) % 4 != 0
for seed, x in enumerate((q, k, v), start=3):
    x[:, others] = random(1, 12, 8, seed=seed)
n_changed = int((guides_strided_attention(q, k, v, stride=4) != before).any(dim=2).sum())
print(f"{n_changed} of 16 rows changed")
strided.reveal(n_changed)

# %% [markdown]
# Three tokens in four are invisible, their own queries included: the guide thins out the queries, too,
# and stretches what comes out.
#
# That is how you find out what an attention reads: *change a token, and look who notices*. Change the
# key and the value of token `j`. Every query whose row moves reads token `j`; the others do not. Change
# only the key, and you miss a query that has no choice. Change only the value, and you miss one whose
# softmax counts a key and whose mask then drops it.
#
# By hand, causal, 3 tokens: change token 2, and row 2 moves. Change token 0, and all three do.

# %% nbgrader={"grade_id": "sparse_attention.real_mask", "solution": true}
def real_mask(attention: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n_q, n_k) bool: True where the query's result depends on the token's key or value.

    Args:
        attention: attention(q, k, v) -> (n_q, d_v); a black box.
        q: (n_q, d). k: (n_k, d). v: (n_k, d_v). Some may be zeros.
    """
    ### BEGIN SOLUTION
    before = attention(q, k, v)
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for j in range(len(k)):
        keys, values = k.clone(), v.clone()
        keys[j] += 1
        values[j] += 1
        mask[:, j] = (attention(q, keys, values) != before).any(dim=1)
    return mask
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.real_mask-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.real_mask", real_mask)

# %% [markdown]
# Now look at them. Which row of the Longformer should be full and is not? Which columns should be? And
# whose window has its right end missing?

# %%
guides = {
    "strided, stride 4": lambda q, k, v: guides_strided_attention(q, k, v, stride=4),
    "Longformer, window 4, tokens 0 and -1 global": lambda q, k, v: guides_longformer_attention(
        q, k, v, window_size=4, global_indices=(0, -1)
    ),
}
for name, guide in guides.items():
    print(f"the guide's {name}")
    try:
        draw(real_mask(lambda *x: guide(*(y[None] for y in x))[0], *(x[0, :10] for x in (q, k, v))))
    except NotImplementedError:
        print("(your real_mask will draw it here)")

# %% [markdown]
# ## 2. Window 1, window 3 (3 points, 15 minutes)
#
# The guide's third function, the window:
#
# ```python
# def local_attention(Q, K, V, window_size=128):
#     seq_len = Q.size(1)
#     output = torch.zeros_like(Q)
#     for i in range(seq_len):
#         # Define window
#         start = max(0, i - window_size // 2)
#         end = min(seq_len, i + window_size // 2)
#         # Attend only to window
#         Q_i = Q[:, i:i+1, :]
#         K_window = K[:, start:end, :]
#         V_window = V[:, start:end, :]
#         # Compute attention
#         scores = torch.matmul(Q_i, K_window.transpose(-2, -1))
#         attn = F.softmax(scores, dim=-1)
#         output[:, i, :] = torch.matmul(attn, V_window).squeeze(1)
#     return output
# ```
#
# A query in a window of width 1 sees itself, so the result is `V`. And here?

# %%
alone = Predict(
    "The guide's window of width 1 over values that are all 5: what is the result?",
    choices=["5", "0", "NaN"],
)
alone

# %%
fives = torch.full((1, 9, 4), 5.0)
result = guides_local_attention(random(1, 9, 4), random(1, 9, 4, seed=1), fives, window_size=1)
print(f"from {result.min():.0f} to {result.max():.0f}")
for width in (1, 2, 3, 4, 5, 8):
    half = width // 2
    print(f"width {width}: keys i + {[*range(-half, half)]}")
alone.reveal("0")

# %% [markdown]
# A product with no key is no key's value: 0, without an error. Width 3 sees the left neighbour and not
# the right one. There is more. The scores are not divided by `sqrt(d)`, which the Longformer above
# does. And with heads, (batch, heads, n, d), `Q.size(1)` is the number of heads:

# %%
q, k, v = random(1, 1, 9, 4), random(1, 1, 9, 4, seed=1), random(1, 1, 9, 4, seed=2)
got = guides_local_attention(q, k, v, window_size=3)
dense = F.scaled_dot_product_attention(q, k, v, scale=1.0)
same = torch.allclose(got, dense, atol=1e-6)
print(f"one head, window 3: equal to dense attention, unscaled? {same}")

# %% [markdown]
# Write it right. A *symmetric* window of width `w` has the query's own key and `w // 2` keys on each
# side. A *causal* one has the query's own key and the `w - 1` before it.
#
# ```text
# keys of query 5     w = 1    2        3        4
# symmetric           5        4 5 6    4 5 6    3 4 5 6 7
# causal              5        4 5      3 4 5    2 3 4 5
# ```
#
# No loop over queries is needed, and no speed is asked for.

# %% nbgrader={"grade_id": "sparse_attention.local_attention", "solution": true}
def local_attention(q: Tensor, k: Tensor, v: Tensor, width: int, causal: bool) -> Tensor:
    """Attention in a window, scaled by 1 / sqrt(d); a result like `v`.

    Args:
        q, k, v: (.., n, d): one text, a batch, or a batch of heads.
        width: at least 1, and maybe more than n.
    """
    ### BEGIN SOLUTION
    place = torch.arange(q.shape[-2])
    back = place[:, None] - place
    near = (back >= 0) & (back < width) if causal else back.abs() <= width // 2
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~near, -torch.inf).softmax(dim=-1) @ v
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.local_attention-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.local_attention", local_attention)

# %% [markdown]
# ## 3. Global means both ways (2 points, 8 minutes)
#
# Longformer's global tokens read all tokens, *and all tokens read them*: what token 0 has gathered from
# the whole text comes back to everybody in the next layer. The guide's code has the first half only.
# And for `global_indices=[0, -1]` it asks `i in global_indices`, with `i` from 0 to n - 1. Who is -1?
#
# ```text
# n = 6, width 3, tokens (0, -1)        the guide's
#
# query 0   x x x x x x                 x x x x x x
# query 1   x x x . . x                 x x . . . .
# query 2   x x x x . x                 . x x . . .
# query 3   x . x x x x                 . . x x . .
# query 4   x . . x x x                 . . . x x .
# query 5   x x x x x x                 . . . . x x
# ```
#
# Longformer is an encoder: nothing is causal here.

# %% nbgrader={"grade_id": "sparse_attention.longformer_mask", "solution": true}
def longformer_mask(n: int, width: int, tokens: tuple[int, ...]) -> Tensor:
    """(n, n) bool: a symmetric window of `width` (exercise 2), and `tokens` that are global.

    Args:
        tokens: from -n to n - 1; -1 is the last token. There may be none.
    """
    ### BEGIN SOLUTION
    place = torch.arange(n)
    mask = (place[:, None] - place).abs() <= width // 2
    for token in tokens:
        mask[token % n, :] = True
        mask[:, token % n] = True
    return mask
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.longformer_mask-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("sparse_attention.longformer_mask", longformer_mask)

# %% [markdown]
# ## 4. Can it cheat? In two layers (3 points, 12 minutes)
#
# A language model that sees the next token predicts it perfectly, until it is used. None of the guide's
# three functions is causal. Change token 40 of 64, and look which *earlier* rows move:

# %%
q, k, v = random(1, 64, 8), random(1, 64, 8, seed=1), random(1, 64, 8, seed=2)
k2, v2 = k.clone(), v.clone()
k2[:, 40] += 1
v2[:, 40] += 1
for name, guide in {
    "window 8": lambda *x: guides_local_attention(*x, window_size=8),
    "Longformer, window 8, token 0 global": lambda *x: guides_longformer_attention(
        *x, window_size=8, global_indices=(0,)
    ),
    "strided, stride 4": lambda *x: guides_strided_attention(*x, stride=4),
}.items():
    moved = (guide(q, k2, v2) != guide(q, k, v)).any(dim=2)[0, :40].nonzero()[:, 0].tolist()
    print(f"{name:38} {len(moved):2} earlier rows move: {moved[:4]}{' ..' * (len(moved) > 4)}")

# %% [markdown]
# That is one layer. A model has many, and what one layer reads the next one passes on. Take a true
# Longformer with token 0 global, and a model of two layers:
#
# ```text
# layer 1   token 0 reads token 40
# layer 2   token 1 reads token 0, which lies in its past. Harmless?
# ```

# %%
Predict(
    "Longformer, 64 tokens, window 3, token 0 global, two layers. How many of the tokens 0 to 39 have "
    "read something of token 40?",
    answer=40,
    tolerance=0.001,
    unit="tokens",
    explain="All: token 0 has read it in layer 1, and everybody reads token 0 in layer 2.",
)

# %% [markdown]
# You get the masks of all layers, the first layer first. Say which token's final state depends on which
# *later* input. A layer adds what it has read to the token's own state (the residual), so a token never
# forgets what it knew, even where its mask hides it from itself.
#
# By hand, 3 tokens: in layer 1 token 0 reads token 2, in layer 2 token 1 reads token 0. Then (0, 2) and
# (1, 2) are leaks. The other way round, layer 1 token 1 reads token 0, layer 2 token 0 reads token 2:
# only (0, 2) is one.

# %% nbgrader={"grade_id": "sparse_attention.future_read", "solution": true}
def future_read(masks: list[Tensor]) -> Tensor:
    """(n, n) bool: True where row i's final state depends on the input of a later token j > i.

    Args:
        masks: one (n, n) bool a layer, the first layer first: True where row i reads column j.
    """
    ### BEGIN SOLUTION
    itself = torch.eye(len(masks[0]), dtype=torch.bool)
    known = itself
    for mask in masks:
        known = (mask | itself).float() @ known.float() > 0
    return known.triu(1)
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.future_read-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.future_read", future_read)

# %% [markdown]
# ## 5. How far does it see? (2 points, 10 minutes)
#
# The same thought, put to good use. A causal window of 3 sees 2 tokens back. But in the second layer
# those had seen 2 tokens back themselves. That is the *receptive field*, and why a window can do at all.
#
# ```text
# token                 0  1  2  3  4  5  6  7  8  9
# layer 2, window 3     .  .  .  .  .  .  .  x  x  x      what token 9 reads
# layer 1, window 3     .  .  .  .  .  x  x  x  x  x      what those had read: 5 tokens
# ```
#
# Mistral 7B had 32 layers with windows of 4,096. Other models mix: some layers have a window, and every
# so many a layer has none.

# %%
Predict(
    "32 layers, causal windows of 4,096: on how many tokens can the newest one depend?",
    answer=32 * 4095 + 1,
    tolerance=0.0001,
    unit="tokens",
    explain="Each layer adds 4,095, and the token itself is there from the start: 131,041. That it CAN "
    "depend on them does not mean that much of them arrives.",
)

# %% [markdown]
# Write it for any widths, one a layer, the first layer first. 0 stands for a layer without a window: a
# causal layer that reads everything. The answer counts the last of `n` tokens itself, too.

# %% nbgrader={"grade_id": "sparse_attention.last_sees", "solution": true}
def last_sees(widths: list[int], n: int) -> int:
    """On how many of n tokens the last one can depend after these layers of causal windows.

    Args:
        widths: one a layer, maybe none at all; 0 is a layer without a window.
    """
    ### BEGIN SOLUTION
    if 0 in widths:
        return n
    return min(n, 1 + sum(width - 1 for width in widths))
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.last_sees-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("sparse_attention.last_sees", last_sees)

# %% [markdown]
# ## 6. The best stride (2 points, 12 minutes)
#
# The Sparse Transformer's strided attention is not the guide's. Query `i` sees the last `s` keys, its
# own among them, and every `s`-th key before: those where `i - j` is a multiple of `s`. With `s = 4`,
# query 13 sees 10, 11, 12, 13 and 9, 5, 1. Any two tokens are then two layers apart.
#
# A small stride has many strided keys, a large one a long window. What is best? Count pairs (query,
# key) over all `n` queries, and derive the stride `s` that has the fewest.

# %%
n = 2048
back = torch.arange(n)[:, None] - torch.arange(n)
for s in (8, 16, 64, 128):
    seen = (back >= 0) & ((back < s) | (back % s == 0))
    print(f"stride {s:4}: {int(seen.sum()):9,} of {n * (n + 1) // 2:,} causal pairs")

# %% [markdown]
# The guide sums up: "Sparse Attention: O(seq_len) instead of O(seq_len²)". With the best stride for each
# length, the pairs grow as a power of `n`. Which one?
#
# Two approximations are fine: query `i` has `i / s` strided keys, and all `n` queries have `s` local
# ones. `math.isqrt` and `round` may help. You are graded on lengths of your checker's choice; your
# stride must be the whole number with the fewest pairs.

# %% nbgrader={"grade_id": "sparse_attention.best_stride", "solution": true}
def best_stride(n: int) -> tuple[int, float]:
    """(stride, exponent): the stride with the fewest pairs for n tokens, and the a of pairs ~ n^a.

    The exponent is that of long texts, each with its own best stride.
    """
    ### BEGIN SOLUTION
    # n s + n^2 / (2 s) is least where n = n^2 / (2 s^2); there it is n sqrt(2 n)
    return round(math.sqrt(n / 2)), 1.5
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.best_stride-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("sparse_attention.best_stride", best_stride)

# %% [markdown]
# ## 7. A cover that loses nothing (3 points, 15 minutes)
#
# A GPU multiplies tiles, not single pairs. So a kernel takes a mask in *blocks*: a block of queries
# times a block of keys is visited whole or not at all. In a visited block the hidden pairs are computed
# and masked. That costs time. A pair that counts, in a block that is not visited, costs the right
# result. So the cover must be conservative. A causal window of 5, with 4 queries
# and 7 keys, 3 of them cached:
#
# ```text
#           keys 0-2    3-5    6
# query 0     x x x | x . . | .
# query 1     x x x | x x . | .        live      full
# ----------------------------         x x .     x . .
# query 2     . x x | x x x | .        x x x     . x .
# query 3     . . x | x x x | x
# ```
#
# A *full* block has no hidden pair at all and is computed without a mask. The last row and column of
# blocks may be smaller, and they are full, too, if all that is there is seen.

# %% nbgrader={"grade_id": "sparse_attention.block_cover", "solution": true}
def block_cover(mask: Tensor, tile_q: int, tile_k: int) -> tuple[Tensor, Tensor]:
    """(live, full), each (row_blocks, col_blocks) bool: which blocks to visit, which without a mask.

    Args:
        mask: (n_q, n_k) bool; no length need be a multiple of a tile.
    """
    ### BEGIN SOLUTION
    n_q, n_k = mask.shape
    shape = (ceil_div(n_q, tile_q), ceil_div(n_k, tile_k))
    live, full = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for a, rows in enumerate(tiles(n_q, tile_q)):
        for b, cols in enumerate(tiles(n_k, tile_k)):
            live[a, b] = mask[rows, cols].any()
            full[a, b] = mask[rows, cols].all()
    return live, full
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.block_cover-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.block_cover", block_cover)

# %% [markdown]
# ## 8. Count live blocks (3 points, 15 minutes)
#
# For a causal window nobody needs the mask of N x N: the live blocks follow from the numbers. Count
# them, and what is read. That is the cost that the technique is about; the time follows from it, on a
# machine that you know.

# %%
Predict(
    "16,384 tokens, a causal window of 1,024, blocks of 128 x 128: how many of the 16,384 blocks are "
    "live?",
    answer=1116,
    tolerance=0.001,
    unit="blocks",
    explain="Each block of queries needs its own block of keys and the 8 before it, since its first "
    "query looks 1,023 keys back: 9 a row, fewer in the first 8 rows. 128 * 9 - 36 = 1,116. The area of "
    "the band is 1,024 blocks.",
)

# %% [markdown]
# By hand: 10 tokens, window 3, blocks of 4 x 4, the last of 2. Queries 0 to 3 see keys 0 to 3: one
# block. Queries 4 to 7 see keys 2 to 7: two blocks. Queries 8 and 9 see keys 6 to 9: two blocks. That
# is 5 live blocks, with 4 + 8 + 6 = 18 keys. With `d` 2 in float32: Q is read once, 10 * 2 numbers, K
# and V are 18 * 2 each. 92 numbers are 368 bytes.

# %% nbgrader={"grade_id": "sparse_attention.window_traffic", "solution": true}
def window_traffic(
    n: int, width: int, tile_q: int, tile_k: int, d: int, itemsize: int
) -> tuple[int, int]:
    """(live blocks, bytes read) of one head: Q once, K and V of every live block.

    Args:
        n: queries and keys. width: of the causal window, itself included; maybe more than n.
        d: width of queries, keys and values. itemsize: bytes of a number.
    """
    ### BEGIN SOLUTION
    blocks = keys = 0
    for rows in tiles(n, tile_q):
        oldest, newest = max(0, rows.start - width + 1), rows.stop - 1
        first, last = oldest // tile_k, newest // tile_k
        blocks += last - first + 1
        keys += min(n, (last + 1) * tile_k) - first * tile_k
    return blocks, itemsize * d * (n + 2 * keys)
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.window_traffic-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.window_traffic", window_traffic)

# %% [markdown]
# ## 9. The loop over live blocks (3 points, 20 minutes)
#
# Block-sparse attention is flash attention's loop with one question more. All tensors are in slow
# memory; what you `load` comes on chip, what you `store` goes back.
#
# - `load("K", k, cols)` returns `k[cols]` and counts the bytes; `load("mask", mask, (rows, cols))` reads
#   a part of the mask;
# - `store("O", out, rows, value)` writes `out[rows] = value` and counts them;
# - `tiles(10, 4)` gives `slice(0, 4)`, `slice(4, 8)`, `slice(8, 10)`;
# - `reference.absorb(m, total, acc, scores, values)` folds a block of scores (rows, cols) into the
#   running softmax and returns the new `m, total, acc`: `m` (rows,) begins at -inf, `total` (rows,) and
#   `acc` (rows, d_v) at 0.
#
# The mask is as long as N x N. It would cost more to read than the keys do, so it is read where it is
# needed: in blocks that are live and not full. A query that sees no key at all gets zeros.
#
# You are graded on the result and on the bytes of each tensor. Call them "Q", "K", "V", "mask" and "O".
# `live` and `full` are small; read them as they are.

# %% nbgrader={"grade_id": "sparse_attention.sparse_head", "solution": true}
def sparse_head(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, live: Tensor, full: Tensor, out: Tensor, *,
    tile_q: int, tile_k: int,
) -> None:
    """One head of attention, scaled by 1 / sqrt(d), over the live blocks; written to `out`.

    Args:
        q: (n_q, d). k: (n_k, d). v: (n_k, d_v). mask: (n_q, n_k) bool.
        live, full: (row_blocks, col_blocks) bool, as in exercise 7.
        out: (n_q, d_v).
    """
    ### BEGIN SOLUTION
    for a, rows in enumerate(tiles(len(q), tile_q)):
        q_i = load("Q", q, rows)
        m = q_i.new_full((len(q_i),), -torch.inf)
        total, acc = torch.zeros_like(m), q_i.new_zeros(len(q_i), v.shape[1])
        for b, cols in enumerate(tiles(len(k), tile_k)):
            if not live[a, b]:
                continue
            scores = q_i @ load("K", k, cols).T * q.shape[1] ** -0.5
            if not full[a, b]:
                scores = scores.masked_fill(~load("mask", mask, (rows, cols)), -torch.inf)
            m, total, acc = reference.absorb(m, total, acc, scores, load("V", v, cols))
        store("O", out, rows, acc / total.masked_fill(total == 0, 1)[:, None])
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.sparse_head-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.sparse_head", sparse_head)

# %% [markdown]
# ## 10. Evict the sink (3 points, 15 minutes)
#
# *Needs section 6 of the lesson.*
#
# Text without end, memory with one: keep the last `window` keys and forget the others. Here is a real
# model on Python source, with all keys, with the last 64, and with the last 60 and the first 4:

# %%
from llmopt_lab.nn import weights
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.sparse_attention import Causal, SlidingWindow
from llmopt_lab.sparse_attention.attend import PatternAttend
from llmopt_lab.sparse_attention.patterns import streaming

lm = weights.load("lab-target", dtype=torch.float32)
text = lm.encode(held_out_documents()["stdlib/zipfile.py"])[:385]
for name, pattern in {
    "all keys": Causal(),
    "the last 64": SlidingWindow(64),
    "the last 60 and the first 4": streaming(60, 4),
}.items():
    with torch.no_grad():
        logits = lm.model(text[None, :-1], attend=PatternAttend(pattern))[0]
    print(f"{name:28} perplexity {F.cross_entropy(logits, text[1:]).exp():.1f}")

# %% [markdown]
# The first tokens are worth more than the 4 that they displace. A softmax must put its weight somewhere,
# and a head that finds nothing puts it on a token that is always there. Evict that *sink*, and the
# weight falls on tokens that mean something.
#
# So the buffer has `n_sinks + window` slots. The first `n_sinks` tokens stay for ever. All others go
# through a ring behind them: the newest takes the slot of the oldest. By hand, 1 sink, window 3:
#
# ```text
# after token    slot 0  1  2  3
#     0               0  -  -  -
#     2               0  1  2  -
#     3               0  1  2  3
#     4               0  4  2  3
#     5               0  4  5  3
#     7               0  7  5  6
# ```
#
# The slots are out of order, and attention does not mind: a sum has no order. (Positions do. StreamingLLM
# stores keys before RoPE and turns them by their place in the buffer; that is in `rolling_cache.py`.)
#
# Write one step: put the token's key and value where they belong, then attend. Slots that nobody has
# filled hold NaN.

# %% nbgrader={"grade_id": "sparse_attention.stream_step", "solution": true}
def stream_step(
    keys: Tensor, values: Tensor, t: int, q: Tensor, k: Tensor, v: Tensor, *, n_sinks: int
) -> Tensor:
    """The result (d_v,) of token t over all tokens that the buffer then holds, its own included.

    Args:
        keys, values: the buffer, (n_sinks + window, d) and (n_sinks + window, d_v), to be changed
            in place. Tokens 0 to t - 1 have been through it, one call each.
        q, k: (d,). v: (d_v,). The scores are scaled by 1 / sqrt(d).
        n_sinks: maybe 0.
    """
    ### BEGIN SOLUTION
    window = len(keys) - n_sinks
    slot = t if t < n_sinks else n_sinks + (t - n_sinks) % window
    keys[slot], values[slot] = k, v
    n_held = min(t + 1, len(keys))
    weights = torch.softmax(keys[:n_held] @ q / math.sqrt(len(q)), dim=0)
    return weights @ values[:n_held]
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.stream_step-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.stream_step", stream_step)

# %% [markdown]
# ## 11. The best blocks, and yours (3 points, 15 minutes)
#
# *Needs section 7 of the lesson.*
#
# A window is chosen before anything is read. Quest, MoBA and NSA choose by content: a cheap score for
# every block of keys, and for each block of queries the blocks with the best scores. How good is a cheap
# score? There is an *oracle*: choose by the attention that each block really gets. Nobody can afford it,
# but one can measure against it.
#
# Here is a head of a real model that likes its first token. 512 tokens in blocks of 32; each block of
# queries may read 2 blocks.

# %%
from llmopt_lab.nn import weights
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.sparse_attention.recall import block_mass, layers_inputs, probabilities
from llmopt_lab.sparse_attention.select import mean_scores, quest_scores

lm = weights.load("lab-target", dtype=torch.float32)
text = lm.encode(held_out_documents()["stdlib/zipfile.py"])[:512]
q, k, scale = list(layers_inputs(lm.model, text[None]))[5]
q, k = q[:, 1:2], k[:, 1 // (q.shape[1] // k.shape[1]), None]  # layer 5, head 1, and its KV head
attention = probabilities(q, k, scale=scale)
mass = block_mass(attention, 32, 32, 1)[0, 0]
future = torch.ones(16, 16, dtype=torch.bool, device=q.device).triu(1)
for name, scores in {
    "the two nearest": torch.arange(16.0, device=q.device).expand(16, 16),
    "mean query times mean key": mean_scores(q, k, 32, 32)[0, 0],
    "Quest: an upper bound": quest_scores(q, k, 32, 32)[0, 0],
    "oracle": mass,
}.items():
    chosen = scores.masked_fill(future, -torch.inf).topk(2).indices
    print(f"{name:26} {(mass.gather(1, chosen).sum() / 512):.0%} of the attention")

# %% [markdown]
# Write the measurement. For each block of queries the `n_blocks` blocks of keys with the largest scores
# are chosen, among those that lie in its past or hold its own tokens (all of them, if there are fewer).
# *Recall* is the share of all attention that falls on what was chosen; *best* is that of the oracle's
# choice.
#
# By hand: 4 tokens, blocks of 2, one block each. Queries 2 and 3 put 0.7 and 0.4 on keys 0 and 1. The
# scores prefer block 1, so they catch 0.3 + 0.6 = 0.9 of 2; block 0 holds 1.1. Queries 0 and 1 have one
# block, with everything. Recall is 2.9 / 4, best 3.1 / 4.

# %% nbgrader={"grade_id": "sparse_attention.block_recall", "solution": true}
def block_recall(p: Tensor, scores: Tensor, n_blocks: int, tile: int) -> tuple[float, float]:
    """(recall, best): shares of the attention p on blocks chosen by scores, and by the oracle.

    Args:
        p: (n, n), dense causal attention: every row sums to 1. n is no multiple of `tile`.
        scores: (blocks, blocks), of queries and keys; those of future blocks mean nothing.
        n_blocks: to choose for each block of queries. tile: queries, and keys, of a block.
    """
    ### BEGIN SOLUTION
    caught, most = 0.0, 0.0
    for a, rows in enumerate(tiles(len(p), tile)):
        parts = torch.stack([p[rows, cols].sum() for cols in tiles(len(p), tile)])[: a + 1]
        count = min(n_blocks, a + 1)
        caught += parts[scores[a, : a + 1].topk(count).indices].sum().item()
        most += parts.topk(count).values.sum().item()
    return caught / len(p), most / len(p)
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.block_recall-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("sparse_attention.block_recall", block_recall)

# %% [markdown]
# ## 12. The kernel that skips, in Triton (5 points, 40 minutes)
#
# *Needs section 8 of the lesson.*
#
# One program serves one block of queries of one head, as in flash attention. But it does not walk all
# keys: it walks a *list*. For each block of queries the list names the blocks of keys to visit, the full
# ones first.
#
# ```text
# blocks   3  5  2  6 -1 -1      n_live 4: visit blocks 3, 5, 2, 6
#                                n_full 2: 3 and 5 are full, 2 and 6 need the mask
# ```
#
# All tensors are contiguous: element (h, i, j) of a tensor (A, B, C) is at `(h * B + i) * C + j`. The
# products are `tl.dot(q, tl.trans(k), input_precision="ieee")` and `tl.dot(p, v,
# input_precision="ieee")`. A loop may have a loaded number as its end: `for i in range(0, n_live)`.
#
# For each block the running softmax is that of flash attention:
#
# ```text
# scores = scale * q k^T               -inf for a key past the end, or hidden
# m_new  = max(m, largest score)       one a query
# shrink = exp(m - m_new)
# p      = exp(scores - m_new)
# total  = shrink * total + sum of p
# acc    = shrink * acc + p v
# ```
#
# The mask is filled in only where it is needed, in blocks that are listed and not full. Everywhere else
# it holds rubbish. A full block can still be the last, shorter one: full means that no *key* is hidden.
# And a query may have seen nothing after its first block, or nothing at all: what is `m - m_new` then?
# Such a query's result is 0.
#
# You are graded in float32, on small and uneven shapes, without a GPU. No time is measured; whether a
# block was skipped shows in the result, because what is not listed does not count.

# %% nbgrader={"grade_id": "sparse_attention.sparse_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def sparse_kernel(
    q_ptr,  # (n_heads, n_q, D) float32
    k_ptr, v_ptr,  # (n_heads, n_k, D) float32, each
    blocks_ptr,  # (row_blocks, MOST) int32, shared by all heads; -1 behind the end of a list
    n_full_ptr, n_live_ptr,  # (row_blocks,) int32, each
    mask_ptr,  # (n_q, n_k) int8: 1 where a query sees a key, in listed blocks that are not full
    out_ptr,  # (n_heads, n_q, D) float32; zeros for a query that sees no key
    n_q, n_k,
    scale,  # of the scores
    MOST: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,  # TILE queries, and keys, of a block
):
    """One program: TILE queries of one head against the blocks of keys that are listed for them."""
    head, row_block = tl.program_id(1), tl.program_id(0)
    row = row_block * TILE + tl.arange(0, TILE)  # (TILE,)
    d = tl.arange(0, D)  # (D,)
    at_q = (head * n_q + row[:, None]) * D + d[None, :]  # (TILE, D)
    q = tl.load(q_ptr + at_q, (row < n_q)[:, None], other=0.0)
    m = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    ### BEGIN SOLUTION
    n_full, n_live = tl.load(n_full_ptr + row_block), tl.load(n_live_ptr + row_block)
    for i in range(0, n_live):
        block = tl.load(blocks_ptr + row_block * MOST + i)
        col = block * TILE + tl.arange(0, TILE)  # (TILE,)
        at_k = (head * n_k + col[:, None]) * D + d[None, :]  # (TILE, D)
        k = tl.load(k_ptr + at_k, (col < n_k)[:, None], other=0.0)
        v = tl.load(v_ptr + at_k, (col < n_k)[:, None], other=0.0)
        seen = (row < n_q)[:, None] & (col < n_k)[None, :]
        if i >= n_full:
            at_mask = row[:, None].to(tl.int64) * n_k + col[None, :]
            seen = tl.load(mask_ptr + at_mask, seen, other=0) != 0
        scores = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc + tl.dot(p, v, input_precision="ieee")
        m = m_new
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + at_q, acc, (row < n_q)[:, None])
    ### END SOLUTION


# %% nbgrader={"grade_id": "sparse_attention.sparse_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("sparse_attention.sparse_kernel", sparse_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/5_sparse_attention.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/5_sparse_attention.ipynb` has one answer to each exercise. Yours may look different.
#
# The course's own versions are in `llmopt_lab/sparse_attention`: `patterns.py` for masks as rules,
# `block_lists.py` for covers, `reference.py` for the loop, `rolling_cache.py` for the rolling buffer with
# its positions, `select.py` and `recall.py` for chosen blocks. Its kernel needs no mask in memory at
# all: it works out from the rule which pairs of a partial block count.
