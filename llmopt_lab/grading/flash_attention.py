"""The checks of chapter 2. Each knows what the usual mistakes give, and names the one it sees."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.memory import Load, Store, ceil_div, tiles
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.flash_attention.cases import (
    attention_inputs,
    attention_oracle,
    guides_flash_attention,
    lse_oracle,
)
from llmopt_lab.flash_attention.io_model import Sizes, largest_tile_q
from llmopt_lab.flash_attention.records import Absorbed, Partial, Skipped, SoftmaxState
from llmopt_lab.flash_attention.reference import flash_attention
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect,
    expect_kernel,
    expect_numbers,
    expect_or_name,
    expect_parts,
    expect_stored,
    expect_untouched,
    launched,
)

NUMBER = 4  # bytes: float32


# 1. Fold a tile into the running softmax


@exercise(
    "flash_attention.absorb",
    points=3,
    minutes=15,
    hints=(
        "First the new m, the largest score so far of every row. What was summed before was summed "
        "relative to the old m: what must total and acc be multiplied by, so that they become "
        "relative to the new one?",
        "m = torch.maximum(state.m, scores.amax(dim=1)); shrink = exp(state.m - m) multiplies "
        "total AND acc; p = exp(scores - m[:, None]) is added to them, as p.sum(dim=1) and "
        "p @ values. Where m is -inf, subtract 0 instead of m.",
    ),
)
def _(absorb):
    hidden = -torch.inf
    late = [[0.0, 1, 2, 1, 4, 1, 4], [5.0, 0, 1, 2, 0, 4, 3], [1.0, 1, 3, 3, 0, 1, 2]]
    cases = [
        ("one tile", [[0.0, 2, 1, 2], [3.0, -1, 0, 1]], 4),
        ("row 0 has its largest score in a late tile, row 1 in the first", late, 3),
        ("scores around a thousand", [[1e3, 990, 1001, 998, 1002], [-1e3, -998, 0, 1, 2]], 2),
        (
            "row 0 sees no key of the first tile, row 2 sees none at all",
            [[hidden, hidden, 1, 0, 2], [0, hidden, 2, 1, hidden], [hidden] * 5],
            2,
        ),
    ]
    for seed, (what, rows, tile) in enumerate(cases):
        scores = torch.tensor(rows, dtype=torch.float64)
        values = torch.randn(
            scores.shape[1], 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        m = scores.amax(dim=1)
        p = torch.exp(scores - m.masked_fill(m == hidden, 0)[:, None])
        want = {"m": m, "total": p.sum(dim=1), "acc": p @ values}
        fold = partial(_folded, scores, values, tile)
        expect_or_name(
            f"{what}, after the last tile: state",
            fold(lambda *tile: absorb(*(_cloned(x) for x in tile))), want,
            "go through it by hand, tile by tile, with two tiles of one score each",
            [
                (name, fold(partial(_absorb, **change)), where)
                for name, change, where in ABSORB_MISTAKES
            ],
        )  # fmt: skip


# name, how `_absorb` differs, where to look
ABSORB_MISTAKES = [
    ("forgets-to-rescale", {"shrink_total": False, "shrink_acc": False},
     "total and acc were summed relative to the old m: multiply both by exp(old m - new m) before "
     "you add the new tile"),
    ("rescales-only-the-total", {"shrink_acc": False},
     "acc was summed relative to the old m, just as total: multiply it by exp(old m - new m), too"),
    ("rescales-only-acc", {"shrink_total": False},
     "total was summed relative to the old m, just as acc: multiply it by exp(old m - new m), too"),
    ("rescales-upside-down", {"upside_down": True},
     "the new m is at least the old one, so the factor exp(old m - new m) is at most 1. Yours is "
     "exp(new m - old m); the first m is -inf, which gives infinity times 0"),
    ("takes-the-tiles-maximum", {"m": "of the tile"},
     "m must be the largest score over ALL tiles so far: torch.maximum with the old m"),
    ("one-maximum-for-all-rows", {"m": "of all rows"},
     "every row is a softmax of its own, with its own maximum: amax(dim=1), not max()"),
    ("subtracts-no-maximum", {"m": "zero"},
     "without the maximum exp(1000) is infinity. Any m gives the same quotient, but only the "
     "largest score keeps every exponent at 0 or below"),
    ("divides-every-tile", {"divide": True},
     "that is the guide's mistake: what is divided by the total in every tile fades away. acc "
     "stays a plain sum; somebody divides once, after the last tile"),
    ("nan-from-nothing", {"guard": False},
     "a row without a key so far has m = -inf, and -inf - -inf is NaN. Subtract 0 instead of m "
     "where m is -inf: exp(-inf - 0) is 0, as it should be"),
]  # fmt: skip


def _absorb(
    state: SoftmaxState, scores: Tensor, values: Tensor, *, m: str = "running",
    shrink_total: bool = True, shrink_acc: bool = True, upside_down: bool = False,
    divide: bool = False, guard: bool = True,
) -> SoftmaxState:  # fmt: skip
    """The room's `absorb`, or one with a mistake."""
    top = {
        "running": torch.maximum(state.m, scores.amax(dim=1)),
        "of the tile": scores.amax(dim=1),
        "of all rows": torch.maximum(state.m, scores.max()).max().expand_as(state.m),
        "zero": torch.zeros_like(state.m),
    }[m]
    base = top.masked_fill(top == -torch.inf, 0) if guard else top
    shrink, p = torch.exp(state.m - base), torch.exp(scores - base[:, None])
    if upside_down:
        shrink = torch.exp(base - state.m)
    if m == "zero":
        shrink = torch.ones_like(shrink)
    total = (shrink if shrink_total else 1) * state.total + p.sum(dim=1)
    acc = (shrink[:, None] if shrink_acc else 1) * state.acc + p @ values
    return SoftmaxState(top, total, acc / total[:, None] if divide else acc)


def _folded(scores: Tensor, values: Tensor, tile: int, absorb: Callable) -> dict[str, Tensor]:
    state = SoftmaxState.empty(scores, values.shape[1])
    for cols in tiles(scores.shape[1], tile):
        state = absorb(state, scores[:, cols], values[cols])
        if not isinstance(state, SoftmaxState):
            raise NotYet(
                f"absorb returns a {type(state).__name__}",
                misconception="returns-other-things",
                hint="end with: return SoftmaxState(m, total, acc)",
            )
    return {"m": state.m, "total": state.total, "acc": state.acc}


def _cloned(x):
    """An attempt may write into what it is given."""
    if isinstance(x, SoftmaxState):
        return SoftmaxState(x.m.clone(), x.total.clone(), x.acc.clone())
    return x.clone()


# 2. The tiled forward


@exercise(
    "flash_attention.tiled_attention",
    points=3,
    minutes=20,
    hints=(
        "Two loops: tiles of queries outside, tiles of keys inside. Which line belongs before the "
        "inner loop, which into it, which after it? What is loaded in the inner loop is read again "
        "for every tile of queries.",
        "Before the inner loop: q_i = load('Q', q, rows) and a fresh SoftmaxState.empty. In it: "
        "load K and V of cols, scores = q_i @ k_j.T / sqrt(d_head), absorb. After it: finish, and "
        "one store of 'O' and one of 'L'.",
    ),
)
def _(tiled_attention):
    # queries, keys, d_head, d_v, tile of queries, tile of keys
    for n_q, n_k, d_head, d_v, tile_q, tile_k in [
        (4, 8, 4, 4, 4, 4),
        (8, 8, 4, 4, 4, 4),
        (3, 8, 4, 4, 4, 2),
        (9, 10, 5, 3, 4, 4),
        (10, 7, 4, 6, 4, 3),
        (1, 11, 4, 4, 4, 4),
    ]:
        q, k, v = (x[0, 0] for x in attention_inputs(Sizes(n_q, n_k, d_head, d_v), seed=n_q + n_k))
        out, lse = q.new_full((n_q, d_v), torch.nan), q.new_full((n_q,), torch.nan)
        inputs = (q.clone(), k.clone(), v.clone())
        with recording(Load, Store) as trace:
            tiled_attention(*inputs, out, lse, tile_q=tile_q, tile_k=tile_k)
        what = f"{n_q} queries, {n_k} keys, tiles of {tile_q} and {tile_k}"
        expect_stored(
            what, "out", out,
            "when the last key of a tile of queries is absorbed: "
            "store('O', out, rows, result.out), and the same for 'L'",
        )  # fmt: skip
        attend = partial(_attend, q, k, v)
        whole_q, whole_k = n_q // tile_q * tile_q, n_k // tile_k * tile_k
        whole = attend()
        expect_or_name(
            f"{what}: result", {"out": out, "lse": lse}, whole,
            "take the smallest case that is wrong, print rows and cols of every step",
            [
                ("forgets-the-scale", attend(scale=1.0),
                 "the scores are q_i @ k_j.T / sqrt(d_head). The guide forgets that as well"),
                ("walks-as-many-keys-as-queries",
                 attend(n_keys=min(n_k, ceil_div(n_q, tile_k) * tile_k)),
                 "the inner loop goes over the KEYS: tiles(len(k), tile_k). The guide takes the "
                 "number of queries for both, which goes unnoticed until one decodes with a cache"),
                ("forgets-the-last-keys", attend(n_keys=whole_k),
                 "the last tile of keys may be smaller than tile_k, but it counts"),
                ("forgets-the-last-queries",
                 {x: torch.where(_row(whole[x]) < whole_q, whole[x], torch.nan) for x in whole},
                 "the last tile of queries may be smaller than tile_q, but it counts"),
                ("never-starts-afresh", _carried_on(q, k, v, tile_q, tile_k),
                 "every tile of queries has a softmax of its own: make the empty state inside the "
                 "outer loop"),
            ],
        )  # fmt: skip
        _expect_traffic(trace, what, q, k, v, tile_q, tile_k)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, n_keys: int | None = None
) -> dict[str, Tensor]:
    """One head over the first `n_keys` keys."""
    k, v = k[:n_keys], v[:n_keys]
    return {"out": attention_oracle(q, k, v, scale=scale), "lse": lse_oracle(q, k, scale=scale)}


def _row(x: Tensor) -> Tensor:
    return torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1))


def _carried_on(q: Tensor, k: Tensor, v: Tensor, tile_q: int, tile_k: int) -> dict[str, Tensor]:
    """One state for all tiles of queries, as far as their sizes allow it."""
    out, lse = q.new_full((len(q), v.shape[1]), torch.nan), q.new_full((len(q),), torch.nan)
    state = SoftmaxState.empty(q[:tile_q], v.shape[1])
    for rows in tiles(len(q), tile_q):
        if rows.stop - rows.start != len(state.m):
            break
        for cols in tiles(len(k), tile_k):
            state = _absorb(state, q[rows] @ k[cols].T * q.shape[1] ** -0.5, v[cols])
        out[rows], lse[rows] = state.acc / state.total[:, None], state.m + state.total.log()
    return {"out": out, "lse": lse}


def _expect_traffic(trace: Trace, what: str, q, k, v, tile_q: int, tile_k: int) -> None:
    """Every tile is read as often as the paper says, and only a tile at a time."""
    read, written = trace.total("nbytes", Load), trace.total("nbytes", Store)
    n_tiles, n_cols = ceil_div(len(q), tile_q), ceil_div(len(k), tile_k)
    keys = k.nbytes + v.nbytes
    largest = max((load.nbytes for load in trace.of(Load)), default=0)
    of_q, of_k, of_v = q[:tile_q].nbytes, k[:tile_k].nbytes, v[:tile_k].nbytes
    if largest > max(of_q, of_k, of_v):
        raise NotYet(
            f"{what}: one load reads {largest} bytes; a tile of queries has {of_q}, "
            f"one of keys {of_k}, one of values {of_v}",
            misconception="holds-more-than-a-tile",
            hint="on chip there is room for one tile of each: load with rows or cols, inside "
            "the loops",
        )
    expect_or_name(
        f"{what}: bytes read", read, q.nbytes + n_tiles * keys,
        "Q is read once, K and V once for every tile of queries",
        [
            ("goes-around-load", 0, "read slow memory only with load(...): it keeps the count"),
            ("goes-around-load-for-values", q.nbytes + n_tiles * k.nbytes,
             "V is in slow memory as well: load('V', v, cols)"),
            ("reads-queries-again", n_cols * q.nbytes + n_tiles * keys,
             "the tile of queries stays on chip while the keys pass by: load it before the inner "
             "loop"),
            ("reads-keys-for-every-query", q.nbytes + len(q) * keys,
             "the keys are read once for a whole TILE of queries; that is what tiles are for"),
        ],
    )  # fmt: skip
    result = len(q) * (v.shape[1] + 1) * q.itemsize
    expect_or_name(
        f"{what}: bytes written", written, result, "O and L are written once, row by row",
        [
            ("goes-around-store", 0, "write slow memory only with store(...): it keeps the count"),
            ("writes-unfinished-results", n_cols * result,
             "m, total and acc stay on chip; write O and L after the last tile of keys"),
        ],
    )  # fmt: skip


# 3. Merge two partial results


@exercise(
    "flash_attention.merge",
    points=2,
    minutes=10,
    hints=(
        "Undo both divisions: a part's sum of exp(score) is exp(its lse). What share of the common "
        "sum does each part have? Then think of an lse of 1000.",
        "lse = torch.logaddexp(a.lse, b.lse); the parts' weights are exp(a.lse - lse) and "
        "exp(b.lse - lse). Where lse is -inf neither part saw a key: subtract 0 there.",
    ),
)
def _(merge):
    def part(scores: Tensor, values: Tensor) -> Partial:
        p = torch.softmax(scores, dim=1).nan_to_num(0)
        return Partial(p @ values, torch.logsumexp(scores, dim=1))

    rng = torch.Generator().manual_seed(3)
    values = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    plain = 2 * torch.randn(5, 9, generator=rng, dtype=torch.float64)
    hidden = plain.clone()
    hidden[1, :3] = hidden[2, 3:] = hidden[4] = -torch.inf
    for what, scores in [
        ("3 keys and 6 keys", plain),
        ("scores around a thousand", plain + torch.tensor([[1e3], [-1e3], [0], [2e3], [900]])),
        ("row 1 saw no key in a, row 2 none in b, row 4 none at all", hidden),
    ]:
        a, b = part(scores[:, :3], values[:3]), part(scores[:, 3:], values[3:])
        got = merge(Partial(a.out.clone(), a.lse.clone()), Partial(b.out.clone(), b.lse.clone()))
        if not isinstance(got, Partial):
            raise NotYet(
                f"merge returns a {type(got).__name__}",
                misconception="returns-other-things",
                hint="end with: return Partial(out, lse). The result may be merged again, so it "
                "needs its lse",
            )
        want = part(scores, values)
        expect_or_name(
            f"{what}: result", {"out": got.out, "lse": got.lse},
            {"out": want.out, "lse": want.lse},
            "take two parts of one key each: a softmax of two scores",
            _merge_mistakes(a, b, want),
        )  # fmt: skip


def _merge_mistakes(a: Partial, b: Partial, want: Partial) -> list[Mistake]:
    lse, sums = want.lse, (torch.exp(a.lse), torch.exp(b.lse))

    def mixed(of_a: Tensor, of_b: Tensor) -> Tensor:
        return of_a[:, None] * a.out + of_b[:, None] * b.out

    wrongs = [
        ("averages", (a.out + b.out) / 2, lse,
         "the part with the larger scores counts more: weight each by its share of the sum"),
        ("adds-the-results", a.out + b.out, lse,
         "both were divided by a sum of their own already; as they are they do not add up"),
        ("weights-the-wrong-part", mixed(torch.exp(b.lse - lse), torch.exp(a.lse - lse)), lse,
         "a's own share is exp(a.lse) / (exp(a.lse) + exp(b.lse)), not b's"),
        ("weights-by-the-logarithms", mixed(a.lse / (a.lse + b.lse), b.lse / (a.lse + b.lse)), lse,
         "lse is a logarithm: the shares are those of exp(lse)"),
        ("adds-the-logarithms", want.out, a.lse + b.lse,
         "the sums add, not their logarithms: torch.logaddexp(a.lse, b.lse)"),
        ("keeps-the-larger-lse", want.out, torch.maximum(a.lse, b.lse),
         "lse belongs to the keys of both parts: it is larger than that of either"),
        ("nan-from-nothing", mixed(torch.exp(a.lse - lse), torch.exp(b.lse - lse)), lse,
         "where neither part saw a key both lse are -inf, and -inf - -inf is NaN: subtract 0 "
         "there"),
        ("overflows", mixed(sums[0] / (sums[0] + sums[1]), sums[1] / (sums[0] + sums[1])),
         torch.log(sums[0] + sums[1]),
         "exp(1000) is infinity and exp(-1000) is 0. Subtract the common lse first: "
         "exp(a.lse - lse) is at most 1"),
    ]  # fmt: skip
    return [(name, {"out": out, "lse": lse}, where) for name, out, lse, where in wrongs]


# 4. Which keys may a query see?


@exercise(
    "flash_attention.causal_mask",
    points=2,
    minutes=8,
    hints=(
        "The last query is the newest token, and it sees every key. So how many keys does query i "
        "see? rows and cols say which queries and keys the tile is made of.",
        "query = torch.arange(rows.start, rows.stop)[:, None], key = torch.arange(cols.start, "
        "cols.stop); query i sees the keys up to i + n_k - n_q.",
    ),
)
def _(causal_mask):
    for n_q, n_k, rows, cols in [
        (4, 4, slice(0, 4), slice(0, 4)),
        (6, 9, slice(2, 6), slice(4, 9)),
        (8, 8, slice(4, 8), slice(2, 5)),
        (1, 6, slice(0, 1), slice(0, 6)),
        (3, 9, slice(0, 3), slice(5, 9)),
        (7, 4, slice(0, 5), slice(0, 3)),
        (20, 33, slice(8, 12), slice(18, 26)),
    ]:
        query, key = (torch.arange(x.start, x.stop) for x in (rows, cols))
        ahead = key - query[:, None] - (n_k - n_q)  # 0 for the query's own token
        local = torch.arange(len(key)) - torch.arange(len(query))[:, None]
        expect_or_name(
            f"causal_mask({_text(rows)}, {_text(cols)}, n_q={n_q}, n_k={n_k})",
            causal_mask(rows, cols, n_q, n_k), ahead <= 0,
            "draw the whole matrix, the last query in the last row, and cut the tile out",
            [
                ("hides-the-token-itself", ahead < 0, "a query sees its own key, too: <="),
                ("looks-one-ahead", ahead <= 1,
                 "that is the next token, which the model has yet to predict"),
                ("says-what-is-hidden", ahead > 0, "True must mean: this query may see this key"),
                ("top-left", ahead <= -(n_k - n_q),
                 "that aligns the FIRST query with the first key. With a cache the queries are the "
                 "newest tokens: the LAST query stands at the last key. Add n_k - n_q"),
                ("shifts-the-wrong-way", ahead <= -2 * (n_k - n_q),
                 "with n_k > n_q a query sees MORE keys than its own number: + n_k - n_q"),
                ("forgets-where-the-tile-is", local - (n_k - n_q) <= 0,
                 "row 0 of the tile is query rows.start, column 0 is key cols.start"),
                ("forgets-where-the-keys-are", ahead - cols.start <= 0,
                 "column 0 of the tile is key cols.start, not key 0"),
                ("forgets-where-the-queries-are", ahead + rows.start <= 0,
                 "row 0 of the tile is query rows.start, not query 0"),
                ("hides-nothing", torch.ones_like(ahead, dtype=torch.bool),
                 "a query must not see the keys of later tokens"),
            ],
        )  # fmt: skip


def _text(where: slice) -> str:
    return f"slice({where.start}, {where.stop})"


# 5. Tiles visited and skipped


@exercise(
    "flash_attention.count_tiles",
    points=2,
    minutes=12,
    hints=(
        "A tile is skipped if even its most favoured query cannot see its nearest key. It needs no "
        "mask if even its least favoured query sees its farthest key. Which query and which key "
        "are these?",
        "Query i sees the keys up to i + n_k - n_q. With the last query r of the tile: skipped if "
        "the first key is beyond r + n_k - n_q. With the first query f: full if the last key is at "
        "most f + n_k - n_q. The last tiles are shorter: min(start + tile, n) - 1 is their last.",
    ),
)
def _(count_tiles):
    for n_q, n_k, tile_q, tile_k in [
        (8, 8, 4, 4),
        (8, 8, 2, 4),
        (13, 13, 4, 3),
        (6, 17, 4, 4),
        (17, 6, 4, 4),
        (1, 20, 4, 8),
        (23, 30, 5, 7),
    ]:
        x = torch.zeros(max(n_q, n_k), 1)
        with recording(Absorbed, Skipped) as trace:
            flash_attention(x[:n_q], x[:n_k], x[:n_k], causal=True, tile_q=tile_q, tile_k=tile_k)
        masked = sum(bool(step.scores.isinf().any()) for step in trace.of(Absorbed))
        n_visited, n_skipped = len(trace.of(Absorbed)), len(trace.of(Skipped))
        got = count_tiles(n_q, n_k, tile_q, tile_k)
        expect_parts(got, "full tiles", "masked tiles", "skipped tiles")
        count = partial(_count, n_q, n_k, tile_q, tile_k)
        half = (n_visited + n_skipped) // 2
        expect_or_name(
            f"count_tiles({n_q}, {n_k}, {tile_q}, {tile_k}), (full, masked, skipped): answer",
            tuple(got), (n_visited - masked, masked, n_skipped),
            "draw the matrix of scores, the tiles, and the diagonal that ends at the bottom right",
            [
                ("top-left", count(offset=0),
                 "the diagonal ends at the LAST query and the last key: query i sees the keys up "
                 "to i + n_k - n_q"),
                ("forgets-the-tails", count(floor=True),
                 "a last tile that is not full is a tile, too: round up"),
                ("ends-past-the-matrix", count(overhang=True),
                 "the last tile ends at the last query or key, not where a whole tile would end"),
                ("masks-every-tile", (0, n_visited, n_skipped),
                 "a tile that lies wholly in the past needs no mask. Kernels save the comparison"),
                ("skips-what-is-half-seen", count(skip_query="first"),
                 "you judge by the tile's FIRST query. The last one sees further: skip only what "
                 "no query sees"),
                ("skips-by-the-last-key", count(skip_key="last"),
                 "you judge by the tile's LAST key. A tile whose first key is seen must be "
                 "visited"),
                ("visits-one-too-many", count(ahead=1),
                 "the first key that the last query cannot see is r + n_k - n_q + 1"),
                ("takes-half", (n_visited + n_skipped - half - masked, masked, half),
                 "half of the SCORES are hidden, about; tiles on the diagonal are visited whole"),
            ],
        )  # fmt: skip


def _count(
    n_q: int, n_k: int, tile_q: int, tile_k: int, *, offset: int | None = None,
    floor: bool = False, overhang: bool = False, skip_query: str = "last",
    skip_key: str = "first", ahead: int = 0,
) -> tuple[int, int, int]:  # fmt: skip
    """(full, masked, skipped), or what comes of one of the mistakes."""
    offset = n_k - n_q if offset is None else offset
    full = masked = skipped = 0
    for first_q in range(0, n_q, tile_q):
        for first_k in range(0, n_k, tile_k):
            last_q, last_k = first_q + tile_q - 1, first_k + tile_k - 1
            if floor and (last_q >= n_q or last_k >= n_k):
                continue
            if not overhang:
                last_q, last_k = min(last_q, n_q - 1), min(last_k, n_k - 1)
            query = last_q if skip_query == "last" else first_q
            key = first_k if skip_key == "first" else last_k
            if key > query + offset + ahead:
                skipped += 1
            elif last_k <= first_q + offset:
                full += 1
            else:
                masked += 1
    return full, masked, skipped


# 6. Bytes for a tile size


@exercise(
    "flash_attention.plan_tiles",
    points=2,
    minutes=12,
    hints=(
        "Two questions. How many numbers does one query add to what is on chip, and how many are "
        "there anyway? And: how often are all keys and values read, if tile_q queries share one "
        "pass over them?",
        "One query adds d (its own) + tile_k (scores) + d (acc) + 2 (m, total) numbers; K_j and "
        "V_j take 2 * tile_k * d. tile_q is what fits, at most n_q. Then the bytes are 4 * "
        "(n_q * d + ceil(n_q / tile_q) * 2 * n_k * d + n_q * (d + 1)).",
    ),
)
def _(plan_tiles):
    for n_q, n_k, d, tile_k, budget in [
        (64, 64, 8, 16, 4_096),
        (50, 70, 16, 8, 3_500),
        (33, 47, 4, 5, 1_000),
        (3, 90, 8, 16, 8_192),
    ]:
        call = f"plan_tiles(n_q={n_q}, n_k={n_k}, d={d}, tile_k={tile_k}, budget={budget})"
        got = plan_tiles(n_q, n_k, d, tile_k, budget)
        expect_parts(got, "tile_q", "bytes")
        sizes = Sizes(n_q, n_k, d, d)
        tile_q = min(n_q, largest_tile_q(sizes, budget=budget, tile_k=tile_k))

        def fits(per_query: int, at_all: int, room: int = budget // NUMBER, n_q: int = n_q) -> int:
            return max(0, min(n_q, (room - at_all) // per_query))

        query, pair = 2 * d + tile_k + 2, 2 * tile_k * d
        expect_or_name(
            f"{call}: tile_q", got[0], tile_q,
            "count what one query adds, and what is on chip anyway; every number has 4 bytes",
            [
                ("forgets-the-scores", fits(query - tile_k, pair),
                 "the tile of scores is on chip as well: tile_k numbers a query"),
                ("forgets-the-result", fits(query - d, pair),
                 "acc grows on chip: d numbers a query"),
                ("forgets-m-and-total", fits(query - 2, pair),
                 "every query has an m and a total, 2 numbers more"),
                ("forgets-the-values", fits(query, pair // 2),
                 "a tile of keys AND a tile of values are on chip"),
                ("forgets-the-keys-are-there", fits(query, 0),
                 "K_j and V_j take their room before the first query comes"),
                ("counts-numbers-not-bytes", fits(query, pair, budget),
                 "the budget is in bytes, and a number has 4 of them"),
                ("rounds-up", min(n_q, tile_q + 1), "the last query would not fit: round down"),
                ("more-than-there-are", largest_tile_q(sizes, budget=budget, tile_k=tile_k),
                 "a tile cannot have more queries than there are: at most n_q"),
            ],
        )  # fmt: skip
        x = torch.zeros(max(n_q, n_k), d)
        with recording(Load, Store) as trace:
            flash_attention(x[:n_q], x[:n_k], x[:n_k], tile_q=tile_q, tile_k=tile_k)
        own, keys, out, n_tiles = n_q * d, n_k * d, n_q * d, ceil_div(n_q, tile_q)
        expect_or_name(
            f"{call}: bytes", got[1], trace.total("nbytes", Load, Store),
            "that is what the reference loaded and stored with this tile. Q once, K and V once a "
            "tile of queries, O and L once",
            [
                (name, NUMBER * numbers, where)
                for name, numbers, where in [
                    ("reads-the-keys-once", own + 2 * keys + out + n_q,
                     "with one tile of queries on chip, the next one needs all keys again"),
                    ("rounds-tiles-down", own + n_q // tile_q * 2 * keys + out + n_q,
                     "the last, shorter tile of queries reads all keys as well: round up"),
                    ("reads-the-keys-for-every-query", own + n_q * 2 * keys + out + n_q,
                     "tile_q queries share one pass over the keys"),
                    ("reads-the-queries-again",
                     ceil_div(n_k, tile_k) * own + n_tiles * 2 * keys + out + n_q,
                     "a tile of queries stays on chip until it is done: Q is read once"),
                    ("forgets-a-read-of-values", own + n_tiles * keys + out + n_q,
                     "keys and values are both read for every tile of queries"),
                    ("forgets-what-is-written", own + n_tiles * 2 * keys,
                     "the results are written, too: d numbers a query, and L"),
                    ("forgets-l", own + n_tiles * 2 * keys + out,
                     "L, one number a query, is written for the backward pass"),
                    ("writes-the-scores", own + 2 * keys + 4 * n_q * n_k + out,
                     "that is naive attention, which writes and reads S and P"),
                ]
            ] + [
                ("counts-numbers-not-bytes-moved", own + n_tiles * 2 * keys + out + n_q,
                 "every number has 4 bytes"),
                ("takes-a-part-of-a-pass",
                 NUMBER * (own + n_q / tile_q * 2 * keys + out + n_q),
                 "nobody reads the keys 2.7 times: the number of tiles is rounded up"),
            ],
        )  # fmt: skip


# 7. Green tests, wrong kernel


@exercise(
    "flash_attention.test_by_hand",
    points=3,
    minutes=15,
    hints=(
        "Choose scores for which you know the softmax without a computer. With d_model = 1 and Q "
        "all ones, K IS the scores. Then let a block come after the first, let it have the larger "
        "score, and give it another value.",
        "block_size keys of score c, one more of score c + log(block_size): the last has weight "
        "1/2, the others share the other half. With V = 1 for those and 3 for the last, every "
        "output is 2. Take c = 200, so that exp(score) alone overflows.",
    ),
)
def _(test_by_hand):
    right = [
        ("naive attention", lambda Q, K, V, block_size: _naive(Q, K, V)),
        ("flash attention, mended", _guides_loop),
        ("flash attention in float64", _in_float64),
    ]
    for block_size in (4, 5, 16):
        for name, attention in right:
            try:
                test_by_hand(attention, block_size)
            except AssertionError as error:
                raise NotYet(
                    f"your test fails for {name}, which is right (block_size {block_size}): "
                    f"{error or 'AssertionError'}",
                    misconception="rejects-what-is-right",
                    hint="is the number that you expect right? No scale here. If it is, compare "
                    "with a tolerance: floats round",
                ) from error
        for name, misconception, where, attention in [
            ("the guide's function", "green-like-the-guides",
             "nothing is divided twice if there is one block, or if one key takes all the weight. "
             "Use more than block_size keys, let an early one count, and look at what came out",
             guides_flash_attention),
            ("one that drops the last, shorter block", "blind-to-lost-keys",
             "with equal values any weights that sum to 1 give the same answer. Give the last key "
             "a value of its own, and a length that is no multiple of block_size",
             partial(_guides_loop, drop_tail=True)),
            ("one that never rescales", "blind-to-the-rescaling",
             "if the largest score comes first, or all are equal, nothing needs rescaling. Let a "
             "later block have larger scores, and other values",
             partial(_guides_loop, alpha=False)),
            ("one that subtracts no maximum", "keeps-the-scores-small",
             "exp(score) alone overflows in float32 from a score of 89 on. Add 200 to all scores: "
             "the softmax stays as it is", lambda Q, K, V, block_size: _naive(Q, K, V, False)),
        ]:  # fmt: skip
            if not _fails(test_by_hand, attention, block_size):
                raise NotYet(
                    f"your test passes for {name} (block_size {block_size})",
                    misconception=misconception,
                    hint=where,
                )


def _in_float64(Q: Tensor, K: Tensor, V: Tensor, block_size: int) -> Tensor:
    return _guides_loop(Q.double(), K.double(), V.double(), block_size).to(Q.dtype)


def _fails(test: Callable, *args) -> bool:
    try:
        test(*args)
    except AssertionError:
        return True
    return False


def _naive(Q: Tensor, K: Tensor, V: Tensor, subtract: bool = True) -> Tensor:
    """Attention as the guide writes it, without a scale; (batch, n, d)."""
    S = Q @ K.mT
    if subtract:
        return torch.softmax(S, dim=-1) @ V
    P = torch.exp(S.float()).to(V.dtype)
    return P @ V / P.sum(dim=-1, keepdim=True)


def _guides_loop(
    Q: Tensor, K: Tensor, V: Tensor, block_size: int, *, drop_tail: bool = False, alpha: bool = True
) -> Tensor:  # fmt: skip
    """The guide's function, mended; or broken in another way."""
    acc = Q.new_zeros(*Q.shape[:-1], V.shape[-1])
    total, m = Q.new_zeros(*Q.shape[:-1], 1), Q.new_full((*Q.shape[:-1], 1), -torch.inf)
    n_keys = K.shape[1] // block_size * block_size if drop_tail else K.shape[1]
    for cols in tiles(n_keys or K.shape[1], block_size):
        S = Q @ K[:, cols].mT
        m_new = torch.maximum(m, S.amax(dim=-1, keepdim=True))
        shrink, P = torch.exp(m - m_new), torch.exp(S - m_new)
        total = (shrink if alpha else 1) * total + P.sum(dim=-1, keepdim=True)
        acc = (shrink if alpha else 1) * acc + P @ V[:, cols]
        m = m_new
    return acc / total


# 8. Two wrongs agree


@exercise(
    "flash_attention.relative_error",
    points=3,
    minutes=15,
    hints=(
        "An oracle is code that somebody else wrote and that shares no line with yours: "
        "F.scaled_dot_product_attention in float64. What does it do for you (scale, softmax), and "
        "what must you hand it (a mask, a KV head for each query head)?",
        "q, k, v to .double(); enable_gqa=True; for causal attn_mask = ones(n_q, n_k, bool)"
        ".tril(n_k - n_q), never is_causal=True. Rows without a key: masked_fill the result with 0 "
        "there. Then (got.double() - want).norm() / want.norm().",
    ),
)
def _(relative_error):
    for what, sizes, causal in [
        ("9 queries and keys, one head", Sizes(9, 9, 16, 16), False),
        ("6 query heads on 2 KV heads", Sizes(7, 10, 8, 8, n_heads=6, n_kv_heads=2), False),
        ("causal, 9 queries and keys", Sizes(9, 9, 8, 8, n_heads=2, n_kv_heads=2), True),
        ("causal, 1 query and 30 keys", Sizes(1, 30, 8, 8, n_heads=4, n_kv_heads=2), True),
        ("causal, 12 queries and 5 keys", Sizes(12, 5, 8, 8, n_heads=4, n_kv_heads=2), True),
    ]:
        q, k, v = (x[0] for x in attention_inputs(sizes, seed=sizes.n_q, peak=1.5))
        oracle = attention_oracle(q, k, v, causal=causal)
        for who, attention in [
            ("one that is right", partial(_claims, oracle)),
            ("one that is a little too large", partial(_claims, 1.01 * oracle)),
            ("naive attention of the guide", _guides_standard),
            ("one that is wrong in one row", partial(_claims, _spoilt(oracle))),
        ]:
            got = relative_error(attention, q.clone(), k.clone(), v.clone(), causal)
            result = attention(q, k, v, causal=causal)
            want = _relative(result, oracle)
            expect_or_name(
                f"{what}: the relative error of {who}", got, want,
                "compute the oracle of one query and two keys by hand",
                _error_mistakes(result, oracle, q, k, v, causal),
            )  # fmt: skip
            if want == 0 and got > 1e-12:
                raise NotYet(
                    f"{what}: the error of a result that is right in float64 is {got:.1e}",
                    misconception="measures-with-a-short-ruler",
                    hint="an oracle in float32 is wrong by 1e-7 itself. Compute it in float64 and "
                    "compare in float64",
                )


def _claims(result: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return result.clone()


def _spoilt(oracle: Tensor) -> Tensor:
    wrong = oracle.clone()
    wrong[..., -1, :] = 0
    return wrong


def _guides_standard(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attention_oracle(q, k, v, causal=causal, scale=1.0)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def _error_mistakes(
    result: Tensor, oracle: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> list[Mistake]:
    """The errors that come of another oracle, or of another norm."""
    n_heads, n_kv_heads, n_q, n_k = q.shape[0], k.shape[0], q.shape[1], k.shape[1]
    heads, error = torch.arange(n_heads) % n_kv_heads, result - oracle
    wrongs = [
        ("two-wrongs-agree", _relative(result, attention_oracle(q, k, v, causal=causal, scale=1.0)),
         "your oracle does not divide the scores by sqrt(d_head), and neither does the guide. Two "
         "functions from one hand make the same mistake: take torch's"),
        ("believes-the-attempt", 0.0,
         "do not compare the result with itself: it needs an oracle"),
        ("wrong-kv-head",
         _relative(result, attention_oracle(q, k[heads], v[heads], causal=causal)),
         "neighbouring query heads share a KV head: enable_gqa=True, or repeat_interleave, not "
         "repeat"),
        ("takes-the-largest-error", error.abs().max().item(),
         "relative is asked for: the norm of the difference over the norm of the oracle"),
        ("forgets-to-divide", error.norm().item(),
         "divide by the norm of the oracle, or the number means nothing by itself"),
        ("divides-by-the-result", (error.norm() / result.norm()).item(),
         "divide by the norm of the ORACLE: a wrong result may be of any size"),
        ("squares", _relative(result, oracle) ** 2,
         "the norm is the ROOT of the sum of squares"),
    ]  # fmt: skip
    if causal:
        corner = torch.ones(n_q, n_k, dtype=torch.bool).tril()
        top_left = scaled_dot_product_attention(q, k, v, attn_mask=corner, enable_gqa=True)
        wrongs += [
            ("forgets-causal", _relative(result, attention_oracle(q, k, v)),
             "with causal=True a query must not see the keys of later tokens"),
            ("top-left", _relative(result, top_left),
             "torch's is_causal=True lets query 0 see key 0 only. With a cache the queries are "
             "the newest tokens: hand it the mask, with .tril(n_k - n_q)"),
        ]  # fmt: skip
    if causal and n_q > n_k:
        wrongs += [
            ("nan-from-nothing", float("nan"),
             "a query without a key has a softmax over nothing. The result should be zeros "
             "there: set them before you compare"),
        ]  # fmt: skip
    return wrongs


# 9. The backward pass of a tile


@exercise(
    "flash_attention.backward_tile",
    points=3,
    minutes=20,
    hints=(
        "Four products, in this order: P of the tile, then dV from P and dO, then dP = dO V^T, "
        "then dS from P, dP and D = rowsum(dO * O). dQ and dK come from dS.",
        "p = exp(scale * q_i @ k_j.T - lse_i[:, None]); delta = (do_i * out_i).sum(1); "
        "ds = p * (do_i @ v_j.T - delta[:, None]); dq = scale * ds @ k_j, dk = scale * ds.T @ q_i, "
        "dv = p.T @ do_i.",
    ),
)
def _(backward_tile):
    for n_q, n_k, d_head, d_v, tile_q, tile_k in [
        (4, 3, 2, 2, 4, 3),
        (6, 9, 4, 3, 4, 4),
        (7, 5, 3, 5, 3, 2),
    ]:
        q, k, v = (x[0, 0] for x in attention_inputs(Sizes(n_q, n_k, d_head, d_v), seed=n_q))
        rng = torch.Generator().manual_seed(n_k)
        d_out = torch.randn(n_q, d_v, generator=rng, dtype=q.dtype)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, scale = attention_oracle(*leaves), d_head**-0.5
        want = torch.autograd.grad(out, leaves, d_out)
        inputs = (q, k, v, out.detach(), lse_oracle(q, k), d_out, scale, tile_q, tile_k)
        gradients = _gradients(*inputs, backward_tile)
        expect_or_name(
            f"{n_q} queries, {n_k} keys, tiles of {tile_q} and {tile_k}, all parts added: result",
            gradients, dict(zip(("dQ", "dK", "dV"), want, strict=True)),
            "compare with torch.autograd on one query and two keys",
            [
                (name, _gradients(*inputs, partial(_backward, **change)), where)
                for name, change, where in BACKWARD_MISTAKES
            ],
        )  # fmt: skip


# name, how `_backward` differs, where to look
BACKWARD_MISTAKES = [
    ("forgets-d", {"delta": "none"},
     "the weights of a row sum to 1, so more weight on one key is less on the others: that is the "
     "- D in dS = P * (dP - D), D = rowsum(dO * O)"),
    ("adds-d", {"delta": "plus"}, "dS = P * (dP - D): minus"),
    ("takes-d-from-the-tile", {"delta": "tile"},
     "rowsum(P * dP) is D only if the row is complete. A tile sees a part of it; rowsum(dO * O) "
     "needs no other tile"),
    ("softmax-of-the-tile", {"p": "tile"},
     "the weights of a tile do not sum to 1; the whole row's do. Use L of the whole row: "
     "P = exp(S - L)"),
    ("forgets-the-normaliser", {"p": "raw"},
     "exp(S) is not divided by anything yet: P = exp(S - L), and L is m + log(total)"),
    ("forgets-the-weights", {"outer": False}, "dS = P * (dP - D): the P in front is missing"),
    ("forgets-the-scale", {"chain": False},
     "S = scale * Q K^T, so dQ and dK get the factor scale as well: the chain rule"),
    ("scales-twice", {"twice": True},
     "dQ and dK have the factor scale once, dV has none"),
    ("dv-from-ds", {"dv": "ds"}, "O = P V, so dV = P^T dO"),
    ("swaps-dq-and-dk", {"swap": True}, "return dQ, dK, dV, in this order"),
]  # fmt: skip


def _backward(
    q_i, k_j, v_j, out_i, lse_i, do_i, scale, *, delta: str = "right", p: str = "right",
    outer: bool = True, chain: bool = True, twice: bool = False, dv: str = "p", swap: bool = False,
):  # fmt: skip
    """One tile's part of dQ, dK and dV, or what comes of a mistake."""
    scores = scale * q_i @ k_j.T
    weights = {
        "right": torch.exp(scores - lse_i[:, None]),
        "tile": torch.softmax(scores, dim=1),
        "raw": torch.exp(scores),
    }[p]
    d_p = do_i @ v_j.T
    row = {
        "right": (do_i * out_i).sum(dim=1),
        "none": torch.zeros_like(lse_i),
        "plus": -(do_i * out_i).sum(dim=1),
        "tile": (weights * d_p).sum(dim=1),
    }[delta]
    d_s = (weights if outer else 1) * (d_p - row[:, None])
    factor = (scale if chain else 1) * (scale if twice else 1)
    d_q, d_k = factor * d_s @ k_j, factor * d_s.T @ q_i
    d_v = (weights if dv == "p" else d_s).T @ do_i
    return (d_k, d_q, d_v) if swap else (d_q, d_k, d_v)


def _gradients(q, k, v, out, lse, d_out, scale, tile_q, tile_k, backward) -> dict[str, Tensor]:
    """The parts of all tiles, added up. Where shapes do not fit, so they stay: a mistake."""
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for rows in tiles(len(q), tile_q):
        for cols in tiles(len(k), tile_k):
            tile = (q[rows], k[cols], v[cols], out[rows], lse[rows], d_out[rows])
            parts = backward(*(x.clone() for x in tile), scale)
            expect_parts(parts, "dQ of the tile", "dK of the tile", "dV of the tile")
            for total, where, part in zip(sums, (rows, cols, cols), parts, strict=True):
                if not isinstance(part, Tensor) or part.shape != total[where].shape:
                    return {"dQ": parts[0], "dK": parts[1], "dV": parts[2]}
                total[where] += part
    return dict(zip(("dQ", "dK", "dV"), sums, strict=True))


# 10. Can it cheat?


@exercise(
    "flash_attention.looks_ahead",
    points=2,
    minutes=12,
    hints=(
        "Change something that a query must not see, and look whether its answer moves. What can "
        "be changed: keys, values, or both. Who must not move: all queries before that token.",
        "For EVERY key t: clone k and v, change both at t, run again, compare the rows of the "
        "queries that must not see it: query i sees the keys up to i + n_k - n_q, so these are "
        "the rows [0, t - (n_k - n_q)), where there are any.",
    ),
)
def _(looks_ahead):
    square, cached, short = (_cheat_inputs(n_q, n_k) for n_q, n_k in ((9, 9), (4, 9), (9, 5)))
    # who, whether it cheats, inputs, misconception if the test is wrong about it, where to look
    for who, cheats, inputs, misconception, where in [
        (_Causal(), False, square, "accuses-the-honest",
         "a query may see its own token: only the rows BEFORE token t must stay"),
        (_Causal(), False, cached, "misplaces-the-diagonal",
         "with a cache query 0 is not token 0: query i is token i + n_k - n_q"),
        (_Causal(), False, short, "misplaces-the-first-queries",
         "with more queries than keys the first queries see no key; query i sees the keys up to "
         "i + n_k - n_q"),
        (_Causal(ahead=99), True, square, "never-sees-a-leak",
         "change the last key and value: no query but the last may move"),
        (_Causal(leak="values"), True, square, "changes-only-keys",
         "this one mixes future VALUES in: change v[t] as well"),
        (_Causal(leak="total"), True, square, "changes-only-values",
         "this one normalises over future KEYS: it masks after the softmax. Change k[t] as well"),
        (_Causal(ahead=1), True, square, "forgets-the-next-token",
         "this one looks one token ahead: query t - 1 must not move when token t changes"),
        (_Causal(tile=4), True, square, "tries-only-the-last-token",
         "this one masks whole tiles of 4 keys and forgets the diagonal inside them. The last "
         "token is alone in its tile: change every token, one at a time"),
        (_Causal(pair=(2, 5)), True, square, "tries-only-some-tokens",
         "here one query sees one later key. Change every token, one at a time"),
        (_Causal(leak="a little"), True, square, "tolerates-small-leaks",
         "future values enter with a weight of 1e-4. What must not move must not move at all, but "
         "for rounding"),
        (_Causal(ahead=1), True, cached, "blind-with-a-cache",
         "with fewer queries than keys, token t belongs to query t - (n_k - n_q)"),
        (_Causal(top_left=True), True, short, "blind-without-a-key",
         "with more queries than keys, query 0 must see nothing at all: here it sees key 0"),
    ]:  # fmt: skip
        n_q, n_k = len(inputs[0]), len(inputs[1])
        got = looks_ahead(who, *(x.clone() for x in inputs))
        expect(f"looks_ahead({who}, q, k, v) with {n_q} queries and {n_k} keys", got, cheats,
               where, misconception=misconception)  # fmt: skip


def _cheat_inputs(n_q: int, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x[0, 0] for x in attention_inputs(Sizes(n_q, n_k, 4, 3), seed=n_q, peak=1.0))


class _Causal:
    """Causal attention of one head, (n_q, d), or one that cheats."""

    def __init__(self, *, ahead=0, leak="", tile=0, pair=None, top_left=False):
        self.ahead, self.leak, self.tile, self.pair = ahead, leak, tile, pair
        self.top_left = top_left

    def __repr__(self) -> str:
        honest = not (self.ahead or self.leak or self.tile or self.pair or self.top_left)
        return "an honest attention" if honest else "a cheating attention"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key = torch.arange(len(q))[:, None], torch.arange(len(k))
        last = query + self.ahead + (0 if self.top_left else len(k) - len(q))
        if self.tile:
            last = last // self.tile * self.tile + self.tile - 1
        seen = key <= last
        if self.pair:
            seen = seen | (query == self.pair[0]) & (key == self.pair[1])
        scores = q @ k.T * q.shape[1] ** -0.5
        if self.leak == "total":
            return torch.softmax(scores, dim=1).masked_fill(~seen, 0) @ v
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=1).nan_to_num(0)
        mixed = {"values": 0.5, "a little": 1e-4}.get(self.leak, 0.0)
        return weights @ v + mixed * v.mean(dim=0)


# 11. The forward kernel


@exercise(
    "flash_attention.forward_kernel",
    points=5,
    minutes=40,
    hints=(
        "Write it in this order and run the check after each: the loop over the keys with a mask "
        "for the last tile; the KV head; the store of out and L with a mask for the last queries; "
        "the causal mask; at the end the queries that see no key.",
        "col = first + tl.arange(0, TILE_K); ok = (col < n_k)[None, :], and with CAUSAL also "
        "col[None, :] <= row[:, None] + n_k - n_q. Scores where not ok become -inf. base = "
        "tl.where(m_new == -inf, 0.0, m_new) goes into both exponentials. Divide by "
        "tl.where(total > 0, total, 1.0); L is m + tl.log(of that).",
    ),
)
def _(kernel):
    expect_kernel("forward_kernel", kernel)
    # n_q, n_k, query heads, KV heads, causal. n_heads * n of each tensor is at least what a tile of
    # 16 lacks at its end, so that no mistake leaves what `_launch` puts around it
    for what, n_q, n_k, n_heads, n_kv_heads, causal in [
        ("one tile", 16, 16, 1, 1, False),
        ("4 query heads on 2 KV heads", 16, 16, 4, 2, False),
        ("several tiles of keys", 16, 48, 2, 1, False),
        ("20 keys", 16, 20, 2, 2, False),
        ("37 queries", 37, 16, 2, 1, False),
        ("causal", 32, 32, 2, 1, True),
        ("causal, 3 queries and 41 keys", 3, 41, 8, 2, True),
        ("causal, 21 queries and 9 keys", 21, 9, 2, 2, True),
    ]:
        sizes = Sizes(n_q, n_k, 16, 16, n_heads=n_heads, n_kv_heads=n_kv_heads)
        q, k, v = (x[0] for x in attention_inputs(sizes, dtype=torch.float32, seed=n_q + n_k))
        got = _launch(kernel, what, q, k, v, causal)
        want = {
            "out": attention_oracle(q, k, v, causal=causal),
            "lse": lse_oracle(q, k, causal=causal),
        }
        expect_numbers(
            what, "out", got["out"],
            "does the kernel end in a tl.store to its own rows of out? If so, it reads "
            "outside the tensors: take the address of a key apart, (KV head, col, d)",
        )  # fmt: skip
        if got["out"][want["lse"] == -torch.inf].isnan().any():
            raise NotYet(
                f"{what}: the rows of the queries that see no key are NaN, expected zeros",
                misconception="nan-from-nothing",
                hint="two places make it. m stays -inf, and -inf - -inf is NaN: subtract 0 there. "
                "total stays 0, and 0 / 0 is NaN: divide by tl.where(total > 0, total, 1.0)",
            )
        expect_or_name(
            what + ": result", got, want,
            "compare with the reference line by line: address, mask, scale, running softmax",
            _kernel_mistakes(q.double(), k.double(), v.double(), causal, want),
        )  # fmt: skip


def _launch(kernel, what: str, q, k, v, causal: bool) -> dict[str, Tensor]:
    """One program per (tile of queries, query head), on a GPU or in the interpreter."""
    device, (n_heads, n_q, d_head) = pick_device(), q.shape
    # each stands between others: an address that is off a little finds those, and no crash
    q3, k3, v3 = (torch.stack([torch.full_like(x, torch.nan), x, -x]).to(device) for x in (q, k, v))
    out = torch.full((3, *q.shape), torch.nan, device=device)
    lse = torch.full((3, n_heads, n_q), torch.nan, device=device)
    with launched():
        kernel[(ceil_div(n_q, 16), n_heads)](
            q3[1], k3[1], v3[1], out[1], lse[1], n_q, k.shape[1], d_head**-0.5,
            GROUP=n_heads // k.shape[0], CAUSAL=causal, D=d_head, TILE_Q=16, TILE_K=16,
        )  # fmt: skip
    for name, tensor in (("out", out), ("lse", lse)):
        expect_untouched(
            what, name, ~tensor[[0, 2]].isnan(),
            "the last tile of queries is shorter: store with the mask row < n_q",
            misconception="writes-past-its-queries",
        )  # fmt: skip
    return {"out": out[1].cpu(), "lse": lse[1].cpu()}


def _kernel_mistakes(q, k, v, causal: bool, want: dict[str, Tensor]) -> list[Mistake]:
    """What kernels with the usual mistakes give, in float64."""
    (n_heads, n_q, d_head), (n_kv_heads, n_k, _) = q.shape, k.shape
    group = n_heads // n_kv_heads
    keys, values = (x.repeat_interleave(group, dim=0) for x in (k, v))
    walk = partial(_walk, q, causal=causal, n_k=n_k)
    scores = d_head**-0.5 * q @ keys.mT
    if causal:
        scores = scores.masked_fill(torch.arange(n_k) > _row(q[0]) + n_k - n_q, -torch.inf)
    m = scores.amax(dim=2)
    total = torch.exp(want["lse"] - m.masked_fill(m == -torch.inf, 0))
    wrongs = [
        ("forgets-the-scale", walk(keys, values, scale=1.0), "multiply the scores by `scale`"),
        ("scales-twice", walk(keys, values, scale=1 / d_head),
         "multiply the scores by `scale` once"),
        ("forgets-to-rescale", walk(keys, values, shrink_total=False, shrink_acc=False),
         "acc and total were summed relative to the old m: multiply both by exp(m - m_new)"),
        ("rescales-only-the-total", walk(keys, values, shrink_acc=False),
         "acc was summed relative to the old m, just as total: multiply it by exp(m - m_new)"),
        ("rescales-only-acc", walk(keys, values, shrink_total=False),
         "total was summed relative to the old m, just as acc: multiply it by exp(m - m_new)"),
        ("wrong-kv-head", walk(k.repeat(group, 1, 1), v.repeat(group, 1, 1)),
         "neighbouring query heads share a KV head: head // GROUP"),
        ("forgets-to-normalise", {**want, "out": want["out"] * total[:, :, None]},
         "acc is a sum of p * v; divide it by total before you store it"),
        ("l-without-the-maximum", {**want, "lse": torch.log(total)},
         "total is relative to m: L = m + log(total)"),
        ("l-without-the-sum", {**want, "lse": m}, "L = m + log(total)"),
        ("forgets-l", {**want, "lse": torch.full_like(m, torch.nan)},
         "store L, one number a query, as well"),
    ]  # fmt: skip
    whole, missing = n_k // 16 * 16, -n_k % 16
    if missing:
        pad = torch.zeros(n_heads, missing, d_head, dtype=q.dtype)
        past = (_with_what_follows(x, missing).repeat_interleave(group, dim=0) for x in (k, v))
        wrongs += [
            ("scores-the-padding", walk(*(torch.cat([x, pad], dim=1) for x in (keys, values))),
             "a masked load gives keys of zeros, but a zero key has score 0 and weight "
             "exp(0 - m): set scores to -inf where col is not below n_k"),
            ("reads-past-its-keys", walk(*past),
             "the last tile of keys is shorter; what follows in memory is another head's, or "
             "nobody's. Mask loads and scores where col is not below n_k"),
            ("drops-the-last-keys", walk(keys[:, :whole], values[:, :whole]),
             "n_k // TILE_K leaves out the shorter last tile: walk range(0, n_k, TILE_K)"),
        ]  # fmt: skip
    if causal:
        wrongs += [
            ("forgets-causal", walk(keys, values, causal=False),
             "with CAUSAL a query must not see later keys"),
            ("top-left", walk(keys, values, offset=0),
             "the LAST query stands at the last key: row sees the keys up to row + n_k - n_q"),
            ("hides-the-token-itself", walk(keys, values, offset=n_k - n_q - 1),
             "a query sees its own token: <="),
        ]  # fmt: skip
    return wrongs


def _with_what_follows(x: Tensor, n: int) -> Tensor:
    """Each head's rows, and the n rows that `_launch` has put behind them."""
    rows, n_rows = torch.cat([x, -x]).flatten(0, 1), x.shape[1]
    return torch.stack([rows[h * n_rows : (h + 1) * n_rows + n] for h in range(len(x))])


def _walk(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, n_k: int, offset: int | None = None,
    scale: float | None = None, **mistake,
) -> dict[str, Tensor]:  # fmt: skip
    """All heads in tiles of 16 keys, with `_absorb` and its mistakes; a KV head a query head."""
    offset = n_k - q.shape[1] if offset is None else offset
    scale = q.shape[2] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for q_h, k_h, v_h in zip(q, k, v, strict=True):
        state = SoftmaxState.empty(q_h, v.shape[2])
        for cols in tiles(len(k_h), 16):
            scores = scale * q_h @ k_h[cols].T
            if causal:
                key = torch.arange(cols.start, cols.stop)
                scores = scores.masked_fill(key > _row(q_h) + offset, -torch.inf)
            state = _absorb(state, scores, v_h[cols], **mistake)
        total = torch.where(state.total > 0, state.total, 1)
        outs.append(state.acc / total[:, None])
        lses.append(state.m + torch.log(total))
    return {"out": torch.stack(outs), "lse": torch.stack(lses)}
