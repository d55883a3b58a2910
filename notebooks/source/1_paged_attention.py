# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 1. Paged attention
# {{colab_badge}}
#
# A server that writes for many people at once keeps the keys and values of every token of every
# request. Give each request one long stretch of memory, as the first servers did, and most of that
# memory never holds a token. Paged attention cuts it into blocks. After this chapter you can build
# a paged cache, say what it saves before you run it, and find the bug in somebody else's.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 15 |
# | 3. What the guide says, measured | 20 |
# | 4. A real model, served | 20 |
# | 5. The kernel | 15 |
# | 6. How fast it is | 10 |
# | 7. Where it loses | 10 |
# | 8. In production, and what to remember | 5 |
#
# The exercises are in `exercises/1_paged_attention.ipynb`. Do them after section 3, or at the end.

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
# A model keeps one key and one value per token, per layer, per KV head. For Llama-3-8B in float16:

# %%
import torch

from llmopt_lab.paged_attention import CacheConfig

llama = CacheConfig(
    n_layers=32, n_blocks=1, block_size=16, n_kv_heads=8, d_head=128, dtype=torch.float16
)
print(f"one token: {llama.bytes_per_token:,} bytes; 2,048 tokens: "
      f"{2048 * llama.bytes_per_token / 2**20:.0f} MiB")

# %% [markdown]
# A GPU has 8 GiB left for keys and values: 65,536 tokens. Requests may grow to 2,048 tokens, and
# nobody knows beforehand where one stops, so the server reserves 2,048 slots for each: 32 requests
# at a time. In truth most are short: prompt and answer are about 200 tokens each, a few are long.
#
# Lock in your guess. Section 3 measures the answer.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "Same memory, same requests, blocks of 16 tokens handed out as needed. "
    "How many requests run at a time, on average?",
    unit="requests",
)
guess

# %% [markdown]
# ## 2. The idea, step by step (15 minutes)
#
# Cut the memory into **blocks** of a few tokens. A request's **block table** lists its blocks in
# order: token `t` is in slot `t % block_size` of block `table[t // block_size]`. The blocks need
# not be neighbours. That is all; the rest follows.
#
# Below, a pool of 8 blocks of 4 tokens. Request A arrives with 6 tokens. Then a second
# continuation, B, starts from the same 6 tokens. Step through it.

# %%
from llmopt_lab.core.trace import recording
from llmopt_lab.paged_attention import PagedCache
from llmopt_lab.paged_attention.view import frames
from llmopt_lab.widgets.player import Player

rng = torch.Generator().manual_seed(0)


def new_tokens(n):
    """Keys and values of n tokens: 1 KV head of width 4."""
    return torch.randn(2, n, 1, 4, generator=rng)


cache = PagedCache(CacheConfig(n_layers=1, n_blocks=8, block_size=4, n_kv_heads=1, d_head=4))
with recording() as trace:
    cache.append("A", *new_tokens(6))
    cache.fork("A", "B")
    cache.append("B", *new_tokens(1))
    cache.append("A", *new_tokens(3))
    cache.append("C", *new_tokens(5))
    cache.release("A")
    cache.append("B", *new_tokens(6))
Player(frames(trace, n_blocks=8, block_size=4), title="A block table at work")

# %% [markdown]
# *Only the picture answers these:*
# - When B writes its first own token, which block is copied, and why is the other one not?
# - After A has left, which slots are reserved and hold no token? Whose are they?
#
# Every step you saw is a record that the code made while it ran. Here they are as text, with every
# read and write of slow memory:

# %%
print("\n".join(str(trace).splitlines()[:14]))

# %% [markdown]
# The block being shared is *copied on write*. Its reads and writes are two of the lines above;
# sharing itself moved nothing.
#
# Attention then walks the table. This is the whole algorithm, without its `record` lines:

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.paged_attention import paged_attention

source = without_records(inspect.getsource(paged_attention))
print(source[source.index("    q_g = ") :])

# %% [markdown]
# It never builds the whole row of scores: it keeps a running maximum `m`, a running sum `total` and
# a weighted sum `acc`, and rescales them when the maximum grows. Chapter 2 derives that. Here it
# matters that each block is read once, where it lies, and that the slots past the end are not read.
#
# Check it against torch's own attention over contiguous keys, and count the bytes:

# %%
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.memory import Load

table, length = cache.table_tensor(["B"])
q = torch.randn(2, 4, generator=rng)  # 2 query heads share the KV head
with recording(Load) as reads:
    out = paged_attention(q, cache.keys[0], cache.values[0], table[0], int(length[0]))

slots = cache.slots("B")
k, v = (x[0].flatten(0, 1)[slots].transpose(0, 1).expand(2, -1, -1) for x in (cache.keys, cache.values))
want = scaled_dot_product_attention(q[:, None], k, v)[:, 0]
n = int(length[0])
formula = q.nbytes + 4 * len(cache.tables["B"]) + n * cache.config.bytes_per_token
apart = float((out - want).abs().max())
print(f"the largest difference from torch is below 1e-6: {apart < 1e-6}")
print(f"bytes read: {reads.total('nbytes', Load)}, by the formula: {formula}")

# %% [markdown]
# ## 3. What the guide says, measured (20 minutes)
#
# The written guide that this course grew out of shows the idea in 40 lines. Here they are, as
# printed there.

# %%
class PagedAttention:
    def __init__(self, page_size=16, num_pages=1000):
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
# **"Dynamic allocation: allocate pages as sequence grows."** A request decodes 512 tokens and asks
# for a page each time one is full. Then it leaves. How many pages come back?

# %%
guide = PagedAttention(page_size=16, num_pages=1000)
for _ in range(512 // 16):
    guide.allocate_pages("A", 16)
guide.free_pages("A")
leaked = sum(owner == "A" for owner in guide.page_pool)
print(f"{leaked} of 32 pages never came back")

# %% [markdown]
# Each call overwrites the request's list, so only the last page is remembered. And when the pool is
# short, nothing says so:

# %%
guide = PagedAttention(page_size=16, num_pages=10)
pages = guide.allocate_pages("A", 200)
print(f"asked for 200 tokens, 13 pages; got {len(pages)} and no error")
print(f"the next request gets {guide.allocate_pages('B', 16)}")

# %% [markdown]
# Ours refuses, names the numbers, and changes nothing:

# %%
from llmopt_lab.core.errors import OutOfBlocks

small = PagedCache(CacheConfig(n_layers=1, n_blocks=10, block_size=16, n_kv_heads=1, d_head=4))
try:
    small.extend("A", 200)
except OutOfBlocks as refused:
    print(refused)
print(f"free blocks afterwards: {len(small.pool.free)}")

# %% [markdown]
# **"Concatenate pages."** `get_kv_cache` calls a method that does not exist, and it has no length:
# it returns whole pages. Give it the missing method and a request of 17 tokens. The other 15 slots
# of its second page hold what an earlier request left there.

# %%
rng = torch.Generator().manual_seed(1)
d_head, n_tokens = 64, 17
pool = torch.randn(10, 16, d_head, generator=rng) * 3  # an earlier request's keys and values
guide = PagedAttention(page_size=16, num_pages=10)
guide.get_page = lambda page: pool[page][None]
pages = guide.allocate_pages("A", n_tokens)
pool[pages[0]] = torch.randn(16, d_head, generator=rng)
pool[pages[1], 0] = torch.randn(d_head, generator=rng)

kv = guide.get_kv_cache("A", pages)  # (1, 32, d_head), used as keys and as values
q = torch.randn(1, 1, d_head, generator=rng)
got = scaled_dot_product_attention(q, kv, kv)
want = scaled_dot_product_attention(q, kv[:, :n_tokens], kv[:, :n_tokens])
print(f"tokens returned: {kv.shape[1]} of {n_tokens}")
print(f"relative error of the attention: {(got - want).norm() / want.norm():.2f}")

# %% [markdown]
# A wrong answer, and a leak from one user to another. Keep the length beside the table.
#
# The copy itself costs more than the attention it feeds. Per decode step, the guide's version reads
# everything once, writes it once, and reads it again. Counted, for one layer at 4,096 tokens:

# %%
from llmopt_lab.core.cost import EagerTraffic

layer = CacheConfig(n_layers=1, n_blocks=256, block_size=16, n_kv_heads=8, d_head=128)
keys = torch.zeros(256, 16, 8, 128)
order = torch.randperm(256, generator=rng)
with EagerTraffic() as gathered:
    torch.cat([keys[block] for block in order])
in_place = keys.nbytes  # a page walk reads each key once
print(f"gather, keys only: reads {gathered.read / 2**20:.0f} MiB and writes "
      f"{gathered.written / 2**20:.0f} MiB before attention reads the copy again")
print(f"page walk: reads {in_place / 2**20:.0f} MiB, writes nothing")

# %% [markdown]
# **"Eliminates fragmentation: fixed-size pages prevent waste."** The guide's own example is three
# requests of 1,000, 500 and 2,000 tokens, the third of which "can't fit". With three fresh requests
# nothing is fragmented: it fits unless the memory is simply too small. Holes come from *leaving*:

# %%
from llmopt_lab.paged_attention.waste import ContiguousMemory, PagedMemory

contiguous, paged = ContiguousMemory(2560), PagedMemory(2560, block_size=16)
for memory in (contiguous, paged):
    for name, n in (("1", 1000), ("2", 500), ("3", 1000)):
        memory.admit(name, n, n)
    memory.release("1")
    memory.release("3")
    usage = memory.usage()
    fits = memory.admit("4", 2000, 2000)
    print(f"{type(memory).__name__:17} free {usage.free}, largest hole {usage.largest_hole}: "
          f"2,000 tokens {'fit' if fits else 'do not fit'}")

# %% [markdown]
# Blocks end this *external* fragmentation. *Internal* fragmentation stays: the last block of a
# request is half empty on average. How much that is depends on the block size and on how long
# requests are. Each frame below is one block size.

# %%
from llmopt_lab.paged_attention.waste import internal_waste
from llmopt_lab.widgets.panels import Bar, Bars, Frame

rng = torch.Generator().manual_seed(2)
lengths = {
    "uniform 1 to 64": torch.randint(1, 65, (5000,), generator=rng).tolist(),
    "exactly 17": [17] * 5000,
    "uniform 1 to 2,048": torch.randint(1, 2049, (5000,), generator=rng).tolist(),
    "exponential, mean 500": (torch.empty(5000).exponential_(1 / 500, generator=rng).long() + 1).tolist(),
}


def waste_frame(block_size):
    """The share of reserved slots without a token, for each length distribution."""
    waste = {name: internal_waste(ns, block_size) for name, ns in lengths.items()}
    bars = tuple(Bar(name, 100 * w, "bad") for name, w in waste.items())
    worst = max(waste, key=waste.get)
    return Frame(
        f"Blocks of {block_size} tokens: between {min(waste.values()):.1%} and {waste[worst]:.1%} "
        f"of the reserved slots are empty, most for requests of length {worst}.",
        (Bars("reserved slots without a token", bars, "%", 100.0),),
    )


sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
Player([waste_frame(size) for size in sizes], title="Internal fragmentation", start=4)

# %% [markdown]
# *Only the picture answers this:* at which block size do requests of exactly 17 tokens waste more
# than they use?
#
# "Waste of under 4 %" is what the paper reports for its traffic, not a law. So why not blocks of
# one token? Section 7 says.
#
# **"Better utilization: can pack more requests into GPU."** Now the answer to your prediction. One
# workload, four ways to hand out 65,536 slots: reserve the most a request may get; reserve its true
# length, as an oracle would; blocks of 16; blocks of 256.

# %% id="takeaway"
from llmopt_lab.paged_attention.waste import replay, workload

rng = torch.Generator().manual_seed(3)
jobs = workload(1500, mean_prompt=200, mean_new=200, longest=2048, rng=rng)
n_slots = 65_536
runs = {
    "contiguous, reserve 2,048": replay(
        jobs, ContiguousMemory(n_slots), n_steps=600, reserve=lambda job: 2048
    ),
    "contiguous, true length": replay(jobs, ContiguousMemory(n_slots), n_steps=600),
    "blocks of 16": replay(jobs, PagedMemory(n_slots, 16), n_steps=600),
    "blocks of 256": replay(jobs, PagedMemory(n_slots, 256), n_steps=600),
}
print(f"{'':27} requests   internal   external   finished")
for name, run in runs.items():
    print(f"{name:27} {run.mean_running:8.0f} {run.mean('internal_waste'):10.1%} "
          f"{run.mean('external_waste'):10.1%} {run.finished:10}")

# %%
guess.reveal(round(runs["blocks of 16"].mean_running))

# %% [markdown]
# The memory did not grow. Almost six times as many requests share each reading of the model's
# weights, and that is where the throughput comes from. Watch it fill:

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7.5, 3))
for (name, run), style in zip(runs.items(), ("-", "--", "-", ":"), strict=True):
    axes.plot(run.running, style, label=name)
axes.set(xlabel="step", ylabel="requests running", ylim=0, title="65,536 slots, one workload")
axes.legend(loc="upper right", fontsize=8)
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* one line never moves. Which, and why? And in which of the others
# does the number of requests fall soonest after the start?
#
# The same workload on every block size, internal and external waste side by side with the two
# contiguous ways:

# %%
contiguous_runs = {
    "reserve 2,048": runs["contiguous, reserve 2,048"],
    "true length": runs["contiguous, true length"],
}


def workload_frame(block_size):
    """Both kinds of waste while the workload runs on blocks of this size."""
    run = replay(jobs, PagedMemory(n_slots, block_size), n_steps=600)
    panels = [
        Bars(
            f"{kind} fragmentation",
            tuple(
                Bar(name, 100 * r.mean(f"{kind}_waste"), "bad")
                for name, r in (contiguous_runs | {"blocks": run}).items()
            ),
            "%",
            100.0,
        )
        for kind in ("internal", "external")
    ]
    caption = (
        f"Blocks of {block_size}: {run.mean('internal_waste'):.1%} of the reserved slots are empty "
        f"on average, every free slot can be used, and {run.mean_running:.0f} requests run at a time."
    )
    return Frame(caption, tuple(panels))


Player([workload_frame(size) for size in sizes], title="One workload, every block size", start=4)

# %% [markdown]
# *Only the picture answers this:* from which block size on do blocks waste more inside than an
# oracle that knows each length wastes at all? (Its inside waste is what is reserved but not yet written.)
#
# Two more claims. The guide's scan for free pages looks at the whole pool at each call; ours takes
# a number off a queue. Time one allocation in pools of 1,000 and 100,000:

# %% tags=["timing", "nbval-ignore-output"]
from timeit import timeit

from llmopt_lab.paged_attention import BlockPool

for n in (1_000, 100_000):
    pools = {"guide": PagedAttention(num_pages=n), "ours": BlockPool(n)}
    scan = timeit("guide.allocate_pages('A', 16); guide.free_pages('A')", number=20, globals=pools)
    queue = timeit("ours.release(ours.allocate(1)[0])", number=20, globals=pools)
    print(f"{n:7,} pages: the scan takes {scan / queue:,.0f} times as long as the queue")

# %% [markdown]
# And `LLM(model="gpt-3.5-turbo")` in its vLLM example cannot work: that model's weights were never
# published. vLLM takes the name of an open model or a folder: `LLM(model="HuggingFaceTB/SmolLM2-135M-Instruct")`.
#
# | the guide says | measured |
# |---|---|
# | KV cache is allocated per request, causing fragmentation | the cause is reserving the longest a request may get: 84 % of the reserved slots stay empty |
# | a third request can't fit | only after others have left holes: 2,060 slots free, none of 2,000 in a row |
# | eliminates fragmentation | external: yes. Internal: see the picture, up to 93 % at length 17 and blocks of 256 |
# | better utilization | 189 requests at a time instead of 32, in the same memory |
# | allocate pages as sequence grows | its code loses 31 of 32 pages |
# | retrieve KV cache from pages | its code returns 32 tokens of 17 and copies the whole cache each step |
# | used in vLLM, TensorRT-LLM | true |

# %% [markdown]
# ## 4. A real model, served (20 minutes)
#
# `lab-target` is a small Llama that comes with the course and completes Python code. To serve
# SmolLM2-135M instead, change one line: `MODEL = "smollm2-135m"`.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.device import pick_device
from llmopt_lab.nn.weights import load

MODEL = "lab-target"

lm = load(MODEL, device=pick_device())
print(f"{MODEL}: {lm.config.n_layers} layers, {lm.config.n_heads} query heads, "
      f"{lm.config.n_kv_heads} KV heads, "
      f"{lm.config.kv_bytes_per_token(torch.float32):,} bytes of cache a token")

# %% [markdown]
# Four requests to complete the same file, each from another line on. Request B wants four samples.
# The pool is small on purpose: 24 blocks of 8 tokens.
#
# `serve` runs continuous batching: at each pass of the model, running requests decode one token
# each, finished ones leave, waiting ones join while there is room.

# %%
from llmopt_lab.paged_attention import Request

file = '''"""Small functions for lists of numbers."""

import math
from collections.abc import Sequence


'''
beginnings = {
    "A": "def mean(numbers: Sequence[float]) -> float:\n",
    "B": "def",
    "C": "class Window:\n    def __init__(self, size: int):\n",
    "D": "def largest(numbers):\n    best =",
}


def make_requests():
    """The four requests, fresh: a request remembers what it has generated."""
    requests = []
    for name, beginning in beginnings.items():
        samples = {"n_samples": 4, "temperature": 0.9, "seed": 7} if name == "B" else {}
        prompt = lm.encode(file + beginning).tolist()
        requests.append(Request(name, prompt, n_new=20, eos=frozenset(lm.eos), **samples))
    return requests


print({request.name: len(request.prompt) for request in make_requests()}, "tokens of prompt")

# %%
from llmopt_lab.paged_attention.attend import cache_config, serve
from llmopt_lab.paged_attention.records import EVENTS
from llmopt_lab.paged_attention.view import serving_frames

pool = {"n_blocks": 24, "block_size": 8}
cache = PagedCache(cache_config(lm.config, **pool), device=lm.model.device)
with recording(*EVENTS) as served:
    texts = serve(lm.model, cache, make_requests(), max_step_tokens=64)
for name, tokens in texts.items():
    print(f"{name:4} {lm.tokenizer.decode(tokens, skip_special_tokens=True)!r}")

# %% [markdown]
# Is it the same text that the model writes alone, with an ordinary contiguous cache?

# %%
from llmopt_lab.nn.generate import generate

for request in make_requests():
    if request.temperature == 0:
        prompt = torch.tensor(request.prompt, device=lm.model.device)
        alone = generate(lm.model, prompt, request.n_new, eos=list(lm.eos))[len(prompt) :].tolist()
        print(request.name, "the same" if alone == texts[request.name] else "DIFFERENT")

# %% [markdown]
# Now look at the run, one frame a pass of the model. The blocks at the bottom are the whole pool.

# %%
Player(serving_frames(served, **pool), title="Serving four requests")

# %% [markdown]
# *Only the picture answers these:*
# - Which requests are preempted, in which passes? Who needed the blocks?
# - A contiguous cache reserves each request's longest length and shares nothing. In how many passes
#   would it have needed more slots than the 192 there are?
#
# A preempted request loses its blocks, not its text. It returns as a longer prompt; what is still
# in the *prefix cache* is not computed again. A full block is named by a hash of its tokens and of
# everything before them, so a block with the right name can be shared by anyone who starts the same
# way. Here is what each admission found there:

# %%
from llmopt_lab.paged_attention.records import Admitted, CopiedOnWrite, Evicted, Preempted

for admitted in served.of(Admitted):
    print(admitted)
print(f"preemptions {len(served.of(Preempted))}, copies on write {len(served.of(CopiedOnWrite))}, "
      f"evictions {len(served.of(Evicted))}")

# %% [markdown]
# Now change the pool. What a request says does not depend on blocks or preemption, so the recorded
# texts can be scheduled again on any pool at once. Find the smallest pool without a preemption, and
# then what a block size of 1 or 32 does to it.

# %%
from llmopt_lab.paged_attention.scheduler import rehearse
from llmopt_lab.widgets.explore import Choice, Explore


def serve_on(n_slots, block_size):
    """The same requests on a pool of `n_slots` slots in all."""
    pool = {"n_blocks": n_slots // block_size, "block_size": block_size}
    with recording() as trace:
        rehearse(make_requests(), texts, **pool, max_step_tokens=64)
    return Player(serving_frames(trace, **pool), start=0)


Explore(
    serve_on,
    n_slots=Choice("slots in the pool", (48, 96, 128, 160, 192, 256, 320), 192),
    block_size=Choice("tokens a block", (1, 2, 4, 8, 16, 32), 8),
)

# %% [markdown]
# ## 5. The kernel (15 minutes)
#
# One decode step reads every cached key and value once and multiplies each by a few numbers. So its
# time is bytes over bandwidth, and the kernel's job is to keep memory busy.
#
# One program takes one sequence, one KV head, and one *split*: a share of the tokens. It loads the
# query heads of the group once and walks its part of the block table. Compare this loop with the
# reference above: the names are the same.

# %%
try:
    from llmopt_lab.paged_attention import kernels

    source = inspect.getsource(kernels._decode_kernel.fn)
    first = source.index("    m = tl.full")
    print(source[first : source.index("    if PDL", first)])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Three things to see in it:
# - **The table is read where it is needed**, `token // BLOCK_SIZE`, for every token of a tile. Tiles
#   and blocks need not have the same size.
# - **The tail is masked twice**: the load reads nothing there, and the score becomes minus infinity.
#   With a score of 0 the missing keys would take part in the softmax.
# - **Splits**: a batch of 1 has 8 KV heads, and an H100 has 132 multiprocessors. So the tokens are
#   split, and a second small kernel merges the parts by their log-sum-exp (Flash-Decoding).
#
# Here it runs: compiled if you have a GPU, else in Triton's interpreter, which is slow and right.
# The inputs are hostile: unused slots hold NaN, and unused table entries name blocks that do not exist.

# %%
from llmopt_lab.paged_attention.cases import decode_inputs, decode_oracle

try:
    from llmopt_lab.paged_attention.kernels import paged_attention_decode

    args = decode_inputs(
        [17, 0, 100, 1], n_heads=6, n_kv_heads=2, d_head=64, block_size=16, device=pick_device()
    )
    error = (paged_attention_decode(*args) - decode_oracle(*args)).abs().max()
    print(f"4 sequences of 17, 0, 100 and 1 tokens: right within 1e-5: {error < 1e-5}")
except ImportError as missing:
    print(missing)

# %% [markdown]
# ## 6. How fast it is (10 minutes)
#
# Predict first: a batch of 64 sequences of 4,096 tokens, one layer of Llama-3-8B. That is 1.07 GB of
# keys and values; the H100 of the recording reads 3,098 GB/s.

# %%
from llmopt_lab.core.bench import format_results, load_results

recorded = load_results("paged_attention")[0]
speed = {
    (case["title"], *row["size"].values(), name): result.get("median_ms")
    for case in recorded["cases"]
    for row in case["rows"]
    for name, result in row["results"].items()
}
EQUAL = "decode, all sequences of one length"
Predict(
    "How long does our kernel take, in microseconds?",
    answer=round(1000 * speed[EQUAL, 64, 4096, "ours (Triton)"]),
    unit="us",
    explain="1.07 GB / 3,098 GB/s is 347 us: nothing can be faster. The rest is the start, the end, "
    "and reading the block tables.",
)

# %% [markdown]
# Each contender was first checked against an oracle in float64, then timed in one run, on inputs
# that do not fit the L2 cache. Bars are shares of what the memory can do at best.

# %% tags=["nbval-ignore-output"]
case = next(case for case in recorded["cases"] if case["title"] == EQUAL)
names = ["ours (Triton)", "FlashAttention-3 paged", "SDPA, contiguous", "gather, then SDPA"]
figure, axes = plt.subplots(figsize=(7.5, 3.4))
for i, name in enumerate(names):
    shares = [100 * row["results"][name]["share_of_roofline"] for row in case["rows"]]
    places = [x + 0.2 * i for x in range(len(shares))]
    axes.bar(places, shares, width=0.2, label=name, hatch=("", "//", "..", "xx")[i], edgecolor="white")
sizes = [f"{row['size']['batch']} x\n{row['size']['n_tokens']:,}" for row in case["rows"]]
axes.set_xticks([x + 0.3 for x in range(len(sizes))], sizes, fontsize=7)
axes.set(ylabel="% of the read bandwidth", xlabel="sequences x tokens", ylim=(0, 125),
         title=f"{recorded['hardware']['name']}, bf16, blocks of 16")
axes.legend(fontsize=7, loc="upper left", ncols=4)
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* where is the price of paging, the distance between the first and
# the third bar, largest?
#
# The whole table, losses included:

# %%
print(format_results(recorded))

# %% [markdown]
# With a GPU, time it here (about a minute); without one this cell says so.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.bench import run_room

if pick_device().type == "cuda":
    print(format_results(run_room("paged_attention")))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 7. Where it loses (10 minutes)
#
# Four prices, each measured.
#
# **Short requests, large blocks.** The expected waste is (block_size - 1) / 2 slots a request. Slide
# the mean length down until blocks waste more than reserving the most a request may get.

# %%
def break_even(mean_length, longest):
    """Waste by block size against reserving `longest` slots, lengths exponential and cut."""
    rng = torch.Generator().manual_seed(4)
    draws = torch.empty(4000).exponential_(1 / mean_length, generator=rng)
    ns = (draws.long() + 1).clamp(max=longest).tolist()
    reserved = 1 - sum(ns) / (len(ns) * longest)
    rows = []
    for block_size in (1, 4, 16, 64, 256):
        waste = internal_waste(ns, block_size)
        table = 4 / (block_size * llama.bytes_per_token)  # int32 a block, as a share of the cache
        bars = (
            Bar(f"reserve {longest:,}", 100 * reserved, "idle"),
            Bar(f"blocks of {block_size}", 100 * waste, "bad" if waste > reserved else "good"),
        )
        verdict = "Blocks lose." if waste > reserved else "Blocks win."
        rows.append(
            Frame(
                f"Mean length {mean_length}, blocks of {block_size}: {waste:.1%} empty, against "
                f"{reserved:.1%} when {longest:,} are reserved. {verdict} "
                f"The table itself takes {table:.5%} of the cache.",
                (Bars("empty share of what is reserved", bars, "%", 100.0),),
                legend=(("idle", "reserving"), ("good", "blocks win"), ("bad", "blocks lose")),
            )
        )
    return Player(rows, start=2)


Explore(
    break_even,
    mean_length=Choice("mean tokens a request", (4, 16, 64, 256, 1024), 64),
    longest=Choice("most tokens a request", (16, 64, 256, 2048), 256),
)

# %% [markdown]
# **Tiny blocks.** Blocks of one token waste nothing, and the table is still small beside the cache.
# The price is elsewhere: more numbers to hand out, hash and give back, and a layer's keys in pieces of
# 2 KiB (8 heads of 256 bytes) scattered over memory instead of 32 KiB in a row. Count what the
# server does for the same four requests:

# %%
from llmopt_lab.paged_attention.records import Allocated, Published, Released

print("block size   allocations   releases   published")
for block_size in (1, 4, 16):
    with recording(Allocated, Released, Published) as trace:
        rehearse(make_requests(), texts, n_blocks=512 // block_size, block_size=block_size)
    counts = [len(trace.of(kind)) for kind in (Allocated, Released, Published)]
    print(f"{block_size:10} {counts[0]:13} {counts[1]:10} {counts[2]:11}")

# %% [markdown]
# **The kernel.** Contiguous keys need no table. On the recorded H100, paged against contiguous:

# %%
for batch, n_tokens in ((1, 4096), (16, 2048), (64, 4096), (128, 4096)):
    ours, flat = (
        speed[EQUAL, batch, n_tokens, name] for name in ("ours (Triton)", "SDPA, contiguous")
    )
    print(f"batch {batch:3}, {n_tokens:,} tokens: paged takes {ours / flat:.2f} times as long")

# %% [markdown]
# **One request.** With a batch of one and enough memory there is nothing to share and nothing to
# pack. A contiguous cache of the right size does the same with less code. Paging pays when requests
# are many, their lengths unknown, or their prefixes equal.

# %% [markdown]
# ## 8. In production, and what to remember (5 minutes)
#
# | here | vLLM | TensorRT-LLM (`KvCacheConfig` and scheduler) |
# |---|---|---|
# | `block_size` | `--block-size` | `tokens_per_block` (32 by default) |
# | `n_blocks` | `--gpu-memory-utilization`, `--num-gpu-blocks-override` | `free_gpu_memory_fraction` (0.9 by default), `max_tokens` |
# | `admit` with its prefix cache | `--enable-prefix-caching` | `enable_block_reuse` (on by default) |
# | `salt` | `cache_salt` in the request | |
# | `max_running`, `max_step_tokens` | `--max-num-seqs`, `--max-num-batched-tokens` | `max_batch_size`, `max_num_tokens` |
# | preempt the youngest | the scheduler's default | `capacity_scheduler_policy="MAX_UTILIZATION"`; the default admits only what can finish |
#
# **Remember**
# 1. KV bytes a token = 2 x layers x KV heads x d_head x bytes a number.
# 2. Blocks end external fragmentation. Half a block a request stays empty.
# 3. A block table and a *length*: without the length you read somebody else's tokens.
# 4. Check first, then change: a refused request leaves no trace.
# 5. Share by counting owners; copy when an owner writes; name full blocks by a chained hash.
# 6. Decoding is reading. The floor is bytes over bandwidth.
#
# **Sources.** Kwon et al. 2023, *Efficient Memory Management for Large Language Model Serving with
# PagedAttention* ([2309.06180](https://arxiv.org/abs/2309.06180)), sections 3 and 4. Yu et al. 2022, *Orca*
# (continuous batching). Dao et al. 2023, *Flash-Decoding*. vLLM's design notes on automatic prefix caching.
#
# Next: the exercises, then chapter 2, which derives the running softmax that you saw here.
