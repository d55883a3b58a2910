# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 5. Sparse attention
# {{colab_badge}}
#
# Dense attention compares every token with every earlier one, though most of the weights that come out
# are nearly zero. Sparse attention decides *before* it looks which pairs to compute, and never reads
# the rest. Which pairs can be left out, and what does the model forget then? After this chapter you can
# write down a pattern as a rule, run it in blocks that skip, say what it costs and what it loses before
# you ship it, and find the bug in somebody else's mask.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 20 |
# | 3. What the guide says, measured | 25 |
# | 4. What it costs | 15 |
# | 5. A real head, and a mask to paint | 20 |
# | 6. Sinks, endless text, a needle | 20 |
# | 7. Blocks chosen by content | 15 |
# | 8. The kernel | 15 |
# | 9. Where it loses | 10 |
# | 10. In production, and what to remember | 5 |
#
# The exercises are in `exercises/5_sparse_attention.ipynb`. Do them after section 4, or at the end.

# %% tags=["setup", "timing", "nbval-ignore-output"]
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% [markdown]
# ## 1. A question (5 minutes)
#
# SmolLM2-135M has 30 layers and reads 1,024 tokens of Python. With all of its attention the perplexity
# of the text is 8.8. Now let every token see only itself and the 63 tokens before it: 39.2, the model
# is lost. Keep 64 places, but give four of them to the *first four tokens of the text* and sixty to the
# nearest. They are the same four for every query: three quotation marks, a line end, `Read` and ` and`.
# Lock in your guess. Section 5 shows what was measured.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict("What is the perplexity with 60 near tokens and the first 4?")
guess

# %% [markdown]
# ## 2. The idea, step by step (20 minutes)
#
# Eight tokens, one head of width 4, in blocks of 2 queries and 2 keys. The pattern: each token sees
# itself, the two before it, and token 0. Step through the blocks that are visited.

# %%
import torch

from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.sparse_attention import Causal, cover, sparse_attention, streaming
from llmopt_lab.sparse_attention.cases import attention_oracle, toy
from llmopt_lab.sparse_attention.io_model import sparse_traffic
from llmopt_lab.sparse_attention.patterns import Full
from llmopt_lab.sparse_attention.view import frames
from llmopt_lab.widgets.player import Player

q, k, v = toy()
pattern = streaming(window=3, n_sinks=1)
with recording() as trace:
    out = sparse_attention(q, k, v, pattern, tile_q=2, tile_k=2)
dense_nbytes = sparse_traffic(cover(Full(), 8, 8, tile_q=2, tile_k=2), q, k, v).total
Player(frames(trace, dense_nbytes=dense_nbytes), title="A window of 3, and one sink")

# %% [markdown]
# *Only the picture answers these:*
# - Which is the one full block that is visited before the diagonal? Which blocks are visited for the sink alone?
# - How many scores are computed and then masked? How many does the pattern need?
# - From which block of queries on are three blocks of keys visited? Why never four?
#
# Three words for three sizes. A *pattern* is a rule about two token numbers. Its *mask* is what the
# rule gives for all pairs. Its *cover* is the set of blocks that hold at least one allowed pair: a
# *full* block needs no mask, a *partial* one does, and all others stay in slow memory. The rule here,
# in full:

# %%
import inspect

from llmopt_lab.sparse_attention.patterns import Sinks, SlidingWindow

for rule in (SlidingWindow, Sinks):
    print(inspect.getsource(rule.allowed))
print(pattern.mask(8, 8).int())

# %% [markdown]
# And the loop. It is flash attention's (chapter 2); only the `for` over keys is new: it walks a list.

# %%
from llmopt_lab.cli import without_records
from llmopt_lab.sparse_attention import reference

source = without_records(inspect.getsource(reference.sparse_head))
print(source[source.index("    for i, rows") :])

# %% [markdown]
# Check the result against torch's attention under the mask, and the counted bytes against the formula
# $N_q d + N_q d_v$ for queries and results, and $d + d_v$ for every key of every live block:

# %%
counted = trace.total("nbytes", Load, Store)
lists = cover(pattern, 8, 8, tile_q=2, tile_k=2)
apart = (out - attention_oracle(q, k, v, pattern.mask(8, 8))).abs().max()
print(f"the largest difference from torch is below 1e-6: {bool(apart < 1e-6)}")
print(f"bytes moved: {counted}, by the formula: {sparse_traffic(lists, q, k, v).total}; dense: {dense_nbytes}")
print(lists)

# %% [markdown]
# **A gallery.** Rules compose: `|` sees what either sees, `&` what both see. Each frame is one pattern
# over 16 tokens; the caption counts pairs, and blocks of 4.

# %%
from llmopt_lab.sparse_attention.io_model import visible_pairs
from llmopt_lab.sparse_attention.patterns import (
    DilatedWindow,
    bigbird,
    longformer,
    sparse_transformer,
)
from llmopt_lab.sparse_attention.view import mask_grid
from llmopt_lab.widgets.panels import Frame

N = 16
gallery = {
    "causal, dense": Causal(),
    "sliding window of 5": SlidingWindow(5),
    "symmetric window of 5": SlidingWindow(5, causal=False),
    "dilated window, 5 keys 3 apart": DilatedWindow(5, 3),
    "Sparse Transformer, local and strided 4": sparse_transformer(4),
    "Longformer, window 4, tokens 0 and -1 global": longformer(4, (0, -1)),
    "Longformer & Causal()": longformer(4, (0, -1)) & Causal(),
    "BigBird in blocks of 4": bigbird(
        N, block=4, n_window=1, n_global=1, n_random=1, rng=torch.Generator().manual_seed(0)
    ),
    "StreamingLLM, window 4 and 2 sinks": streaming(4, 2),
}
made = []
for name, rule in gallery.items():
    live = cover(rule, N, N, tile_q=4, tile_k=4)
    caption = f"{name}: {visible_pairs(rule, N, N)} of {N * N} pairs. In blocks of 4: {live}."
    names = ("good", "seen"), ("cached", "not seen")
    made.append(Frame(caption, (mask_grid(rule.mask(N, N), title=name),), legend=names))
Player(made, title="Patterns")

# %% [markdown]
# *Only the picture answers these:*
# - Which patterns leave the upper right empty, so that a decoder may use them?
# - The dilated window and the plain one both give a query five keys at most. Which has fewer pairs, which more
#   blocks?
# - Which pattern lets two tokens talk that are 12 apart, in one layer? In two?

# %% [markdown]
# ## 3. What the guide says, measured (25 minutes)
#
# The written guide that this course grew out of shows three kinds. As printed there:

# %%
from llmopt_lab.sparse_attention.cases import (
    guides_local_attention,
    guides_longformer_attention,
    guides_strided_attention,
)

source = inspect.getsource(guides_local_attention)
print(source[source.index("    seq_len") :])
source = inspect.getsource(guides_longformer_attention)
print(source[source.index("    for i in") :])

# %% [markdown]
# **"Each token only attends to tokens within window."** Which tokens? Do not read the code, perturb it:
# change one key and value, and see which rows of the output move. That draws the real mask of *any*
# attention, and you need no trust in its author.

# %%
rng = torch.Generator().manual_seed(0)
Q, K, V = torch.randn(3, 1, 64, 16, generator=rng, dtype=torch.float64)


def rows_that_see(attend, token):
    """Rows of the output that move when the key and value of `token` change."""
    k, v = K.clone(), V.clone()
    k[:, token] += 1
    v[:, token] += 1
    change = (attend(Q, k, v) - attend(Q, K, V)).abs().amax((0, 2))
    return (change > 1e-12).nonzero()[:, 0].tolist()


for w in (1, 2, 3, 5, 8):
    seen_by = rows_that_see(lambda *x, w=w: guides_local_attention(*x, window_size=w), 32)
    offsets = sorted(32 - row for row in seen_by)
    ours = sorted((SlidingWindow(w, causal=False).mask(64, 64)[32].nonzero()[:, 0] - 32).tolist())
    print(f"window_size={w}: guide sees {offsets}; symmetric window: {ours}")
print(f"with window_size=1 its output is all zero: {not guides_local_attention(Q, K, V, window_size=1).any()}")

# %% [markdown]
# Python's ranges end before their end, so the right half lacks a token: 3 sees two keys, 5 sees four,
# and 1 sees none, where a window of 1 should be the token itself. A softmax over nothing raised no
# error. Longformer's window is $w/2$ on *each* side.
#
# **Two scales in one chapter.** The local loop has no $1/\sqrt d$; the Longformer loop calls torch,
# which has. Same window, no global tokens:

# %%
def relative_error(got, want):
    return float((got - want).norm() / want.norm())


local = guides_local_attention(Q, K, V, window_size=8)
scaled = guides_longformer_attention(Q, K, V, window_size=8, global_indices=())
print(f"the same window, twice: apart by {relative_error(local, scaled):.2f} of the result")

# %% [markdown]
# **Can it cheat?** The right half of the window is the future. A decoder that is trained with it learns
# to copy its own answer. Perturb token 40:

# %%
marked = lambda *x: guides_longformer_attention(*x, window_size=8, global_indices=(0, -1))  # noqa: E731
window = lambda *x: guides_local_attention(*x, window_size=8)  # noqa: E731
for name, attend in (("local", window), ("Longformer", marked)):
    early = [row for row in rows_that_see(attend, 40) if row < 40]
    print(f"{name}: rows {early} move, and lie before token 40")

# %% [markdown]
# Longformer and BigBird are encoders, where that is meant. In a decoder write `pattern & Causal()`.
#
# **"global_indices: Which tokens attend to all positions."** Longformer's global tokens are also *seen*
# by all; its authors call it symmetric. Perturb token 0:

# %%
def ours(q, k, v, pattern):
    return sparse_attention(q[0], k[0], v[0], pattern)[None]


both_ways = longformer(8, (0, -1))
one_way = rows_that_see(marked, 0)
two_way = rows_that_see(lambda *x: ours(*x, both_ways), 0)
print(f"token 0 is seen by {len(one_way)} of 64 rows in the guide's code, by {len(two_way)} in Longformer's")
print(f"and token -1 by {len(rows_that_see(marked, 63))} and {len(rows_that_see(lambda *x: ours(*x, both_ways), 63))}")

full = ours(Q, K, V, Full())
for tokens in ((0, -1), (0, 63)):
    out = guides_longformer_attention(Q, K, V, window_size=8, global_indices=tokens)
    print(f"global_indices={tokens}: the last row is off full attention by "
          f"{relative_error(out[:, -1], full[:, -1]):.2f}")
error = relative_error(marked(Q, K, V), ours(Q, K, V, both_ways))
print(f"all of it is off Longformer's pattern by {error:.2f} of the result")

# %% [markdown]
# `-1` never equals an `i`, so the last token is not global at all. And what a global token collects
# reaches nobody, because nobody reads it.
#
# Longformer also gives its global tokens projections of their own: what they ask with, and the keys and
# values that they read, are `q_global`, `k_global` and `v_global`. What changes? Take the same three
# tensors once more, then three others:

# %%
own = torch.randn(3, 1, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
want = ours(Q, K, V, both_ways)
for name, others in (("the same", (Q, K, V)), ("their own", own)):
    out = reference.longformer_attention(Q, K, V, *others, width=8, global_tokens=(0, -1))
    changed = ((out - want).abs().amax((0, 2)) > 1e-12).nonzero()[:, 0].tolist()
    print(f"{name}: rows {changed} change, the result by {relative_error(out, want):.2f}")

# %% [markdown]
# Only the rows of the two global tokens change. All others read them through the ordinary keys and values.
#
# **"Attend to every k-th token."** The strided version:

# %%
source = inspect.getsource(guides_strided_attention)
print(source[source.index("    seq_len") :])

# %%
hidden = torch.arange(64) % 4 != 0
noise = torch.randn(3, 1, 48, 16, generator=rng, dtype=torch.float64)
q, k, v = (x.clone() for x in (Q, K, V))
for x, new in zip((q, k, v), noise, strict=True):
    x[:, hidden] = new
before, after = guides_strided_attention(Q, K, V), guides_strided_attention(q, k, v)
print(f"three tokens in four replaced by noise: the output moves by {(after - before).abs().max():.1f}")
fourth = attention_oracle(Q[0], K[0, ::4], V[0, ::4], torch.ones(64, 16, dtype=torch.bool))
for name, want in (
    ("every query, every 4th key", fourth[None]),
    ("Sparse Transformer, stride 4", ours(Q, K, V, sparse_transformer(4))),
):
    print(f"off '{name}' by {relative_error(before, want):.2f}")
print(f"rows that see token 60: {len(rows_that_see(guides_strided_attention, 60))} of 64")

# %% [markdown]
# It thins out the *queries* too, and stretches the rest over the gaps: 48 of 64 tokens are invisible.
# Its cost is $(N/4)^2$: sixteen times less, and still four times more at each doubling.
#
# **Four dimensions.** Models have heads. `Q.size(1)` is then the number of heads:

# %%
x = torch.randn(2, 1, 32, 16, generator=rng)
everything = torch.softmax(x @ x.mT, -1) @ x
error = relative_error(guides_local_attention(x, x, x, window_size=4), everything)
print(f"one head: off full attention, without a scale, by {error:.2f}. The window is gone")
try:
    guides_local_attention(*torch.randn(3, 2, 4, 32, 16))
except RuntimeError as refused:
    print(f"four heads: {str(refused)[:60]}...")

# %% [markdown]
# **"O(seq_len × window_size) instead of O(seq_len²)."** Fewer operations, yes. Time it on one core, one head
# of width 64, a window of 128. *Blocked* is this chapter's reference, in Python too, one step a block of 128:

# %% tags=["timing", "nbval-ignore-output"]
import torch.nn.functional as F

from llmopt_lab.sparse_attention.io_model import fitted_exponent, time_calls

sizes = (512, 1024, 2048)
x = torch.randn(3, 1, 2048, 64, generator=rng)
runs = {
    "torch, dense": lambda n: F.scaled_dot_product_attention(*x[:, :, :n]),
    "guide's window loop": lambda n: guides_local_attention(*x[:, :, :n], window_size=128),
    "guide's strided": lambda n: guides_strided_attention(*x[:, :, :n]),
    "blocked window": lambda n: sparse_attention(*x[:, 0, :n], SlidingWindow(128), tile_q=128, tile_k=128),
}
n_threads = torch.get_num_threads()
torch.set_num_threads(1)
print(f"{'ms':20}" + "".join(f"{n:9,}" for n in sizes) + "     N to the power")
for name, call in runs.items():
    seconds = time_calls(call, sizes, repeats=3)
    print(f"{name:20}" + "".join(f"{1000 * s:9.1f}" for s in seconds)
          + f"{fitted_exponent(sizes, seconds):19.2f}")
torch.set_num_threads(n_threads)

# %% [markdown]
# The guide's loop grows more slowly, and starts from far behind: a step a query, 2,048 small products in
# place of a few large ones. Recorded up to 8,192 tokens, on one core (ms):

# %% id="takeaway"
import json
from pathlib import Path

folder = Path(reference.__file__).parent / "results"
measured = json.loads((folder / "measured.json").read_text())
cost = measured["cost"]
print(f"{'':34}" + "".join(f"{n:8,}" for n in cost["lengths"]) + "   N to the power")
for name, row in cost["rows"].items():
    print(f"{name:34}" + "".join(f"{1000 * s:8.1f}" for s in row["seconds"]) + f"{row['time_exponent']:17.2f}")

# %% [markdown]
# The guide's window loop takes 3.4 times as long as torch's dense attention at 2,048 tokens and overtakes it between
# 4,096 and 8,192. The blocked window does so between 1,024 and 2,048, and takes a fifth of the loop's time at every
# length. Small N: dense. Large N: blocks. The guide's strided version is quadratic all the same: over short lengths
# the part that grows with N alone hides it, but from 4,096 to 8,192 its time grows 3.8 times.
#
# | the guide says | found in this section |
# |---|---|
# | a window of `window_size` | one key short on the right; 1 gives zeros, 3 gives 2 keys |
# | (nothing about causality) | every one of its functions sees the future |
# | (nothing about the scale) | $1/\sqrt d$ in two of three |
# | every k-th token | three tokens in four never reach the output; its pairs are $N^2/16$ |
# | global tokens attend to all positions | one way only; `-1` is ignored |
# | `[batch, seq_len, d]` | a head dimension gives full attention, or an error |
# | O(seq_len × window) | in operations; its loop takes five times as long as the same window in blocks, and is slower than dense up to 4,096 tokens |
#
# And "O(seq_len) instead of O(seq_len²)", by formula: a window has $N w$ pairs,
# Longformer $N(w + 2g)$ for $g$ global tokens, the Sparse Transformer $N\sqrt N$. Section 4 measures them.

# %% [markdown]
# ## 4. What it costs (15 minutes)
#
# Three things to count, and they do not agree: *pairs* that the rule allows, *bytes* that its blocks
# move, and *time*. Each grows as some power of N. Pairs come from closed formulas, up to 65,536 tokens
# (BigBird's are counted, block by block); bytes from the cover in blocks of 128 and time on one core, up
# to 8,192:

# %%
from llmopt_lab.sparse_attention import measure
from llmopt_lab.sparse_attention.io_model import pairs_formula

far = (4096, 16384, 65536)
print(f"{'N to the power':34}{'pairs':>8}{'bytes':>8}{'time':>8}")
for name, make in measure.cost_rows().items():
    pairs = fitted_exponent(far, [pairs_formula(make(n), n) for n in far])
    row = cost["rows"][name]
    print(f"{name:34}{pairs:8.2f}{row['bytes_exponent']:8.2f}{row['time_exponent']:8.2f}")

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6))
styles = ("k--", "k-", "o-", "s-", "^-", "x:")
for (name, row), style in zip(list(cost["rows"].items())[:6], styles, strict=True):
    panels[0].loglog(cost["lengths"], [b / 2**20 for b in row["bytes"]], style, label=name)
    panels[1].loglog(cost["lengths"], [1000 * s for s in row["seconds"]], style, label=name)
panels[0].set(xlabel="tokens", ylabel="MiB moved, one head", title="counted bytes")
panels[1].set(xlabel="tokens", ylabel="ms on one core", title="time of the reference")
panels[0].legend(fontsize=7)
for panel in panels:
    panel.set_xticks(cost["lengths"], [f"{n:,}" for n in cost["lengths"]], fontsize=7)
    panel.minorticks_off()
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* two lines on the left lie on each other. Which? What did the other
# save, then?
#
# The Sparse Transformer's $N^{1.5}$ is true of pairs. But its strided column touches *every* block of
# 128 keys, so nothing is skipped: the same bytes as causal attention, and more time for the masks.
# **Hardware skips blocks, not pairs.** Below, see for each pattern how much of what its blocks compute
# is used. Each frame is one block size.

# %%
from llmopt_lab.sparse_attention.io_model import flops, useful_flops
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Bar, Bars

RULES = {
    "window": lambda w: SlidingWindow(w),
    "window + 4 sinks": lambda w: streaming(w, 4),
    "dilated, 4 apart": lambda w: DilatedWindow(w // 4, 4),
    "Sparse Transformer": lambda w: sparse_transformer(w),
    "Longformer & causal": lambda w: longformer(2 * w, (0,)) & Causal(),
}


def blocks_of(pattern, width):
    """Bytes and operations of one head of 1,024 tokens, a frame a block size."""
    rule, n = RULES[pattern](width), 1024
    x = torch.empty(n, 64, dtype=torch.bfloat16)
    made = []
    for tile in (16, 32, 64, 128):
        live, dense = (cover(p, n, n, tile_q=tile, tile_k=tile) for p in (rule, Causal()))
        spent, useful = flops(live, x, x, x) / 1e6, useful_flops(rule, x, x, x) / 1e6
        moved = [sparse_traffic(lists, x, x, x).total / 1024 for lists in (live, dense)]
        work = Bar("pattern", spent, "active", useful), Bar("causal", flops(dense, x, x, x) / 1e6, "idle")
        bytes_ = Bar("pattern", moved[0], "active"), Bar("causal", moved[1], "idle")
        caption = (
            f"{pattern}, width {width}, blocks of {tile}: {int(live.n_live.sum())} of "
            f"{int(dense.n_live.sum())} blocks are live; {useful / spent:.0%} of their operations are used. "
            f"Causal attention moves {moved[1] / moved[0]:.1f} times the bytes."
        )
        made.append(
            Frame(
                caption,
                (Bars("operations; shaded: used", work, "MFLOP"), Bars("moved", bytes_, "KiB")),
                legend=(("active", "the pattern's live blocks"), ("idle", "causal, the same blocks")),
            )
        )
    return Player(made, start=2)


Explore(
    blocks_of,
    pattern=Choice("pattern", tuple(RULES), "window"),
    width=Choice("width, or stride", (32, 64, 128, 256), 128),
)

# %% [markdown]
# *Only the picture answers these:*
# - For the window: smaller blocks waste fewer operations. What gets worse?
# - Which pattern gains nothing at blocks of 64, whatever its width up to 64?
# - What does a sink of four tokens cost, in blocks of 16 and of 128?
#
# **How far can it see?** A layer of windows sees $w - 1$ tokens back, and its inputs have seen as far
# again. So L layers reach $L(w - 1)$, if everything on the way is passed on. Each line says how many
# tokens the last of 2,048 depends on: under windows, dilated windows (keys 4 apart), the Sparse Transformer's
# pattern, and windows with every fourth layer dense.

# %%
from llmopt_lab.sparse_attention.io_model import layers_to_reach
from llmopt_lab.sparse_attention.recall import reach
from llmopt_lab.sparse_attention.view import reach_chart


def growth(width):
    """Reach of the last of 2,048 tokens, layer by layer."""
    n, depth = 2048, 8
    near = SlidingWindow(width)
    lines = {
        "window": [near] * depth,
        "dilated": [DilatedWindow(width, 4)] * depth,  # keys 4 apart
        "4th dense": [Causal(), near, near, near] * (depth // 4),
        "strided": [sparse_transformer(width)] * depth,
    }
    counts = {name: reach(layers, n) for name, layers in lines.items()}
    caption = (
        f"A window of {width} needs {layers_to_reach(n, width)} layers to see all of {n:,} tokens; after "
        f"{depth} it sees {counts['window'][-1]:,}."
    )
    return Player([Frame(caption, (reach_chart(counts),))])


Explore(growth, width=Choice("width, or stride", (32, 64, 128, 256), 128))

# %% [markdown]
# *Only the picture answers these:*
# - Which pattern sees everything after two layers, whatever its width?
# - The dilated window is fast and then stops for ever. At which share of the text, and why?
# - How many windows stand before the layer that makes the line of "4th dense" jump? That is why Gemma 3 (5 windows
#   to 1 dense layer) and gpt-oss (1 to 1) interleave: few layers keep a full cache, and nothing is out of reach.

# %% [markdown]
# ## 5. A real head, and a mask to paint (20 minutes)
#
# `lab-target` is a small Llama that comes with the course and completes Python code. (For SmolLM2-135M
# change one line: `MODEL = "smollm2-135m"`.) It reads 512 tokens that it was not trained on; a number in
# the grid says how much of the attention of a block of 32 queries falls on a block of 32 keys. Paint what
# may be read. The three bars follow each stroke; *ask the model* lets all heads of all layers read your
# blocks and no other, and gives the perplexity.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.device import pick_device
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.weights import load
from llmopt_lab.sparse_attention.attend import attend
from llmopt_lab.sparse_attention.block_lists import lists_of
from llmopt_lab.sparse_attention.io_model import block_costs
from llmopt_lab.sparse_attention.recall import block_shares, layers_inputs, probabilities
from llmopt_lab.widgets.paint import Cost, Paint

MODEL = "lab-target"

device = pick_device()
dtype = torch.float32
if device.type == "cuda":
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if native else torch.float16
lm = load(MODEL, device=device, dtype=dtype)
text = lm.encode(held_out_documents()["stdlib/zipfile.py"]).to(device)
n, size = 512, 32
n_blocks = n // size
passage = text[None, :n]
maps = [
    probabilities(q.float().cpu(), k.float().cpu(), scale=scale)[0]
    for q, k, scale in layers_inputs(lm.model, passage)
]
shares = {"all heads, their mean": torch.stack([block_shares(p, size, size).mean(0) for p in maps]).mean(0)}
for layer, p in enumerate(maps):
    for head, share in enumerate(block_shares(p, size, size)):
        shares[f"layer {layer}, head {head}"] = share


def perplexity(mask):
    """Of the passage, when every head reads the blocks of `mask` only."""
    mask = mask.to(device)
    lists = lists_of(mask, torch.zeros_like(mask), n, n, size, size)

    def painted(q, k, v, *, layer, scale):
        return attend(q, k, v, Causal(), scale=scale, lists=lists)

    with torch.no_grad():
        logits = lm.model(passage, attend=painted)[0]
    return float(F.cross_entropy(logits[:-1].float(), passage[0, 1:]).exp())


rows, cols = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)
may = cols <= rows
dense_perplexity = perplexity(may)
near = may & (rows - cols < 2)
costs = block_costs(n, tile_q=size, tile_k=size, d_head=lm.config.d_head)
best = shares["all heads, their mean"].masked_fill(~may, -1).topk(3, dim=1).indices
presets = {
    "window": near,
    "window + first": near | (may & (cols == 0)),
    "strided": may & ((rows - cols) % 4 == 0),
    "3 best a row": may & torch.zeros_like(may).scatter(1, best, True),
    "dense": may,
    "nothing": may & ~may,
}
canvas = Paint(
    shares,
    [Cost("bytes moved, one head", "bytes", costs.nbytes, costs.fixed_nbytes), Cost("operations", "FLOP", costs.flops)],
    allowed=may,
    presets=presets,
    row_labels=[f"{32 * i}" for i in range(n_blocks)],
    column_labels=[f"{32 * i}" for i in range(n_blocks)],
    choose="attention of",
    title="Paint what may be read",
    ask=lambda mask: f"perplexity {perplexity(mask):.2f}; dense {dense_perplexity:.2f}",
)
canvas

# %% [markdown]
# *Only the picture answers these:*
# - The window keeps nearly all of some heads, and loses half of others. In which layers are those?
# - Add the first column to the window. How much attention comes back, for how many bytes? Which heads
#   want it?
# - Paint 45 blocks, as many as *window + first* has, and get a lower perplexity than it. (It is hard.)
# - A row that reads nothing: what does *ask the model* say?
#
# The presets by number. Recall is the mean over all heads:

# %% tags=["timing", "nbval-ignore-output"]
print(f"{'blocks':24}{'number':>7}{'attention kept':>16}{'perplexity':>12}")
for name, mask in presets.items():
    kept = float((shares["all heads, their mean"] * mask).sum(1).mean())
    print(f"{name:24}{int(mask.sum()):7}{kept:15.1%} {perplexity(mask):12.2f}")

# %% [markdown]
# The strided preset reads more blocks than the window and is far worse. Attention kept orders the presets well,
# but not to the last: the three best blocks of each row keep a little more than *window + first* and predict
# a little worse. Recorded for both models over 1,024 tokens: how much of the attention is kept, and what the model
# makes of it. *Keys* are those of the last query, for they differ: compare rows that read as many. For the
# perplexity the chosen blocks are 8 and three more that are always read: the first, the newest and the one before.
# BigBird is in blocks of 32.

# %%
recorded = measured["models"]
n_read = recorded["lab-target"]["mass"]["n"]
keys = {name: int(p.mask(1, n_read).sum()) for name, p in measure.fixed_patterns(n_read).items()}
keys |= {"dense": n_read, "first token": 1, "every other layer dense, window 64": f"64 or {n_read}"}
for part, what, title, n_chosen, form in (
    ("mass", "kept", "attention kept", 8, "{:.1%}"),
    ("perplexity", "perplexity", "perplexity", 8 + 3, "{:.2f}"),
):
    print(f"{title:36}{'keys':>11}" + "".join(f"{model:>14}" for model in recorded))
    for name in recorded["lab-target"][part][what]:
        found = [form.format(model[part][what][name]) for model in recorded.values()]
        print(f"{name:36}{keys.get(name, 32 * n_chosen):>11}" + "".join(f"{x:>14}" for x in found))
    print()

# %% [markdown]
# The dilated window alone ruins both models: it never sees the token before its own. Longformer gives it to a few
# heads, beside others with plain windows, and trains them so.
#
# Look at *first token*: over a third of all of SmolLM2's attention goes to three quotation marks.
# A softmax must give its weight to something, and this model has learnt to leave it there. In the
# small `lab-target` it is 5 %. Now you can judge your guess:

# %%
both = recorded["smollm2-135m"]["perplexity"]["perplexity"]
guess.reveal(round(both["window 60 + 4 sinks"], 1))
print(f"dense {both['dense']:.1f}, window 64 {both['window 64']:.1f}, window 60 and 4 sinks "
      f"{both['window 60 + 4 sinks']:.1f}")

# %% tags=["nbval-ignore-output"]
heads = recorded["smollm2-135m"]["mass"]["first_token_by_layer_and_head"]
small = recorded["lab-target"]["mass"]["first_token_by_layer_and_head"]
figure, panels = plt.subplots(1, 2, figsize=(8, 4.2), width_ratios=(6, 9), layout="constrained")
for panel, shown, name in zip(panels, (small, heads), ("lab-target", "SmolLM2-135M"), strict=True):
    image = panel.imshow(shown, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    panel.set(xlabel="head", ylabel="layer", title=name)
bar = figure.colorbar(image, ax=panels, label="attention on the first token")

# %% [markdown]
# *Only the picture answers this:* in which layer of SmolLM2 does the sink begin, and which two layers in
# the middle have none?

# %% [markdown]
# ## 6. Sinks, endless text, a needle (20 minutes)
#
# A model that writes for hours cannot keep every key. A *rolling cache* keeps the last few: when a token
# comes in, the oldest leaves. StreamingLLM also keeps the first `n_sinks`, for ever, and counts
# positions *inside the cache*, so that no distance grows beyond what the model was trained on.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.sparse_attention.rolling_cache import RollingCache, stream_nats
from llmopt_lab.sparse_attention.view import cache_frames

story = text[:48]
kind = {"dtype": lm.model.dtype, "device": device}
cache = RollingCache(lm.config, window=12, n_sinks=2, **kind)
with recording() as trace, torch.no_grad():
    for part in story.split(4):
        lm.model(part[None], cache.next_positions(len(part)), attend=cache)
words = [lm.decode([int(token)]) for token in story]
Player(cache_frames(trace, words), title="Two sinks and a window of 12")

# %% [markdown]
# *Only the picture answers this:* after which step is the first token forgotten? Which step does not
# enlarge the cache any more?
#
# **Evict the sink.** The same cache of 256 places, split differently, over a text that is longer. Recorded
# perplexity, from where the cache begins to forget; `whole` forgets nothing:

# %%
print(f"{'sinks':>8}{'window':>8}" + "".join(f"{model:>16}" for model in recorded))
for n_sinks in (0, 1, 2, 4, 8, None):
    cells = []
    for model in recorded.values():
        row = [row for row in model["sinks"]["rows"] if row["n_sinks"] == n_sinks]
        cells.append(f"{row[0]['perplexity_evicting']:16.2f}" if row else f"{'not measured':>16}")
    name = "whole" if n_sinks is None else str(n_sinks)
    print(f"{name:>8}{256 - n_sinks if n_sinks is not None else '':>8}" + "".join(cells))

# %% tags=["nbval-ignore-output"]
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for panel, (name, model) in zip(panels, recorded.items(), strict=True):
    for row in model["sinks"]["rows"]:
        if row["n_sinks"] in (0, 4, None):
            label = "whole" if row["n_sinks"] is None else f"{row['n_sinks']} sinks"
            style = {"0 sinks": "o-", "4 sinks": "s-", "whole": "k--"}[label]
            ends = [128 * (i + 1) for i in range(len(row["nats"]))]
            panel.plot(ends, row["nats"], style, label=label, markersize=4)
    panel.axvline(256, color="gray", linewidth=0.8)
    panel.set(xlabel="tokens read; gray: the cache is full", title=name)
panels[0].set_ylabel("nats a token")
panels[0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# SmolLM2 breaks as soon as its sink is evicted, from 9.8 to 16.3, and one sink repairs it. `lab-target` gets worse
# by a seventh and no more, since it leaves only 5 % of its attention there; four sinks repair that, too.
# **How much a window needs sinks is a property of the model.** Measure yours. (Look at the last segments of
# `lab-target`: the whole cache does *worse* than a window. A model is not better for every key that it keeps.)
#
# **Endless text, constant memory.** `lab-target` knows 2,048 positions. Here it reads past that, with 256
# places in all. Watch what the cache holds:

# %% tags=["timing", "nbval-ignore-output"]
import time

print(f"{len(text):,} tokens of text; the model knows {lm.config.max_positions:,} positions")
whole = lm.config.kv_bytes_per_token(lm.model.dtype)
nats = {}
for n_sinks in (0, 4):
    cache = RollingCache(lm.config, window=256 - n_sinks, n_sinks=n_sinks, **kind)
    begin = time.perf_counter()
    nats[n_sinks] = stream_nats(lm.model, text[:2560], cache, step=256)
    seconds = time.perf_counter() - begin
    print(f"{n_sinks} sinks: {cache.length + 1:,} tokens read, {len(cache.kept())} held: {cache.nbytes / 2**20:.1f} MiB, "
          f"all of them would take {whole * cache.length / 2**20:.1f} MiB; {2560 / seconds:,.0f} tokens/s")
    print(f"         perplexity after token 256: {float(nats[n_sinks][256:].mean().exp()):.2f}")

# %% [markdown]
# Recorded over all of 32,768 tokens, sixteen times what it knows:

# %%
stream = recorded["lab-target"]["stream"]
print(f"{stream['tokens']:,} tokens through {stream['window']} + {stream['n_sinks']} places: "
      f"{stream['cache_bytes'] / 2**20:.1f} MiB, where all keys and values take "
      f"{stream['kv_bytes_if_all_were_kept'] / 2**20:.0f} MiB")
print(f"the process grew by {stream['peak_resident_growth_bytes'] / 2**20:.1f} MiB while it read")
print("nats a token, every 4,096:", stream["nats"])

# %% [markdown]
# The nats follow the files (the first part is a table of colours) and do not rise with the length. The memory is
# constant. So is the work, by count: a token is scored against the 256 places and its own step, however much came
# before. (The time over the whole text was not recorded.) But what did it *forget*?
#
# **A needle.** 24 random tokens stand early in a text, and again at its end, where the first four of them are
# given away. A model with induction heads looks them up and copies the other twenty. How many does it
# get, if so much text lies between?

# %%
for model, results in recorded.items():
    print(f"{model}: needles recalled; windows of 256 keys, or 8 + 3 blocks of 32, 352 keys")
    names = list(results["needle"]["rows"][0]["recalled"])
    print(f"{'tokens between':>44}" + "".join(f"{row['filler_between']:7}" for row in results["needle"]["rows"]))
    for name in names:
        print(f"{name:>44}" + "".join(f"{row['recalled'][name]:7.0%}" for row in results["needle"]["rows"]))

# %% [markdown]
# Within the window all are alike. Beyond it windows recall *nothing*, sinks or not: a good perplexity says
# nothing about memory. At 320 tokens every other layer dense brings back 17 % of needles in `lab-target`, where all
# layers dense find 31 %, and nothing in SmolLM2; neither was trained so. At the same distance blocks chosen by Quest's
# score recall as much as dense attention in both, by the mean as much in SmolLM2 and 12 % in `lab-target`.
# (`lab-target` can hardly do 640 tokens even dense: its rows there say nothing about a pattern. A model must have the
# skill before a mask can take it away. SmolLM2: one text a distance, 20 tokens, so 5 % is one token.)
#
# Here, live, one distance of 320 and two texts:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.sparse_attention.attend import PatternAttend, TopBlocksAttend
from llmopt_lab.sparse_attention.recall import needle, recalled

rng = torch.Generator().manual_seed(320)
filler = text[: 320 + 64].cpu()
texts = [needle(filler, length=24, at=64, n_vocab=lm.config.n_vocab, rng=rng) for _ in range(2)]
print(f"from a token of the second needle back to what it must copy: {texts[0].distance} tokens")
for name, how in {
    "dense": PatternAttend(Causal()),
    "window 256": PatternAttend(SlidingWindow(256)),
    "window 252 + 4 sinks": PatternAttend(streaming(252, 4)),
    "every other layer dense": PatternAttend(SlidingWindow(256), Causal()),
    "top 8 blocks of 32": TopBlocksAttend(8, 32, score="quest", always=streaming(32, 1)),
}.items():
    read = lambda tokens, how=how: lm.model(tokens[None].to(device), attend=how)[0].cpu()  # noqa: E731
    print(f"{name:26}{sum(recalled(read, each) for each in texts) / 2:.0%}")

# %% [markdown]
# ## 7. Blocks chosen by content (15 minutes)
#
# A window is chosen before anything is read. Better: look at a cheap *summary* of each block of keys, and
# read the best blocks only. Two scores, both a number for each pair of blocks: the mean key times the mean
# query (MoBA), and a bound on the largest score from the block's extreme keys (Quest). The *oracle* looks at
# the true attention. How much do they keep, of the passage of section 5? Two blocks of 32 are fewer than 64 keys, for
# the query's own block is only partly behind it. So the window and the single keys get as many keys as the oracle
# reads, in the mean over all queries.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.sparse_attention.recall import block_mass, mass_recall
from llmopt_lab.sparse_attention.select import chosen_blocks, top_blocks

found, causal = {}, Causal().mask(n, n)
for q, k, scale in layers_inputs(lm.model, passage):
    q, k = q.float().cpu(), k.float().cpu()
    p, group = probabilities(q, k, scale=scale), q.shape[1] // k.shape[1]
    exact = block_mass(p, size, size, k.shape[1]).masked_fill(~may, -torch.inf)
    for budget in (2, 4, 8):
        live = {
            f"{score}": top_blocks(
                q, k, Causal(), n_blocks=budget, tile_q=size, tile_k=size, score=score
            ).live()
            for score in ("mean", "quest")
        }
        live["oracle"] = chosen_blocks(exact, may, budget, None, n, n, size, size)
        masks = {
            name: (x & may).repeat_interleave(size, -1).repeat_interleave(size, -2)[0] & causal
            for name, x in live.items()
        }  # (n_kv_heads, n, n)
        read = {name: float(mask.sum(-1).float().mean()) for name, mask in masks.items()}
        kept = {name: float(mass_recall(p, m.repeat_interleave(group, 0)).mean()) for name, m in masks.items()}
        width = min(range(1, n), key=lambda w: abs(pairs_formula(SlidingWindow(w), n) / n - read["oracle"]))
        kept["window"] = float(mass_recall(p, SlidingWindow(width).mask(n, n)).mean())
        kept["single keys, oracle"] = float(p.topk(width, -1).values.sum(-1).mean())
        read |= dict.fromkeys(("window", "single keys, oracle"), pairs_formula(SlidingWindow(width), n) / n)
        for name, share in kept.items():
            found.setdefault(name, {}).setdefault(budget, []).append((share, read[name]))
print(f"{'attention kept':22}" + "".join(f"{f'{b} blocks':>22}" for b in (2, 4, 8)))
for name, budgets in found.items():
    means = [torch.tensor(rows).mean(0).tolist() for rows in budgets.values()]
    print(f"{name:22}" + "".join(f"{share:10.1%}, {tokens:5.1f} keys" for share, tokens in means))

# %% [markdown]
# All queries of a block of 32 and all heads of a KV group must agree on their blocks, so even the oracle
# loses something; the last line is what single keys could do. Which of the two scores is better depends on what you
# ask: in the tables of section 5 the mean keeps more attention in `lab-target` and less in SmolLM2 than Quest, and
# gives both the lower perplexity, with three more blocks always read. Quest finds more needles in `lab-target`.
# For as many keys the oracle keeps more than a window, but with 2 blocks by 2 points only, and there neither score
# beats the window. The mean does from 4 blocks on, Quest with 8.
#
# On a GPU `select_blocks` of the kernels makes this choice, by the mean score, without a loop on the host; its lists
# go to `sparse_attention_triton(..., lists=...)`.
#
# **NSA** (DeepSeek, 2025) makes the summary part of the model and trains it. Every query has three answers,
# weighed by gates: attention to *compressed* blocks, one key for each; to the few *selected* blocks, read in
# full, chosen by what the compressed attention gave them; and to a *window*. Here it is on the queries, keys and
# values of the last layer of `lab-target`, 96 tokens; the model was not trained so, but the arithmetic is the paper's:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.sparse_attention.nsa import nsa_attention
from llmopt_lab.sparse_attention.records import Selected

layers = []


def remember(q, k, v, *, layer, scale):
    layers.append(([x.float().cpu() for x in (q, k, v)], scale))
    return attend(q, k, v, Causal(), scale=scale)


with torch.no_grad():
    lm.model(text[None, :96], attend=remember)
(q, k, v), scale = layers[-1]
sizes = {"block": 16, "stride": 8, "select_block": 16, "n_select": 4, "window": 32}
gates = torch.zeros(*q.shape[:-1], 3)
gates[..., 2] = 1  # the window alone
with recording(Selected) as trace:
    windowed = nsa_attention(q, k, v, gates, **sizes, scale=scale)
want = sparse_attention(q, k, v, SlidingWindow(32), scale=scale)
print(f"with the gate of the window alone it is window attention: {(windowed - want).abs().max():.0e}")
chosen = trace.of(Selected)[0].chosen[0]  # (n_kv_heads, n, blocks)
shown = []
for head, picked in enumerate(chosen):
    seen = picked.repeat_interleave(16, -1) & Causal().mask(96, 96)
    caption = (
        f"KV head {head}: a query reads {int(picked.sum(-1).max())} blocks of 16 keys at most: the first, its own, the "
        "one before, and the best of the others."
    )
    names = ("good", "read"), ("active", "read in part"), ("cached", "not read")
    shown.append(Frame(caption, (mask_grid(seen, title="selected; a cell is 4 x 4 tokens"),), legend=names))
Player(shown, title="What NSA selects")

# %%
n_long = 65536
read = n_long // 16 + 16 * 64 + 512
print(f"with the paper's sizes a query of {n_long:,} tokens reads {read:,} keys: {n_long / read:.1f} times fewer, "
      f"{n_long // 16:,} of them compressed")

# %% [markdown]
# So even NSA's first branch grows with N, only sixteen times more slowly. *DSA* (DeepSeek-V3.2) goes the other
# way: an *indexer*, a few small heads in FP8, scores every earlier token, and each query reads its best 2,048
# *single* tokens. The indexer is still $N^2$, at a price small enough to pay; the attention is $2048\,N$. Compare
# *single keys* with *oracle* in the table above for what that buys.

# %% [markdown]
# ## 8. The kernel (15 minutes)
#
# One program takes a tile of queries and walks its live blocks: first the full ones, without a mask, then the
# partial ones. Names are those of the reference:

# %%
try:
    from llmopt_lab.sparse_attention import kernels

    source = inspect.getsource(kernels._absorb.fn)
    print(source[source.index("    for step") :])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Four things to see in it:
# - **`tile_at`** gives the next block: by arithmetic for a window (no list exists), from the list otherwise.
# - **`MASKED`** is known when the kernel is compiled, so full blocks cost no comparison.
# - **`pairs_seen`** makes the mask of one block from a few numbers of the pattern: from which diagonal to which, and
#   which rows and columns. So no mask is stored. One of 16k tokens would take 256 MiB.
# - **`base`**: a row whose keys are all masked keeps $m = -\infty$, and $-\infty - (-\infty)$ is NaN.
#
# Lists are made for blocks of 64 on a GPU, of 128 where the pattern itself consists of such blocks. Here all of it
# runs: compiled if you have a GPU, else in Triton's interpreter, which is slow and right. (A T4, sm_75, has no bf16
# tensor cores: section 5 loads the model in fp16 there, and the kernels compile for it in fp16.) Ragged lengths,
# grouped heads, forward and backward:

# %% tags=["timing", "nbval-ignore-output"]
try:
    from llmopt_lab.sparse_attention.cases import Sizes, attention_inputs
    from llmopt_lab.sparse_attention.kernels import sparse_attention_triton

    pattern = streaming(12, 2)
    inputs = attention_inputs(Sizes(37, 53, 16, 16, n_heads=4, n_kv_heads=2), dtype=torch.float32, device=device)
    mask = pattern.mask(37, 53, device=device)
    grads = []
    for run in (
        lambda *x: sparse_attention_triton(*x, pattern),
        lambda *x: attention_oracle(*x, mask),
    ):
        x = [t.clone().requires_grad_() for t in inputs]
        out = run(*x)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), x)])
    for name, got, want in zip(("out", "dQ", "dK", "dV"), *grads, strict=True):
        error = relative_error(got.double(), want.double())
        print(f"{name:3} {tuple(got.shape)}: {'right' if error < 1e-2 else 'WRONG'}")
except ImportError as missing:
    print(missing)

# %% [markdown]
# On a Hopper GPU `hopper.py` runs in its place forward, for windows, sinks and patterns of whole blocks: the same
# lists, with one warp that fetches tiles and warpgroups that multiply (chapter 2 explains both). Patterns with a longer
# rule, such as Longformer's, stay with the Triton kernel.
#
# Recorded on an H200: 16 heads of width 128, bf16, 16,384 tokens unless it says otherwise. Every contender was first
# checked against an oracle in float64, then timed in the same run. The last columns say how many times as long the
# peer takes; **below 1 we lose**. Before you look: how many times as fast as dense should a window of 1,024 be?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, load_results, run_room

(h200,) = load_results("sparse_attention")
print(f"{h200['hardware']['name']}, commit {h200['commit'][:8]}")
print(f"{'':67}{'ours ms':>9}{'flex':>9}{'FA3':>7}{'FA2':>7}")
for case in h200["cases"]:
    for row in case["rows"]:
        results = row["results"]
        mine = results["ours"]["median_ms"]
        about = ", ".join(f"{k} {v}" for k, v in row["size"].items() if (k, v) != ("n", 16384))
        title = f"{case['title']}: {about}" if about else case["title"]
        peers = []
        for peer, width in (("flex_attention", 9), ("FlashAttention-3", 7), ("FlashAttention-2", 7)):
            result = results.get(peer, results.get(f"{peer}, not compiled", {}))
            ms, star = result.get("median_ms"), "" if result.get("how", "graph") == "graph" else "*"
            peers.append(f"{f'{ms / mine:.2f}{star}' if ms else '-':>{width}}")
        print(f"{title:67}{mine:9.4f}" + "".join(peers))
print("* timed as plain launches: no CUDA graph can hold it. Every contender of its row pauses before each sample")

# %% [markdown]
# Wins and losses:
# - **We lose to FlashAttention-3** at every window: it takes 0.90 to 0.92 times as long. Dense it takes 0.88 times.
# - flex_attention takes 1.07 times (width 64) to 1.41 times (window 4,096) as long for a window forward.
# - Backward it takes 1.11 times as long for a window, 1.61 times with sinks. Random blocks of 128 are **a draw**: 1.01
#   times, less than the spread.
# - Random blocks of 64 are as fast as blocks of 128 in Triton. But our Hopper kernel takes blocks of 128 alone, so you
#   pay 1.32 times for the finer choice. flex_attention takes 1.63 times as long, with the tiles of 64 x 64 and the 4
#   warps that ours has.
# - With Longformer it takes 1.63 times as long, with the Sparse Transformer 1.62 times. It compiles your rule.
#   Ours is compiled for *what the terms of a pattern forbid*: Longformer's are one band of diagonals, two bands of
#   rows and two of columns. Before it was (git commit b773c16), our kernel took 4.0 times as long for Longformer
#   as now. More than eight terms, as of four scattered global tokens, it still goes through one by one.
# - **How you time decides.** A plain launch must be waited for, so the GPU pauses for a millisecond before each sample of
#   4 to 7 ms: then the host is ahead. At commit 23ba6ce flex_attention alone paused, and in the backward rows ours took
#   1.070, 1.149 and 1.593 ms. Since all pause it takes 0.996, 1.083 and 1.497 ms, 6 to 7 % less, by the same kernels,
#   and random blocks no longer look like a loss. The likely reason, not measured: a GPU at its power limit lowers its
#   clock, and a pause lets it recover.
# - Making lists takes 5 to 10 µs on the GPU, timed for blocks of 128. BigBird's forward pass uses such blocks: there
#   it is 2 % of the time. (The Sparse Transformer and Longformer use blocks of 64, whose lists were not timed.) The
#   host's part, the table of terms, is not in it; it is made once for a pattern and a length, and kept.
#   flex_attention's `create_block_mask`, which is not compiled here, takes 470 to 11,300 times as long. A window
#   needs no list.
#
# The whole table, with its spread and the peers that are absent:

# %% tags=["nbval-ignore-output"]
print(format_results(h200))

# %% [markdown]
# With a GPU, the next cell times the window's rows here; without one it says so. All rows:
# `llmopt bench sparse_attention` in a terminal.

# %% tags=["timing", "nbval-ignore-output"]
if device.type == "cuda":
    print(format_results(run_room("sparse_attention", where=lambda title, size: title == "window, forward")))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 9. Where it loses (10 minutes)
#
# **Against dense attention.** From the same record: pairs that the pattern saves, and time that it saves over
# causal attention by this chapter's kernels. The last column compares the Triton kernels alone, for pattern and dense.

# %%
rows = {case["title"]: case["rows"] for case in h200["cases"]}
dense = rows["dense, by the same kernel"][0]["results"]
n_h200 = 16384
causal_pairs = pairs_formula(Causal(), n_h200)
entries = {
    "window 1024": (pairs_formula(SlidingWindow(1024), n_h200), rows["window, forward"][0]),
    "window 1024 + 4 sinks": (pairs_formula(streaming(1024, 4), n_h200), rows["window, forward"][1]),
    "window 4096": (pairs_formula(SlidingWindow(4096), n_h200), rows["window, forward"][2]),
    "Sparse Transformer 128": (
        pairs_formula(sparse_transformer(128), n_h200), rows["Sparse Transformer, stride 128"][0],
    ),
    "Longformer 1024, 2 global": (
        pairs_formula(longformer(1024, (0, -1)), n_h200),
        rows["Longformer, window 1024, tokens 0 and -1 global"][0],
    ),
}
print(f"{'':28}{'pairs saved':>12}{'time saved':>12}{'in Triton':>12}")
for name, (pairs, row) in entries.items():
    gains = [dense[x]["median_ms"] / row["results"][x]["median_ms"] for x in ("ours", "ours in Triton")]
    print(f"{name:28}{causal_pairs / pairs:11.1f}x" + "".join(f"{gain:11.2f}x" for gain in gains))
for tile in (64, 128):
    live, every = (cover(p, 2048, 2048, tile_q=tile, tile_k=tile) for p in (sparse_transformer(128), Causal()))
    print(f"Sparse Transformer 128, 2,048 tokens in blocks of {tile}: {int(live.n_live.sum())} of the causal "
          f"{int(every.n_live.sum())} blocks are live, {int(live.n_full.sum())} of them full")

# %% [markdown]
# The Sparse Transformer has 43 times fewer pairs and is *slower* than dense. Two things cost it. Its stride of 128
# comes back in every second block of 64, so about half of the blocks are live, and most of those are partial: each
# pays for its mask. (In blocks of 128 all would be live.) And its rule is one for the Triton kernel, where dense runs
# on Hopper's: against dense in Triton it gains 3 %.
# Longformer has 8.1 times fewer pairs and takes 1/2.4 of the time. A pattern without blocks in mind gains little on a
# GPU, or loses.
#
# **In a whole model.** Attention is a part of the work. Does a window pay? A prefill computes: weights and pairs. A
# decode step reads: the weights once for the batch, and every sequence's keys and values. Llama-3-8B in bf16, by
# arithmetic; pairs inside a window count at the rate that the H200 reached for windows of 1,024 and 4,096, not at the
# dense one. (Other windows were not timed: 256 counts as 1,024, and 16,384 as 4,096.) Some layers can stay dense. Each
# frame is one context length.

# %%
LAYERS, WEIGHTS, D_MODEL, KV_BYTES = 32, 8.03e9, 4096, 2 * 8 * 128 * 2  # keys and values, a token and layer
slower = {  # window -> time of a pair, in that of a dense one
    row["size"]["window"]: dense["ours"]["tflop_s"] / row["results"]["ours"]["tflop_s"]
    for row in (rows["window, forward"][0], rows["window, forward"][2])
}


def break_even(window, batch, dense_every):
    """Prefill and decode of Llama-3-8B, a frame a context length."""
    made = []
    n_dense = LAYERS // dense_every if dense_every else 0
    for n in (1024, 4096, 16384, 65536, 131072):
        pairs = {w: pairs_formula(SlidingWindow(w), n) for w in (n, min(window, n))}
        linear, pair = 2 * WEIGHTS * n, 4 * D_MODEL
        rate = slower[1024 if window < 4096 else 4096] if window < n else 1.0
        work = [linear + LAYERS * pair * pairs[n]]
        work.append(linear + pair * (n_dense * pairs[n] + (LAYERS - n_dense) * rate * pairs[min(window, n)]))
        kept = [LAYERS * n, n_dense * n + (LAYERS - n_dense) * min(window, n)]
        moved = [2 * WEIGHTS + batch * KV_BYTES * tokens for tokens in kept]
        gain = [a / b for a, b in (work, moved)]
        saved = "Nothing to gain." if max(gain) < 1.05 else "Ask what it forgets."
        caption = (
            f"{n:,} tokens, window {window:,}, {n_dense} of {LAYERS} layers dense, batch {batch}: prefill "
            f"{gain[0]:.2f} times as fast, a decode step {gain[1]:.2f} times. {saved}"
        )
        tones = [("idle", "good" if g > 1.05 else "bad") for g in gain]
        panels = tuple(
            Bars(title, tuple(
                Bar(f"{name} {x / size_of:,.1f}", 100 * x / amounts[0], tone)
                for name, x, tone in zip(("dense", "windows"), amounts, tones_of, strict=True)
            ), "%", 100)
            for title, size_of, amounts, tones_of in (
                ("prefill of one sequence, TFLOP", 1e12, work, tones[0]),
                ("read in a decode step by the whole batch, GB", 1e9, moved, tones[1]),
            )
        )
        legend = ("idle", "dense"), ("good", "windows, at least 5% less"), ("bad", "windows, no gain")
        made.append(Frame(caption, panels, legend=legend))
    return Player(made, start=1)


Explore(
    break_even,
    window=Choice("window", (256, 1024, 4096, 16384), 1024),
    batch=Choice("sequences at once", (1, 8, 64), 8),
    dense_every=Choice("one layer dense in (0: none)", (0, 2, 4, 6), 0),
)

# %% [markdown]
# *Only the picture answers these:*
# - One sequence of 4,096 tokens: what does a window of 1,024 buy, in prefill and in decoding? What must you do to
#   make it worth while?
# - With every second layer dense, what is the most that windows can give, however long the text?
# - A window longer than the text: which number in the caption says that nothing changed?
#
# And never in these bars: the needle. A window of 1,024 in every layer of Llama-3-8B is a model that was not trained
# so. Train with the window, as Mistral, Gemma and gpt-oss do, or test at least, as in section 6.

# %% [markdown]
# ## 10. In production, and what to remember (5 minutes)
#
# A window of `w` keys, the query's own among them, is `w - 1` keys to the *left* for most kernels.
#
# | system | how to choose |
# |---|---|
# | torch | `flex_attention(q, k, v, block_mask=create_block_mask(rule, ...))`, compiled; `peers.mask_rule` of this chapter turns a pattern into such a `rule(b, h, q_idx, kv_idx)` |
# | FlashAttention | `flash_attn_func(q, k, v, causal=True, window_size=(w - 1, 0))` |
# | FlashInfer | `plan(..., window_left=w - 1)`; lists of live blocks: `BlockSparseAttentionWrapper(...).plan(indptr, indices, M, N, R, C, ...)` |
# | transformers | the model's config: `sliding_window=4096`, `layer_types=["sliding_attention", ..., "full_attention"]`; the caches of sliding layers stop growing by themselves. `SinkCache` left the library after 4.52; what replaced it, `custom_generate="transformers-community/sink_cache"`, is reported broken on 5.x |
# | vLLM | follows the model's config. `--disable-sliding-window` caps the context at the window instead; `--disable-hybrid-kv-cache-manager` keeps *all* keys of sliding layers. DeepSeek-V3.2 gets its DSA backend (`FLASHMLA_SPARSE`) by itself |
# | TensorRT-LLM | `KvCacheConfig(max_attention_window=[1024, 1024, 32768])`, a window a layer, in turns (its `sink_token_length` does nothing in the PyTorch backend); `sparse_attention_config=DeepSeekSparseAttentionConfig(...)`, `RocketSparseAttentionConfig(...)`, `SkipSoftmaxAttentionConfig(...)` |
#
# **Remember**
# 1. A pattern is a rule; its cover in blocks is what you pay for. Hardware skips blocks, not pairs.
# 2. A cover may compute too much and may never lose a pair.
# 3. Perturb a token and look which rows move: that is the mask, whatever the code says. In a decoder no row before
#    it may move.
# 4. $L$ windows reach $L(w - 1)$ tokens; a dense layer now and then reaches all.
# 5. Sinks: where a softmax puts what it has no use for. Evict them and some models break; keep four.
# 6. A rolling cache gives constant memory and fluent text. It remembers nothing beyond its window: test with a
#    needle, not with perplexity.
# 7. To find what lies far, choose blocks by content, and always keep the first and the newest.
# 8. Short text, small batch, a pattern that touches every block: stay dense.
#
# **Sources.** Child et al. 2019, *Sparse Transformer* ([1904.10509](https://arxiv.org/abs/1904.10509)), section 4.
# Beltagy et al. 2020, *Longformer* ([2004.05150](https://arxiv.org/abs/2004.05150)), section 3.1. Zaheer et al. 2020,
# *BigBird* ([2007.14062](https://arxiv.org/abs/2007.14062)). Jiang et al. 2023, *Mistral 7B*
# ([2310.06825](https://arxiv.org/abs/2310.06825)), section 2. Xiao et al. 2023, *StreamingLLM*
# ([2309.17453](https://arxiv.org/abs/2309.17453)), section 3. Tang et al. 2024, *Quest*
# ([2406.10774](https://arxiv.org/abs/2406.10774)). Yuan et al. 2025, *Native Sparse Attention*
# ([2502.11089](https://arxiv.org/abs/2502.11089)), section 3. Lu et al. 2025, *MoBA*
# ([2502.13189](https://arxiv.org/abs/2502.13189)). DeepSeek-AI 2025, *DeepSeek-V3.2*
# ([2512.02556](https://arxiv.org/abs/2512.02556)), sparse attention with an indexer. Olsson et al. 2022, *In-context
# Learning and Induction Heads* ([2209.11895](https://arxiv.org/abs/2209.11895)), the needle.
#
# Next: the exercises.
