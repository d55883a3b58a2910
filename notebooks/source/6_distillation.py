# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 6. Small models and distillation
# {{colab_badge}}
#
# A small model is cheap to run. Trained on the same text as a large one it also knows less.
# Distillation trains it on more than the text: at every place the large model, the *teacher*, says how
# likely it finds each token, and the small one, the *student*, learns all of that. After this chapter you
# can write the loss and its gradient, train a student, say what "97 % of the teacher" means and what it
# does not, and find the bug in somebody else's trainer.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 25 |
# | 3. What the guide says, measured | 25 |
# | 4. Two real students | 25 |
# | 5. A student trained here | 15 |
# | 6. What else a teacher can give | 25 |
# | 7. The kernel | 15 |
# | 8. Where it loses | 15 |
# | 9. In production, and what to remember | 5 |
#
# In all of it **p is the teacher's distribution of the next token and q the student's**. The exercises are
# in `exercises/6_distillation.ipynb`. Do them after section 5, or at the end.

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
# `lab-target` writes Python. On code that it was not trained on it needs 0.659 bits a byte: fewer is
# better. A student is made of three of its six layers, which leaves 59 % of the parameters. Then it reads
# 39 million tokens. If it learns from the tokens alone, it ends at 0.774 bits a byte. So 0.115 bits are
# missing to the teacher.
#
# Now the same student reads the same tokens, and at each of them also learns the teacher's whole
# distribution. Lock in your guess. Section 4 shows what was measured.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "How many per cent of the missing 0.115 bits does the teacher's distribution bring back?",
    unit="%",
    tolerance=0.25,
)
guess

# %% [markdown]
# ## 2. The idea, step by step (25 minutes)
#
# **Soft targets.** A text says *which* token came. A teacher says how likely each one was: that `cat`
# could as well have been `dog`, and could not have been `ant`. Below are the logits of a teacher and
# of a student for five tokens, in four places, all whole numbers. In place 0 the teacher has
# (5, 1, 0, 0, 0) and the student (2, 1, 0, 1, 0).
#
# A step of the player is a *temperature* $T$: both logits are divided by it before the softmax. The last
# row is the push that each logit of the student gets: $T\,(p - q)$.

# %%
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.distillation import soft_targets
from llmopt_lab.distillation.cases import toy
from llmopt_lab.distillation.records import Softened
from llmopt_lab.distillation.view import frames
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.player import Player

student, teacher, labels = toy()
words = ["cat", "dog", "fox", "owl", "ant"]
with recording(Softened) as softened:
    for temperature in (0.5, 1.0, 2.0, 4.0, 8.0):
        soft_targets(teacher, temperature)
        soft_targets(student, temperature)


def one_place(place):
    return Player(frames(softened, words=words, place=place), start=1)


Explore(one_place, place=Choice("one of the four places", (0, 1, 2, 3), 0))

# %% [markdown]
# *Only the picture answers these:*
# - In place 0, which tokens are pushed down, and why is `dog` pushed down although it is the teacher's
#   second choice?
# - In place 2 the teacher cannot decide. What does the student learn there, that no label could tell it?
# - The chart at the bottom has two lines. Which of them stays in size as $T$ grows?
#
# Check the first push by hand. $e^5 = 148.4$, $e^1 = 2.7$, and three times $e^0 = 1$: together 154.1. So
# $p(\mathtt{cat}) = 148.4 / 154.1 = 0.963$. For the student $e^2 = 7.39$ of 14.83, $q(\mathtt{cat}) = 0.498$.
# The push at $T = 1$ is the difference, 0.465. That is the whole gradient:
#
# $$ \frac{\partial}{\partial z_i} \; T^2\, \mathrm{KL}\big(p \,\|\, q\big) \;=\; T\,(q_i - p_i),
# \qquad p = \mathrm{softmax}(v / T),\; q = \mathrm{softmax}(z / T) $$
#
# Autograd agrees, with the formula and with the four places together, a mean:

# %%
from llmopt_lab.distillation import distillation_loss
from llmopt_lab.distillation.reference import logit_gradient

z, v = student.double().requires_grad_(), teacher.double()
print("  T   autograd's gradient of place 0, cat   T (q - p) / 4   all places, largest difference")
for temperature in (1.0, 2.0, 4.0):
    loss = distillation_loss(z, v, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, z)
    formula = logit_gradient(z.detach(), v, temperature=temperature)
    apart = (gradient - formula).abs().max()
    print(f"{temperature:3g} {gradient[0, 0]:37.4f} {formula[0, 0]:15.4f} "
          f"{'   below 1e-12' if apart < 1e-12 else '   WRONG':>20}")

# %% [markdown]
# **Why $T^2$.** Dividing the logits by $T$ puts a $1/T$ into the chain rule. And as both distributions
# flatten, their difference shrinks by about another $1/T$. Without repair, a hot teacher would hardly be
# heard beside the labels. Measured, the norm of the gradient:

# %%
print("    T   without T^2   of T = 1   with T^2   of T = 1")
sizes = {}
for temperature in (1.0, 2.0, 4.0, 8.0, 16.0):
    loss = distillation_loss(z, v, temperature=temperature) / temperature**2
    sizes[temperature] = float(torch.autograd.grad(loss, z)[0].norm())
    size, first = sizes[temperature], sizes[1.0]
    print(f"{temperature:5g} {size:13.4f} {size / first:10.4f} {temperature**2 * size:10.4f} "
          f"{temperature**2 * size / first:10.2f}")

# %% [markdown]
# **The loss.** Labels have their say, too. This is all of it, without checks and `record` lines:

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.distillation import reference

source = without_records(inspect.getsource(distillation_loss))
print(source[source.index("    counts = ") :])
print(inspect.getsource(reference.mean_of))

# %% [markdown]
# Three things that are easy to get wrong stand here. A row is one place of one text, and the mean is over
# the rows that *count*: padding does not. Labels are met at $T = 1$. And the teacher's logits are detached.
#
# **Which way round?** $\mathrm{KL}(p \,\|\, q)$ averages over the teacher's tokens: it is large where the
# student gives little to what the teacher likes. $\mathrm{KL}(q \,\|\, p)$ averages over the student's own:
# it is large where the student gives much to what the teacher dislikes. A student that has room for all
# of the teacher ends at $p = q$ either way. One that has not must choose. Here the teacher is two humps
# and the student only one. Left the forward KL, right the reverse one, both from the same start.

# %%
from llmopt_lab.distillation import forward_kl, jsd, reverse_kl
from llmopt_lab.distillation.records import Fitted
from llmopt_lab.distillation.two_humps import fit_one_hump, two_humps
from llmopt_lab.distillation.view import hump_frames


def one_hump_for_two(distance, mean):
    """Fit the student by both divergences, one frame every 20 steps."""
    runs = []
    for name, divergence in (("forward KL", forward_kl), ("reverse KL", reverse_kl)):
        with recording(Fitted) as fit:
            fit_one_hump(two_humps(distance), divergence, mean=mean)
        runs.append(hump_frames(fit, name=name, every=20))
    return Player(*runs, labels=("forward KL", "reverse KL"), start=len(runs[0]) - 1)


Explore(
    one_hump_for_two,
    distance=Choice("distance of the humps", (2.0, 4.0, 5.0, 6.0), 6.0),
    mean=Choice("where the student begins", (-2.0, -0.5, 0.5, 2.0), 0.5),
)

# %% [markdown]
# *Only the picture answers these:*
# - What does the forward student say in the valley, where the teacher says almost nothing?
# - The left hump has 60 % of the mass. Does the reverse student find it? What decides?
# - At distance 4, do the two still disagree?
#
# Text is the same: between two good continuations there is often no good mixture. A forward student
# knows every continuation and also writes some that nobody would. A reverse one writes cleanly and knows
# fewer. The *generalised Jensen-Shannon divergence* compares both with their mixture $m = \beta p +
# (1 - \beta) q$ and lies between; it is never above $\log 2$. In numbers, where the fits end (60 % of the
# mass at −3, 40 % at 3, so the teacher's mean is −0.6):

# %%
for name, divergence in (("forward KL", forward_kl), ("JSD", jsd), ("reverse KL", reverse_kl)):
    ends = [fit_one_hump(two_humps(), divergence, mean=mean) for mean in (-0.5, 0.5)]
    print(f"{name:11}" + "".join(f"   mean {mean:5.1f}, width {width:.1f}" for mean, width in ends))

# %% [markdown]
# ## 3. What the guide says, measured (25 minutes)
#
# The written guide that this course grew out of has this trainer, as printed there:

# %%
from llmopt_lab.distillation.cases import GuidesDistillationTrainer

source = inspect.getsource(GuidesDistillationTrainer)
print(source[source.index("    def __init__") :].replace("  # noqa: F841", "").replace("  # noqa: F821", ""))

# %% [markdown]
# **It does not run.** `labels` comes from nowhere. If a variable of that name happens to exist, the labels
# of some other batch are used, without a word. And language models have logits of shape (batch, tokens,
# vocabulary), which `F.cross_entropy` reads differently: *its* classes are the second dimension.

# %%
import torch.nn.functional as F
from torch import nn


def tiny_model(dropout=0.1, n_vocab=50):
    """Tokens to logits, with dropout between."""
    return nn.Sequential(nn.Embedding(n_vocab, 64), nn.Dropout(dropout), nn.Linear(64, n_vocab)).double()


torch.manual_seed(0)
big, small = tiny_model(), tiny_model()
inputs = torch.randint(50, (4, 32))
try:
    GuidesDistillationTrainer(big, small).distillation_loss(inputs)
except NameError as refused:
    print("as it is:          ", refused)
try:
    F.cross_entropy(small(inputs), inputs)
except RuntimeError as refused:
    print("with labels:       ", refused)
square = torch.randn(4, 50, 50, generator=torch.Generator().manual_seed(1))  # 50 tokens, 50 words
targets = torch.randint(50, (4, 50), generator=torch.Generator().manual_seed(2))
wrong, right = F.cross_entropy(square, targets), F.cross_entropy(square.flatten(0, 1), targets.flatten())
print(f"50 tokens, 50 words: no error, and the loss is {wrong:.3f} instead of {right:.3f}")

# %% [markdown]
# **`reduction='batchmean'`** divides by the first dimension. For (batch, classes) that is the number of
# examples. For (batch, tokens, vocabulary) it is the number of *texts*, so the soft part grows with their
# length. The mixture "0.7 and 0.3" then is what you see in the last column:

# %%
rng = torch.Generator().manual_seed(3)
print("tokens a text   guide's soft part   per token   ratio   the mixture")
for n in (32, 128, 512):
    z_s, z_t = torch.randn(2, 4, n, 50, generator=rng, dtype=torch.float64)
    guides = F.kl_div(F.log_softmax(z_s / 3, -1), F.softmax(z_t / 3, -1), reduction="batchmean") * 9
    ours = distillation_loss(z_s, z_t, temperature=3.0)
    print(f"{n:13} {guides:19.2f} {ours:11.4f} {guides / ours:7.1f}   {0.7 * n:.1f} to 0.3")

# %% [markdown]
# **Padding.** Texts of a batch have different lengths. Here half of the places are padding, on which both
# models were never trained and have some opinion anyway:

# %%
from llmopt_lab.distillation.cases import ragged

z_s, z_t, _, mask = ragged(4, 64, n_vocab=50)
every, counted = distillation_loss(z_s, z_t), distillation_loss(z_s, z_t, mask=mask)
share = 1 - float(counted * mask.sum() / (every * mask.numel()))
print(f"{1 - mask.double().mean():.0%} of the places are padding; of the guide's loss {share:.0%} comes from there")
nonsense = torch.where(mask[..., None], z_s, torch.full_like(z_s, float("nan")))
print("ours, with NaN in every masked row, is the same:",
      torch.equal(distillation_loss(nonsense, z_t, mask=mask), counted))

# %% [markdown]
# **The teacher's mood.** `torch.no_grad()` is there, `teacher.eval()` is not. A model in training mode has
# its dropout on, and answers the same question differently each time:

# %%
from llmopt_lab.core.errors import BadInput
from llmopt_lab.distillation import as_teacher
from llmopt_lab.distillation.reference import teacher_logits


def apart(model):
    """KL between two answers to the same question, nats a token."""
    with torch.no_grad():
        first, second = (model(inputs).log_softmax(-1) for _ in range(2))
    return float(forward_kl(first, second).mean())


torch.manual_seed(0)
print(f"two answers in training mode: {apart(big.train()):.2f} nats apart; as_teacher(model): {apart(as_teacher(big)):.0f}")
try:
    teacher_logits(big.train(), inputs)
except BadInput as refused:
    print("ours:", refused)

# %% [markdown]
# (`as_teacher` puts a model into eval mode and freezes it.) **`student_probs`** is computed and never used. At
# batch 8, 2,048 tokens and a vocabulary of 128,256 that is this much memory for nothing; and *trainer* is a
# large word for a class that trains nothing:

# %%
print(f"student_probs in float32: {8 * 2048 * 128_256 * 4 / 1e9:.1f} GB")
print("methods of the trainer:", [name for name in vars(GuidesDistillationTrainer) if not name.startswith("_")])

# %% [markdown]
# **What is right in it.** The direction of the KL, $T^2$, and that no gradient goes to the teacher. Is
# $T = 3$ a good choice, though? It comes from classifiers of a few classes. Section 5 tries it.
#
# **Another vocabulary.** Nothing in the guide asks whether token 17 of the teacher is token 17 of the student.
# If the sizes differ, it crashes. If they agree by accident, every target is about the wrong token:

# %%
from llmopt_lab.distillation.reference import check_same_vocabulary
from llmopt_lab.nn.weights import load

lm = load("lab-target", device="cpu")
other = load("lab-draft", device="cpu")
vocabulary = other.tokenizer.get_vocab()
swapped = {"def": vocabulary.get("class"), "class": vocabulary.get("def")}
check_same_vocabulary(lm, other)  # silent: they are the same
other.tokenizer.get_vocab = lambda: vocabulary | {k: i for k, i in swapped.items() if i is not None}
try:
    check_same_vocabulary(lm, other)
except BadInput as refused:
    print(refused)

# %% [markdown]
# **"DistilBERT: 60 % of BERT size, 60 % faster, 97 % accuracy".** The first two are right: 66.4 of 109.5
# million parameters, and 60 % faster in its paper. The third is not an accuracy. The paper says "97 % of
# its language understanding capabilities": the student's mean score over nine tasks (GLUE) divided by the
# teacher's. Here are the scores that its authors published, task by task:

# %%
TASKS = ["CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"]
BERT = [56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5]
DISTILBERT = [51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3]
print(f"{'':10}" + "".join(f"{task:>7}" for task in TASKS) + "   mean")
for name, row in (("BERT", BERT), ("DistilBERT", DISTILBERT)):
    print(f"{name:10}" + "".join(f"{x:7.1f}" for x in row) + f"{sum(row) / 9:7.1f}")
kept = [b / a for a, b in zip(BERT, DISTILBERT, strict=True)]
print(f"{'share':10}" + "".join(f"{x:7.0%}" for x in kept) + f"{sum(DISTILBERT) / sum(BERT):7.1%}")
print(f"RTE above a coin's 50: {(59.9 - 50) / (69.3 - 50):.0%} kept. "
      f"Without WNLI: {sum(DISTILBERT[:-1]) / sum(BERT[:-1]):.1%}")

# %% [markdown]
# So "97 %" hides a task with 86 %, and of what BERT knows there beyond flipping a coin, half is lost. It
# also hides one with 105 %: on WNLI both models do no better than always giving the more frequent answer
# (40 of 71, 56.3 %). A share of a score depends on where the score's zero is. **Always ask: 97 % of
# what, against what guess, and what would the same student have reached without a teacher?**
#
# **"TinyBERT: 7.5x smaller, 9.4x faster".** Right: 14.5 of 109.5 million parameters, and 96.8 % of BERT's mean
# score. But not by the loss above: it copies hidden states and attention layer by layer, twice (before
# and during the task's own training), and multiplies the task's data (section 6).
#
# **"GPT-4 → GPT-3.5".** GPT-3.5 came out in November 2022 and GPT-4 in March 2023. A teacher cannot come after
# its student, and no public source says that one was distilled from the other.
#
# | the guide says | measured |
# |---|---|
# | `labels` in the loss | undefined; on language-model logits an error, or a wrong number if tokens = vocabulary |
# | `batchmean` | the soft part is 32, 128, 512 times too large for texts of 32, 128, 512 tokens |
# | nothing about padding | half padding: half of the loss |
# | `torch.no_grad()` for the teacher | needed, and not enough: `eval()` is missing |
# | `student_probs` | never used; 8.4 GB at a common size |
# | $T^2$ | right |
# | a trainer | no optimiser, no step, no loop |
# | DistilBERT: 60 % of the size, 60 % faster | right |
# | 97 % accuracy | 97 % of a mean of nine scores; 86 % to 105 % by task |
# | TinyBERT 7.5x, 9.4x | right, by another method |
# | GPT-4 → GPT-3.5 | the teacher is younger than its student |

# %% [markdown]
# ## 4. Two real students (25 minutes)
#
# `lab-student` began as layers 0, 2 and 5 of `lab-target`, as DistilBERT began as every second layer of BERT.
# `lab-student-small` began from random weights. Each was trained three times on an H200, on the same tokens
# in the same order:
# - *labels*: the usual cross-entropy;
# - *distilled*: 0.7 of the loss from the teacher's distribution, $T = 1$, forward KL;
# - *on policy*: as distilled, and in the last 40 % of the steps half of the tokens are the student's own
#   writing, for which only the teacher can say what should have come.
#
# All was recorded. Bits a byte and accuracy are of held-out Python, *share* is of the teacher's accuracy,
# *agrees* is how often both have the same first choice.

# %% id="takeaway"
import json

from llmopt_lab.distillation.ship import RESULTS

recorded = json.loads(RESULTS.read_text("utf-8"))
runs = recorded["runs"]
some = runs["lab-student"]["labels"]
target = some["held_out"]["text"]
print(f"{'':19}{'':10} M parameters   bits a byte   accuracy   share   agrees   KL, nats")
print(f"{'lab-target':29}{some['teacher_parameters'] / 1e6:13.2f}{target['teacher_bits_per_byte']:14.3f}"
      f"{target['teacher_accuracy']:11.1%}    100%     100%       0.00")
for name in recorded["shipped"]:
    for way in ("labels", "distilled", "on_policy"):
        run = runs[name][way]
        text = run["held_out"]["text"]
        print(f"{name:19}{way:10}{run['parameters'] / 1e6:13.2f}{text['bits_per_byte']:14.3f}{text['accuracy']:11.1%}"
              f"{text['accuracy'] / text['teacher_accuracy']:8.1%}{text['agreement']:9.1%}{text['kl']:11.2f}")

closed = {}
for name in recorded["shipped"]:
    bits = {way: runs[name][way]["held_out"]["text"]["bits_per_byte"] for way in ("labels", "distilled")}
    gap = bits["labels"] - target["teacher_bits_per_byte"]
    closed[name] = 100 * (bits["labels"] - bits["distilled"]) / gap
    print(f"{name}: {gap:.3f} bits are missing without a teacher; it brings back {closed[name]:.0f} % of them")
guess.reveal(round(closed["lab-student"]))

# %% [markdown]
# A fifth for the larger student, a twentieth for the small one, which has too few parameters to hold more.
#
# **Beside the published ones.** The three lines that the world quotes, with ours in the same words:
#
# | | parameters | times smaller | "keeps" | of what |
# |---|---|---|---|---|
# | DistilBERT | 66.4 M of 109.5 M | 1.65 | 97 % | mean of 9 GLUE scores |
# | TinyBERT, 4 layers | 14.5 M of 109.5 M | 7.5 | 96.8 % | mean of GLUE scores, after a second distillation on each task |
# | lab-student | 5.19 M of 8.80 M | 1.70 | 93.7 % | next-token accuracy |
# | lab-student-small | 1.21 M of 8.80 M | 7.25 | 82.9 % | next-token accuracy |
#
# These shares cannot be compared with each other: choosing one of 2 classes after fine-tuning is not
# choosing one of 4,096 tokens. But look at what stands behind our 93.7 %. *Without* a teacher the same
# student keeps 92.3 %. It gives the teacher's first choice only 77 % of the time. And it needs 1.14 times as
# many bits. Four true numbers about one model; a brochure would take the first.
#
# Now here, on one held-out file, with the models that ship. The last line always guesses the most frequent
# token.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.core.device import pick_device
from llmopt_lab.distillation.evaluate import retained
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.train import HeldOut

device = pick_device()
shipped = {name: load(name, device=device) for name in ("lab-target", *recorded["shipped"])}
quiet = as_teacher(shipped["lab-target"].model)
scheduler = held_out_documents()["stdlib/sched.py"]
text = HeldOut(lm.encode(scheduler).numpy().astype("uint16"), (len(scheduler.encode()),))
print(f"{len(text.tokens):,} tokens; bits a byte   accuracy    share   agrees   sum of min(p, q)")
for name in recorded["shipped"]:
    found = retained(shipped[name].model, quiet, text, context=1024, batch=1)
    print(f"{name:19}{found['bits_per_byte']:17.3f}{found['accuracy']:11.1%}"
          f"{found['accuracy'] / found['teacher_accuracy']:9.1%}{found['agreement']:9.1%}{found['overlap']:19.3f}")
print(f"{'lab-target':19}{found['teacher_bits_per_byte']:17.3f}{found['teacher_accuracy']:11.1%}")
counts = torch.bincount(torch.from_numpy(text.tokens.astype("int64")))
frequent = float(counts.max() / counts.sum())
print(f"{'always ' + repr(lm.decode([int(counts.argmax())])):36}{frequent:11.1%}{frequent / found['teacher_accuracy']:9.1%}")

# %% [markdown]
# **Speed.** One thread of this CPU, greedy, batch 1, with a KV cache:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.nn.model_card import decode_speed

speeds = {name: decode_speed(load(name, device="cpu").model, 1, n_new=32) for name in shipped}
n_target = shipped["lab-target"].config.n_parameters
for name, speed in speeds.items():
    times = n_target / shipped[name].config.n_parameters
    print(f"{name:18} {speed:7.0f} tokens a second, {speed / speeds['lab-target']:.2f} times the teacher's, "
          f"{times:.2f} times smaller")

# %% [markdown]
# 1.7 times smaller is about 1.7 times faster: half of the layers are gone. 7.25 times smaller is not 7.25
# times faster: four thin layers are still four layers, one after the other. Parameters are not time.
#
# **The curves.** Bits a byte on a part of the held-out text, during training. The learning rate falls over the
# last 60 % of the steps.

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.4))
for axes, name, (low, high) in zip(panels, recorded["shipped"], ((0.67, 0.80), (0.88, 1.25)), strict=True):
    for way, style in (("labels", "-"), ("distilled", "--"), ("on_policy", ":")):
        run = runs[name][way]
        curve = run["curve"]
        label = f"{way.replace('_', ' ')}, {run['seconds']:.0f} s"
        axes.plot([p["tokens"] / 1e6 for p in curve], [p["heldout_bits_per_byte"] for p in curve], style, label=label)
    axes.axvline(0.6 * run["tokens"] / 1e6, color="gray", linewidth=0.8)
    axes.set(title=f"{name}, {run['environment']['name']}", xlabel="million tokens", ylim=(low, high))
    axes.legend(fontsize=7)
panels[0].set_ylabel("bits a byte, held out")
figure.tight_layout()

# %% [markdown]
# *Only the picture answers these:*
# - When is the teacher worth most: at the start, or at the end?
# - At the grey line the third student begins to write half of its text itself. What does that do to the curve,
#   which is measured on *given* text?
# - How many million tokens of labels is the teacher worth to `lab-student`? (Go from the end of the solid line
#   to the left until you meet the dashed one.)
#
# **Look inside.** A line of Python, and what comes next in the opinion of teacher and student. Change the
# place, and the student; a step is a temperature.

# %% tags=["timing", "nbval-ignore-output"]
line = lm.encode("with open(path) as f:\n    for line in f:\n        print(line)\n")
tokens = [lm.decode([i]).replace("\n", "⏎").replace(" ", "␣") for i in range(lm.config.n_vocab)]
places = {f"{i}: after {tokens[t]}": i for i, t in enumerate(line.tolist()) if i > 0}
with torch.no_grad():
    says = {name: shipped[name].model(line[None].to(device))[0].float().cpu() for name in shipped}


def opinions(after, who):
    with recording(Softened) as trace:
        for temperature in (0.5, 1.0, 2.0, 4.0):
            for name in ("lab-target", who):
                soft_targets(says[name][places[after]], temperature)
    return Player(frames(trace, words=tokens), start=1)


Explore(
    opinions,
    after=Choice("place in the line", tuple(places), tuple(places)[5]),
    who=Choice("student", tuple(recorded["shipped"]), "lab-student"),
)

# %% [markdown]
# *Only the picture answers these:*
# - How much of the teacher's mass is on tokens other than its first choice? At $T = 1$, and at 4?
# - At $T = 4$, what do most of the pushes go to: the tokens that matter, or all the `others`?
#
# ## 5. A student trained here (15 minutes)
#
# Your turn: a student of 0.34 million parameters, 26 times smaller than `lab-target`, learns for 80 steps
# of 256 tokens on this CPU, from files that the teacher was not trained on either. That is nothing; you see
# only the very beginning. Most of the time is the *teacher's*: it is the larger model. So it answers each
# batch once, and its logits are kept (160 MiB, all of each row in 16 bits); further runs take less than half
# of the time. Bits a byte are of 20 kB of yet other files. The picture is drawn anew every ten steps: what
# both expect after `def read(self, path): return self`.

# %% tags=["timing", "nbval-ignore-output"]
import time

from llmopt_lab.distillation import Method
from llmopt_lab.distillation.cases import Remembered, live_student
from llmopt_lab.distillation.records import Stepped
from llmopt_lab.distillation.view import training_frames
from llmopt_lab.widgets.live import Live

tutor = Remembered(lm.model)
probe = lm.encode("    def read(self, path):\n        return self")
done = {}


def train_here(temperature, soft_weight, live=None):
    """(trace, bits a byte, seconds) of a run; trained once, then remembered."""
    key = (temperature if soft_weight else 1.0), soft_weight
    if key not in done:
        method = Method(soft_weight=soft_weight, temperature=temperature)
        watch = live and (lambda: live.show(training_frames(trace, words=tokens)[-1]))
        start = time.perf_counter()
        with recording(Stepped) as trace:
            _, _, bits = live_student(
                lm, method, teacher=tutor, probe=probe, watch=watch, progress=False
            )
        done[key] = trace, bits, time.perf_counter() - start
    return done[key]


_, bits, seconds = train_here(1.0, 0.7, live=Live())
print(f"{seconds:.0f} seconds, {bits:.3f} bits a byte")

# %% [markdown]
# Scrub through that run. The sliders train another student, from the same random weights, on the same batches:
# wait some ten seconds. At share 0 the teacher is not asked at all.

# %% tags=["timing", "nbval-ignore-output"]
def scrub(temperature, soft_weight):
    trace, bits, seconds = train_here(temperature, soft_weight)
    run = training_frames(trace, words=tokens)
    title = f"T = {temperature:g}, {soft_weight:.0%} from the teacher: {bits:.3f} bits a byte, {seconds:.0f} s"
    return Player(run, title=title, start=len(run) - 1)


Explore(
    scrub,
    temperature=Choice("temperature", (1.0, 2.0, 3.0), 1.0),
    soft_weight=Choice("share of the teacher", (0.0, 0.3, 0.7, 1.0), 0.7),
)

# %% [markdown]
# *Only the picture answers these:*
# - What does the student learn first: what is frequent anywhere, or what comes after `self`?
# - Set the share to 0. Which of the two students is nearer to the teacher at this place, by its KL?
#
# The guide's $T = 3$ beside the others:

# %% tags=["timing", "nbval-ignore-output"]
for name, key in (("labels alone", (1.0, 0.0)), ("T = 1", (1.0, 0.7)), ("T = 3, the guide's", (3.0, 0.7))):
    _, bits, seconds = train_here(*key)
    print(f"{name:20} {bits:.3f} bits a byte, {seconds:4.0f} s")

# %% [markdown]
# The teacher helps from the first steps, because each place carries a whole distribution. A high temperature
# takes some of that back. At $T = 1$ the teacher of a language model is already soft; at 3 the loss is about
# thousands of tokens that never come. Nor is it chance: on the H200, `lab-student-small` with $T = 2$ ended at
# 1.045 bits a byte, *above* labels alone (1.009). But it is not that simple, either:

# %%
print("lab-student-small, recorded       bits a byte   sum of min(p, q)   along its own text")
names = {"labels": "labels", "distilled": "T = 1, share 0.7", "soft_alone": "T = 1, share 1", "warm": "T = 2, share 0.7"}
for way, words_ in names.items():
    held = runs["lab-student-small"][way]["held_out"]
    print(f"{words_:33}{held['text']['bits_per_byte']:12.3f}{held['text']['overlap']:19.3f}"
          f"{held['student_writes']['overlap']:21.3f}")

# %% [markdown]
# By *overlap*, the sum of $\min(p, q)$, the warm student is the best of the four. Which student is better
# depends on what it is for: reading given text, or standing in for the teacher (as a draft, section 6).
#
# ## 6. What else a teacher can give (25 minutes)
#
# **A beginning.** Before any training, layers 0, 2 and 5 of `lab-target` need 1.95 bits a byte: far from 0.66,
# and far better than random weights (about 12 bits a token). A finer knife is *pruning* (Minitron): rank
# the feed-forward neurons of each layer by how active they are on some text, keep the best, and distil
# afterwards. Three ways to keep half of the neurons, not yet distilled:

# %% tags=["timing", "nbval-ignore-output"]
import math

from llmopt_lab.distillation.initialise import keep_layers, neuron_importance, prune_neurons

code = lm.encode(scheduler)[:1025][None].to(device)
n_bytes = len(lm.decode(code[0, 1:]).encode())


@torch.no_grad()
def bits_a_byte(model):
    """On the beginning of one held-out file."""
    nats = F.cross_entropy(model(code[:, :-1])[0].float(), code[0, 1:], reduction="sum")
    return float(nats) / math.log(2) / n_bytes


ranked_on = lm.encode(held_out_documents()["jinja2/runtime.py"])[:1024].view(4, 256).to(device)
importance = neuron_importance(quiet, [ranked_on]).cpu()
chance = torch.rand(importance.shape, generator=torch.Generator().manual_seed(0))
cut = {
    "the most active half": prune_neurons(quiet, importance, 352),
    "a random half": prune_neurons(quiet, chance, 352),
    "the least active half": prune_neurons(quiet, -importance, 352),
    "layers 0, 2, 5": keep_layers(quiet, (0, 2, 5)),
}
for name, model in {"lab-target": quiet, **cut}.items():
    size = model.config.n_parameters / 1e6
    print(f"{name:22} {size:5.2f} M parameters, {bits_a_byte(model):.2f} bits a byte")

# %% [markdown]
# **Its inside.** TinyBERT's student also learns the teacher's embeddings, hidden states and attention scores,
# layer by layer, through a learned projection where the widths differ. Student layer $m$ learns from
# teacher layer $m \cdot 6 / 3$. `lab-student` was never told to do this. Has it come nearer by itself?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.distillation.layerwise import LayerLoss

three = cut["layers 0, 2, 5"]
distance = LayerLoss(three, quiet).to(device)
print(f"student's layers 1, 2, 3 learn from the teacher's {distance.layers}; mean squared distances")
with torch.no_grad():
    for name, model in (("before distillation", three), ("lab-student", shipped["lab-student"].model)):
        found = distance(model, quiet, code[:, :256])
        print(f"{name:20}" + "".join(f"   {part} {float(value):6.2f}" for part, value in found.items()))

# %% [markdown]
# The hidden states came nearer, because the last of them must give the same logits. The attention scores
# hardly did: nobody asked. (Embeddings start as copies.)
#
# **Its texts.** *Sequence-level* distillation takes no distributions at all: the teacher writes, the student
# learns the text as if it were data. So it works through any interface, and across vocabularies. The reasoning
# traces on which small models are trained today are this, with a checker that leaves out wrong answers. The
# checker here asks whether the text is Python at all.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.distillation.sequence_level import teacher_texts, text_loss, texts_for

prompt = lm.encode("def read(path):\n    with open(path) as f:\n")[None]
written = teacher_texts(as_teacher(lm.model), prompt, n_new=16)
print(lm.decode(written[0]))
for name in recorded["shipped"]:
    loss = text_loss(shipped[name].model, written.to(device), n_given=prompt.shape[1])
    print(f"{name} needs {float(loss):.2f} nats a token for what its teacher wrote")


def is_python(code):
    try:
        compile(code, "", "exec")
    except SyntaxError:
        return False
    return True


begun = ["import os\n", "x = [", "def read(path):\n", "for i in range("]
kept = texts_for(lm, shipped["lab-student"], begun, n_new=12, keep=is_python)
print(f"{len(kept)} of {len(begun)} texts pass the checker")
for row in kept:
    print(repr(lm.decode(row, skip_special_tokens=True)))

# %% [markdown]
# **Its judgement of what the student writes.** At work a student goes on from its own tokens, mistakes
# included. Off policy it never saw such texts. On policy it writes, and the teacher says, place by place, what
# it would have expected. No gradient goes through the choice of the tokens. This is all:

# %%
from llmopt_lab.distillation.on_policy import on_policy_loss

source = inspect.getsource(on_policy_loss)
print(source[source.index("    check_same") :])

# %% [markdown]
# (With `jsd` this is GKD; with `reverse_kl` it is what MiniLLM minimises.) What did it bring? KL to the teacher
# along three kinds of text, recorded:

# %%
print(f"{'nats a token':20}{'':11}  given text   what it writes   what the teacher writes   seconds")
for name in recorded["shipped"]:
    for way in ("labels", "distilled", "on_policy"):
        run = runs[name][way]
        held = run["held_out"]
        print(f"{name:20}{way:11}{held['text']['kl']:12.3f}{held['student_writes']['kl']:17.3f}"
              f"{held['teacher_writes']['kl']:26.3f}{run['seconds']:10.0f}")

# %% [markdown]
# Every student is farther from its teacher along *written* text than along given text: that is exposure bias.
# On policy brings it nearer there, by 8 and 9 % along its own text. It costs a little accuracy on given text
# (section 4), and nearly twice the time, since writing is slow. (The runs shared their GPU, so the seconds are
# rough.)
#
# **Its logits, from disk.** A whole row of `lab-target` in 16 bits takes 8 kB a token. Keep only the $k$ likeliest
# tokens, and the teacher runs once, not once an epoch. What is left out must go somewhere. *Bucket*: all other
# tokens are one. *Renormalise*: the $k$ are scaled to sum to 1, so the student is told that nothing else ever
# happens. The errors are of the loss and of its gradient, against the full row:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.distillation.top_k import cache_error

with torch.no_grad():
    rows_t, rows_s = (m(code)[0].float().cpu() for m in (quiet, shipped["lab-student"].model))
print("             share of       kept      bucket: error of     renormalise: error of")
print("   k  bytes   full row       mass      loss  gradient           loss  gradient")
for k in (1, 4, 16, 64, 256):
    e = cache_error(rows_t, rows_s, k)
    print(f"{k:4}{e['bytes_per_row']:7.0f}{e['share_of_full']:11.2%}{e['mass']:11.4f}{e['bucket_loss']:10.2%}"
          f"{e['bucket_gradient']:10.2%}{e['renormalise_loss']:15.2%}{e['renormalise_gradient']:10.2%}")

# %% [markdown]
# With 64 tokens, 3 % of the bytes, the bucket's gradient is 4 % off, and that of renormalising 12 %. For the same
# $k$ the bucket is better by a factor of two to five. Libraries differ in their default: see section 9.
#
# **Another vocabulary** can share no distributions. `check_same_vocabulary` refuses, and texts are the way out;
# that is what `texts_for` does.
#
# **A draft for chapter 7.** Speculative decoding keeps a guess with probability $\sum \min(p, q)$. A draft that
# learned from its target should be kept more often. `lab-draft` learned from labels, 1,049 million tokens of
# them. It was then trained on for 52 million tokens, once with the target as its teacher and once without, and
# measured on the same tokens:

# %%
drafts = runs["lab-draft"]
print("chance that a guess of lab-draft is kept   on held-out text   on what the target writes")
states = {"as it ships": drafts["distilled"]["before"]}
states |= {f"then {way}": drafts[way]["held_out"] for way in ("labels", "distilled")}
for name, held in states.items():
    print(f"{name:43}{held['text']['overlap']:17.3f}{held['teacher_writes']['overlap']:28.3f}")

# %% [markdown]
# **A loss.** Distilling made the draft slightly worse: 0.662 to 0.659. With labels alone it lost twice as much,
# so the teacher did help; but starting again with a higher rate, on a part of a text that the model had read 17
# times, cost more than the teacher gave. What would it have been worth? With chapter 7's formula:

# %%
from llmopt_lab.speculative_decoding import best_k, speedup
from llmopt_lab.speculative_decoding.measure import RESULTS

c_draft = next(run["c"] for run in json.loads(RESULTS.read_text())["runs"] if run["draft"] == "lab-draft")
print("draft                  kept     c   best k   times as fast")
small_text = {name: runs[name]["distilled"]["held_out"]["text"]["overlap"] for name in recorded["shipped"]}
candidates = {
    "lab-draft": (states["as it ships"]["text"]["overlap"], c_draft),
    "lab-draft, distilled": (states["then distilled"]["text"]["overlap"], c_draft),
    "lab-student-small": (small_text["lab-student-small"], 1 / 3.24),
    "lab-student": (small_text["lab-student"], 1 / 1.84),
}
for name, (alpha, c) in candidates.items():
    k = best_k(alpha, c)
    print(f"{name:21}{alpha:6.3f}{c:6.2f}{k:9}{speedup(alpha, k, c):16.2f}")

# %% [markdown]
# ($c$ is the draft's pass over the target's, as recorded on one core of a CPU.) The best *imitator* is the worst
# *draft*: `lab-student` is kept most often, and costs more than it saves.
#
# ## 7. The kernel (15 minutes)
#
# With 8,192 tokens and a vocabulary of 49,152, *one* copy of the logits in 16 bits is 0.8 GB, and the loss as a
# training loop writes it makes ten: the student's and the teacher's in float32, their softmaxes, gradients. The
# idea is that of chapter 2: never hold them all. A chunk of tokens at a time, the logits go into one buffer,
# become *their own gradient* in place, and are multiplied on. Step through nine tokens in chunks of three:

# %%
from llmopt_lab.distillation.linear_kl import linear_kl, linear_kl_traffic
from llmopt_lab.distillation.view import chunk_frames

rng = torch.Generator().manual_seed(0)
hidden, weight, target_logits = (
    torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((9, 4), (20, 4), (9, 20))
)
with recording() as trace, torch.no_grad():
    linear_kl(hidden, weight, target_logits, chunk=3, tile=8)
Player(chunk_frames(trace), title="Logits that become their gradient")

# %% [markdown]
# Right, and as many bytes as the formula says:

# %%
from llmopt_lab.core.memory import Load, Store

hidden.requires_grad_()
weight.requires_grad_()
fused = linear_kl(hidden, weight, target_logits, temperature=2.0, chunk=3)
whole = distillation_loss(hidden @ weight.T, target_logits, temperature=2.0)
for name, a, b in zip(
    ("loss", "d hidden", "d weight"),
    (fused, *torch.autograd.grad(fused, (hidden, weight))),
    (whole, *torch.autograd.grad(whole, (hidden, weight))),
    strict=True,
):
    print(f"{name:9} {'right' if (a - b).abs().max() < 1e-12 else 'WRONG'}")
read, written_ = linear_kl_traffic(9, 4, 20, chunk=3)
counted = [trace.total("nbytes", kind) // 8 for kind in (Load, Store)]
print(f"numbers read {counted[0]:,} and written {counted[1]:,}; by the formula {read:,} and {written_:,}")

# %% [markdown]
# The gradients are complete when the *forward* pass is: the backward pass only multiplies them by what comes
# from above. The heart in Triton owns one row of logits and walks it twice, once for the two softmax
# denominators, and once back to front, for loss and gradient. What the first walk read last, the second finds
# in the cache:

# %%
try:
    from llmopt_lab.distillation import kernels

    source = inspect.getsource(kernels._kl_rows_kernel.fn)
    print(source[source.index("    lse_s, lse_t") :])
except ImportError as missing:
    print(missing)

# %% [markdown]
# - **`where(p > 0, ...)`**: a token that the teacher rules out adds nothing; $0 \cdot \log 0$ would be NaN.
# - **`(q - p)` into the student's own logits**: the buffer is used twice, and no gradient of logits ever exists
#   beside it.
# - Products before and behind it are the vendor's. A kernel of one's own for them would have to beat cuBLAS.
#
# Here it runs: compiled if you have a GPU, else in Triton's interpreter. Ragged sizes, a mask, a temperature:

# %%
import numpy as np

try:
    from llmopt_lab.distillation.kernels import linear_kl_triton

    rng = torch.Generator().manual_seed(1)
    where = pick_device()
    case = [torch.randn(shape, generator=rng).to(where) for shape in ((13, 16), (37, 16), (13, 37))]
    mask = (torch.arange(13) % 3 != 1).to(where)
    found = []
    for loss_of in (
        lambda h, w: linear_kl_triton(h, w, case[2], temperature=2.0, mask=mask, chunk=5),
        lambda h, w: distillation_loss(h @ w.T, case[2], temperature=2.0, mask=mask),
    ):
        inputs = [x.clone().requires_grad_() for x in case[:2]]
        with np.errstate(invalid="ignore"):  # the interpreter also computes what `where` drops
            loss = loss_of(*inputs)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for name, got, want in zip(("loss", "d hidden", "d weight"), *found, strict=True):
        error = float((got - want).abs().max() / want.abs().max())
        print(f"{name:9} {tuple(got.shape)!s:9}: {'right' if error < 1e-2 else 'WRONG'}")
except ImportError as missing:
    print(missing)

# %% [markdown]
# Recorded on an H200, width 2,048, bf16, forward and backward. Every contender was first checked against an
# oracle in float64. *p ready*: Liger's kernel wants the teacher's probabilities, and here they are made before
# the clock starts; *p made*: on the clock. Before you look: what saves more, time or memory?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, load_results, run_room

(bench,) = load_results("distillation")
for case_ in bench["cases"]:
    print(case_["title"])
    for row in case_["rows"]:
        size, ours = row["size"], row["results"]["ours"]
        print(f"  {size['n_tokens']:,} tokens, vocabulary {size['n_vocab']:,}: {ours['median_ms']:.2f} ms, "
              f"{ours['extra_bytes'] / 1e9:.2f} GB beside the inputs")
        for peer, result in row["results"].items():
            if peer != "ours" and "median_ms" in result:
                print(f"    {peer:23} takes {result['median_ms'] / ours['median_ms']:.2f} times the time, "
                      f"{result['extra_bytes'] / ours['extra_bytes']:5.1f} times the memory")

# %% [markdown]
# Below 1 we lose. `torch.compile` of the plain loss is a strong peer: it is faster at 2,048 tokens, and needs
# more than twice the memory at 8,192. From the teacher's *hidden states*, "p ready" leaves the teacher's own
# product out, so only "p made" does the same work. The whole table:

# %% tags=["nbval-ignore-output"]
print(format_results(bench))

# %% [markdown]
# With a GPU, the next cell times 2,048 tokens here; without one it says so. All rows: `llmopt bench distillation`
# in a terminal.

# %% tags=["timing", "nbval-ignore-output"]
if pick_device().type == "cuda":
    print(format_results(run_room("distillation", where=lambda title, size: size["n_tokens"] == 2048)))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 8. Where it loses (15 minutes)
#
# **It costs the teacher.** A training step of a student with $S$ parameters takes about $6S$ operations a token;
# a teacher of $P$ parameters adds a forward pass, $2P$. Serving a token then takes $2S$ instead of $2P$. So after
# how many *served* tokens is the training paid back? Slide; each frame is a size of student.

# %%
from llmopt_lab.widgets.panels import Bar, Bars, Frame, Meter


def pays_back(billions, epochs):
    """Served tokens until the student's training is paid back, a frame a size of student."""
    made = []
    for share in (0.02, 0.05, 0.14, 0.3, 0.59, 0.8):
        seen = billions * epochs
        on_labels = 6 * share * seen
        costs = {"labels": on_labels, "asked": on_labels + 2 * seen, "kept": on_labels + 2 * billions}
        served = {name: cost / (2 * (1 - share)) for name, cost in costs.items()}
        tones = ("idle", "bad", "good")
        bars = tuple(Bar(name, value, tone) for (name, value), tone in zip(served.items(), tones, strict=True))
        made.append(
            Frame(
                f"A student of {share:.0%} of its teacher reads {billions} billion tokens {epochs} times: paid back "
                f"after {served['asked']:,.1f} billion served tokens, {served['labels']:,.1f} without a teacher, "
                f"{served['kept']:,.1f} if its answers are kept. For the price of one distilled run the labels "
                f"could be read {costs['asked'] / on_labels:.1f} times as long.",
                (
                    Bars("billions of served tokens until it has paid", bars),
                    Meter("cost of a distilled run, in runs on labels", round(costs["asked"] / on_labels, 2), "times"),
                ),
                legend=(("idle", "labels alone"), ("bad", "teacher asked each epoch"), ("good", "teacher asked once")),
            )
        )
    return Player(made, start=2, title="When has it paid?")


Explore(
    pays_back,
    billions=Choice("billions of tokens to learn from", (1, 3, 10, 30, 100, 300), 10),
    epochs=Choice("epochs", (1, 2, 4), 2),
)

# %% [markdown]
# *Only the picture answers these:*
# - For the price of one distilled run of a student of 14 %, how much longer could labels train it? And one of 2 %?
# - Which students gain most from a cache?
#
# (Operations, not seconds: a single user's decoding waits for bytes. The ratio of sizes is the same.)
#
# **So give the labels the same time.** Section 5's student, recipe and text, run once with each of two seeds, on
# one core (repeat it with `live_student(lm, Method(soft_weight=0.0), replace(LIVE, steps=320))`):
#
# | | steps | core seconds | bits a byte, seed 0 | seed 1 |
# |---|---|---|---|---|
# | labels | 80 | 4 | 3.045 | 3.016 |
# | distilled, the teacher asked | 80 | 17 | 2.925 | 2.912 |
# | distilled, its answers kept | 80 | 7 | 2.925 | 2.912 |
# | labels | 160 | 7 | 2.977 | 2.927 |
# | labels | 320 | 14 | 2.787 | 2.777 |
#
# In equal time the labels win, clearly, against a teacher that is asked at every step; against kept answers
# they lose, narrowly. A teacher 26 times as large as its student is expensive company.
# Distillation is for when *text* is short, or when the teacher's answers are used many times. Where there is
# text without end and no cache, count operations first.
#
# **Where else it lost in this chapter:**
# - `lab-draft` had converged. A teacher on top made it slightly worse, starting again cost more than it gave.
# - $T = 2$ was worse than no teacher by bits a byte, and best by overlap.
# - On policy lost a little accuracy on given text, won along written text, and took nearly twice the time.
# - The small student got back 6 % of its gap. What has no room cannot be taught in.
# - A teacher's mistakes are taught as well. Nothing here checks whether it is right; only `keep=` does.
#
# ## 9. In production, and what to remember (5 minutes)
#
# | system | how to say it |
# |---|---|
# | TRL | `from trl.experimental.gkd import GKDConfig, GKDTrainer`: `GKDConfig(lmbda=0.5, beta=0.5, temperature=0.9, seq_kd=False)`; `lmbda` is the share of the student's own texts, `beta` 0 the forward and 1 the reverse KL. `trl.experimental.distillation` adds a teacher behind a vLLM server, `loss_top_k` and `loss_add_tail=True` (our bucket) |
# | Axolotl | `plugins: [axolotl.integrations.kd.KDPlugin]`, `kd_trainer: true`, `kd_alpha: 0.9`, `kd_ce_alpha: 0.1`, `kd_temperature: 1.0`; learns from stored or served top-k; `kd_normalize_topk` is true by default (our renormalise) |
# | NeMo AutoModel | `examples/llm_kd/llama3_2/llama3_2_1b_kd.yaml`; the loss is (1 − `kd_ratio`) · CE + `kd_ratio` · KL |
# | NVIDIA Model Optimizer | `mtd.convert(model, mode=[("kd_loss", {"teacher_model": ..., "criterion": mtd.LogitsDistillationLoss()})])`; its `reduction` is `"batchmean"` by default: flatten first. Pruning by activations (Minitron): mode `mcore_minitron` |
# | torchtune | `tune run knowledge_distillation_single_device --config llama3_2/8B_to_1B_KD_lora_single_device`; no longer developed since July 2025 |
# | Liger | `LigerFusedLinearJSD(jsd_beta=0.5, temperature=1.0)`: the fused loss of section 7, for the JSD |
# | vLLM Speculators | `scripts/train.py --verifier-name-or-path MODEL --speculator-type eagle3`: drafts taught by hidden states of their target |
#
# **Remember**
# 1. The gradient is $T(q - p)$ a place, over the places that count. Everything else is bookkeeping.
# 2. $T^2$ keeps the size of the gradient. For language models begin with $T = 1$.
# 3. A mean over *tokens*, not over texts; padding out; labels shifted; the teacher in eval mode, frozen.
# 4. Forward KL covers, reverse KL seeks, JSD lies between. It matters when the student is too small.
# 5. Begin as a part of the teacher if you can: layers or neurons.
# 6. On policy repairs what the student does with its own mistakes, and is slow.
# 7. Keep 64 tokens a place and one bucket for the rest, and the teacher runs once.
# 8. "97 %" needs three answers: of what, above which guess, and how much without a teacher.
# 9. Never hold all logits: turn them into their gradient, chunk by chunk.
#
# **Sources.** Hinton et al. 2015, *Distilling the knowledge in a neural network*
# ([1503.02531](https://arxiv.org/abs/1503.02531)), section 2. Kim and Rush 2016, sequence level
# ([1606.07947](https://arxiv.org/abs/1606.07947)). Sanh et al. 2019, *DistilBERT*
# ([1910.01108](https://arxiv.org/abs/1910.01108)); the scores by task are its authors'
# ([README](https://github.com/huggingface/transformers/blob/v4.40.0/examples/research_projects/distillation/README.md)). Jiao et al. 2019, *TinyBERT*
# ([1909.10351](https://arxiv.org/abs/1909.10351)). Gu et al. 2023, *MiniLLM*
# ([2306.08543](https://arxiv.org/abs/2306.08543)). Agarwal et al. 2023, *GKD*
# ([2306.13649](https://arxiv.org/abs/2306.13649)). Wen et al. 2023, *f-distill*
# ([2307.15190](https://arxiv.org/abs/2307.15190)). Muralidharan et al. 2024, *Minitron*
# ([2407.14679](https://arxiv.org/abs/2407.14679)). Hsu et al. 2024, *Liger Kernel*
# ([2410.10989](https://arxiv.org/abs/2410.10989)). Flags: [TRL](https://huggingface.co/docs/trl/gkd_trainer),
# [Axolotl](https://github.com/axolotl-ai-cloud/axolotl/tree/main/src/axolotl/integrations/kd),
# [Model Optimizer](https://nvidia.github.io/Model-Optimizer/guides/4_distillation.html),
# [torchtune](https://github.com/meta-pytorch/torchtune/issues/2883),
# [Speculators](https://docs.vllm.ai/projects/speculators/en/latest/).
#
# Next: the exercises, then chapter 7, where a small model writes and a large one judges.
