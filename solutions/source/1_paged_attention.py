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
# # Exercises 1: Paged attention
# {{colab_badge}}
#
# You build the parts of a paged KV cache yourself: the arithmetic, the addresses, the allocator,
# sharing, and at the end the kernel that walks the pages. Three of the ten exercises repair code
# from a guide that looks right and is not.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. How many requests fit? | 2 | 8 |
# | 2. Where is token t? | 2 | 8 |
# | 3. Whose pages leaked? | 3 | 15 |
# | 4. The shortage that raises nothing | 2 | 8 |
# | 5. Whose tokens are these? | 3 | 12 |
# | 6. What may a prefix cache reuse? | 2 | 10 |
# | 7. Copy on write | 3 | 15 |
# | 8. Resume after a preemption | 2 | 10 |
# | 9. Which block size? | 2 | 12 |
# | 10. The page walk in Triton | 4 | 30 |
# | together | 25 | 128 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("paged_attention.slot_mapping", 1)` gives the first hint, `2` the
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
from dataclasses import replace

import torch
from torch import Tensor

from llmopt_lab.core.errors import OutOfBlocks, require
from llmopt_lab.core.memory import load
from llmopt_lab.core.trace import recording
from llmopt_lab.grading import hint
from llmopt_lab.paged_attention import CacheConfig, PagedCache
from llmopt_lab.paged_attention.view import frames
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.predict import Predict

# %% [markdown]
# ## 1. How many requests fit? (2 points, 8 minutes)
#
# While a model writes, it keeps a key and a value for each token that it has seen: the KV cache.
# Every layer has keys and values of its own. In *grouped-query attention* (GQA) several query heads
# share one KV head.
#
# Llama-3-8B has 32 layers, 32 query heads, 8 KV heads and `d_head` 128. Its numbers are in
# bfloat16, 2 bytes each. A GPU has 40 GB (40,000,000,000 bytes) left for the cache.

# %%
Predict(
    "How many requests of 4,096 tokens fit in these 40 GB?",
    answer=74,
    unit="requests",
    explain="One such request takes 537 MB. With a key and a value for each query head it would "
    "be four times as much, and 18 would fit.",
)

# %% [markdown]
# Now write the function that says so for any model. Multiply out Llama's numbers by hand first: a
# check is only as good as the number you expect.

# %% nbgrader={"grade_id": "paged_attention.kv_budget", "solution": true}
def kv_budget(
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_head: int,
    itemsize: int,
    n_tokens: int,
    memory: int,
) -> tuple[int, int]:
    """Bytes of KV cache per token, and how many whole requests of `n_tokens` fit in `memory`.

    Args:
        n_heads, n_kv_heads: query heads and KV heads of each layer.
        itemsize: bytes a number takes.
        n_tokens: of each request.
        memory: bytes.
    """
    ### BEGIN SOLUTION
    per_token = 2 * n_layers * n_kv_heads * d_head * itemsize
    return per_token, memory // (per_token * n_tokens)
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.kv_budget-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.kv_budget", kv_budget)

# %% [markdown]
# ## 2. Where is token t? (2 points, 8 minutes)
#
# A paged cache is cut into *blocks* of `block_size` tokens. A request holds some of them, in any
# order. Its *block table* says which: `table[i]` is the physical block of its logical block `i`.
#
# All blocks together are one long row of *slots*. Block `b` has the slots from `b * block_size` on.
#
# Take blocks of 4 tokens and a request with the table `[7, 2, 5]`:
#
# ```text
# token     0   1   2   3 |  4   5   6   7 |  8   9
# logical         0       |        1       |    2
# physical        7       |        2       |    5
# slot     28  29  30  31 |  8   9  10  11 | 20  21
# ```
#
# Token 6 is in logical block 1, at offset 2. Logical block 1 is physical block 2, which starts at
# slot 8. So token 6 is in slot 10. Check token 9 yourself before you go on.
#
# When a request has 5 tokens in the cache and gets 3 more, the kernel that writes them needs the
# slots of tokens 5, 6 and 7: `start` is 5 and `n_tokens` is 3.

# %% nbgrader={"grade_id": "paged_attention.slot_mapping", "solution": true}
def slot_mapping(table: list[int], start: int, n_tokens: int, block_size: int) -> Tensor:
    """The slots of the `n_tokens` tokens from token `start` on, (n_tokens,) int64.

    Args:
        table: physical block of each logical block. It may be longer than needed.
    """
    ### BEGIN SOLUTION
    positions = torch.arange(start, start + n_tokens)
    physical = torch.tensor(table)[positions // block_size]
    return physical * block_size + positions % block_size
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.slot_mapping-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.slot_mapping", slot_mapping)

# %% [markdown]
# ## 3. Whose pages leaked? (3 points, 15 minutes)
#
# The class below is from a guide to production systems, word for word. It says *page* for block.
# The guide promises that it will "allocate pages as sequence grows". Read `allocate_pages` before
# you go on.

# %% nbgrader={"grade_id": "paged_attention.page_allocator-guide", "locked": true}
class PagedAttention:
    def __init__(self, page_size=16, num_pages=1000):
        """
        page_size: Tokens per page (e.g., 16)
        num_pages: Total pages in pool
        """
        self.page_size = page_size
        self.num_pages = num_pages
        self.page_pool = [None] * num_pages  # Pool of free pages
        self.allocated_pages = {}  # request_id -> [page_ids]

    def allocate_pages(self, request_id, num_tokens):
        """Allocate pages for request"""
        num_pages_needed = (num_tokens + self.page_size - 1) // self.page_size

        # Find free pages
        allocated = []
        for i, page in enumerate(self.page_pool):
            if page is None and len(allocated) < num_pages_needed:
                self.page_pool[i] = request_id
                allocated.append(i)

        self.allocated_pages[request_id] = allocated
        return allocated

    def free_pages(self, request_id):
        """Free pages when request completes"""
        if request_id in self.allocated_pages:
            for page_id in self.allocated_pages[request_id]:
                self.page_pool[page_id] = None
            del self.allocated_pages[request_id]

    def get_kv_cache(self, request_id, page_ids):
        """Retrieve KV cache from pages"""
        kv_cache = []
        for page_id in page_ids:
            kv_cache.append(self.get_page(page_id))
        return torch.cat(kv_cache, dim=1)  # Concatenate pages


# %% [markdown]
# A request writes 512 tokens. Each time a page is full it asks for one more page of 16 tokens, 32
# times in all. Then it is done and gives its pages back.

# %%
leak = Predict("How many of the 32 pages are still taken after that?", unit="pages")
leak

# %%
guide = PagedAttention(page_size=16, num_pages=1000)
for _ in range(32):
    guide.allocate_pages("A", 16)
guide.free_pages("A")
n_leaked = sum(owner is not None for owner in guide.page_pool)
print(f"{n_leaked} of 32 pages are still taken, and no list names them")
leak.reveal(n_leaked)

# %% [markdown]
# Which line lost them? Write an allocator that keeps its promise. `num_tokens` is now the number of
# tokens the request has *in all*, so a growing request calls `allocate_pages("A", 16)`, then
# `allocate_pages("A", 17)`. Two rules hold at any time:
#
# - every page is free, or in exactly one list of `allocated_pages`: *free + held = all*;
# - a page that a request holds stays where it is in its list, because tokens are in it.
#
# There are always enough pages in this exercise. What happens when there are not is the next one.

# %% nbgrader={"grade_id": "paged_attention.page_allocator", "solution": true}
class PageAllocator(PagedAttention):
    def allocate_pages(self, request_id: str, num_tokens: int) -> list[int]:
        """Pages for `num_tokens` tokens in all. Returns all pages of the request, in order."""
        ### BEGIN SOLUTION
        mine = self.allocated_pages.setdefault(request_id, [])
        missing = (num_tokens + self.page_size - 1) // self.page_size - len(mine)
        unused = [i for i, owner in enumerate(self.page_pool) if owner is None]
        for page_id in unused[: max(missing, 0)]:
            self.page_pool[page_id] = request_id
            mine.append(page_id)
        return mine
        ### END SOLUTION

    def free_pages(self, request_id: str) -> None:
        """Give back all pages of a request.

        Raises:
            BadInput: there is no such request. `require(condition, message)` raises it.
        """
        ### BEGIN SOLUTION
        require(
            request_id in self.allocated_pages,
            f"request {request_id!r} holds no pages; was it freed before?",
        )
        for page_id in self.allocated_pages.pop(request_id):
            self.page_pool[page_id] = None
        ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.page_allocator-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("paged_attention.page_allocator", PageAllocator)

# %% [markdown]
# ## 4. The shortage that raises nothing (2 points, 8 minutes)
#
# Now there are too few pages. This is the loop of the guide's `allocate_pages`, as a function. Ten
# pages are free and somebody asks for 13. What will it return? And to the next one, who asks for 1?

# %%
def guides_take_pages(page_pool, request_id, num_pages):
    allocated = []
    for i, page in enumerate(page_pool):
        if page is None and len(allocated) < num_pages:
            page_pool[i] = request_id
            allocated.append(i)
    return allocated


page_pool = [None] * 10
print("A asks for 13 pages:", guides_take_pages(page_pool, "A", 13))
print("B asks for  1 page: ", guides_take_pages(page_pool, "B", 1))

# %% [markdown]
# A believes that it has 13 pages and writes 208 tokens into 160 slots. B has none and no idea. And
# nobody can help them, for nobody was told.
#
# An allocator for a server is *all or nothing*: a request gets all that it asks for, or
# `OutOfBlocks` is raised and *nothing has changed*. Then a scheduler can preempt somebody and ask
# again.

# %% nbgrader={"grade_id": "paged_attention.take_pages", "solution": true}
def take_pages(page_pool: list[str | None], request_id: str, num_pages: int) -> list[int]:
    """Mark `num_pages` free pages as those of `request_id`; return their numbers.

    Args:
        page_pool: owner of each page, None if it is free. Changed in place.
        request_id: it may own pages already, and keeps them.

    Raises:
        OutOfBlocks: there are not enough free pages. `page_pool` is as it was.
        BadInput: request_id is None, the mark of a free page.
    """
    ### BEGIN SOLUTION
    require(request_id is not None, "request_id must be a name; None marks a free page")
    unused = [i for i, owner in enumerate(page_pool) if owner is None]
    if len(unused) < num_pages:
        raise OutOfBlocks(f"{num_pages} pages needed, {len(unused)} free: preempt somebody")
    for page_id in unused[:num_pages]:
        page_pool[page_id] = request_id
    return unused[:num_pages]
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.take_pages-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.take_pages", take_pages)

# %% [markdown]
# ## 5. Whose tokens are these? (3 points, 12 minutes)
#
# The guide's `get_kv_cache` reads whole pages and joins them. It does not know how many tokens the
# request has. With 17 tokens in pages of 16 it returns 32:
#
# ```text
# block 3   A0 A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12 A13 A14 A15
# block 8   A16 X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13 X14 X15
# ```
#
# What are the X? Whatever an earlier request left in that block. They enter the softmax of A with
# all their weight: A's answer is wrong, and it depends on somebody else's conversation.
#
# Would it help to fill free blocks with zeros? Think about it before you read on: what weight does
# a key of zeros get in a softmax?
#
# Write a gather that returns A's tokens, all of them, in order, and nothing else. You read memory
# with `load(name, tensor, where)`, which returns `tensor[where]` and counts the bytes:
#
# - `load("table", table, i)` is entry `i` of the table, a tensor: `int(...)` makes it a number;
# - `load("K", cache, (block, slice(0, 3)))` are the first three slots of a block.
#
# Decoding is limited by the bytes it reads, so you are graded on them: 4 bytes of the table for
# each block that holds tokens of A, and each token of A exactly once.

# %% nbgrader={"grade_id": "paged_attention.gather_tokens", "solution": true}
def gather_tokens(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The tokens of one request, (length, n_kv_heads, d_head).

    Args:
        cache: (n_blocks, block_size, n_kv_heads, d_head), the pool of all requests.
        table: (max_blocks,) int32. Entries past the request's last block mean nothing.
        length: tokens of the request, at least 1.
    """
    block_size = cache.shape[1]
    ### BEGIN SOLUTION
    parts = []
    for logical, first in enumerate(range(0, length, block_size)):
        block = int(load("table", table, logical))
        filled = slice(0, min(block_size, length - first))
        parts.append(load("K", cache, (block, filled)))
    return torch.cat(parts)
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.gather_tokens-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("paged_attention.gather_tokens", gather_tokens)

# %% [markdown]
# ## 6. What may a prefix cache reuse? (2 points, 10 minutes)
#
# *Needs section 4 of the lesson.*
#
# Many prompts begin alike: the same system prompt, the same document. Their first blocks hold the
# same keys and values, so they may share them.
#
# A server finds such blocks by name. The name of a *full* block is a digest of its tokens and of
# the name of the block before it, its parent:
#
# ```text
# prompt     [ the  cat  sat  on ] [ a  mat  and  it ] [ purrs ]
# name       d0 = digest("", ...)  d1 = digest(d0, ...)  none: not full
# ```
#
# Why the parent? Keys and values of `a mat and it` depend on all tokens before them. Behind another
# sentence they are other numbers.

# %%
Predict(
    "Blocks of 16 tokens. A prompt of exactly 32 tokens comes a second time. "
    "How many of its tokens can be reused?",
    answer="16",
    choices=["32", "31", "16"],
    explain="The logits after the last token say how the answer begins, so that token must be "
    "computed; and whole blocks are shared, so the block around it is computed with it.",
)

# %% [markdown]
# The answer is the bug of a real server ([nano-vllm, issue
# 114](https://github.com/GeeeekExplorer/nano-vllm/issues/114)): with every token reused, the input of
# the model had length 0 and the kernel crashed, but only for prompts that fill their last block.

# %% nbgrader={"grade_id": "paged_attention.reusable_tokens", "solution": true}
def reusable_tokens(
    prompt: list[int], cached: set[str], block_size: int, digest: Callable[[str, list[int]], str]
) -> int:
    """The number of leading tokens of `prompt` that need not be computed. Blocks are reused whole.

    Args:
        prompt: at least one token. At least one of them must be left to compute.
        cached: the names of all blocks in the cache.
        digest: digest(parent, tokens) names a full block; the first block's parent is "".
    """
    ### BEGIN SOLUTION
    n_hits, parent = 0, ""
    for first in range(0, len(prompt) - block_size, block_size):
        parent = digest(parent, prompt[first : first + block_size])
        if parent not in cached:
            break
        n_hits += 1
    return n_hits * block_size
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.reusable_tokens-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.reusable_tokens", reusable_tokens)

# %% [markdown]
# ## 7. Copy on write (3 points, 15 minutes)
#
# You ask for several answers to one prompt. They share the blocks of the prompt until they write
# something different. A block knows how many tables hold it: its *owners*.
#
# Below, A has 6 tokens and B is forked from it. Then each of them writes one token. Before you step
# through it: how many blocks get copied?

# %%
with recording() as trace:
    cache = PagedCache(CacheConfig(n_layers=1, n_blocks=4, block_size=4, n_kv_heads=1, d_head=2))
    cache.append("A", torch.ones(6, 1, 2), torch.ones(6, 1, 2))
    cache.fork("A", "B")
    cache.append("B", torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    cache.append("A", torch.ones(1, 1, 2), torch.ones(1, 1, 2))
pictures = frames(trace, n_blocks=4, block_size=4)
pictures = [replace(picture, file=None, line=None) for picture in pictures]  # no source: you write it
Player(pictures, title="B writes what it shares")

# %% [markdown]
# One: B copies the block before it writes, and after that A is the only owner of the other one.
#
# Write the function that appends a token. You work on a `PagedCache`, whose own `append` is taken
# away:
#
# | | |
# |---|---|
# | `cache.tables[seq]` | list of the physical blocks of `seq` |
# | `cache.lengths[seq]` | number of its tokens |
# | `cache.config.block_size`, `cache.config.n_layers` | sizes |
# | `cache.pool.owners[block]` | number of tables that hold the block |
# | `cache.pool.allocate(n)` | a list of `n` new blocks, each with one owner |
# | `cache.pool.release(block)` | one owner less |
# | `cache.keys`, `cache.values` | (n_layers, n_blocks, block_size, n_kv_heads, d_head) |
#
# If your tables go another way than they should, the check shows both runs side by side, opened
# where they part.

# %% nbgrader={"grade_id": "paged_attention.append_token", "solution": true}
def append_token(cache: PagedCache, seq: str, keys: Tensor, values: Tensor) -> None:
    """Write one token at the end of `seq`, which has at least one. No other sequence may notice.

    Args:
        keys, values: (n_layers, n_kv_heads, d_head), of the new token.
    """
    ### BEGIN SOLUTION
    table, offset = cache.tables[seq], cache.lengths[seq] % cache.config.block_size
    if offset == 0:
        table += cache.pool.allocate(1)
    elif cache.pool.owners[table[-1]] > 1:
        source, (fresh,) = table[-1], cache.pool.allocate(1)
        cache.keys[:, fresh] = cache.keys[:, source]
        cache.values[:, fresh] = cache.values[:, source]
        cache.pool.release(source)
        table[-1] = fresh
    cache.keys[:, table[-1], offset] = keys
    cache.values[:, table[-1], offset] = values
    cache.lengths[seq] += 1
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.append_token-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("paged_attention.append_token", append_token)

# %% [markdown]
# ## 8. Resume after a preemption (2 points, 10 minutes)
#
# *Needs section 4 of the lesson.*
#
# When blocks run out, the scheduler takes all blocks from the youngest request and lets it wait.
# Later the request gets new blocks, and what was lost is computed again. If its beginning is in the
# prefix cache, that part is reused.
#
# By hand, with blocks of 4: the prompt is `p0 ... p5`, and `g0 g1 g2` were generated before the
# preemption. The first block, `p0 p1 p2 p3`, is in the prefix cache: `n_reused` is 4. The new table
# is `[6, 1, 3]`.
#
# ```text
# position   0   1   2   3 |  4   5   6   7 |  8
# token     p0  p1  p2  p3 | p4  p5  g0  g1 | g2
# slot      reused: 24..27 |  4   5   6   7 | 12
# ```
#
# One pass of the model over `p4 p5 g0 g1 g2` computes what is missing, and the logits after `g2`
# give the next token. `g2` was sampled before the preemption but never computed, so it has never had
# keys and values.
#
# Real servers got this wrong. One planned the pass before it knew what the prefix cache would reuse
# and read past the end of its table ([nano-vllm, pull request
# 211](https://github.com/GeeeekExplorer/nano-vllm/pull/211)); one threw the new token away
# ([217](https://github.com/GeeeekExplorer/nano-vllm/pull/217)). Other mistakes crash nothing: the text
# just changes.

# %% nbgrader={"grade_id": "paged_attention.plan_resume", "solution": true}
def plan_resume(
    prompt: list[int], generated: list[int], table: list[int], n_reused: int, block_size: int
) -> tuple[list[int], Tensor, Tensor]:
    """What the model must compute so that a preempted request can go on.

    Args:
        table: the request's new block table; its first n_reused / block_size blocks are shared.
        n_reused: leading tokens whose keys and values are in the cache.

    Returns:
        tokens: to feed to the model; the logits after the last one give the next new token.
        positions: of these tokens, (n,) int64, counted from the start of the request.
        slots: where their keys and values go, (n,) int64.
    """
    ### BEGIN SOLUTION
    known = prompt + generated
    positions = torch.arange(n_reused, len(known))
    physical = torch.tensor(table)[positions // block_size]
    return known[n_reused:], positions, physical * block_size + positions % block_size
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.plan_resume-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.plan_resume", plan_resume)

# %% [markdown]
# ## 9. Which block size? (2 points, 12 minutes)
#
# The guide says that pages "eliminate fragmentation". Yet the last block of each request may be partly
# empty. Say that lengths are random and blocks have `b` slots: the last block holds 1, 2, ... or `b`
# tokens, each equally often.

# %%
Predict(
    "How many slots of a request are unused on average?",
    answer="(b - 1) / 2",
    choices=["b / 2", "(b - 1) / 2", "b - 1"],
    explain="0, 1, ... or b - 1 slots are unused, each equally often.",
)

# %% [markdown]
# So why not `b = 1`, which wastes nothing? Because every block needs an entry in the block table, 4
# bytes, which is stored, sent to the GPU and looked up by the kernel.
#
# By hand: a request of 17 tokens in blocks of 16 has 2 blocks, 15 unused slots and 8 bytes of table.
# With 12 bytes a token its overhead is 15 * 12 + 8 = 188 bytes.
#
# Write the function that counts the overhead and picks the best size.

# %% nbgrader={"grade_id": "paged_attention.choose_block_size", "solution": true}
def choose_block_size(
    lengths: list[int], sizes: list[int], bytes_per_token: int, max_blocks: int
) -> tuple[int, int]:
    """The block size of least overhead, and that overhead in bytes, over all requests.

    Args:
        lengths: tokens of each request, at least 1.
        sizes: the block sizes to choose from; at least one of them keeps to `max_blocks`.
        max_blocks: the most blocks that one request may have.

    The overhead is the bytes of all slots that hold no token, and 4 bytes of table a block.
    """
    ### BEGIN SOLUTION
    best = None
    for size in sizes:
        counts = [-(-n // size) for n in lengths]
        unused = sum(counts) * size - sum(lengths)
        overhead = unused * bytes_per_token + 4 * sum(counts)
        if max(counts) <= max_blocks and (best is None or overhead < best[1]):
            best = (size, overhead)
    return best
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.choose_block_size-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("paged_attention.choose_block_size", choose_block_size)

# %% [markdown]
# ## 10. The page walk in Triton (4 points, 30 minutes)
#
# *Needs section 5 of the lesson.*
#
# One decode step: each sequence has one new query for each head and attends to all its tokens. The
# kernel reads keys and values where they are, block by block. Nothing is gathered first.
#
# Each program serves one query head of one sequence. It walks the block table and keeps a running
# softmax, as the reference does:
#
# ```text
# m, total, acc = -inf, 0, 0               acc has D numbers
# for each block of the sequence:
#     scores = scale * (k @ q)             one a token; a slot without a token gets -inf
#     m_new  = max(m, largest score)
#     shrink = exp(m - m_new)              rescales what was summed relative to the old m
#     p      = exp(scores - m_new)
#     total  = shrink * total + sum of p
#     acc    = shrink * acc + p @ v
#     m      = m_new
# out = acc / total
# ```
#
# All tensors are contiguous, so addresses follow from the shapes: element (i, j, k) of a tensor
# (A, B, C) is at `(i * B + j) * C + k`. The sum of a product does for `k @ q`: `tl.sum(k * q, axis=1)`.
#
# Three questions to answer before you write. Which KV head does query head 5 read, with 8 query
# heads and 2 KV heads? What must the last block of a sequence not do? What is `total` of a sequence
# of length 0?
#
# You are graded in float32, on small and uneven shapes. You need no GPU: without one Triton
# interprets your kernel on the CPU. What belongs to no token is NaN there, so you will notice if
# you read it.

# %% nbgrader={"grade_id": "paged_attention.decode_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    q_ptr,  # (batch, N_HEADS, D) float32
    k_ptr, v_ptr,  # (n_blocks, BLOCK_SIZE, N_KV_HEADS, D) float32, each
    table_ptr,  # (batch, max_blocks) int32; entries past the last block mean nothing
    length_ptr,  # (batch,) int32, may be 0
    out_ptr,  # (batch, N_HEADS, D) float32; zeros for length 0
    max_blocks,
    scale,  # of the scores
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
):
    """One program: attention of one query head of one sequence over its paged tokens."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(length_ptr + seq)
    d = tl.arange(0, D)
    offset = tl.arange(0, BLOCK_SIZE)
    q = tl.load(q_ptr + (seq * N_HEADS + head) * D + d)  # (D,)
    m = -float("inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    ### BEGIN SOLUTION
    kv_head = head // (N_HEADS // N_KV_HEADS)
    for logical in range(0, tl.cdiv(length, BLOCK_SIZE)):
        block = tl.load(table_ptr + seq * max_blocks + logical).to(tl.int64)
        filled = logical * BLOCK_SIZE + offset < length  # (BLOCK_SIZE,)
        rows = ((block * BLOCK_SIZE + offset) * N_KV_HEADS + kv_head) * D
        k = tl.load(k_ptr + rows[:, None] + d, filled[:, None], other=0.0)
        v = tl.load(v_ptr + rows[:, None] + d, filled[:, None], other=0.0)
        scores = tl.where(filled, scale * tl.sum(k * q, axis=1), -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=0))
        shrink = tl.exp(m - m_new)
        p = tl.exp(scores - m_new)
        total = shrink * total + tl.sum(p, axis=0)
        acc = shrink * acc + tl.sum(p[:, None] * v, axis=0)
        m = m_new
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (seq * N_HEADS + head) * D + d, out)
    ### END SOLUTION


# %% nbgrader={"grade_id": "paged_attention.decode_kernel-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("paged_attention.decode_kernel", decode_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/1_paged_attention.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/1_paged_attention.ipynb` has one answer to each exercise. Yours may look different.
#
# The kernel of this course does the same walk as yours, with all query heads of a KV head in one
# program and long sequences split among several: `llmopt_lab/paged_attention/kernels.py`. Your
# running softmax is the heart of chapter 2, flash attention, which explains why it is right.
