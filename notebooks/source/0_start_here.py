# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # Start here
# {{colab_badge}}
#
# Seven techniques make large language models cheaper to run. In this course you take each one
# apart: you predict what it will do, watch it happen step by step, use it on a real model, build
# its heart yourself, and find out where it loses.
#
# This page shows you the tools that every chapter uses, and what the whole course found. In a hurry?
# Go on to chapter 1 after section 4 and come back at the end.
#
# | section | minutes |
# |---|---|
# | 1. This session | 1 |
# | 2. A prediction | 2 |
# | 3. A moving picture | 3 |
# | 4. Exercises, hints and points | 3 |
# | 5. A model that writes | 5 |
# | 6. The guide, and what is left of it | 8 |
# | 7. Where to go | 3 |
#
# The first cell of each notebook is always the same. It installs the course where it is missing, as
# on Colab, and says in one line what your session has and what that means for you.

# %% tags=["setup", "timing", "nbval-ignore-output"]
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% [markdown]
# ## 1. This session (1 minute)
#
# Read the line above from left to right: the version of the course, your GPU, the versions it runs
# with, and, last, what does not work here or works more slowly. You need no GPU: each kernel also
# runs in Triton's CPU interpreter, which gives the right numbers slowly, and each benchmark comes
# with results recorded on an H100.
#
# Something is wrong? In a terminal, `llmopt doctor` (or `.venv/bin/llmopt doctor`) names it and
# says what to do.

# %% [markdown]
# ## 2. A prediction (2 minutes)
#
# You learn more from a result when you have said beforehand what you expect. Each chapter asks you
# first. Your answer locks before the right one shows, and nobody else sees it.
#
# SmolLM2-135M, one of the models of this course, has 30 layers, and in each layer 3 key heads and 3
# value heads of width 64. While it writes, it keeps one key and one value for every token it has
# seen, in 2 bytes a number. That store is the *KV cache*.

# %%
from llmopt_lab.widgets.predict import Predict

n_layers, n_kv_heads, d_head, nbytes = 30, 3, 64, 2

Predict(
    "How many bytes does the KV cache of SmolLM2-135M take for one token?",
    answer=2 * n_layers * n_kv_heads * d_head * nbytes,
    unit="bytes",
    tolerance=0.01,
    explain="2 (a key and a value) x 30 layers x 3 heads x 64 numbers x 2 bytes = 23,040 bytes: "
    "a chat of 2,000 tokens takes 46 MB.",
)

# %% [markdown]
# ## 3. A moving picture (3 minutes)
#
# Below, the model reads the word *cache* and three more tokens; each leaves its key and value
# behind. Step through it with the buttons, the slider, or, once the slider has the focus, the arrow
# keys, Home and End. The caption above the picture tells the whole story in words.
#
# A picture is plain data: a list of frames, each with a caption and a few panels. Here they are
# made by hand. In the chapters they are made from a recorded run of the algorithm, with the line of
# source that did each step beside them. The same player can show your own function's run.

# %%
from llmopt_lab.widgets.panels import Cell, Frame, Grid, Meter
from llmopt_lab.widgets.player import Player

tokens = ["cache", "me", "if", "you"]
bytes_per_token = 2 * n_layers * n_kv_heads * d_head * nbytes


def frame_after(n_tokens):
    """The KV cache after `n_tokens` of the text, the newest one marked."""
    cells = [Cell(token, "active") for token in tokens[:n_tokens]]
    cells += [Cell()] * (len(tokens) - n_tokens)
    newest = "nothing to keep yet."
    if n_tokens:
        cells[n_tokens - 1] = Cell(tokens[n_tokens - 1], "new")
        newest = f"it keeps the key and the value of {tokens[n_tokens - 1]!r}."
    rows = (tuple(cells), tuple(cells))
    return Frame(
        caption=f"The model has read {n_tokens} of {len(tokens)} tokens: {newest}",
        panels=(
            Grid("KV cache of one request", ("keys", "values"), rows),
            Meter("memory", n_tokens * bytes_per_token, "bytes"),
        ),
    )


Player([frame_after(n) for n in range(len(tokens) + 1)], title="A KV cache grows")

# %% [markdown]
# *Try it:* change `tokens`, run the cell again, and step to the end.

# %% [markdown]
# ## 4. Exercises, hints and points (3 minutes)
#
# Each chapter has a notebook of exercises with the same number, in the folder `exercises`. It has
# cells to fill in:
#
# ```python
# def slot_mapping(block_table, n_tokens, block_size):
#     """The slot in the cache of each of a request's tokens."""
#     # YOUR CODE HERE
#     raise NotImplementedError()
# ```
#
# and after each a locked cell that checks what you wrote. Run it. It says *done*, or what is wrong
# with the values you got and where to look next. A check makes new inputs each time, so it can't be
# fooled by an answer that fits one example.
#
# - **Stuck?** `hint("paged_attention.slot_mapping", 1)` gives the first hint, `2` the second,
#   stronger one. Hints cost no points.
# - **Your score:** in a terminal, `llmopt grade exercises/1_paged_attention.ipynb` prints your
#   points for each exercise, and the next hint. It runs a copy of your notebook: an endless loop or
#   a crash costs that exercise and nothing else.
# - **A second opinion:** `solutions` has the same notebook, solved; in a class, your instructor may
#   keep it until later. There is more than one right answer; a check accepts all of them.

# %% [markdown]
# ## 5. A model that writes (5 minutes)
#
# `lab-target` comes with the course: 8.8 million parameters, trained on Python code. A language
# model does one thing. It reads a text as *tokens*, pieces of words, and gives every token of its
# vocabulary a probability to come next. One is written, and the longer text is read again.
#
# Say first what you expect:

# %%
from llmopt_lab.nn import load
from llmopt_lab.nn.generate import NextToken

lm = load("lab-target")
next_token = NextToken(lm.model)

p = next_token(lm.encode("def add(a, b):\n    return a"))
first, second = p.topk(2).indices.tolist()
Predict(
    "A line says “def add(a, b):”, the next one “return a”. How probable is the next token that "
    "the model finds most probable?",
    answer=round(100 * float(p[first])),
    unit="%",
    tolerance=0.2,
    explain=f"It is {lm.decode([first])!r}; {lm.decode([second])!r} has {100 * p[second]:.0f} %. "
    "Code has more ways to go on than the one you had in mind.",
)

# %% [markdown]
# Now let it write. *Play*, or take *one token* at a time. Click a bar, or its button with the
# keyboard, and the model has to go on from your choice. At temperature 0 the most probable token
# always comes next; above 0 it is drawn, and the higher the temperature, the more the small
# probabilities count. `<|endoftext|>` stands before each text; ↵ ends a line, and · is a space.

# %%
from llmopt_lab.widgets.complete import Complete

prompt = "def read_lines(path):\n    with open(path"
Complete(next_token, lm.encode, lm.decode, prompt=prompt, eos=lm.eos)

# %% [markdown]
# *Try it:*
# - Find a place where the model hesitates between many tokens, and one where it is all but certain.
# - Start over, force an unlikely token, and play. Does the model get over it?
# - Type the beginning of a story. What does a model that has only read code make of it?

# %% [markdown]
# ## 6. The guide, and what is left of it (8 minutes)
#
# This course grew out of a written guide, *LLM Optimizations: Production Guide*, of seven chapters:
#
# | the guide's contents | here | its claims, measured | exercises |
# |---|---|---|---|
# | 1. Paged Attention | [lesson 1](1_paged_attention.ipynb) | its section 3 | [10](../exercises/1_paged_attention.ipynb) |
# | 2. Flash Attention | [lesson 2](2_flash_attention.ipynb) | its section 3 | [11](../exercises/2_flash_attention.ipynb) |
# | 3. Mixture of Experts (MoE) | [lesson 3](3_moe.ipynb) | its section 3 | [11](../exercises/3_moe.ipynb) |
# | 4. Quantization | [lesson 4](4_quantization.ipynb) | its section 3 | [12](../exercises/4_quantization.ipynb) |
# | 5. Sparse Attention | [lesson 5](5_sparse_attention.ipynb) | its section 3 | [12](../exercises/5_sparse_attention.ipynb) |
# | 6. SLM & Distillation | [lesson 6](6_distillation.ipynb) | its section 3 | [12](../exercises/6_distillation.ipynb) |
# | 7. Speculative Decoding | [lesson 7](7_speculative_decoding.ipynb) | its section 3 | [12](../exercises/7_speculative_decoding.ipynb) |
#
# It ends with seven key takeaways. Each holds a truth, and none is true as it stands. Which of its
# numbers would you have believed?

# %%
from IPython.display import Markdown

from llmopt_lab.takeaways import as_markdown, takeaways

Markdown(as_markdown(takeaways()))

# %% [markdown]
# Three things come back in all seven:
# 1. **A ratio is not a property of a technique.** It belongs to a length, a batch, a machine and a peer.
#    Ask for all four, or do not believe it.
# 2. **Memory, bytes moved and arithmetic are three budgets.** Each technique saves one of them, and most
#    pay with another.
# 3. **Agreement of two functions of your own proves nothing.** Test against somebody else's, beyond one
#    block, on uneven sizes.
#
# **References.** The guide names three papers for seven chapters. These are the ones that the chapters
# are built on; each lesson ends with more.
#
# | chapter | papers |
# |---|---|
# | 1 | Kwon 2023, *PagedAttention* ([2309.06180](https://arxiv.org/abs/2309.06180)) |
# | 2 | Dao 2022, *FlashAttention* ([2205.14135](https://arxiv.org/abs/2205.14135)); Dao 2023, *FlashAttention-2* ([2307.08691](https://arxiv.org/abs/2307.08691)); Shah 2024, *FlashAttention-3* ([2407.08608](https://arxiv.org/abs/2407.08608)); Milakov 2018, *online softmax* ([1805.02867](https://arxiv.org/abs/1805.02867)) |
# | 3 | Shazeer 2017, *mixture of experts* ([1701.06538](https://arxiv.org/abs/1701.06538)); Lepikhin 2020, *GShard* ([2006.16668](https://arxiv.org/abs/2006.16668)); Fedus 2021, *Switch* ([2101.03961](https://arxiv.org/abs/2101.03961)); Jiang 2024, *Mixtral* ([2401.04088](https://arxiv.org/abs/2401.04088)); DeepSeek-AI 2024, *DeepSeek-V3* ([2412.19437](https://arxiv.org/abs/2412.19437)) |
# | 4 | Frantar 2022, *GPTQ* ([2210.17323](https://arxiv.org/abs/2210.17323)); Lin 2023, *AWQ* ([2306.00978](https://arxiv.org/abs/2306.00978)); Xiao 2022, *SmoothQuant* ([2211.10438](https://arxiv.org/abs/2211.10438)) |
# | 5 | Child 2019, *Sparse Transformers* ([1904.10509](https://arxiv.org/abs/1904.10509)); Beltagy 2020, *Longformer* ([2004.05150](https://arxiv.org/abs/2004.05150)); Xiao 2023, *StreamingLLM* ([2309.17453](https://arxiv.org/abs/2309.17453)); Yuan 2025, *NSA* ([2502.11089](https://arxiv.org/abs/2502.11089)) |
# | 6 | Hinton 2015, *distillation* ([1503.02531](https://arxiv.org/abs/1503.02531)); Sanh 2019, *DistilBERT* ([1910.01108](https://arxiv.org/abs/1910.01108)); Jiao 2019, *TinyBERT* ([1909.10351](https://arxiv.org/abs/1909.10351)); Agarwal 2023, *on-policy distillation* ([2306.13649](https://arxiv.org/abs/2306.13649)); Gu 2023, *MiniLLM* ([2306.08543](https://arxiv.org/abs/2306.08543)) |
# | 7 | Leviathan 2022, *speculative decoding* ([2211.17192](https://arxiv.org/abs/2211.17192)); Chen 2023, *speculative sampling* ([2302.01318](https://arxiv.org/abs/2302.01318)) |

# %% [markdown]
# ## 7. Where to go (3 minutes)
#
# | chapter | you will be able to say |
# |---|---|
# | [1. Paged attention](1_paged_attention.ipynb) | why a server runs out of memory with half of it unused, and what fixes that |
# | [2. Flash attention](2_flash_attention.ipynb) | why an algorithm that computes more can finish sooner |
# | [3. Mixture of experts](3_moe.ipynb) | what a model with a hundred experts really reads for one token |
# | [4. Quantization](4_quantization.ipynb) | which numbers survive with 4 bits, and what a scale is for |
# | [5. Sparse attention](5_sparse_attention.ipynb) | which tokens can be left unread, and what that costs |
# | [6. Distillation](6_distillation.ipynb) | what a small model learns from a large one's doubts |
# | [7. Speculative decoding](7_speculative_decoding.ipynb) | how a wrong guess can make the right answer come sooner |
#
# The chapters can be read in any order, but chapter 1 explains the most on the way.
#
# After them, or between:
# - **Do the exercises**, the kernels last. You need no GPU for any of them.
# - **Read a kernel beside its reference**: `llmopt show flash_attention reference`, then `kernels`.
#   The names are the same.
# - **Measure your own machine**: `llmopt bench ROOM` checks every contender, then times it.
# - **Put two together.** A draft (7) may be quantized (4) or distilled (6); verification reads a paged
#   cache (1); a mixture (3) likes many tokens a step and a draft few users. Predict first.
# - **Serve a model** with the flags that stand in the last section of each lesson, and find your own
#   workload's break-even there.
