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
# # Exercises 6: Distillation
# {{colab_badge}}
#
# A small model learns from a large one's whole distribution, not only from the right answer. You
# repair a guide's loss that grows with the length of the text, take its gradient by hand, measure
# why there is a T^2 in it, keep padding out and the teacher quiet. Then you put a teacher on disk in
# 4 bytes a token, ask what 97 % are 97 % of, and end without any logits in memory: first in torch,
# then in a kernel. In all of them **p is the teacher's distribution and q the student's**.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. The loss that grows with the text | 2 | 10 |
# | 2. Right shape by accident | 2 | 10 |
# | 3. Which way is the teacher? | 2 | 12 |
# | 4. T^2 by measurement | 2 | 12 |
# | 5. Which rows count? | 2 | 10 |
# | 6. The distillation loss | 4 | 20 |
# | 7. The teacher that drops out | 3 | 15 |
# | 8. Two humps | 2 | 12 |
# | 9. A teacher on disk | 4 | 20 |
# | 10. 97 % of what? | 1 | 8 |
# | 11. The logits that are never there | 4 | 25 |
# | 12. The KL of a row as a kernel in Triton | 5 | 40 |
# | together | 33 | 194 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("distillation.soft_loss", 1)` gives the first hint, `2` the
# second, stronger one. Hints cost no points.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.bench import load_results
from llmopt_lab.core.memory import tiles
from llmopt_lab.distillation import distillation_loss as reference_loss
from llmopt_lab.distillation import forward_kl, reverse_kl
from llmopt_lab.distillation.cases import ragged
from llmopt_lab.distillation.trials import bytes_held, one_step
from llmopt_lab.distillation.two_humps import fit_one_hump, two_humps
from llmopt_lab.grading import hint
from llmopt_lab.nn.weights import load
from llmopt_lab.widgets.predict import Predict

# %% [markdown]
# ## 1. The loss that grows with the text (2 points, 10 minutes)
#
# This is the guide's soft part, in full. The logits of a language model are (batch, n, n_vocab).


# %%
def guides_soft_part(student_logits, teacher_logits, temperature=3.0):
    teacher_probs = F.softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1), teacher_probs, reduction="batchmean"
    ) * (temperature**2)


# %%
longer = Predict(
    "The same two models, the same sort of text, but texts of 128 tokens where there were 16. How "
    "many times as large is the guide's loss?",
    unit="times",
)
longer

# %%
student, teacher, _, _ = ragged(4, 128, n_vocab=50)
long = guides_soft_part(student, teacher)
short = guides_soft_part(student[:, :16], teacher[:, :16])
print(f"16 tokens: {short:.1f}   128 tokens: {long:.1f}")
longer.reveal(float(long / short))

# %% [markdown]
# `batchmean` divides by the first dimension, and that is the batch alone: every place counts in full.
# The guide then adds `0.7 *` this and `0.3 *` a task loss that *is* a mean over the places. With 128
# tokens that is no 70 to 30 any more, it is 89.6 to 0.3.
#
# By hand, one row at T = 1: p = (0.5, 0.5), q = (0.8, 0.2). KL(p || q) = 0.5 ln(0.5/0.8) + 0.5
# ln(0.5/0.2) = 0.223 nats. Two texts of three such rows have the loss 0.223, too.
#
# Write the soft part as it should be: T^2 times the mean of KL(p || q) over **all rows**, whatever the
# dimensions in front of the vocabulary. p and q are softmax(logits / T). Logits may be large: stay in
# logarithms.


# %% nbgrader={"grade_id": "distillation.soft_loss", "solution": true}
def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * mean over the rows of KL(softened teacher || softened student), a scalar, in nats.

    Args:
        student_logits, teacher_logits: (.., n_vocab); a row is one place of one text.
        temperature: T.
    """
    ### BEGIN SOLUTION
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    each_row = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return temperature**2 * each_row.mean()
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.soft_loss-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.soft_loss", soft_loss)

# %% [markdown]
# ## 2. Right shape by accident (2 points, 10 minutes)
#
# The guide's other part is `F.cross_entropy(student_logits, labels)`. `labels` is nowhere defined. Give
# it the next tokens, and the line fails, mostly:

# %%
rng = torch.Generator().manual_seed(0)
for n, n_vocab in [(32, 50), (50, 50)]:
    logits = torch.randn(4, n, n_vocab, generator=rng)
    labels = torch.randint(n_vocab, (4, n), generator=rng)
    try:
        print(f"{n} places, {n_vocab} tokens: {F.cross_entropy(logits, labels):.3f}")
    except RuntimeError as error:
        print(f"{n} places, {n_vocab} tokens: {error}")

# %%
silent = Predict(
    "Is the number for 50 places and 50 tokens the mean cross-entropy of the labels?",
    choices=["yes", "no, a softmax over the places", "no, a sum over the places"],
    answer="no, a softmax over the places",
    explain="cross_entropy takes dimension 1 for the classes. It is the places here; the sizes "
    "agree by accident, and nothing fails.",
)
silent

# %% [markdown]
# A second trap is older than language models: the row of place `i` has read tokens 0 to i, so it
# predicts token **i + 1**. And a third: shapes that broadcast. `log_q[..., labels]` looks like "the
# label's entry of each row" and gives every row the labels of all rows.
#
# By hand: of the tokens `7 3 5` row 0 is judged by 3, row 1 by 5, and row 2 by nothing, as nobody
# knows what comes next.


# %% nbgrader={"grade_id": "distillation.task_loss", "solution": true}
def task_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens, a scalar, in nats.

    Args:
        logits: (batch, n, n_vocab), of model(tokens).
        tokens: (batch, n) int64, n at least 2.
    """
    ### BEGIN SOLUTION
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.task_loss-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.task_loss", task_loss)

# %% [markdown]
# ## 3. Which way is the teacher? (2 points, 12 minutes)
#
# What does one step of training do to the student's logits? Pencil and paper: take one row, T = 1.
# The loss is `sum p_i log p_i - sum p_i log q_i`, and `log q_i = z_i - log sum_j exp(z_j)`. Only the
# second sum knows the student. Derive it for one logit, `z_i`.
#
# A check on your result: for p = (0.7, 0.2, 0.1) and q = (0.5, 0.3, 0.2) the gradient is
# (-0.2, 0.1, 0.1). It adds up to 0, and the step, against the gradient, raises the first logit.
#
# Then bring back the rest of `soft_loss`: z is divided by T before the softmax, the loss is multiplied
# by T^2, and it is a mean over all rows. You get p and q, softened already, and no logits: here you
# are autograd.


# %% nbgrader={"grade_id": "distillation.logit_gradient", "solution": true}
def logit_gradient(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """The gradient of exercise 1's loss for the student's logits, (.., n_vocab), in closed form.

    Args:
        p, q: (.., n_vocab), softmax(logits / temperature) of teacher and student.
        temperature: T.
    """
    ### BEGIN SOLUTION
    n_rows = p.shape[:-1].numel()
    return temperature * (q - p) / n_rows
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.logit_gradient-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.logit_gradient", logit_gradient)

# %% [markdown]
# ## 4. T^2 by measurement (2 points, 12 minutes)
#
# Why the factor T^2? Without it a warmer teacher would have less and less to say: the gradient
# shrinks. By how much?

# %%
weaker = Predict(
    "The mean KL alone, without T^2. How many times smaller is the norm of its gradient at T = 20 "
    "than at T = 1?",
    unit="times",
)
weaker

# %%
student, teacher, _, _ = ragged(4, 16, n_vocab=50)
norms = {}
for temperature in (1.0, 3.0, 20.0):
    logits = student.clone().requires_grad_()
    reference_loss(logits, teacher, temperature=temperature).backward()
    norms[temperature] = float(logits.grad.norm())
    print(
        f"T = {temperature:>4g}   with T^2 {norms[temperature]:.4f}   "
        f"without {norms[temperature] / temperature**2:.6f}"
    )
weaker.reveal(norms[1.0] / norms[20.0] * 20**2)

# %% [markdown]
# One 1/T comes from the chain rule. The other one is only nearly there: p and q both flatten, and what
# is between them shrinks like 1/T once T is large against the logits. So "T^2" is a limit. Measure
# how close it is: if the norm of the gradient falls like T ** -power from `low` to `high`, what is the
# power? (If it falls from 8 to 2 while T goes from 1 to 2, the power is 2.) Here autograd is welcome.


# %% nbgrader={"grade_id": "distillation.measured_power", "solution": true}
def measured_power(
    student_logits: Tensor, teacher_logits: Tensor, low: float, high: float
) -> float:
    """The power of 1/T by which the gradient's norm falls between two temperatures.

    The gradient is that of the mean KL(softened teacher || softened student), **without** T^2, for
    student_logits.

    Args:
        student_logits, teacher_logits: (.., n_vocab).
        low, high: temperatures, low < high.
    """
    ### BEGIN SOLUTION
    lengths = []
    for t in (low, high):
        z = student_logits.clone().requires_grad_()
        kl = F.kl_div(
            F.log_softmax(z / t, dim=-1), F.softmax(teacher_logits / t, dim=-1), reduction="none"
        )
        (slope,) = torch.autograd.grad(kl.sum(dim=-1).mean(), z)
        lengths.append(slope.norm())
    return float(torch.log(lengths[0] / lengths[1]) / torch.log(torch.tensor(high / low)))
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.measured_power-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.measured_power", measured_power)

# %% [markdown]
# ## 5. Which rows count? (2 points, 10 minutes)
#
# A batch for training has a prompt in front and padding behind, and neither is to be learned. The
# model gets `tokens[:, :-1]`, so there are n - 1 rows, and row `i` predicts token i + 1. For one text
# of 6 tokens with a prompt of 2, in a batch of width 8; E is the end token, and it pads, too:
#
# ```text
# place           0  1  2  3  4  5  6  7
# token           a  b  C  D  F  E  E  E
#                 prompt    answer    padding
#
# row             0  1  2  3  4  5  6
# predicts        b  C  D  F  E  E  E
# counts          -  x  x  x  x  -  -
# ```
#
# The row at the prompt's last token counts: it predicts C. And so does the one that predicts the first
# E, for this is how a student learns to stop. Whoever masks by `tokens != E` loses it.


# %% nbgrader={"grade_id": "distillation.rows_that_count", "solution": true}
def rows_that_count(tokens: Tensor, n_prompt: Tensor, n_text: Tensor) -> Tensor:
    """(batch, n - 1) bool: True for the rows that predict a token of the answer.

    Args:
        tokens: (batch, n) int64; 0 ends an answer, and pads. It may occur elsewhere, too.
        n_prompt: (batch,) int64: tokens of each prompt, at least 1.
        n_text: (batch,) int64: tokens of each prompt and answer together, the answer's end included.
    """
    ### BEGIN SOLUTION
    predicted = torch.arange(1, tokens.shape[1])  # the place of each row's label
    return (predicted >= n_prompt[:, None]) & (predicted < n_text[:, None])
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.rows_that_count-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.rows_that_count", rows_that_count)

# %% [markdown]
# ## 6. The distillation loss (4 points, 20 minutes)
#
# Now all of it. What a student minimises is
#
# ```text
# soft_weight * T^2 * mean KL(p || q)  +  (1 - soft_weight) * mean cross-entropy of the labels
# ```
#
# Both means are over the rows that count. The labels here are shifted already, one for each row.
#
# Questions to answer before you write. Which of the two parts meets the temperature? What does half a
# batch of padding do to a mean over all rows? A row that does not count may hold anything, -100 for a
# label, infinite logits: what is `nan * 0`? Where must no gradient go?

# %%
padded = Predict(
    "Half of the rows are padding, where student and teacher happen to agree. A mean over ALL rows "
    "instead of those that count makes the soft part how many times as large?",
    answer=0.5,
    unit="times",
    explain="The sum is the same, the divisor is twice as large. And if student and teacher do NOT "
    "agree on padding, which is usual, the student spends its capacity on it.",
)
padded


# %% nbgrader={"grade_id": "distillation.distillation_loss", "solution": true}
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    temperature: float,
    soft_weight: float,
) -> Tensor:
    """What a student minimises, a scalar, in nats a token.

    Args:
        student_logits, teacher_logits: (batch, n, n_vocab). No gradient goes to the teacher's.
        labels: (batch, n) int64, the token that each row predicts; where mask is False anything.
        mask: (batch, n) bool, True for the rows that count.
        temperature: T.
        soft_weight: from 0 (labels alone) to 1.
    """
    ### BEGIN SOLUTION
    s, t = student_logits[mask], teacher_logits[mask].detach()  # (rows, n_vocab)
    log_p = F.log_softmax(t / temperature, dim=-1)
    log_q = F.log_softmax(s / temperature, dim=-1)
    soft = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    hard = F.cross_entropy(s, labels[mask])
    return soft_weight * soft + (1 - soft_weight) * hard
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.distillation_loss-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("distillation.distillation_loss", distillation_loss)

# %% [markdown]
# ## 7. The teacher that drops out (3 points, 15 minutes)
#
# The guide's trainer asks its teacher under `no_grad`, and never calls `teacher.eval()`. Does the same
# question get the same answer twice?

# %%
torch.manual_seed(0)
teacher_model = nn.Sequential(nn.Embedding(50, 16), nn.Dropout(0.1), nn.Linear(16, 50))
tokens = torch.randint(50, (4, 32))
for mode in (True, False):
    teacher_model.train(mode)
    with torch.no_grad():
        first, second = (teacher_model(tokens).log_softmax(dim=-1) for _ in range(2))
    apart = forward_kl(first, second).mean()
    print(f"{'training' if mode else 'evaluation'} mode: two answers are {apart:.6f} nats apart")

# %% [markdown]
# `no_grad` saves the graph; it does not switch dropout off. In training mode the student chases noise.
# And it comes back: if teacher and student are parts of one trainer, `trainer.train()` at the start of
# an epoch wakes the teacher's dropout again.
#
# The guide has no optimiser and no step either. Write one: ask the teacher, ask the student, one
# update of the student. The teacher may come to you in either mode, and so may the student, and there
# may be gradients left over in it. Nothing may change in the teacher's weights, and its answer must
# not keep a graph: the larger model's activations are the memory you do not have. `one_step`, which
# the check uses, calls your function once on two small models and tells what it did to them; try it.


# %% nbgrader={"grade_id": "distillation.train_step", "solution": true}
def train_step(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    temperature: float,
) -> float:
    """One step of the student on the loss of exercise 1, all rows; returns that loss.

    Args:
        student, teacher: model(tokens) gives logits (batch, n, n_vocab). Call each once.
        tokens: (batch, n) int64.
        optimizer: of the student's parameters.
        temperature: T.
    """
    ### BEGIN SOLUTION
    teacher.eval()
    student.train()
    with torch.no_grad():
        log_p = F.log_softmax(teacher(tokens) / temperature, dim=-1)
    log_q = F.log_softmax(student(tokens) / temperature, dim=-1)
    loss = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.train_step-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("distillation.train_step", (train_step, one_step))

# %% [markdown]
# ## 8. Two humps (2 points, 12 minutes)
#
# The teacher's distribution has two humps, the left one with 60 % of the mass. The student can only
# make one. Which is the best one? It depends on whose mistakes count:
#
# ```text
# forward KL(p || q)   sum of p log(p / q)   where the TEACHER goes
# reverse KL(q || p)   sum of q log(q / p)   where the STUDENT goes
# ```

# %%
ends = {-3.0: "on the left hump", 0.0: "between the two, and wide", 3.0: "on the right hump"}
seeks = Predict(
    "Humps at -3 and 3, width 0.7 each. The student starts at 0.5 and follows the reverse KL. Where "
    "does it end?",
    choices=[*ends.values()],
)
seeks

# %%
for name, divergence in [("forward", forward_kl), ("reverse", reverse_kl)]:
    mean, width = fit_one_hump(two_humps(), divergence)
    print(f"{name}: the student's hump is at {mean:5.2f}, width {width:.2f}")
seeks.reveal(ends[min(ends, key=lambda place: abs(place - mean))])

# %% [markdown]
# It started a little to the right, and there it found a hump that it can copy; that the other one has
# more mass it never learned, as it never went there. The forward KL covers both, and puts most of its
# mass where the teacher has none. MiniLLM (https://arxiv.org/abs/2306.08543) argues for the reverse
# one where a student writes: better some of the teacher's texts than texts that the teacher would
# never write.
#
# Write both, for one teacher and several candidates. Zeros are allowed, and they are what matters
# here: a place of weight 0 adds nothing, and a place that has weight where the other has none makes
# the KL infinite.


# %% nbgrader={"grade_id": "distillation.both_ways", "solution": true}
def both_ways(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(forward KL(p || q), reverse KL(q || p)) of every candidate, (n_candidates,) each, in nats.

    Args:
        p: (n_places,), the teacher's probabilities; may be 0 in places.
        q: (n_candidates, n_places), the candidates'.
    """
    ### BEGIN SOLUTION
    def divergence(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(dim=-1)

    return divergence(p, q), divergence(q, p)
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.both_ways-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("distillation.both_ways", both_ways)

# %% [markdown]
# ## 9. A teacher on disk (4 points, 20 minutes)
#
# *Needs section 6 of the lesson.*
#
# The teacher is asked about the same texts in every epoch, and by every student. So ask once, and keep
# the answers.

# %%
disk = Predict(
    "A billion tokens, a vocabulary of 49,152, every probability in half precision: how many "
    "terabytes are that?",
    answer=1e9 * 49_152 * 2 / 1e12,
    unit="TB",
    explain="10^9 * 49,152 * 2 bytes = 98 TB. The 8 likeliest of each row, 2 bytes for the value "
    "and 4 for the token: 48 GB.",
)
disk

# %% [markdown]
# How much of a real teacher is in its likeliest tokens?

# %%
lm = load("lab-target", dtype=torch.float32)  # 8.8 M parameters, trained on Python source
code = lm.encode("def mean(values):\n    return sum(values) / len(values)\n")
with torch.no_grad():
    p = lm.model(code[None])[0].softmax(dim=-1)
for k in (1, 4, 16, 64):
    print(f"{k:3} of {p.shape[1]:,} tokens: {p.topk(k).values.sum(dim=-1).mean():.3f} of the mass")

# %% [markdown]
# What is left out must not be forgotten: scale the k up to a sum of 1, and the student is told that
# nothing else ever happens. Its sum can be kept for free. If the k are stored as probabilities of the
# *whole* softmax, what is missing to 1 is known, and the loss treats all other tokens as one:
#
# ```text
#            A     B    everything else
# teacher   0.6   0.2        0.2
# student   0.5   0.1        0.4
#
# KL = 0.6 ln(0.6/0.5) + 0.2 ln(0.2/0.1) + 0.2 ln(0.2/0.4) = 0.109
# ```
#
# Write both ends. You are graded on counted bytes: 2 for each log-probability (float16), 2 for each
# token's number if the vocabulary has no more than 32,768 (int16), else 4 (int32). And on what comes
# out again: half precision is for the disk, the sums are made in float32. Rounded numbers may add up
# to a little more than 1; then everything else is 0.


# %% nbgrader={"grade_id": "distillation.top_k", "solution": true}
def store_top_k(teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities, tokens) of the k likeliest tokens of each row, (rows, k), in any order.

    Args:
        teacher_logits: (rows, n_vocab); k is less than n_vocab.
    """
    ### BEGIN SOLUTION
    log_p, numbers = F.log_softmax(teacher_logits, dim=-1).topk(k)
    fits = teacher_logits.shape[-1] <= 32_768
    return log_p.half(), numbers.to(torch.int16 if fits else torch.int32)
    ### END SOLUTION


def loss_from_store(log_p: Tensor, tokens: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each row, (rows,) in nats, all tokens outside the store as one.

    Args:
        log_p, tokens: (rows, k), as stored.
        student_logits: (rows, n_vocab) float32.
    """
    ### BEGIN SOLUTION
    log_p = log_p.float()
    log_q = F.log_softmax(student_logits, dim=-1).gather(-1, tokens.long())
    few = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    rest_p = (1 - log_p.exp().sum(dim=-1)).clamp_min(0)
    rest_q = 1 - log_q.exp().sum(dim=-1)
    return few + torch.xlogy(rest_p, rest_p / rest_q)
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.top_k-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("distillation.top_k", (store_top_k, loss_from_store))

# %% [markdown]
# ## 10. 97 % of what? (1 point, 8 minutes)
#
# "DistilBERT: 60% of BERT size, 60% faster, 97% accuracy", says the guide. The authors' table, scores on
# the development sets of GLUE:
#
# ```text
#              mean   CoLA  MNLI  MRPC  QNLI  QQP   RTE   SST-2 STS-B WNLI
# BERT         79.5   56.3  84.7  88.6  91.8  89.6  69.3  92.7  89.0  53.5
# DistilBERT   77.0   51.3  82.1  87.5  89.2  88.5  59.9  91.3  86.9  56.3
# ```
#
# No score is 97, and they are not all accuracies: CoLA is a correlation. Three numbers, with a
# calculator:
#
# 1. What share of the teacher's mean has the student?
# 2. What share of the teacher's score has it on RTE?
# 3. RTE asks whether one sentence follows from another, yes or no. A coin gets 50. Take what is above
#    50 of both: what share is that?
#
# As fractions of 1, with three digits: 0.5 for a half.


# %% nbgrader={"grade_id": "distillation.share_of_what", "solution": true}
def share_of_what() -> tuple[float, float, float]:
    """(share of the mean, share on RTE, share of what is above chance on RTE)."""
    ### BEGIN SOLUTION
    return 0.969, 0.864, 0.513
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.share_of_what-check", "grade": true, "locked": true, "points": 1}
from llmopt_lab.grading import check

check("distillation.share_of_what", share_of_what)

# %% [markdown]
# On WNLI the student has 105 % of its teacher. Both are near what one gets by always giving the more
# frequent answer: where there is nothing to keep, a share says nothing.
#
# Source: Sanh et al. 2019 (https://arxiv.org/abs/1910.01108), the numbers as the authors corrected
# them later in their repository's README
# (https://github.com/huggingface/transformers, examples/research_projects/distillation).

# %% [markdown]
# ## 11. The logits that are never there (4 points, 25 minutes)
#
# *Needs section 7 of the lesson.*
#
# The output layer makes 49,152 numbers of every 2,048.

# %%
logits_gb = Predict(
    "8,192 tokens, a vocabulary of 49,152, bfloat16: how many GB (10^9 bytes) are the logits of one "
    "of the two models?",
    answer=8192 * 49_152 * 2 / 1e9,
    unit="GB",
    explain="8,192 * 49,152 * 2 bytes = 0.81 GB, where the hidden states are 34 MB. The teacher has "
    "as many, softmax in float32 takes twice that, and the gradient comes on top.",
)
logits_gb

# %% [markdown]
# What that comes to on a GPU, loss and gradients, was recorded (d is 2,048):

# %%
recorded = load_results("distillation")[0]
row = recorded["cases"][0]["rows"][0]
print(recorded["hardware"]["name"], row["size"])
for name in ("materialised", "ours"):
    took = row["results"][name]
    print(f"{name:12} {took['median_ms']:5.1f} ms, {took['extra_bytes'] / 1e9:.2f} GB more")

# %% [markdown]
# Most of it is not needed: a row's loss needs only that row's logits, and exercise 3 has shown that its gradient is q - p, known as soon
# as the loss is. So take a few tokens at a time, do everything with their logits at once, and let them
# go:
#
# ```text
# for each chunk of tokens:
#     logits of student and teacher                 (chunk, n_vocab)
#     its part of the loss
#     q - p, and through the student's layer:
#         its rows of d_hidden                      (chunk, d)
#         its part of d_weight, added up            (n_vocab, d)
# ```
#
# The forward pass is over, and so is the backward pass. T is 1 here. Careful: the last chunk may be
# shorter, and the loss is the mean over **all** tokens. You are graded on the three results, and on
# counted bytes: no tensor may be as large as the logits of all tokens, and the chunks may not pile up
# either. `bytes_held(function, *args)` counts: the result, the largest tensor that was made, and the
# most bytes that were alive at once.


# %% nbgrader={"grade_id": "distillation.chunked_kl", "solution": true}
def chunked_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean KL(teacher || student), its gradient for hidden, its gradient for weight).

    Args:
        hidden: (n_tokens, d), and weight: (n_vocab, d): student logits are hidden @ weight.T.
        teacher_hidden: (n_tokens, d_teacher), and teacher_weight: (n_vocab, d_teacher).
        chunk: tokens whose logits may be in memory at once.
    """
    ### BEGIN SOLUTION
    n_tokens = len(hidden)
    loss = hidden.new_zeros(())
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in tiles(n_tokens, chunk):
        log_q = F.log_softmax(hidden[rows] @ weight.T, dim=-1)  # (chunk, n_vocab)
        log_p = F.log_softmax(teacher_hidden[rows] @ teacher_weight.T, dim=-1)
        p = log_p.exp()
        loss += (p * (log_p - log_q)).sum() / n_tokens
        difference = (log_q.exp() - p) / n_tokens
        d_hidden[rows] = difference @ weight
        d_weight += difference.T @ hidden[rows]
    return loss, d_hidden, d_weight
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.chunked_kl-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("distillation.chunked_kl", (chunked_kl, bytes_held))

# %% [markdown]
# ## 12. The KL of a row as a kernel in Triton (5 points, 40 minutes)
#
# *Needs section 7 of the lesson.*
#
# A row of logits is too long for one tile. The obvious way reads it three times: for its maximum, for
# the sum below the softmax, for the KL. Once is enough. With lse = log sum exp(z), log p = z_t - lse_t
# and log q = z_s - lse_s, so
#
# ```text
# KL = sum p (log p - log q)  =  sum p (z_t - z_s)  -  lse_t  +  lse_s
# ```
#
# and each of the three can be carried along from tile to tile, if what is there already is rescaled
# when a larger maximum m comes:
#
# ```text
# m_t             the teacher's largest logit so far
# total_t         sum of e = exp(z_t - m_t)
# gap             sum of e (z_t - z_s)
# m_s, total_s    the same for the student's softmax
#
# at the end      lse = m + log(total)
#                 KL = gap / total_t - lse_t + lse_s
# ```
#
# One program has one row. Write the KL of the softened logits, z / temperature, without T^2. A row
# whose `mask` is 0 has KL 0, whatever its logits are, NaN even.
#
# Questions to answer before you write. What must a logit past the end of the row be, so that its
# probability is 0? For such a column z_t - z_s is -inf - -inf: what is 0 * NaN? The teacher may forbid
# tokens (-inf), perhaps a whole tile of them: what is `exp(-inf - -inf)`?
#
# You are graded in float32, without a GPU: Triton interprets your kernel on the CPU.

# %% nbgrader={"grade_id": "distillation.kl_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def kl_kernel(
    student_ptr, teacher_ptr,  # (n_rows, n_vocab) float32 logits; the teacher's may be -inf
    mask_ptr,  # (n_rows,) int32: 1 for a row that counts, else 0
    kl_ptr,  # (n_rows,) float32: KL(teacher || student) in nats
    n_vocab, temperature,
    TILE: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0)
    student_row = student_ptr + row * n_vocab
    teacher_row = teacher_ptr + row * n_vocab
    ### BEGIN SOLUTION
    m_s = -float("inf")
    m_t = -float("inf")
    total_s = 0.0
    total_t = 0.0
    gap = 0.0
    for first in range(0, n_vocab, TILE):
        col = first + tl.arange(0, TILE)  # (TILE,)
        z_s = tl.load(student_row + col, col < n_vocab, other=-float("inf")) / temperature
        z_t = tl.load(teacher_row + col, col < n_vocab, other=-float("inf")) / temperature
        m_s_new = tl.maximum(m_s, tl.max(z_s))
        m_t_new = tl.maximum(m_t, tl.max(z_t))
        base = tl.where(m_t_new == -float("inf"), 0.0, m_t_new)
        total_s = total_s * tl.exp(m_s - m_s_new) + tl.sum(tl.exp(z_s - m_s_new))
        e = tl.exp(z_t - base)
        shrink = tl.exp(m_t - base)
        total_t = total_t * shrink + tl.sum(e)
        gap = gap * shrink + tl.sum(tl.where(e > 0, e * (z_t - z_s), 0.0))
        m_s = m_s_new
        m_t = m_t_new
    kl = gap / total_t - (m_t + tl.log(total_t)) + (m_s + tl.log(total_s))
    tl.store(kl_ptr + row, tl.where(tl.load(mask_ptr + row) != 0, kl, 0.0))
    ### END SOLUTION


# %% nbgrader={"grade_id": "distillation.kl_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("distillation.kl_kernel", kl_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/6_distillation.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/6_distillation.ipynb` has one answer to each exercise. Yours may look different.
#
# The loss of exercise 6 is `distillation_loss` in `llmopt_lab/distillation/reference.py`, exercise 9 is
# `top_k.py` beside it. Exercises 11 and 12 together are `linear_kl_triton` in `kernels.py`: chunks of
# tokens, and in each a kernel that turns the student's logits into q - p where they stand.
