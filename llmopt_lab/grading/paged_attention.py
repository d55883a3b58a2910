"""The checks of chapter 1. Each knows what the usual mistakes give, and names the one it sees."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from types import NoneType

import torch
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.errors import OutOfBlocks
from llmopt_lab.core.memory import Load, ceil_div
from llmopt_lab.core.trace import Trace, first_divergence, record, recording
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect,
    expect_kernel,
    expect_no_nan,
    expect_numbers,
    expect_or_name,
    expect_parts,
    expect_same_run,
    launched,
)
from llmopt_lab.paged_attention.cases import decode_inputs, decode_oracle
from llmopt_lab.paged_attention.records import Allocated, CacheConfig, CopiedOnWrite, Extended
from llmopt_lab.paged_attention.reference import PagedCache
from llmopt_lab.paged_attention.view import frames
from llmopt_lab.widgets.panels import Frame

TABLE_ENTRY = 4  # bytes: block tables are int32


# 1. The KV cache in bytes


@exercise(
    "paged_attention.kv_budget",
    points=2,
    minutes=8,
    hints=(
        "Follow one token through the model. In every layer it leaves a key and a value behind, "
        "for each KV head, d_head numbers each. Multiply, then turn numbers into bytes.",
        "bytes per token = 2 * n_layers * n_kv_heads * d_head * itemsize. A request takes n_tokens "
        "times as much, and only whole requests count: use //.",
    ),
)
def _(kv_budget):
    # layers, query heads, KV heads, d_head, bytes a number, tokens, memory
    shapes = [
        ("SmolLM2-135M in float32", 30, 9, 3, 64, 4, 2_000, 10**9),
        ("Llama-3-8B in bfloat16", 32, 32, 8, 128, 2, 4_096, 40 * 10**9),
        ("a 24-layer model in int8", 24, 16, 16, 80, 1, 700, 2 * 10**9),
    ]
    for name, n_layers, n_heads, n_kv_heads, d_head, itemsize, n_tokens, memory in shapes:
        got = kv_budget(n_layers, n_heads, n_kv_heads, d_head, itemsize, n_tokens, memory)
        expect_parts(got, "bytes per token", "number of requests")
        numbers = n_layers * n_kv_heads * d_head
        per_token = 2 * numbers * itemsize
        expect_or_name(
            f"{name}: bytes per token", got[0], per_token,
            "take the factors one by one: keys and values, layers, KV heads, width, bytes",
            [
                ("forgets-keys-or-values", numbers * itemsize,
                 "a token leaves a key AND a value behind"),
                ("counts-query-heads", 2 * n_layers * n_heads * d_head * itemsize,
                 "queries are not cached; how many heads have keys? In grouped-query attention "
                 "several query heads read one KV head"),
                ("forgets-the-layers", per_token // n_layers,
                 "every layer has keys and values of its own"),
                ("counts-numbers-not-bytes", 2 * numbers, "a number takes itemsize bytes"),
                ("counts-bits", 8 * per_token, "itemsize is in bytes already: no 8 here"),
            ],
        )  # fmt: skip
        n_requests = memory // (per_token * n_tokens)
        expect_or_name(
            f"{name}: the number of requests", got[1], n_requests,
            "divide the memory by the bytes of a request",
            [
                ("rounds-up", n_requests + 1,
                 "the last one has memory for a part of its tokens only: it does not fit"),
                ("keeps-the-fraction", memory / (per_token * n_tokens),
                 "no server runs three quarters of a request: round down, with //"),
                ("counts-tokens-not-requests", memory // per_token,
                 "that many TOKENS fit; a request has n_tokens of them"),
            ],
        )  # fmt: skip


# 2. Where a token is


@exercise(
    "paged_attention.slot_mapping",
    points=2,
    minutes=8,
    hints=(
        "Do it for one token by hand. Token t is in logical block t // block_size, at offset "
        "t % block_size. The table turns the logical block into a physical one.",
        "positions = torch.arange(start, start + n_tokens); "
        "torch.tensor(table)[positions // block_size] are their physical blocks.",
    ),
)
def _(slot_mapping):
    # the first case starts at 0; every table has a block that is not used yet
    cases = [
        ([5, 2, 7, 1], 0, 8, 3),
        ([9, 4, 1, 6, 0], 5, 8, 4),
        ([3, 8], 4, 1, 4),
        ([2, 0, 1], 3, 3, 2),
        ([30, 11], 0, 17, 16),
    ]
    for table, start, n_tokens, block_size in cases:
        call = f"slot_mapping({table}, {start}, {n_tokens}, {block_size})"
        got = slot_mapping(list(table), start, n_tokens, block_size)
        tokens = torch.arange(start, start + n_tokens)
        slots = partial(_slots, table, block_size=block_size)
        wrapped = torch.tensor(table)[(tokens % block_size) % len(table)]
        blocks = torch.tensor(table)[tokens // block_size]
        expect_or_name(
            call, got, slots(tokens), "work out the first wrong token by hand: block, then offset",
            [
                ("uses-logical-block-numbers", tokens,
                 "that is where the tokens would be without paging. Logical block 0 is in physical "
                 f"block table[0] == {table[0]}"),
                ("swaps-block-and-offset", wrapped * block_size + tokens // block_size,
                 "// gives the block and % the offset within it, not the other way round"),
                ("forgets-the-block-size", blocks + tokens % block_size,
                 "physical block b starts at slot b * block_size, not at slot b"),
                ("ignores-the-start", slots(torch.arange(n_tokens)),
                 "the first slot wanted is that of token `start`, not of token 0"),
                ("takes-the-count-for-the-end", slots(torch.arange(start, max(n_tokens, start))),
                 "n_tokens is how many there are; the last one is start + n_tokens - 1"),
                ("next-block-too-early",
                 _blocks_of(table, (tokens + 1) // block_size) * block_size + tokens % block_size,
                 f"token {block_size - 1} is still in the first block: count tokens from 0"),
                ("next-block-too-late",
                 _blocks_of(table, (tokens - 1) // block_size) * block_size + tokens % block_size,
                 f"token {block_size} is the first of the second block: count tokens from 0"),
                ("slots-are-no-integers", slots(tokens).float(),
                 "slots are indices: / gives floats, // gives integers"),
            ],
            dtype=torch.int64,
        )  # fmt: skip


def _slots(table: list[int], tokens: Tensor, *, block_size: int) -> Tensor:
    return _blocks_of(table, tokens // block_size) * block_size + tokens % block_size


def _blocks_of(table: list[int], logical: Tensor) -> Tensor:
    """Physical blocks; an index past the table wraps around, for it is a mistake's."""
    return torch.tensor(table)[logical % len(table)]


# 3. The guide's allocator: growth


@exercise(
    "paged_attention.page_allocator",
    points=3,
    minutes=15,
    hints=(
        "Which line forgets what a request had? How many pages does it hold already, and how many "
        "does it need in all? Only the difference is new.",
        "held = self.allocated_pages.setdefault(request_id, []); missing = -(-num_tokens // "
        "self.page_size) - len(held). Append `missing` free pages to held. In free_pages, look "
        "whether the request is there before anything else.",
    ),
)
def _(allocator):
    pages = allocator(page_size=4, num_pages=12)
    got = pages.allocate_pages("A", 9)
    _expect_pages(pages, "after allocate_pages('A', 9), with pages of 4 tokens", {"A": 3})
    expect("what allocate_pages('A', 9) returns", got, pages.allocated_pages["A"],
           "return all pages of the request, in order")  # fmt: skip
    first = list(got)
    got = pages.allocate_pages("A", 10)
    _expect_pages(pages, "A had 3 pages for 9 tokens; after allocate_pages('A', 10)", {"A": 3})
    expect("A's pages after one more token", pages.allocated_pages["A"], first,
           "its tokens are in the pages that it had: they must stay")  # fmt: skip
    pages.allocate_pages("A", 13)
    _expect_pages(pages, "after allocate_pages('A', 13)", {"A": 4})

    # a request that goes away leaves its place in front of one that grows
    pages = allocator(page_size=4, num_pages=12)
    pages.allocate_pages("gone", 4)
    before = list(pages.allocate_pages("A", 8))
    pages.free_pages("gone")
    _expect_pages(pages, "after free_pages('gone')", {"A": 2})
    got = pages.allocate_pages("A", 12)
    expect("A's first pages after it grew", pages.allocated_pages["A"][:2], before,
           "A's keys and values are in its old pages. Nobody copies them: append to the list",
           misconception="moves-written-pages")  # fmt: skip
    expect("what allocate_pages('A', 12) returns", got, pages.allocated_pages["A"],
           "return all pages of the request, the old ones first",
           misconception="returns-only-new-pages")  # fmt: skip

    for name, call in (("A", "a second free_pages('A')"), ("B", "free_pages('B'), never seen,")):
        if name == "A":
            pages.free_pages("A")
            _expect_pages(pages, "after free_pages('A')", {})
        pages.allocate_pages("C", 20)  # takes over what A left
        try:
            pages.free_pages(name)
        except (KeyError, ValueError):
            pass
        else:
            held = sum(owner is not None for owner in pages.page_pool)
            lost = f" and took pages from C, which has {held} of 5 left" if held != 5 else ""
            raise NotYet(
                f"{call} raised nothing{lost}",
                misconception="ignores-an-unknown-request",
                hint="freeing what is not held is a bug of the caller's; silence hides it. Raise a "
                "BadInput, with require(request_id in self.allocated_pages, ...)",
            )
        _expect_pages(pages, f"after {call}", {"C": 5})
    _expect_conservation(allocator)


def _expect_conservation(allocator) -> None:
    """After each of many random operations every page is free or in exactly one table."""
    rng = random.Random(7)
    pages, lengths = allocator(page_size=4, num_pages=64), {}
    for _ in range(300):
        name = rng.choice("ABCDE")
        if name in lengths and rng.random() < 0.2:
            pages.free_pages(name)
            del lengths[name]
            what = f"free_pages({name!r})"
        else:
            lengths[name] = min(lengths.get(name, 0) + rng.randrange(1, 9), 48)
            pages.allocate_pages(name, lengths[name])
            what = f"allocate_pages({name!r}, {lengths[name]})"
        held = {name: ceil_div(n, 4) for name, n in lengths.items()}
        _expect_pages(pages, f"after {len(lengths)} requests grew and went, at {what}", held)


def _expect_pages(pages, when: str, held: dict[str, int]) -> None:
    """Each request holds so many pages, marked as its own, and all others are free."""
    tables, pool = pages.allocated_pages, pages.page_pool
    for name, n in held.items():
        table, marked = tables.get(name, []), [i for i, owner in enumerate(pool) if owner == name]
        if len(marked) > len(table):
            raise NotYet(
                f"{when}: {len(marked)} pages are marked as {name}'s, its list has {len(table)}. "
                f"{len(marked) - len(table)} can never be freed",
                misconception="forgets-the-old-pages",
                hint="the list is replaced where it should be extended",
            )
        got, want, what = len(table), n, f"{when}: the number of {name}'s pages"
        expect_or_name(
            what, got, want, "it needs ceil(num_tokens / page_size) pages in all",
            [
                ("rounds-down", n - 1, "a last page that is only partly filled is a page, too"),
                ("asks-for-the-total-again", 2 * n,
                 "num_tokens counts all tokens of the request, also those that have a page"),
                ("takes-a-page-a-call", n + 1,
                 "the last page has room for one more token: no new page is needed"),
            ],
        )  # fmt: skip
        if sorted(table) != marked:
            raise NotYet(
                f"{when}: {name}'s list is {table}, but its marks in page_pool are {marked}",
                misconception="list-and-pool-disagree",
                hint="whoever appends a page to the list also marks it in page_pool, once",
            )
    for name in tables:
        if name not in held:
            raise NotYet(
                f"{when}: {name} is gone, but still in allocated_pages",
                misconception="keeps-the-list-of-the-dead",
                hint="delete the list too, or a second free gives back pages that others own now",
            )
    taken, want = sum(owner is not None for owner in pool), sum(held.values())
    expect(f"{when}: pages taken", taken, want, "free + held must always be all pages",
           misconception="pages-get-lost")  # fmt: skip


# 4. The shortage that raises nothing


@exercise(
    "paged_attention.take_pages",
    points=2,
    minutes=8,
    hints=(
        "Two steps: look, then act. First make the list of all free pages, changing nothing.",
        "free = [i for i, owner in enumerate(page_pool) if owner is None]. If it is shorter than "
        "num_pages, raise OutOfBlocks; nothing has been marked yet, so nothing needs undoing.",
    ),
)
def _(take_pages):
    pool = ["A", None, "B", None, None, "A", None]
    for asked in (2, 4, 0):  # 4: exactly all that are free
        after = list(pool)
        try:
            got = take_pages(after, "A", asked)
        except OutOfBlocks as error:
            raise NotYet(
                f"4 pages are free and A asks for {asked}: refused with {error!r}",
                misconception="refuses-the-last-page",
                hint="the pool may become empty: refuse only if MORE pages are asked for than free",
            ) from error
        expect(f"the number of pages A gets, asking for {asked} of 4 free ones",
               len(got) if isinstance(got, (list, tuple)) else got, asked,
               "return the list of the pages taken",
               misconception="returns-another-number")  # fmt: skip
        _expect_kept(pool, after, got)
        expect("the owners of the new pages", [after[i] for i in got], ["A"] * asked,
               "mark each page in page_pool, or the next request gets it too",
               misconception="forgets-to-mark")  # fmt: skip
    after = list(pool)
    try:
        got = take_pages(after, "A", 5)
    except OutOfBlocks:
        _expect_kept(pool, after, [])
        expect("after the refusal page_pool", after, pool,
               "pages were marked before it was clear that there are enough. Count first",
               misconception="keeps-a-partial-grant")  # fmt: skip
    except NotImplementedError:
        raise
    except Exception as error:
        raise NotYet(
            f"5 pages asked for, 4 free: your code raised {type(error).__name__}, "
            "expected OutOfBlocks",
            misconception="raises-something-else",
            hint="a scheduler catches OutOfBlocks and preempts somebody; another exception ends it",
        ) from error
    else:
        few = isinstance(got, (list, tuple)) and len(got) > 0
        raise NotYet(
            f"5 pages asked for, 4 free: you return {got!r} and raise nothing",
            misconception="grants-fewer-than-asked" if few else "returns-instead-of-raising",
            hint="the caller writes 5 pages of tokens: raise OutOfBlocks, so that it cannot go on"
            if few
            else "an empty answer looks like an answer; callers forget to test for it. Raise",
        )
    try:
        take_pages(list(pool), None, 1)
    except (ValueError, TypeError):
        return
    raise NotYet(
        "take_pages(page_pool, None, 1) raised nothing",
        misconception="none-is-a-free-page",
        hint="None marks a free page, so a request called None gets pages that still count as "
        "free, and so does the next request: refuse that name with require(...)",
    )


def _expect_kept(before: list, after: list, new: Sequence[int]) -> None:
    """Whoever had a page has it still."""
    expect("the number of entries in page_pool", len(after), len(before),
           "change entries, not the length of the list")  # fmt: skip
    for page, (was, now) in enumerate(zip(before, after, strict=True)):
        if was is not None and now != was:
            own = was == "A" and now is None
            raise NotYet(
                f"page {page} belonged to {was!r} before, and to {now!r} afterwards",
                misconception="rolls-back-too-much" if own else "takes-what-is-taken",
                hint="A held that page before it asked: a refusal must not take it away"
                if own
                else "only entries that are None are free",
            )


# 5. Whose tokens are these?


@exercise(
    "paged_attention.gather_tokens",
    points=3,
    minutes=12,
    hints=(
        "Only the last block of a request may be partly filled. How many of its slots hold tokens "
        "of this request? Mind a length that is a multiple of the block size.",
        "For logical block i: block = int(load('table', table, i)), and it holds "
        "min(block_size, length - i * block_size) tokens of the request. Load only those: "
        "load('K', cache, (block, slice(0, n_filled))). Then torch.cat.",
    ),
)
def _(gather_tokens):
    for length, block_size in ((8, 4), (10, 4), (1, 4), (17, 16), (6, 3)):
        cache, table, n_blocks = _poisoned(length, block_size)
        with recording() as trace:
            got = gather_tokens(cache.clone(), table.clone(), length)
        whole = cache[table[:n_blocks].long()].flatten(0, 1)  # (n_blocks * block_size, 2, 4)
        padded, in_order = whole.clone(), cache[table[:n_blocks].sort().values.long()]
        padded[length:] = 0.0
        cut = whole[: length - length % block_size or length]
        full_lost = whole[: length - block_size] if length % block_size == 0 else whole
        what = f"the tokens (length {length}, block size {block_size})"
        expect_or_name(
            what, got, whole[:length],
            "compare with the table: which block holds the first wrong token, and at which offset?",
            [
                ("returns-whole-blocks", whole,
                 "slots past the length hold what an earlier request wrote there. They would enter "
                 "the softmax: cut at `length`"),
                ("pads-instead-of-cutting", padded,
                 "a zero key is no absent key: its score is 0 and exp(0) = 1. Cut at `length`"),
                ("reads-in-pool-order", in_order.flatten(0, 1)[:length],
                 "the order of the table is the order of the tokens: do not sort it"),
                ("ignores-the-table", cache[:n_blocks].flatten(0, 1)[:length],
                 f"logical block 0 is in physical block {int(table[0])}, not in block 0"),
                ("loses-a-full-last-block", full_lost,
                 "length % block_size is 0 when the last block is full, not empty"),
                ("loses-the-partly-filled-block", cut,
                 "round the number of blocks up: the last one may be partly filled"),
            ],
        )  # fmt: skip
        _expect_bytes(trace, length, n_blocks, block_size, cache)


def _poisoned(length: int, block_size: int) -> tuple[Tensor, Tensor, int]:
    """A pool in which everything that is not this request's is NaN, its table, its blocks."""
    rng = torch.Generator().manual_seed(length)
    n_blocks = ceil_div(length, block_size)
    cache = torch.full((n_blocks + 3, block_size, 2, 4), torch.nan)
    # never in ascending order, and never where logical numbers would find them
    order = torch.arange(n_blocks + 2, -1, -1)
    table = torch.full((n_blocks + 2,), int(order[-1]), dtype=torch.int32)  # spare: nobody's block
    table[:n_blocks] = order[:n_blocks]
    tokens = torch.randn(length, 2, 4, generator=rng)
    for token in range(length):
        cache[table[token // block_size], token % block_size] = tokens[token]
    return cache, table, n_blocks


def _expect_bytes(trace: Trace, length: int, n_blocks: int, block_size: int, cache: Tensor) -> None:
    """Exactly the request's tokens were read, and its entries of the table, once."""
    token = cache[0, 0].nbytes
    read = sum(what.nbytes for what in trace.of(Load) if what.name != "table")
    looked_up = sum(what.nbytes for what in trace.of(Load) if what.name == "table")
    expect_or_name(
        f"bytes read from the cache (length {length}, block size {block_size})",
        read, length * token, f"a token has {token} bytes here, and each is read once",
        [
            ("goes-around-load", 0,
             "read slow memory only with load('K', cache, where): it keeps the count"),
            ("reads-whole-blocks", n_blocks * block_size * token,
             "right tokens, but the unused slots were read too and thrown away. Load only the "
             "filled part: (block, slice(0, n_filled))"),
            ("reads-the-whole-pool", cache.nbytes,
             "that is the memory of all requests. Load block by block"),
        ],
    )  # fmt: skip
    expect_or_name(
        f"bytes read from the table (length {length}, block size {block_size})",
        looked_up, n_blocks * TABLE_ENTRY, "the table has 4 bytes a block, and each is read once",
        [
            ("looks-up-behind-the-meter", 0, "the table is in slow memory too: load('table', ...)"),
            ("reads-the-whole-table", (n_blocks + 2) * TABLE_ENTRY,
             "entries past the request's last block mean nothing: stop before them"),
            ("looks-up-every-token", length * TABLE_ENTRY,
             "all tokens of a block share one entry: look it up once a block"),
        ],
    )  # fmt: skip


# 6. What a prefix cache may reuse


@exercise(
    "paged_attention.reusable_tokens",
    points=2,
    minutes=10,
    hints=(
        "Walk the full blocks from the left. The digest of each takes the digest before it as "
        "parent. Stop at the first that is not cached. Then think about the very last token.",
        "At least one token must be computed, so only (len(prompt) - 1) // block_size blocks may "
        "be reused at all. Return the number of hits times block_size.",
    ),
)
def _(reusable_tokens):
    w, x, y, z = ([10 * i + k for k in range(4)] for i in range(1, 5))  # blocks of 4 tokens

    def answer(prompt: list[int], *chains: list[list[int]]):
        cached = {name for chain in chains for name in _chain(chain)}
        return reusable_tokens(list(prompt), set(cached), 4, _digest)

    expect_or_name(
        "reusable tokens: 11-token prompt, its 2 full blocks cached,",
        answer(w + x + [7, 8, 9], [w, x], [x]), 8, "8 of its tokens are in cached blocks",
        [
            ("counts-blocks-not-tokens", 2, "that is the number of blocks: return tokens"),
            ("always-leaves-a-block-out", 4,
             "3 tokens remain to be computed anyway, so both blocks may be reused. Only a prompt "
             "that ends with a full block needs care"),
        ],
    )  # fmt: skip
    for blocks in ([w, x], [w], [w, x, y]):
        n_tokens = 4 * len(blocks)
        expect_or_name(
            f"reusable tokens: prompt of exactly {n_tokens} tokens, all its blocks cached,",
            answer(sum(blocks, []), blocks, [x], [y]), n_tokens - 4,
            "which token's logits give the first new token? Its block must be computed",
            [
                ("leaves-nothing-to-compute", n_tokens,
                 "with all tokens reused the model has no input, so no logits to draw the next "
                 "token from: the last token must be computed"),
                ("reuses-part-of-a-block", n_tokens - 1,
                 "computing the last token writes its key into a shared block. Whole blocks only"),
            ],
        )  # fmt: skip
    expect_or_name(
        "reusable tokens: block 0 and 2 cached, block 1 evicted,",
        reusable_tokens(w + x + y + [1], set(_chain([w, x, y])) - {_chain([w, x])[1]}, 4, _digest),
        4, "reuse ends where the first block is missing",
        [
            ("goes-on-after-a-miss", 8,
             "what is reused must be a PREFIX: stop at the first block that is not cached"),
        ],
    )  # fmt: skip
    expect_or_name(
        "reusable tokens: the second block is cached, but after another first block,",
        answer(w + x + [1], [w, z], [y, x], [x]), 4,
        "keys and values depend on all tokens before them",
        [
            ("forgets-the-parent", 8,
             "equal tokens after another beginning have other keys and values. The digest of a "
             "block takes the digest of the block before it as parent"),
        ],
    )  # fmt: skip
    expect("reusable tokens: nothing is cached,", answer(w + x), 0, "no hit, nothing to reuse")
    expect("reusable tokens: a prompt shorter than a block,", answer([1, 2], [w]), 0,
           "there is no full block")  # fmt: skip


def _digest(parent: str, tokens: Sequence[int]) -> str:
    """Readable instead of short: the block's whole history."""
    if len(tokens) != 4:
        raise NotYet(
            f"digest was asked to name {len(tokens)} tokens: {list(tokens)}; a block has 4",
            misconception="hashes-a-partial-block",
            hint="a block that is not full still changes, so it never gets a name. Go through "
            "the full blocks only",
        )
    return f"{parent}/{','.join(map(str, tokens))}"


def _chain(blocks: Sequence[Sequence[int]]) -> list[str]:
    digests = [""]
    for block in blocks:
        digests.append(_digest(digests[-1], block))
    return digests[1:]


# 7. Copy on write


class _BareCache(PagedCache):
    """The room's cache without what the learner is to write."""

    def extend(self, seq: str, n_tokens: int) -> Tensor:
        raise NotYet(
            "your code calls the finished cache.extend or cache.append",
            misconception="uses-the-finished-one",
            hint="that is what this exercise writes. Use cache.pool, cache.tables, cache.lengths",
        )


COW = CacheConfig(n_layers=2, n_blocks=10, block_size=4, n_kv_heads=2, d_head=4)
Append = Callable[[PagedCache, str, Tensor, Tensor], None]


@exercise(
    "paged_attention.append_token",
    points=3,
    minutes=15,
    hints=(
        "Three cases. The last block is full (or there is none): take a new one. It has room and "
        "one owner: write. It has room and several owners: copy it first. Then, always: write, "
        "and count the token.",
        "A copy is: (copy,) = cache.pool.allocate(1); cache.keys[:, copy] = cache.keys[:, source], "
        "the same for the values; put it into the table; cache.pool.release(source).",
    ),
)
def _(append_token):
    for what, script in [
        ("appending to a block of its own", [("start", "A", 2), "A", "A"]),
        ("appending behind a full block", [("start", "A", 4), "A", "A"]),
        ("appending after a fork at a full block", [("start", "A", 8), ("fork", "A", "B"), "B"]),
        ("appending after a fork", [("start", "A", 6), ("fork", "A", "B"), "B"]),
        ("appending to both after a fork", [("start", "A", 6), ("fork", "A", "B"), "B", "A"]),
        (
            "four samples of one prompt",
            [("start", "A", 7), *(("fork", "A", name) for name in "BCD"), *"DDBBCCAA"],
        ),
    ]:
        _expect_same_story(append_token, what, script)


# (what the reference does at the first difference, what the attempt does): name, where to look
COW_MISTAKES = {
    (Extended, CopiedOnWrite): (
        "copies-although-sole-owner",
        "nobody else reads that block, cache.pool.owners[block] is 1: write it in place",
    ),
    (Allocated, CopiedOnWrite): (
        "copies-at-a-boundary",
        "the shared block is full, so it is not written: the token goes into a new block",
    ),
    (CopiedOnWrite, Extended): (
        "writes-into-a-shared-block",
        "the other sequence reads that block, too, and now finds a token that is not its own. "
        "Look at cache.pool.owners before you write",
    ),
    (CopiedOnWrite, Allocated): (
        "adds-a-block-instead-of-copying",
        "the tokens in the shared block belong to this sequence as well: the copy takes its place "
        "in the table",
    ),
    (Extended, Allocated): (
        "takes-a-block-too-early",
        "the last block has room as long as length % block_size is not 0",
    ),
    (Allocated, Extended): (
        "misses-the-block-boundary",
        "length % block_size is 0: the last block is full and the token needs a new one",
    ),
    (Extended, NoneType): (
        "forgets-to-count-the-token",
        "cache.lengths[seq] must grow by 1, or the next token overwrites this one",
    ),
}


def _expect_same_story(append: Append, what: str, script: list) -> None:
    """The attempt changes tables as the room's cache does, and leaves the same tokens behind."""
    with recording() as reference:
        _story(_room_append, script)
    name, hint = "", "the notebook draws both runs: look at tables and owners at that moment"
    with recording() as attempt:
        try:
            _story(append, script)
        except (NotYet, NotImplementedError):
            raise
        except Exception:  # noqa: BLE001  expect_same_run tells it, with the picture
            parting = None
        else:
            parting = first_divergence(reference, attempt)
    if parting:
        kinds = (_kind(parting.reference), _kind(parting.attempt))
        name, hint = COW_MISTAKES.get(kinds, (name, hint))
    got, want = expect_same_run(
        what, partial(_story, append), partial(_story, _room_append), lambda: (script,), hint,
        frames=_pictures,
        misconception=name,
    )  # fmt: skip
    expect(f"{what}: cache.pool.owners", got.pool.owners, want.pool.owners,
           "who leaves a block tells the pool: cache.pool.release(source)",
           misconception="forgets-to-release-the-source")  # fmt: skip
    for seq in want.tables:
        for name, layer in product(("keys", "values"), range(COW.n_layers)):
            ours, theirs = (_tokens_of(cache, name, layer, seq) for cache in (want, got))
            if layer > 0:
                misconception = "forgets-a-layer"
                hint = "a block number means the same block in EVERY layer: copy and write all"
            elif name == "values":
                misconception = "copies-only-the-keys"
                hint = "keys and values go together: copy both, write both"
            else:
                misconception = "writes-the-wrong-slot"
                hint = "token t is at offset t % block_size of its block"
            expect(f"{what}: {seq}'s {name} (layer {layer})", theirs, ours, hint,
                   misconception=misconception)  # fmt: skip


def _pictures(trace: Trace) -> list[Frame]:
    """The room's view without source lines: they would be those of `_record_changes`."""
    pictures = frames(trace, n_blocks=COW.n_blocks, block_size=COW.block_size)
    return [replace(picture, file=None, line=None) for picture in pictures]


def _kind(step) -> type:
    return type(step.what) if step else NoneType


def _story(append: Append, script: list) -> PagedCache:
    """Play a script on a fresh cache; `append` serves the entries that are just a name.

    What it did is recorded from the tables before and after, so it need not record anything.
    """
    cache = _BareCache(COW)
    cache.pool.free = deque([5, 2, 8, 6, 0, 9, 7, 3, 1, 4])
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    shape = (COW.n_layers, COW.n_kv_heads, COW.d_head)
    pattern = torch.arange(16.0).view(shape) / 100
    for number, entry in enumerate(script):
        match entry:
            case ("start", seq, n_tokens):
                for token in range(n_tokens):
                    _room_append(cache, seq, pattern + token, -pattern - token)
                record(Allocated(seq, 0, cache.tables[seq][0]))
                for logical, block in enumerate(cache.tables[seq][1:], 1):
                    record(Allocated(seq, logical, block))
                record(Extended(seq, n_tokens, n_tokens))
            case ("fork", parent, child):
                cache.fork(parent, child)
            case seq:
                before, length = list(cache.tables[seq]), cache.lengths[seq]
                token = 100.0 + number
                with recording():  # whatever it records itself is left out
                    append(cache, seq, pattern + token, -pattern - token)
                _record_changes(cache, seq, before, length)
    return cache


def _record_changes(cache: PagedCache, seq: str, before: list[int], length: int) -> None:
    table = cache.tables[seq]
    for logical, block in enumerate(table):
        if logical >= len(before):
            record(Allocated(seq, logical, block))
        elif block != before[logical]:
            record(CopiedOnWrite(seq, logical, before[logical], block))
    if cache.lengths[seq] != length:
        record(Extended(seq, cache.lengths[seq], cache.lengths[seq] - length))


def _room_append(cache: PagedCache, seq: str, keys: Tensor, values: Tensor) -> None:
    with recording():
        slots = PagedCache.extend(cache, seq, 1)
        for layer in range(COW.n_layers):
            cache.write(layer, slots, keys[layer, None], values[layer, None])


def _tokens_of(cache: PagedCache, name: str, layer: int, seq: str) -> Tensor:
    """(length, n_kv_heads, d_head): what attention would read."""
    return getattr(cache, name)[layer].flatten(0, 1)[cache.slots(seq)]


# 8. Resume after preemption


@exercise(
    "paged_attention.plan_resume",
    points=2,
    minutes=10,
    hints=(
        "Write all tokens that the request knows in one row: prompt, then generated. Which of them "
        "have keys and values in the cache already? Only the reused ones; compute the others.",
        "tokens = (prompt + generated)[n_reused:]; their positions are n_reused, n_reused + 1, ... "
        "and the slots follow from positions and table as in exercise 2.",
    ),
)
def _(plan_resume):
    # prompt, generated, table, n_reused; blocks of 4. The second one is in no prefix cache
    cases = [
        ([11, 12, 13, 14, 15, 16], [21, 22, 23], [6, 1, 3], 4),
        ([31, 32], [41, 42, 43, 44, 45], [2, 5], 0),
        (list(range(50, 59)), [61, 62, 63], [7, 0, 4], 8),
    ]
    for prompt, generated, table, n_reused in cases:
        call = f"plan_resume({prompt}, {generated}, table={table}, n_reused={n_reused}, 4)"
        plan = plan_resume(list(prompt), list(generated), list(table), n_reused, 4)
        expect_parts(plan, "tokens", "positions", "slots")
        known, first = prompt + generated, n_reused
        expect_or_name(
            f"{call}: tokens", list(plan[0]), known[first:],
            "every token without keys and values in the cache must go through the model again",
            [
                ("forgets-what-it-generated", prompt[first:],
                 "the keys and values of the generated tokens went with the blocks. Resumed with "
                 "the prompt alone, the request would start its answer again"),
                ("leaves-out-the-newest-token", known[first:-1],
                 "the logits after that would draw the newest token a second time. It was sampled, "
                 "but never computed: feed it as well"),
                ("recomputes-what-is-reused", known,
                 "the first n_reused tokens are in shared blocks: do not write there"),
                ("continues-as-if-nothing-happened", known[-1:],
                 "only a request that still has its blocks can go on with one token"),
                ("forgets-the-prompt", generated, "the blocks of the prompt are gone as well"),
            ],
        )  # fmt: skip
        positions = torch.arange(first, len(known))
        n_tokens = len(positions)
        expect_or_name(
            f"{call}: positions", plan[1], positions,
            "a token keeps the position that it had before",
            [
                ("positions-start-at-zero", torch.arange(n_tokens),
                 "the reused tokens come first: the next position is n_reused. With wrong "
                 "positions RoPE turns queries and keys by the wrong angle, and nothing crashes"),
                ("positions-count-from-one", positions + 1, "the first token has position 0"),
            ],
        )  # fmt: skip
        slots = partial(_slots, table, block_size=4)
        expect_or_name(
            f"{call}: slots", plan[2], slots(positions),
            "slots follow from position and table, as in exercise 2",
            [
                ("writes-over-the-reused-blocks", slots(torch.arange(n_tokens)),
                 "these slots belong to the shared prefix, which other requests read. The first "
                 "slot to write is that of position n_reused"),
                ("slots-without-the-table", positions,
                 "after a preemption the request has other blocks: look them up in the table"),
            ],
        )  # fmt: skip


# 9. Which block size?


@exercise(
    "paged_attention.choose_block_size",
    points=2,
    minutes=12,
    hints=(
        "For one request: blocks = ceil(n / block_size). It wastes blocks * block_size - n slots "
        "and pays 4 bytes a block for its table.",
        "overhead = sum over n of (blocks * block_size - n) * bytes_per_token + 4 * blocks. Keep "
        "the sizes with max(blocks) <= max_blocks, and take the one with the least overhead.",
    ),
)
def _(choose_block_size):
    lengths, per_token = [17, 64, 5, 100, 33, 1], 12
    for size in (16, 5, 64):
        got = choose_block_size(list(lengths), [size], per_token, 1_000)
        expect_parts(got, "block size", "overhead")
        blocks, n = [ceil_div(n, size) for n in lengths], len(lengths)
        unused, entries = sum(blocks) * size - sum(lengths), TABLE_ENTRY * sum(blocks)
        floor = sum(n // size for n in lengths)
        expect_or_name(
            f"overhead of block size {size} in bytes, for lengths {lengths}",
            got[1], unused * per_token + entries,
            "count one request by hand: its blocks, its unused slots, its table",
            [
                ("forgets-the-table", unused * per_token,
                 "each block also costs an entry of 4 bytes in the block table"),
                ("counts-slots-not-bytes", unused + entries,
                 "an unused slot wastes bytes_per_token bytes"),
                ("rounds-down", (floor * size - sum(lengths)) * per_token + TABLE_ENTRY * floor,
                 "the last, partly filled block is a whole block: round up"),
                ("always-one-more", sum(
                    (size - n % size) * per_token + TABLE_ENTRY * (n // size + 1) for n in lengths
                 ), "a length that is a multiple of the block size fills its last block"),
                ("takes-the-average", n * (size - 1) / 2 * per_token + entries,
                 "(block_size - 1) / 2 is right on average over many lengths; here you have the "
                 "lengths: count"),
                ("takes-half-a-block", n * size / 2 * per_token + entries,
                 "half a block is a rule of thumb (the average is (block_size - 1) / 2); here you "
                 "have the lengths: count"),
                ("table-of-longest-only", unused * per_token + TABLE_ENTRY * max(blocks),
                 "every request has a table of its own"),
            ],
        )  # fmt: skip
    sizes = [1, 2, 4, 8, 16, 32, 64]
    for lengths, per_token, most in (
        ([17, 64, 5, 100, 33, 1], 2, 1_000),
        ([17, 64, 5, 100, 33, 1], 131_072, 1_000),
        ([300, 310, 257], 64, 40),
        ([16] * 7 + [48], 4_096, 1_000),
    ):
        costs = {b: _overhead(lengths, b, per_token) for b in sizes}
        allowed = [b for b in sizes if ceil_div(max(lengths), b) <= most]
        best = min(allowed, key=costs.get)
        expect_or_name(
            f"the best of {sizes} for lengths {lengths}, {per_token} bytes a token, at most {most} "
            "blocks a request,",
            choose_block_size(list(lengths), list(sizes), per_token, most)[0], best,
            f"compare the overheads of all sizes allowed; that of {best} is {costs[best]} bytes",
            [
                ("ignores-the-limit", min(sizes, key=costs.get),
                 f"with that size the longest request needs more than {most} blocks"),
                ("takes-the-smallest", allowed[0],
                 "small blocks waste fewer slots, but have more entries in the table"),
                ("takes-the-largest", allowed[-1], "the least overhead is wanted"),
                ("limits-all-requests-together",
                 min((b for b in sizes if sum(ceil_div(n, b) for n in lengths) <= most),
                     key=costs.get, default=0),
                 "max_blocks limits the table of ONE request"),
            ],
        )  # fmt: skip


def _overhead(lengths: Sequence[int], block_size: int, bytes_per_token: int) -> int:
    blocks = [ceil_div(n, block_size) for n in lengths]
    unused = sum(blocks) * block_size - sum(lengths)
    return unused * bytes_per_token + TABLE_ENTRY * sum(blocks)


# 10. The page-walk kernel


@exercise(
    "paged_attention.decode_kernel",
    points=4,
    minutes=30,
    hints=(
        "Five steps a block: look up its number; work out which of its slots are filled; load "
        "those keys and values of your KV head; mask the scores; update m, total and acc as the "
        "reference does, rescaling BOTH sums by exp(m - m_new).",
        "ok = logical * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE) < length masks both loads "
        "(other=0.0) and, with tl.where, the scores (-inf). The KV head is "
        "head // (N_HEADS // N_KV_HEADS). At the end divide by tl.where(total > 0, total, 1.0).",
    ),
)
def _(kernel):
    expect_kernel("decode_kernel", kernel)
    for what, lengths, n_heads, n_kv_heads, block_size, poison in [
        ("one full block", [8], 2, 2, 8, False),
        ("4 query heads on 2 KV heads", [8, 8], 4, 2, 8, False),
        ("several full blocks in shuffled order", [16, 12], 4, 2, 4, False),
        ("partly filled last blocks", [5, 11], 4, 2, 4, False),
        ("lengths 1 to 33", [1, 15, 16, 17, 33], 3, 1, 16, False),
        ("NaN in all slots without a token", [5, 1, 9], 4, 2, 4, True),
        ("an empty sequence between two others", [3, 0, 4], 2, 1, 4, True),
    ]:
        inputs = decode_inputs(
            lengths, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=16, block_size=block_size,
            seed=len(what), poison=poison,
        )  # fmt: skip
        inputs = _with_spare_blocks(*inputs)
        got, want = _launch(kernel, *inputs), decode_oracle(*inputs)
        _expect_attention(what, got, want, inputs, poison)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _with_spare_blocks(q, k, v, tables, lengths) -> Inputs:
    """Table entries past the end name a block of nobody instead of one outside the pool.

    Without a GPU the interpreter would read there, and take the session with it.
    """
    counts = [ceil_div(n, k.shape[1]) for n in lengths.tolist()]
    owned = {int(b) for row, n in zip(tables, counts, strict=True) for b in row[:n]}
    spare = next(b for b in range(len(k)) if b not in owned)
    tables = torch.where(tables < len(k), tables, spare).to(torch.int32)
    return q, k, v, tables, lengths


def _launch(kernel, q, k, v, tables, lengths) -> Tensor:
    """One program per (sequence, query head), on a GPU or in the interpreter."""
    device = pick_device()
    batch, n_heads, d_head = q.shape
    out = torch.full_like(q, torch.nan, device=device)
    k, v = (_in_no_mans_land(cache).to(device) for cache in (k, v))
    with launched():
        kernel[(batch, n_heads)](
            q.to(device), k[1], v[1], tables.to(device), lengths.to(device), out,
            tables.shape[1], d_head**-0.5,
            N_HEADS=n_heads, N_KV_HEADS=k.shape[3], BLOCK_SIZE=k.shape[2], D=d_head,
        )  # fmt: skip
    return out.cpu()


def _in_no_mans_land(cache: Tensor) -> Tensor:
    """The cache between two of NaN: an address that is off a little finds NaN, not a crash."""
    nan = torch.full_like(cache, torch.nan)
    return torch.stack([nan, cache, nan])


def _expect_attention(what: str, got: Tensor, want: Tensor, inputs: Inputs, poison: bool) -> None:
    """`got` is the oracle's answer, or the difference is named after the mistake that makes it."""
    lengths = inputs[4]
    if not poison:
        expect_numbers(
            what, "the result", got[lengths > 0],
            "does the kernel end in a tl.store to its own row of out? If so, it reads outside "
            "the cache: take the address of a key apart, (block, offset, KV head, d)",
        )  # fmt: skip
    if got[lengths == 0].isnan().any():
        raise NotYet(
            f"{what}: the row of the empty sequence is NaN, expected zeros",
            misconception="divides-by-zero",
            hint="no block was walked, so total is 0 and 0 / 0 is NaN: divide by "
            "tl.where(total > 0, total, 1.0)",
        )
    expect_no_nan(
        what, got,
        "a masked score makes p 0 there, but 0 * NaN is NaN: mask the loads of k AND v "
        "with other=0.0, and stop the walk after the last block of the sequence",
        misconception="lets-unused-slots-in",
    )  # fmt: skip
    mistakes = [] if poison else _kernel_mistakes(*inputs)
    expect_or_name(
        f"{what}: out", got, want.float(),
        "compare with the reference line by line: address, mask, scale, running softmax", mistakes,
    )  # fmt: skip


def _kernel_mistakes(q, k, v, tables, lengths) -> list[Mistake]:
    """What kernels with the usual mistakes give, in float64; inputs without NaN."""
    n_heads, d_head, block_size, n_kv_heads = q.shape[1], q.shape[2], *k.shape[1:3]
    heads = torch.arange(n_heads) % n_kv_heads
    logical = torch.arange(tables.shape[1]).expand_as(tables)
    filled = (lengths + block_size - 1) // block_size * block_size
    whole = lengths // block_size * block_size
    k_padded, v_padded = k.clone(), v.clone()
    for seq, n in enumerate(lengths.tolist()):
        if n % block_size:
            for cache in (k_padded, v_padded):
                cache[tables[seq, n // block_size], n % block_size :] = 0.0

    def oracle(q=q, k=k, v=v, tables=tables, lengths=lengths) -> Tensor:
        return decode_oracle(q, k, v, tables, lengths).float()

    return [
        ("forgets-the-scale", oracle(q * d_head**0.5), "multiply the scores by `scale`"),
        ("scales-twice", oracle(q / d_head**0.5), "multiply the scores by `scale` once"),
        ("wrong-kv-head", oracle(k=k[:, :, heads], v=v[:, :, heads]),
         "neighbouring query heads share a KV head: head // (N_HEADS // N_KV_HEADS), not "
         "head % N_KV_HEADS"),
        ("reads-logical-blocks", oracle(tables=logical),
         "`logical` counts this sequence's blocks; where the block IS stands in the table: "
         "tl.load(table_ptr + seq * max_blocks + logical)"),
        ("forgets-to-rescale", _walk(q, k, v, tables, lengths, "neither"),
         "acc and total were summed relative to the old m: multiply both by exp(m - m_new)"),
        ("rescales-only-the-total", _walk(q, k, v, tables, lengths, "total"),
         "acc was summed relative to the old m, just as total: multiply it by exp(m - m_new)"),
        ("rescales-only-acc", _walk(q, k, v, tables, lengths, "acc"),
         "total was summed relative to the old m, just as acc: multiply it by exp(m - m_new)"),
        ("forgets-the-tail-mask", oracle(lengths=filled),
         "the last block is only partly filled: mask its loads and scores where the token's "
         "number is not below length"),
        ("scores-the-padding", oracle(k=k_padded, v=v_padded, lengths=filled),
         "a masked load gives a key of zeros, but a zero key has score 0 and weight exp(0 - m): "
         "set those scores to -inf with tl.where"),
        ("drops-the-last-block", oracle(lengths=whole),
         "length // BLOCK_SIZE leaves out the partly filled block: tl.cdiv rounds up"),
        ("forgets-to-normalise", oracle() * _walk(q, k, v, tables, lengths, "sums"),
         "acc is a sum of p * v; divide it by total, the sum of p, before you store it"),
    ]  # fmt: skip


def _walk(q, k, v, tables, lengths, rescaled: str) -> Tensor:
    """The online softmax with a mistake, (batch, n_heads, d_head); "sums" gives its totals."""
    group = q.shape[1] // k.shape[2]
    out = torch.zeros_like(q)
    for seq, head in product(range(q.shape[0]), range(q.shape[1])):
        m, total, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(q.shape[2])
        for first in range(0, int(lengths[seq]), k.shape[1]):
            block, n = tables[seq, first // k.shape[1]], min(k.shape[1], int(lengths[seq]) - first)
            scores = k[block, :n, head // group] @ q[seq, head] * q.shape[2] ** -0.5
            m_new = torch.maximum(m, scores.max())
            shrink, p = torch.exp(m - m_new), torch.exp(scores - m_new)
            total = (shrink if rescaled in ("total", "sums") else 1.0) * total + p.sum()
            acc = (shrink if rescaled == "acc" else 1.0) * acc + p @ v[block, :n, head // group]
            m = m_new
        out[seq, head] = total if rescaled == "sums" else acc / total.clamp(min=1e-30)
    return out
