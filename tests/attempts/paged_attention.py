"""Wrong and right attempts at chapter 1's exercises. Each wrong one is a mistake people make."""

import torch

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.errors import OutOfBlocks, require
from llmopt_lab.core.memory import ceil_div, load

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

# 1. kv_budget


def budget(per_token, fit=lambda per_token, n_tokens, memory: memory // (per_token * n_tokens)):
    """An attempt: a formula for the bytes a token, and one for the requests that fit."""

    def kv_budget(n_layers, n_heads, n_kv_heads, d_head, itemsize, n_tokens, memory):
        n = per_token(n_layers, n_heads, n_kv_heads, d_head, itemsize)
        return n, fit(n, n_tokens, memory)

    return kv_budget


def right_bytes(n_layers, n_heads, n_kv_heads, d_head, itemsize):
    return 2 * n_layers * n_kv_heads * d_head * itemsize


def adds_up_layer_by_layer(n_layers, n_heads, n_kv_heads, d_head, itemsize, n_tokens, memory):
    per_token = sum(2 * n_kv_heads * d_head * itemsize for _ in range(n_layers))
    n_requests = 0
    while (n_requests + 1) * n_tokens * per_token <= memory:
        n_requests += 1
    return [per_token, n_requests]


# 2. slot_mapping


def mapping(block, offset, tokens=lambda start, n: torch.arange(start, start + n)):
    """An attempt: which entry of the table, which offset, which tokens."""

    def slot_mapping(table, start, n_tokens, block_size):
        t = tokens(start, n_tokens)
        entries = torch.tensor(table)[block(t, block_size) % len(table)]
        return entries * block_size + offset(t, block_size)

    return slot_mapping


def quotient(t, b):
    return t // b


def remainder(t, b):
    return t % b


def uses_logical_blocks(table, start, n_tokens, block_size):
    return torch.arange(start, start + n_tokens)


def forgets_the_block_size(table, start, n_tokens, block_size):
    t = torch.arange(start, start + n_tokens)
    return torch.tensor(table)[t // block_size] + t % block_size


def makes_a_list_of_all_slots(table, start, n_tokens, block_size):
    slots = [b * block_size + i for b in table for i in range(block_size)]
    table.clear()  # a check's inputs are its own
    return torch.tensor(slots[start : start + n_tokens])


def counts_positions_in_a_loop(table, start, n_tokens, block_size):
    slots = []
    for t in range(start, start + n_tokens):
        logical, offset = divmod(t, block_size)
        slots.append(table[logical] * block_size + offset)
    return torch.tensor(slots, dtype=torch.int64)


def wrong_dtype(table, start, n_tokens, block_size):
    return counts_positions_in_a_loop(table, start, n_tokens, block_size).float()


# 3. page_allocator. The guide's class, then what people make of it


class Guide:
    def __init__(self, page_size=16, num_pages=1000):
        self.page_size = page_size
        self.num_pages = num_pages
        self.page_pool = [None] * num_pages
        self.allocated_pages = {}

    def allocate_pages(self, request_id, num_tokens):
        num_pages_needed = (num_tokens + self.page_size - 1) // self.page_size
        allocated = []
        for i, page in enumerate(self.page_pool):
            if page is None and len(allocated) < num_pages_needed:
                self.page_pool[i] = request_id
                allocated.append(i)
        self.allocated_pages[request_id] = allocated
        return allocated

    def free_pages(self, request_id):
        if request_id in self.allocated_pages:
            for page_id in self.allocated_pages[request_id]:
                self.page_pool[page_id] = None
            del self.allocated_pages[request_id]


class Growing(Guide):
    """Right. Those below inherit from it and break one thing."""

    def allocate_pages(self, request_id, num_tokens):
        table = self.allocated_pages.setdefault(request_id, [])
        for _ in range(self.missing(len(table), num_tokens)):
            page = self.page_pool.index(None)
            self.page_pool[page] = request_id
            table.append(page)
        return table

    def missing(self, held, num_tokens):
        return ceil_div(num_tokens, self.page_size) - held

    def free_pages(self, request_id):
        require(request_id in self.allocated_pages, f"no request {request_id!r}")
        for page in self.allocated_pages.pop(request_id):
            self.page_pool[page] = None


class RoundsDown(Growing):
    def missing(self, held, num_tokens):
        return num_tokens // self.page_size - held


class AsksForTheTotalAgain(Growing):
    def missing(self, held, num_tokens):
        return ceil_div(num_tokens, self.page_size)


class TakesAPageACall(Growing):
    def missing(self, held, num_tokens):
        return super().missing(0, num_tokens) if held == 0 else 1


class MovesWrittenPages(Growing):
    def allocate_pages(self, request_id, num_tokens):
        if request_id in self.allocated_pages:
            self.free_pages(request_id)
        return super().allocate_pages(request_id, num_tokens)


class ReturnsOnlyNewPages(Growing):
    def allocate_pages(self, request_id, num_tokens):
        held = len(self.allocated_pages.get(request_id, []))
        table = super().allocate_pages(request_id, num_tokens)
        return table[held:] if num_tokens == 12 else table


class IgnoresAnUnknownRequest(Growing):
    free_pages = Guide.free_pages


class KeepsTheListOfTheDead(Growing):
    def free_pages(self, request_id):
        for page in self.allocated_pages[request_id]:
            self.page_pool[page] = None


class LeavesTheMarks(Growing):
    def free_pages(self, request_id):
        require(request_id in self.allocated_pages, f"no request {request_id!r}")
        del self.allocated_pages[request_id]


class ForgetsToMark(Growing):
    def allocate_pages(self, request_id, num_tokens):
        table = self.allocated_pages.setdefault(request_id, [])
        unused = [i for i, owner in enumerate(self.page_pool) if owner is None]
        table += unused[: self.missing(len(table), num_tokens)]
        return table


class Stack(Guide):
    """Right, with a stack of free pages beside the pool, and other pages first."""

    def __init__(self, page_size=16, num_pages=1000):
        super().__init__(page_size, num_pages)
        self.stack = list(range(num_pages))

    def allocate_pages(self, request_id, num_tokens):
        table = self.allocated_pages.get(request_id, [])
        while len(table) * self.page_size < num_tokens:
            table = [*table, self.stack.pop()]
            self.page_pool[table[-1]] = request_id
        self.allocated_pages[request_id] = table
        return list(table)

    def free_pages(self, request_id):
        if request_id not in self.allocated_pages:
            raise KeyError(request_id)
        for page in self.allocated_pages.pop(request_id):
            self.page_pool[page] = None
            self.stack.append(page)


# 4. take_pages


def free_of(page_pool):
    return [i for i, owner in enumerate(page_pool) if owner is None]


def takes(page_pool, request_id, num_pages):
    pages = free_of(page_pool)[:num_pages]
    for page in pages:
        page_pool[page] = request_id
    return pages


def takes_all_or_nothing(page_pool, request_id, num_pages):
    require(request_id is not None, "a request needs a name")
    if num_pages > page_pool.count(None):
        raise OutOfBlocks("too few")
    return takes(page_pool, request_id, num_pages)


def takes_and_puts_back(page_pool, request_id, num_pages):
    if request_id is None:
        raise ValueError("a request needs a name")
    taken = []
    for _ in range(num_pages):
        if None not in page_pool:
            for page in taken:
                page_pool[page] = None
            raise OutOfBlocks("too few")
        taken.append(page_pool.index(None))
        page_pool[taken[-1]] = request_id
    return taken


def refuses_the_last_page(page_pool, request_id, num_pages):
    if num_pages >= page_pool.count(None):
        raise OutOfBlocks("too few")
    return takes(page_pool, request_id, num_pages)


def keeps_a_partial_grant(page_pool, request_id, num_pages):
    pages = takes(page_pool, request_id, num_pages)
    if len(pages) < num_pages:
        raise OutOfBlocks("too few")
    return pages


def rolls_back_too_much(page_pool, request_id, num_pages):
    pages = takes(page_pool, request_id, num_pages)
    if len(pages) < num_pages:
        for page, owner in enumerate(page_pool):
            if owner == request_id:
                page_pool[page] = None
        raise OutOfBlocks("too few")
    return pages


def returns_none_instead(page_pool, request_id, num_pages):
    if num_pages > page_pool.count(None):
        return None
    return takes(page_pool, request_id, num_pages)


def raises_runtime_error(page_pool, request_id, num_pages):
    if num_pages > page_pool.count(None):
        raise RuntimeError("too few")
    return takes(page_pool, request_id, num_pages)


def takes_what_is_taken(page_pool, request_id, num_pages):
    page_pool[:num_pages] = [request_id] * num_pages
    return list(range(num_pages))


def forgets_to_mark(page_pool, request_id, num_pages):
    return free_of(page_pool)[:num_pages]


def returns_one_page(page_pool, request_id, num_pages):
    return takes_all_or_nothing(page_pool, request_id, num_pages)[:1]


def lets_none_in(page_pool, request_id, num_pages):
    if num_pages > page_pool.count(None):
        raise OutOfBlocks("too few")
    return takes(page_pool, request_id, num_pages)


# 5. gather_tokens


def gathers_by_slots(cache, table, length):
    block_size = cache.shape[1]
    blocks = load("table", table, slice(0, ceil_div(length, block_size))).long()
    t = torch.arange(length)
    return load("K", cache, (blocks[t // block_size], t % block_size))


def gathers_block_by_block(cache, table, length):
    block_size, out = cache.shape[1], cache.new_empty(length, *cache.shape[2:])
    done = 0
    while done < length:
        n = min(block_size, length - done)
        block = load("table", table, done // block_size)
        out[done : done + n] = load("K", cache, (int(block), slice(None, n)))
        done += n
    cache.zero_()  # a check's inputs are its own
    return out


def whole_blocks(cache, table, length):
    n_blocks = ceil_div(length, cache.shape[1])
    blocks = load("table", table, slice(0, n_blocks)).long()
    return load("K", cache, blocks).flatten(0, 1)


def pads_with_zeros(cache, table, length):
    tokens = whole_blocks(cache, table, length).clone()
    tokens[length:] = 0.0
    return tokens


def sorts_the_table(cache, table, length):
    blocks = table[: ceil_div(length, cache.shape[1])].sort().values
    return gathers_by_slots(cache, blocks, length)


def ignores_the_table(cache, table, length):
    return cache.flatten(0, 1)[:length]


def loses_a_full_last_block(cache, table, length):
    n_whole, n_rest = divmod(length, cache.shape[1])
    parts = [load("K", cache, int(table[i])) for i in range(ceil_div(length, cache.shape[1]))]
    return torch.cat([*parts[:-1], parts[-1][:n_rest]])


def loses_the_partly_filled_block(cache, table, length):
    whole = length // cache.shape[1] or 1
    return gathers_by_slots(cache, table, min(length, whole * cache.shape[1]))


def cuts_after_reading(cache, table, length):
    return whole_blocks(cache, table, length)[:length]


def goes_around_load(cache, table, length):
    return cache[table[: ceil_div(length, cache.shape[1])].long()].flatten(0, 1)[:length]


def reads_the_whole_pool(cache, table, length):
    blocks = load("table", table, slice(0, ceil_div(length, cache.shape[1]))).long()
    return load("K", cache, slice(None))[blocks].flatten(0, 1)[:length]


def looks_up_behind_the_meter(cache, table, length):
    t = torch.arange(length)
    return load("K", cache, (table[t // cache.shape[1]].long(), t % cache.shape[1]))


def looks_up_every_token(cache, table, length):
    block_size, parts = cache.shape[1], []
    for t in range(length):
        block = int(load("table", table, t // block_size))
        parts.append(load("K", cache, (block, slice(t % block_size, t % block_size + 1))))
    return torch.cat(parts)


def reads_the_whole_table(cache, table, length):
    blocks, t = load("table", table, slice(None)).long(), torch.arange(length)
    return load("K", cache, (blocks[t // cache.shape[1]], t % cache.shape[1]))


# 6. reusable_tokens


def hits(prompt, cached, block_size, digest, usable, *, chained=True, stop=True):
    n, parent = 0, ""
    for i in range(usable):
        name = digest(parent, prompt[i * block_size : (i + 1) * block_size])
        parent = name if chained else ""
        if name in cached:
            n += 1
        elif stop:
            break
    return n


def reuses_right(prompt, cached, block_size, digest):
    usable = (len(prompt) - 1) // block_size
    return block_size * hits(prompt, cached, block_size, digest, usable)


def names_all_blocks_first(prompt, cached, block_size, digest):
    names, parent = [], ""
    for i in range(len(prompt) // block_size):
        parent = digest(parent, prompt[i * block_size : (i + 1) * block_size])
        names.append(parent)
    reused = 0
    while names and names.pop(0) in cached:
        reused += block_size
    cached.clear()  # a check's inputs are its own
    return reused if reused < len(prompt) else reused - block_size


def leaves_nothing(prompt, cached, block_size, digest):
    n = hits(prompt, cached, block_size, digest, len(prompt) // block_size)
    return n * block_size


def leaves_one_token(prompt, cached, block_size, digest):
    return min(leaves_nothing(prompt, cached, block_size, digest), len(prompt) - 1)


def always_leaves_a_block(prompt, cached, block_size, digest):
    n = hits(prompt, cached, block_size, digest, len(prompt) // block_size - 1)
    return n * block_size


def counts_blocks(prompt, cached, block_size, digest):
    return reuses_right(prompt, cached, block_size, digest) // block_size


def forgets_the_parent(prompt, cached, block_size, digest):
    n, usable = block_size, (len(prompt) - 1) // block_size
    return n * hits(prompt, cached, block_size, digest, usable, chained=False)


def goes_on_after_a_miss(prompt, cached, block_size, digest):
    usable = (len(prompt) - 1) // block_size
    return block_size * hits(prompt, cached, block_size, digest, usable, stop=False)


def hashes_the_tail(prompt, cached, block_size, digest):
    n = hits(prompt, cached, block_size, digest, ceil_div(len(prompt), block_size))
    return min(n * block_size, len(prompt) - 1)


# 7. append_token


def write(cache, seq, keys, values):
    offset, block = cache.lengths[seq] % cache.config.block_size, cache.tables[seq][-1]
    cache.keys[:, block, offset] = keys
    cache.values[:, block, offset] = values
    cache.lengths[seq] += 1


def is_full(cache, seq):
    return cache.lengths[seq] % cache.config.block_size == 0


def is_shared(cache, seq):
    return cache.pool.owners[cache.tables[seq][-1]] > 1


def copy_block(cache, seq, *, layers=slice(None), values=True, release=True):
    source = cache.tables[seq][-1]
    block = cache.pool.allocate(1)[0]
    cache.keys[layers, block] = cache.keys[layers, source]
    if values:
        cache.values[layers, block] = cache.values[layers, source]
    if release:
        cache.pool.release(source)
    cache.tables[seq][-1] = block


def appends_right(cache, seq, keys, values):
    if is_full(cache, seq):
        cache.tables[seq].append(cache.pool.allocate(1)[0])
    elif is_shared(cache, seq):
        copy_block(cache, seq)
    write(cache, seq, keys, values)


def appends_layer_by_layer(cache, seq, keys, values):
    logical, offset = divmod(cache.lengths[seq], cache.config.block_size)
    table = cache.tables[seq]
    if logical == len(table):
        table.extend(cache.pool.allocate(1))
    if cache.pool.owners[table[logical]] != 1:
        cache.pool.release(table[logical])
        source, table[logical] = table[logical], cache.pool.allocate(1)[0]
        for store in (cache.keys, cache.values):
            for layer in range(cache.config.n_layers):
                store[layer, table[logical], :offset] = store[layer, source, :offset]
    for layer in range(cache.config.n_layers):
        cache.keys[layer, table[logical], offset] = keys[layer]
        cache.values[layer, table[logical], offset] = values[layer]
    cache.lengths[seq] = cache.lengths[seq] + 1


def writes_into_a_shared_block(cache, seq, keys, values):
    if is_full(cache, seq):
        cache.tables[seq].append(cache.pool.allocate(1)[0])
    write(cache, seq, keys, values)


def always_copies(cache, seq, keys, values):
    if is_full(cache, seq):
        cache.tables[seq].append(cache.pool.allocate(1)[0])
    else:
        copy_block(cache, seq)
    write(cache, seq, keys, values)


def copies_at_a_boundary(cache, seq, keys, values):
    if is_shared(cache, seq):
        copy_block(cache, seq)
    if is_full(cache, seq):
        cache.tables[seq].append(cache.pool.allocate(1)[0])
    write(cache, seq, keys, values)


def copying(**wrong):
    def append_token(cache, seq, keys, values):
        if is_full(cache, seq):
            cache.tables[seq].append(cache.pool.allocate(1)[0])
        elif is_shared(cache, seq):
            copy_block(cache, seq, **wrong)
        write(cache, seq, keys, values)

    return append_token


def adds_a_block_instead(cache, seq, keys, values):
    if is_full(cache, seq) or is_shared(cache, seq):
        cache.tables[seq].append(cache.pool.allocate(1)[0])
    write(cache, seq, keys, values)


def takes_a_block_for_each_token(cache, seq, keys, values):
    cache.tables[seq].append(cache.pool.allocate(1)[0])
    write(cache, seq, keys, values)


def forgets_a_new_block(cache, seq, keys, values):
    write(cache, seq, keys, values)


def forgets_to_count(cache, seq, keys, values):
    appends_right(cache, seq, keys, values)
    cache.lengths[seq] -= 1


def writes_one_slot_late(cache, seq, keys, values):
    appends_right(cache, seq, keys, values)
    offset, block = (cache.lengths[seq] - 1) % cache.config.block_size, cache.tables[seq][-1]
    for store, new in ((cache.keys, keys), (cache.values, values)):
        store[:, block, offset] = 0.0
        store[:, block, (offset + 1) % cache.config.block_size] = new


def forgets_the_values(cache, seq, keys, values):
    appends_right(cache, seq, keys, torch.zeros_like(values))


def counts_blocks_from_one(cache, seq, keys, values):
    cache.tables[seq][cache.lengths[seq] // cache.config.block_size + 1] += 0


def calls_the_finished_one(cache, seq, keys, values):
    cache.extend(seq, 1)


# 8. plan_resume


def resuming(tokens=None, position=None, slot=None, physical=True):
    """An attempt: the tokens, the first position, the token whose slot comes first."""

    def plan_resume(prompt, generated, table, n_reused, block_size):
        known = prompt + generated
        n, numbers = len(known) - n_reused, torch.arange(len(known))
        first = n_reused if position is None else position
        at = numbers[n_reused if slot is None else slot :][:n]
        slots = torch.tensor(table)[at // block_size] * block_size + at % block_size
        fed = known[n_reused:] if tokens is None else tokens(prompt, generated, n_reused)
        return fed, torch.arange(first, first + n), slots if physical else at

    return plan_resume


def positions_from_one(prompt, generated, table, n_reused, block_size):
    tokens, positions, slots = plans_token_by_token(prompt, generated, table, n_reused, block_size)
    return tokens, positions + 1, slots


def plans_token_by_token(prompt, generated, table, n_reused, block_size):
    tokens, positions, slots = [], [], []
    prompt += generated  # a check's inputs are its own
    for position, token in enumerate(prompt):
        if position >= n_reused:
            tokens.append(token)
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    return tokens, torch.tensor(positions), torch.tensor(slots)


# 9. choose_block_size


def choosing(overhead, allowed=lambda lengths, size, most: ceil_div(max(lengths), size) <= most):
    """An attempt: the overhead of a block size, and which sizes may be chosen."""

    def choose_block_size(lengths, sizes, bytes_per_token, max_blocks):
        costs = {
            size: overhead(lengths, size, bytes_per_token)
            for size in sizes
            if allowed(lengths, size, max_blocks)
        }
        best = min(costs, key=costs.get)
        return best, costs[best]

    return choose_block_size


def blocks_of(lengths, size):
    return sum(ceil_div(n, size) for n in lengths)


def unused(lengths, size):
    return blocks_of(lengths, size) * size - sum(lengths)


def counted(lengths, size, per_token):
    return unused(lengths, size) * per_token + 4 * blocks_of(lengths, size)


def rounded_down(lengths, size, per_token):
    n = sum(length // size for length in lengths)
    return (n * size - sum(lengths)) * per_token + 4 * n


def one_more(lengths, size, per_token):
    n = sum(length // size + 1 for length in lengths)
    return (n * size - sum(lengths)) * per_token + 4 * n


def average(lengths, size, per_token):
    return len(lengths) * (size - 1) / 2 * per_token + 4 * blocks_of(lengths, size)


def half_a_block(lengths, size, per_token):
    return len(lengths) * size / 2 * per_token + 4 * blocks_of(lengths, size)


def longest_table_only(lengths, size, per_token):
    return unused(lengths, size) * per_token + 4 * ceil_div(max(lengths), size)


def with_tensors(lengths, sizes, bytes_per_token, max_blocks):
    n = torch.tensor(lengths)
    b = torch.tensor([s for s in sizes if -(-max(lengths) // s) <= max_blocks])
    blocks = (n[:, None] + b - 1) // b
    overhead = ((blocks * b - n[:, None]) * bytes_per_token + 4 * blocks).sum(dim=0)
    best = overhead.argmin()
    return b[best].item(), overhead[best].item()


def takes_the_first_allowed(lengths, sizes, bytes_per_token, max_blocks):
    size = next(s for s in sizes if ceil_div(max(lengths), s) <= max_blocks)
    return size, counted(lengths, size, bytes_per_token)


def takes_the_last_allowed(lengths, sizes, bytes_per_token, max_blocks):
    return sizes[-1], counted(lengths, sizes[-1], bytes_per_token)


# 10. decode_kernel


@triton.jit
def walk(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, max_blocks, scale,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, with the mistake called WRONG."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(length_ptr + seq)
    d = tl.arange(0, D)
    offset = tl.arange(0, BLOCK_SIZE)
    q = tl.load(q_ptr + (seq * N_HEADS + head) * D + d)
    m = -float("inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    kv_head = head // (N_HEADS // N_KV_HEADS)
    if WRONG == "kv head":
        kv_head = head % N_KV_HEADS
    n_blocks = tl.cdiv(length, BLOCK_SIZE)
    if WRONG == "last block":
        n_blocks = length // BLOCK_SIZE
    if WRONG == "walks on":
        n_blocks = max_blocks
    for logical in range(0, n_blocks):
        block = tl.load(table_ptr + seq * max_blocks + logical)
        if WRONG == "logical":
            block = logical
        ok = logical * BLOCK_SIZE + offset < length
        if WRONG == "tail":
            ok = offset >= 0
        at = ((block * BLOCK_SIZE + offset) * N_KV_HEADS + kv_head) * D
        if WRONG == "address":
            at = (block * BLOCK_SIZE + offset) * N_KV_HEADS * D * D
        k = tl.load(k_ptr + at[:, None] + d, ok[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + d, ok[:, None] | (WRONG == "0 * NaN"), other=0.0)
        scores = tl.sum(k * q, axis=1)
        if WRONG != "scale":
            scores = scale * scores
        if WRONG == "scales twice":
            scores = scale * scores
        if WRONG != "padding":
            scores = tl.where(ok, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=0))
        shrink = tl.exp(m - m_new)
        p = tl.exp(scores - m_new)
        if (WRONG != "rescale") & (WRONG != "rescale total"):
            total = shrink * total
        if (WRONG != "rescale") & (WRONG != "rescale acc"):
            acc = shrink * acc
        total += tl.sum(p, axis=0)
        acc += tl.sum(p[:, None] * v, axis=0)
        m = m_new
    if WRONG == "empty":
        acc = acc / total
    elif WRONG != "normalise":
        acc = acc / tl.where(total > 0, total, 1.0)
    if WRONG != "store":
        tl.store(out_ptr + (seq * N_HEADS + head) * D + d, acc)


@triton.jit
def two_passes(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, max_blocks, scale,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Right without a running softmax, token by token: the maximum first, then the sums."""
    seq, head = tl.program_id(0), tl.program_id(1)
    length, d = tl.load(length_ptr + seq), tl.arange(0, D)
    q = tl.load(q_ptr + (seq * N_HEADS + head) * D + d) * scale
    kv_head = head * N_KV_HEADS // N_HEADS
    top = -float("inf")
    for t in range(0, length):
        block = tl.load(table_ptr + seq * max_blocks + t // BLOCK_SIZE)
        at = ((block * BLOCK_SIZE + t % BLOCK_SIZE) * N_KV_HEADS + kv_head) * D + d
        top = tl.maximum(top, tl.sum(q * tl.load(k_ptr + at), axis=0))
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    for t in range(0, length):
        block = tl.load(table_ptr + seq * max_blocks + t // BLOCK_SIZE)
        at = ((block * BLOCK_SIZE + t % BLOCK_SIZE) * N_KV_HEADS + kv_head) * D + d
        p = tl.exp(tl.sum(q * tl.load(k_ptr + at), axis=0) - top)
        total += p
        acc += p * tl.load(v_ptr + at)
    if length > 0:
        acc = acc / total
    tl.store(out_ptr + (seq * N_HEADS + head) * D + d, acc)


@triton.jit
def raises_in_the_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, max_blocks, scale,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr, no_such_name)  # noqa: F821


class Walking:
    """`walk` with one mistake, launched like any kernel."""

    fn = walk.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: walk[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "paged_attention.kv_budget": [
        (budget(lambda n, q, kv, d, b: n * kv * d * b), "forgets-keys-or-values"),
        (budget(lambda n, q, kv, d, b: 2 * n * q * d * b), "counts-query-heads"),
        (budget(lambda n, q, kv, d, b: 2 * kv * d * b), "forgets-the-layers"),
        (budget(lambda n, q, kv, d, b: 2 * n * kv * d), "counts-numbers-not-bytes"),
        (budget(lambda n, q, kv, d, b: 16 * n * kv * d * b), "counts-bits"),
        (budget(right_bytes, lambda b, n, memory: ceil_div(memory, b * n)), "rounds-up"),
        (budget(right_bytes, lambda b, n, memory: memory / (b * n)), "keeps-the-fraction"),
        (budget(right_bytes, lambda b, n, memory: memory // b), "counts-tokens-not-requests"),
        (lambda *shape: right_bytes(*shape[:5]), "returns-other-things"),
    ],
    "paged_attention.slot_mapping": [
        (uses_logical_blocks, "uses-logical-block-numbers"),
        (mapping(remainder, quotient), "swaps-block-and-offset"),
        (forgets_the_block_size, "forgets-the-block-size"),
        (
            mapping(quotient, remainder, lambda start, n: torch.arange(n)),
            "ignores-the-start",
        ),
        (
            mapping(quotient, remainder, lambda start, n: torch.arange(start, max(n, start))),
            "takes-the-count-for-the-end",
        ),
        (mapping(lambda t, b: (t + 1) // b, remainder), "next-block-too-early"),
        (mapping(lambda t, b: (t - 1) // b, remainder), "next-block-too-late"),
        (wrong_dtype, "slots-are-no-integers"),
    ],
    "paged_attention.page_allocator": [
        (Guide, "forgets-the-old-pages"),
        (RoundsDown, "rounds-down"),
        (AsksForTheTotalAgain, "asks-for-the-total-again"),
        (TakesAPageACall, "takes-a-page-a-call"),
        (MovesWrittenPages, "moves-written-pages"),
        (ReturnsOnlyNewPages, "returns-only-new-pages"),
        (IgnoresAnUnknownRequest, "ignores-an-unknown-request"),
        (KeepsTheListOfTheDead, "keeps-the-list-of-the-dead"),
        (ForgetsToMark, "list-and-pool-disagree"),
        (LeavesTheMarks, "pages-get-lost"),
    ],
    "paged_attention.take_pages": [
        (takes, "grants-fewer-than-asked"),
        (refuses_the_last_page, "refuses-the-last-page"),
        (keeps_a_partial_grant, "keeps-a-partial-grant"),
        (rolls_back_too_much, "rolls-back-too-much"),
        (returns_none_instead, "returns-instead-of-raising"),
        (raises_runtime_error, "raises-something-else"),
        (takes_what_is_taken, "takes-what-is-taken"),
        (forgets_to_mark, "forgets-to-mark"),
        (lets_none_in, "none-is-a-free-page"),
        (returns_one_page, "returns-another-number"),
    ],
    "paged_attention.gather_tokens": [
        (whole_blocks, "returns-whole-blocks"),
        (pads_with_zeros, "pads-instead-of-cutting"),
        (sorts_the_table, "reads-in-pool-order"),
        (ignores_the_table, "ignores-the-table"),
        (loses_a_full_last_block, "loses-a-full-last-block"),
        (loses_the_partly_filled_block, "loses-the-partly-filled-block"),
        (cuts_after_reading, "reads-whole-blocks"),
        (goes_around_load, "goes-around-load"),
        (reads_the_whole_pool, "reads-the-whole-pool"),
        (looks_up_behind_the_meter, "looks-up-behind-the-meter"),
        (looks_up_every_token, "looks-up-every-token"),
        (reads_the_whole_table, "reads-the-whole-table"),
    ],
    "paged_attention.reusable_tokens": [
        (leaves_nothing, "leaves-nothing-to-compute"),
        (leaves_one_token, "reuses-part-of-a-block"),
        (always_leaves_a_block, "always-leaves-a-block-out"),
        (counts_blocks, "counts-blocks-not-tokens"),
        (forgets_the_parent, "forgets-the-parent"),
        (goes_on_after_a_miss, "goes-on-after-a-miss"),
        (hashes_the_tail, "hashes-a-partial-block"),
    ],
    "paged_attention.append_token": [
        (writes_into_a_shared_block, "writes-into-a-shared-block"),
        (always_copies, "copies-although-sole-owner"),
        (copies_at_a_boundary, "copies-at-a-boundary"),
        (copying(release=False), "forgets-to-release-the-source"),
        (copying(values=False), "copies-only-the-keys"),
        (copying(layers=0), "forgets-a-layer"),
        (adds_a_block_instead, "adds-a-block-instead-of-copying"),
        (takes_a_block_for_each_token, "takes-a-block-too-early"),
        (forgets_a_new_block, "misses-the-block-boundary"),
        (forgets_to_count, "forgets-to-count-the-token"),
        (writes_one_slot_late, "writes-the-wrong-slot"),
        (calls_the_finished_one, "uses-the-finished-one"),
        (counts_blocks_from_one, "raises"),
    ],
    "paged_attention.plan_resume": [
        (resuming(lambda p, g, r: p[r:]), "forgets-what-it-generated"),
        (resuming(lambda p, g, r: (p + g)[r:-1]), "leaves-out-the-newest-token"),
        (resuming(lambda p, g, r: p + g), "recomputes-what-is-reused"),
        (resuming(lambda p, g, r: g[-1:]), "continues-as-if-nothing-happened"),
        (resuming(lambda p, g, r: g), "forgets-the-prompt"),
        (resuming(position=0), "positions-start-at-zero"),
        (positions_from_one, "positions-count-from-one"),
        (resuming(slot=0), "writes-over-the-reused-blocks"),
        (resuming(physical=False), "slots-without-the-table"),
        (lambda prompt, generated, table, n_reused, block_size: prompt, "returns-other-things"),
    ],
    "paged_attention.choose_block_size": [
        (choosing(lambda n, b, t: unused(n, b) * t), "forgets-the-table"),
        (choosing(lambda n, b, t: unused(n, b) + 4 * blocks_of(n, b)), "counts-slots-not-bytes"),
        (choosing(rounded_down), "rounds-down"),
        (choosing(one_more), "always-one-more"),
        (choosing(average), "takes-the-average"),
        (choosing(half_a_block), "takes-half-a-block"),
        (choosing(longest_table_only), "table-of-longest-only"),
        (choosing(counted, lambda lengths, size, most: True), "ignores-the-limit"),
        (
            choosing(counted, lambda lengths, size, most: blocks_of(lengths, size) <= most),
            "limits-all-requests-together",
        ),
        (lambda lengths, sizes, bytes_per_token, max_blocks: sizes[0], "returns-other-things"),
        (takes_the_first_allowed, "takes-the-smallest"),
        (takes_the_last_allowed, "takes-the-largest"),
    ],
    "paged_attention.decode_kernel": [
        (Walking("scale"), "forgets-the-scale"),
        (Walking("scales twice"), "scales-twice"),
        (Walking("kv head"), "wrong-kv-head"),
        (Walking("logical"), "reads-logical-blocks"),
        (Walking("rescale"), "forgets-to-rescale"),
        (Walking("rescale acc"), "rescales-only-the-total"),
        (Walking("rescale total"), "rescales-only-acc"),
        (Walking("tail"), "forgets-the-tail-mask"),
        (Walking("padding"), "scores-the-padding"),
        (Walking("last block"), "drops-the-last-block"),
        (Walking("0 * NaN"), "lets-unused-slots-in"),
        (Walking("empty"), "divides-by-zero"),
        (Walking("normalise"), "forgets-to-normalise"),
        (Walking("store"), "writes-nothing-or-reads-astray"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "paged_attention.kv_budget": [budget(right_bytes), adds_up_layer_by_layer],
    "paged_attention.slot_mapping": [
        mapping(quotient, remainder),
        makes_a_list_of_all_slots,
        counts_positions_in_a_loop,
    ],
    "paged_attention.page_allocator": [Growing, Stack],
    "paged_attention.take_pages": [takes_all_or_nothing, takes_and_puts_back],
    "paged_attention.gather_tokens": [gathers_by_slots, gathers_block_by_block],
    "paged_attention.reusable_tokens": [reuses_right, names_all_blocks_first],
    "paged_attention.append_token": [appends_right, appends_layer_by_layer],
    "paged_attention.plan_resume": [resuming(), plans_token_by_token],
    "paged_attention.choose_block_size": [choosing(counted), with_tensors],
    "paged_attention.decode_kernel": [Walking(""), two_passes],
}
