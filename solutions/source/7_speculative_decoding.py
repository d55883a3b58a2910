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
# # Exercises 7: Speculative decoding
# {{colab_badge}}
#
# A small model guesses, the large one judges all guesses in one pass, and the text is still the large
# one's. You repair a guide's loop that has no such promise, write the rule that keeps the promise
# and prove it by listing every outcome, keep two caches in step, decide how far to guess, and at the
# end write the kernel that judges. In all of them **p is the target's distribution and q the
# draft's**; other texts swap the letters.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. Too good to be true | 3 | 15 |
# | 2. Which row judges which token? | 2 | 8 |
# | 3. Judge, residual, bonus | 4 | 20 |
# | 4. The residual by hand | 1 | 6 |
# | 5. Why not draw from p again? | 2 | 12 |
# | 6. Lossless or not? | 3 | 15 |
# | 7. The end among the guesses | 2 | 10 |
# | 8. Two caches in step | 3 | 20 |
# | 9. How far to guess? | 2 | 10 |
# | 10. The text as its own draft | 2 | 12 |
# | 11. The mask of a tree | 2 | 10 |
# | 12. The judge as a kernel in Triton | 5 | 40 |
# | together | 31 | 178 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("speculative_decoding.speculative_greedy", 1)` gives the first
# hint, `2` the second, stronger one. Hints cost no points.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
import torch
from torch import Tensor

from llmopt_lab.grading import hint
from llmopt_lab.speculative_decoding.cases import (
    RULES,
    Chooser,
    Rule,
    TableModel,
    guides_speculative_decode,
)
from llmopt_lab.speculative_decoding.chance import Dice, outcomes
from llmopt_lab.speculative_decoding.speed import speedup
from llmopt_lab.widgets.predict import Predict

# %% [markdown]
# ## 1. Too good to be true (3 points, 15 minutes)
#
# This is the guide's decoder, after its `for` loop has made `k` guesses:
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
# It does not run: `done`, `accept_token` and `verify` are nowhere. `guides_speculative_decode` gives
# it what is missing, and even the whole text for `verify`, where the guide sends the guesses alone.
# Its models are greedy: `model.choices(text, n_last)` is one forward pass over `text` and returns the
# token that the model would put after each of the last `n_last` tokens.
#
# "2-4 tokens per large model call (2-4x speedup!)", says the guide. Let us read the meter with drafts
# that are right less and less often.

# %%
meter = Predict(
    "A draft that is never right, 4 guesses a round: how many tokens per call of the large model "
    "does the guide's loop report?",
    unit="tokens",
)
meter

# %%
prompt = [3, 1, 4]
for accuracy in (0.9, 0.6, 0.0):
    large = Chooser(50, seed=1)
    small = Chooser(50, seed=2, like=(large, accuracy))
    got = guides_speculative_decode(small, large, prompt, k=4, n_new=200)
    per_call = 200 / large.n_calls
    plain = [*prompt]
    while len(plain) < len(got):
        plain += large.choices(plain, 1)
    wrong = sum(a != b for a, b in zip(got, plain, strict=True))
    print(f"draft right {accuracy:.0%}: {per_call:.2f} tokens a call, {wrong} of 200 tokens wrong")
meter.reveal(per_call)

# %% [markdown]
# A speed meter that does not depend on the draft measures nothing. And the text is not the large
# model's: after the first refusal it goes its own way.
#
# By hand. The text is `3 1 4`, the guesses are `A B C D`, and the large model would write `A X`. The
# guide corrects the *last* guess: `3 1 4 A B C X`. What should stand there?
#
# Write the loop. The text must be that of the large model alone, token for token, whatever the draft,
# and the large model must be called as seldom as possible. Keep one thing in mind that the guide does
# not use: when all `k` guesses are right, the same pass has already said what comes after the last.

# %% nbgrader={"grade_id": "speculative_decoding.speculative_greedy", "solution": true}
def speculative_greedy(
    small: Chooser, large: Chooser, prompt: list[int], k: int, n_new: int
) -> list[int]:
    """`prompt` and `n_new` tokens more, those that `large` alone would write.

    Args:
        small, large: model.choices(text, n_last) is one pass: what the model would put after each
            of the last n_last tokens of `text`, which is a list and includes the prompt.
        k: guesses a round, at least 1.
    """
    ### BEGIN SOLUTION
    text, end = [*prompt], len(prompt) + n_new
    while len(text) < end:
        guesses = []
        for _ in range(k):
            guesses += small.choices(text + guesses, 1)
        right = large.choices(text + guesses, k + 1)
        n_kept = 0
        while n_kept < k and guesses[n_kept] == right[n_kept]:
            n_kept += 1
        text += right[: n_kept + 1]
    return text[:end]
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.speculative_greedy-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("speculative_decoding.speculative_greedy", speculative_greedy)

# %% [markdown]
# ## 2. Which row judges which token? (2 points, 8 minutes)
#
# A forward pass returns one row of logits for each token that it is fed: row `i` says what comes
# *after* fed token `i`. The target has a KV cache, so it is fed only what it has not read: the rest
# of the text, and the guesses. By hand, for a text of 5 tokens of which 3 are cached, and 2 guesses:
#
# ```text
# place in the text      0   1   2   3   4   5   6
#                        a   b   c   d   e   X   Y
#                        (cached)    fed: row 0 to 3
#
# row 0, after d: knows e already, judges nothing
# row 1, after e: judges X
# row 2, after X: judges Y
# row 3, after Y: says what follows if both are kept
# ```
#
# So the answer is `[1, 2, 3]`. There is always at least one token of the text that is not cached.
# The guide sends `tokens[-k:]`, the guesses alone: then there is no row at all that could judge the
# first.

# %% nbgrader={"grade_id": "speculative_decoding.judging_rows", "solution": true}
def judging_rows(n_text: int, n_cached: int, n_guesses: int) -> list[int]:
    """The row that judges each guess, and last the one for the token after all of them.

    Args:
        n_text: tokens of the text, the guesses not counted.
        n_cached: of these, how many the target has read before this pass; less than n_text.
        n_guesses: 0 or more.
    """
    ### BEGIN SOLUTION
    first = n_text - n_cached - 1
    return list(range(first, first + n_guesses + 1))
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.judging_rows-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.judging_rows", judging_rows)

# %% [markdown]
# ## 3. Judge, residual, bonus (4 points, 20 minutes)
#
# With sampling there is no single right token to compare with. The guide's `accept_token(spec, verif)`
# sees two tokens; what is needed is two *distributions*. Each guess `x` was drawn from a row of q, and
# the target's row for the same place is p:
#
# - go through the guesses in order; keep `x` with probability `min(1, p(x) / q(x))`;
# - the first one that is refused ends the round, and in its place comes a token drawn from the
#   *residual*, `max(p - q, 0)` divided by its sum;
# - if none is refused, a bonus token is drawn from p's last row.
#
# Why is the result distributed as p? A guess of `x` comes and is kept with probability
# `q(x) * min(1, p(x) / q(x)) = min(p(x), q(x))`. What `x` then lacks is `max(p(x) - q(x), 0)`, and
# this is what the residual gives it.
#
# Everything that is left to chance goes through `dice`: `dice.happens(chance)` is True with that
# probability, and `dice.pick(p)` is a token drawn from p, (n_vocab,), whose sum is 1. So the check
# need not draw samples: it runs your function once for *every* way the dice can fall, on a
# vocabulary of 3, adds up the probabilities of each text of 3 tokens, and compares them with the
# target's. They must agree to 12 digits. `outcomes` does it, and you can try it:

# %%
outcomes(lambda dice: "early" if dice.happens(0.25) else dice.pick(torch.tensor([0.5, 0.0, 0.5])))

# %% nbgrader={"grade_id": "speculative_decoding.judge_round", "solution": true}
def judge_round(guesses: list[int], p: Tensor, q: Tensor, dice: Dice) -> list[int]:
    """The tokens that this round adds to the text: 1 to len(guesses) + 1.

    Args:
        guesses: k tokens; guess i was drawn from q[i].
        p: (k + 1, n_vocab), the target's rows; p[i] is for the place of guess i, the last for the
            place after all.
        q: (k, n_vocab), the draft's.
        dice: every chance is taken from it.
    """
    ### BEGIN SOLUTION
    for i, x in enumerate(guesses):
        if not dice.happens(min(1.0, float(p[i, x] / q[i, x]))):
            missing = (p[i] - q[i]).clamp_min(0)
            return [*guesses[:i], dice.pick(missing / missing.sum())]
    return [*guesses, dice.pick(p[-1])]
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.judge_round-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("speculative_decoding.judge_round", judge_round)

# %% [markdown]
# ## 4. The residual by hand (1 point, 6 minutes)
#
# Four tokens, and in one place:
#
# ```text
#         A      B      C      D
# p    0.40   0.35   0.15   0.10     the target
# q    0.10   0.25   0.55   0.10     the draft
# ```
#
# The draft guesses one token, drawn from q. With paper and pencil: with what probability is the guess
# kept, and what is the distribution from which the token is drawn if it is not? Return the numbers.

# %% nbgrader={"grade_id": "speculative_decoding.residual_by_hand", "solution": true}
def residual_by_hand() -> tuple[float, list[float]]:
    """(chance that the guess is kept, [probability of A, B, C, D after a refusal])."""
    ### BEGIN SOLUTION
    return 0.60, [0.75, 0.25, 0, 0]
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.residual_by_hand-check", "grade": true, "locked": true, "points": 1}
from llmopt_lab.grading import check

check("speculative_decoding.residual_by_hand", residual_by_hand)

# %% [markdown]
# ## 5. Why not draw from p again? (2 points, 12 minutes)
#
# After a refusal one would like to ask the target: draw from p, it is the target's distribution, what
# could be wrong? Many implementations on the web do so. Take the numbers of exercise 4:

# %%
biased = Predict(
    "A guess is kept with chance min(1, p/q), and if it is refused, the token is drawn from p "
    "itself. How often does B come out, which should come with 0.35?",
    answer=0.39,
    tolerance=0.01,
    explain="As a kept guess with min(0.35, 0.25) = 0.25. A refusal happens with 0.40, and then B "
    "comes with 0.35: 0.25 + 0.14 = 0.39.",
)
biased

# %% [markdown]
# The tokens that the draft likes get a second chance that they should not have: C was offered enough
# already. Go through the two ways a token can come out, and write down the distribution for any p and
# q, without drawing a single sample. Then say how far it is from p. The usual measure is the *total
# variation*: half the sum of |out - p|, which is the probability that must be moved to make one
# distribution of the other.

# %% nbgrader={"grade_id": "speculative_decoding.redrawn_from_p", "solution": true}
def redrawn_from_p(p: Tensor, q: Tensor) -> tuple[Tensor, float]:
    """The distribution of the token, (n_vocab,), if a refused guess is replaced by a draw from p;
    and its total variation from p.

    The guess is drawn from q, and kept with chance min(1, p/q).
    """
    ### BEGIN SOLUTION
    kept = torch.minimum(p, q)
    out = kept + (1 - kept.sum()) * p
    return out, float((out - p).abs().sum() / 2)
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.redrawn_from_p-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.redrawn_from_p", redrawn_from_p)

# %% [markdown]
# ## 6. Lossless or not? (3 points, 15 minutes)
#
# Four rules that you can find in the world, for one guess that was drawn from q:

# %%
for name, rule in RULES.items():
    print(f"{name:33}{rule.__doc__}")

# %%
Predict(
    "How many of the four leave the text distributed as p?",
    answer=2,
    tolerance=0,
    explain="The first and the last. A sample of p is distributed as p whether or not it equals a "
    "guess; but equal it seldom is.",
)

# %% [markdown]
# A rule is a function: `rule(guess, p, q, dice)` returns `(token, kept)`, the token that comes out and
# whether it is the guess that was kept. Somebody gives you such a rule and says "lossless". Write the
# judge: for each rule the total variation of what comes out from p, and how often the guess is kept,
# both *exact*. Best first: the smaller total variation, and of those that are equal to 9 digits, the
# one that keeps more.
#
# `outcomes(program)` calls `program(dice)` for every way the dice can fall and returns
# `{what it returned: probability}`. The draft's own draw is left to chance, too: who makes it?

# %% nbgrader={"grade_id": "speculative_decoding.rank_rules", "solution": true}
def rank_rules(rules: dict[str, Rule], p: Tensor, q: Tensor) -> list[tuple[str, float, float]]:
    """(name, total variation of the outcome from p, chance that a guess is kept), the best first.

    p, q: (n_vocab,). A guess is drawn from q.
    """
    ### BEGIN SOLUTION
    found = []
    for name, rule in rules.items():
        joint = outcomes(lambda dice, rule=rule: rule(dice.pick(q), p, q, dice))
        out = [sum(chance for (x, _), chance in joint.items() if x == t) for t in range(len(p))]
        distance = sum(abs(a - b) for a, b in zip(out, p.tolist(), strict=True)) / 2
        found.append((name, distance, sum(chance for (_, kept), chance in joint.items() if kept)))
    return sorted(found, key=lambda row: (round(row[1], 9), -row[2]))
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.rank_rules-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("speculative_decoding.rank_rules", rank_rules)

# %% [markdown]
# ## 7. The end among the guesses (2 points, 10 minutes)
#
# The draft may guess that the text ends, and go on guessing. Say `E` is the end:
#
# ```text
# guesses  A E B C    3 kept, then X     ->  A E         done: B was kept, but nothing follows an end
# guesses  A B E C    2 kept, then X     ->  A B X       not done: this E was refused
# guesses  A B        2 kept, then E     ->  A B E       done
# ```
#
# And there is a limit: the text may get only `n_left` more tokens. Nothing may come after the end, and
# nothing beyond the limit. The guide's loop asks `while not done` and never says what `done` is.

# %% nbgrader={"grade_id": "speculative_decoding.what_stays", "solution": true}
def what_stays(
    guesses: list[int], n_kept: int, token: int, ends: set[int], n_left: int
) -> tuple[list[int], bool]:
    """(the tokens that this round adds to the text, whether the text is done).

    Args:
        guesses: of which the first n_kept were kept.
        token: the target's own, after them.
        ends: a model may have several end tokens. The one that ends the text stays in it.
        n_left: how many tokens may still be added, at least 1; with the last the text is done.
    """
    ### BEGIN SOLUTION
    new = []
    for x in [*guesses[:n_kept], token][:n_left]:
        new.append(x)
        if x in ends:
            return new, True
    return new, len(new) == n_left
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.what_stays-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.what_stays", what_stays)

# %% [markdown]
# ## 8. Two caches in step (3 points, 20 minutes)
#
# Both models have a KV cache, and both have read tokens that were refused afterwards. The keys and
# values of a refused token must go: whoever leaves them there lets the next token look at something
# that is not in the text. The models:
#
# - `model.read(tokens, n_last=n)` reads on from where it is, in one pass, and returns the logits after
#   each of the last n tokens, (n, n_vocab);
# - `model.length` is the number of tokens that it has read;
# - `model.rewind(length)` forgets all from there on. Fewer it may have, then nothing happens.
#
# A round with `k` 2. Text `a b c`; the draft has read `a b`, the target, too.
#
# ```text
# draft  reads c, guesses X;  reads X, guesses Y             2 passes; Y itself it does not read
# target reads c X Y                                         1 pass, 3 rows
#
# X kept, Y refused, Z in its place:   text a b c X Z        both go back to a b c X
# both kept, and the bonus is Z:       text a b c X Y Z      target has a b c X Y, the draft a b c X
# ```
#
# In the second case the draft has two tokens to read in the next round, Y and Z. Feed it only the
# newest one, and it has a hole where Y should be. Nothing crashes, the text stays right, and the
# guesses get worse.
#
# Write one greedy round. You are graded on the tokens, on what both have in their caches afterwards,
# and on counts: one pass of the target, k of the draft, and no token of the text read twice.

# %% nbgrader={"grade_id": "speculative_decoding.greedy_round", "solution": true}
def greedy_round(target: TableModel, draft: TableModel, text: list[int], k: int) -> list[int]:
    """The new tokens of one round, 1 to k + 1: the guesses that are kept and one of the target's.

    Args:
        target, draft: each has read a part of `text`, from its beginning on. Afterwards each has
            read a part of `text` with the new tokens, and all but what it must still read.
        text: all tokens so far. Do not change it.
        k: guesses, at least 1; the likeliest token is guessed, and it is kept if the target finds
            it the likeliest, too.
    """
    ### BEGIN SOLUTION
    guesses, unread = [], text[draft.length :]
    for _ in range(k):
        guesses.append(int(draft.read(unread, n_last=1)[0].argmax()))
        unread = guesses[-1:]
    logits = target.read(text[target.length :] + guesses, n_last=k + 1)
    right = logits.argmax(dim=1).tolist()
    n_kept = 0
    while n_kept < k and guesses[n_kept] == right[n_kept]:
        n_kept += 1
    for model in (target, draft):
        model.rewind(len(text) + n_kept)
    return right[: n_kept + 1]
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.greedy_round-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("speculative_decoding.greedy_round", greedy_round)

# %% [markdown]
# ## 9. How far to guess? (2 points, 10 minutes)
#
# Each guess is kept with chance `alpha`, and a refusal ends the round. A round yields at least one
# token, a second one if the first guess is kept, a third one if the first two are: on average
#
# ```text
# tokens = 1 + alpha + alpha^2 + ... + alpha^k
# ```
#
# It costs one pass of the target and k of the draft, each `c` times as long as one of the target.
# Without speculation a token costs one pass of the target. So the speed-up is tokens over cost.

# %%
slow = Predict(
    "The guide's 4 guesses, of which 30 % are kept; the draft takes a fifth of the target's time. "
    "What is the speed-up?",
    unit="times",
)
slow

# %%
gain = speedup(0.3, 4, 0.2)
print(f"{gain:.2f} times as fast")
slow.reveal(gain)

# %% [markdown]
# Less than 1: it is slower than no speculation at all. Guessing 0 tokens is a choice, too.
#
# Find the best k from 0 to `most`; of equally good ones the smallest. `alpha` may be 0, and it may be
# 1.

# %% nbgrader={"grade_id": "speculative_decoding.best_plan", "solution": true}
def best_plan(alpha: float, c: float, most: int) -> tuple[int, float, float]:
    """(k, tokens a call of the target, speed-up) of the k that is fastest."""
    ### BEGIN SOLUTION
    best = (0, 1.0, 1.0)
    for k in range(1, most + 1):
        tokens = sum(alpha**i for i in range(k + 1))
        if tokens / (k * c + 1) > best[2]:
            best = (k, tokens, tokens / (k * c + 1))
    return best
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.best_plan-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.best_plan", best_plan)

# %% [markdown]
# ## 10. The text as its own draft (2 points, 12 minutes)
#
# *Needs section 4 of the lesson.*
#
# A draft need not be a model. Who edits code, or answers from a document, repeats long pieces of the
# prompt. So guess that the text goes on as it did the last time:
#
# ```text
# text   5 7 9 2 4 7 9 8 1 7 9        longest 3, k 2
#
# its last 3 tokens are 1 7 9: nowhere earlier
# its last 2 tokens are 7 9: earlier at 1 and, later, at 5       ->  guess 8 1, what followed at 5
# ```
#
# Look for the longest ending first, and for the latest place. What follows may run into the ending
# itself: the text `3 3 3` guesses another 3. If not even the last token occurs earlier, there is no
# guess.

# %% nbgrader={"grade_id": "speculative_decoding.lookup_guesses", "solution": true}
def lookup_guesses(text: list[int], k: int, longest: int) -> list[int]:
    """Up to k tokens that followed the text's last n tokens, n from `longest` down to 1, when these
    n tokens came last before; [] if they never did.
    """
    ### BEGIN SOLUTION
    for n in range(min(longest, len(text) - 1), 0, -1):
        for place in reversed(range(len(text) - n)):
            if text[place : place + n] == text[-n:]:
                return text[place + n : place + n + k]
    return []
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.lookup_guesses-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.lookup_guesses", lookup_guesses)

# %% [markdown]
# ## 11. The mask of a tree (2 points, 10 minutes)
#
# *Needs section 4 of the lesson.*
#
# Why guess one continuation, if the second likeliest token is often the right one? A tree of guesses
# goes through the target in one pass, too, if every node sees only its own past:
#
# ```text
#            text          node   parent    sees          depth
#           /    \            0       -1    0             0
#          0      1           1       -1    1             0
#         / \      \          2        0    0 2           1
#        2   3      4         3        0    0 3           1
#            |                4        1    1 4           1
#            5                5        3    0 3 5         2
# ```
#
# `parents` is `[-1, -1, 0, 0, 1, 3]`; -1 is the end of the text, and a parent comes before its
# children. All nodes see all of the text; you write the square part, nodes against nodes. And the
# depth: nodes 2, 3 and 4 all claim the same place in the text, and RoPE must be told so.

# %% nbgrader={"grade_id": "speculative_decoding.tree_attention", "solution": true}
def tree_attention(parents: list[int]) -> tuple[Tensor, list[int]]:
    """((n_nodes, n_nodes) bool: True where the row's node sees the column's; the depth of each)."""
    ### BEGIN SOLUTION
    mask = torch.eye(len(parents), dtype=torch.bool)
    depths = []
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return mask, depths
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.tree_attention-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("speculative_decoding.tree_attention", tree_attention)

# %% [markdown]
# ## 12. The judge as a kernel in Triton (5 points, 40 minutes)
#
# *Needs section 7 of the lesson.*
#
# In a vocabulary of 128,000 a row of logits is half a megabyte. The usual torch code makes two
# softmaxes, a ratio, a difference, a clamp, a sum, a division and a draw of it, and each of them reads
# and writes rows of that size. One kernel does it from the logits, in tiles, and writes two numbers.
#
# One program has one guess and its row of p and of q. The random numbers come from outside, uniform
# in [0, 1): so the result is certain and can be graded.
#
# ```text
# 1. for p and for q: m, the largest logit, and total, the sum of exp(logit - m)
#    the probability of a token is exp(logit - m) / total
# 2. kept:  u_keep * q(guess) < p(guess)
# 3. missing = sum of max(p - q, 0)
# 4. token: the first one whose running sum of max(p - q, 0), itself included, exceeds
#    u_pick * missing
# ```
#
# Step 4 draws from the residual without dividing it by its sum. How can the *first* be found in tiles?
# The running sums never fall, so the number of tokens whose running sum does not exceed it is the
# answer. `tl.cumsum(x, axis=0)` is the running sum in one tile; what must be added to it?
#
# The token is written whether the guess is kept or not; the caller looks at it after a refusal. Where
# p and q are equal nothing is missing, and the token does not matter as long as it is a token.
#
# Questions to answer before you write. What is the logit of a column past the end of the row, so that
# its probability is 0? Top-k has left some logits at -inf, perhaps a whole tile of them: what is
# `exp(-inf - -inf)`?
#
# You are graded in float32, without a GPU: Triton interprets your kernel on the CPU.

# %% nbgrader={"grade_id": "speculative_decoding.judge_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def judge_kernel(
    p_logits_ptr, q_logits_ptr,  # (n_rows, n_vocab) float32, each; -inf: not allowed
    guesses_ptr,  # (n_rows,) int32
    u_keep_ptr, u_pick_ptr,  # (n_rows,) float32, each, uniform in [0, 1)
    kept_ptr,  # (n_rows,) int32: 1 if the guess is kept, else 0
    token_ptr,  # (n_rows,) int32: drawn from the residual; in [0, n_vocab)
    n_vocab,
    TILE: tl.constexpr,
):
    """One program: one guess against its row of p and q."""
    row = tl.program_id(0)
    guess = tl.load(guesses_ptr + row)
    u_keep = tl.load(u_keep_ptr + row)
    u_pick = tl.load(u_pick_ptr + row)
    p_row = p_logits_ptr + row * n_vocab
    q_row = q_logits_ptr + row * n_vocab
    ### BEGIN SOLUTION
    m_p = -float("inf")
    m_q = -float("inf")
    for first in range(0, n_vocab, TILE):
        col = first + tl.arange(0, TILE)  # (TILE,)
        m_p = tl.maximum(m_p, tl.max(tl.load(p_row + col, col < n_vocab, other=-float("inf"))))
        m_q = tl.maximum(m_q, tl.max(tl.load(q_row + col, col < n_vocab, other=-float("inf"))))
    total_p = 0.0
    total_q = 0.0
    for first in range(0, n_vocab, TILE):
        col = first + tl.arange(0, TILE)
        total_p += tl.sum(tl.exp(tl.load(p_row + col, col < n_vocab, other=-float("inf")) - m_p))
        total_q += tl.sum(tl.exp(tl.load(q_row + col, col < n_vocab, other=-float("inf")) - m_q))
    p_guess = tl.exp(tl.load(p_row + guess) - m_p) / total_p
    q_guess = tl.exp(tl.load(q_row + guess) - m_q) / total_q
    tl.store(kept_ptr + row, (u_keep * q_guess < p_guess).to(tl.int32))
    missing = 0.0
    for first in range(0, n_vocab, TILE):
        col = first + tl.arange(0, TILE)
        p = tl.exp(tl.load(p_row + col, col < n_vocab, other=-float("inf")) - m_p) / total_p
        q = tl.exp(tl.load(q_row + col, col < n_vocab, other=-float("inf")) - m_q) / total_q
        missing += tl.sum(tl.maximum(p - q, 0.0))
    before = 0.0
    token = 0
    for first in range(0, n_vocab, TILE):
        col = first + tl.arange(0, TILE)
        p = tl.exp(tl.load(p_row + col, col < n_vocab, other=-float("inf")) - m_p) / total_p
        q = tl.exp(tl.load(q_row + col, col < n_vocab, other=-float("inf")) - m_q) / total_q
        lack = tl.maximum(p - q, 0.0)
        running = before + tl.cumsum(lack, axis=0)
        token += tl.sum((running <= u_pick * missing).to(tl.int32))
        before += tl.sum(lack)
    tl.store(token_ptr + row, tl.minimum(token, n_vocab - 1))
    ### END SOLUTION


# %% nbgrader={"grade_id": "speculative_decoding.judge_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("speculative_decoding.judge_kernel", judge_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/7_speculative_decoding.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/7_speculative_decoding.ipynb` has one answer to each exercise. Yours may look different.
#
# The whole algorithm, with everything that you wrote in it, is `speculative_decode` in
# `llmopt_lab/speculative_decoding/reference.py`. Exercises 3, 7, 8 and 10 are its parts, and
# `tree.py` beside it judges the trees of exercise 11.
