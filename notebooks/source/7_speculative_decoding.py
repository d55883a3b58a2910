# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 7. Speculative decoding
# {{colab_badge}}
#
# A language model writes one token a pass, and each pass reads all of its weights. Most tokens are
# easy: a model a tenth of the size would have written them, too. So let the small one guess a few
# tokens ahead, and let the large one judge all of them in *one* pass. The text that comes out is the
# large model's, exactly. After this chapter you can write it, prove that it changes nothing, say in
# advance whether it pays, and find the bug in somebody else's.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 20 |
# | 3. What the guide says, measured | 20 |
# | 4. A real target and its drafts | 20 |
# | 5. How much faster | 15 |
# | 6. Where it loses | 15 |
# | 7. The kernels | 15 |
# | 8. In production, and what to remember | 5 |
#
# In all of it **p is the target's distribution of the next token and q the draft's**. Other texts swap
# the letters. The exercises are in `exercises/7_speculative_decoding.ipynb`. Do them after section 3, or
# at the end.

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
# `lab-target` is a model of 6 layers that writes Python. `lab-draft` is small: one pass of it takes
# 0.19 of the time of one of the target, on one core of a CPU. Both continue a file that neither has
# seen. The draft makes 4 guesses a round, and the target agrees with 94 % of those that it judges.
# Lock in your guess. Section 5 shows what was measured.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "How many times as fast as without a draft does the text appear?", unit="times"
)
guess

# %% [markdown]
# ## 2. The idea, step by step (20 minutes)
#
# Two models in name only, over five tokens, A to E: the numbers after each text are random, the
# draft's resemble the target's, and all of it is small enough to check. The draft guesses 3 tokens a
# round. Step through it.

# %%
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.speculative_decoding import speculative_decode
from llmopt_lab.speculative_decoding.cases import TableModel
from llmopt_lab.speculative_decoding.view import frames
from llmopt_lab.widgets.player import Player


def target_and_draft(n_vocab=5):
    """Fresh ones, that have read nothing."""
    target = TableModel(n_vocab, 3, peak=1.2)
    like = (TableModel(n_vocab, 3, peak=1.2), 0.6)
    return target, TableModel(n_vocab, 4, like=like, peak=1.2, name="draft")


prompt = torch.tensor([0, 2, 1])
with recording() as trace:
    out = speculative_decode(
        *target_and_draft(), prompt, k=3, n_new=9, temperature=1.0,
        rng=torch.Generator().manual_seed(1),
    )
steps = frames(trace, prompt.tolist(), words=lambda token: "ABCDE"[token], block_size=4)
Player(steps, title="Guess, judge, go on")

# %% [markdown]
# *Only the picture answers these:*
# - In which round does the target's own token come on top of three kept guesses?
# - Which guess was refused although the target found it possible? What came in its place?
# - After which round does the draft have two tokens to read before it can guess again? Why?
#
# **The rule.** A guess `x` is kept with probability $\min(1, p(x)/q(x))$. If it is refused, the token in
# its place is drawn from the *residual*, $\max(p - q, 0)$ divided by its sum. If all are kept, the
# target's last row gives one token more, the bonus.
#
# **Why it changes nothing.** How often does `x` come out? Guessed and kept: $q(x) \cdot \min(1, p(x)/q(x))
# = \min(p(x), q(x))$. What is missing to $p(x)$ is $\max(p(x) - q(x), 0)$, and these missing parts
# together are exactly the probability of a refusal. By hand, with two tokens:

# %%
from llmopt_lab.speculative_decoding import residual
from llmopt_lab.speculative_decoding.reference import overlap

p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.8, 0.2]).double()
print(f"kept: min(0.5, 0.8) + min(0.5, 0.2) = {overlap(p, q):.1f}, and the residual is {residual(p, q).tolist()}")
print(f"token 0: 0.5 as a kept guess                          = {0.5:.1f}")
print(f"token 1: 0.2 as a kept guess, 0.3 after a refusal of 0 = {0.2 + 0.3:.1f}")

# %% [markdown]
# The shaded part of the bars in the picture is $\min(p, q)$. Its sum is the chance that a guess is kept,
# and it is $1 - $ the total variation between the two: nothing else about the models matters.
#
# **Proved, not sampled.** All chances of the algorithm come from one object, `dice`. So it can be run
# once for *every* way the dice can fall. A vocabulary of 3, 3 new tokens: 27 texts.

# %%
import itertools

from llmopt_lab.speculative_decoding.chance import outcomes


def texts_of(decode):
    """Every text and its probability, from every way the dice can fall."""
    return outcomes(lambda dice: tuple(decode(dice).tolist()[len(prompt) :]))


found = texts_of(
    lambda dice: speculative_decode(
        *target_and_draft(3), prompt, k=2, n_new=3, temperature=1.0, rng=dice
    )
)
target = target_and_draft(3)[0]
worst = 0.0
for text in itertools.product(range(3), repeat=3):
    probability = 1.0
    for i, token in enumerate(text):
        after = [*prompt.tolist(), *text[:i]]
        probability *= float(target.logits(after).softmax(0)[token])
    worst = max(worst, abs(found[text] - probability))
print(f"{len(found)} texts; the largest error of a probability is below 1e-12: {worst < 1e-12}")

# %% [markdown]
# The loop itself, without its `record` lines:

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.speculative_decoding import reference

source = without_records(inspect.getsource(speculative_decode))
print(source[source.index("    while not ended") :])

# %% [markdown]
# Three lines need a second look. `ahead`: one guess less than there is room, because the target adds a
# token of its own. `text[target.length:] + guesses`: what is not read yet, in one pass; row `i` of the
# last `k + 1` judges guess `i`. And the two `rewind`s: keys and values of refused tokens must leave
# *both* caches.

# %% [markdown]
# ## 3. What the guide says, measured (20 minutes)
#
# The written guide that this course grew out of ends its loop so:
#
# ```python
#             verified_tokens = self.large_model.verify(tokens[-self.k:])
#
#             # Step 3: Accept tokens up to first rejection
#             accepted = 0
#             for i, (spec, verif) in enumerate(zip(speculative_tokens, verified_tokens)):
#                 if self.accept_token(spec, verif):
#                     accepted += 1
#                 else:
#                     break
#
#             # Step 4: If all accepted, continue. Otherwise, correct and continue
#             if accepted < self.k:
#                 # Correct rejected token
#                 tokens[-1] = verified_tokens[accepted]
# ```
#
# **It does not run**: `done`, `accept_token` and `verify` do not exist, and `tokens = [prompt]` nests the
# prompt. `guides_speculative_decode` supplies what is missing, and gives `verify` the whole text where
# the guide sends the `k` guesses alone: no row of theirs could judge the first. Greedy models, 50
# tokens, 20 prompts, 4 guesses a round:

# %%
from llmopt_lab.speculative_decoding import expected_tokens
from llmopt_lab.speculative_decoding.cases import Chooser, guides_speculative_decode

print("draft right   tokens a call   positions that differ from the large model's text")
for accuracy in (0.95, 0.8, 0.6, 0.3):
    calls = differ = 0
    for seed in range(20):
        large = Chooser(50, 2 * seed)
        small = Chooser(50, 2 * seed + 1, like=(large, accuracy))
        got = guides_speculative_decode(small, large, [3, 1, 4], k=4, n_new=64)
        calls += large.n_calls
        plain = [3, 1, 4]
        while len(plain) < len(got):
            plain += large.choices(plain, 1)
        differ += sum(a != b for a, b in zip(got, plain, strict=True))
    print(f"{accuracy:11.0%} {20 * 64 / calls:15.2f} {differ / (20 * 64):12.0%}")

# %% [markdown]
# Always 4.00 tokens a call, whatever the draft, and the wrong text: the correction replaces the *last*
# guess, and the refused one stays. After the first mistake nothing agrees any more. A meter that cannot
# go down measures nothing. Exercise 1 repairs the loop.
#
# **"accept_token(spec, verif)"** compares two tokens. That is right for greedy decoding, and with
# sampling it cannot be right: which rule would it be? Four that are in use, judged exactly over 40
# random pairs of p and q, 8 tokens each:

# %%
from llmopt_lab.speculative_decoding.cases import RULES

rng = torch.Generator().manual_seed(0)
pairs = (1.2 * torch.randn(40, 2, 8, generator=rng, dtype=torch.float64)).softmax(2)


def judged(rule, p, q):
    """Total variation of what comes out from p, and how often the guess is kept."""
    joint = outcomes(lambda dice: rule(dice.pick(q), p, q, dice))
    out = torch.zeros_like(p)
    for (token, _), chance in joint.items():
        out[token] += chance
    kept = sum(chance for (_, kept), chance in joint.items() if kept)
    return float((out - p).abs().sum() / 2), kept


print("rule                             off by (mean, worst)      kept")
for name, rule in RULES.items():
    off, kept = zip(*(judged(rule, p, q) for p, q in pairs), strict=True)
    print(f"{name:33}{sum(off) / 40:6.3f} {max(off):9.3f} {sum(kept) / 40:14.3f}")

# %% [markdown]
# Only the first rule leaves the distribution alone *and* keeps as many guesses as possible. To draw from
# p after a refusal looks innocent and moves 15 % of the probability: what the draft likes gets a second
# chance. Keeping what p finds likely is quick, and lossy. To compare with a sample of p is exact, and
# keeps $\sum pq$ where $\sum \min(p, q)$ is possible.
#
# **"2-4 tokens per large model call (2-4x speedup!)".** Tokens a call depend on the draft, and speed on
# its price, too. With $\alpha$ the chance that a guess is kept and $c$ the time of the draft's pass over
# the target's:
#
# $$\text{tokens} = 1 + \alpha + \dots + \alpha^k = \frac{1-\alpha^{k+1}}{1-\alpha}, \qquad
# \text{speed-up} = \frac{\text{tokens}}{kc + 1}$$

# %%
from llmopt_lab.speculative_decoding import best_k, speedup

print("alpha      c   tokens a call at k = 4   speed-up   best k   speed-up then")
for alpha, c in [(0.9, 0.05), (0.8, 0.05), (0.6, 0.2), (0.3, 0.2), (0.3, 0.4)]:
    k = best_k(alpha, c)
    print(f"{alpha:5} {c:6} {expected_tokens(alpha, 4):24.2f} {speedup(alpha, 4, c):10.2f} "
          f"{k:8} {speedup(alpha, k, c):15.2f}")

# %% [markdown]
# From 1.43 to 4.10 tokens, from 0.55 to 3.41 times as fast. Where the best k is 0, speculation only
# costs. And 4 guesses give up to *5* tokens: the guide's loop throws the bonus away.
#
# | the guide says | measured |
# |---|---|
# | the loop | does not run; completed, it keeps refused tokens |
# | 2-4 tokens a call | the loop reports 4.00 for every draft; right: 1 to k + 1 = 5 |
# | 2-4x speedup | tokens a call over (kc + 1): from 0.55 to 3.41 in the table above |
# | `verify(tokens[-k:])` | needs the whole text, and k + 1 rows |
# | `accept_token(spec, verif)` | two tokens cannot express the rule; it needs p, q and a coin |

# %% [markdown]
# ## 4. A real target and its drafts (20 minutes)
#
# `lab-target` with four drafts. `lab-draft` is a model of its own. The *draft head* is a single layer
# that was trained for this target, and that has more to go on than the text: what the target's last
# layer gave for each token it has read, its *features* (EAGLE). *Prompt lookup* is no model at all: it
# guesses that the text goes on as it did when its last tokens came before. *Skipped layers* is the
# target itself with the layers 0 and 5 only, on the same weights. First greedy: is the text the same?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding import PromptLookup, skip_layers
from llmopt_lab.speculative_decoding.drafts import check_same_vocabulary
from llmopt_lab.speculative_decoding.head import load_head
from llmopt_lab.speculative_decoding.measure import decode_with
from llmopt_lab.speculative_decoding.records import Added, Judged

lm, small = load("lab-target", device="cpu"), load("lab-draft", device="cpu")
check_same_vocabulary(lm, small)  # speculation compares token by token
drafts = {
    "lab-draft": small.model,
    "draft head": load_head(),
    "prompt lookup": PromptLookup(lm.config.n_vocab),
    "skipped layers": skip_layers(lm.model, [0, 5]),
}
code = lm.encode(
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self):\n"
)
plain = generate(lm.model, code, 48)
for name, draft in drafts.items():
    with recording(Judged, Added) as trace:
        out = decode_with(lm.model, draft, code, k=4, n_new=48)
    judged_ = trace.of(Judged)
    kept = sum(what.accepted for what in judged_) / max(1, len(judged_))
    print(f"{name:15} same text: {torch.equal(out, plain)}, {48 / len(trace.of(Added)):.2f} tokens a call "
          f"of the target, {kept:.0%} of the judged guesses kept")
print(lm.decode(out[len(code) :]))

# %% [markdown]
# Same text each time. (`decode_with` is `speculative_decode`; for the head it also makes the reader of
# the target whose features the head takes.)
#
# **The head** joins the feature before a token with the token's embedding, and one layer makes of them
# what the target's last layer would give. The target's own output head turns that into a guess. For the
# second guess there is no feature of the target yet, so the head reads its own.

# %%
import json

from llmopt_lab.speculative_decoding.head import FOLDER, DraftHead

source = inspect.getsource(DraftHead.forward)
print(source[source.index("        both = ") :])

trained = json.loads((FOLDER / "training.json").read_text())
parameters = {"lab-draft": small.model, "draft head": drafts["draft head"], "lab-target": lm.model}
for name, model in parameters.items():
    print(f"{name:11} {sum(weight.numel() for weight in model.parameters()):10,} parameters")
print(f"\nThe head was trained for {trained['seconds'] / 60:.1f} minutes of one {trained['environment']['name']}.")
for i, step in enumerate(trained["heldout"]):
    print(f"Guess {i + 1} of it is kept with probability {step['overlap']:.3f} on held-out text, at temperature 1.")
print("\nOn 8 held-out beginnings        tokens a call: draft head   lab-draft")
for how, cells in trained["decoding"].items():
    head, other = (cells[who]["tokens_per_target_call"] for who in ("this head", "lab-draft"))
    print(f"{how:38}{head:19.2f} {other:11.2f}")

# %% [markdown]
# The guesses lose little from the first to the fourth, because it was trained on features of its own as
# well. (Trained on the target's features only, a head has never seen its own mistakes.) Compare the two
# columns: who of them should draft, and when?
#
# Its relatives: *Medusa* has a head for the token after next, one for the one after that, and so on,
# and none sees what the others guess. *Multi-token prediction* trains such layers together with the
# target, so a model comes with its draft. And *suffix decoding* is prompt lookup that also remembers what
# was written before for others, and guesses farther the longer the match.
#
# Now look inside, and change what it is made of: how far it guesses, the temperature, and who guesses.
# The clock counts passes of the target, and a pass of the draft as the part of it that was measured
# (section 5).

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.widgets.explore import Choice, Explore

recorded = json.loads((FOLDER.parent / "results" / "cpu.json").read_text())
runs = {(run["prompt"], run["draft"]): run for run in recorded["runs"]}
NAMES = {name: name for name in drafts} | {"skipped layers": "layers 0 and 5 of lab-target"}
PRICE = {name: round(runs["fresh", NAMES[name]]["c"], 2) for name in drafts}


def speculate(k, temperature, draft):
    with recording() as trace:
        decode_with(
            lm.model, drafts[draft], code, k=k, n_new=16, temperature=temperature,
            rng=torch.Generator().manual_seed(0),
        )
    words = lambda token: lm.decode([token])  # noqa: E731
    made = frames(trace, code.tolist(), words=words, c=PRICE[draft], block_size=32)
    return Player(made, title=f"{draft}, k {k}, temperature {temperature}")


Explore(
    speculate,
    k=Choice("guesses a round", (1, 2, 4, 6, 8), 4),
    temperature=Choice("temperature", (0.0, 0.7, 1.0, 1.5), 0.7),
    draft=Choice("draft", tuple(drafts), "lab-draft"),
)

# %% [markdown]
# *Only the picture answers these:*
# - At temperature 0 a bar of p is 1 or 0. What does a refusal look like then?
# - Which kinds of tokens does `lab-draft` miss: names, punctuation, spaces?
# - With prompt lookup, q is 1 on the guess. What is the shaded part then?
#
# **The formula, on this text.** Measure $\alpha$, predict the tokens a call, compare:

# %% tags=["timing", "nbval-ignore-output"]
print(" k   alpha   tokens a call   predicted")
for k in (1, 2, 4, 8):
    with recording(Judged, Added) as trace:
        speculative_decode(lm.model, small.model, code, k=k, n_new=64)
    alpha = sum(what.accepted for what in trace.of(Judged)) / len(trace.of(Judged))
    print(f"{k:2} {alpha:7.2f} {64 / len(trace.of(Added)):15.2f} {expected_tokens(alpha, k):11.2f}")

# %% [markdown]
# The formula takes the guesses to be kept independently, each with the same chance. Real text has easy
# stretches and hard places, so the prediction is near, and for large k a little off.
#
# **Trees.** Where the first guess is wrong, the second likeliest token is often right. So let the draft
# branch, and let the target judge the whole tree in one pass: each guess sees the text and its own
# ancestors, nothing else.

# %% tags=["timing", "nbval-ignore-output"]
print("children at each depth   tokens a call: lab-draft   draft head")
for widths in [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1)]:
    tokens = []
    for name in ("lab-draft", "draft head"):
        with recording(Added) as trace:
            for seed in range(2):
                decode_with(
                    lm.model, drafts[name], code, widths=widths, n_new=32, temperature=1.0,
                    rng=torch.Generator().manual_seed(seed),
                )
        tokens.append(2 * 32 / len(trace.of(Added)))
    print(f"{widths!s:22} {tokens[0]:26.2f} {tokens[1]:12.2f}")

with recording() as trace:
    decode_with(
        lm.model, small.model, code, widths=(2, 2), n_new=8, temperature=1.0,
        rng=torch.Generator().manual_seed(0),
    )
words = lambda token: lm.decode([token])  # noqa: E731
made = frames(trace, code.tolist(), words=words, c=PRICE["lab-draft"], block_size=32)
Player(made, title="A tree of guesses")

# %% [markdown]
# 64 sampled tokens are few: neighbours in this table may change places by chance. More children never
# keep fewer guesses on average, but every node is one more token in the target's pass.
#
# *Only the picture answers this:* find a node in the mask that sees fewer guesses than its number says.
# Who must not be seen, and why?

# %% [markdown]
# ## 5. How much faster (15 minutes)
#
# Recorded on one core of a CPU, in its processor's seconds: `lab-target`, 96 greedy tokens, each text
# checked against plain decoding before its time counts. Two prompts: *fresh* is the beginning of a file
# that neither model has seen, *edit* is a function and its beginning again, as an editor asks for a
# rewrite. Lines are measured; crosses are predicted from $\alpha$, $c$ and the time of a pass of k + 1
# tokens.

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for axis, kind in zip(axes, ("fresh", "edit"), strict=True):
    for name, marker in zip(drafts, "oDs^", strict=True):
        run = runs[kind, NAMES[name]]
        ks = [row["k"] for row in run["rows"]]
        (line,) = axis.plot(ks, [row["speedup"] for row in run["rows"]], marker=marker, label=name)
        axis.plot(ks, [row["speedup_predicted"] for row in run["rows"]], "x", color=line.get_color())
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="guesses a round, k", title=f"prompt: {kind}")
axes[0].set_ylabel("times as fast as plain decoding")
axes[0].legend(fontsize=7)
figure.tight_layout()

# %% id="takeaway"
for kind, name in [("fresh", "lab-draft"), ("fresh", "draft head"), ("edit", "draft head")]:
    print(f"{name} on {kind}, its pass {runs[kind, name]['c']:.2f} of the target's")
    print(" k   alpha   tokens a call   pass of k + 1   speed-up   predicted   if that pass cost 1")
    for row in runs[kind, name]["rows"]:
        print(f"{row['k']:2} {row['alpha']:7.2f} {row['tokens_per_target_call']:15.2f} {row['verify']:15.2f} "
              f"{row['speedup']:10.2f} {row['speedup_predicted']:11.2f} {row['speedup_predicted_verify_1']:21.2f}")
guess.reveal(round(runs["fresh", "lab-draft"]["rows"][3]["speedup"], 2))

# %% [markdown]
# The same two prompts with trees, the likeliest tokens as siblings. Every node is a token in the target's
# pass, which a CPU does not do for nothing:

# %%
print("prompt  draft             children at each depth   nodes   tokens a call   their pass   speed-up   predicted")
for (kind, draft), run in runs.items():
    for row in run["trees"] if draft in ("lab-draft", "draft head") else ():
        print(f"{kind:7} {draft:17} {tuple(row['widths'])!s:22} {row['nodes']:7} "
              f"{row['tokens_per_target_call']:15.2f} {row['verify']:12.2f} {row['speedup']:10.2f} "
              f"{row['speedup_predicted']:11.2f}")

# %% [markdown]
# Two things eat the gain. A pass of k + 1 tokens is not free: on this CPU it takes 1.4 to 1.7 times as
# long as one of 1 token. And between the passes there is Python: where a draft gains anything, the
# prediction is nearly always above the measurement. `lab-draft` reaches the guide's 2x with 7 guesses,
# on the prompt where 94 % of them are kept; on the edit it stays below 1.3. Prompt lookup, which costs
# nothing, beats it on both: greedy text of a small model repeats itself, and an edit repeats the original.
#
# **The head loses here.** On the edit more of its guesses are kept than of `lab-draft`'s, and still it
# is slower at every k on both prompts. Its pass costs twice what its size says, 0.35 of the target's: it
# ends in the target's output head, a matrix as large as the head itself. And after each round it reads
# the kept guesses again, with the target's features now, which the prediction leaves out.
#
# **So do trees.** Each gives more tokens a call than the chain of its depth, and each is slower than
# that chain: the target's pass over its nodes takes 1.6 to 3.3 times as long as one of 1 token.
#
# *Only the picture answers this:* which draft makes it *slower* at every k, on both prompts? Its guesses
# are kept less than 3 times in 10, and each costs more than 0.4 of a pass.

# %% [markdown]
# ## 6. Where it loses (15 minutes)
#
# **A bad draft, a dear draft, a busy machine.** The last one is the pass of k + 1 tokens: `more` below
# is what each further token adds to it, as a part of the pass of 1 token. 0 is a GPU that waits for
# memory anyway; 1 is one that is busy computing. Each frame is one $\alpha$.

# %%
from llmopt_lab.widgets.panels import Bar, Bars, Frame


def break_even(c, more):
    """Speed-up for each k, one frame an alpha."""
    made = []
    for alpha in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        gains = [speedup(alpha, k, c, verify=1 + more * k) for k in range(9)]
        best = max(range(9), key=lambda k: (round(gains[k], 9), -k))
        tones = ["new" if k == best else "good" if gain > 1 else "bad" for k, gain in enumerate(gains)]
        bars = tuple(Bar(f"k {k}", gain, tone) for k, (gain, tone) in enumerate(zip(gains, tones, strict=True)))
        best_text = "Do not speculate." if best == 0 else f"Best: k {best}, {gains[best]:.2f} times as fast."
        made.append(
            Frame(
                f"{alpha:.0%} of the guesses kept, a draft's pass {c} of the target's, each further "
                f"token {more} of a pass. {best_text}",
                (Bars("times as fast as plain decoding; k 0 is 1", bars, ""),),
                legend=(("new", "best k"), ("good", "faster"), ("bad", "not faster")),
            )
        )
    return Player(made, start=5, title="Does it pay?")


Explore(
    break_even,
    c=Choice("draft's pass, of the target's", (0.0, 0.02, 0.05, 0.1, 0.2, 0.4), 0.05),
    more=Choice("each further token", (0.0, 0.05, 0.1, 0.25, 0.5, 1.0), 0.0),
)

# %% [markdown]
# *Only the picture answers these:* a draft of price 0.4, memory-bound: from which $\alpha$ on is it worth
# anything? And with a further token at 0.5?
#
# **Large batches.** A pass reads the weights once for all sequences. On an H100 that is what costs as
# long as few tokens are in the pass. How many? So many that computing takes as long as reading:

# %%
from llmopt_lab.core.bench import load_results

h100 = load_results("paged_attention")[0]["roofline"]
full = 1000 * h100["matmul_tflop_s"] / h100["read_gb_s"]
print(f"an H100, bf16, weights only: up to {full:.0f} tokens a pass are free")
print("batch   time of a pass with 4 guesses   speed-up at alpha 0.8, c 0.05")
for batch in (1, 16, 64, 128, 256, 1024):
    verify = max(1, 5 * batch / full) / max(1, batch / full)
    print(f"{batch:5} {verify:31.2f} {speedup(0.8, 4, 0.05, verify=verify):31.2f}")

# %% [markdown]
# At batch 256 the same draft, with the same acceptance, makes it slower. (That is arithmetic from the
# measured memory and matmul speed, for the weights alone. Keys and values are read by each sequence for
# itself, so long texts move the limit up.) A server that
# is full should not speculate; one that answers a single user should. The field says "medium to low
# QPS".
#
# **Guessing as far as it pays.** Acceptance changes within a text. `AdaptiveK` watches the last guesses
# and chooses k anew each round. What it chooses depends on the past only, so the text's distribution
# stays the target's.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.speculative_decoding.records import Guessed, Read
from llmopt_lab.speculative_decoding.speed import AdaptiveK

for name, fixed in (("lab-draft", (2, 8)), ("skipped layers", (4,))):
    for k in (*fixed, AdaptiveK(c=PRICE[name], most=8)):
        with recording(Added, Guessed, Read) as trace:
            speculative_decode(lm.model, drafts[name], code, k=k, n_new=48)
        passes = {who: sum(what.who == who for what in trace.of(Read)) for who in ("target", "draft")}
        cost = passes["target"] + PRICE[name] * passes["draft"]
        how = f"k {k}" if isinstance(k, int) else "adaptive"
        print(f"{name:15} {how:9} {passes['target']:3} passes of the target, {passes['draft']:4} of the draft: "
              f"{48 / cost:.2f} tokens a pass's time")

# %% [markdown]
# ## 7. The kernels (15 minutes)
#
# Two steps are special. *Verification* is a decode step with k + 1 queries a sequence. Attention over the
# paged cache reads all keys and values once, and as long as the rows of all the new tokens fit one tile
# of a matrix product, more of them cost little. In the kernel a tree needs only another mask, one
# 64-bit word for each guess:

# %%
try:
    from llmopt_lab.speculative_decoding import kernels

    source = inspect.getsource(kernels._verify_kernel.fn)
    first, last = source.index("        ahead = token"), source.index("        scores = tl.where(seen")
    print(source[first:last])
except ImportError as missing:
    print(missing)

# %% [markdown]
# `ahead` is the token's place among the new ones, negative for the text. A chain sees what is not ahead of
# it; a tree looks up the bit.
#
# *The sampler* decides about k guesses and draws one token. In a vocabulary of 128,000 a row of float32
# logits is half a megabyte, and torch makes two softmaxes, a ratio, a difference and a draw of it, each
# of which reads and writes such rows. Fused, the logits are read once, and the one row that is drawn for
# a second time. Exercise 12 builds a small one. Here is the whole, in Triton's interpreter without a
# GPU: how often is the first guess kept, and is it as often as it should be?

# %% tags=["timing", "nbval-ignore-output"]
try:
    from llmopt_lab.core.device import pick_device

    device, batch = pick_device(), 16
    rng = torch.Generator().manual_seed(1)
    p_logits = 1.5 * torch.randn(1, 3, 50, generator=rng).expand(batch, -1, -1).contiguous()
    q_logits = p_logits[:, :2] + 0.8 * torch.randn(1, 2, 50, generator=rng)
    guesses = torch.stack(
        [torch.multinomial(q_logits[0, i].softmax(0), batch, replacement=True, generator=rng) for i in range(2)], 1
    )
    done = kernels.rejection_sample(
        p_logits.to(device), q_logits.contiguous().to(device), guesses.to(device), rng_seed=7
    )
    share = float((done.n_kept > 0).float().mean())
    expected = overlap(p_logits[0, 0].softmax(0), q_logits[0, 0].softmax(0))
    spread = (expected * (1 - expected) / batch) ** 0.5
    print(f"first guess kept in {share:.2f} of {batch} sequences; sum of min(p, q) is {expected:.2f}, "
          f"give or take {spread:.2f}")
    print("the first three sequences:", done.tokens[:3].tolist(), "(-1: nothing)")
except NameError:
    print("no Triton here")

# %% [markdown]
# Recorded on an H200, 32 query heads over 8 KV heads of width 128, blocks of 16, a cache of 4,096 tokens.
# Every contender was first checked against an oracle in float64, then timed in the same run. Before you
# look: judging four guesses needs 5 rows instead of 1. What does that cost, for one sequence and for 32?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, load_results, run_room

(recorded,) = load_results("speculative_decoding")
times = {
    (row["size"]["batch"], row["size"]["n_new"]): row["results"] for row in recorded["cases"][0]["rows"]
}
print("batch   5 rows over 1, ours   FlashAttention-3   FlashAttention-3 over ours: 1 row   5 rows")
for batch in sorted({batch for batch, _ in times}):
    one, five = times[batch, 1], times[batch, 5]
    ours, theirs = "ours (Triton)", "FlashAttention-3 paged"
    print(f"{batch:5}{five[ours]['median_ms'] / one[ours]['median_ms']:22.2f}"
          f"{five[theirs]['median_ms'] / one[theirs]['median_ms']:19.2f}"
          f"{one[theirs]['median_ms'] / one[ours]['median_ms']:36.2f}"
          f"{five[theirs]['median_ms'] / five[ours]['median_ms']:9.2f}")

# %% [markdown]
# Judging costs about a fifth more than a plain step, not nothing. With 5 rows FlashAttention-3 is faster
# than ours from batch 4 on. The whole table, the tree and the sampler included:

# %% tags=["nbval-ignore-output"]
print(format_results(recorded))

# %% [markdown]
# With a GPU, the next cell times the rows of 5 new tokens here; without one it says so. All rows:
# `llmopt bench speculative_decoding` in a terminal.

# %% tags=["timing", "nbval-ignore-output"]
if pick_device().type == "cuda":
    print(format_results(run_room("speculative_decoding", where=lambda title, size: size.get("n_new") == 5)))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 8. In production, and what to remember (5 minutes)
#
# | system | how to choose |
# |---|---|
# | vLLM | `vllm serve MODEL --speculative-config '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'`; a draft: `{"model": ..., "num_speculative_tokens": 3, "method": "eagle3"}`; methods `draft_model`, `mtp`, `suffix`, too. The `--speculative-model` of older guides was replaced by it |
# | TensorRT-LLM | `LLM(..., speculative_config=DraftTargetDecodingConfig(max_draft_len=3, speculative_model=...))`; also `Eagle3DecodingConfig`, `NGramDecodingConfig`, `MTPDecodingConfig` |
# | transformers | `model.generate(..., assistant_model=small)`, or `prompt_lookup_num_tokens=3`, or `assistant_early_exit=4` for a model trained to leave early; batch 1 |
#
# **Remember**
# 1. Keep with $\min(1, p/q)$; after a refusal draw from $\max(p-q, 0)$; after none, a bonus. The text is
#    distributed as the target's, exactly.
# 2. A guess is kept with $\sum\min(p, q)$, so the draft should resemble the target, at the same
#    temperature, top-k and top-p.
# 3. Judging k guesses needs k + 1 rows: the row of a token says what comes *after* it.
# 4. What was refused must leave both caches; after k kept guesses the draft has two tokens to read.
# 5. Tokens a call are not speed: divide by $kc$ + the price of the longer pass. k = 0 is a choice.
# 6. It trades spare arithmetic for fewer reads of the weights. A full server has none to spare.
# 7. Test that the text equals plain decoding. A speed meter cannot see a wrong text.
#
# **Sources.** Leviathan et al. 2023, *Fast Inference from Transformers via Speculative Decoding*
# ([2211.17192](https://arxiv.org/abs/2211.17192)), Algorithm 1 and section 3. Chen et al. 2023,
# *Accelerating Large Language Model Decoding with Speculative Sampling*
# ([2302.01318](https://arxiv.org/abs/2302.01318)). Miao et al. 2023, *SpecInfer*
# ([2305.09781](https://arxiv.org/abs/2305.09781)), trees. Zhang et al. 2024, *Draft & Verify*
# ([2309.08168](https://arxiv.org/abs/2309.08168)), skipped layers. Saxena 2023, prompt lookup decoding.
# Li et al. 2024 and 2025, *EAGLE* ([2401.15077](https://arxiv.org/abs/2401.15077)) and *EAGLE-3*
# ([2503.01840](https://arxiv.org/abs/2503.01840)), draft heads. Cai et al. 2024, *Medusa*
# ([2401.10774](https://arxiv.org/abs/2401.10774)). DeepSeek-AI 2024, *DeepSeek-V3*
# ([2412.19437](https://arxiv.org/abs/2412.19437)), multi-token prediction. Oliaro et al. 2024,
# *SuffixDecoding* ([2411.04975](https://arxiv.org/abs/2411.04975)).
#
# Next: the exercises.
