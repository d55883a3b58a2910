"""Inputs shared by tests, benchmarks and the notebook, and the benchmark with its peers."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.bench import Case
from llmopt_lab.distillation.divergences import reverse_kl
from llmopt_lab.distillation.initialise import fresh
from llmopt_lab.distillation.linear_kl import linear_kl
from llmopt_lab.distillation.on_policy import on_policy_loss
from llmopt_lab.distillation.peers import CONTENDERS, oracle
from llmopt_lab.distillation.reference import as_teacher
from llmopt_lab.distillation.training import Method, train
from llmopt_lab.distillation.two_humps import fit_one_hump, two_humps
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.train import FAMILY, SEPARATOR, Batches, HeldOut, Recipe, bits_per_byte
from llmopt_lab.nn.transformer import Attend, Transformer
from llmopt_lab.nn.weights import LanguageModel


def toy() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (4 places, 5 tokens), and labels (4,): whole numbers.

    The teacher is sure, of two minds, and undecided; in the last place the label is not its first
    choice.
    """
    teacher = torch.tensor([[5, 1, 0, 0, 0], [3, 3, 0, -1, 0], [1, 1, 1, 1, 1], [0, 2, 4, 0, 0]])
    student = torch.tensor([[2, 1, 0, 1, 0], [1, 3, 0, 0, 0], [2, 0, 1, 0, 0], [0, 1, 1, 2, 0]])
    return student.float(), teacher.float(), torch.tensor([0, 1, 4, 1])


def ragged(
    *shape: int, n_vocab: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits (*shape, n_vocab), labels and mask (*shape), random.

    Rows differ in how sure they are, and the mask leaves about half of them, the first among them.
    """
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(*shape, n_vocab, generator=rng, dtype=dtype)
        * (1 + 3 * torch.rand(*shape, 1, generator=rng, dtype=dtype))
        for _ in range(2)
    )
    labels = torch.randint(n_vocab, shape, generator=rng)
    mask = torch.rand(shape, generator=rng) < 0.5
    mask.view(-1)[0] = True
    return student, teacher, labels, mask


def random_model(
    seed: int, *, n_layers: int = 2, d_model: int = 16, dtype: torch.dtype = torch.float64
) -> Transformer:
    """A small trainable Llama of 23 tokens whose random weights are large enough to prefer."""
    config = ModelConfig(
        n_vocab=23, d_model=d_model, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_head=4, d_ff=24,
        max_positions=64, rope_theta=100.0, tie_embeddings=True,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=rng) * weight.shape[1] ** -0.5
    return model.to(dtype)


def random_batches(recipe: Recipe, n_tokens: int = 3000) -> Batches:
    """Batches of random text in documents of 97 tokens."""
    tokens = np.random.default_rng(0).integers(1, recipe.config.n_vocab, n_tokens)
    tokens[::97] = SEPARATOR
    return Batches(tokens.astype(np.uint16), recipe, torch.device("cpu"))


LIVE = Recipe(
    ModelConfig(**FAMILY, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=128),
    steps=80, batch=4, context=64, reports=8,
)  # fmt: skip


class Remembered(Transformer):
    """A quiet copy of a teacher that keeps its logits of every batch, all of a row in float16.

    Runs over the same batches ask it once: what a cache on disk does, at 2 n_vocab bytes a token.
    On a CPU; a run that torch.compile compiles cannot look anything up.
    """

    def __init__(self, teacher: Transformer):
        super().__init__(teacher.config, attend=teacher.attend)
        self.load_state_dict(teacher.state_dict())
        as_teacher(self.to("cpu", teacher.dtype))
        self.kept: dict[tuple[torch.Size, bytes], Tensor] = {}

    def hidden(self, tokens: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The logits, (rows, n, n_vocab) float16, made at the first call with these tokens."""
        key = tokens.shape, tokens.numpy().tobytes()
        if key not in self.kept:
            x = super().hidden(tokens, cos, sin, attend)
            self.kept[key] = super().logits(x).half()
        return self.kept[key]

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` kept, in the model's dtype."""
        return x.to(self.dtype)


def live_text(lm: LanguageModel) -> tuple[np.ndarray, HeldOut]:
    """Tokens to train on, and 20 kB of other files to measure on, of the text that ships: no lab
    model was trained on any of it, the teacher neither."""
    train_on, measure_on, sizes = [], [], []
    for i, text in enumerate(held_out_documents().values()):
        tokens = [SEPARATOR, *lm.encode(text, add_special_tokens=False).tolist()]
        if i % 4 == 2 and len(text) < 20_000:
            measure_on += tokens
            sizes.append(len(text.encode()))
        else:
            train_on += tokens
    return np.array(train_on, np.uint16), HeldOut(np.array(measure_on, np.uint16), tuple(sizes))


def live_student(
    lm: LanguageModel,
    method: Method,
    recipe: Recipe = LIVE,
    *,
    teacher: Transformer | None = None,
    **settings,
) -> tuple[Transformer, list[dict], float]:
    """Train a student of 0.3 M parameters from random weights: a lesson's minute on a CPU.

    Args:
        lm: the teacher and its tokenizer, such as `load("lab-target")`.
        method: what it learns from.
        recipe: steps, rates and seed.
        teacher: instead of the language model's own, such as `Remembered(lm.model)`.
        settings: for `train`, such as probe and progress.

    Returns:
        The student, its curve, and its bits per byte on files that nobody trained on.

    Cost: 80 steps of 256 tokens: about 4 s of one core on labels, 14 s with lab-target, 6 s once it
    is remembered.
    """
    tokens, held_out = live_text(lm)
    teacher = as_teacher(lm.model) if teacher is None else teacher
    student = fresh(recipe.config, recipe.seed).to(teacher.device)
    batches = Batches(tokens, recipe, teacher.device)
    curve = train(student, teacher, batches, recipe, method, **settings)
    return student, curve, bits_per_byte(student, held_out, recipe.context)


class GuidesDistillationTrainer:
    """COUNTER-EXAMPLE: a widely copied snippet, kept as it is, mistakes and all.

    `labels` is no argument; batchmean divides (batch, n, n_vocab) by the batch alone, so the soft
    part is n times too large; the teacher may be in training mode; nothing trains; student_probs
    is never used.
    """

    def __init__(self, teacher_model, student_model):
        self.teacher = teacher_model
        self.student = student_model

    def distillation_loss(self, inputs, temperature=3.0):
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
            teacher_probs = F.softmax(teacher_logits / temperature, dim=-1)
        student_logits = self.student(inputs)
        student_probs = F.softmax(student_logits / temperature, dim=-1)  # noqa: F841
        distillation_loss = F.kl_div(
            F.log_softmax(student_logits / temperature, dim=-1),
            teacher_probs,
            reduction="batchmean",
        ) * (temperature**2)
        task_loss = F.cross_entropy(student_logits, labels)  # noqa: F821
        total_loss = 0.7 * distillation_loss + 0.3 * task_loss
        return total_loss


def strip_example(reference) -> list[Tensor]:
    """A run that reaches every `record(...)` of the room; `reference` is its reference module."""
    student, teacher, labels, mask = ragged(2, 5)
    student.requires_grad_()
    soft = reference.soft_targets(teacher, 2.0)
    loss = reference.distillation_loss(student, teacher, labels, mask=mask)
    (gradient,) = torch.autograd.grad(loss, student)
    hidden, weight = torch.randn(5, 3, dtype=torch.float64, generator=_rng(0)), student[0, :, :3]
    with torch.no_grad():
        fused = linear_kl(hidden, weight, teacher[0, :, :5], chunk=2, tile=2)
    tutor, pupil = as_teacher(random_model(0)), random_model(1)
    prompts = torch.randint(23, (2, 3), generator=_rng(1))
    with torch.no_grad():
        own = on_policy_loss(pupil, tutor, prompts, n_new=4, rng=_rng(2))
    hump = fit_one_hump(two_humps(), reverse_kl, steps=3)
    recipe = Recipe(tutor.config, steps=2, batch=2, context=8, reports=2)
    small = [random_model(seed, dtype=torch.float32) for seed in (0, 1)]
    train(
        small[1], as_teacher(small[0]), random_batches(recipe), recipe, Method(),
        probe=prompts[0], progress=False,
    )  # fmt: skip
    weights = [weight.detach() for weight in small[1].parameters()]
    return [soft, loss.detach(), gradient, fused, own, torch.tensor(hump), *weights]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The benchmark: bf16 on a GPU

TEMPERATURE = 1.0  # of the benchmark: a peer saves a pass over its gradients there


def _inputs(device, *, n_tokens: int, d_model: int, n_vocab: int, d_teacher: int = 0) -> tuple:
    """hidden, weight, teacher, teacher_weight, temperature. Logits of standard deviation 3."""
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rng = torch.Generator(device).manual_seed(0)

    def random(rows: int, cols: int, size: float) -> Tensor:
        x = torch.empty(rows, cols, dtype=dtype, device=device)
        return x.normal_(std=size, generator=rng)

    hidden, weight = random(n_tokens, d_model, 1.0), random(n_vocab, d_model, 3 / d_model**0.5)
    if d_teacher:
        teacher = random(n_tokens, d_teacher, 1.0)
        return hidden, weight, teacher, random(n_vocab, d_teacher, 3 / d_teacher**0.5), TEMPERATURE
    return hidden, weight, random(n_tokens, n_vocab, 3.0), None, TEMPERATURE


def _flops(*, n_tokens: int, d_model: int, n_vocab: int, d_teacher: int = 0) -> int:
    return 2 * n_tokens * n_vocab * (3 * d_model + d_teacher)


def _min_bytes(*, n_tokens: int, d_model: int, n_vocab: int, d_teacher: int = 0) -> int:
    """Inputs once, gradients once, in bf16."""
    teacher = (n_tokens + n_vocab) * d_teacher if d_teacher else n_tokens * n_vocab
    return 2 * (2 * (n_tokens + n_vocab) * d_model + teacher)


def _case(title: str, *sizes: dict) -> Case:
    cpu = {"n_tokens": 6, "d_model": 16, "n_vocab": 70}
    if "d_teacher" in sizes[0]:
        cpu["d_teacher"] = 24
    return Case(
        title=title, sizes=sizes, inputs=_inputs, oracle=oracle, contenders=CONTENDERS,
        flops=_flops, min_bytes=_min_bytes, cpu_sizes=(cpu,),
    )  # fmt: skip


CASES = (
    _case(
        "linear + KL, forward and backward, from the teacher's logits",
        {"n_tokens": 8192, "d_model": 2048, "n_vocab": 49152},
        {"n_tokens": 2048, "d_model": 2048, "n_vocab": 49152},
        {"n_tokens": 8192, "d_model": 2048, "n_vocab": 128256},
    ),
    _case(
        "linear + KL, forward and backward, from the teacher's hidden states",
        {"n_tokens": 8192, "d_model": 2048, "n_vocab": 49152, "d_teacher": 2048},
    ),
)
