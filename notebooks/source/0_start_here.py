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
# This page shows you the tools that every chapter uses. It takes 15 minutes.
#
# | section | minutes |
# |---|---|
# | 1. This session | 1 |
# | 2. A prediction | 2 |
# | 3. A moving picture | 3 |
# | 4. A model that writes | 5 |
# | 5. Exercises, hints and points | 3 |
# | 6. Where to go | 1 |
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
# ## 4. A model that writes (5 minutes)
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
# ## 5. Exercises, hints and points (3 minutes)
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
# - **A second opinion:** `solutions` has the same notebook, solved. There is more than one right
#   answer; a check accepts all of them.

# %% [markdown]
# ## 6. Where to go (1 minute)
#
# | chapter | you will be able to say |
# |---|---|
# | 1. Paged attention | why a server runs out of memory with half of it unused, and what fixes that |
# | 2. Flash attention | why an algorithm that computes more can finish sooner |
# | 3. Mixture of experts | what a model with a hundred experts really reads for one token |
# | 4. Quantization | which numbers survive with 4 bits, and what a scale is for |
# | 5. Sparse attention | which tokens can be left unread, and what that costs |
# | 6. Distillation | what a small model learns from a large one's doubts |
# | 7. Speculative decoding | how a wrong guess can make the right answer come sooner |
#
# The chapters can be read in any order, but chapter 1 explains the most on the way. The README says
# which of them are there yet.
