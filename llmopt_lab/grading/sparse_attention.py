"""The checks of chapter 5. Each knows what the usual mistakes give, and names the one it sees."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.memory import Load, Store, ceil_div, tiles
from llmopt_lab.core.trace import recording
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect_kernel,
    expect_no_nan,
    expect_numbers,
    expect_or_name,
    expect_parts,
    expect_stored,
    expect_untouched,
    launched,
)
from llmopt_lab.sparse_attention import Causal, SlidingWindow, cover, sparse_attention
from llmopt_lab.sparse_attention.cases import (
    Sizes,
    attention_inputs,
    attention_oracle,
    guides_longformer_attention,
    guides_strided_attention,
)
from llmopt_lab.sparse_attention.io_model import pairs_formula
from llmopt_lab.sparse_attention.patterns import Listed, longformer, sparse_transformer
from llmopt_lab.sparse_attention.recall import block_mass, reach


def _head(n_q: int, n_k: int, d: int, d_v: int, *, peak: float = 1.5) -> tuple:
    """q, k, v of one head, float64."""
    return tuple(x[0, 0] for x in attention_inputs(Sizes(n_q, n_k, d, d_v), seed=n_q, peak=peak))


def _rows_cols(n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n_k - n_q, n_k)[:, None], torch.arange(n_k)


# 1. The real mask


@exercise(
    "sparse_attention.real_mask",
    points=3,
    minutes=15,
    hints=(
        "Run the attention once as it is. Then, for one token after the other: change its key and "
        "its value, nothing else, run again, and look which rows of the result have moved. Those "
        "rows are one COLUMN of the mask.",
        "before = attention(q, k, v). For every j: k2, v2 = k.clone(), v.clone(); k2[j] += 1; "
        "v2[j] += 1; mask[:, j] = (attention(q, k2, v2) != before).any(dim=1). Clone anew for "
        "every j.",
    ),
)
def _(real_mask):
    for what, attention, want, inputs in _boxes():
        got = real_mask(attention, *(x.clone() for x in inputs))
        if isinstance(got, Tensor) and got.dtype != torch.bool:
            raise NotYet(
                f"the mask of {what} holds {got.dtype}, expected bools",
                misconception="returns-the-differences",
                hint="True where something moved: compare the result with the one before",
            )
        wrongs = [
            (name, _perturbed(attention, *inputs, **change), where)
            for name, change, where in MASK_MISTAKES
        ]
        if want.shape[0] == want.shape[1]:
            wrongs += [
                ("transposes", want.T,
                 "a row is a query, a column a key: what moves when token j changes goes into "
                 "mask[:, j]"),
                ("says-who-does-not", ~want, "True must mean: this query reads this key"),
            ]  # fmt: skip
        expect_or_name(
            f"the real mask of {what}: mask", got, want,
            "change one token, and print which rows of the result differ from before",
            wrongs,
        )  # fmt: skip


# name, how `_perturbed` differs, where to look
MASK_MISTAKES = [
    ("changes-only-keys", {"values": False},
     "a query with one key gives it weight 1, whatever the key: change the VALUE of the token too"),
    ("changes-only-values", {"keys": False},
     "here a token's key counts in the softmax although its value is masked: change the KEY too"),
    ("changes-the-query", {"queries": True},
     "a query moves its own row and no other. Who reads token j? Change its key and value"),
    ("never-puts-back", {"keep": True},
     "after token 0 is changed, it must be as before when token 1 is changed: clone anew for each"),
    ("zero-stays-zero", {"change": lambda x: 2 * x},
     "one token of this text has a key and a value of zeros. To multiply them, or to set them to "
     "zero, changes nothing: add something"),
    ("overlooks-small-weights", {"tolerance": 1e-2},
     "a small weight is a weight: what is not read does not move at all, but for rounding"),
]  # fmt: skip


def _perturbed(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, *, keys: bool = True,
    values: bool = True, queries: bool = False, keep: bool = False,
    change: Callable = lambda x: x + 1, tolerance: float = 1e-12,
) -> Tensor:  # fmt: skip
    """The mask that comes of changing one token after the other."""
    before = attention(q, k, v)
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    for j in range(len(k)):
        if not keep:
            q2, k2, v2 = q.clone(), k.clone(), v.clone()
        if queries:
            if j < len(q):
                q2[j] = change(q2[j])
        else:
            k2[j] = change(k2[j]) if keys else k2[j]
            v2[j] = change(v2[j]) if values else v2[j]
        mask[:, j] = ((attention(q2, k2, v2) - before).abs() > tolerance).any(dim=1)
    return mask


def _boxes():
    """(who, attention, the keys that it really reads, q k v)."""
    rows, cols = _rows_cols(7, 7)
    causal, square = cols <= rows, _head(7, 7, 4, 3)
    yield "a causal attention, 7 tokens", partial(attention_oracle, mask=causal), causal, square

    zeros = tuple(x.clone() for x in square)
    zeros[1][3] = zeros[2][3] = 0
    near = (rows - cols).abs() <= 1
    yield (
        "an attention to the neighbours, 7 tokens",
        partial(attention_oracle, mask=near),
        near,
        zeros,
    )

    rows, cols = _rows_cols(5, 9)
    window = (cols <= rows) & (cols > rows - 4)
    yield (
        "a window of 4 keys, 5 queries and 9 keys",
        partial(attention_oracle, mask=window),
        window,
        _head(5, 9, 4, 3),
    )

    rows, cols = _rows_cols(10, 10)
    marked = (rows == 0) | (cols >= rows - 2) & (cols < rows + 2)
    guides = partial(_batched, guides_longformer_attention, window_size=4, global_indices=(0, -1))
    yield "the guide's Longformer, window 4, 10 tokens", guides, marked, _head(10, 10, 4, 4)

    every = (cols % 4 == 0).expand(10, 10)
    guides = partial(_batched, guides_strided_attention, stride=4)
    yield "the guide's strided attention, stride 4, 10 tokens", guides, every, _head(10, 10, 4, 4)

    rows, cols = _rows_cols(6, 6)
    local = (cols <= rows) & (cols > rows - 2)
    yield "a mean of two values, 6 tokens", partial(_mean, mask=local), local, _head(6, 6, 4, 3)

    everything = torch.ones(6, 6, dtype=torch.bool)
    what, six = "one that masks after the softmax, 6 tokens", _head(6, 6, 4, 3)
    yield what, partial(_masked, mask=local, how="after"), everything, six

    last = local | (cols == 5)
    yield (
        "a window with a weak link to the last token, 6 tokens",
        partial(_leaks, mask=local),
        last,
        six,
    )


def _mean(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
    return (mask / mask.sum(1, keepdim=True)).to(v.dtype) @ v


def _leaks(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
    return attention_oracle(q, k, v, mask) + 1e-4 * v[-1]


def _batched(attention: Callable, q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
    return attention(q[None], k[None], v[None], **settings)[0]


# 2. Window 1, window 3


@exercise(
    "sparse_attention.local_attention",
    points=3,
    minutes=15,
    hints=(
        "Write down the keys of query 5 for widths 1, 2, 3 and 4, symmetric and causal. Then make "
        "a mask (n, n) of back = query - key, once for all heads and batches: n is the size of "
        "dimension -2.",
        "back = arange(n)[:, None] - arange(n). Causal: (back >= 0) & (back < width). Symmetric: "
        "back.abs() <= width // 2. scores = q @ k.transpose(-2, -1) / sqrt(d), masked_fill(~mask, "
        "-inf), softmax(-1), @ v.",
    ),
)
def _(local_attention):
    # leading dimensions, n, width, causal
    for lead, n, width, causal in [
        ((1,), 9, 3, False),
        ((1,), 9, 1, False),
        ((2,), 8, 4, False),
        ((2,), 9, 3, True),
        ((1,), 7, 1, True),
        ((), 8, 4, True),
        ((1, 1), 6, 3, False),
        ((2, 3), 7, 3, True),
        ((1,), 5, 99, False),
        ((1,), 5, 99, True),
    ]:
        rng = torch.Generator().manual_seed(n)
        q, k, v = 2 * torch.randn(3, *lead, n, 4, generator=rng, dtype=torch.float64)
        back = torch.arange(n)[:, None] - torch.arange(n)
        want = attention_oracle(q, k, v, _window(back, width, causal))
        what = f"{(*lead, n, 4)}, width {width}, {'causal' if causal else 'symmetric'}"
        got = local_attention(q.clone(), k.clone(), v.clone(), width, causal)
        expect_or_name(
            f"{what}: result", got, want,
            "print the keys of one query in the middle, one at the start and one at the end",
            [
                (name, _masked(q, k, v, _window(back, width, causal, **change), **how), where)
                for name, change, how, where in WINDOW_MISTAKES
            ],
        )  # fmt: skip


def _window(back: Tensor, width: int, causal: bool, *, wrong: str = "") -> Tensor:
    """Which keys a query sees, `back` tokens before it; or what comes of a mistake."""
    half = width // 2
    if wrong == "full":
        return torch.ones_like(back, dtype=torch.bool)
    if wrong == "radius":
        return (back >= 0) & (back <= width) if causal else back.abs() <= width
    if wrong == "open":
        return (back >= 0) & (back < width) if causal else (back > -half) & (back <= half)
    if wrong == "never causal":
        return back.abs() <= half
    if wrong == "half":
        return (back >= 0) & (back <= half) if causal else back.abs() <= half
    if wrong == "always causal":
        return (back >= 0) & (back < width)
    if wrong == "without itself":
        return _window(back, width, causal) & (back != 0)
    if wrong == "odd only":
        # as many keys as the width says, even or odd
        return (back >= 0) & (back < width) if causal else (back <= half) & (back > half - width)
    return (back >= 0) & (back < width) if causal else back.abs() <= half


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, how: str = "") -> Tensor:
    """Attention under a mask, zeros for a blind query; or what comes of a mistake."""
    scale = 1.0 if how == "unscaled" else q.shape[-1] ** -0.5
    scores = scale * q @ k.mT
    if how == "zeros":
        return torch.softmax(scores * mask, dim=-1) @ v
    if how == "after":
        return (torch.softmax(scores, dim=-1) * mask) @ v
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0) @ v


# name, how `_window` and `_masked` differ, where to look
WINDOW_MISTAKES = [
    ("trims-even-widths", {"wrong": "odd only"}, {},
     "a symmetric window has width // 2 keys on EACH side: width 4 has 5 keys, as width 5"),
    ("misses-the-right-end", {"wrong": "open"}, {},
     "that is the guide's window: it ends before i + width // 2. Width 3 gives the keys i - 1 and "
     "i, width 1 none at all. The right end belongs to the window"),
    ("forgets-the-scale", {}, {"how": "unscaled"},
     "divide the scores by sqrt(d), as everywhere. The guide scales in one function and not in the "
     "next"),
    ("width-on-each-side", {"wrong": "radius"}, {},
     "width counts ALL keys of the window, the query's own among them: width // 2 on each side, or "
     "width - 1 before it"),
    ("looks-ahead", {"wrong": "never causal"}, {},
     "with causal=True no later key may be seen"),
    ("halves-the-causal-window", {"wrong": "half"}, {},
     "a causal window has its width - 1 other keys all on one side, before the query"),
    ("always-causal", {"wrong": "always causal"}, {},
     "with causal=False the window lies on both sides of the query"),
    ("forgets-itself", {"wrong": "without itself"}, {},
     "the query's own key belongs to the window"),
    ("sees-everything", {"wrong": "full"}, {},
     "no key was hidden. With more dimensions than three, is your n the number of heads? The guide "
     "takes Q.size(1); the tokens are dimension -2"),
    ("hides-with-zeros", {}, {"how": "zeros"},
     "a score of 0 has weight exp(0) = 1. A hidden key has the score -inf"),
    ("masks-after-the-softmax", {}, {"how": "after"},
     "weights that are set to 0 after the softmax leave a row that does not sum to 1: hide the "
     "scores before"),
]  # fmt: skip


# 3. Symmetric global tokens


@exercise(
    "sparse_attention.longformer_mask",
    points=2,
    minutes=8,
    hints=(
        "Three questions for each pair of a query and a key: are they neighbours? Is the query "
        "global? Is the key global? One yes is enough. Which token is -1?",
        "tokens = [t % n for t in tokens]; mask = (i - j).abs() <= width // 2; then "
        "mask[tokens, :] = True and mask[:, tokens] = True.",
    ),
)
def _(longformer_mask):
    for n, width, tokens in [
        (8, 3, (0, 5)),
        (9, 3, (0, -1)),
        (8, 4, (3, -2)),
        (7, 1, (5, 2, -7)),
        (6, 5, ()),
    ]:
        i, j = _rows_cols(n, n)
        near = (i - j).abs() <= width // 2
        real = torch.tensor([t % n for t in tokens], dtype=torch.int64)
        plain = torch.tensor([t for t in tokens if t >= 0], dtype=torch.int64)
        row, col = torch.isin(i, real), torch.isin(j, real)
        expect_or_name(
            f"longformer_mask({n}, {width}, {tokens})", longformer_mask(n, width, tokens),
            near | row | col,
            "draw it: a band along the diagonal, a row and a column for each global token",
            [
                ("one-way", near | row,
                 "that is the guide's: global tokens read all, but nobody reads them. They must "
                 "be seen by all, too: a column each"),
                ("nobody-asks", near | col,
                 "all read the global tokens; they must read all, too: a row each"),
                ("minus-one-is-no-token", near | torch.isin(i, plain) | torch.isin(j, plain),
                 "no query has the number -1: count from the end, t % n"),
                ("one-way-and-minus-one", near | torch.isin(i, plain),
                 "that is the guide's, with both mistakes: nobody reads the global tokens, and no "
                 "query has the number -1"),
                ("global-to-each-other", near | row & col,
                 "one of the two being global is enough: or, not and"),
                ("only-global", row | col, "the window is missing: near OR global"),
                ("only-the-window", near, "the global tokens are missing"),
                ("misses-the-right-end", (i - j > -(width // 2)) & (i - j <= width // 2)
                 | row | col,
                 "width // 2 keys on EACH side: the guide forgets the last one on the right"),
                ("makes-it-causal", (near | row | col) & (j <= i),
                 "Longformer is an encoder: its window and its global tokens look both ways"),
            ],
        )  # fmt: skip


# 4. Can it cheat?


@exercise(
    "sparse_attention.future_read",
    points=3,
    minutes=12,
    hints=(
        "Keep for each token the set of inputs that its state depends on. Before the first layer "
        "that is the token itself. After a layer it is the union of the sets of all tokens that "
        "it reads, and of its own, for the residual.",
        "known = eye(n, bool). For each mask, first layer first: reads = mask | eye; known = "
        "(reads.float() @ known.float()) > 0. At the end known.triu(1): column j is later than "
        "row i.",
    ),
)
def _(future_read):
    window = SlidingWindow(3)
    # layer by layer, of each token: whom it reads
    links = [((5,), (), (), (), (1,)), ((0,), (), (), (4,)), ((), (5,), (0,))]
    for what, patterns, n in [
        ("three layers: 0 reads 5, 4 reads 1; then 0 reads 0, 3 reads 4; then 1 reads 5, 2 reads 0",
         [Listed(layer) for layer in links], 6),
        ("two causal windows", [window, window], 7),
        ("one symmetric window", [SlidingWindow(3, causal=False)], 6),
        ("Longformer, token 0 global, one layer", [longformer(3, (0,))], 7),
        ("Longformer, token 0 global, two layers", [longformer(3, (0,))] * 2, 7),
        ("three layers, the second one symmetric", [window, SlidingWindow(5, False), window], 9),
        ("causal Longformer, three layers", [longformer(3, (0,)) & Causal()] * 3, 7),
    ]:  # fmt: skip
        masks = [pattern.mask(n, n) for pattern in patterns]
        got = future_read([mask.clone() for mask in masks])
        want = _reads(masks).triu(1)
        if isinstance(got, Tensor) and got.dtype != torch.bool:
            raise NotYet(
                f"{what}: the answer holds {got.dtype}, expected bools",
                misconception="counts-the-ways",
                hint="whether token j can be read, not in how many ways: > 0",
            )
        either, both = torch.stack(masks).any(0), torch.stack(masks).all(0)
        expect_or_name(
            f"{what}: answer", got, want,
            "follow one token: whom does it read in the last layer, and whom had those read?",
            [
                ("looks-at-each-layer-alone", either.triu(1),
                 "token 2 may read token 0, which has read token 5 in the layer BEFORE: leaks go "
                 "from layer to layer. Multiply the masks"),
                ("looks-at-the-first-layer", masks[0].triu(1),
                 "each layer may leak; and what one layer has read, the next one passes on"),
                ("looks-at-the-last-layer", masks[-1].triu(1),
                 "the last layer reads states that know what the layers before have read"),
                ("wants-all-layers-to-leak", both.triu(1), "one leak in one layer is enough"),
                ("last-layer-first", _reads(masks[::-1]).triu(1),
                 "masks[0] is the first layer. It acts on the input, the others on its result: "
                 "known = reads @ known, in this order"),
                ("forgets-the-residual", _reads(masks, residual=False).triu(1),
                 "a layer adds to its token's state: what the token knew it still knows, whatever "
                 "its mask says of itself"),
                ("calls-the-past-a-leak", _reads(masks),
                 "reading the past is what attention is for: only j > i is the future"),
                ("calls-itself-a-leak", _reads(masks).triu(0),
                 "a token knows itself: only j > i is the future"),
                ("looks-below-the-diagonal", _reads(masks).tril(-1),
                 "row i is the reader, column j what is read: the future is j > i, above the "
                 "diagonal"),
                ("transposes", _reads(masks).triu(1).T,
                 "row i is the reader, column j the token that it reads"),
            ],
        )  # fmt: skip


def _reads(masks: list[Tensor], *, residual: bool = True) -> Tensor:
    known = torch.eye(len(masks[0]), dtype=torch.bool)
    for mask in masks:
        reads = mask | torch.eye(len(mask), dtype=torch.bool) if residual else mask
        known = (reads[:, :, None] & known[None]).any(1)
    return known


# 5. How far does it see?


@exercise(
    "sparse_attention.last_sees",
    points=2,
    minutes=10,
    hints=(
        "Two layers of windows of 3. In the last one token 9 reads 7, 8 and 9. What had token 7 "
        "read in the layer below? How many tokens does that ADD?",
        "A layer of width w adds w - 1 tokens, a full layer (0) all of them, and the last token "
        "itself is there from the start: 1 + the sum of (w - 1), at most n.",
    ),
)
def _(last_sees):
    for widths, n in [
        ([5], 20),
        ([7, 3], 30),
        ([3, 3, 3, 3], 30),
        ([2, 7, 3], 40),
        ([4, 4, 4], 8),
        ([1, 1, 1], 9),
        ([4, 0, 4], 25),
        ([], 6),
    ]:
        patterns = [SlidingWindow(w) if w else Causal() for w in widths]
        want = reach(patterns, n)[-1] if widths else 1
        layers, extra = len(widths), sum(w - 1 for w in widths if w)
        full = 0 in widths
        # of the layers that are not full; `full` decides what a full one does
        expect_or_name(
            f"last_sees({widths}, {n})", last_sees(list(widths), n), want,
            "draw the last layer's window, then under its FIRST key the window of the layer below",
            [
                (name, value, where)
                for name, value, where in [
                    ("adds-the-widths", n if full else min(n, sum(widths)),
                     "the windows overlap in one token: the first key of one is the last of the "
                     "next. A layer adds width - 1"),
                    ("multiplies", n if full else min(n, math.prod(widths)),
                     "reach ADDS from layer to layer: tokens that are 2 apart read tokens 2 "
                     "further"),
                    ("takes-the-widest", n if full else min(n, max(widths, default=1)),
                     "the tokens that the last layer reads had read others themselves: layers add"),
                    ("takes-the-last-layer", n if full else min(n, widths[-1]) if widths else 1,
                     "the tokens that the last layer reads had read others themselves: layers add"),
                    ("forgets-the-token-itself", n if full else min(n, extra),
                     "the token itself is one of those it depends on: 1 + the sum of (width - 1)"),
                    ("looks-both-ways", n if full else min(n, 1 + sum(w // 2 for w in widths)),
                     "these windows are causal: all their width - 1 other keys lie before the "
                     "token"),
                    ("more-than-there-are", n if full else 1 + extra,
                     "there are n tokens: it cannot see more"),
                    ("skips-the-full-layer", min(n, 1 + extra),
                     "0 stands for a layer without a window: it reads all n tokens at once"),
                    ("takes-0-for-a-width", min(n, 1 + extra - widths.count(0)),
                     "0 stands for a layer without a window: it reads all n tokens at once"),
                    ("doubles", n if full else min(n, 2**layers),
                     "reach grows by the same amount every layer, it does not double"),
                ]
            ],
        )  # fmt: skip


# 6. The best stride


@exercise(
    "sparse_attention.best_stride",
    points=2,
    minutes=12,
    hints=(
        "How many pairs are local: n queries, stride keys each. How many are strided: query i has "
        "i / stride of them; sum that over all queries. Where is the sum of both smallest?",
        "pairs = n s + n^2 / (2 s). Its derivative n - n^2 / (2 s^2) is 0 at s = sqrt(n / 2). Put "
        "that back: the pairs are n sqrt(2 n). Which power of n is that?",
    ),
)
def _(best_stride):
    for n in (512, 1800, 5000, 8192):
        got = best_stride(n)
        expect_parts(got, "stride", "exponent")
        stride, exponent = got
        expect_or_name(
            f"best_stride({n}): stride", stride, _fewest_pairs(n),
            "that one has the fewest pairs: count them for a few strides, with a loop",
            [
                ("forgets-the-half", round(math.sqrt(n)),
                 "query i has i / stride strided keys, not n / stride: on average half as many"),
                ("halves-the-wrong-part", round(math.sqrt(2 * n)),
                 "it is the STRIDED part that is half: n^2 / (2 s). The local part is n s"),
                ("forgets-the-root", n // 2,
                 "the derivative is n - n^2 / (2 s^2): s^2 is n / 2"),
                ("takes-the-cube-root", round(n ** (1 / 3)),
                 "two terms, n s and n^2 / (2 s), are equal where s^2 = n / 2"),
                ("one-stride-for-all", 128, "the best stride grows with n: derive it"),
                ("takes-the-guides", 4, "the best stride grows with n: derive it"),
                ("takes-no-stride", 1, "with stride 1 all keys are strided ones: that is dense"),
            ],
        )  # fmt: skip
        if isinstance(exponent, (int, float)) and abs(exponent - 1.5) < 0.02:  # or fitted
            continue
        expect_or_name(
            f"best_stride({n}): exponent", exponent, 1.5,
            "put the best stride into n s + n^2 / (2 s); which power of n comes out?",
            [
                ("believes-the-guide", 1.0,
                 "\"O(seq_len)\" holds for a window of fixed width. Here the stride grows as the "
                 "root of n, and with it the keys of each query"),
                ("believes-it-is-dense", 2.0,
                 "with a FIXED stride it is 2. The best stride grows with n"),
                ("counts-one-query", 0.5, "that is what one query sees; there are n queries"),
                ("takes-the-logarithm", 1.2, "no logarithm: a power of n"),
            ],
        )  # fmt: skip


@lru_cache
def _fewest_pairs(n: int) -> int:
    """By counting."""
    return min(range(1, 2 * math.isqrt(n)), key=lambda s: pairs_formula(sparse_transformer(s), n))


# 7. A cover that loses nothing


@exercise(
    "sparse_attention.block_cover",
    points=3,
    minutes=15,
    hints=(
        "A block is live if ANY of its pairs counts, full if ALL of them do. The last row and the "
        "last column of blocks may be smaller: what is beyond the mask has no say in either.",
        "for a, rows in enumerate(tiles(n_q, tile_q)): for b, cols in enumerate(tiles(n_k, "
        "tile_k)): part = mask[rows, cols]; live[a, b] = part.any(); full[a, b] = part.all().",
    ),
)
def _(block_cover):
    for what, mask, tile_q, tile_k in _token_masks():
        got = block_cover(mask.clone(), tile_q, tile_k)
        expect_parts(got, "live", "full")
        live, full = _cover(mask, tile_q, tile_k)
        what = f"{what}, {tuple(mask.shape)} in blocks of {tile_q} x {tile_k}"
        make = partial(_cover, mask, tile_q, tile_k)
        expect_or_name(
            f"{what}: live", got[0], live,
            "draw the mask on squared paper, the blocks over it, and look at one that is wrong",
            [
                ("loses-pairs", full,
                 "a block with one pair that counts must be visited: any, not all. What a cover "
                 "loses, no later mask brings back"),
                ("takes-the-majority", make(live="majority")[0],
                 "a block with one pair that counts must be visited, few as they are: any, not "
                 "the mean"),
                ("looks-at-a-corner", make(live="corner")[0],
                 "the pair that counts may be anywhere in the block: look at all of it"),
                ("looks-at-the-edges", make(live="edges")[0],
                 "a pair in the middle of a block counts as well: look at all of it"),
                ("forgets-the-tails", make(floor=True)[0],
                 "the last, smaller blocks are blocks, too: round up"),
                ("padding-counts-as-seen", make(pad=True)[0],
                 "what you have added beyond the mask makes the last blocks live: for `any` it "
                 "must be False"),
                ("transposes", live.T, "rows of blocks are queries, columns are keys"),
                ("swaps-the-tiles", _cover(mask, tile_k, tile_q)[0],
                 "tile_q cuts the queries, the rows; tile_k the keys"),
                ("says-what-is-dead", ~live, "True must mean: this block is visited"),
            ],
        )  # fmt: skip
        expect_or_name(
            f"{what}: full", got[1], full,
            "full means: no pair of the block is hidden, so nothing needs a mask there",
            [
                ("takes-live-for-full", live,
                 "a full block is computed WITHOUT a mask: one hidden pair, and it is wrong. all, "
                 "not any"),
                ("padding-counts-as-hidden", make(pad=False)[1],
                 "the last block is smaller, but if all of it is seen, it is full: what you have "
                 "added beyond the mask must be True for `all`"),
                ("returns-the-partial", live & ~full,
                 "those are the blocks that DO need a mask: full is live without them"),
                ("calls-nothing-full", torch.zeros_like(live),
                 "a block of which no pair is hidden is full, and saves its mask"),
            ],
        )  # fmt: skip


def _token_masks():
    """(what, mask, tile_q, tile_k)"""
    i, j = _rows_cols(10, 13)
    yield "a window of 8", (j <= i) & (j > i - 8), 4, 3
    i, j = _rows_cols(9, 13)
    yield "causal", j <= i, 4, 5
    lone = torch.zeros(8, 12, dtype=torch.bool)
    lone[1, 5] = lone[6, 11] = lone[5, 0] = True
    yield "three lone pairs", lone, 4, 4
    yield "the far past", j < i - 6, 2, 5
    seen = torch.rand(10, 11, generator=torch.Generator().manual_seed(5)) < 0.12
    seen[8:, 9:] = True
    yield "random pairs", seen, 4, 3


def _cover(
    mask: Tensor, tile_q: int, tile_k: int, *,
    live: str = "any", floor: bool = False, pad: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(live, full) of every block; or what comes of a mistake."""
    n_q, n_k = mask.shape
    if floor:
        mask = mask[: n_q // tile_q * tile_q, : n_k // tile_k * tile_k]
    elif pad is not None:
        missing = (0, -n_k % tile_k, 0, -n_q % tile_q)
        mask = torch.nn.functional.pad(mask, missing, value=pad)
    judge = {
        "any": lambda part: part.any(),
        "majority": lambda part: part.double().mean() > 0.5,
        "corner": lambda part: part[0, 0],
        "edges": lambda part: part[0].any() | part[-1].any() | part[:, 0].any() | part[:, -1].any(),
    }[live]
    parts = [[part for part in rows.split(tile_k, 1)] for rows in mask.split(tile_q)]
    return (
        torch.tensor([[bool(judge(part)) for part in row] for row in parts]),
        torch.tensor([[bool(part.all()) for part in row] for row in parts]),
    )


# 8. Count live blocks


@exercise(
    "sparse_attention.window_traffic",
    points=3,
    minutes=15,
    hints=(
        "Go through the blocks of queries. Which is the oldest key that the FIRST query of the "
        "block sees, and which the newest that the LAST one sees? In which blocks of keys do these "
        "two lie? All between them are live.",
        "oldest = max(0, rows.start - width + 1), newest = rows.stop - 1; the live blocks are "
        "oldest // tile_k to newest // tile_k. Their keys end at min(n, (newest // tile_k + 1) * "
        "tile_k). Bytes: itemsize * (n * d + 2 * d * all these keys).",
    ),
)
def _(window_traffic):
    for n, width, tile_q, tile_k, d, itemsize in [
        (32, 7, 4, 4, 2, 4),
        (40, 1, 8, 4, 3, 4),
        (37, 9, 4, 4, 4, 8),
        (50, 17, 8, 4, 2, 8),
        (41, 10, 4, 16, 2, 4),
        (30, 99, 4, 4, 2, 4),
    ]:
        dtype = {4: torch.float32, 8: torch.float64}[itemsize]
        x, pattern = torch.zeros(n, d, dtype=dtype), SlidingWindow(width)
        lists = cover(pattern, n, n, tile_q=tile_q, tile_k=tile_k)
        with recording(Load) as trace:
            sparse_attention(x, x, x, pattern, lists=lists)
        call = f"window_traffic({n=}, {width=}, {tile_q=}, {tile_k=}, {d=}, {itemsize=})"
        got = window_traffic(n, width, tile_q, tile_k, d, itemsize)
        expect_parts(got, "blocks", "bytes")
        n_live, walk = int(lists.n_live.sum()), partial(_walk, n, width, tile_q, tile_k)
        n_rows, n_cols = ceil_div(n, tile_q), ceil_div(n, tile_k)
        expect_or_name(
            f"{call}: blocks", got[0], n_live,
            "draw a small case: the band of the window, and the blocks that it touches",
            [
                ("takes-the-area", ceil_div(n * width, tile_q * tile_k),
                 "a band is not packed tightly: it crosses blocks, and each block it touches is "
                 "visited whole"),
                ("counts-from-the-last-query", walk(first="last")[0],
                 "the FIRST query of the block looks further back than the last one: its oldest "
                 "key is rows.start - width + 1"),
                ("one-key-too-many", walk(more=1)[0],
                 "width counts the query's own key: the oldest is i - width + 1"),
                ("counts-blocks-before-the-text", walk(clip=False)[0],
                 "there is nothing before token 0: max(0, ..)"),
                ("looks-ahead", walk(ahead=True)[0],
                 "the window is causal: the newest key is that of the block's last query"),
                ("forgets-the-window", walk(width=n)[0],
                 "that is causal attention: blocks that are older than the window are not read"),
                ("counts-all-blocks", n_rows * n_cols,
                 "that is dense attention: most blocks of a band's row are not read"),
                ("whole-tiles-of-width", n_rows * ceil_div(width, tile_k),
                 "a window of as many keys as a block still touches two or more of them, since it "
                 "seldom starts where a block does"),
            ],
        )  # fmt: skip
        live_keys, own = walk()[1], n * d
        expect_or_name(
            f"{call}: bytes", got[1], trace.total("nbytes", Load),
            "Q once, K and V of every live block",
            [
                (name, itemsize * numbers, where)
                for name, numbers, where in [
                    ("forgets-the-values", own + live_keys * d,
                     "a live block is a block of keys AND one of values"),
                    ("forgets-the-queries", 2 * live_keys * d, "the queries are read, too, once"),
                    ("pads-the-last-block", own + 2 * n_live * tile_k * d,
                     "the last block of keys is shorter: only what is there is read"),
                    ("reads-each-key-once", own + 2 * n * d,
                     "every block of queries that needs a block of keys reads it again"),
                    ("reads-the-window-of-each-query", own + 2 * n * width * d,
                     "whole blocks are read, and all queries of a block share them"),
                    ("reads-the-queries-again", n_live * tile_q * d + 2 * live_keys * d,
                     "a block of queries stays on chip while its blocks of keys pass by"),
                    ("counts-what-is-written", 2 * own + 2 * live_keys * d,
                     "bytes READ are asked for, without the result"),
                ]
            ] + [
                ("counts-numbers-not-bytes", own + 2 * live_keys * d,
                 "every number has `itemsize` bytes"),
            ],
        )  # fmt: skip


def _walk(
    n: int, window: int, tile_q: int, tile_k: int, *, first: str = "first", more: int = 0,
    clip: bool = True, ahead: bool = False, width: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(live blocks, their keys) of a causal window; or what comes of a mistake."""
    width, blocks, keys = width or window, 0, 0
    for rows in tiles(n, tile_q):
        oldest = (rows.start if first == "first" else rows.stop - 1) - width + 1 - more
        newest = min(n - 1, rows.stop - 1 + (width - 1 if ahead else 0))
        low = (max(0, oldest) if clip else oldest) // tile_k
        blocks += newest // tile_k - low + 1
        keys += min(n, (newest // tile_k + 1) * tile_k) - low * tile_k
    return blocks, keys


# 9. The loop over live blocks


@exercise(
    "sparse_attention.sparse_head",
    points=3,
    minutes=20,
    hints=(
        "It is flash attention's loop with one question more: for each block of keys ask live[a, "
        "b] BEFORE you load anything, and full[a, b] before you load the mask. At the end of a "
        "block of queries divide, and think of a query that has seen nothing.",
        "q_i = load('Q', q, rows); m = -inf, total = 0, acc = 0. For every b with live[a, b]: load "
        "K and V of cols, scores = q_i @ k_j.T / sqrt(d); unless full[a, b]: seen = load('mask', "
        "mask, (rows, cols)), masked_fill. absorb. store('O', out, rows, acc / "
        "total.masked_fill(total == 0, 1)[:, None]).",
    ),
)
def _(sparse_head):
    i, j = _rows_cols(7, 10)
    sinks = (j <= i) & ((j > i - 3) | (j < 1))
    blind = sinks & (i != 5) & (i != 6)
    for what, mask, tile_q, tile_k in [
        ("causal, 6 tokens", torch.ones(6, 6, dtype=torch.bool).tril(), 3, 3),
        ("every key, 7 queries, 10 keys", torch.ones(7, 10, dtype=torch.bool), 3, 4),
        ("a window of 3 and a sink", sinks, 3, 4),
        ("the same, but queries 2 and 3 see nothing", blind, 2, 3),
        ("a window of 4, 21 tokens", SlidingWindow(4).mask(21, 21), 4, 3),
    ]:
        (n_q, n_k), d, d_v = mask.shape, 4, 3
        q, k, v = _head(n_q, n_k, d, d_v, peak=2.0)
        live, full = _cover(mask, tile_q, tile_k)
        out = q.new_full((n_q, d_v), torch.nan)
        inputs = [x.clone() for x in (q, k, v, mask, live, full)]
        with recording(Load, Store) as trace:
            sparse_head(*inputs, out, tile_q=tile_q, tile_k=tile_k)
        what += f", blocks of {tile_q} x {tile_k}"
        expect_stored(what, "out", out, "after the last block of keys: store('O', out, rows, ..)")
        want = attention_oracle(q, k, v, mask)
        expect_no_nan(
            f"{what}, the rows that must be zeros", out[~mask.any(1)],
            "such a query sees nothing: its total is 0, and 0 / 0 is NaN. Divide by 1 where total "
            "is 0, and store such a row, too",
            misconception="nan-from-nothing",
        )  # fmt: skip
        grid = live.repeat_interleave(tile_q, 0).repeat_interleave(tile_k, 1)[:n_q, :n_k]
        complete = full.repeat_interleave(tile_q, 0).repeat_interleave(tile_k, 1)[:n_q, :n_k]
        expect_or_name(
            f"{what}: result", out, want,
            "take the smallest case that is wrong, print a, b and what is loaded in every step",
            [
                ("forgets-the-scale", attention_oracle(q, k, v, mask, scale=1.0),
                 "the scores are q_i @ k_j.T / sqrt(d)"),
                ("forgets-the-mask", attention_oracle(q, k, v, grid),
                 "a block that is live but not full holds pairs that are hidden: load its part of "
                 "the mask"),
                ("visits-only-full-blocks", attention_oracle(q, k, v, mask & complete),
                 "a block that is live but not full is visited, too, under its mask"),
                ("visits-only-partial-blocks", attention_oracle(q, k, v, mask & ~complete),
                 "full blocks are live: they are visited, without a mask"),
                ("never-starts-afresh", _carried(q, k, v, mask, live, tile_q, tile_k),
                 "every block of queries has a softmax of its own: begin with m = -inf, total = 0, "
                 "acc = 0 inside the outer loop"),
            ],
        )  # fmt: skip
        _expect_traffic(trace, what, q, k, v, mask, live, full, tile_q, tile_k)


def _carried(q, k, v, mask, live, tile_q: int, tile_k: int) -> Tensor:
    """One running softmax for all blocks of queries of one size."""
    total, acc, out = torch.zeros(0), 0.0, torch.zeros(len(q), v.shape[1], dtype=q.dtype)
    for a, rows in enumerate(tiles(len(q), tile_q)):
        if len(total) != rows.stop - rows.start:
            total, acc = q.new_zeros(rows.stop - rows.start), 0.0
        for b, cols in enumerate(tiles(len(k), tile_k)):
            if live[a, b]:
                p = torch.exp(q[rows] @ k[cols].T * q.shape[1] ** -0.5) * mask[rows, cols]
                total, acc = total + p.sum(1), acc + p @ v[cols]
        out[rows] = acc / total.masked_fill(total == 0, 1)[:, None]
    return out


def _expect_traffic(trace, what, q, k, v, mask, live, full, tile_q: int, tile_k: int) -> None:
    """Each tensor's bytes are those of the live blocks, or of the partial ones."""
    rows = torch.tensor([r.stop - r.start for r in tiles(len(q), tile_q)])
    cols = torch.tensor([c.stop - c.start for c in tiles(len(k), tile_k)])
    keys = int((live * cols).sum())
    pairs = int(((live & ~full) * rows[:, None] * cols).sum())
    all_live = int((live * rows[:, None] * cols).sum())
    wide, values = k.shape[1] * k.itemsize, v.shape[1] * v.itemsize
    read = {
        name: sum(load.nbytes for load in trace.of(Load) if load.name == name)
        for name in ("Q", "K", "V", "mask")
    }
    bypass = "read slow memory only with load(...): it keeps the count"
    for name, want, mistakes in [
        ("Q", q.nbytes, [
            ("goes-around-load", 0, bypass),
            ("reads-queries-again", int((live.sum(1) * rows).sum()) * wide,
             "a block of queries stays on chip while its blocks of keys pass by"),
        ]),
        ("K", keys * wide, [
            ("goes-around-load-for-keys", 0, bypass),
            ("reads-dead-blocks", len(rows) * len(k) * wide,
             "a block that is not live is not loaded at all. Ask live[a, b] first: that is all "
             "that sparse attention saves"),
        ]),
        ("V", keys * values, [
            ("goes-around-load-for-values", 0, bypass),
            ("reads-dead-values", len(rows) * len(v) * values,
             "the values of a block that is not live stay where they are, as its keys"),
        ]),
        ("mask", pairs, [
            ("goes-around-load-for-the-mask", 0, bypass),
            ("masks-full-blocks", all_live,
             "in a full block nothing is hidden: its part of the mask is not read"),
            ("reads-the-whole-mask", mask.numel(),
             "N x N bytes again: of the mask, too, only partial blocks are read"),
        ]),
    ]:  # fmt: skip
        expect_or_name(
            f"{what}: bytes read of {name}", read[name], want,
            "Q once, K and V of live blocks, the mask of live blocks that are not full", mistakes,
        )  # fmt: skip
    expect_or_name(
        f"{what}: bytes written", trace.total("nbytes", Store), len(q) * values,
        "the result is written once, block by block",
        [
            ("goes-around-store", 0, "write slow memory only with store(...): it keeps the count"),
            ("writes-unfinished-results", int((live.sum(1) * rows).sum()) * values,
             "m, total and acc stay on chip; write after the last block of keys"),
        ],
    )  # fmt: skip


# 10. Evict the sink


@exercise(
    "sparse_attention.stream_step",
    points=3,
    minutes=15,
    hints=(
        "A sink goes to the slot of its own number and stays. The window is a ring in the slots "
        "behind the sinks: the first token that is no sink goes to slot n_sinks, and who comes "
        "when the ring is full goes where the oldest of the ring lies. How many slots are filled "
        "after token t?",
        "window = len(keys) - n_sinks; slot = t if t < n_sinks else n_sinks + (t - n_sinks) % "
        "window. Write key and value there, then n_held = min(t + 1, len(keys)) and softmax("
        "keys[:n_held] @ q / sqrt(d)) @ values[:n_held]. The order of the slots does not matter.",
    ),
)
def _(stream_step):
    for n_sinks, window, n in [(0, 4, 11), (2, 5, 6), (1, 4, 14), (3, 4, 17)]:
        q, k, v = _head(n, n, 4, 3, peak=2.0)
        i, j = _rows_cols(n, n)
        want = attention_oracle(q, k, v, (j <= i) & ((j > i - window) | (j < n_sinks)))
        got = _streamed(stream_step, q, k, v, n_sinks, window)
        expect_or_name(
            f"{n} tokens through {n_sinks} sinks and a window of {window}: results",
            got, want,
            "write down which token lies in which slot after each step, and whose turn it is",
            [
                (name, _streamed(partial(_step, **change), q, k, v, n_sinks, window), where)
                for name, change, where in STREAM_MISTAKES
            ],
        )  # fmt: skip


# name, how `_step` differs, where to look
STREAM_MISTAKES = [
    ("evicts-the-sink", {"slot": lambda t, s, w: t % (s + w)},
     "a ring over ALL slots overwrites the first tokens as soon as it is full: they must stay. "
     "The ring begins behind the sinks"),
    ("rolls-into-the-sinks", {"slot": lambda t, s, w: t if t < s + w else t % w},
     "t % window is a slot from 0 on, where the sinks lie: n_sinks + (t - n_sinks) % window"),
    ("keeps-only-the-first", {"slot": lambda t, s, w: min(t, s + w - 1)},
     "when the buffer is full the OLDEST token of the window goes, not the newest"),
    ("ring-out-of-step", {"slot": lambda t, s, w: t if t < s else s + t % w},
     "the first token that is no sink, number n_sinks, goes to slot n_sinks: subtract n_sinks "
     "before the modulo, or a slot is read that nobody has filled"),
    ("window-one-short", {"slot": lambda t, s, w: t if t < s else s + (t - s) % (w - 1)},
     "the ring has len(keys) - n_sinks slots, all of them"),
    ("shifts-the-sinks", {"slot": lambda t, s, w: t if t < s + w else s + (t - s - w) % (w - 1)},
     "in a full ring the oldest lies at (t - n_sinks) % window: the same formula as before"),
    ("reads-empty-slots", {"held": lambda t, size: size},
     "until the buffer is full some slots hold nothing yet (NaN here): attend to the first "
     "min(t + 1, len(keys)) alone"),
    ("reads-one-too-few", {"held": lambda t, size: max(1, min(t, size))},
     "after token t there are t + 1 tokens"),
    ("reads-before-it-writes", {"late": True},
     "a token sees its own key: write first, then attend"),
    ("forgets-the-scale", {"scale": False}, "divide the scores by sqrt(d)"),
    ("forgets-the-values", {"value_too": False}, "the value goes into its slot, too"),
]  # fmt: skip


def _step(
    keys: Tensor, values: Tensor, t: int, q: Tensor, k: Tensor, v: Tensor, *, n_sinks: int,
    slot: Callable = lambda t, s, w: t if t < s else s + (t - s) % w,
    held: Callable = lambda t, size: min(t + 1, size), late: bool = False, scale: bool = True,
    value_too: bool = True,
) -> Tensor:  # fmt: skip
    """One step of a rolling cache; or of one with a mistake."""
    where, n_held = slot(t, n_sinks, len(keys) - n_sinks), held(t, len(keys))
    before = (keys.clone(), values.clone()) if late else (keys, values)
    keys[where] = k
    if value_too:
        values[where] = v
    scores = before[0][:n_held] @ q * (q.shape[0] ** -0.5 if scale else 1)
    return torch.softmax(scores, dim=0) @ before[1][:n_held]


def _streamed(step: Callable, q: Tensor, k: Tensor, v: Tensor, n_sinks: int, window: int) -> Tensor:
    """Every token's result, one step after the other, from a buffer of NaN."""
    keys = k.new_full((n_sinks + window, k.shape[1]), torch.nan)
    values = v.new_full((n_sinks + window, v.shape[1]), torch.nan)
    rows = []
    for t in range(len(q)):
        row = step(keys, values, t, q[t].clone(), k[t].clone(), v[t].clone(), n_sinks=n_sinks)
        if not isinstance(row, Tensor) or row.shape != v[t].shape:
            shape = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise NotYet(
                f"the result of token {t} is {shape}, expected a tensor of shape "
                f"{tuple(v[t].shape)}",
                misconception="returns-other-things",
                hint="return softmax(scores) @ values: one vector as long as a value",
            )
        rows.append(row.clone())
    return torch.stack(rows)


# 11. Top-k blocks against the oracle


@exercise(
    "sparse_attention.block_recall",
    points=3,
    minutes=15,
    hints=(
        "First the attention on each block: sum p over the queries and the keys of the block. Then "
        "choose, in each row of blocks, among the blocks 0 to a: once by `scores`, once by these "
        "sums. What share of all the attention did you catch?",
        "mass[a, b] = p[rows, cols].sum(). For row a: k = min(n_blocks, a + 1); picked = "
        "scores[a, : a + 1].topk(k).indices; caught += mass[a, picked].sum(). In the end divide "
        "by n, the sum of all of p. The best choice: mass[a].topk(k).",
    ),
)
def _(block_recall):
    # tokens, size of a block, blocks to choose
    for n, tile, n_blocks in [(12, 3, 2), (20, 4, 2), (22, 4, 3), (30, 8, 1), (13, 4, 9)]:
        rng = torch.Generator().manual_seed(n)
        i, j = _rows_cols(n, n)
        logits = 3 * torch.randn(n, n, generator=rng, dtype=torch.float64)
        p = torch.softmax(logits.masked_fill(j > i, -torch.inf), dim=1)
        n_rows = ceil_div(n, tile)
        scores = torch.randn(n_rows, n_rows, generator=rng, dtype=torch.float64)
        may = torch.ones(n_rows, n_rows, dtype=torch.bool).tril()
        scores = torch.where(may, scores, scores + 3)  # the future looks tempting
        got = block_recall(p.clone(), scores.clone(), n_blocks, tile)
        expect_parts(got, "recall", "best")
        mass = block_mass(p[None], tile, tile, 1)[0]
        chosen, best = _top(scores, may, n_blocks), _top(mass, may, n_blocks)
        share = partial(_share, mass)
        per_row = mass / mass.sum(1, keepdim=True)
        many = _top(scores, may, n_blocks + 1)
        one = _top(scores[-1:].expand_as(scores), torch.ones_like(may), n_blocks)
        call = f"{n} tokens, {n_blocks} blocks of {tile}"
        mistakes = [
            ("chooses-from-the-future", _top(scores, torch.ones_like(may), n_blocks),
             "the scores of blocks that lie in the future are there, but no query may read "
             "them: a place given to them is lost. Choose among the blocks 0 to a"),
            ("chooses-one-too-many", many, "n_blocks are chosen, no more"),
            ("chooses-the-worst", _top(-scores, may, n_blocks), "the LARGEST scores"),
            ("one-choice-for-all", one,
             "every block of queries chooses its own blocks of keys"),
            ("keeps-the-nearest",
             _top(torch.arange(n_rows).double().expand_as(scores), may, n_blocks),
             "that is a window: choose by the scores"),
        ]  # fmt: skip
        expect_or_name(
            f"{call}: recall", got[0], share(chosen),
            "take 2 blocks of 2 tokens and add up p by hand",
            [(name, share(where), text) for name, where, text in mistakes] + [
                ("asks-the-oracle-first", share(best),
                 "recall is what the choice by `scores` catches; that is what the best choice "
                 "catches"),
                ("averages-blocks", float((per_row * chosen).sum() / n_rows),
                 "the last block has fewer queries, so it counts for less: divide what was caught "
                 "by the number of QUERIES"),
                ("counts-blocks", float((chosen & best).sum() / best.sum()),
                 "not how many blocks are right: how much ATTENTION they hold"),
                ("counts-kept-blocks", float(chosen.sum() / may.sum()),
                 "that is the share of blocks: what share of the ATTENTION falls on them?"),
                ("divides-by-the-best", share(chosen) / share(best),
                 "both shares are of ALL the attention, which sums to 1 a query"),
                ("forgets-to-divide", share(chosen) * n,
                 "the attention of all queries sums to n: divide by it"),
                ("weighs-by-scores", float((torch.softmax(scores.masked_fill(~may, -torch.inf), 1)
                                            * chosen).sum() / n_rows),
                 "the scores only choose. What is caught is attention: sums of p"),
            ],
        )  # fmt: skip
        each = torch.stack([p[:, cols].sum(1) for cols in tiles(n, tile)], dim=1)
        per_query = each.topk(min(n_blocks, n_rows), dim=1).values.sum() / n
        expect_or_name(
            f"{call}: best", got[1], share(best),
            "the best choice takes the blocks that hold most of the attention",
            [
                ("calls-the-best-perfect", 1.0,
                 "n_blocks cannot hold everything, however well they are chosen: choose by the "
                 "sums of p"),
                ("repeats-the-recall", share(chosen),
                 "the oracle chooses by the attention itself, the sums of p, not by the scores"),
                ("lets-each-query-choose", float(per_query),
                 "all queries of a block share one choice, as they share what is loaded"),
                ("averages-blocks-of-the-best", float((per_row * best).sum() / n_rows),
                 "divide by the number of queries, here as well"),
                ("chooses-by-the-largest-weight", share(_top(_largest(p, tile), may, n_blocks)),
                 "a block with one large weight may hold less than one with many: sum, not max"),
            ],
        )  # fmt: skip


def _share(mass: Tensor, where: Tensor) -> float:
    """Of all the attention."""
    return float((mass * where).sum() / mass.sum())


def _top(scores: Tensor, may: Tensor, n: int) -> Tensor:
    """Where the n largest scores of each row are, among those that may be chosen: bool."""
    order = scores.masked_fill(~may, -torch.inf).argsort(1, descending=True)
    ranks = torch.empty_like(order).scatter(1, order, torch.arange(len(may)).expand_as(order))
    return (ranks < n) & may


def _largest(p: Tensor, tile: int) -> Tensor:
    return torch.stack(
        [
            torch.stack([p[rows, cols].max() for cols in tiles(p.shape[1], tile)])
            for rows in tiles(len(p), tile)
        ]
    )


# 12. The kernel that skips


@exercise(
    "sparse_attention.sparse_kernel",
    points=5,
    minutes=40,
    hints=(
        "Write it in this order and run the check after each: the loop over the list with every "
        "block taken as full; the last, shorter block of keys; the last queries in the store; the "
        "mask of partial blocks; at the end the queries that see nothing.",
        "n_live = tl.load(n_live_ptr + row_block); for i in range(0, n_live): block = "
        "tl.load(blocks_ptr + row_block * MOST + i); col = block * TILE + tl.arange(0, TILE). seen "
        "= (col < n_k)[None, :]; if i >= n_full: seen = seen & (tl.load(mask_ptr + row[:, None] * "
        "n_k + col[None, :], inside, other=0) != 0), inside = (row < n_q)[:, None] & (col < "
        "n_k)[None, :]. Then the running softmax, with 0 for m where m is -inf, and at the end "
        "acc / where(total > 0, total, 1).",
    ),
)
def _(kernel):
    expect_kernel("sparse_kernel", kernel)
    for what, mask, n_heads in _kernel_masks():
        n_q, n_k = mask.shape
        sizes = Sizes(n_q, n_k, 16, 16, n_heads=n_heads, n_kv_heads=n_heads)
        q, k, v = (x[0] for x in attention_inputs(sizes, dtype=torch.float32, seed=n_q + n_k))
        live, full = _cover(mask, 16, 16)
        got = _launch(kernel, what, q, k, v, mask, live, full)
        want = attention_oracle(q, k, v, mask)
        expect_numbers(
            what, "out", got,
            "does the kernel end in a tl.store to its own rows of out? If so, it reads outside the "
            "tensors: take the address of a key apart, (head, col, d)",
        )  # fmt: skip
        at_first = _seen_at_first(mask, live, full)
        expect_no_nan(
            f"{what}, queries that see a key in the first block of their list", got[:, at_first],
            "it reads outside the tensors: -1 behind the end of a list is no block. Only n_live "
            "entries of a list count",
            misconception="reads-astray",
        )  # fmt: skip
        expect_no_nan(
            f"{what}, queries that see no key in the first block of their list, or none at all",
            got[:, ~at_first],
            "two places make it. m stays -inf, and -inf - -inf is NaN: subtract 0 there. total "
            "stays 0, and 0 / 0 is NaN: divide by tl.where(total > 0, total, 1.0)",
            misconception="nan-from-nothing",
        )  # fmt: skip
        expect_or_name(
            what + ": result", got, want,
            "compare with your loop of exercise 9 line by line: address, mask, running softmax",
            _kernel_mistakes(q.double(), k.double(), v.double(), mask, live, full),
        )  # fmt: skip


def _kernel_masks():
    """(what, mask, heads). Blocks are of 16 x 16."""
    ones = partial(torch.ones, dtype=torch.bool)
    yield "one full block", ones(16, 16), 2
    i, j = _rows_cols(32, 48)
    # every other block of keys for the first queries, one for the others
    yield "full blocks, listed", torch.where(i - 16 < 16, j // 16 != 1, j // 16 == 1), 2
    yield "20 keys, all of them seen", ones(16, 20), 2
    yield "21 queries", ones(21, 16), 2
    i, j = _rows_cols(48, 48)
    yield "a window of 18", (j <= i) & (j > i - 18), 2
    i, j = _rows_cols(37, 41)
    yield (
        "a window of 9 and 2 sinks, 37 queries, 41 keys, queries 10 and 16 to 31 see nothing",
        (j <= i) & ((j > i - 9) | (j < 2)) & (i != 14) & ((i < 20) | (i > 35)),
        2,
    )


def _launch(kernel, what: str, q, k, v, mask: Tensor, live: Tensor, full: Tensor) -> Tensor:
    """One program per (block of queries, head), on a GPU or in the interpreter."""
    device, (n_heads, n_q, d) = pick_device(), q.shape
    n_k, most = k.shape[1], live.shape[1]
    n_live, n_full = live.sum(1), full.sum(1)
    lists = torch.full((len(live), most), -1)
    for a, blocks in enumerate(_lists(live, full)):
        lists[a, : len(blocks)] = torch.tensor(blocks, dtype=torch.int64)
    # where a mask is not needed it is rubbish: hidden in full blocks, seen in dead ones
    shown = torch.where(_pairs_of(full, mask), ~mask, mask | ~_pairs_of(live, mask))
    # each stands between others: an address that is off a little finds those, and no crash
    q3, k3, v3 = (torch.stack([torch.full_like(x, torch.nan), x, -x]).to(device) for x in (q, k, v))
    out = torch.full((3, *q.shape), torch.nan, device=device)
    around = torch.zeros(3, n_q, n_k, dtype=torch.int8)
    around[1] = shown
    mask3 = torch.nn.functional.pad(around, (0, 0, 16, 16)).to(device)
    blocks = torch.stack([0 * lists - 1, lists, 0 * lists - 1]).int().to(device)
    counts = torch.stack([n_live, n_full]).int().to(device)
    with launched():
        kernel[(ceil_div(n_q, 16), n_heads)](
            q3[1], k3[1], v3[1], blocks[1], counts[1], counts[0], mask3[1, 16:], out[1],
            n_q, n_k, d**-0.5, MOST=most, D=d, TILE=16,
        )  # fmt: skip
    expect_untouched(
        what, "out", ~out[[0, 2]].isnan(),
        "the last block of queries is shorter: store with the mask row < n_q",
        misconception="writes-past-its-queries",
    )  # fmt: skip
    return out[1].cpu()


def _seen_at_first(mask: Tensor, live: Tensor, full: Tensor) -> Tensor:
    """Whether a query sees a key in the first block of its list, (n_q,) bool."""
    seen = torch.zeros(len(mask), dtype=torch.bool)
    for rows, blocks in zip(tiles(len(mask), 16), _lists(live, full), strict=True):
        for block in blocks[:1]:
            seen[rows] = mask[rows, block * 16 : block * 16 + 16].any(1)
    return seen


def _kernel_mistakes(q, k, v, mask: Tensor, live: Tensor, full: Tensor) -> list[Mistake]:
    """What kernels with the usual mistakes give, in float64."""
    (n_heads, _, d), n_k = q.shape, k.shape[1]
    live_pairs, full_pairs = (_pairs_of(x, mask) for x in (live, full))
    shown = torch.where(full_pairs, ~mask, mask | ~live_pairs)
    attend = partial(_weighed, q, k, v)
    lists = _lists(live, full)
    first, counted = [lists[0]] * len(lists), [list(range(len(blocks))) for blocks in lists]
    key_block = torch.arange(n_k) // 16
    wrongs = [
        ("visits-every-block", attend(shown | full_pairs),
         "go through the list, not through all keys: what is not listed is not read, and the mask "
         "says nothing about it"),
        ("ignores-the-list", attend(_followed(counted, lists, full, shown)),
         "the block to visit is what stands in the list: tl.load(blocks_ptr + row_block * MOST + "
         "i), not i itself"),
        ("lists-of-the-first-queries", attend(_followed(first, lists, full, shown)),
         "each block of queries has a list of its own: it begins at blocks_ptr + row_block * MOST"),
        ("masks-full-blocks", attend(mask & ~full_pairs),
         "the first n_full blocks of a list need no mask, and their part of it is rubbish: read it "
         "only from i = n_full on"),
        ("never-masks", attend(live_pairs),
         "from i = n_full on a block holds hidden pairs: read its part of the mask"),
        ("visits-only-full-blocks", attend(full_pairs),
         "n_live blocks are listed; the first n_full of them are full, the others partial"),
        ("forgets-the-scale", attend(mask, scale=1.0), "multiply the scores by `scale`"),
        ("scales-twice", attend(mask, scale=1 / d), "multiply the scores by `scale` once"),
        ("one-head-for-all", attend(mask, heads=[0] * n_heads),
         "each head has keys and values of its own: head * n_k + col"),
        ("forgets-to-normalise", _unnormalised(q, k, v, mask),
         "acc is a sum of p * v; divide it by total before you store it"),
        ("forgets-to-rescale", _never_rescaled(q, k, v, mask, lists),
         "total and acc were summed relative to the old m: multiply both by exp(m - m_new)"),
    ]  # fmt: skip
    if missing := -n_k % 16:
        zeros = k.new_zeros(n_heads, missing, d)
        padded = _weighed(
            q, torch.cat([k, zeros], 1), torch.cat([v, zeros], 1),
            torch.cat([mask, full_pairs[:, -1:].expand(-1, missing)], 1),
        )  # fmt: skip
        wrongs += [
            ("scores-the-padding", padded,
             "the last block is full AND shorter than a tile: full means that no KEY is hidden. A "
             "masked load gives keys of zeros, and a zero key has score 0 and weight exp(0 - m): "
             "set scores to -inf where col is not below n_k"),
            ("drops-the-last-keys", attend(mask & (key_block < n_k // 16)),
             "the last, shorter block counts: mask what is beyond, not all of it"),
        ]  # fmt: skip
    return wrongs


def _pairs_of(blocks: Tensor, mask: Tensor) -> Tensor:
    """The pairs of some blocks of 16 x 16, in the shape of the mask."""
    return blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[: len(mask), : mask.shape[1]]


def _lists(live: Tensor, full: Tensor) -> list[list[int]]:
    """Of each block of queries: its full blocks, then its partial ones."""
    order = torch.sort((~live).int() + (~full).int(), dim=1, stable=True).indices
    return [row[:n].tolist() for row, n in zip(order, live.sum(1), strict=True)]


def _followed(walked: list, lists: list, full: Tensor, shown: Tensor) -> Tensor:
    """What is seen by a kernel that walks other lists, as far as the right ones are long."""
    seen = torch.zeros_like(shown)
    for a, rows in enumerate(tiles(len(shown), 16)):
        for i, block in enumerate(walked[a][: len(lists[a])]):
            cols = slice(block * 16, block * 16 + 16)
            seen[rows, cols] = True if i < int(full[a].sum()) else shown[rows, cols]
    return seen


def _weighed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *,
    scale: float | None = None, heads: list[int] | None = None,
) -> Tensor:  # fmt: skip
    if heads is not None:
        k, v = k[heads], v[heads]
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1).nan_to_num(0) @ v


def _unnormalised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q.shape[-1] ** -0.5 * q @ k.mT).masked_fill(~mask, -torch.inf)
    m = scores.amax(-1, keepdim=True)
    return torch.exp(scores - m.masked_fill(m == -torch.inf, 0)) @ v


def _never_rescaled(q, k, v, mask: Tensor, lists: list) -> Tensor:
    """Each block's p relative to the largest score so far, in the order of the lists."""
    scores = (q.shape[-1] ** -0.5 * q @ k.mT).masked_fill(~mask, -torch.inf)
    out = torch.zeros_like(q)
    for rows, blocks in zip(tiles(q.shape[1], 16), lists, strict=True):
        m, total, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
        for block in blocks:
            cols = slice(block * 16, block * 16 + 16)
            m = torch.maximum(m, scores[:, rows, cols].amax(-1, keepdim=True))
            p = torch.exp(scores[:, rows, cols] - m.masked_fill(m == -torch.inf, 0))
            total, acc = total + p.sum(-1, keepdim=True), acc + p @ v[:, cols]
        out[:, rows] = acc / total.masked_fill(total == 0, 1)
    return out
