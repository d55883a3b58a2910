# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 2. Flash attention
# {{colab_badge}}
#
# Attention compares every token with every other. Written in the obvious way, it stores one number
# for each pair, and a prompt of 32,768 tokens makes a billion pairs a head. Flash attention computes
# the same result and never stores them. After this chapter you can write it, say how many bytes it
# moves before you run it, and find the bug in somebody else's.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 20 |
# | 3. What the guide says, measured | 20 |
# | 4. How many bytes move | 15 |
# | 5. The backward pass | 10 |
# | 6. A real model, long text | 20 |
# | 7. The kernel | 20 |
# | 8. Where it loses, and where the time goes | 15 |
# | 9. In production, and what to remember | 5 |
#
# The exercises are in `exercises/2_flash_attention.ipynb`. Do them after section 5, or at the end.

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
# A GPU has two memories. The large one, HBM, holds everything and is slow. The small one, on the
# chip, holds about 200 KB for each multiprocessor and is fast. Naive attention writes all scores to
# HBM, reads them for the softmax, writes the weights, and reads those again. Flash attention keeps
# a tile of scores on chip, uses it, and drops it. To do so it reads the keys and values many times.
#
# One layer of Llama-3-8B reads a prompt of 8,192 tokens: 32 query heads of width 128, float16,
# causal. Lock in your guess. Section 4 counts the answer.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "Tiles of 128 queries. How many times fewer bytes does flash attention move than naive "
    "attention?",
    unit="times",
)
guess

# %% [markdown]
# ## 2. The idea, step by step (20 minutes)
#
# Eight tokens, one head of width 4. Left: flash attention in tiles of 2 queries and 2 keys. Right:
# naive attention, which has only three steps, held back to the same pace. Step through both.

# %%
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.flash_attention import flash_attention, naive_attention
from llmopt_lab.flash_attention.cases import toy
from llmopt_lab.flash_attention.io_model import Sizes, naive_traffic
from llmopt_lab.flash_attention.view import frames, in_step, naive_frames
from llmopt_lab.widgets.player import Player

q, k, v = toy()
with recording() as flash_trace:
    out = flash_attention(q, k, v, causal=True, tile_q=2, tile_k=2)
with recording() as naive_trace:
    naive_attention(q, k, v, causal=True)

moved_by_naive = naive_traffic(Sizes.of(q, k, v, causal=True)).total
flash = frames(flash_trace, naive_nbytes=moved_by_naive)
naive = in_step(naive_frames(naive_trace), len(flash))
Player(flash, naive, labels=("flash", "naive"), title="The same attention, twice")

# %% [markdown]
# *Only the picture answers these:*
# - Which tile makes only one of queries 6 and 7 rescale what it had summed? Which one?
# - How many scores does each side compute and then mask? Which of them does naive also store?
#
# At 8 tokens flash has little to save. Watch the meter *HBM beside Q, K, V, O* instead: it is the
# part that grows with the square of the length on the right, and with the length on the left.
#
# **The running softmax, by hand.** A softmax needs the largest score first, and a tile does not
# know it. So keep three numbers a query: `m`, the largest score so far; `total`, the sum of
# $e^{s-m}$; and `acc`, the sum of $e^{s-m} v$. When `m` grows from $m$ to $m'$, every old term is too
# large by the same factor, so one multiplication by `shrink` $= e^{m-m'}$ repairs all of them.
#
# Here are three tiles of two scores for one query. The largest score comes late.

# %%
from llmopt_lab.flash_attention import SoftmaxState, absorb

scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 2.0]])
values = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
state = SoftmaxState.empty(torch.zeros(1, 1), d_v=1)
for s, x in zip(scores, values, strict=True):
    before = state.m
    state = absorb(state, s[None], x[:, None])
    shrink = float(torch.exp(before - state.m))
    print(f"scores {s.tolist()}: m {state.m.item():.0f}, shrink {shrink:.4f}, "
          f"total {state.total.item():.4f}, acc {state.acc.item():8.4f}")

print(f"acc / total       {(state.acc / state.total[:, None]).item():.6f}")
print(f"softmax at once   {(torch.softmax(scores.flatten(), 0) @ values.flatten()).item():.6f}")

# %% [markdown]
# Check the last line yourself: with $m = 5$ the terms are $e^{-4}, e^{-5}, e^{-5}, e^{-4}, 1, e^{-3}$.
# Had `acc` not been shrunk when the 5 came, the first four values would count 55 times too much.
#
# That is the whole algorithm. For one head, without its `record` lines:

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.flash_attention import reference

source = without_records(inspect.getsource(reference.flash_head))
print(source[source.index("    last = ") :])
print(without_records(inspect.getsource(absorb)))

# %% [markdown]
# Every `load` and `store` is a transfer between HBM and chip. Nothing else touches HBM. Check the
# result against torch's own attention, and the counted bytes against the formula:

# %%
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.memory import Load, Store
from llmopt_lab.flash_attention.io_model import flash_traffic

want = scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], is_causal=True)
counted = flash_trace.total("nbytes", Load, Store)
formula = flash_traffic(Sizes.of(q, k, v, causal=True), tile_q=2, tile_k=2).total
apart = float((out - want[0, 0]).abs().max())
print(f"the largest difference from torch is below 1e-6: {apart < 1e-6}")
print(f"bytes moved: {counted:,}, by the formula: {formula:,}; naive moves {moved_by_naive:,}")

# %% [markdown]
# ## 3. What the guide says, measured (20 minutes)
#
# The written guide that this course grew out of shows both versions. As printed there:

# %%
import torch.nn.functional as F

from llmopt_lab.flash_attention.cases import guides_flash_attention


def standard_attention(Q, K, V):
    # Step 1: Compute S = QK^T
    S = torch.matmul(Q, K.transpose(-2, -1))  # [batch, seq_len, seq_len]
    # Step 2: Softmax
    P = F.softmax(S, dim=-1)  # [batch, seq_len, seq_len]
    # Step 3: Compute output
    O = torch.matmul(P, V)  # [batch, seq_len, d_model]
    return O


source = inspect.getsource(guides_flash_attention)
print(source[source.index("    batch,") :].replace("  # noqa: E741", ""))

# %% [markdown]
# **"67M elements", "2.1B elements = 8.4 GB (just for S!)"** at 8,192 tokens and batch 32. Count them:

# %%
print(f"one S has {8192**2 / 1e6:.1f} million elements, 32 have {32 * 8192**2 / 1e9:.2f} billion")
for dtype in (torch.float32, torch.float16):
    for n_heads in (1, 32):
        s = Sizes(8192, 8192, 64, 64, batch=32, n_heads=n_heads, itemsize=dtype.itemsize)
        print(f"{str(dtype)[6:]}, {n_heads:2} heads: S {s.score_nbytes / 1e9:6.2f} GB, "
              f"S and P {2 * s.score_nbytes / 1e9:6.2f} GB, flash keeps L: {s.lse_nbytes / 1e6:5.1f} MB")

# %% [markdown]
# The elements are right. The bytes are 8.59 GB, or 8.00 GiB: the guide rounded before it multiplied.
# And that is float32 and *one* head. The code above also holds S and P at the same time.
#
# **Is the code right?** Compare the two with each other, and with torch. Both lack the factor
# $1/\sqrt d$, so a third column gives the guide's flash its scale.

# %% tags=["timing", "nbval-ignore-output"]
def relative_error(got, want):
    return float((got - want).norm() / want.norm())


print("     N   guide's two, apart   guide's flash, wrong by   with the scale")
for n in (64, 128, 129, 256, 1024, 4096):
    rng = torch.Generator().manual_seed(n)
    Q, K, V = torch.randn(3, 1, n, 64, generator=rng)
    want = scaled_dot_product_attention(Q, K, V)
    flash_out = guides_flash_attention(Q, K, V)
    apart = relative_error(flash_out, standard_attention(Q, K, V))
    scaled = relative_error(guides_flash_attention(Q / 8, K, V), want)
    print(f"{n:6} {apart:20.1e} {relative_error(flash_out, want):25.2f} {scaled:16.1e}")

# %% [markdown]
# Up to 128 tokens the two agree but for rounding, and both are wrong: agreement of two of your own
# functions proves nothing. From 129 tokens on they do not even agree. With its scale the guide's flash is right
# up to 128, the block size, and at 4,096 almost nothing of the answer is left. Look at its update of `O`: it
# divides by the new total at every block, and never undoes the division of the block before. In exercise 7 you
# write a test that catches it, on inputs whose result you know by hand.
#
# It also walks the *keys* in steps up to the number of *queries*. While decoding there is one query:

# %% tags=["timing", "nbval-ignore-output"]
rng = torch.Generator().manual_seed(1)
Q, (K, V) = torch.randn(1, 1, 64, generator=rng), torch.randn(2, 1, 300, 64, generator=rng)
got = guides_flash_attention(Q / 8, K, V)
for n_keys in (300, 128):
    want = scaled_dot_product_attention(Q, K[:, :n_keys], V[:, :n_keys])
    print(f"one query, 300 keys: {relative_error(got, want):.1e} from attention over {n_keys} keys")

# %% [markdown]
# It saw the first block and stopped, without a word. In half precision, in which models run on a
# GPU, it does not run at all, since it makes its state in float32:

# %%
try:
    guides_flash_attention(*torch.ones(3, 1, 8, 64, dtype=torch.bfloat16))
except RuntimeError as refused:
    print(refused)
rng = torch.manual_seed(0)  # of the inputs that the next cell draws

# %% [markdown]
# **"Memory: 8.4 GB to 0.5 GB (16x reduction!)" and "Time: 100ms to 25ms (4x faster!)".** No device,
# no width, no number of heads: nobody can check that. Here are both functions, one head of width 64
# in float32, with the most memory each holds at once, as torch's allocator reports it:

# %% id="takeaway" tags=["timing", "nbval-ignore-output"]
from llmopt_lab.flash_attention.cases import cost_of

print("     N   standard MiB   guide's flash MiB   ratio   standard ms   guide's flash ms   ratio")
for n in (512, 1024, 2048, 4096, 8192):
    Q, K, V = torch.randn(3, 1, n, 64)
    cost_of(lambda: guides_flash_attention(Q[:, :256], K[:, :256], V[:, :256]))  # warm up
    a = cost_of(lambda: standard_attention(Q, K, V))
    b = cost_of(lambda: guides_flash_attention(Q, K, V))
    mib, ms = (a.peak_nbytes / 2**20, b.peak_nbytes / 2**20), (1000 * a.seconds, 1000 * b.seconds)
    print(f"{n:6} {mib[0]:14.1f} {mib[1]:19.1f} {mib[0] / mib[1]:7.1f} "
          f"{ms[0]:13.1f} {ms[1]:18.1f} {ms[0] / ms[1]:7.1f}")

# %% [markdown]
# The memory ratio is no constant. It doubles with N, so "16x" is true at one length, and that is
# not 8,192. And 0.5 GB? The last row, for a batch of 32:

# %%
print(f"standard, S, P and the rest: {32 * a.peak_nbytes / 1e9:5.2f} GB")
print(f"guide's flash:               {32 * b.peak_nbytes / 1e9:5.2f} GB")

# %% [markdown]
# So 0.5 GB is about what the guide's own function holds: a block of scores of *all* queries. What you
# must hold is far less, L: 1.0 MB, as counted above.
#
# The times: on this CPU the guide's version takes longer up to 1,024 tokens, and at best it is 1.3 times
# as fast. Section 8 says where the time goes. And on a GPU? Recorded on an H200: 2 heads of width 64,
# bf16, no mask. `naive` is the standard version in three operators, `ours` the kernel of section 7.

# %%
from llmopt_lab.core.bench import load_results

h200 = load_results("flash_attention")[-1]
memory_case = next(case for case in h200["cases"] if "memory" in case["title"])
print("      N   naive ms   ours ms   naive / ours   naive / FlashAttention-2   FlashAttention-2 / ours")
for row in memory_case["rows"]:
    ms = {name: result["median_ms"] for name, result in row["results"].items()}
    slow, ours, peer = ms["naive"], ms["ours"], ms["SDPA, FlashAttention-2"]
    print(f"{row['size']['n']:7,} {slow:10.3f} {ours:9.3f} {slow / ours:14.2f} "
          f"{slow / peer:26.2f} {peer / ours:25.2f}")

# %% [markdown]
# "4x faster" is a matter of the length, too. At 1,024 tokens our kernel gains nothing over naive
# attention, at 131,072 it is 7.72 times as fast. Torch's FlashAttention-2 gains less at the long end
# and more at the short one. The guide's own length, 8,192, is not in the record.
#
# **"O(seq_len) instead of O(seq_len²)."** So far nothing was trained. Count what autograd keeps for
# the backward pass:

# %%
from llmopt_lab.flash_attention.io_model import saved_nbytes


def on_one_head(attend):
    """`attend` for (batch, heads, n, d), called with (1, n, d)."""
    return lambda *qkv: attend(*(x[None] for x in qkv))


variants = {
    "standard": standard_attention,
    "guide's flash": guides_flash_attention,
    "ours": lambda *qkv: flash_attention(*qkv, tile_q=256, tile_k=256),
    "torch": on_one_head(scaled_dot_product_attention),
}
print("     N   " + "".join(f"{name:>15}" for name in variants))
for n in (1024, 2048, 4096):
    rng = torch.Generator().manual_seed(n)
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, n, 64, generator=rng)]
    kept = [saved_nbytes(lambda f=f: f(*qkv)) / 2**20 for f in variants.values()]
    print(f"{n:6}   " + "".join(f"{mib:11.1f} MiB" for mib in kept))

# %% [markdown]
# The guide's memory saver keeps *twice* as much as the standard version: every $P_{ij}$, and for every
# block two tensors of the size of `O`: the old `O`, and the sum before it is divided. Section 5 shows
# what the real one keeps.
#
# **"Automatically uses Flash Attention if available. Or explicitly: `is_causal=True`".** Torch has had
# this function since version 2.0. The guide shows it with `attn_mask`, `is_causal` and `scale`. What
# does each of them do? A decoder wants causal attention with the usual scale:

# %%
q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(2))
causal = scaled_dot_product_attention(q, k, v, is_causal=True)
may_see = torch.ones(300, 300, dtype=torch.bool).tril()  # (queries, keys): True where one may look
for arguments in (
    {},
    {"attn_mask": None, "is_causal": True, "scale": None},
    {"attn_mask": may_see},
    {"is_causal": True, "scale": 1 / 8},
    {"is_causal": True, "scale": 1.0},
):
    shown = ", ".join(f"{x}={'may_see' if y is may_see else y}" for x, y in arguments.items())
    off = relative_error(scaled_dot_product_attention(q, k, v, **arguments), causal)
    print(f"{shown or 'nothing':41} {off:4.0%} from what a decoder needs")

# %% [markdown]
# The plain call is wrong for a decoder: it sees the future. `scale=None` is $1/\sqrt d$. None of the three
# chooses a kernel. Torch does, from the device, the dtype, the shapes and the arguments. Which one ran?
# Listen to the operators that it calls, or allow one kernel only with `sdpa_kernel`:

# %%
import warnings

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Collects the names of the operators that torch runs inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.__name__.split(".")[0])
        return operator(*args, **(kwargs or {}))


for dims, (x, y, z) in {"four": (q, k, v), "three": (q[0], k[0], v[0])}.items():
    with Operators() as ran:
        scaled_dot_product_attention(x, y, z, is_causal=True)
    kernels = [name for name in ran.names if "attention" in name or "softmax" in name or "bmm" in name]
    print(f"{dims} dimensions: {', '.join(kernels)}")

with warnings.catch_warnings(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    warnings.simplefilter("ignore")
    scaled_dot_product_attention(q, k, v, is_causal=True)  # this is how you choose
    try:
        scaled_dot_product_attention(q[0], k[0], v[0])  # three dimensions, as the guide has them
    except RuntimeError as refused:
        print("flash only, three dimensions:", refused)

decode = scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)
print(f"one query, 300 keys, is_causal=True: {(decode - v[:, :, :1]).abs().max():.0f} from value 0")

# %% [markdown]
# In three dimensions, as the guide has them everywhere, "automatically" means three separate operators
# and the whole S. If you allow flash only, torch raises instead. On a GPU the flash kernel takes no
# `attn_mask` either: say `is_causal`, or another kernel runs.
#
# With one query and 300 keys torch aligns the mask of `is_causal` at the *top left*, so the newest
# token sees only the oldest. FlashAttention since 2.1, and this course, align at the bottom right: the
# last query sees every key.
#
# | the guide says | measured |
# |---|---|
# | 67M and 2.1B elements | right: 67.1 million, 2.15 billion |
# | 8.4 GB just for S | 8.59 GB, for one head in float32; S and P together twice that |
# | its two versions agree | up to 128 tokens, and both are wrong: no $1/\sqrt d$; at 4,096 they are 0.70 apart |
# | its flash is exact | with $1/\sqrt d$ up to one block; at 4,096 tokens the error is 0.98 of the answer |
# | 0.5 GB, 16x less memory at 8,192 | 0.61 GB and 28.4 times, for 32 times one head of width 64; the ratio doubles with N |
# | 4x faster | here 0.3 to 1.3 times as fast; on an H200 ours: 1.02 times at 1,024 tokens, 7.72 at 131,072 |
# | O(N) memory | forward only: for training it keeps twice what the standard version keeps |
# | works for 32K+ tokens | ours and torch's do: section 6. The guide's code was run up to 8,192 |
# | `is_causal=True` selects flash | it selects a mask, and without it a decoder is wrong |

# %% [markdown]
# ## 4. How many bytes move (15 minutes)
#
# Count, for one head of $N$ tokens and width $d$. Naive attention writes and reads S and P: $4N^2$
# numbers, whatever the tile. Flash attention reads all keys and values once a tile of queries:
# $2 N^2 d\,/\,$`tile_q`. A causal mask halves that, since later tiles are skipped, and saves naive
# attention nothing. So the ratio is $4\,$`tile_q`$\,/\,d$ with a mask. **N is not in it.**

# %%
llama = Sizes(8192, 8192, 128, 128, causal=True, itemsize=2, n_heads=32, n_kv_heads=8)
a, b = naive_traffic(llama), flash_traffic(llama, tile_q=128, tile_k=128)
print(f"naive {a.total / 1e9:.2f} GB, flash {b.total / 1e9:.2f} GB: {a.total / b.total:.2f} times")
guess.reveal(round(a.total / b.total, 1))

# %% [markdown]
# The saving in memory *held* grows with N; the saving in bytes *moved* is a fixed factor. To move less,
# hold more queries on chip. What fits is a matter of bytes: the queries, one tile of keys and of values, the
# scores between them, and `m`, `total` and `acc`. Below, each frame is one `tile_k`, and `tile_q`
# is the largest that fits beside it.

# %%
from llmopt_lab.core.errors import BadInput
from llmopt_lab.flash_attention.io_model import key_outer_traffic, largest_tile_q
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Bar, Bars, Frame


def on_chip(n_tokens, d_head, budget):
    """Bytes moved by three algorithms, a frame a tile of keys, with what is left for queries."""
    s = Sizes(n_tokens, n_tokens, d_head, d_head, causal=True, itemsize=2)
    made = []
    for tile_k in (16, 32, 64, 128):
        try:
            tile_q = min(n_tokens, largest_tile_q(s, budget=1024 * budget, tile_k=tile_k))
        except BadInput:
            if not made:
                raise
            break
        tiles = {"tile_q": tile_q, "tile_k": tile_k}
        moved = {
            "naive": naive_traffic(s).total,
            "keys outside": key_outer_traffic(s, **tiles).total,
            "queries outside": flash_traffic(s, **tiles).total,
        }
        ratio = moved["naive"] / moved["queries outside"]
        tones = ("bad", "idle", "good")
        bars = tuple(Bar(n, b / 1e6, t) for (n, b), t in zip(moved.items(), tones, strict=True))
        caption = (
            f"{tile_k} keys leave room for {tile_q} queries in {budget} KiB. Naive moves "
            f"{ratio:.1f} times what flash attention (queries outside) moves."
        )
        legend = (("bad", "stores scores"), ("idle", "first paper"), ("good", "second paper"))
        made.append(Frame(caption, (Bars("moved for one head", bars, "MB"),), legend=legend))
    return Player(made)


Explore(
    on_chip,
    n_tokens=Choice("tokens", (512, 2048, 8192, 32768), 8192),
    d_head=Choice("width of a head", (32, 64, 128, 256), 128),
    budget=Choice("KiB on chip", (32, 64, 128, 228), 128),
)

# %% [markdown]
# *Only the picture answers these:*
# - Which `tile_k` moves fewest bytes, and what does it take away from?
# - Halve the width. By what factor does the green bar fall, and why by more than 2?
# - The first paper had the loops the other way round, keys outside. Where does it move more than naive?
#
# The second answer is the paper's Theorem 2: $\Theta(N^2 d^2 / M)$ with $M$ on chip. Real kernels do
# not take the smallest `tile_k`, since every tile rescales `acc` once: the plans of section 7 take 128.

# %% [markdown]
# ## 5. The backward pass (10 minutes)
#
# Gradients need P. Naive attention has kept it. Flash attention makes it again, tile by tile. All
# it needs is one number a query, $L = m + \log(\mathrm{total})$: then $P = e^{S - L}$, with no running
# maximum at all. Look at what is kept, tensor by tensor:

# %%
n, d = 256, 64
qkv = [x.requires_grad_() for x in torch.randn(3, n, d, generator=torch.Generator().manual_seed(3))]


def kept_by(attend):
    """Shapes that autograd keeps, in order."""
    shapes = []

    def pack(x):
        shapes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(*qkv)
    return shapes


print("standard:     ", kept_by(standard_attention))
print("guide's flash:", kept_by(lambda *x: guides_flash_attention(*(t[None] for t in x))))
print("ours:         ", kept_by(lambda *x: flash_attention(*x, tile_q=64, tile_k=64)))

# %% [markdown]
# Ours keeps q, k, v, the result and L. The rest is five lines of calculus. With $D$ the row sums of
# $dO \circ O$: $dV = P^T dO$, $dP = dO\,V^T$, $dS = P \circ (dP - D)$, $dQ = dS\,K/\sqrt d$,
# $dK = dS^T Q/\sqrt d$. Is it right, and how often is a tile of P made again?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.flash_attention.records import Absorbed, Recomputed

grads = {}
for name, attend in (("torch", scaled_dot_product_attention), ("ours", flash_attention)):
    inputs = [x.detach().double().requires_grad_() for x in qkv]
    with recording(Absorbed, Recomputed) as trace:
        if name == "torch":
            out = attend(*inputs)
        else:
            out = attend(*inputs, tile_q=64, tile_k=64)
        grads[name] = torch.autograd.grad(out.square().sum(), inputs)
worst = max((a - b).abs().max() for a, b in zip(*grads.values(), strict=True))
print(f"largest difference of a gradient from torch's: {worst:.0e}")
print(f"tiles in the forward pass: {len(trace.of(Absorbed))}, made again: {len(trace.of(Recomputed))}")

# %% [markdown]
# Twice: once for dK and dV, where a tile of keys stays on chip, and once for dQ, where a tile of
# queries does. That is 7 products a tile where keeping P needs 4. It pays because products are cheap
# on a GPU and bytes are not. (FlashAttention-2 walks once, 5 products, and adds to dQ with atomics;
# ours gives the same bits at every run.)

# %% [markdown]
# ## 6. A real model, long text (20 minutes)
#
# `lab-target` is a small Llama that comes with the course and completes Python code. For
# SmolLM2-135M change one line, `MODEL = "smollm2-135m"`, or wait for its record below. The text is
# Python source that the lab models were not trained on.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.device import pick_device
from llmopt_lab.flash_attention.cases import long_text
from llmopt_lab.nn.weights import load

MODEL = "lab-target"

lm = load(MODEL, device=pick_device())
text = lm.encode(long_text())
config = lm.config
print(f"{MODEL}: {config.n_layers} layers, {config.n_heads} query heads and {config.n_kv_heads} "
      f"KV heads of width {config.d_head}; {len(text):,} tokens of text")

# %% [markdown]
# A model takes its attention as an argument. Give it four, and see how well it predicts 768 tokens
# of the text. `flash_attend` runs the kernel of section 7 if you have a GPU. Without one it *is*
# `causal_attention`, torch's, so that its line then repeats the first.

# %%
from llmopt_lab.flash_attention.attend import flash_attend
from llmopt_lab.nn.transformer import causal_attention

passage = text[None, 9000:9769]


def tiled(q, k, v, *, layer, scale):
    return flash_attention(q, k, v, causal=True, scale=scale, tile_q=128, tile_k=128)


def stored(q, k, v, *, layer, scale):
    return naive_attention(q, k, v, causal=True, scale=scale)


with torch.no_grad():
    for name, attend in {
        "torch's": causal_attention, "naive": stored, "flash": tiled, "flash_attend": flash_attend
    }.items():
        logits = lm.model(passage[:, :-1], attend=attend)[0]
        print(f"{name:13} {F.cross_entropy(logits, passage[0, 1:]):.3f} nats a token")

# %% [markdown]
# A fifth puts the guide's code (with the scale it lacks) into the last layer only. Ask it only for the
# last token: that one may see everything, so the missing mask does not matter.

# %%
def guides_last(q, k, v, *, layer, scale):
    """The guide's code in the last layer, torch's below."""
    if layer < config.n_layers - 1:
        return causal_attention(q, k, v, layer=layer, scale=scale)
    k, v = (x[0].repeat_interleave(config.n_heads // config.n_kv_heads, dim=0) for x in (k, v))
    return guides_flash_attention(scale * q[0].cpu(), k.cpu(), v.cpu())[None].to(q)


def what_next(n_tokens, attend):
    with torch.no_grad():
        logits = lm.model(text[None, 9500 - n_tokens : 9500], attend=attend, last_only=True)
    return logits[0, -1].softmax(-1)


for n_tokens in (100, 128, 200, 500, 1000):
    right, wrong = (what_next(n_tokens, f) for f in (causal_attention, guides_last))
    moved = (right - wrong).abs().sum() / 2
    print(f"after {n_tokens:4} tokens: {moved:4.0%} of the next token's probability has moved")

# %% [markdown]
# A wrong kernel in one layer, and the model still speaks. Nothing crashes, no test on short
# prompts fails. This is how such a bug ships.
#
# **One head at work.** The picture takes 96 tokens of the text, in tiles. A frame is a tile; only 2
# of the values' columns are carried along, so that it fits the page. Try the heads of the first and
# of the last layer.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.flash_attention.cases import layer_inputs


def head_at_work(layer, head, tile):
    q, k, v = (x.cpu() for x in layer_inputs(lm.model, text[9000:9096], layer=layer))
    kv = head // (config.n_heads // config.n_kv_heads)
    with recording() as trace:
        flash_attention(q[head], k[kv], v[kv, :, :2], causal=True, tile_q=tile, tile_k=tile)
    return Player(frames(trace))


Explore(
    head_at_work,
    layer=Choice("layer", tuple(range(config.n_layers)), 0),
    head=Choice("query head", tuple(range(config.n_heads)), 0),
    tile=Choice("tile", (8, 16, 24, 32), 16),
)

# %% [markdown]
# *Only the picture answers this:* in which tiles do the queries of the last row rescale? If the
# largest score sits in the first tile, flash attention never rescales that row again. Find a head where
# it does, and one where the diagonal always wins.
#
# **Memory and time against N.** One query head of the third layer reads the text: 512 to 32,768
# tokens. The model knows only so many positions, so it reads the text in windows of 1,024, each from
# position 0, and the layer's queries, keys and values are joined. They are real, if not those of one
# 32k context. Naive attention is run while S and P alone stay under 300 MiB; beyond, their bytes stand in
# brackets, computed. That is less than it would hold, see the cell below. The guide's code stops at 8,192, for
# time. Our reference takes tiles of 512 here: it is Python, and few large steps suit it.

# %% tags=["timing", "nbval-ignore-output"]
q, k, v = layer_inputs(lm.model, text[:32768], layer=min(2, config.n_layers - 1))
q, k, v = (x[0].cpu() for x in (q, k, v))
scale = config.d_head**-0.5
runs = {
    "naive": lambda q, k, v: naive_attention(q, k, v, causal=True),
    "guide's flash": lambda q, k, v: guides_flash_attention(scale * q[None], k[None], v[None]),
    "ours": lambda q, k, v: flash_attention(q, k, v, causal=True, tile_q=512, tile_k=512),
    "torch": lambda *x: scaled_dot_product_attention(*(t[None, None] for t in x), is_causal=True),
}
sizes, costs = (512, 1024, 2048, 4096, 8192, 16384, 32768), {}
for n in sizes:
    x = [t[:n] for t in (q, k, v)]
    for name, attend in runs.items():
        if (name == "naive" and 8 * n * n > 300 * 2**20) or (name == "guide's flash" and n > 8192):
            continue
        costs[n, name] = min(cost_of(lambda: attend(*x)) for _ in range(3 if n <= 2048 else 1))

print(f"{'N':>6}" + "".join(f"{name:>24}" for name in runs))
for n in sizes:
    cells = []
    for name in runs:
        if cost := costs.get((n, name)):
            cells.append(f"{1000 * cost.seconds:7.0f} ms {cost.peak_nbytes / 2**20:6.1f} MiB")
        else:
            cells.append(f"({8 * n * n / 2**20:,.0f} MiB)" if name == "naive" else "not run")
    print(f"{n:6}" + "".join(f"{cell:>24}" for cell in cells))

# %%
from llmopt_lab.flash_attention.io_model import tile_counts

print("     N   S and P alone   naive at its peak   tiles ours computes   and skips")
for n in sizes:
    computed, skipped = tile_counts(Sizes(n, n, 64, 64, causal=True), tile_q=512, tile_k=512)
    print(f"{n:6,} {8 * n * n / 2**20:11,.1f} MiB {17 * n * n / 2**20:15,.1f} MiB {computed:21,} {skipped:11,}")

# %% [markdown]
# At its peak `naive_attention` holds four matrices of N x N floats and one of bools: $17 N^2$ bytes, 272 MiB
# at 4,096 tokens, where the table says 273.1. At 8,192 it would hold 1,088 MiB.

# %% tags=["timing", "nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(8, 3.2))
for name, style in zip(runs, ("o-", "s--", "^-", "x:"), strict=True):
    ns = [n for n in sizes if (n, name) in costs]
    panels[0].loglog(ns, [costs[n, name].peak_nbytes / 2**20 for n in ns], style, label=name)
    panels[1].loglog(ns, [1000 * costs[n, name].seconds for n in ns], style, label=name)
panels[0].set(xlabel="tokens", ylabel="MiB held at once", title="memory")
panels[1].set(xlabel="tokens", ylabel="ms", title="time")
panels[0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* one line on the left doubles its slope against the others.
# Which lines do so on the right? Flash attention holds less by the square. Work it saves only where
# the mask lets it skip tiles: 2,016 of 4,096 at 32,768 tokens. Naive attention multiplies them all.
#
# **SmolLM2-135M** on the same text. It is larger than what this notebook should load, so here is a record, of two
# cores, by `python -m llmopt_lab.flash_attention.measure`: the same three questions.

# %%
import json
from pathlib import Path

smol = json.loads((Path(reference.__file__).parent / "results/measured.json").read_text())
print(f"{smol['model']}, {smol['n_predicted']} tokens, nats a token: "
      + ", ".join(f"{name} {nats:.4f}" for name, nats in smol["nats"].items()))
print("the guide's code in the last layer moves, of the next token's probability: "
      + ", ".join(f"{moved:.0%} after {n}" for n, moved in smol["moved"].items()))
rows = {(row["n"], row["name"]): row for row in smol["costs"]}
print(f"\n{'N':>6}" + "".join(f"{name:>24}" for name in runs))
for n in sizes:
    cells = []
    for name in runs:
        row = rows.get((n, name))
        cells.append(f"{row['ms']:7.0f} ms {row['peak_bytes'] / 2**20:6.1f} MiB" if row else "not run")
    print(f"{n:6}" + "".join(f"{cell:>24}" for cell in cells))

# %% [markdown]
# The three attentions predict the text equally well. The guide's code is right up to 128 tokens, one block, and wrong
# after it. And from 1,024 tokens on, for each doubling of the text naive attention holds four times as much, the others
# twice at most.
#
# **Grouped heads and packed sequences.** `lab-target` has 3 query heads to a KV head. The model's
# keys and values are never repeated: query head `h` reads KV head `h // 3`. And prompts of different
# lengths need no padding: pack them end to end and say where each starts.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.flash_attention import flash_attention_varlen

q, k, v = (x.cpu() for x in layer_inputs(lm.model, text[:170], layer=1))
cu_seqlens = torch.tensor([0, 40, 41, 170], dtype=torch.int32)
packed = flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
for first, end in cu_seqlens.unfold(0, 2, 1).tolist():
    one = [x[:, first:end] for x in (q, k, v)]
    alone = scaled_dot_product_attention(*(x[None] for x in one), is_causal=True, enable_gqa=True)[0]
    print(f"sequence of {end - first:3}: {(packed[:, first:end] - alone).abs().max():.0e} from torch's")
lengths = torch.tensor([40, 1, 129])
print(f"scores: packed {int((lengths**2).sum()):,}, padded {3 * 129**2:,}")

# %% [markdown]
# ## 7. The kernel (20 minutes)
#
# One program takes a tile of queries of one head and walks the keys. Compare this loop with the
# reference: the names are the same.

# %%
try:
    from llmopt_lab.flash_attention import kernels

    source = inspect.getsource(kernels._absorb.fn)
    print(source[source.index("    for first") :])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Four things to see in it:
# - **Base 2.** $e^x = 2^{x \log_2 e}$, the GPU has an instruction for $2^x$, and the factor goes into the
#   scale, which is multiplied in anyway.
# - **Two calls of one loop.** Keys that every row of the tile sees need no mask (`MASKED` false); the
#   tiles on the diagonal and the ragged tail do. Later tiles are skipped: the loop ends before them.
# - **`base`**, not `m_new`, where a row has seen no key yet: $-\infty - (-\infty)$ is NaN.
# - **`p.to(v.dtype)`**: products take 16-bit inputs and add in float32. `m`, `total` and `acc` are float32.
#
# Here it runs: compiled if you have a GPU, else in Triton's interpreter, which is slow and right.
# Ragged lengths, grouped heads, forward and backward:

# %%
try:
    from llmopt_lab.flash_attention.cases import attention_inputs, attention_oracle
    from llmopt_lab.flash_attention.kernels import flash_attention_triton

    ragged = Sizes(37, 53, 24, 24, causal=True, n_heads=4, n_kv_heads=2)
    inputs = attention_inputs(ragged, dtype=torch.float32, device=pick_device())
    grads = []
    for attend in (flash_attention_triton, attention_oracle):
        x = [t.clone().requires_grad_() for t in inputs]
        out = attend(*x, causal=True)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), x)])
    for name, got, want in zip(("out", "dQ", "dK", "dV"), *grads, strict=True):
        error = relative_error(got.double(), want)  # products in tf32 would miss 1e-4
        print(f"{name:3} {tuple(got.shape)}: {'right' if error < 1e-4 else f'WRONG by {error:.0e}'}")
except ImportError as missing:
    print(missing)

# %% [markdown]
# **From there to Hopper.** On an H100 that kernel leaves the tensor cores idle while the softmax
# runs. How long is that? For one tile of 64 queries and 128 keys of width 128, per multiprocessor
# and cycle: 4,096 operations of the tensor cores (16-bit), 16 exponentials of the special function units.

# %%
matmul = 2 * (2 * 64 * 128 * 128) / 4096
exponentials = 64 * 128 / 16
print(f"both products: {matmul:.0f} cycles; exponentials alone: {exponentials:.0f} cycles")
print(f"one after the other, the tensor cores rest {exponentials / (matmul + exponentials):.0%} of the time")

# %% [markdown]
# `llmopt_lab/flash_attention/hopper.py` is the same algorithm in Gluon, Triton's lower-level sister,
# with FlashAttention-3's steps. The ladder, one step at a time:
#
# | step | what changes | what stood still before |
# |---|---|---|
# | Triton, pointers | the loop above; threads copy the tiles themselves | |
# | + async TMA | a hardware unit copies whole tiles, and says when they are there | threads, computing addresses |
# | + warp specialisation | one warp only asks for tiles (`_produce`); warpgroups of 64 rows only compute (`_consume`) | computing warps, waiting for keys |
# | + overlap | the scores of the next tile are multiplied *while* the softmax of this one runs (`_step`) | tensor cores, during one group's softmax |
# | + ping-pong | the warpgroups take turns, so that one's softmax lies behind another's products | tensor cores, when all groups exponentiate at once |
# | + persistence | one program a multiprocessor fetches work until none is left | multiprocessors, at the start and end of programs |
#
# Overlap in one look. `pending` and `pending_out` are products that were started and not waited for;
# `_absorb` is the softmax:

# %%
try:
    from llmopt_lab.flash_attention import hopper

    source = inspect.getsource(hopper._step.fn)
    first = source.index("    pending = warpgroup_mma(")
    print(source[first : source.index("    acc = acc * ", first)])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Recorded on an H200, which is an H100 with faster memory: 16k tokens in all, a width of 2,048,
# multi-head, bf16. Every contender was first checked against an oracle in float64, then timed in the
# same run. *As shipped* is what you get: on this width the plan leaves ping-pong out (`turns=False` in
# `hopper.PLANS`), on width 64 it leaves persistence out. Before you look: which step buys most?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, measure_roofline, run_room

*earlier, recorded = load_results("flash_attention")
cases = {case["title"]: case["rows"] for case in recorded["cases"]}
ladder = cases["forward, from Triton to Hopper step by step"]
steps = list(ladder[0]["results"])
figure, axes = plt.subplots(figsize=(8.5, 3.4))
for row, marker in zip(ladder, "os^v", strict=True):
    size = row["size"]
    rates = [row["results"][step]["tflop_s"] for step in steps]
    label = f"{size['n']:,} tokens, {'causal' if size['causal'] else 'full'}"
    axes.plot(rates, marker=marker, label=label)
axes.set_xticks(range(len(steps)), steps, fontsize=7)
axes.set(ylabel="TFLOP/s", ylim=(300, 650), title=f"{recorded['hardware']['name']}, forward, d = 128")
axes.legend(fontsize=7, loc="lower right")
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* after which step are all four lines nearly flat? The differences that are
# left are small. Are they larger than the spread of the samples?

# %%
def against(row, step, other):
    """Change of the time from `other` to `step`, in %, with a ~ if their spreads (p20..p80) overlap."""
    new, old = row["results"][step], row["results"][other]
    apart = new["p80_ms"] < old["p20_ms"] or old["p80_ms"] < new["p20_ms"]
    return f"{100 * (new['median_ms'] / old['median_ms'] - 1):+.1f} %{' ' if apart else ' ~'}"


pairs = list(zip(steps[1:], steps[:-1], strict=True)) + [("as shipped", "+ warp specialisation")]
print(f"{'time against the step before':45}" + "".join(
    f"{row['size']['n']:>8,} {'causal' if row['size']['causal'] else 'full':6}" for row in ladder))
for step, other in pairs:
    print(f"{step + ' against ' + other:45}" + "".join(f"{against(row, step, other):>15}" for row in ladder))

# %% [markdown]
# TMA and warp specialisation pay in every row, beyond the spread. From overlap on, a step differs from
# the one before it by more than the spread in one of sixteen places. All of them together do: the shipped
# kernel takes 2.3 to 6.2 % less time than the one with warp specialisation alone. One step at a time, this
# record cannot tell you which of them is worth its code.
#
# Beside the peers: how many times as fast ours is, from its worst size to its best. Below 1 we lose.
# The last rows are those of section 3: 2 heads, no mask, 1,024 to 131,072 tokens.
# The H100's record is of an earlier commit: its Hopper kernel still added up each row's total among
# four threads at every key tile.

# %%
for record in (*earlier, recorded):
    print(f"{record['hardware']['name']}, commit {record['commit'][:8]}")
    for case in record["cases"]:
        if case is record["cases"][2]:  # the ladder
            continue
        kind = "2 heads" if "memory" in case["title"] else case["title"]
        for d_head in (64, 128):
            rows = [row["results"] for row in case["rows"] if row["size"]["d_head"] == d_head]
            for peer in rows[0] if rows else ():
                timed = [row for row in rows if not peer.startswith("ours") and "median_ms" in row[peer]]
                ratios = [row["ours"]["tflop_s"] / row[peer]["tflop_s"] for row in timed]
                if ratios:
                    print(f"  {kind:8} d {d_head:3}: {min(ratios):.2f} to {max(ratios):.2f} of {peer}")

# %% [markdown]
# The worst row against FlashAttention-2 is the shortest of 2 heads: 0.61 times as fast at 1,024 tokens on the
# H200, and 0.73 at 4,096 (section 3). At 192 queries a program, 1,024 tokens of 2 heads make 12 programs, too
# few for 132 multiprocessors. Torch's call holds 2.4 MB there and ours 0.3: that fits a split of the keys, as
# in section 8, which ours has not.
#
# Against cuDNN, forward at width 128, two rows are a draw: 8,192 and 16,384 tokens without a mask differ by
# less than the spread of either, and a run of an earlier commit (08baba6) had 0.98 for the second. At width 64
# and 4,096 tokens cuDNN is faster. Its backward pass is faster in every row, and FlashAttention-3 forward.
#
# The whole table, losses included. *extra MB* is what a call allocates. `ours` and the peers make their
# result there, 67.1 MB in the first row; `ours in Triton` and the ladder write into one made before:

# %%
print(format_results(recorded))
rng = torch.manual_seed(0)  # of the inputs that section 8 draws

# %% [markdown]
# With a GPU, the next cell times the rows of 4,096 tokens here; without one it says so. All rows take
# some minutes: `llmopt bench flash_attention` in a terminal. Colab's T4 (sm_75) has no bf16 in its tensor
# cores, and Triton uses none of them there: our kernels compile, with the tiles of float32, and are slow.
# The steps of the ladder need sm_90, and torch's flash kernel sm_80; the table says which rows are absent.

# %% tags=["timing", "nbval-ignore-output"]
if pick_device().type == "cuda":
    short = run_room("flash_attention", where=lambda title, size: "memory" not in title and size["n"] == 4096)
    print(format_results(short))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 8. Where it loses, and where the time goes (15 minutes)
#
# **This CPU.** In section 3 the guide's version was at most 1.3 times as fast as the standard one. In
# section 6 ours took 12 ms where naive took 17 at 2,048 tokens, and torch 6; at 4,096 they took 41 and 22, and
# naive 307. Per byte that naive attention moves it computes $d / 4$ operations in float32 ($4 N^2 d$ over
# $16 N^2$), and $d / 2$ in 16 bits. Compare with what a machine can compute per byte that it reads. Both
# columns are measured, the H100's by the recording of chapter 1.

# %% tags=["timing", "nbval-ignore-output"]
here = measure_roofline(torch.device("cpu"))
h100 = load_results("paged_attention")[0]["roofline"]
machines = {
    "this CPU, float32": (here.read_gb_s, here.matmul_tflop_s, 64 / 4),
    "H100, bfloat16": (h100["read_gb_s"], h100["matmul_tflop_s"], 64 / 2),
}
for name, (gb_s, tflop_s, naive_does) in machines.items():
    can = 1000 * tflop_s / gb_s
    limit = "memory" if naive_does < can else "arithmetic"
    print(f"{name:18} {gb_s:6,.0f} GB/s, {tflop_s:6.2f} TFLOP/s: {can:4.0f} operations a byte; naive "
          f"attention does {naive_does:.0f}: limited by {limit}")

# %% [markdown]
# By this count memory is the limit on the H100, by far: moving fewer bytes is everything. On this CPU it is
# the arithmetic, of which flash attention saves none without a mask. So a naive version that moved no byte
# too many should be hard to beat here. Is it? Where does the time go?

# %% tags=["timing", "nbval-ignore-output"]
n = 2048
q, k, v = torch.randn(3, n, 64)
s, p = q @ k.T, torch.softmax(q @ k.T, 1)
torchs = on_one_head(on_one_head(scaled_dot_product_attention))
steps = {
    "Q K^T": lambda: q @ k.T,
    "softmax": lambda: torch.softmax(s, 1),
    "P V": lambda: p @ v,
    "naive, not causal": lambda: naive_attention(q, k, v),
    "ours, not causal": lambda: flash_attention(q, k, v, tile_q=512, tile_k=512),
    "ours, tiles of 64": lambda: flash_attention(q, k, v, tile_q=64, tile_k=64),
    "torch, not causal": lambda: torchs(q, k, v),
}
for name, step in steps.items():
    print(f"{name:18} {1000 * min(cost_of(step).seconds for _ in range(3)):7.1f} ms")

# %% [markdown]
# Our reference pays Python for each tile, so small tiles are slow: it is there to be read. The first three
# lines add up to 16.4 ms. That is a careful naive version, and torch's fused, tiled and compiled kernel
# takes 12.7: not writing the scores gains that little here. But `naive_attention` takes 32.4. The other half
# of its time are copies of S and P to the memory that it is told to use. So bytes do cost time on this
# CPU, when somebody moves them for nothing.
#
# And section 6? From 2,048 to 4,096 tokens naive attention goes from 17 to 307 ms there, where $N^2$ explains
# a factor of 4. The 307 is one call and not the best of three, so do not build on it. But large matrices
# cost something that no count of operations shows: the system hands out new memory for them at every call,
# and each new page is a fault. Flash attention uses its small tiles again:

# %% tags=["timing", "nbval-ignore-output"]
try:
    import resource  # Windows has none
except ImportError as missing:
    print(missing)
else:

    def page_faults(call):
        """Of the cheapest of five calls."""
        counts = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call()
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return min(counts)

    for n in (1024, 4096):
        q, k, v = torch.randn(3, n, 64, generator=torch.Generator().manual_seed(n))
        by_naive = page_faults(lambda: naive_attention(q, k, v, causal=True))
        by_ours = page_faults(lambda: flash_attention(q, k, v, causal=True, tile_q=512, tile_k=512))
        print(f"{n:5,} tokens, page faults a call: naive {by_naive:6,}, ours {by_ours:,}")

# %% [markdown]
# **Short sequences, wide heads.** The ratio was $2\,$`tile_q`$\,/\,d$ without a mask. Below 1, flash attention
# moves *more*. Find it: make heads wide and tiles small.

# %%
def break_even(d_head, tile_q):
    """Bytes of naive and flash attention against N, without a mask."""
    made = []
    for n in (16, 64, 256, 1024, 4096):
        s = Sizes(n, n, d_head, d_head, itemsize=2)
        a, b = naive_traffic(s).total, flash_traffic(s, tile_q=tile_q, tile_k=64).total
        bars = Bar("naive", a / 1e3, "idle"), Bar("flash", b / 1e3, "bad" if b > a else "good")
        verdict = "Flash loses." if b > a else "Flash wins."
        made.append(
            Frame(
                f"{n} tokens of width {d_head}, {tile_q} queries a tile: naive moves {a / b:.2f} "
                f"times what flash moves. {verdict}",
                (Bars("moved for one head", bars, "kB"),),
                legend=(("idle", "naive"), ("good", "flash, fewer"), ("bad", "flash, more")),
            )
        )
    return Player(made, start=2)


Explore(
    break_even,
    d_head=Choice("width of a head", (32, 64, 128, 256), 128),
    tile_q=Choice("queries a tile", (16, 32, 64, 128), 64),
)

# %% [markdown]
# *Only the picture answers this:* at width 256 and 64 queries a tile, from which length on does flash
# lose for good? (On a GPU it may still win: keys that are read again often come from the L2 cache.)
#
# **Decoding.** With one query the scores are one row. There is nothing to keep off HBM:

# %%
one = Sizes(1, 8192, 128, 128, causal=True, itemsize=2, n_heads=32, n_kv_heads=32)
a, b = naive_traffic(one).total, flash_traffic(one, tile_q=1, tile_k=64).total
print(f"one query, 8,192 keys: naive moves {a / b:.3f} times what flash moves")
for batch in (1, 8):
    print(f"batch {batch}: {batch * one.n_heads} programs, one a query head of Llama-3-8B, or {batch * 8}, one a "
          f"KV head, for 132 multiprocessors")

# %% [markdown]
# Section 7's kernel has one program a query head then, and four of them read the same KV head. One program
# a KV head reads it once, and there are four times fewer. What is short then is *work to share out*. Split-KV
# (Flash-Decoding) gives each program a part of the keys. Each part ends with a result and its L, and two of those
# merge exactly. The split costs a detour of the parts through HBM, and it is small.

# %%
from llmopt_lab.flash_attention import split_kv_attention

q, k, v = toy()
with recording() as split_trace:
    split_kv_attention(q[-1:], k, v, n_splits=3, tile_k=2)
Player(frames(split_trace), title="One query, eight keys, three programs")

# %% [markdown]
# *Only the picture answers this:* which part holds most of the query's weight? (Its L is largest.)
#
# **Widths that are no power of two.** Triton's tiles are powers of two. A head of 80 runs as one of 128,
# and the products work on zeros:

# %%
for d_head in (64, 80, 96, 128):
    padded = 1 << (d_head - 1).bit_length()
    print(f"d_head {d_head:3} runs as {padded:3}: {1 - d_head / padded:5.1%} of the products' work is on zeros")

# %% [markdown]
# **Somebody wants the attention map.** It was never there; transformers returns maps only with
# `attn_implementation="eager"`, its naive version. If you need some rows, make them again from L:

# %%
q, k, v = torch.randn(3, 300, 64, generator=torch.Generator().manual_seed(5))
_, lse = flash_attention(q, k, v, causal=True, return_lse=True)
rows = slice(200, 204)
p = torch.exp(q[rows] @ k.T / 8 - lse[rows, None]).tril(200)
print(f"4 rows of P: {tuple(p.shape)}, sums {[round(x, 5) for x in p.sum(1).tolist()]}")

# %% [markdown]
# ## 9. In production, and what to remember (5 minutes)
#
# | system | how to choose |
# |---|---|
# | torch | `with sdpa_kernel(SDPBackend.FLASH_ATTENTION):` (also `CUDNN_ATTENTION`, `EFFICIENT_ATTENTION`, `MATH`); it raises when the input does not fit |
# | transformers | `from_pretrained(..., attn_implementation="flash_attention_2")`; also `"flash_attention_3"`, `"sdpa"`, `"flex_attention"`, `"eager"`. Ours: `register_with_transformers()`, then `"llmopt_tiled"` |
# | vLLM | `--attention-backend FLASH_ATTN`, `FLASHINFER`, `TRITON_ATTN` or `FLEX_ATTENTION`. The variable `VLLM_ATTENTION_BACKEND` of older guides is deprecated and now ignored |
# | TensorRT-LLM | `LLM(..., attn_backend="TRTLLM")`, the default; `"FLASHINFER"`, `"VANILLA"` |
#
# **Remember**
# 1. Softmax can be summed in any order if you keep `m` and `total`, and shrink old sums when `m` grows.
# 2. Divide once, at the end.
# 3. Memory *held* falls from $N^2$ to $N$. Bytes *moved* fall by about `2 tile_q / d`, twice that with a
#    mask. Operations fall only where a mask lets you skip tiles: by about half if it is causal.
# 4. For training, keep L and make P again. A tiled forward alone keeps more than naive attention.
# 5. Align the causal mask at the bottom right, or decoding sees one token.
# 6. Test against someone else's attention, beyond one block, on lengths that are no multiple of a tile.
#
# **Sources.** Dao et al. 2022, *FlashAttention* ([2205.14135](https://arxiv.org/abs/2205.14135)), section 3. Dao
# 2023, *FlashAttention-2* ([2307.08691](https://arxiv.org/abs/2307.08691)). Shah et al. 2024,
# *FlashAttention-3* ([2407.08608](https://arxiv.org/abs/2407.08608)). Milakov and Gimelshein 2018, *Online
# normalizer calculation for softmax* ([1805.02867](https://arxiv.org/abs/1805.02867)). Dao et al. 2023,
# *Flash-Decoding*.
#
# Next: the exercises, then chapter 3, where the feed-forward layers become many.
