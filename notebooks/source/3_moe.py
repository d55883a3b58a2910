# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 3. Mixture of experts
# {{colab_badge}}
#
# In a dense model every token passes all weights, so twice the weights are twice the work a token. A mixture
# of experts breaks this link: many feed-forward layers stand side by side, a small router picks a few
# for each token, and the others are not computed and not read. After this chapter you can write
# the layer, say how many bytes a step reads before you run it, keep all experts busy, and find the
# bug in somebody else's.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 20 |
# | 3. What the guide says, measured | 25 |
# | 4. Three trainings | 15 |
# | 5. A real model | 20 |
# | 6. The kernel | 15 |
# | 7. Where it loses | 15 |
# | 8. Experts on several machines | 10 |
# | 9. In production, and what to remember | 5 |
#
# The exercises are in `exercises/3_moe.ipynb`. Do them after section 4, or at the end.

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
# Mixtral 8x7B has 32 layers with 8 experts each, and a token visits 2 experts a layer. So while one
# user's text is written, each new token reads about 27 % of the weights, and that is why it is fast.
# Now 16 users share the model: a step makes 16 tokens, one for each user.
#
# Lock in your guess. Section 7 computes the answer.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "One token reads 27 % of Mixtral's weights. How many per cent does a step of 16 tokens read?",
    unit="%",
    tolerance=0.03,
)
guess

# %% [markdown]
# ## 2. The idea, step by step (20 minutes)
#
# Six tokens of width 4, four experts, two visits a token. The router is the identity here, so a
# token's four numbers *are* its scores for the four experts: token 0 is (1, 2, 0, −1). An expert
# takes at most 4 visits, which is its *capacity*. Step through it.

# %%
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.moe import moe_layer
from llmopt_lab.moe.cases import toy
from llmopt_lab.moe.view import frames
from llmopt_lab.widgets.player import Player

layer = toy()
with recording() as trace:
    moe_layer(*layer, k=2, capacity=4)
Player(frames(trace), title="Six tokens, four experts, capacity 4")

# %% [markdown]
# *Only the picture answers these:*
# - Tokens 2 and 3 are dropped by expert 1, and tokens 4 and 5, which come later, are not. Why?
# - Which quarter of the weights is never read, and why?
# - An expert is read once. How many tokens share each reading?
#
# Check one token by hand: token 0 likes expert 1 (score 2) and expert 0 (score 1) most. A softmax over
# these two gives $e^2 / (e^2 + e^1) = 0.73$ and 0.27. It makes no difference whether the softmax runs
# over all four scores first, if the two that are chosen are divided by their sum afterwards:

# %%
scores = layer.x[0]
p = scores.softmax(0)
print("softmax over all four:        ", [round(x, 4) for x in p.tolist()])
print("the two best, over their sum: ", [round(x, 4) for x in (p[:2] / p[:2].sum()).tolist()])
print("softmax over the two best:    ", [round(x, 4) for x in scores[:2].softmax(0).tolist()])

# %% [markdown]
# **A visit** is one token at one of its experts. The whole layer is four verbs: *route* (who visits
# whom), *group* (sort the visits, so that those of one expert lie together), *visit* (run each expert
# once on all its visitors), *combine* (each token fetches its results and sums them by weight).
# The second and the fourth undo each other: a permutation and its inverse. Without its `record` lines:

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.moe import reference

print(without_records(inspect.getsource(reference.group)))
source = without_records(inspect.getsource(reference.visit_experts))
print(source[source.index("    grouping = ") :])

# %% [markdown]
# Every `load` and `store` is a transfer between memory and chip. Is it right? Compare with the
# definition, every token through every expert, and the counted bytes with the formula:

# %%
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.moe import route
from llmopt_lab.moe.cases import layer as random_layer
from llmopt_lab.moe.reference import swiglu
from llmopt_lab.moe.sizes import layer_traffic


def dense_loop(x, router, w_gate_up, w_down, k):
    """Every token through every expert, unchosen ones times zero."""
    routing = route(x @ router, k)
    weights = torch.zeros_like(routing.scores).scatter(1, routing.experts, routing.weights)
    results = torch.stack([swiglu(x, a, b) for a, b in zip(w_gate_up, w_down, strict=True)], dim=1)
    return (weights[..., None] * results).sum(1)


case = random_layer(37, 12, 7, 5)
with recording() as counted:
    out = moe_layer(*case, k=2)
print("equal to the dense loop within 1e-12:", bool((out - dense_loop(*case, k=2)).abs().max() < 1e-12))
read, written = (counted.total("nbytes", kind) for kind in (Load, Store))
formula = layer_traffic(
    n_tokens=37, n_experts=5, d=12, d_ff=7, n_visits=74, n_touched=5, itemsize=8
)
print(f"bytes read {read:,} and written {written:,}; by the formula {formula.read:,} and {formula.written:,}")

# %% [markdown]
# **The other way round.** In *expert choice* each expert picks its best tokens instead, equally many
# each. No expert is ever full. But a token may be picked by nobody, or by all:

# %%
from llmopt_lab.moe import expert_choice_layer
from llmopt_lab.moe.expert_choice import choose_tokens

with recording() as trace:
    expert_choice_layer(*layer, capacity=2)
for n in (3, 6):  # the router is the identity: tokens are logits
    print(f"of tokens 0 to {n - 1} expert 2 takes", choose_tokens(layer.x[:n], 2).tokens[2].tolist())
Player(frames(trace), title="Experts choose two tokens each")

# %% [markdown]
# *Only the picture answers this:* which tokens does nobody take?
#
# Could a model that writes text do this? While there are tokens 0 to 2 alone, expert 2 takes token 0. Then
# token 3 comes and has its place. So what becomes of token 0 depends on a token that is not there yet.
#
# ## 3. What the guide says, measured (25 minutes)
#
# The written guide that this course grew out of begins with cost.
#
# **"GPT-3 (175B): O(175B) operations per token."** A multiplication and an addition a weight: 350 billion.
# O() of a constant says nothing. **"Switch Transformer (1.6T) ... O(10B) operations (160x reduction!)"**
# and **"Mixtral 8x7B: 8 experts, top-2 routing (47B active)"**: count, from the models' own sizes.

# %% id="takeaway"
from llmopt_lab.moe.sizes import PUBLISHED, ModelSize

print(f"{'':14}{'all, billions':>14}{'active':>9}{'all / active':>14}{'GiB in 16 bits':>16}")
for name, config in PUBLISHED.items():
    size = ModelSize.from_hf(config)
    print(f"{name:14}{size.total / 1e9:14,.2f}{size.active / 1e9:9.2f}{size.total / size.active:14.1f}"
          f"{2 * size.total / 2**30:16,.0f}")

mixtral = ModelSize.from_hf(PUBLISHED["Mixtral 8x7B"])
experts = mixtral.n_moe_layers * mixtral.n_experts * mixtral.per_expert
print(f"\nMixtral: experts {experts / 1e9:.2f} billion, all else {mixtral.always / 1e9:.2f}; "
      f"1/8 of the experts with all else {(experts / 8 + mixtral.always) / 1e9:.2f}")

# %% [markdown]
# - 47 billion is Mixtral's *total*; 12.9 are active.
# - "8x7B" is 8 models of 7.2 billion that share everything but their experts. So they are 46.7 together,
#   not 56.
# - Switch-C has 909 times as many weights as are active. That counts its encoder and its decoder as active, and a
#   token passes one of them: a token meets fewer still. The guide's 160 is 1600 / 10, where 10 billion is not this
#   model's number. It also compares a model with itself: the fair question is how large a *dense* model of the same
#   quality would be. By the guide's own numbers, against GPT-3, it is 175 / 10.
# - **Nothing of this is less memory.** All experts must be held, because any may be next.
#
# **The layer.** As printed in the guide, with the `FeedForward` that it uses and never defines:

# %%
import torch.nn.functional as F
from torch import nn


class FeedForward(nn.Sequential):
    def __init__(self, d_model):
        super().__init__(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))


class GuidesMixtureOfExperts(nn.Module):
    def __init__(self, d_model, num_experts=8, top_k=2):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = nn.Linear(d_model, num_experts)
        self.experts = nn.ModuleList([FeedForward(d_model) for _ in range(num_experts)])

    def forward(self, x):
        router_probs = F.softmax(self.router(x), dim=-1)
        top_k_probs, top_k_indices = torch.topk(router_probs, self.top_k, dim=-1)
        output = torch.zeros_like(x)
        for expert_id in range(self.num_experts):
            expert_mask = (top_k_indices == expert_id)
            if expert_mask.any():
                expert_input = x[expert_mask]
                expert_output = self.experts[expert_id](expert_input)
                expert_probs = top_k_probs[expert_mask]
                output[expert_mask] += expert_output * expert_probs.unsqueeze(-1)
        return output


torch.manual_seed(0)
for d_model in (64, 2):
    guides = GuidesMixtureOfExperts(d_model)
    try:
        guides(torch.randn(2, 16, d_model))
    except (IndexError, RuntimeError) as refused:
        print(f"d_model {d_model:2}: {type(refused).__name__}: {refused}")

# %% [markdown]
# It stops. The mask is (batch, tokens, *k*) and `x` is (batch, tokens, *d_model*). Where the two last sizes happen
# to be equal, as in the second try, it stops one line later. The smallest repair asks for the *token*, whichever of
# its choices it was:

# %%
class Repaired(GuidesMixtureOfExperts):
    def forward(self, x):
        top_k_probs, top_k_indices = torch.topk(F.softmax(self.router(x), dim=-1), self.top_k, dim=-1)
        output = torch.zeros_like(x)
        for expert_id in range(self.num_experts):
            visits = top_k_indices == expert_id
            tokens = visits.any(-1)
            output[tokens] += self.experts[expert_id](x[tokens]) * top_k_probs[visits].unsqueeze(-1)
        return output


x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
repaired = Repaired(64).double()
with torch.no_grad():
    out = repaired(x.double())
    p, chosen = F.softmax(repaired.router(x.double()), -1).topk(2)
    all_results = torch.stack([expert(x.double()) for expert in repaired.experts], dim=2)
    want = sum(p[..., i, None] * all_results[torch.arange(2)[:, None], torch.arange(16), chosen[..., i]]
               for i in range(2))
right = torch.allclose(out, want, rtol=1e-12, atol=1e-12)
print(f"repaired, beside every token through its experts: {'right' if right else 'WRONG'}")

# %% [markdown]
# **The weights of the visits.** The guide takes the two probabilities as they come. They do not sum to 1,
# and the more experts there are, the less is left of the layer:

# %%
for n_experts in (8, 64):
    sums, norms = [], []
    for seed in range(20):
        x, router, *experts = random_layer(256, 64, 32, n_experts, dtype=torch.float32, seed=seed, peak=0.6)
        plain, summed = (route(x @ router, 2, renormalise=r) for r in (False, True))
        sums.append(float(plain.weights.sum(1).mean()))
        outs = [reference.visit_experts(x, r, *experts).norm() for r in (plain, summed)]
        norms.append(float(outs[0] / outs[1]))
    print(f"{n_experts:2} experts, a router as at the start of training: the two probabilities sum to "
          f"{sum(sums) / 20:.2f}; output {sum(norms) / 20:.2f} of the renormalised one")

logits = torch.randn(256, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
value = torch.randn(256, 8, generator=torch.Generator().manual_seed(3))  # of each expert, for the task
for k in (1, 2):
    for renormalise in (False, True):
        r = route(logits, k, renormalise=renormalise)
        (gradient,) = torch.autograd.grad((r.weights * value.gather(1, r.experts)).sum(), logits)
        size = gradient.norm()  # of float32 rounding alone, 1e-6
        print(f"top-{k}, {'renormalised' if renormalise else 'as it is':12}: the router's gradient "
              f"{'is rounding only' if size < 1e-5 else f'{size:.1f}'}")

# %% [markdown]
# Mixtral and most others divide by the sum. With *one* visit a token you must not: the weight would
# be 1 whatever the router says, and the router would learn nothing. That is why `route` renormalises
# from `k = 2` on.
#
# **"Load balancing loss: variance of usage."** With `num_experts`, which the guide never defines:

# %%
from llmopt_lab.moe.balance import balance_loss
from llmopt_lab.moe.cases import guides_load_balancing_loss

source = inspect.getsource(guides_load_balancing_loss)
print(source[source.index("    num_experts") :])

x, router, w_gate_up, w_down = random_layer(512, 16, 8, 8, dtype=torch.float32)
router = (router + torch.tensor([2.0, 2, 1, 0, 0, 0, 0, 0]) * x.mean(0)[:, None]).requires_grad_()


def router_gradient(weight, balance):
    routing = route(x @ router, 2)
    task = reference.visit_experts(x, routing, w_gate_up, w_down).square().mean()
    return torch.autograd.grad(task + weight * balance(routing.scores, routing.experts), router)[0]


without = router_gradient(0, guides_load_balancing_loss)
for name, balance in (("the guide's", guides_load_balancing_loss), ("Switch's", balance_loss)):
    for weight in (0.01, 1e6):
        moved = (router_gradient(weight, balance) - without).norm() / without.norm()
        print(f"{name:11} loss times {weight:9,.2f}: the router's gradient changes by {moved:.1e} of itself")

even = balance_loss(torch.full((8, 8), 1 / 8), torch.arange(8)[:, None])
print(f"\nSwitch's loss of 8 experts, evenly visited: {even:.1f}")
for k in (1, 2):  # all tokens at the same k experts, which have all the probability
    collapsed = balance_loss((torch.arange(8) < k).float().expand(64, 8) / k, torch.arange(k).expand(64, k))
    print(f"at collapse, top-{k}: {collapsed:.1f}")

# %% [markdown]
# A million times nothing is nothing. The guide's loss is made from comparisons of whole numbers,
# `==`, and a comparison has no gradient; the probabilities, which have one, are an argument that is
# never used. The model trains, the number is logged, and no weight ever hears of it.
#
# Switch's loss is $E \sum_e f_e P_e$: $f_e$ is the share of visits (no gradient), $P_e$ the mean probability
# (with gradient). A busy expert has a large $f_e$, so its probability is pushed down. It is 1 when all are even,
# whatever the number of experts, and $E/k$ when all tokens visit the same $k$: 8 with one visit, 4 with two. The
# guide's variance is at most $1/E$.
#
# **What the guide leaves out.** Capacity: real systems that allot fixed room for each expert drop visits
# beyond it. How many depends on how even the router is:

# %%
from llmopt_lab.moe import capacity_of
from llmopt_lab.moe.records import NOBODY
from llmopt_lab.moe.reference import drop_overflow

rng = torch.Generator().manual_seed(0)
logits = torch.randn(4096, 8, generator=rng)
skewed = logits + torch.tensor([2.0, 1.5, 1, 0.5, 0, 0, 0, 0])
print("capacity factor   even router drops   skewed router drops")
for factor in (1.0, 1.25, 1.5, 2.0):
    capacity = capacity_of(4096, 8, 2, factor)
    shares = [float((drop_overflow(route(x, 2), capacity).experts == NOBODY).float().mean())
              for x in (logits, skewed)]
    print(f"{factor:15} {shares[0]:19.2%} {shares[1]:21.2%}")

# %% [markdown]
# And precision. Two experts with nearly equal scores are an ordinary thing. In 16 bits the
# rounding decides between them, and another expert is not a slightly different result:

# %%
x, router, *_ = random_layer(4000, 512, 1, 64, dtype=torch.float32, peak=1.0)
x, router = x.bfloat16(), router.bfloat16()
exact = route(x.double() @ router.double(), 2).experts.sort(1).values
for name, logits in (("bfloat16", (x @ router).float()), ("float32", x.float() @ router.float())):
    changed = (route(logits, 2).experts.sort(1).values != exact).any(1).float().mean()
    print(f"router in {name:8}: {changed:.2%} of the tokens visit other experts than in float64")

# %% [markdown]
# | the guide says | counted or measured here, or cited where it says so |
# |---|---|
# | O(175B) operations for GPT-3 | 350 billion a token; O() of a constant is no statement |
# | Switch: about 10B active, 160x | 1.73B active, 909x; memory is not reduced |
# | GShard: no number | cited from its paper: 600B parameters, 2,048 experts, top-2 |
# | Mixtral: 47B active | 47B in all, 12.9B active |
# | `x[expert_mask]` | `IndexError`; with d_model = k a `RuntimeError` one line later |
# | weights as they come from the softmax | sum to 0.44 (8 experts) or 0.10 (64) at the start; renormalise if k ≥ 2 |
# | a load balancing loss | no gradient: a million times it changes nothing |
# | `.any()` for each expert | right; on a GPU the host waits for the device there, and again where a mask indexes (not timed here) |
# | nothing about capacity, float32 routers | see the two tables above |

# %% [markdown]
# ## 4. Three trainings (15 minutes)
#
# Does balance take care of itself? Here a small language model learns Python for some seconds, three
# times at once: two layers, 8 experts, 2 visits. All three start from the same weights and read the same
# text. `none` does nothing about balance. `loss` adds 0.01 times Switch's loss. `bias` adds no loss; after
# each step every expert that had more than its share gets a little less bias, the others a little
# more, and the bias counts for the choice only, not for the weight (DeepSeek-V3 does this).
#
# The model reads bytes: with 256 symbols the output head is cheap, and the time goes into the experts.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.train_small import WAYS, SmallTraining
from llmopt_lab.moe.view import training_frame
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.widgets.live import Live

documents = [text.encode() for text in held_out_documents().values()]
learn, unseen = b"\n".join(documents[:-2]), b"\n".join(documents[-2:])
runs = {way: SmallTraining(way, learn) for way in WAYS}
history = {way: [] for way in WAYS}
live = Live()
for _ in range(15):
    for way, run in runs.items():
        history[way].append(run.advance(12))
    live.show(training_frame(history))

# %% tags=["timing", "nbval-ignore-output"]
print(f"bits a byte of {len(unseen):,} bytes that were not trained on:")
for way, run in runs.items():
    print(f"  {way:5} {run.bits_per_byte(unseen):.3f}")
Player([training_frame(history, i) for i in range(15)], title="The same, step by step")

# %% [markdown]
# *Only the picture answers these:*
# - Without balancing, which expert of layer 0 is the busiest after 12 steps, and which after 180?
# - Which of the other two comes down first, and which is lower at the end?
#
# Nobody planned the collapse: an expert that is chosen learns, so it is chosen more often. The text is
# predicted only a little worse for it *here*: by 0.05 and 0.06 bits a byte, after 180 steps, with one seed. But the
# other experts are paid for in memory and do nothing, and in section 8 the machine that holds the busy ones is the
# one that all others wait for.
#
# The loss may have a price of its own: its gradient pulls the router away from what is best for the text. The bias
# has no gradient. No such price can be seen here: on the unseen bytes `loss` and `bias` end nearly level, and both below
# `none`. A *z-loss*, 0.001 times the mean of $\log^2 \sum_e e^{\mathrm{logit}_e}$, is often added so that the router's
# scores stay small; section 5 computes one.

# %% [markdown]
# ## 5. A real model (20 minutes)
#
# `lab-moe` comes with the course: 4 layers, 8 experts, 2 visits, trained on Python with Switch's loss.
# Of its 2.69 million parameters a token meets 1.22 million. On text it has not seen it needs 0.792 bits
# a byte; `lab-dense`, trained in the same way on the same text with 1.21 million parameters in all, 0.838.
# So for the same arithmetic a token the mixture predicts better.
#
# Which words go where? Each frame is one expert of a layer.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.device import pick_device
from llmopt_lab.moe.model_routing import CLASSES, model_routing, token_class
from llmopt_lab.moe.view import expert_frames
from llmopt_lab.nn.weights import load
from llmopt_lab.widgets.explore import Choice, Explore

lm = load("lab-moe", device=pick_device())
code = held_out_documents()["rich/align.py"]
passage = lm.encode(code[5120:5560])
words = [lm.decode([t]) for t in passage.tolist()]
passage_routing = model_routing(lm.model, passage)


def who_reads_what(layer):
    r = passage_routing[layer]
    return Player(expert_frames(r.experts.cpu(), r.weights.cpu(), words, n_experts=r.n_experts))


Explore(who_reads_what, layer=Choice("layer", (0, 1, 2, 3), 0))

# %% [markdown]
# *Only the picture answers these:*
# - Which two experts of layer 0 take the indentation? Which one takes hardly anything but words?
# - Go to layer 3. Which two take the indentation there?
#
# The picture invites stories, so measure. Six classes of token, and the question: how many bits about a
# token's class does the expert's number carry (mutual information)? Counting alone gives more than 0 bits
# even where there is nothing. So the classes are also shifted along the text, 200 times, and what
# *that* gives is subtracted.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.specialisation import specialisation

N = 320  # the first tokens of each of the 16 files
rows = torch.stack([lm.encode(document)[:N] for document in held_out_documents().values()])
text = rows.flatten()
classes = torch.tensor([token_class(lm.decode([t])) for t in text.tolist()])
routing = model_routing(lm.model, text, window=N)
print(f"{len(text):,} tokens: " + ", ".join(
    f"{name} {int((classes == i).sum()):,}" for i, name in enumerate(CLASSES)) + "\n")
for r in routing:
    found = specialisation(r.experts.cpu(), classes, rng=torch.Generator().manual_seed(0))
    print(f"layer {r.layer}: {found}")

# %% tags=["timing", "nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True)
for axes, r in zip(panels, routing, strict=True):
    visits = torch.zeros(len(CLASSES), r.n_experts)
    for choice in r.experts.cpu().T:
        visits.index_put_((classes, choice), torch.ones(len(classes)), accumulate=True)
    share = 100 * visits / visits.sum(1, keepdim=True)
    axes.imshow(share, cmap="viridis", vmin=0, vmax=50, aspect="auto")
    for i, row in enumerate(share.tolist()):
        for e, value in enumerate(row):
            axes.text(e, i, f"{value:.0f}", ha="center", va="center", fontsize=6,
                      color="black" if value > 35 else "white")
    axes.set(title=f"layer {r.layer}", xlabel="expert", xticks=range(r.n_experts))
panels[0].set_yticks(range(len(CLASSES)), CLASSES)
figure.suptitle("of the visits of each class, per cent at each expert", fontsize=9)
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* which layer sends newlines to two experts, and rounded to whole per cent to no
# other? (An even row would be 12.5 in every cell; a token has two visits, so 50 is the most.)
#
# So the experts do specialise, by *kinds of token*. That is what is found in large models as well: not one
# expert for physics and one for law, but one that likes punctuation.
#
# **Batch and capacity.** Here one layer of `lab-moe` works on the first words of that passage. Slide
# the number of tokens and watch the meter of bytes; then tighten the capacity and see who is dropped.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.model_routing import mixture_input, weights_of


def at_work(n_tokens, factor, layer):
    x = mixture_input(lm.model, passage[:n_tokens], layer=layer).cpu()
    weights = [w.cpu() for w in weights_of(lm.model.layers[layer].mlp)]
    capacity = None if factor == "none" else capacity_of(n_tokens, 8, 2, factor)
    with recording() as trace:
        moe_layer(x, *weights, k=2, capacity=capacity)
    run = frames(trace, words=words[:n_tokens])
    return Player(run, start=len(run) - 1)


Explore(
    at_work,
    n_tokens=Choice("tokens in the batch", (1, 2, 4, 8, 12, 24, 48), 8),
    factor=Choice("capacity factor", (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, "none"), 1.25),
    layer=Choice("layer", (0, 1, 2, 3), 0),
)

# %% [markdown]
# *Only the picture answers these:*
# - Which is the smallest of these batches with which all 8 experts of layer 0 are read?
# - With 48 tokens, which is the smallest of these factors at which layer 1 drops nobody? And layer 0?
#
# What does a dropped visit cost? The whole model reads text that it has not seen, with less and less
# room: once the beginnings of eight files together, once one file alone, a long table of colours. And
# what if the router's rules change after training?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.reference import router_logits, visit_experts
from llmopt_lab.nn.feed_forward import MixtureOfExperts


class Capped(MixtureOfExperts):
    """lab-moe's layer by our reference, with a capacity and other rules."""

    factor, renormalise, dropped = None, True, 0.0

    def forward(self, x):
        rows = x.flatten(0, -2)
        router, w_gate_up, w_down = weights_of(self)
        r = route(router_logits(rows, router), self.top_k, renormalise=self.renormalise)
        if self.factor is not None:
            r = drop_overflow(r, capacity_of(len(rows), self.gate.out_features, self.top_k, self.factor))
        self.dropped = float((r.experts == NOBODY).double().mean())
        return visit_experts(rows, r, w_gate_up, w_down).view_as(x)


capped = load("lab-moe", device="cpu", feed_forward=Capped)
palettes = lm.encode(held_out_documents()["rich/_palettes.py"]).cpu()
samples = {"eight files": rows[8:16, :129].cpu(), "one file": palettes[None, 1000:2025]}


@torch.no_grad()
def perplexity_and_dropped(sample, **rules):
    """The share of dropped visits is the mean over the layers."""
    for block in capped.model.layers:
        for name, value in ({"factor": None, "renormalise": True, "top_k": 2} | rules).items():
            setattr(block.mlp, name, value)
    logits = capped.model(sample[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
    return float(loss.exp()), sum(block.mlp.dropped for block in capped.model.layers) / 4


changes = {"as trained": {}}
changes |= {f"capacity factor {f}": {"factor": f} for f in (2.0, 1.5, 1.25, 1.0, 0.5)}
changes |= {"not renormalised": {"renormalise": False}}
changes |= {"1 visit": {"top_k": 1}, "3 visits": {"top_k": 3}, "8 visits": {"top_k": 8}}
print(f"perplexity, and visits dropped{'eight files':>14}{'one file':>20}    (1,024 tokens each)")
for name, rules in changes.items():
    values = [perplexity_and_dropped(sample, **rules) for sample in samples.values()]
    print(f"{name:24}" + "".join(f"{found:12.2f}{lost:8.1%}" for found, lost in values))

# %% [markdown]
# Trained to be even, it is nearly even over eight files: with room for 1.25 times the mean 1.7 % of the visits are
# lost. In *one* file of an unusual kind the same router is far from even: at the same factor it loses 26.8 %, and the
# text is predicted far worse. (Exercise 7 counts 11.7 % for 2,048 tokens in a row.) That is why servers today drop
# nothing: they size the work by the visits that are there (*dropless*, as our kernel does).
#
# The rules belong to the weights: without the division by the sum, or with another *k*, the model is worse.
# With 8 visits the experts do four times the arithmetic, and the model predicts less well than with 2.
#
# **Three ways to make the experts themselves.** A *shared* expert is visited by every token, with weight 1, beside
# the ones that the router picks. *Fine-grained* experts are cut into pieces, of which a token visits as many more: the
# same work, and far more sets of experts to choose from (both DeepSeekMoE). *Upcycling* begins with a dense model:
# each expert is a copy of its layer, the router is random and small, and training goes on from there. Until training
# parts them, copies compute what the dense layer does, and pieces what the whole experts do. Check it, and the *z-loss*
# of section 4 for a router that is trained:

# %%
from math import comb

from llmopt_lab.moe.balance import z_loss
from llmopt_lab.moe.upcycle import split_experts, upcycle

made = random_layer(64, 32, 24, 8, seed=6)
dense = made.w_gate_up[0], made.w_down[0]
copies = upcycle(*dense, 8, rng=torch.Generator().manual_seed(0))
pieces = split_experts(*made[1:], 4)
plain, with_shared = (moe_layer(*made, k=2, shared=shared) for shared in (None, dense))
pairs = {
    "8 copies of a dense layer, 2 visits, and that layer": (moe_layer(made.x, *copies, k=2), swiglu(made.x, *dense)),
    "32 quarters of 8 experts, 8 visits, and 2 visits whole": (moe_layer(made.x, *pieces, k=8), plain),
    "with a shared expert, and its result added by hand": (with_shared, plain + swiglu(made.x, *dense)),
}
for name, (got, want) in pairs.items():
    print(f"{name:55}: {'the same within 1e-12' if (got - want).abs().max() < 1e-12 else 'DIFFERENT'}")
print(f"sets of experts that a token can visit: {comb(8, 2)} of whole ones, {comb(32, 8):,} of quarters")

x = mixture_input(lm.model, passage, layer=0)
logits = router_logits(x, weights_of(lm.model.layers[0].mlp)[0])
same = torch.equal(route(logits, 2).experts, route(logits + 10, 2).experts)
print(f"z-loss of lab-moe's first router {z_loss(logits):.1f}; with 10 added to every logit "
      f"{z_loss(logits + 10):.1f}, and {'the same' if same else 'OTHER'} experts are chosen")

# %% [markdown]
# A softmax does not see what is added to all logits. The z-loss does, and so it keeps them small, where floating point
# has finer steps.
#
# ## 6. The kernel (15 minutes)
#
# The loop over the experts is right and slow on a GPU: before it can start expert 3, the host must know
# how many tokens come to it, and has to wait for the device. The kernel never asks. The visits are
# counted, sorted and cut into tiles of rows on the device, each tile of one expert, and there are always as
# many programs as the worst case needs; those left over end at once. This is the heart: gather the tokens
# of a tile, multiply with *its* expert, SwiGLU before anything is written.

# %%
try:
    from llmopt_lab.moe import kernels

    source = inspect.getsource(kernels._gate_up_kernel.fn)
    print(source[source.index("    row_tile, col_tile") : source.index("    if SAVE")])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Four things to see in it:
# - **`visits_ptr`** is the sorted list of visits. `// K` turns a visit into its token, so the gather
#   happens inside the load: no sorted copy of the tokens is ever written.
# - **`tile_expert_ptr`** says whose tile this is. That is the only place where routing enters.
# - **Gate and up in one loop**, so that a token is read once and SwiGLU needs no memory.
# - **The sums have one owner**: the down projection writes each visit's row to its own place, weighted,
#   and a last kernel adds a token's *k* rows in order. So two runs give the same bits. (Up to four tokens without
#   gradients go another way, below. There an atomic counter says which program is the last; that one adds, in a fixed
#   order, so the bits are the same again.)
#
# Here it runs: compiled if you have a GPU, else in Triton's interpreter, which is slow and right. Ragged
# sizes, an expert that nobody visits, forward and backward:

# %% tags=["timing", "nbval-ignore-output"]
try:
    from llmopt_lab.moe.kernels import moe_layer_triton

    device = pick_device()
    case = random_layer(19, 24, 20, 5, dtype=torch.float32, seed=4)
    case.router[:, 3] = 0  # and all others are liked more:
    case.x[:, 0], case.router[0] = 3.0, torch.tensor([2.0, 2.0, 2.0, -9.0, 2.0])
    grads = []
    for layer_of in (moe_layer_triton, moe_layer):
        inputs = [t.to(device).requires_grad_() for t in case]
        out = layer_of(*inputs, k=2)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for name, got, want in zip(("out", "dx", "drouter", "dw_gate_up", "dw_down"), *grads, strict=True):
        error = float((got - want).abs().max() / want.abs().max())
        print(f"{name:10} {tuple(got.shape)!s:12}: {'right within 1e-4' if error < 1e-4 else 'WRONG'}")
    print("visits an expert:", route(case.x @ case.router, 2).experts.flatten().bincount(minlength=5).tolist())
except ImportError as missing:
    print(missing)

# %% [markdown]
# And a whole model: `use_kernels` lets every mixture of `lab-moe` run on them. Interpreted, that takes seconds a
# token, so without a GPU it reads one. The logits are compared with the plain model's in float64.

# %% tags=["timing", "nbval-ignore-output"]
try:
    from llmopt_lab.core.close import TOLERANCE
    from llmopt_lab.moe.attend import use_kernels

    first = passage[None] if device.type == "cuda" else passage[None, :1]
    with torch.no_grad():
        got = use_kernels(load("lab-moe", device=device, dtype=torch.float32).model)(first)
        want = load("lab-moe", device=device, dtype=torch.float64).model(first)
    error, allowed = float((got - want).norm() / want.norm()), TOLERANCE[got.dtype].norm
    print(f"{first.numel()} of {len(passage)} tokens through lab-moe's 4 layers on the kernels: logits "
          f"{'right' if error < allowed else 'WRONG'} within {allowed:.0e} of their norm")
except ImportError as missing:
    print(missing)

# %% [markdown]
# Recorded on an H200 in bf16, at the shapes of Mixtral 8x7B (8 experts, 2 visits) and of Qwen3-30B-A3B (128 small
# experts, 8 visits). Every contender was first checked against an oracle in float64, then timed in the same run. *Decode*
# is a few tokens: what counts there is how fast the weights of the experts that are touched are read. *Prefill* is
# thousands: there it is arithmetic. The columns on the right say how many times as long the peer takes; **below 1 we
# lose**. Before you look: for which of the two would you expect a plain loop over the experts to be good enough?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, load_results, run_room

(h200,) = load_results("moe")
print(f"{h200['hardware']['name']}, commit {h200['commit'][:8]}")
peers = ("torch._grouped_mm", "torch._grouped_mm, compiled", "loop over experts", "every expert")
print(f"{'':31}{'ours ms':>9}{'of the floor':>14}" + "".join(f"{p.replace('torch._', ''):>22}" for p in peers))
for case in h200["cases"]:
    for row in case["rows"]:
        size, results = row["size"], row["results"]
        ours = results["ours"]
        what = f"{case['title'].partition(' (')[0]}, {'Mixtral' if size['n_experts'] == 8 else 'Qwen3'}"
        ratios = [results[p]["median_ms"] / ours["median_ms"] if p in results else None for p in peers]
        print(f"{what:16}{size['n_tokens']:7,} tokens {ours['median_ms']:9.3f}{ours['share_of_roofline']:14.0%}"
              + "".join(f"{ratio:22.2f}" if ratio else f"{'-':>22}" for ratio in ratios))

# %% [markdown]
# *The floor* is the time to read the weights of the experts touched, or to compute the products, at the rates
# that the same run measured. Wins and losses:
# - **Prefill.** A layer built on `torch._grouped_mm` takes 1.08 times as long at Mixtral's shape and 1.81 times at
#   Qwen3's. Compiled it is *level* with ours at Mixtral's (1.00) and takes 1.31 times as long at Qwen3's, where it
#   writes a sorted copy of the tokens, 262,144 rows, and we write none.
# - **Kernels written for Hopper gained nothing here.** With lesson 2's warp specialisation in its two products the
#   whole layer was as fast as with Triton's, and no faster. So they were taken out again.
# - **Decode** reaches 0.88 to 0.96 of the floor in six of eight rows, and falls short of 0.8 in two: Qwen3 with 1 token
#   (0.52) and with 4 (0.77).
# - Running *every* expert on every token comes closest where nearly all are read anyway: at Mixtral's shape it takes 1.03
#   times as long with 16 tokens, and 1.22 times with 64.
# - The plain loop is good enough for one thing: thousands of tokens and few experts, where it takes 1.13 times as
#   long. With 128 experts and few tokens it takes 82 to 211 times as long: the host waits for the device at each expert.
#
# Why is one token of Qwen3 so far from the floor? The layer takes 33 µs, in three kernels, each of which needs the one
# before: the logits; gate and up of the experts that these choose; the projection. Here they are by the profiler, the
# wait for the kernel before included, beside the time that their weights alone need:

# %% tags=["nbval-ignore-output"]
import json
from pathlib import Path
from statistics import median

measured = json.loads((Path(reference.__file__).parent / "results/measured.json").read_text())
size = measured["decode_kernels"]["size"]
visited = size["k"] * size["d"] * size["d_ff"]  # numbers of one matrix of the experts that one token visits
n_weights = {"logits": size["d"] * size["n_experts"], "gate_up": 2 * visited, "project": visited}
for kernel, us in measured["decode_kernels"]["us"].items():
    name = kernel.strip("_").removesuffix("_kernel")
    nbytes = 2 * n_weights[name]
    least = nbytes / h200["roofline"]["read_gb_s"] / 1e3
    print(f"{name:9}{us:6.1f} µs; its weights, {nbytes / 1e6:5.2f} MB, can be read in {least:5.2f} µs")

# %% [markdown]
# The logits are less than 1 % of the bytes and take a tenth of the time: before they are there, no expert can be chosen
# and none be read. And while kernels begin and end, memory is not busy. At 16 tokens many more experts are read, and all
# of this is an eighth of the time.
#
# **Training.** The backward pass has twice the products of the forward pass. Does the layer that wins forward win with
# it, too? From the same machine, at the shapes of *prefill*, beside the layer on `torch._grouped_mm`, not compiled,
# launches included:

# %% tags=["nbval-ignore-output"]
for row in measured["training"]["rows"]:
    model = "Mixtral" if row["size"]["n_experts"] == 8 else "Qwen3"
    for what in ("forward", "forward + backward"):
        ours, torchs = (median(row["results"][who][what]["samples_ms"]) for who in ("ours", "torch._grouped_mm"))
        print(f"{model:8} {what:19} ours {ours:5.1f} ms, torch's {torchs:5.1f} ms: {torchs / ours:.2f} times as long")
    differ = max(row["gradients_differ"].values())
    print(f"{model:8} the gradients differ by at most {differ:.1%} of their norm, as bf16 rounds")

# %% [markdown]
# At Qwen3's shape it wins, 1.65 times. At Mixtral's **it loses**: 0.88, although its forward pass is faster. The
# backward kernels are where a few large experts cost us time: 14.1 ms, and 10.9 on `torch._grouped_mm`.
#
# The whole table of the benchmark, with its spread and the peer that was left out:

# %% tags=["nbval-ignore-output"]
print(format_results(h200))

# %% [markdown]
# With a GPU, the next cell times the rows of 16 tokens here; without one it says so. All rows take some
# minutes: `llmopt bench moe` in a terminal.

# %% tags=["timing", "nbval-ignore-output"]
if pick_device().type == "cuda":
    print(format_results(run_room("moe", where=lambda title, size: size["n_tokens"] == 16)))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 7. Where it loses (15 minutes)
#
# **Many users.** One token visits $k$ of $E$ experts. If $n$ tokens choose independently and like all experts
# equally, the expected number of *distinct* experts is $E\,(1 - (1 - k/E)^n)$:

# %%
print("tokens    experts of 8    weights read by a step    GB read a token")
for n_tokens in (1, 4, 16, 64, 256, 1024):
    nbytes = mixtral.bytes_read(n_tokens)
    print(f"{n_tokens:6,} {mixtral.touched(n_tokens):13.2f} {nbytes / (2 * mixtral.total):17.1%} "
          f"{nbytes / n_tokens / 1e9:22.3f}")
guess.reveal(round(100 * mixtral.bytes_read(16) / (2 * mixtral.total), 1))

# %% [markdown]
# With 16 users the step reads nearly everything, as a dense model of 47 billion would. The bytes *a token* fall with
# the batch, as they do for any model, but slowly at first: 4 tokens together read 16.2 GB each, where one alone reads
# 25.5. (A dense model that reads 25.5 GB for one would read a quarter of that for each of four.) Real tokens are not
# independent, though. Here is `lab-moe`: tokens picked all over the text, as from many users, and
# tokens in a row, as in one prompt or one speculative draft.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.sizes import expected_touched, uniform_visits


def touched(experts, n_tokens, in_a_row, n_times=300):
    """Distinct experts of `n_tokens` tokens, the mean of many draws."""
    rng = torch.Generator().manual_seed(n_tokens)
    n, total = len(experts), 0
    for _ in range(n_times):
        if in_a_row:
            first = int(torch.randint(n - n_tokens, (1,), generator=rng))
            rows = experts[first : first + n_tokens]
        else:
            rows = experts[torch.randint(n, (n_tokens,), generator=rng)]
        total += len(rows.unique())
    return total / n_times


print("distinct experts of 8, mean over lab-moe's layers")
print("tokens   the formula   picked at random   in a row")
for n_tokens in (1, 2, 4, 8, 16, 32):
    found = [sum(touched(r.experts.cpu(), n_tokens, row) for r in routing) / 4 for row in (False, True)]
    formula = expected_touched(uniform_visits(8, 2), n_tokens)
    print(f"{n_tokens:6} {formula:13.2f} {found[0]:18.2f} {found[1]:10.2f}")

# %% [markdown]
# **So when is it slower than what?** Compare three models: the mixture; a dense one with as much
# *arithmetic* (as many weights as are active); and a dense one with as much *memory* (as many weights as
# there are in all). A step takes at least as long as its weights need to be read, and as its products need
# to be computed; the picture has the larger of the two, with the rates measured on an H100 in chapter 1.
# Attention over the cache is left out: it is the same for all three.

# %%
from llmopt_lab.widgets.panels import Bar, Bars, Frame, Meter

h100 = load_results("paged_attention")[0]["roofline"]
GB_S, TFLOP_S = h100["read_gb_s"], h100["matmul_tflop_s"]


def least_times(model):
    """A frame a batch: the least time of a step of three models, in ms."""
    size, made = ModelSize.from_hf(PUBLISHED[model]), []
    for n_tokens in (1, 4, 16, 64, 256, 1024, 4096):
        rows = n_tokens * size.d if size.input_table else 0  # all that is read of the input table
        active, total = size.active - size.input_table, size.total - size.input_table
        work = 2 * n_tokens * active / TFLOP_S / 1e9
        read = {
            "mixture": size.bytes_read(n_tokens),
            "dense, active": 2 * (active + rows),
            "dense, all": 2 * (total + rows),
        }
        times = {name: max(nbytes / GB_S / 1e6, work) for name, nbytes in read.items()}
        times["dense, all"] = max(times["dense, all"], work * total / active)
        ours, small, large = times.values()
        tones = ("active", "good", "idle")
        bars = tuple(Bar(name, ms / small, tone) for (name, ms), tone in zip(times.items(), tones, strict=True))
        made.append(
            Frame(
                f"{model}, {n_tokens:,} tokens a step: at least {ours:.3g} ms, {ours / small:.2f} times as long "
                f"as a dense model with its arithmetic ({small:.3g} ms), and {ours / large:.2f} times as long "
                f"as one with its memory ({large:.3g} ms).",
                (
                    Bars("least time of a step, in times the shortest", bars, "x", 20),
                    Meter("experts of a layer read", size.touched(n_tokens), "", size.n_experts, "active"),
                ),
                legend=(("active", "mixture"), ("good", "same arithmetic"), ("idle", "same memory")),
            )
        )
    return Player(made, start=2)


Explore(least_times, model=Choice("model", ("Mixtral 8x7B", "Qwen3-30B-A3B", "DeepSeek-V3"), "Mixtral 8x7B"))

# %% [markdown]
# *Only the picture answers these:*
# - At which of these batches is Mixtral at its worst beside the dense model of the same arithmetic?
# - Which of the three models loses most there? Compare how many visits an expert gets.
# - From which of these batches on is Mixtral as fast as that dense model again?
#
# By this bound a mixture takes as long as the dense model of its arithmetic at one token, and again, or nearly, at
# thousands a step. In between it reads much of its memory for few visits an expert. (The three models need not be
# equally good: quality is not in this picture.)
#
# **Small experts.** Tensor cores multiply tiles of rows. An expert with 5 visitors fills a tile of 16 or of
# 64 as far as 5 rows go; the rest is work on nothing:

# %%
rng = torch.Generator().manual_seed(0)
print("rows of tiles that hold no visit, random routing")
print("                          tokens:" + "".join(f"{n:>8,}" for n in (16, 64, 256, 1024, 4096)))
for name, n_experts, k in (("8 experts, 2 visits", 8, 2), ("128 experts, 8 visits", 128, 8)):
    for tile in (16, 64, 128):
        cells = []
        for n_tokens in (16, 64, 256, 1024, 4096):
            experts = torch.rand(n_tokens, n_experts, generator=rng).topk(k).indices
            counts = experts.flatten().bincount(minlength=n_experts)
            rows = int((counts + tile - 1).div(tile, rounding_mode="floor").sum()) * tile
            cells.append(f"{1 - n_tokens * k / rows:8.0%}")
        print(f"{name:22} tile {tile:4}" + "".join(cells))

# %% [markdown]
# **This CPU**, on one of its cores. One layer with 8 experts, 2 visits, beside a dense SwiGLU of the same arithmetic:

# %% tags=["timing", "nbval-ignore-output"]
import time


def best_ms(call, n=10):
    call()  # the first one is slower: it allocates
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


n_threads = torch.get_num_threads()
torch.set_num_threads(1)  # steadier beside other work
print("tokens   mixture ms   dense ms   ratio   distinct experts")
for n_tokens in (1, 4, 16, 64, 256, 1024):
    x, router, w_gate_up, w_down = random_layer(n_tokens, 256, 512, 8, dtype=torch.float32)
    wide = torch.randn(256, 4 * 512) / 16, torch.randn(2 * 512, 256) / 32
    a, b = best_ms(lambda: moe_layer(x, router, w_gate_up, w_down, k=2)), best_ms(lambda: swiglu(x, *wide))
    n_touched = len(route(x @ router, 2).experts.unique())
    print(f"{n_tokens:6} {a:12.2f} {b:10.2f} {a / b:7.1f} {n_touched:12}")
torch.set_num_threads(n_threads)

# %% [markdown]
# The same arithmetic, and not the same time: 3 to 6 times as long with up to 64 tokens. Routing, sorting and many small
# products come on top, and more weights are read. All of this weighs less as the batch grows: 1.1 times at 1,024.
#
# ## 8. Experts on several machines (10 minutes)
#
# A model that does not fit on one GPU is cut, and experts are the natural seam: each *rank* holds some
# of them. Tokens travel to the rank of their expert and their results travel back, by two all-to-all
# exchanges. Here are two processes on this machine, started by `torchrun` as on a cluster. Rank 1 has
# twice as many tokens as rank 0; the result is compared with one process, in float64.

# %% tags=["timing", "nbval-ignore-output"]
import subprocess
import sys

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
done = subprocess.run(
    [*torchrun, "-m", "llmopt_lab.moe.expert_parallel", "--n-tokens", "600"],
    capture_output=True, text=True, timeout=80,
)
print(done.stdout if done.returncode == 0 else done.stderr[-2000:])

# %% [markdown]
# The same command on two H200s, one GPU a rank, goes over NCCL. Recorded, for three precisions:

# %% tags=["nbval-ignore-output"]
two_gpus = json.loads((Path(reference.__file__).parent / "results/expert_parallel.json").read_text())
print(f"{len(two_gpus['hardware'])} x {two_gpus['hardware'][0]['name']}, {two_gpus['backend']}, {two_gpus['sizes']}")
for run in two_gpus["runs"]:
    ranks = run["ranks"]
    away = sum(sum(r["sent_to"]) - r["sent_to"][r["rank"]] for r in ranks)
    print(f"{run['dtype']:9} {away} visits to the other GPU; largest difference from one process "
          f"{max(r['max_difference'] for r in ranks):.0e}; {max(r['ms'] for r in ranks):.1f} ms")

# %% [markdown]
# The results are the same bits as one process computes on one GPU, in every precision. The milliseconds say nothing
# about large layers: this one is tiny, and its host waits many times.
#
# The slowest rank decides when the layer is done. So what matters is the load of the busiest *rank*. Here `lab-moe`'s
# routing is spread over 4 ranks of two experts each, beside a router that chooses by chance:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.moe.balance import max_violation


def busiest_rank(experts):
    """Visits of the busiest of 4 ranks, over their mean."""
    return 1 + max_violation(experts.flatten().div(2, rounding_mode="floor").bincount(minlength=4))


rng = torch.Generator().manual_seed(0)
by_chance = torch.rand(4, len(text), 8, generator=rng).topk(2).indices
print("load of the busiest of 4 ranks, times the mean; mean over layers and steps of a text")
print("tokens a step   lab-moe   by chance")
for n_tokens in (8, 32, 128, 512, len(text)):
    columns = []
    for layers in ([r.experts.cpu() for r in routing], by_chance):
        steps = [s for e in layers for s in e[: len(text) // n_tokens * n_tokens].split(n_tokens)]
        columns.append(sum(map(busiest_rank, steps)) / len(steps))
    print(f"{n_tokens:13,} {columns[0]:9.2f} {columns[1]:11.2f}")

none = history["none"][-1].load[0].view(4, 2).sum(1)
print(f"and section 4's model without balancing, over many tokens: {1 + max_violation(none):.2f}")

# %% [markdown]
# Two things add up. Small steps are uneven by chance, even under an even router. And `lab-moe`'s router is not even:
# over the whole text, where chance alone gives 1.01, its busiest rank still has 1.18 times the mean. Production
# systems copy the busiest experts to several ranks (EPLB in the table below).
#
# ## 9. In production, and what to remember (5 minutes)
#
# | system | how to say it |
# |---|---|
# | vLLM | `vllm serve MODEL --enable-expert-parallel` (expert ranks = tensor parallel × data parallel); `--all2all-backend allgather_reducescatter`, `deepep_high_throughput` (prefill) or `deepep_low_latency` (decode); `--enable-eplb --eplb-config '{"num_redundant_experts": 32}'` |
# | SGLang | `--ep-size 8 --moe-a2a-backend deepep --moe-runner-backend ...`; `--enable-eplb --ep-num-redundant-experts 32` |
# | TensorRT-LLM | `LLM(model, tensor_parallel_size=8, moe_expert_parallel_size=8, moe_config=MoeConfig(backend="CUTLASS"))`; `MoeConfig(load_balancer=...)` for copies of busy experts |
# | transformers | `from_pretrained(..., experts_implementation="grouped_mm")`; also `"batched_mm"` and `"eager"`, a loop as in section 3 |
#
# Without expert parallelism these systems cut *each* expert over all GPUs (tensor parallel): no token
# travels and no rank is busier, but the products get narrow.
#
# **Remember**
# 1. A visit is one token at one of its experts. Route, group, visit, combine.
# 2. Softmax over all, take $k$, divide by their sum if $k \ge 2$. With $k = 1$ do not, or the router learns nothing.
# 3. The router in float32. Ties go to the lower number, always.
# 4. Active weights decide arithmetic. Total weights decide memory. *Distinct experts touched* decide reading.
# 5. Without balancing a few experts do the work. A loss made of `==` has no gradient.
# 6. $E \sum f_e P_e$ balances through the gradient, a bias without one.
# 7. Capacity drops visits; first choices go first. Servers drop none.
# 8. By bytes and arithmetic a mixture costs what its active weights cost at one token, and nearly at thousands. Between,
#    it reads much of its memory for few visits an expert.
# 9. Across machines the busiest rank sets the time.
#
# **Sources.** Shazeer et al. 2017, *Outrageously large neural networks*
# ([1701.06538](https://arxiv.org/abs/1701.06538)). Lepikhin et al. 2020, *GShard*
# ([2006.16668](https://arxiv.org/abs/2006.16668)), capacity and expert parallelism. Fedus et al. 2021, *Switch
# Transformers* ([2101.03961](https://arxiv.org/abs/2101.03961)), the balance loss. Zoph et al. 2022, *ST-MoE*
# ([2202.08906](https://arxiv.org/abs/2202.08906)), z-loss. Zhou et al. 2022, *expert choice*
# ([2202.09368](https://arxiv.org/abs/2202.09368)). Gale et al. 2022, *MegaBlocks*
# ([2211.15841](https://arxiv.org/abs/2211.15841)), dropless. Jiang et al. 2024, *Mixtral*
# ([2401.04088](https://arxiv.org/abs/2401.04088)). Dai et al. 2024, *DeepSeekMoE*
# ([2401.06066](https://arxiv.org/abs/2401.06066)). Wang et al. 2024, *auxiliary-loss-free balancing*
# ([2408.15664](https://arxiv.org/abs/2408.15664)). Serving flags: [vLLM](https://docs.vllm.ai/en/latest/serving/expert_parallel_deployment/),
# [SGLang](https://docs.sglang.io/advanced_features/expert_parallelism.html),
# [TensorRT-LLM](https://nvidia.github.io/TensorRT-LLM/features/parallel-strategy.html).
#
# Next: the exercises, then chapter 4, where the weights get smaller.
