"""Distillation against oracles that are not ours: torch's kl_div and cross_entropy, loops, finite
differences, moments."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.distillation import (
    as_teacher,
    distillation_loss,
    forward_kl,
    jsd,
    reverse_kl,
    soft_targets,
)
from llmopt_lab.distillation.cases import (
    GuidesDistillationTrainer,
    ragged,
    random_model,
    toy,
)
from llmopt_lab.distillation.divergences import DIVERGENCES, total_variation
from llmopt_lab.distillation.linear_kl import linear_kl, linear_kl_traffic
from llmopt_lab.distillation.records import Compared, RowsDone
from llmopt_lab.distillation.reference import (
    check_same_vocabulary,
    logit_gradient,
    mean_of,
    teacher_logits,
)
from llmopt_lab.distillation.top_k import cache_error, keep_top_k, nbytes_of, top_k_kl
from llmopt_lab.distillation.two_humps import fit_one_hump, hump, places, two_humps


def log_probabilities(*shape, seed=0):
    student, teacher, _, _ = ragged(*shape, seed=seed)
    return teacher.log_softmax(-1), student.log_softmax(-1)


# --- soft targets and divergences


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_soft_targets_are_the_softmax_of_divided_logits(temperature):
    _, teacher, _, _ = ragged(2, 3)
    want = torch.exp(teacher / temperature)
    want = want / want.sum(-1, keepdim=True)
    assert_close(soft_targets(teacher, temperature), want)


def test_a_high_temperature_flattens_and_a_low_one_sharpens():
    _, teacher, _ = toy()
    entropy = [
        -(p * p.clamp_min(1e-30).log()).sum(-1)[0]
        for p in (soft_targets(teacher, t) for t in (0.1, 1.0, 3.0, 30.0))
    ]
    assert entropy == sorted(entropy)
    assert entropy[-1] > 0.99 * math.log(5) and entropy[0] < 1e-6


def test_half_precision_logits_are_softened_in_float32():
    _, teacher, _, _ = ragged(3, dtype=torch.float32)
    p = soft_targets(teacher.half(), 2.0)
    assert p.dtype == torch.float32
    assert_close(p, (teacher.half().double() / 2).softmax(-1))


def test_the_kl_divergences_equal_torchs_row_by_row():
    p, q = log_probabilities(2, 5)
    for i in range(2):
        for j in range(5):
            row = F.kl_div(q[i, j], p[i, j], log_target=True, reduction="sum")
            assert_close(forward_kl(p, q)[i, j], row)
            row = F.kl_div(p[i, j], q[i, j], log_target=True, reduction="sum")
            assert_close(reverse_kl(p, q)[i, j], row)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_equals_its_definition_written_out(beta):
    p, q = log_probabilities(4)
    m = beta * p.exp() + (1 - beta) * q.exp()
    want = beta * (p.exp() * (p.exp() / m).log()).sum(-1)
    want += (1 - beta) * (q.exp() * (q.exp() / m).log()).sum(-1)
    assert_close(jsd(p, q, beta), want)
    assert (jsd(p, q, beta) <= math.log(2)).all()


def test_jsd_at_its_ends_becomes_the_two_kls():
    p, q = log_probabilities(6)
    near = 2.0**-37  # 1 - near is exact; what is left of the limit is far below float32
    assert_close((jsd(p, q, near) / near).float(), forward_kl(p, q))
    assert_close((jsd(p, q, 1 - near) / near).float(), reverse_kl(p, q))
    for beta in (0.0, 1.0):
        with pytest.raises(BadInput, match=r"beta must lie in \(0, 1\)"):
            jsd(p, q, beta)


def test_total_variation_is_one_minus_the_overlap():
    p, q = log_probabilities(6)
    assert_close(total_variation(p, q), 1 - torch.minimum(p.exp(), q.exp()).sum(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_for_equals_and_positive_else(name):
    p, q = log_probabilities(8)
    assert_close(DIVERGENCES[name](p, p), torch.zeros(8, dtype=torch.float64))
    assert (DIVERGENCES[name](p, q) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_gradient_equals_finite_differences(name):
    student, teacher, _, _ = ragged(3, n_vocab=5)
    assert torch.autograd.gradcheck(
        lambda z: DIVERGENCES[name](teacher.log_softmax(-1), z.log_softmax(-1)),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation"])
def test_a_token_that_the_teacher_rules_out_adds_no_nan(name):
    student, teacher, _, _ = ragged(3, n_vocab=6)
    teacher[:, 2] = -torch.inf
    student.requires_grad_()
    rows = DIVERGENCES[name](teacher.log_softmax(-1), student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert rows.isfinite().all() and gradient.isfinite().all()
    if name == "forward_kl":
        p, q = teacher.softmax(-1), student.softmax(-1)
        assert_close(gradient, q - p)


# --- the loss


def loss_by_loops(student, teacher, labels, mask, temperature, soft_weight):
    """Row by row with torch's own functions, and a mean over those that count."""
    soft, hard, n = 0.0, 0.0, 0
    for at in mask.nonzero().tolist():
        z_s, z_t, label = student[tuple(at)], teacher[tuple(at)], labels[tuple(at)]
        soft += F.kl_div(
            F.log_softmax(z_s / temperature, 0), F.softmax(z_t / temperature, 0), reduction="sum"
        )
        hard += F.cross_entropy(z_s[None], label[None])
        n += 1
    return soft_weight * temperature**2 * soft / n + (1 - soft_weight) * hard / n


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 2, 3), (1, 1)])
@pytest.mark.parametrize(("temperature", "soft_weight"), [(3.0, 0.7), (1.0, 0.0), (0.5, 1.0)])
def test_the_loss_equals_loops_over_the_rows_that_count(shape, temperature, soft_weight):
    student, teacher, labels, mask = ragged(*shape)
    want = loss_by_loops(student, teacher, labels, mask, temperature, soft_weight)
    settings = {"temperature": temperature, "soft_weight": soft_weight}
    assert_close(distillation_loss(student, teacher, labels, mask=mask, **settings), want)
    every = torch.ones_like(mask)
    want = loss_by_loops(student, teacher, labels, every, temperature, soft_weight)
    assert_close(distillation_loss(student, teacher, labels, **settings), want)


def test_without_labels_the_soft_part_is_all_at_full_weight():
    student, teacher, labels, mask = ragged(2, 5)
    want = loss_by_loops(student, teacher, labels, mask, 3.0, 1.0)
    assert_close(distillation_loss(student, teacher, mask=mask), want)


def test_twice_the_length_or_the_batch_leaves_the_loss_as_it_is():
    student, teacher, labels, _ = ragged(3, 5)
    once = distillation_loss(student, teacher, labels)
    for dim in (0, 1):
        args = [torch.cat((x, x), dim) for x in (student, teacher, labels)]
        assert_close(distillation_loss(*args), once)


def test_the_guides_loss_is_n_times_too_large_and_lacks_its_labels():
    student, teacher, labels, _ = ragged(3, 32)
    models = [lambda _, x=x: x for x in (teacher, student)]
    trainer = GuidesDistillationTrainer(*models)
    with pytest.raises(NameError, match="labels"):
        trainer.distillation_loss(None)
    batchmean = F.kl_div(
        F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean"
    )
    assert_close(9 * batchmean / distillation_loss(student, teacher), torch.tensor(32.0).double())


def test_padding_has_no_influence_and_no_gradient():
    student, teacher, labels, mask = ragged(3, 5)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, mask=mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(-1).all()
    with torch.no_grad():
        for x in (student, teacher):
            x[~mask] = 1e4
    assert_close(distillation_loss(student, teacher, labels, mask=mask), loss)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_t_times_q_minus_p_over_the_rows(temperature):
    student, teacher, _, mask = ragged(3, 5)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, temperature=temperature, mask=mask)
    (gradient,) = torch.autograd.grad(loss, student)
    q, p = (x.detach() / temperature for x in (student, teacher))
    want = temperature * (q.softmax(-1) - p.softmax(-1)) / mask.sum()
    assert_close(gradient, want.masked_fill(~mask[..., None], 0))
    closed = logit_gradient(student.detach(), teacher, temperature=temperature, mask=mask)
    assert_close(closed, gradient)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_losss_gradient_equals_finite_differences(name):
    student, teacher, labels, mask = ragged(2, 3, n_vocab=5)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(
            z, teacher, labels, mask=mask, temperature=2.0, divergence=DIVERGENCES[name]
        ),
        student.requires_grad_(),
    )


def test_no_gradient_goes_to_the_teacher():
    student, teacher, labels, _ = ragged(2, 3)
    teacher.requires_grad_()
    loss = distillation_loss(student.requires_grad_(), teacher, labels)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_t_squared_keeps_the_gradient_in_size():
    """Without it the gradient falls by more than 100 from T = 1 to 20, with it by less than 5."""
    student, teacher, _, _ = ragged(64)
    norms = {t: logit_gradient(student, teacher, temperature=t).norm() for t in (1.0, 20.0)}
    assert norms[20.0] / 20**2 < norms[1.0] / 100
    assert norms[1.0] / 5 < norms[20.0] < 5 * norms[1.0]


def test_at_a_high_temperature_distillation_matches_logits():
    """Hinton et al. 2015, section 2.1: the gradient tends to (z - v) / (n_vocab n_rows)."""
    student, teacher, _, _ = ragged(4)
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    got = logit_gradient(student, teacher, temperature=1e7)
    assert_close(got.float(), (student - teacher) / (37 * 4))


def test_the_loss_says_what_it_compared():
    student, teacher, labels, mask = ragged(2, 5)
    with recording(Compared) as trace:
        loss = distillation_loss(student, teacher, labels, mask=mask)
    (compared,) = trace.of(Compared)
    assert_close(compared.total, loss)
    assert_close(0.7 * compared.soft + 0.3 * compared.hard, loss)
    assert f"{int(mask.sum())} of 10 rows count" in str(compared)


def bad(student, teacher, labels, mask):
    """Arguments of distillation_loss that must be refused, and what it says."""
    return [
        ((student, teacher[..., :9], labels), {}, "must share one vocabulary"),
        ((student, teacher[:1], labels), {}, "must have the same shape"),
        ((student.long(), teacher, labels), {}, "student_logits must be floating point"),
        ((student, teacher, labels[0]), {}, r"labels must be int64 of shape \(2, 5\)"),
        ((student, teacher, labels[..., None]), {}, r"labels must be int64 of shape \(2, 5\)"),
        ((student, teacher, labels.int()), {}, "labels must be int64"),
        ((student, teacher, labels + 37), {}, r"labels must lie in \[0, 37\)"),
        ((student, teacher, labels - 100), {}, "left out by mask="),
        ((student, teacher, labels), {"mask": mask[0]}, "mask must be bool of shape"),
        ((student, teacher, labels), {"mask": mask.int()}, "mask must be bool"),
        ((student, teacher, labels), {"mask": mask & False}, "leaves no row that counts"),
        ((student, teacher, labels), {"temperature": 0.0}, "temperature must be a positive"),
        ((student, teacher, labels), {"temperature": math.nan}, "temperature must be a positive"),
        ((student, teacher, labels), {"soft_weight": 1.1}, r"soft_weight must lie in \[0, 1\]"),
    ]


@pytest.mark.parametrize("case", range(14))
def test_bad_input_is_refused(case):
    arguments, settings, message = bad(*ragged(2, 5))[case]
    with pytest.raises(BadInput, match=message):
        distillation_loss(*arguments, **settings)


def test_labels_that_fit_by_accident_are_refused():
    """As many places as tokens: cross_entropy on (batch, n, n_vocab) then takes the wrong axis."""
    student, teacher, labels, _ = ragged(2, 6, n_vocab=6)
    wrong = F.cross_entropy(student, labels)
    right = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    assert abs(wrong - right) > 1e-3
    assert_close(distillation_loss(student, teacher, labels, soft_weight=0.0), right)


# --- the teacher


class Noisy(nn.Module):
    """A teacher that drops out in training mode."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(9, 9), nn.Dropout(0.5)

    def forward(self, tokens):
        return self.drop(self.embed(tokens))


def test_a_teacher_in_training_mode_is_refused_wherever_it_is():
    teacher, tokens = Noisy(), torch.arange(6)[None]
    assert not torch.equal(teacher(tokens), teacher(tokens))
    with pytest.raises(BadInput, match="training mode"):
        teacher_logits(teacher, tokens)
    as_teacher(teacher)
    assert torch.equal(teacher_logits(teacher, tokens), teacher_logits(teacher, tokens))
    teacher.drop.train()  # a part alone
    with pytest.raises(BadInput, match=r"training mode \(drop\)"):
        teacher_logits(teacher, tokens)


def test_a_teacher_that_would_be_trained_is_refused():
    teacher = Noisy().eval()
    with pytest.raises(BadInput, match="embed.weight requires a gradient"):
        teacher_logits(teacher, torch.arange(3)[None])
    assert not teacher_logits(as_teacher(teacher), torch.arange(3)[None]).requires_grad


def test_another_vocabulary_is_refused():
    student = random_model(1)
    teacher = random_model(0)
    check_same_vocabulary(teacher, student)
    teacher.config = teacher.config.__class__(**(vars(teacher.config) | {"n_vocab": 24}))
    with pytest.raises(BadInput, match="teacher has 24 tokens, the student 23"):
        check_same_vocabulary(teacher, student)


class NamedTokens:
    """As much of a LanguageModel as a comparison of vocabularies looks at."""

    def __init__(self, *tokens):
        self.config = random_model(0).config
        self.tokenizer = self
        self.get_vocab = lambda: {token: i for i, token in enumerate(tokens)}


def test_a_vocabulary_of_the_same_size_but_other_tokens_is_refused():
    check_same_vocabulary(NamedTokens("a", "b"), NamedTokens("a", "b"))
    with pytest.raises(BadInput, match="'b': token 1 of the teacher, 2 of the student"):
        check_same_vocabulary(NamedTokens("a", "b", "c"), NamedTokens("a", "c", "b"))


# --- the output layer and the loss together


def linear_inputs(n_tokens, d, n_vocab, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, teacher = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((n_tokens, d), (n_vocab, d), (n_tokens, n_vocab))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), 2 * teacher


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("sizes", "chunk", "tile"), [((13, 5, 37), 4, 8), ((7, 3, 9), 7, 16), ((5, 8, 11), 2, 11)]
)
def test_the_fused_loss_equals_the_one_with_all_logits(sizes, chunk, tile, masked):
    hidden, weight, teacher = linear_inputs(*sizes)
    mask = (torch.arange(sizes[0]) % 3 != 1) if masked else None
    settings = {"temperature": 2.5, "mask": mask}
    loss = linear_kl(hidden, weight, teacher, chunk=chunk, tile=tile, **settings)
    want = distillation_loss(hidden @ weight.T, teacher, **settings)
    assert_close(loss, want)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    for name, g, w in zip(
        ("hidden", "weight"), got, torch.autograd.grad(3 * want, (hidden, weight)), strict=True
    ):
        assert_close(g, w, name)


def test_the_fused_losss_gradients_equal_finite_differences():
    hidden, weight, teacher = linear_inputs(5, 3, 7)
    mask = torch.tensor([True, False, True, True, True])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_kl(h, w, teacher, temperature=1.7, mask=mask, chunk=2, tile=3),
        (hidden, weight),
    )


@pytest.mark.parametrize(
    ("sizes", "chunk", "tile"), [((13, 5, 37), 4, 8), ((7, 3, 9), 7, 16), ((8, 2, 12), 8, 12)]
)
def test_the_fused_loss_moves_the_bytes_of_its_formula(sizes, chunk, tile):
    hidden, weight, teacher = linear_inputs(*sizes)
    with recording(Load, Store) as trace, torch.no_grad():
        linear_kl(hidden, weight, teacher, chunk=chunk, tile=tile)
    read, written = linear_kl_traffic(*sizes, chunk)
    assert trace.total("nbytes", Load) == 8 * read
    assert trace.total("nbytes", Store) == 8 * written


def test_the_fused_loss_tells_of_each_chunk():
    hidden, weight, teacher = linear_inputs(5, 3, 7)
    with recording(RowsDone) as trace, torch.no_grad():
        linear_kl(hidden, weight, teacher, chunk=2)
    done = trace.of(RowsDone)
    assert [(d.rows.start, d.rows.stop) for d in done] == [(0, 2), (2, 4), (4, 5)]
    logits = (hidden @ weight.T).detach()
    assert_close(torch.cat([d.lse_student for d in done]), logits.logsumexp(1))
    assert_close(torch.cat([d.lse_teacher for d in done]), teacher.logsumexp(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4).double()}, "hidden must be"),
        ({"teacher": torch.zeros(5, 6).double()}, r"teacher must be logits of shape \(5, 7\)"),
        ({"weight": torch.zeros(7, 3)}, "must share a floating dtype"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, r"mask must be bool of shape \(5,\)"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "leaves no token"),
        ({"chunk": 0}, "chunk and tile must be positive"),
        ({"temperature": -1.0}, "temperature must be a positive"),
    ],
)
def test_bad_input_of_the_fused_loss_is_refused(change, message):
    hidden, weight, teacher = linear_inputs(5, 3, 7)
    arguments = {"hidden": hidden, "weight": weight, "teacher": teacher} | change
    with pytest.raises(BadInput, match=message):
        linear_kl(**arguments)


# --- a cache of the teacher's likeliest tokens


def test_a_cache_of_all_tokens_is_the_whole_distribution_up_to_half_precision():
    student, teacher, _, _ = ragged(6)
    kept = keep_top_k(teacher, 37, temperature=2.0)
    want = forward_kl((teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1))
    for rest in ("bucket", "renormalise"):
        got = top_k_kl(kept, student, temperature=2.0, rest=rest)
        assert_close(got.half(), want)


def test_the_cache_holds_the_exact_log_probabilities_of_the_likeliest_tokens():
    _, teacher, _, _ = ragged(6)
    kept = keep_top_k(teacher, 3)
    log_p = teacher.log_softmax(-1)
    for row in range(6):
        order = sorted(range(37), key=lambda i: -log_p[row, i])  # noqa: B023
        assert kept.tokens[row].tolist() == order[:3]
        assert_close(kept.log_p[row], log_p[row, order[:3]])
    assert nbytes_of(kept) == 6 * 3 * 4


def test_the_bucket_is_a_coarser_kl_written_out_by_hand():
    student, teacher, _, _ = ragged(5)
    kept = keep_top_k(teacher, 4)
    got = top_k_kl(kept, student)
    for row in range(5):
        p = kept.log_p[row].double().exp()
        q = student[row].softmax(0)[kept.tokens[row].long()]
        p, q = (torch.cat((x, 1 - x.sum()[None])) for x in (p, q))
        assert_close(got[row], (p * (p / q).log()).sum())


def test_the_bucket_never_says_more_than_the_truth_and_gets_there():
    student, teacher, _, _ = ragged(20)
    truth = forward_kl(teacher.log_softmax(-1), student.log_softmax(-1))
    before = torch.zeros(20).double()
    for k in (1, 4, 16, 36):
        found = top_k_kl(keep_top_k(teacher, k), student)
        assert (found <= truth + 2e-3).all() and (found >= before - 2e-3).all()
        before = found


def test_the_error_of_a_cache_falls_with_k_and_renormalising_is_worse_for_the_gradient():
    noise, teacher, _, _ = ragged(50)
    student = teacher + 0.3 * noise  # a student that has learned already: its gradient is small
    errors = [cache_error(teacher, student, k) for k in (1, 4, 16)]
    for name in ("bucket_gradient", "renormalise_gradient"):
        falling = [error[name] for error in errors]
        assert falling == sorted(falling, reverse=True)
    assert all(e["bucket_gradient"] < e["renormalise_gradient"] for e in errors)
    assert errors[1]["bytes_per_row"] == 16 and errors[1]["share_of_full"] == 16 / 74


def test_a_cache_refuses_what_does_not_fit():
    student, teacher, _, _ = ragged(5)
    with pytest.raises(BadInput, match="k must be 1 to 37; got 38"):
        keep_top_k(teacher, 38)
    with pytest.raises(BadInput, match="the cache is of"):
        top_k_kl(keep_top_k(teacher, 3), student[:4])
    with pytest.raises(BadInput, match="rest must be bucket or renormalise"):
        top_k_kl(keep_top_k(teacher, 3), student, rest="drop")


# --- one hump for two


def moments(log_p):
    p, x = log_p.exp(), places()
    mean = (p * x).sum()
    return mean, (p * (x - mean) ** 2).sum().sqrt()


def test_the_forward_kl_ends_with_the_teachers_mean_and_width():
    """Of all distributions of a family with these two statistics, the nearest has the same ones."""
    mean, width = fit_one_hump(two_humps(), forward_kl, steps=400)
    found = moments(hump(*torch.tensor([mean, width], dtype=torch.float64)))
    assert_close(torch.stack(found).float(), torch.stack(moments(two_humps())))
    assert width > 3 * 0.7


@pytest.mark.parametrize(("start", "want", "share"), [(-1.0, -3.0, 0.6), (0.5, 3.0, 0.4)])
def test_the_reverse_kl_ends_on_the_hump_it_begins_near(start, want, share):
    """And its value there is -log of that hump's share: the other one costs nothing."""
    mean, width = fit_one_hump(two_humps(), reverse_kl, mean=start)
    assert_close(torch.tensor([mean, width]).half(), torch.tensor([want, 0.7]))
    left = reverse_kl(two_humps().double(), hump(*torch.tensor([mean, width]).double()))
    assert_close(left.half(), torch.tensor(-math.log(share)))


def test_a_mean_over_nothing_is_zero_and_no_nan():
    rows = torch.tensor([torch.nan, torch.inf])
    assert mean_of(rows, torch.zeros(2, dtype=torch.bool)) == 0
