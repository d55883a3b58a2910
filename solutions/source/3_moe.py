# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises 3: Mixture of experts
# {{colab_badge}}
#
# You build a mixture of experts that reads only what it needs: who goes where, the sorting, the layer,
# the capacity, the network, and at the end the kernel that runs all experts at once. In between you
# find out why the guide's balancing loss does nothing, why its layer stops, and with how many
# tokens a sparse model reads all it has.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. The loss that does nothing | 3 | 15 |
# | 2. The loss by hand | 2 | 10 |
# | 3. Renormalise or not? | 3 | 15 |
# | 4. The layer that stops | 2 | 12 |
# | 5. Sort the visits | 3 | 15 |
# | 6. The layer, by grouping | 5 | 30 |
# | 7. Who is dropped? | 3 | 15 |
# | 8. How many experts does a batch read? | 3 | 15 |
# | 9. A bias instead of a loss | 3 | 15 |
# | 10. Who sends what to whom? | 3 | 15 |
# | 11. The grouped product in Triton | 5 | 40 |
# | together | 35 | 197 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("moe.balance_loss", 1)` gives the first hint, `2` the second,
# stronger one. Hints cost no points.
#
# A *visit* is one token at one of its `k` experts. `n_tokens` tokens make `n_tokens * k` visits.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmopt_lab.core.memory import load, store
from llmopt_lab.grading import hint
from llmopt_lab.moe import balance, reference
from llmopt_lab.moe.cases import guides_load_balancing_loss, layer
from llmopt_lab.moe.model_routing import model_routing
from llmopt_lab.nn import weights as models
from llmopt_lab.widgets.predict import Predict


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_of(load: Tensor) -> str:
    return "  ".join(f"{share:.2f}" for share in load.tolist())


def real_routing() -> list[Tensor]:
    """(2048, 2) for each of the 4 layers of lab-moe, 8 experts, reading Python it has never seen."""
    lm = models.load("lab-moe", dtype=torch.float32)
    documents = json.loads((models.EMBEDDED / "heldout.json").read_text("utf-8"))["documents"]
    text = torch.cat([lm.encode(document["text"]) for document in documents[:8]])
    return [routing.experts for routing in model_routing(lm.model, text[:2048])]


# %% [markdown]
# ## 1. The loss that does nothing (3 points, 15 minutes)
#
# Left alone, a router sends most tokens to the few experts that happened to be good first, and those
# become better still. The guide adds a loss against it:
#
# ```python
# def load_balancing_loss(router_probs, top_k_indices):
#     """
#     Encourage uniform expert usage
#     """
#     # Compute expert usage
#     expert_usage = torch.zeros(num_experts)
#     for expert_id in range(num_experts):
#         usage = (top_k_indices == expert_id).float().mean()
#         expert_usage[expert_id] = usage
#
#     # Load balancing loss: variance of usage
#     # Lower variance = more balanced
#     load_balance_loss = expert_usage.var()
#
#     return load_balance_loss
#
# # Add to training loss
# total_loss = task_loss + 0.01 * load_balancing_loss(...)
# ```
#
# Let us not be shy, and take a million instead of 0.01.

# %%
moved = Predict(
    "With the coefficient at 1,000,000 instead of 0: by how many percent does the gradient of the "
    "router change?",
    unit="%",
)
moved

# %%
case = layer(64, 16, 8, 8, seed=3)


def router_gradient(coefficient: float) -> Tensor:
    router = case.router.clone().requires_grad_()
    task_loss = reference.moe_layer(case.x, router, *case[2:], k=2).square().mean()
    routing = reference.route(case.x @ router, k=2)
    loss = task_loss + coefficient * guides_load_balancing_loss(routing.scores, routing.experts)
    return torch.autograd.grad(loss, router)[0]


without, million = router_gradient(0.0), router_gradient(1e6)
print(f"largest difference between the two gradients: {(million - without).abs().max()}")
moved.reveal(100 * ((million - without).norm() / without.norm()).item())

# %% [markdown]
# The usage is made of comparisons, `top_k_indices == expert_id`. They have no slope, so autograd has
# nothing to follow; `router_probs`, which would have one, is never used. The loss is printed, it looks
# reasonable, and training ignores it. See what that means: a small mixture learns a task, and its router
# begins with a strong liking for expert 0.

# %%
def train(balance_loss: Callable | None, coefficient: float = 0.1) -> Tensor:
    """The share of all visits that each of 8 experts has after 100 steps."""
    case = layer(256, 16, 8, 8, dtype=torch.float32, seed=5)
    x = case.x.clone()
    x[:, 0] = 1.0  # a constant, so that the router can like an expert whatever the token
    weights = [w.clone() for w in case[1:]]
    weights[0][0] = torch.linspace(8, 0, 8)
    weights = [w.requires_grad_() for w in weights]
    target = x @ random(16, 16, seed=6) / 4
    optimizer = torch.optim.Adam(weights, lr=2e-2)
    for _ in range(100):
        routing = reference.route(x @ weights[0], k=2)
        loss = (reference.moe_layer(x, *weights, k=2) - target).square().mean()
        if balance_loss is not None:
            loss = loss + coefficient * balance_loss(routing.scores, routing.experts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return balance.expert_load(reference.route(x @ weights[0], k=2).experts, 8)


print(f"no loss        {text_of(train(None))}")
print(f"the guide's    {text_of(train(guides_load_balancing_loss))}")
print(f"Switch's       {text_of(train(balance.balance_loss))}")

# %% [markdown]
# The first two rows are the same: nothing was added to any gradient. The third is the loss of the Switch
# Transformer:
#
# ```text
# f_i    expert i's share of all visits, counted; no gradient
# P_i    expert i's probability, mean over the tokens; has the gradient
# loss   n_experts * sum over i of f_i * P_i
# ```
#
# Both sum to 1. One factor looks at what happened, the other can be moved. An expert with a large share
# has a steep slope, so its probability goes down most. With an even load the loss is 1. Write it, with
# no loop over the tokens. `experts` need not be the largest probabilities: something else may have
# chosen.

# %% nbgrader={"grade_id": "moe.balance_loss", "solution": true}
def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Switch's load-balancing loss, a tensor of one number, with a gradient.

    Args:
        probabilities: of the router, (n_tokens, n_experts).
        experts: who was visited, (n_tokens, k) int64. Some experts have no visit.
    """
    ### BEGIN SOLUTION
    n_experts = probabilities.shape[1]
    visits = torch.bincount(experts.flatten(), minlength=n_experts)
    share = visits / experts.numel()
    return n_experts * (share * probabilities.mean(dim=0)).sum()
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.balance_loss-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.balance_loss", balance_loss)

# %% [markdown]
# ## 2. The loss by hand (2 points, 10 minutes)
#
# Pencil and paper: 4 tokens, 4 experts, top-2.
#
# ```text
#          probability of expert
#          0     1     2     3      visits
# token 0  0.5   0.3   0.1   0.1    0, 1
# token 1  0.2   0.6   0.1   0.1    1, 0
# token 2  0.1   0.5   0.3   0.1    1, 2
# token 3  0.6   0.1   0.2   0.1    0, 2
# ```
#
# Three numbers, with `loss = n_experts * sum of f_i * P_i` as in exercise 1:
#
# 1. `loss`.
# 2. `slope`: the derivative of the loss with respect to the probability of *token 0* for *expert 2*.
#    Token 0 does not even visit it.
# 3. `collapsed`: the loss if all tokens visit experts 0 and 1, each with probability 0.5.
#
# Before you compute, a question:

# %%
Predict(
    "Expert 3 has no visit. What is the slope of the loss with respect to its probabilities?",
    answer=0,
    explain="f_3 is 0. Nothing pulls expert 3 up directly; it rises because a softmax sums to 1 and "
    "the others are pushed down.",
)

# %% nbgrader={"grade_id": "moe.by_hand", "solution": true}
def by_hand() -> tuple[float, float, float]:
    """(loss, slope, collapsed)."""
    ### BEGIN SOLUTION
    loss = 4 * (3 * 1.4 + 3 * 1.5 + 2 * 0.7 + 0 * 0.4) / (8 * 4)
    slope = 4 * (2 / 8) / 4
    collapsed = 4 * (0.5 * 0.5 + 0.5 * 0.5)
    return loss, slope, collapsed
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.by_hand-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("moe.by_hand", by_hand)

# %% [markdown]
# ## 3. Renormalise or not? (3 points, 15 minutes)
#
# The guide takes the softmax over all experts, keeps the `k` largest, and uses them as weights. What
# do they sum to?

# %%
kept = Predict("A fresh router, 64 experts, top-2: what do a token's two weights sum to, on average?")
kept

# %%
x = random(1000, 64)
for n_experts in (8, 64):
    router = torch.rand(64, n_experts, generator=torch.Generator().manual_seed(1)) / 4 - 1 / 8
    chosen = (x @ router).softmax(1).topk(2, dim=1).values
    print(f"{n_experts:2} experts, top-2: the weights sum to {chosen.sum(1).mean():.3f}")
kept.reveal(chosen.sum(1).mean().item())

# %% [markdown]
# The layer's output is too small by that factor, and another one for every token. So Mixtral divides
# the `k` weights by their sum. (That is the same as a softmax over the `k` chosen logits: try it on
# paper.) Should one always? The Switch Transformer sends each token to *one* expert. Watch what the
# router learns from:

# %%
x, router = random(200, 16, seed=1), random(16, 8, seed=2)
for k in (1, 2):
    for renormalise in (False, True):
        given = [w.float() for w in layer(1, 16, 8, 8)[2:]]
        leaf = router.clone().requires_grad_()
        routing = reference.route(x @ leaf, k, renormalise=renormalise)
        loss = reference.visit_experts(x, routing, *given).square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        size = f"{gradient.norm():.3f}" if gradient.norm() > 1e-6 else "under 0.000001"
        print(f"top-{k}, {'' if renormalise else 'not '}renormalised: gradient of the router {size}")

# %% [markdown]
# Write the router, with the right rule for each `k`: softmax over all experts, the `k` best, best first,
# and their weights. Of equal probabilities the expert of the lower number comes first; `torch.topk` does
# not promise that, a stable sort does. Equal logits are not rare: think of a token that is repeated, or
# of a router that starts from zeros.
#
# By hand: logits 0, 1, 1 and top-2. The probabilities are 0.155, 0.422, 0.422; experts 1 and 2 with
# weights 0.5 and 0.5. With top-1: expert 1, and its weight is 0.422.

# %% nbgrader={"grade_id": "moe.route", "solution": true}
def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(experts, weights), both (n_tokens, k), best first; the weights carry the gradient.

    Args:
        logits: (n_tokens, n_experts).
        k: experts a token visits. The weights sum to 1, except where that would be wrong.
    """
    ### BEGIN SOLUTION
    scores = logits.softmax(dim=1)
    experts = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    if k > 1:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return experts, weights
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.route-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.route", route)

# %% [markdown]
# ## 4. The layer that stops (2 points, 12 minutes)
#
# The heart of the guide's layer, word for word but for its name and arguments:

# %%
def guides_mixture(x, top_k_probs, top_k_indices, experts):
    output = torch.zeros_like(x)

    for expert_id in range(len(experts)):
        # Find positions where this expert is selected
        expert_mask = (top_k_indices == expert_id)

        if expert_mask.any():
            # Get inputs for this expert
            expert_input = x[expert_mask]

            # Process through expert
            expert_output = experts[expert_id](expert_input)

            # Get corresponding probabilities
            expert_probs = top_k_probs[expert_mask]

            # Weighted sum
            output[expert_mask] += expert_output * expert_probs.unsqueeze(-1)

    return output


runs = Predict(
    "x is (2, 16, 64), top-2 of 8 experts. What does the guide's layer do?",
    choices=["runs and is right", "runs and is wrong", "stops with an error"],
)
runs

# %%
x = random(2, 16, 64)
probs, indices = random(2, 16, 8, seed=1).softmax(-1).topk(2, dim=-1)
try:
    guides_mixture(x, probs, indices, [torch.tanh] * 8)
except IndexError as error:
    print("IndexError:", error)
runs.reveal("stops with an error")

# %% [markdown]
# It stops. One line more and two words changed are enough to mend it. Copy it, find
# them, and keep the idea: an expert computes its visitors and nobody else.
#
# You are graded on the output and on the *rows that pass through the experts*: one for each visit.

# %% nbgrader={"grade_id": "moe.mixture", "solution": true}
def mixture(
    x: Tensor, top_k_probs: Tensor, top_k_indices: Tensor, experts: list[Callable]
) -> Tensor:
    """Each token's sum of probability * expert(token) over its k experts, (batch, n, d).

    Args:
        x: (batch, n, d).
        top_k_probs, top_k_indices: (batch, n, k). The k experts of a token are different.
        experts: each maps (rows, d) to (rows, d).
    """
    ### BEGIN SOLUTION
    output = torch.zeros_like(x)
    for expert_id in range(len(experts)):
        expert_mask = top_k_indices == expert_id
        visitors = expert_mask.any(dim=-1)  # (batch, n)
        if visitors.any():
            expert_output = experts[expert_id](x[visitors])
            expert_probs = top_k_probs[expert_mask]  # a visitor has one, in the same order
            output[visitors] += expert_output * expert_probs.unsqueeze(-1)
    return output
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.mixture-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("moe.mixture", mixture)

# %% [markdown]
# ## 5. Sort the visits (3 points, 15 minutes)
#
# That loop asks, expert by expert, "does anyone want you?", and on a GPU `.any()` stops and waits for
# the answer, once an expert and layer. The better question is asked once: *sort all visits by expert*.
# Then each expert's visitors lie next to each other, and one matrix product serves them all.
#
# Visits are numbered `token * k + choice`. Three tokens, top-2 of 3 experts:
#
# ```text
# token       0     1     2
# experts    2  0  0  1  2  1
# visit      0  1  2  3  4  5
#
# order      1  2  3  5  0  4     the visit at each sorted place
# place      4  0  1  2  5  3     where each visit went
# starts     0  2  4  6           where each expert's places begin, and the end
# ```
#
# Expert 0 has the places 0 and 1, where visits 1 and 2 lie: `starts[e]` up to, and without,
# `starts[e + 1]`. `order` leads there, `place` leads back: it is the inverse permutation. An expert's
# visits keep their order, and an expert without visits has an empty range.

# %% nbgrader={"grade_id": "moe.group", "solution": true}
def group(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, place, starts): (n_visits,), (n_visits,) and (n_experts + 1,), all int64.

    Args:
        experts: (n_tokens, k) int64. Any expert may have no visit, also the last one.
    """
    ### BEGIN SOLUTION
    visits = experts.flatten()
    order = visits.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = torch.bincount(visits, minlength=n_experts).cumsum(0)
    return order, place, torch.cat([ends.new_zeros(1), ends])
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.group-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.group", group)

# %% [markdown]
# ## 6. The layer, by grouping (5 points, 30 minutes)
#
# Now the layer itself, as kernels do it. The weights of all experts lie in slow memory, most of them
# unused in a step; so do `x`, `out`, and `y`, which has one row for each visit.
#
# ```text
# for each expert that has visits:
#     read its two matrices, and the tokens that visit it
#     write what it makes of them to its rows of y     in sorted order
# for each choice:
#     read every token's row of y, weigh it, add it    by the inverse
# write out
# ```
#
# - `load("X", x, tokens)` returns `x[tokens]` and counts the bytes; so do `load("W_gate_up", w_gate_up,
#   e)`, `load("W_down", w_down, e)` and `load("Y", y, places)`.
# - `store("Y", y, slice(start, end), rows)` and `store("out", out, slice(0, len(x)), total)` write.
# - `reference.group(experts, n_experts)` is a finished exercise 5, with `.order`, `.place` and `.starts`;
#   `reference.swiglu(rows, gate_up, down)` is one expert.
# - `experts` and `weights` are small and may be used as they are.
#
# You are graded on the result and on the bytes. By hand, in float64 (8 bytes): 3 tokens, top-2, `d` 4,
# `d_ff` 2. An expert is 4 * 4 + 2 * 4 = 24 numbers, 192 bytes; a row of x, y or out is 32. The 6 visits
# go to 2 of the 8 experts: 2 * 192 + 6 * 32 + 6 * 32 = 768 bytes are read, and 6 * 32 + 3 * 32 = 288
# written. The weights of all 8 experts would have been 1,536.

# %% nbgrader={"grade_id": "moe.moe_layer", "solution": true}
def moe_layer(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor,
    y: Tensor, out: Tensor,
) -> None:
    """Each token's sum over its k experts of weight * swiglu(token), stored to `out`.

    Args:
        x: (n_tokens, d).
        experts, weights: (n_tokens, k), of the router.
        w_gate_up: (n_experts, d, 2 * d_ff). w_down: (n_experts, d_ff, d).
        y: (n_tokens * k, d), to be stored as "Y": the result of each visit, sorted by expert.
        out: (n_tokens, d), to be stored as "out".
    """
    ### BEGIN SOLUTION
    n_tokens, k = experts.shape
    grouping = reference.group(experts, len(w_gate_up))
    starts = grouping.starts.tolist()
    for e in range(len(w_gate_up)):
        start, end = starts[e], starts[e + 1]
        if start == end:
            continue
        gate_up, down = load("W_gate_up", w_gate_up, e), load("W_down", w_down, e)
        rows = load("X", x, grouping.order[start:end] // k)
        store("Y", y, slice(start, end), reference.swiglu(rows, gate_up, down))
    place = grouping.place.view(n_tokens, k)
    total = torch.zeros_like(x)
    for choice in range(k):
        total += weights[:, choice, None] * load("Y", y, place[:, choice])
    store("out", out, slice(0, n_tokens), total)
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.moe_layer-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("moe.moe_layer", moe_layer)

# %% [markdown]
# ## 7. Who is dropped? (3 points, 15 minutes)
#
# Experts with ragged loads are awkward for hardware that wants equal shapes. So GShard and Switch give
# each expert room for a fixed number of visits, its *capacity*, and drop what does not fit:
#
# ```text
# capacity = ceil(factor * n_tokens * k / n_experts)
# ```
#
# Factor 1 is just enough for an even load. A dropped visit adds nothing; the token lives on in the
# residual stream. What does that cost with a model that was trained with a balancing loss?

# %%
dropped = Predict(
    "lab-moe reads 2,048 tokens of Python, factor 1.25, all layers: what share of the visits is "
    "dropped?",
    unit="%",
    tolerance=0.2,
)
dropped

# %%
def dropped_share(experts: Tensor, factor: float) -> float:
    scores = torch.zeros(len(experts), 8, device=experts.device)
    routing = reference.Routing(experts, torch.ones_like(experts, dtype=scores.dtype), scores)
    capacity = reference.capacity_of(len(experts), 8, experts.shape[1], factor)
    return (reference.drop_overflow(routing, capacity).experts < 0).double().mean().item()


real = real_routing()
chance = [random(2048, 8, seed=s).topk(2, dim=1).indices for s in range(4)]
for factor in (1.0, 1.25, 1.5, 2.0):
    shares = [sum(dropped_share(e, factor) for e in layers) / 4 for layers in (real, chance)]
    print(f"factor {factor:4}: lab-moe {shares[0]:6.1%}, experts chosen by chance {shares[1]:6.1%}")
dropped.reveal(100 * sum(dropped_share(e, 1.25) for e in real) / 4)

# %% [markdown]
# By chance alone a factor of 1.25 loses nobody. But training balances the mean over many texts, and the
# tokens of one text are alike.
#
# Who goes first? The *first choices of all tokens*, in the order of the tokens, then all second choices
# in the same order, and so on. By hand: 4 tokens, 2 experts, top-2, factor 0.75: the capacity is
# 0.75 * 4 * 2 / 2 = 3.
#
# ```text
# token           0  1  2  3
# first choice    0  0  0  1    expert 0 is full, expert 1 has one
# second choice   1  1  1  0    tokens 0 and 1 fit, 2 and 3 do not
# ```

# %% nbgrader={"grade_id": "moe.kept_visits", "solution": true}
def kept_visits(experts: Tensor, n_experts: int, factor: float) -> Tensor:
    """(n_tokens, k) bool: True where the visit is kept.

    Args:
        experts: (n_tokens, k) int64, best first.
        factor: of the capacity.
    """
    ### BEGIN SOLUTION
    n_tokens, k = experts.shape
    capacity = math.ceil(factor * n_tokens * k / n_experts)
    in_turn = experts.T.flatten()  # (n_visits,): all first choices, then all second ones
    arrived = torch.nn.functional.one_hot(in_turn, n_experts).cumsum(dim=0)
    number = arrived.gather(1, in_turn[:, None])[:, 0]  # 1 for an expert's first visit
    return (number <= capacity).view(k, n_tokens).T
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.kept_visits-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.kept_visits", kept_visits)

# %% [markdown]
# ## 8. How many experts does a batch read? (3 points, 15 minutes)
#
# *Needs section 7 of the lesson.*
#
# "160x reduction", says the guide: 1.6 trillion parameters, of which one token meets few. In decoding,
# time is bytes read. One token of Mixtral 8x7B reads 2 of 8 experts in a layer. But who serves one
# user? With many tokens in a step, each chooses its own two.

# %%
mixtral = Predict(
    "16 tokens in a step, each choosing 2 of 8 experts evenly: how many experts of a layer are read?",
    unit="experts",
    tolerance=0.03,
)
mixtral

# %%
rng = torch.Generator().manual_seed(0)
n_steps = 5_000
real = real_routing()
print("tokens    by chance    lab-moe, neighbouring tokens of a text")
for n in (1, 4, 16, 64):
    chosen = torch.rand(n_steps, n, 8, generator=rng).topk(2, dim=2).indices.flatten(1)
    touched = torch.zeros(n_steps, 8).scatter(1, chosen, 1.0).sum(1).mean()
    parts = [part for experts in real for part in experts.split(n)]
    measured = sum(len(part.unique()) for part in parts) / len(parts)
    print(f"{n:6} {touched:12.2f} {measured:10.2f}")
    if n == 16:
        mixtral.reveal(touched.item())

# %% [markdown]
# With 16 tokens almost all experts are read. The sparse model then reads as much as a dense one of its
# whole size, once for 16 tokens. Neighbouring tokens of a text are alike and touch fewer.
#
# Derive the number by chance. Every token chooses `k` *different* experts, all choices equally likely,
# and tokens do not care for each other. Start with one expert and one token: with what probability is
# it not visited? By hand, 2 tokens, 2 experts, top-1: both the same in half of the cases, so
# (1 + 2) / 2 = 1.5.
#
# And the bytes: an expert is a SwiGLU with matrices gate, up and down of `d * d_ff` numbers each, in 16
# bits, and each expert that is touched is read once.

# %% nbgrader={"grade_id": "moe.read_per_step", "solution": true}
def read_per_step(
    n_tokens: int, n_experts: int, k: int, d: int, d_ff: int
) -> tuple[float, float]:
    """(touched, bytes) of one layer in one step, both expected values.

    touched: different experts that n_tokens tokens visit. bytes: of the weights of those.
    """
    ### BEGIN SOLUTION
    missed = (1 - k / n_experts) ** n_tokens
    touched = n_experts * (1 - missed)
    return touched, touched * 3 * d * d_ff * 2
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.read_per_step-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.read_per_step", read_per_step)

# %% [markdown]
# ## 9. A bias instead of a loss (3 points, 15 minutes)
#
# A balancing loss pulls the router away from what is best for the task. DeepSeek-V3 does without: each
# expert has a *bias* that is added to its scores when the experts are chosen, and for nothing else. No
# gradient reaches it. After each step it moves by a fixed `rate`: up if the expert had fewer visits than
# the mean, down if it had more, not at all if it had just the mean.
#
# How long does that take? Here the scores of 2,000 tokens stay as they are, with a liking for low
# numbers:

# %%
scores = torch.sigmoid(random(2000, 8) + torch.linspace(2, -2, 8))
bias = torch.zeros(8)
for step in range(301):
    experts = reference.highest(scores + bias, 2)
    if step in (0, 10, 100, 300):
        print(f"step {step:3}   load {text_of(balance.expert_load(experts, 8))}")
    bias = balance.moved_bias(bias, experts, rate=0.01)
print(f"the bias  {text_of(bias)}")

# %% [markdown]
# Write the step. The scores are sigmoids, one for each expert by itself; the weights of a token are
# its chosen scores divided by their sum. By hand, with scores 0.6 and 0.4, bias -0.3 and 0, top-1:
# 0.3 against 0.4 chooses expert 1. Which number is its weight made of?
#
# Count visits in whole numbers: rounded shares may miss an even load by a last bit.

# %% nbgrader={"grade_id": "moe.bias_step", "solution": true}
def bias_step(
    scores: Tensor, bias: Tensor, k: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts, weights, new bias): (n_tokens, k), (n_tokens, k) and (n_experts,).

    Args:
        scores: sigmoids, (n_tokens, n_experts), no two sums with the bias equal.
        bias: (n_experts,).
    """
    ### BEGIN SOLUTION
    n_experts = scores.shape[1]
    experts = (scores + bias).topk(k, dim=1).indices
    weights = scores.gather(1, experts)
    weights = weights / weights.sum(dim=1, keepdim=True)
    visits = torch.bincount(experts.flatten(), minlength=n_experts)
    missing = experts.numel() - n_experts * visits  # above 0 where there are fewer than the mean
    return experts, weights, bias + rate * missing.sign()
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.bias_step-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.bias_step", bias_step)

# %% [markdown]
# ## 10. Who sends what to whom? (3 points, 15 minutes)
#
# *Needs section 8 of the lesson.*
#
# DeepSeek-V3 has 256 experts in a layer: they do not fit on one GPU. With *expert parallelism* each rank
# (one process, one GPU) holds neighbouring experts, as many as the others, and tokens of its own. For
# each visit the token's row travels to the rank of the expert, and the result travels back: two
# all-to-alls in a layer. Before the first one every rank must know how much comes from whom.
#
# Two ranks, 4 experts, top-2; rank 0 holds experts 0 and 1:
#
# ```text
# rank 0 has tokens that visit    0 1    0 2    3 1
# rank 1 has a token that visits  2 0
#
#                 to rank 0   to rank 1
# sends  rank 0           4           2
#        rank 1           1           1
# ```
#
# On the diagonal stands what stays at home. With rows of `d` = 10 numbers of 16 bits, 2 + 1 visits
# leave: 3 * 10 * 2 = 60 bytes there, and 60 bytes back.

# %%
Predict(
    "8 ranks, experts chosen evenly: what share of the visits leaves its rank?",
    answer=87.5,
    unit="%",
    tolerance=0.01,
    explain="1 - 1 / 8. With more ranks nearly everything travels, and the busiest rank sets the time.",
)

# %% nbgrader={"grade_id": "moe.exchange", "solution": true}
def exchange(experts: list[Tensor], n_experts: int, d: int) -> tuple[Tensor, int]:
    """(sends, bytes): sends[s, r] visits (n_ranks, n_ranks) int64 go from rank s to rank r.

    bytes: over the network, there and back, of all ranks; 2 for each of the d numbers of a row.

    Args:
        experts: of the tokens of each rank, (n_tokens, k) int64. A rank may have no tokens.
        n_experts: a multiple of the number of ranks.
    """
    ### BEGIN SOLUTION
    n_ranks = len(experts)
    per_rank = n_experts // n_ranks
    sends = torch.stack(
        [torch.bincount(part.flatten() // per_rank, minlength=n_ranks) for part in experts]
    )
    leaving = int(sends.sum() - sends.trace())
    return sends, 2 * leaving * d * 2
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.exchange-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("moe.exchange", exchange)

# %% [markdown]
# ## 11. The grouped product in Triton (5 points, 40 minutes)
#
# *Needs section 6 of the lesson.*
#
# In exercise 6 experts run one after the other. With few visitors each of them leaves most of a GPU idle.
# A *grouped* product runs all of them in one launch: the grid has programs for every expert, and each
# program finds its own rows.
#
# ```text
# program (tile, column tile, expert):
#     place = starts[expert] + tile * ROWS + 0 .. ROWS - 1
#     token of each place = visits[place] // K       x is not sorted
#     for each STEP of the width D:
#         acc += x[token, step] @ w[expert, step, columns]
#     y[place, columns] = acc                        y is sorted
# ```
#
# How many visits an expert has is known to the GPU alone, so the grid is made for the worst case: one
# expert with all visits. Programs beyond an expert's last visit have nothing to do.
#
# All tensors are contiguous: element (e, i, j) of a tensor (A, B, C) is at `(e * B + i) * C + j`. The
# product is `tl.dot(x, w, input_precision="ieee")`; without that word a GPU rounds float32 to 10 bits and
# misses the tolerance.
#
# Four questions to answer before you write. Whose rows follow an expert's last row in y? What follows a
# token's last number in x? What does a program of an expert without visits do? What follows the last
# column of a row of y?
#
# You are graded in float32, on small and uneven shapes: experts with 0, 1 or 40 visits, a width of 20 in
# steps of 16, 24 columns in tiles of 16. You need no GPU: without one Triton interprets your kernel on
# the CPU.

# %% nbgrader={"grade_id": "moe.grouped_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def grouped_kernel(
    x_ptr,  # (n_tokens, D) float32
    w_ptr,  # (n_experts, D, N) float32
    y_ptr,  # (n_visits, N) float32: x[token] @ w[expert], visits sorted by expert
    visits_ptr,  # (n_visits,) int32: the visit at each place, token * K + choice
    starts_ptr,  # (n_experts + 1,) int32: expert e has the places [starts[e], starts[e + 1])
    K: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):
    """One program: at most ROWS visits of one expert times COLS columns of its matrix."""
    expert = tl.program_id(2)
    place = tl.load(starts_ptr + expert) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)  # (COLS,)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    ### BEGIN SOLUTION
    place_ok = place < tl.load(starts_ptr + expert + 1)
    token = tl.load(visits_ptr + place, place_ok, other=0) // K  # (ROWS,)
    for first in range(0, D, STEP):
        d = first + tl.arange(0, STEP)  # (STEP,)
        x = tl.load(
            x_ptr + token[:, None] * D + d[None, :], place_ok[:, None] & (d < D)[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + (expert * D + d[:, None]) * N + col[None, :],
            (d < D)[:, None] & (col < N)[None, :],
            other=0.0,
        )
        acc += tl.dot(x, w, input_precision="ieee")
    at = place[:, None] * N + col[None, :]
    tl.store(y_ptr + at, acc, place_ok[:, None] & (col < N)[None, :])
    ### END SOLUTION


# %% nbgrader={"grade_id": "moe.grouped_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("moe.grouped_kernel", grouped_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/3_moe.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/3_moe.ipynb` has one answer to each exercise. Yours may look different.
#
# The kernels of this course are in `llmopt_lab/moe/kernels.py`. Two of them are yours with something
# added: one makes gate and up at once and their SwiGLU before anything is stored, the other scatters the
# rows back to their tokens with their weights. They also keep a list of the tiles that have work, so
# that few programs start for nothing.
