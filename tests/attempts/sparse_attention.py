"""Wrong and right attempts at chapter 5's exercises. Each wrong one is a mistake people make."""

import math

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.sparse_attention import reference

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

INF = torch.inf

# 1. real_mask


def perturbing(
    keys=lambda x: x + 1,
    values=lambda x: x + 1,
    query=False,
    keep=False,
    tolerance=0.0,
    answer=lambda mask: mask,
):
    """An attempt: what it does to a token's key and value, and what it calls a difference."""

    def real_mask(attention, q, k, v):
        before, columns = attention(q, k, v), []
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for j in range(len(k)):
            if not keep:
                q2, k2, v2 = q.clone(), k.clone(), v.clone()
            if query:
                if j < len(q):
                    q2[j] += 1
            else:
                k2[j], v2[j] = keys(k2[j]), values(v2[j])
            columns.append(((attention(q2, k2, v2) - before).abs() > tolerance).any(1))
        return answer(torch.stack(columns, 1))

    return real_mask


def as_it_is(x):
    return x


def returns_differences(attention, q, k, v):
    before, mask = attention(q, k, v), torch.zeros(len(q), len(k))
    for j in range(len(k)):
        k2, v2 = k.clone(), v.clone()
        k2[j] += 1
        v2[j] += 1
        mask[:, j] = (attention(q, k2, v2) - before).norm(dim=1)
    return mask


def asks_autograd(attention, q, k, v):
    """Right without a perturbation: what does not matter has no gradient."""
    k, v = k.requires_grad_(), v.requires_grad_()
    out, rows = attention(q, k, v), []
    for i in range(len(q)):
        weights = torch.arange(1.0, out.shape[1] + 1, dtype=out.dtype)
        grads = torch.autograd.grad((out[i] * weights).sum(), (k, v), retain_graph=True,
                                    allow_unused=True)  # fmt: skip
        moved = torch.zeros(len(k), dtype=torch.bool)
        for g in grads:
            if g is not None:
                moved |= g.abs().sum(1) > 1e-14
        rows.append(moved)
    return torch.stack(rows)


# 2. local_attention


def windowing(
    near=lambda back, w, causal: (back >= 0) & (back < w) if causal else back.abs() <= w // 2,
    scale=lambda d: d**-0.5,
    hide=lambda scores, near: scores.masked_fill(~near, -INF),
    after=lambda weights, near: weights,
    n_tokens=lambda q: q.shape[-2],
):
    """An attempt: which keys are near, how the scores are scaled and hidden."""

    def local_attention(q, k, v, width, causal):
        n = q.shape[-2]
        back = torch.arange(n)[:, None] - torch.arange(n)
        seen = near(back, width, causal) if n_tokens(q) == n else back == back
        scores = hide(scale(q.shape[-1]) * q @ k.mT, seen)
        return after(torch.softmax(scores, -1).nan_to_num(0), seen) @ v

    return local_attention


def walks_through_the_queries(q, k, v, width, causal):
    """Right: the guide's loop, mended."""
    n, out = q.size(-2), torch.empty_like(v)
    for i in range(n):
        start = max(0, i - width + 1 if causal else i - width // 2)
        end = i + 1 if causal else min(n, i + width // 2 + 1)
        scores = q[..., i : i + 1, :] @ k[..., start:end, :].transpose(-2, -1)
        weights = torch.softmax(scores / math.sqrt(q.size(-1)), dim=-1)
        out[..., i, :] = (weights @ v[..., start:end, :]).squeeze(-2)
    q.zero_()  # a check's inputs are its own
    return out


def asks_torch(q, k, v, width, causal):
    ones = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool)
    reach = width - 1 if causal else width // 2
    mask = ones.tril(0 if causal else reach).triu(-reach)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def guides_window(back, w, causal):
    if causal:
        return (back >= 0) & (back < w)
    return (back > -(w // 2)) & (back <= w // 2)


def exactly_as_many(back, w, causal):
    return (back >= 0) & (back < w) if causal else (back <= w // 2) & (back > w // 2 - w)


# 3. longformer_mask


def marking(
    rows=True,
    cols=True,
    tokens=lambda tokens, n: [t % n for t in tokens],
    near=lambda back, w: back.abs() <= w // 2,
    join=lambda near, row, col: near | row | col,
):
    """An attempt: whether rows and columns are marked, of which tokens, and the window."""

    def longformer_mask(n, width, marked):
        place = torch.arange(n)
        which = torch.zeros(n, dtype=torch.bool)
        for t in tokens(marked, n):
            which[t] = True
        row, col = which[:, None] & rows, which[None, :] & cols
        whole = torch.zeros(n, n, dtype=torch.bool)
        return join(near(place[:, None] - place, width), row | whole, col | whole)

    return longformer_mask


def positive(tokens, n):
    return [t for t in tokens if t >= 0]


def marks_pair_by_pair(n, width, tokens):
    wanted = {n + t if t < 0 else t for t in tokens}
    return torch.tensor(
        [[i in wanted or j in wanted or -(width // 2) <= i - j <= width // 2 for j in range(n)]
         for i in range(n)]
    )  # fmt: skip


# 4. future_read


def reading(
    layers=lambda masks: masks,
    residual=True,
    cut=lambda known: known.triu(1),
    kind=lambda counts: counts > 0,
):
    """An attempt: which layers it multiplies, and what it calls the future."""

    def future_read(masks):
        eye = torch.eye(len(masks[0]))
        known = eye
        for mask in layers(masks):
            reads = (mask.float() + eye).clamp(max=1) if residual else mask.float()
            known = reads @ known
        return cut(kind(known))

    return future_read


def keeps_sets(masks):
    n = len(masks[0])
    known = [{i} for i in range(n)]
    for mask in masks:
        known = [
            known[i].union(*(known[j] for j in range(n) if mask[i, j])) for i in range(n)
        ]  # fmt: skip
    return torch.tensor([[j in known[i] and j > i for j in range(n)] for i in range(n)])


# 5. last_sees


def adding(layer=lambda w: w - 1, first=1, full=lambda n: n, clip=True, combine=sum):
    """An attempt: what a layer adds, what there is before, what a full layer does."""

    def last_sees(widths, n):
        if 0 in widths and full is not None:
            return full(n)
        total = first + combine([layer(w) for w in widths])
        return min(n, total) if clip else total

    return last_sees


def walks_the_masks(widths, n):
    known = {n - 1}
    for w in reversed(widths):
        known |= {j for i in known for j in range(max(0, i - (w or n) + 1), i + 1)}
    return len(known)


# 6. best_stride


def counts_all_strides(n):
    """Right: counted for every stride; the exponent is fitted to two lengths."""

    def pairs(n, s):
        strided = sum(i // s for i in range(s, n))  # those before the window, but for its last
        return sum(min(i + 1, s) for i in range(n)) + strided

    def fewest(n):
        return min(range(max(1, math.isqrt(n) // 3), math.isqrt(n) + 9), key=lambda s: pairs(n, s))

    stride = fewest(n)
    long = 32 * n
    best = round(math.sqrt(long / 2))
    ratio = _closed(4 * long, 2 * best) / _closed(long, best)
    return stride, math.log(ratio) / math.log(4)


def _closed(n, s):
    return n * s + n * n / (2 * s)


def stride_by_halving(n):
    return [math.isqrt(2 * n + 1) // 2, 3 / 2]


# 7. block_cover


def covering(
    some=lambda part: part.any(),
    every=lambda part: part.all(),
    n_blocks=ceil_div,
    padding=(None, None),
    swap=False,
    answer=lambda live, full: (live, full),
):
    """An attempt: what makes a block live and full, how many there are, and what pads them."""

    def block_cover(mask, tile_q, tile_k):
        if swap:
            tile_q, tile_k = tile_k, tile_q
        (n_q, n_k), grids = mask.shape, []
        rows, cols = n_blocks(n_q, tile_q), n_blocks(n_k, tile_k)
        for judge, value in zip((some, every), padding, strict=True):
            m = mask
            if value is not None:
                m = pad(mask, (0, -n_k % tile_k, 0, -n_q % tile_q), value=value)
            grids.append([
                [bool(judge(m[a * tile_q : (a + 1) * tile_q, b * tile_k : (b + 1) * tile_k]))
                 for b in range(cols)] for a in range(rows)
            ])  # fmt: skip
        return answer(*(torch.tensor(grid) for grid in grids))

    return block_cover


def pads_and_reshapes(mask, tile_q, tile_k):
    n_q, n_k = mask.shape
    shape = (ceil_div(n_q, tile_q), tile_q, ceil_div(n_k, tile_k), tile_k)

    def blocks(value):
        return pad(mask, (0, -n_k % tile_k, 0, -n_q % tile_q), value=value).view(shape)

    return [blocks(False).any(3).any(1), blocks(True).all(3).all(1)]


def edges(part):
    return part[0].any() | part[-1].any() | part[:, 0].any() | part[:, -1].any()


# 8. window_traffic


def counting(
    oldest=lambda rows, w: max(0, rows.start - w + 1),
    newest=lambda rows, w, n: rows.stop - 1,
    blocks=lambda first, last: last - first + 1,
    end=min,
    numbers=lambda n, keys, d, visits: n * d + 2 * keys * d,
    total=None,
    bytes_of=lambda numbers, itemsize: numbers * itemsize,
):
    """An attempt: which keys a block of queries needs, how many blocks, and what is read."""

    def window_traffic(n, width, tile_q, tile_k, d, itemsize):
        n_live = keys = 0
        for rows in tiles(n, tile_q):
            first = oldest(rows, width) // tile_k
            last = newest(rows, width, n) // tile_k
            n_live += blocks(first, last)
            keys += end(n, (last + 1) * tile_k) - first * tile_k
        read = bytes_of(numbers(n, keys, d, n_live * tile_q), itemsize)
        return (total(n, width, tile_q, tile_k) if total else n_live), read

    return window_traffic


def counts_by_a_mask(n, width, tile_q, tile_k, d, itemsize):
    back = torch.arange(n)[:, None] - torch.arange(n)
    mask = (back >= 0) & (back < width)
    n_live, nbytes = 0, n * d * itemsize
    for rows in mask.split(tile_q):
        for part in rows.split(tile_k, dim=1):
            if part.any():
                n_live += 1
                nbytes += 2 * part.shape[1] * d * itemsize
    return n_live, nbytes


# 9. sparse_head


def looping(wrong="", scale=lambda d: d**-0.5):
    """An attempt: the right loop with the mistake called `wrong`."""

    def sparse_head(q, k, v, mask, live, full, out, *, tile_q, tile_k):
        everything = slice(0, mask.shape[1])
        m = total = acc = None
        for a, rows in enumerate(tiles(len(q), tile_q)):
            q_i = q[rows] if wrong in ("bypass", "queries again") else load("Q", q, rows)
            if m is None or wrong != "one state" or len(m) != len(q_i):
                m = q_i.new_full((len(q_i),), -INF)
                total, acc = torch.zeros_like(m), q_i.new_zeros(len(q_i), v.shape[1])
            if wrong == "whole mask":
                row_mask = load("mask", mask, (rows, everything))
            for b, cols in enumerate(tiles(len(k), tile_k)):
                if wrong == "dead":
                    load("K", k, cols)
                if wrong == "dead values":
                    load("V", v, cols)
                if not live[a, b] or wrong == "full only" and not full[a, b]:
                    continue
                if wrong == "partial only" and full[a, b]:
                    continue
                if wrong == "queries again":
                    q_i = load("Q", q, rows)
                k_j = k[cols] if wrong in ("dead", "bypass keys") else load("K", k, cols)
                v_j = v[cols] if wrong in ("dead values", "bypass values") else load("V", v, cols)
                scores = q_i @ k_j.T * scale(q.shape[1])
                if wrong == "whole mask":
                    scores = scores.masked_fill(~row_mask[:, cols], -INF)
                elif wrong != "never mask" and (wrong == "mask all" or not full[a, b]):
                    part = mask[rows, cols]
                    if wrong != "bypass mask":
                        part = load("mask", mask, (rows, cols))
                    scores = scores.masked_fill(~part, -INF)
                m, total, acc = reference.absorb(m, total, acc, scores, v_j)
                if wrong == "unfinished":
                    store("O", out, rows, acc / total.clamp(min=1e-300)[:, None])
            safe = total if wrong == "guard" else total.masked_fill(total == 0, 1)
            if wrong == "bypass store":
                out[rows] = acc / safe[:, None]
            elif wrong == "unfinished":
                if not live[a].any():
                    store("O", out, rows, acc)
            elif wrong != "store":
                store("O", out, rows, acc / safe[:, None])

    return sparse_head


def two_passes(q, k, v, mask, live, full, out, *, tile_q, tile_k):
    """Right without a running softmax: all scores of a block of queries stay on chip."""
    for a, rows in reversed([*enumerate(tiles(len(q), tile_q))]):
        q_i = load("Q", q, rows) / math.sqrt(q.shape[1])
        listed = [(b, c) for b, c in enumerate(tiles(len(k), tile_k)) if live[a, b]]
        if not listed:
            store("O", out, rows, torch.zeros(len(q_i), v.shape[1], dtype=q.dtype))
            continue
        scores = torch.cat([q_i @ load("K", k, c).T for _, c in listed], 1)
        hidden = torch.cat(
            [torch.zeros(len(q_i), c.stop - c.start, dtype=torch.bool) if full[a, b]
             else ~load("mask", mask, (rows, c)) for b, c in listed], 1,
        )  # fmt: skip
        weights = scores.masked_fill(hidden, -INF).softmax(1).nan_to_num(0)
        store("O", out, rows, weights @ torch.cat([load("V", v, c) for _, c in listed]))
    q.zero_()  # a check's inputs are its own


# 10. stream_step


def rolling(
    slot=lambda t, s, w: t if t < s else s + (t - s) % w,
    held=lambda t, size: min(t + 1, size),
    late=False,
    scale=lambda d: d**-0.5,
    values_too=True,
    answer=lambda out: out,
):
    """An attempt: where a token goes, how many slots it reads, and when it writes."""

    def stream_step(keys, values, t, q, k, v, *, n_sinks):
        at, n = slot(t, n_sinks, len(keys) - n_sinks), held(t, len(keys))
        if not late:
            keys[at] = k
            if values_too:
                values[at] = v
        out = torch.softmax(keys[:n] @ q * scale(len(q)), 0) @ values[:n]
        if late:
            keys[at], values[at] = k, v
        return answer(out)

    return stream_step


def keeps_them_in_order(keys, values, t, q, k, v, *, n_sinks):
    """Right: the window is shifted by one, so the slots are in the order of the text."""
    if t < len(keys):
        keys[t], values[t] = k, v
    else:
        for buffer, new in ((keys, k), (values, v)):
            buffer[n_sinks:-1] = buffer[n_sinks + 1 :].clone()
            buffer[-1] = new
    filled = ~keys.isnan().any(1)
    scores = (keys[filled] * q).sum(1) / math.sqrt(len(q))
    p = torch.exp(scores - scores.max())
    return (p[:, None] * values[filled]).sum(0) / p.sum()


# 11. block_recall


def choosing(
    rows=lambda scores, a: scores[a, : a + 1],
    count=lambda n, a: min(n, a + 1),
    picks=lambda row, n: row.topk(n).indices,
    share=lambda caught, sizes, n: sum(caught) / n,
    best=lambda parts, row, n: parts.topk(n).values.sum().item(),
    recall=lambda recall, best: (recall, best),
    gain=lambda parts, picked, p_row: parts[picked].sum().item(),
):
    """An attempt: what each block of queries may choose, and how the shares are added up."""

    def block_recall(p, scores, n_blocks, tile):
        caught, most, sizes = [], [], []
        for a, where in enumerate(tiles(len(p), tile)):
            parts = torch.stack([p[where, cols].sum() for cols in tiles(len(p), tile)])
            row, n = rows(scores, a), count(n_blocks, a)
            picked = picks(row, min(n, len(row)))
            caught.append(gain(parts, picked, p[where]))
            most.append(best(parts[: a + 1], row, min(n_blocks, a + 1)))
            sizes.append(where.stop - where.start)
        return recall(share(caught, sizes, len(p)), share(most, sizes, len(p)))

    return block_recall


def choosing_all(make):
    """An attempt that makes both numbers from the masses, what may be seen, and the choices."""

    def block_recall(p, scores, n_blocks, tile):
        n_rows = ceil_div(len(p), tile)
        mass = torch.zeros(n_rows, n_rows, dtype=p.dtype)
        index = torch.arange(len(p)) // tile
        mass.index_put_((index[:, None], index), p, accumulate=True)
        may = torch.ones(n_rows, n_rows, dtype=torch.bool).tril()

        def top(values):
            order = values.masked_fill(~may, -INF).argsort(1, descending=True)
            return (order.argsort(1) < n_blocks) & may

        return make(p, scores, mass, may, top, tile)

    return block_recall


def with_masks(p, scores, mass, may, top, tile):
    return [float((mass * top(x)).sum() / mass.sum()) for x in (scores, mass)]


def averages(caught, sizes, n):
    return sum(c / s for c, s in zip(caught, sizes, strict=True)) / len(caught)


def overlap(p, scores, mass, may, top, tile):
    both = (top(scores) & top(mass)).sum() / top(mass).sum()
    return float(both), with_masks(p, scores, mass, may, top, tile)[1]


def share_of_blocks(p, scores, mass, may, top, tile):
    return float(top(scores).sum() / may.sum()), float((mass * top(mass)).sum() / len(p))


def each_query(p, scores, mass, may, top, tile):
    parts = torch.stack([p[:, c].sum(1) for c in tiles(len(p), tile)], 1)
    n = int(top(scores)[-1].sum())
    return with_masks(p, scores, mass, may, top, tile)[0], float(parts.topk(n, 1)[0].sum() / len(p))


def by_the_largest(p, scores, mass, may, top, tile):
    peaks = torch.stack(
        [torch.stack([p[r, c].max() for c in tiles(len(p), tile)]) for r in tiles(len(p), tile)]
    )
    return [float((mass * top(x)).sum() / len(p)) for x in (scores, peaks)]


def average_of_the_best(p, scores, mass, may, top, tile):
    shares = mass / mass.sum(1, keepdim=True)
    return float((mass * top(scores)).sum() / len(p)), float((shares * top(mass)).sum() / len(mass))


# 12. sparse_kernel


@triton.jit
def sparse(
    q_ptr, k_ptr, v_ptr, blocks_ptr, n_full_ptr, n_live_ptr, mask_ptr, out_ptr, n_q, n_k, scale,
    MOST: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, with the mistake called WRONG."""
    head, row_block = tl.program_id(1), tl.program_id(0)
    row = row_block * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D)
    at_q = (head * n_q + row[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + at_q, (row < n_q)[:, None], other=0.0)
    m = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    n_full, n_live = tl.load(n_full_ptr + row_block), tl.load(n_live_ptr + row_block)
    if WRONG == "every block":
        n_live = tl.cdiv(n_k, TILE)
    if WRONG == "whole list":
        n_live = MOST
    if WRONG == "full only":
        n_live = n_full
    for i in range(0, n_live):
        at = row_block * MOST + i
        if WRONG == "first list":
            at = i
        block = tl.load(blocks_ptr + at)
        masked = i >= n_full
        if (WRONG == "every block") | (WRONG == "index"):
            block = i
        if WRONG == "every block":  # full blocks are looked up, the rest is asked of the mask
            masked = True
            for f in range(0, n_full):
                if tl.load(blocks_ptr + at - i + f) == block:
                    masked = False
        if WRONG == "mask all":
            masked = True
        if WRONG == "never mask":
            masked = False
        col = block * TILE + tl.arange(0, TILE)
        inside = col < n_k
        kv_head = head
        if WRONG == "head":
            kv_head = 0
        at_k = (kv_head * n_k + col[:, None]) * D + d[None, :]
        k = tl.load(k_ptr + at_k, inside[:, None], other=0.0)
        v = tl.load(v_ptr + at_k, inside[:, None], other=0.0)
        seen = (row < n_q)[:, None] & inside[None, :]
        if masked:
            at_mask = row[:, None] * n_k + col[None, :]
            seen = tl.load(mask_ptr + at_mask, seen, other=0) != 0
        else:
            if WRONG == "padding":
                seen = (row < n_q)[:, None] & (col >= 0)[None, :]
        if WRONG == "tail":
            seen = seen & ((block + 1) * TILE <= n_k)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if WRONG != "scale":
            scores = scores * scale
        if WRONG == "scales twice":
            scores = scores * scale
        scores = tl.where(seen, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        base = m_new
        if WRONG != "guard":
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp(scores - base[:, None])
        if WRONG != "rescale":
            shrink = tl.exp(m - base)
            total = shrink * total
            acc = shrink[:, None] * acc
        total += tl.sum(p, axis=1)
        acc += tl.dot(p, v, input_precision="ieee")
        m = m_new
    if WRONG != "zero":
        total = tl.where(total > 0, total, 1.0)
    if WRONG != "normalise":
        acc = acc / total[:, None]
    mine = row < n_q
    if WRONG == "queries":
        mine = row >= 0
    if WRONG != "store":
        tl.store(out_ptr + at_q, acc, mine[:, None])


@triton.jit
def maximum_first(
    q_ptr, k_ptr, v_ptr, blocks_ptr, n_full_ptr, n_live_ptr, mask_ptr, out_ptr, n_q, n_k, scale,
    MOST: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Right without tl.dot and without rescaling: the maximum first, then the sums."""
    head, d = tl.program_id(1), tl.arange(0, D)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mine = (row < n_q)[:, None]
    q = scale * tl.load(q_ptr + (head * n_q + row[:, None]) * D + d, mine, other=0.0)
    n_full = tl.load(n_full_ptr + tl.program_id(0))
    n_live = tl.load(n_live_ptr + tl.program_id(0))
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    for step in range(0, 2 * n_live):
        i = step % n_live
        col = tl.load(blocks_ptr + tl.program_id(0) * MOST + i) * TILE + tl.arange(0, TILE)
        inside = (col < n_k)[None, :]
        hidden = tl.load(mask_ptr + row[:, None] * n_k + col[None, :], inside & mine, other=1) == 0
        seen = inside & ((i < n_full) | (hidden == 0))
        at = (head * n_k + col[:, None]) * D + d
        k = tl.load(k_ptr + at, (col < n_k)[:, None], other=0.0)
        s = tl.where(seen, tl.sum(q[:, None, :] * k[None, :, :], axis=2), -1e30)
        if step < n_live:
            top = tl.maximum(top, tl.max(s, axis=1))
        else:
            v = tl.load(v_ptr + at, (col < n_k)[:, None], other=0.0)
            p = tl.where(seen, tl.exp(s - top[:, None]), 0.0)
            total += tl.sum(p, axis=1)
            acc += tl.sum(p[:, :, None] * v[None, :, :], axis=1)
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(out_ptr + (head * n_q + row[:, None]) * D + d, acc, mine)


@triton.jit
def raises_in_the_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, n_full_ptr, n_live_ptr, mask_ptr, out_ptr, n_q, n_k, scale,
    MOST: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr, no_such_name)  # noqa: F821


class Sparse:
    """`sparse` with one mistake, launched like any kernel."""

    fn = sparse.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: sparse[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "sparse_attention.real_mask": [
        (perturbing(values=as_it_is), "changes-only-keys"),
        (perturbing(keys=as_it_is), "changes-only-values"),
        (perturbing(query=True), "changes-the-query"),
        (perturbing(keep=True), "never-puts-back"),
        (perturbing(keys=lambda x: 0 * x, values=lambda x: 0 * x), "zero-stays-zero"),
        (perturbing(tolerance=1e-2), "overlooks-small-weights"),
        (perturbing(answer=lambda mask: mask.T), "transposes"),
        (perturbing(answer=lambda mask: ~mask), "says-who-does-not"),
        (returns_differences, "returns-the-differences"),
    ],
    "sparse_attention.local_attention": [
        (windowing(near=guides_window), "misses-the-right-end"),
        (windowing(scale=lambda d: 1.0), "forgets-the-scale"),
        (
            windowing(near=lambda b, w, c: (b >= 0) & (b <= w) if c else b.abs() <= w),
            "width-on-each-side",
        ),
        (windowing(near=exactly_as_many), "trims-even-widths"),
        (windowing(near=lambda b, w, c: b.abs() <= w // 2), "looks-ahead"),
        (
            windowing(near=lambda b, w, c: (b >= 0 if c else b == b) & (b.abs() <= w // 2)),
            "halves-the-causal-window",
        ),
        (windowing(near=lambda b, w, c: (b >= 0) & (b < w)), "always-causal"),
        (
            windowing(
                near=lambda b, w, c: ((b >= 0) & (b < w) if c else b.abs() <= w // 2) & (b != 0)
            ),
            "forgets-itself",
        ),
        (windowing(n_tokens=lambda q: q.shape[max(-q.ndim + 1, -3)]), "sees-everything"),
        (windowing(hide=lambda s, near: s * near), "hides-with-zeros"),
        (
            windowing(hide=lambda s, near: s, after=lambda w, near: w * near),
            "masks-after-the-softmax",
        ),
    ],
    "sparse_attention.longformer_mask": [
        (marking(cols=False), "one-way"),
        (marking(rows=False), "nobody-asks"),
        (marking(tokens=positive), "minus-one-is-no-token"),
        (marking(join=lambda near, row, col: near | row & col), "global-to-each-other"),
        (marking(join=lambda near, row, col: row | col), "only-global"),
        (marking(join=lambda near, row, col: near), "only-the-window"),
        (
            marking(near=lambda back, w: (back > -(w // 2)) & (back <= w // 2)),
            "misses-the-right-end",
        ),
        (marking(join=lambda near, row, col: (near | row | col).tril()), "makes-it-causal"),
    ],
    "sparse_attention.future_read": [
        (
            lambda masks: torch.stack(masks).any(0).triu(1),
            "looks-at-each-layer-alone",
        ),
        (lambda masks: masks[0].triu(1), "looks-at-the-first-layer"),
        (lambda masks: masks[-1].triu(1), "looks-at-the-last-layer"),
        (lambda masks: torch.stack(masks).all(0).triu(1), "wants-all-layers-to-leak"),
        (reading(layers=lambda masks: masks[::-1]), "last-layer-first"),
        (reading(residual=False), "forgets-the-residual"),
        (reading(cut=lambda known: known), "calls-the-past-a-leak"),
        (reading(cut=lambda known: known.triu()), "calls-itself-a-leak"),
        (reading(cut=lambda known: known.tril(-1)), "looks-below-the-diagonal"),
        (reading(cut=lambda known: known.triu(1).T), "transposes"),
        (reading(kind=lambda counts: counts), "counts-the-ways"),
    ],
    "sparse_attention.last_sees": [
        (adding(layer=lambda w: w, first=0), "adds-the-widths"),
        (adding(layer=lambda w: w, first=0, combine=math.prod), "multiplies"),
        (adding(combine=lambda steps: max(steps, default=0)), "takes-the-widest"),
        (adding(combine=lambda steps: steps[-1] if steps else 0), "takes-the-last-layer"),
        (adding(first=0), "forgets-the-token-itself"),
        (adding(layer=lambda w: w // 2), "looks-both-ways"),
        (adding(clip=False), "more-than-there-are"),
        (adding(layer=lambda w: max(0, w - 1), full=None), "skips-the-full-layer"),
        (adding(full=None), "takes-0-for-a-width"),
        (adding(combine=lambda steps: 2 ** len(steps) - 1), "doubles"),
    ],
    "sparse_attention.best_stride": [
        (lambda n: (round(math.sqrt(n)), 1.5), "forgets-the-half"),
        (lambda n: (round(math.sqrt(2 * n)), 1.5), "halves-the-wrong-part"),
        (lambda n: (n // 2, 1.5), "forgets-the-root"),
        (lambda n: (round(n ** (1 / 3)), 1.5), "takes-the-cube-root"),
        (lambda n: (128, 1.5), "one-stride-for-all"),
        (lambda n: (4, 1.5), "takes-the-guides"),
        (lambda n: (1, 1.5), "takes-no-stride"),
        (lambda n: (round(math.sqrt(n / 2)), 1), "believes-the-guide"),
        (lambda n: (round(math.sqrt(n / 2)), 2.0), "believes-it-is-dense"),
        (lambda n: (round(math.sqrt(n / 2)), 0.5), "counts-one-query"),
        (lambda n: round(math.sqrt(n / 2)), "returns-other-things"),
    ],
    "sparse_attention.block_cover": [
        (covering(some=lambda part: part.all()), "loses-pairs"),
        (covering(some=lambda part: part.float().mean() > 0.5), "takes-the-majority"),
        (covering(some=lambda part: part[0, 0]), "looks-at-a-corner"),
        (covering(some=edges), "looks-at-the-edges"),
        (covering(n_blocks=lambda n, tile: n // tile), "forgets-the-tails"),
        (covering(padding=(True, None)), "padding-counts-as-seen"),
        (covering(answer=lambda live, full: (live.T, full.T)), "transposes"),
        (covering(swap=True), "swaps-the-tiles"),
        (covering(answer=lambda live, full: (~live, full)), "says-what-is-dead"),
        (covering(answer=lambda live, full: (live, live)), "takes-live-for-full"),
        (covering(padding=(None, False)), "padding-counts-as-hidden"),
        (covering(answer=lambda live, full: (live, live & ~full)), "returns-the-partial"),
        (covering(every=lambda part: False), "calls-nothing-full"),
        (covering(answer=lambda live, full: live), "returns-other-things"),
    ],
    "sparse_attention.window_traffic": [
        (
            counting(total=lambda n, w, tile_q, tile_k: ceil_div(n * w, tile_q * tile_k)),
            "takes-the-area",
        ),
        (
            counting(oldest=lambda rows, w: max(0, rows.stop - w)),
            "counts-from-the-last-query",
        ),
        (counting(oldest=lambda rows, w: max(0, rows.start - w)), "one-key-too-many"),
        (counting(oldest=lambda rows, w: rows.start - w + 1), "counts-blocks-before-the-text"),
        (
            counting(newest=lambda rows, w, n: min(n - 1, rows.stop + w - 2)),
            "looks-ahead",
        ),
        (counting(oldest=lambda rows, w: 0), "forgets-the-window"),
        (
            counting(total=lambda n, w, tile_q, tile_k: ceil_div(n, tile_q) * ceil_div(n, tile_k)),
            "counts-all-blocks",
        ),
        (
            counting(total=lambda n, w, tile_q, tile_k: ceil_div(n, tile_q) * ceil_div(w, tile_k)),
            "whole-tiles-of-width",
        ),
        (counting(numbers=lambda n, keys, d, visits: n * d + keys * d), "forgets-the-values"),
        (counting(numbers=lambda n, keys, d, visits: 2 * keys * d), "forgets-the-queries"),
        (counting(end=lambda n, end: end), "pads-the-last-block"),
        (counting(numbers=lambda n, keys, d, visits: 3 * n * d), "reads-each-key-once"),
        (
            counting(numbers=lambda n, keys, d, visits: visits * d + 2 * keys * d),
            "reads-the-queries-again",
        ),
        (
            counting(numbers=lambda n, keys, d, visits: 2 * n * d + 2 * keys * d),
            "counts-what-is-written",
        ),
        (counting(bytes_of=lambda numbers, itemsize: numbers), "counts-numbers-not-bytes"),
        (lambda *sizes: 0, "returns-other-things"),
    ],
    "sparse_attention.sparse_head": [
        (looping(scale=lambda d: 1.0), "forgets-the-scale"),
        (looping("never mask"), "forgets-the-mask"),
        (looping("full only"), "visits-only-full-blocks"),
        (looping("partial only"), "visits-only-partial-blocks"),
        (looping("one state"), "never-starts-afresh"),
        (looping("store"), "stores-nothing"),
        (looping("guard"), "nan-from-nothing"),
        (looping("bypass"), "goes-around-load"),
        (looping("queries again"), "reads-queries-again"),
        (looping("bypass keys"), "goes-around-load-for-keys"),
        (looping("dead"), "reads-dead-blocks"),
        (looping("bypass values"), "goes-around-load-for-values"),
        (looping("dead values"), "reads-dead-values"),
        (looping("bypass mask"), "goes-around-load-for-the-mask"),
        (looping("mask all"), "masks-full-blocks"),
        (looping("whole mask"), "reads-the-whole-mask"),
        (looping("bypass store"), "goes-around-store"),
        (looping("unfinished"), "writes-unfinished-results"),
    ],
    "sparse_attention.stream_step": [
        (rolling(slot=lambda t, s, w: t % (s + w)), "evicts-the-sink"),
        (rolling(slot=lambda t, s, w: t if t < s + w else t % w), "rolls-into-the-sinks"),
        (rolling(slot=lambda t, s, w: min(t, s + w - 1)), "keeps-only-the-first"),
        (rolling(slot=lambda t, s, w: t if t < s else s + t % w), "ring-out-of-step"),
        (
            rolling(slot=lambda t, s, w: t if t < s else s + (t - s) % (w - 1)),
            "window-one-short",
        ),
        (
            rolling(slot=lambda t, s, w: t if t < s + w else s + (t - s - w) % (w - 1)),
            "shifts-the-sinks",
        ),
        (rolling(held=lambda t, size: size), "reads-empty-slots"),
        (rolling(held=lambda t, size: max(1, min(t, size))), "reads-one-too-few"),
        (rolling(late=True), "reads-before-it-writes"),
        (rolling(scale=lambda d: 1.0), "forgets-the-scale"),
        (rolling(values_too=False), "forgets-the-values"),
        (rolling(answer=lambda out: out[None]), "returns-other-things"),
    ],
    "sparse_attention.block_recall": [
        (
            choosing(rows=lambda scores, a: scores[a], count=lambda n, a: n),
            "chooses-from-the-future",
        ),
        (choosing(count=lambda n, a: min(n + 1, a + 1)), "chooses-one-too-many"),
        (choosing(picks=lambda row, n: (-row).topk(n).indices), "chooses-the-worst"),
        (
            choosing(rows=lambda scores, a: scores[-1], count=lambda n, a: n),
            "one-choice-for-all",
        ),
        (
            choosing(picks=lambda row, n: torch.arange(len(row) - n, len(row))),
            "keeps-the-nearest",
        ),
        (choosing(recall=lambda recall, best: (best, best)), "asks-the-oracle-first"),
        (choosing(share=averages), "averages-blocks"),
        (choosing_all(overlap), "counts-blocks"),
        (choosing_all(share_of_blocks), "counts-kept-blocks"),
        (choosing(recall=lambda recall, best: (recall / best, best)), "divides-by-the-best"),
        (choosing(share=lambda caught, sizes, n: sum(caught)), "forgets-to-divide"),
        (choosing(recall=lambda recall, best: (recall, 1.0)), "calls-the-best-perfect"),
        (choosing(recall=lambda recall, best: (recall, recall)), "repeats-the-recall"),
        (choosing_all(each_query), "lets-each-query-choose"),
        (choosing_all(average_of_the_best), "averages-blocks-of-the-best"),
        (choosing_all(by_the_largest), "chooses-by-the-largest-weight"),
        (choosing(recall=lambda recall, best: recall), "returns-other-things"),
    ],
    "sparse_attention.sparse_kernel": [
        (Sparse("every block"), "visits-every-block"),
        (Sparse("index"), "ignores-the-list"),
        (Sparse("first list"), "lists-of-the-first-queries"),
        (Sparse("mask all"), "masks-full-blocks"),
        (Sparse("never mask"), "never-masks"),
        (Sparse("full only"), "visits-only-full-blocks"),
        (Sparse("whole list"), "reads-astray"),
        (Sparse("scale"), "forgets-the-scale"),
        (Sparse("scales twice"), "scales-twice"),
        (Sparse("head"), "one-head-for-all"),
        (Sparse("padding"), "scores-the-padding"),
        (Sparse("tail"), "drops-the-last-keys"),
        (Sparse("queries"), "writes-past-its-queries"),
        (Sparse("rescale"), "forgets-to-rescale"),
        (Sparse("normalise"), "forgets-to-normalise"),
        (Sparse("guard"), "nan-from-nothing"),
        (Sparse("store"), "writes-nothing-or-reads-astray"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "sparse_attention.real_mask": [
        perturbing(),
        perturbing(keys=lambda x: x - 3, values=lambda x: 1 - 5 * x, tolerance=1e-9),
        asks_autograd,
    ],
    "sparse_attention.local_attention": [windowing(), walks_through_the_queries, asks_torch],
    "sparse_attention.longformer_mask": [marking(), marks_pair_by_pair],
    "sparse_attention.future_read": [reading(), keeps_sets],
    "sparse_attention.last_sees": [adding(), walks_the_masks],
    "sparse_attention.best_stride": [
        lambda n: (round((n / 2) ** 0.5), 1.5),
        stride_by_halving,
        counts_all_strides,
    ],
    "sparse_attention.block_cover": [covering(), pads_and_reshapes],
    "sparse_attention.window_traffic": [counting(), counts_by_a_mask],
    "sparse_attention.sparse_head": [looping(), two_passes],
    "sparse_attention.stream_step": [rolling(), keeps_them_in_order],
    "sparse_attention.block_recall": [choosing(), choosing_all(with_masks)],
    "sparse_attention.sparse_kernel": [Sparse(""), maximum_first],
}
