"""Students in training: what they begin as, what they learn from, and that a run can be repeated,
cut off and taken up again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.distillation import (
    Method,
    as_teacher,
    distillation_loss,
    jsd,
    reverse_kl,
    train,
)
from llmopt_lab.distillation.cases import (
    LIVE,
    Remembered,
    live_student,
    live_text,
    random_batches,
    random_model,
)
from llmopt_lab.distillation.evaluate import own_text, prompts_of, retained
from llmopt_lab.distillation.initialise import (
    fresh,
    keep_layers,
    neuron_importance,
    prune_neurons,
    thawed,
)
from llmopt_lab.distillation.layerwise import LayerLoss, layer_map, layer_states
from llmopt_lab.distillation.on_policy import captured_write, draw, on_policy_loss, write
from llmopt_lab.distillation.records import Stepped, Written
from llmopt_lab.distillation.sequence_level import teacher_texts, text_loss, texts_for
from llmopt_lab.distillation.training import loss_of
from llmopt_lab.nn import generate, load
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.train import HeldOut, Recipe, bits_per_byte
from llmopt_lab.nn.transformer import rope_tables


def tokens_of(*shape, seed=0):
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


def teacher_and_student(dtype=torch.float64):
    return as_teacher(random_model(0, dtype=dtype)), random_model(1, dtype=dtype)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# --- what a student begins as


def test_a_student_of_all_layers_is_its_teacher():
    teacher = as_teacher(random_model(0, n_layers=3))
    student = keep_layers(teacher, [0, 1, 2])
    assert torch.equal(student(tokens_of(2, 7)), teacher(tokens_of(2, 7)))
    assert all(weight.requires_grad for weight in student.parameters())


def test_kept_layers_are_copies_in_the_order_given():
    teacher = as_teacher(random_model(0, n_layers=3))
    student = keep_layers(teacher, [2, 0])
    for new, old in enumerate([2, 0]):
        for name, weight in teacher.layers[old].state_dict().items():
            assert torch.equal(student.layers[new].state_dict()[name], weight)
    with torch.no_grad():
        student.layers[0].mlp.up_proj.weight.zero_()
    assert teacher.layers[2].mlp.up_proj.weight.abs().sum() > 0
    assert student.config.n_layers == 2


@pytest.mark.parametrize("layers", [[], [0, 0], [3], [-1]])
def test_layers_that_the_teacher_lacks_are_refused(layers):
    with pytest.raises(BadInput, match="layers must be some of 0 to 2"):
        keep_layers(random_model(0, n_layers=3), layers)


def test_cutting_neurons_that_are_always_zero_changes_nothing():
    teacher = random_model(0)
    dead = [3, 5, 11, 20]
    with torch.no_grad():
        for block in teacher.layers:
            block.mlp.up_proj.weight[dead] = 0
    importance = neuron_importance(as_teacher(teacher), [tokens_of(4, 9)])
    assert (importance == 0).nonzero()[:, 1].tolist() == dead * 2
    student = prune_neurons(teacher, importance, 20)
    assert student.config.d_ff == 20
    assert_close(student(tokens_of(2, 7)), teacher(tokens_of(2, 7)))


def test_importance_is_the_mean_size_of_an_activation():
    teacher = as_teacher(random_model(0))
    tokens = tokens_of(3, 5)
    with torch.no_grad():
        block = teacher.layers[0]
        positions = torch.arange(5).expand(3, 5)
        cos, sin = rope_tables(teacher.config, positions, torch.float64)
        x = teacher.embed_tokens(tokens)
        x = x + block.self_attn(block.input_layernorm(x), cos, sin, teacher.attend)
        x = block.post_attention_layernorm(x)
        active = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    found = neuron_importance(teacher, [tokens[:1], tokens[1:]])
    assert_close(found[0], active.abs().mean((0, 1)))


def test_the_important_neurons_are_worth_more_than_the_others():
    teacher = as_teacher(random_model(0))
    tokens = tokens_of(16, 20)
    importance = neuron_importance(teacher, [tokens])
    errors = [
        (prune_neurons(teacher, scores, 12)(tokens) - teacher(tokens)).norm()
        for scores in (importance, -importance)
    ]
    assert errors[0] < errors[1]


def test_a_fresh_student_begins_with_layers_that_change_nothing():
    student = fresh(random_model(0).config, seed=3)
    x = student.embed_tokens(tokens_of(1, 4))
    cos, sin = rope_tables(student.config, torch.arange(4)[None], torch.float32)
    assert torch.equal(student.layers[0](x, cos, sin, student.attend), x)
    assert torch.equal(fresh(student.config, 3).norm.weight, student.norm.weight)


# --- hidden states and attention


def test_layer_states_end_in_the_models_logits_and_hold_its_scores():
    teacher = as_teacher(random_model(0))
    tokens = tokens_of(2, 6)
    states = layer_states(teacher, tokens)
    assert len(states.hidden) == 3 and len(states.scores) == 2
    assert_close(teacher.logits(states.hidden[-1]), teacher(tokens))
    seen = []

    def attend(q, k, v, *, layer, scale):
        keys = torch.stack([k[:, head // 2] for head in range(4)], 1)  # 4 query heads, 2 of keys
        scores = torch.einsum("bhid,bhjd->bhij", q, keys) * scale
        seen.append(scores)
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        values = torch.stack([v[:, head // 2] for head in range(4)], 1)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values

    assert_close(teacher(tokens, attend=attend), teacher(tokens))
    for got, want in zip(states.scores, seen, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [((3, 6), (2, 4, 6)), ((4, 12), (3, 6, 9, 12)), ((2, 5), (2, 5)), ((3, 3), (1, 2, 3))],
)
def test_layers_are_mapped_evenly_and_the_last_to_the_last(sizes, want):
    assert layer_map(*sizes) == want


def test_a_copy_of_the_teacher_has_no_layer_loss():
    teacher = as_teacher(random_model(0))
    student = thawed(teacher)
    losses = LayerLoss(student, teacher)(student, teacher, tokens_of(2, 6))
    assert set(losses) == {"embeddings", "hidden", "scores"}
    assert all(loss.item() == 0 for loss in losses.values())


def test_layer_losses_equal_their_formulas_and_reach_the_projection():
    teacher = as_teacher(random_model(0, n_layers=4, d_model=16))
    student = random_model(1, n_layers=2, d_model=8)
    module = LayerLoss(student, teacher, rng=rng())
    tokens = tokens_of(2, 5)
    losses = module(student, teacher, tokens)
    own, goal = layer_states(student, tokens), layer_states(teacher, tokens)
    want = sum(
        F.mse_loss(own.hidden[m] @ module.of_layers.T, goal.hidden[g]) for m, g in ((1, 2), (2, 4))
    )
    assert_close(losses["hidden"], want)
    want = 0.0
    for m, g in ((0, 1), (1, 3)):
        pairs = [(i, j) for i in range(5) for j in range(i + 1)]
        rows = [(own.scores[m] - goal.scores[g])[..., i, j].square().mean() for i, j in pairs]
        want += sum(rows) / len(rows)
    assert_close(losses["scores"], want)
    sum(losses.values()).backward()
    assert module.of_layers.grad.abs().sum() > 0 and module.of_embeddings.grad.abs().sum() > 0
    assert student.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_other_numbers_of_heads_are_refused_for_scores_alone():
    teacher = as_teacher(random_model(0))
    student = random_model(1)
    student.config = replace(student.config, n_heads=8)
    with pytest.raises(BadInput, match="the student has 8 heads, the teacher 4"):
        LayerLoss(student, teacher)
    LayerLoss(student, teacher, attention=False)


# --- on policy


def test_greedy_writing_is_generate_for_every_row():
    model = as_teacher(random_model(0))
    prompts = tokens_of(3, 4)
    text = write(model, prompts, n_new=6, rng=rng(), temperature=0.0)
    for row, prompt in zip(text, prompts, strict=True):
        assert torch.equal(row, generate(model, prompt, 6))


def test_drawn_tokens_have_the_models_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    n = 40_000
    for temperature in (1.0, 2.0):
        drawn = draw(logits.expand(n, 4), temperature, rng())
        share = drawn.bincount(minlength=4) / n
        p = (logits[0] / temperature).softmax(0)
        assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_a_seed_gives_one_text_and_writing_is_recorded():
    model = as_teacher(random_model(0))
    with recording(Written) as trace:
        texts = [write(model, tokens_of(2, 3), n_new=5, rng=rng(seed)) for seed in (7, 7, 8)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert trace.of(Written)[0].n_prompt == 3 and torch.equal(trace.of(Written)[0].tokens, texts[0])
    example = captured_write(model, tokens_of(2, 3), n_new=5, rng=rng(7))
    assert torch.equal(example(tokens_of(2, 3)), texts[0])


@pytest.mark.parametrize("divergence", [reverse_kl, jsd])
def test_the_on_policy_loss_is_over_the_students_own_tokens(divergence):
    teacher, student = teacher_and_student()
    prompts = tokens_of(2, 3)
    loss = on_policy_loss(student, teacher, prompts, n_new=4, rng=rng(5), divergence=divergence)
    text = write(student, prompts, n_new=4, rng=rng(5))
    rows = []
    for row in text:
        for place in range(2, 6):  # the last token of the prompt predicts the first of its own
            p, q = (m(row[None, : place + 1])[0, -1].log_softmax(-1) for m in (teacher, student))
            rows.append(divergence(p, q))
    assert_close(loss, sum(rows) / len(rows))
    loss.backward()
    assert student.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": tokens_of(4)}, r"prompts must be \(rows, n_prompt\) int64"),
        ({"prompts": tokens_of(2, 0)}, "not empty"),
        ({"n_new": 0}, "n_new must be positive"),
        ({"n_new": 62}, "the model knows 64 positions"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_writing_refuses_bad_input(change, message):
    settings = {"prompts": tokens_of(2, 3), "n_new": 4, "rng": rng()} | change
    with pytest.raises(BadInput, match=message):
        write(random_model(0), **settings)


# --- sequence level


def test_the_teachers_text_is_greedy_and_its_loss_that_of_its_tokens():
    teacher, student = teacher_and_student()
    prompts = tokens_of(2, 3)
    text = teacher_texts(teacher, prompts, n_new=5)
    assert torch.equal(text[0], generate(teacher, prompts[0], 5))
    logits = student(text[:, :-1])[:, 2:]
    want = F.cross_entropy(logits.flatten(0, 1), text[:, 3:].flatten())
    assert_close(text_loss(student, text, n_given=3), want)
    with pytest.raises(BadInput, match="needs rng"):
        teacher_texts(teacher, prompts, n_new=5, temperature=1.0)


def test_a_teacher_of_another_vocabulary_teaches_by_text():
    lm = load("lab-draft", device="cpu")
    prompts = ["def add(a, b):\n", "x = [", "import "]
    rows = texts_for(lm, lm, prompts, n_new=6, keep=lambda text: not text.startswith("x"))
    assert len(rows) == 2
    tokens = lm.encode(prompts[0])
    assert lm.decode(rows[0], skip_special_tokens=True).startswith(prompts[0])
    assert len(rows[0]) >= len(tokens)


# --- training

RECIPE = Recipe(random_model(0).config, steps=12, batch=4, context=16, reports=4, other_lr=1e-2)
METHODS = {
    "labels": Method(soft_weight=0.0),
    "distilled": Method(soft_weight=0.7, temperature=2.0),
    "soft alone": Method(soft_weight=1.0, divergence="jsd"),
    "on policy": Method(on_policy=0.5, begin=0.5, n_prompt=4, n_new=4),
    "all on policy": Method(on_policy=1.0, n_prompt=3, n_new=1, divergence="reverse_kl"),
}


def run(method, *, recipe=RECIPE, checkpoint=None, **settings):
    teacher, student = teacher_and_student(torch.float32)
    curve = train(
        student, teacher, random_batches(recipe), recipe, method,
        checkpoint=checkpoint, progress=False, **settings,
    )  # fmt: skip
    return student, curve


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_gives_one_student_and_another_seed_another(name):
    student, curve = run(METHODS[name])
    again, _ = run(METHODS[name])
    other, _ = run(METHODS[name], recipe=replace(RECIPE, seed=1))
    assert same_weights(student, again) and not same_weights(student, other)
    assert [point["step"] for point in curve] == [3, 6, 9, 12]
    assert curve[-1]["tokens"] == 12 * 4 * 16 and not student.training


@pytest.mark.parametrize("name", ["distilled", "on policy"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(name, tmp_path):
    whole, curve = run(METHODS[name])
    cut = tmp_path / "checkpoint.pt"

    def stop(_):
        if cut.is_file() and torch.load(cut)["step"] >= 6:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        run(METHODS[name], checkpoint=cut, evaluate=stop)
    resumed, resumed_curve = run(METHODS[name], checkpoint=cut)
    assert same_weights(whole, resumed)
    assert [p["step"] for p in resumed_curve] == [p["step"] for p in curve]
    with pytest.raises(BadInput, match="another recipe or method"):
        run(METHODS["labels"], checkpoint=cut)


def test_a_student_comes_nearer_to_its_teacher():
    teacher, student = teacher_and_student(torch.float32)
    tokens = tokens_of(8, 16, seed=3)

    def distance(model):
        with torch.no_grad():
            p, q = (m(tokens).log_softmax(-1) for m in (teacher, model))
            return F.kl_div(q, p, log_target=True, reduction="batchmean").item()

    before = distance(student)
    recipe = replace(RECIPE, steps=60)
    train(student, teacher, random_batches(recipe), recipe, Method(soft_weight=1.0), progress=False)
    assert distance(student) < 0.3 * before


def test_the_step_minimises_what_the_reference_says():
    teacher, student = teacher_and_student()
    tokens = tokens_of(3, 9)
    tables = rope_tables(student.config, torch.arange(8)[None], torch.float64) * 2
    method = Method(soft_weight=0.7, temperature=2.0)
    read, labels = tokens[:, :-1], tokens[:, 1:]
    want = distillation_loss(student(read), teacher(read), labels, temperature=2.0)
    assert_close(loss_of(student, teacher, tokens, tables, method, 0), want)
    own = torch.arange(8).expand(3, 8) >= 3  # 4 tokens given
    want = distillation_loss(student(read), teacher(read), temperature=2.0, mask=own)
    assert_close(loss_of(student, teacher, tokens, tables, method, 4), want)


def test_training_records_what_both_models_expect_after_the_probe():
    seen = []
    with recording(Stepped) as trace:
        run(
            METHODS["distilled"],
            probe=tokens_of(5),
            watch=lambda: seen.append(len(trace.of(Stepped))),
        )
    steps = trace.of(Stepped)
    assert seen == [1, 2, 3, 4]  # whoever watches finds this report recorded
    assert [step.step for step in steps] == [3, 6, 9, 12]
    assert torch.equal(steps[0].p, steps[-1].p) and not torch.equal(steps[0].q, steps[-1].q)
    assert_close(steps[-1].q.sum(), torch.ones(()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_weight": 1.5}, r"soft_weight must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"divergence": "hellinger"}, "there are forward_kl, reverse_kl, jsd, total_variation"),
        ({"soft_weight": 0.0, "on_policy": 0.5}, "the teacher is the only one who knows"),
        ({"n_new": 0}, "n_prompt and n_new must be positive"),
    ],
)
def test_a_method_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        Method(**settings)


def test_training_refuses_what_cannot_be_trained():
    teacher, student = teacher_and_student(torch.float32)
    batches = random_batches(RECIPE)
    with pytest.raises(BadInput, match="the teacher is in training mode"):
        train(student, random_model(0), batches, RECIPE, Method())
    with pytest.raises(BadInput, match="the student is frozen"):
        train(as_teacher(student), teacher, batches, RECIPE, Method())
    student.requires_grad_()
    with pytest.raises(BadInput, match=r"0.1 of 4 rows is no row"):
        train(student, teacher, batches, RECIPE, Method(on_policy=0.1))
    with pytest.raises(BadInput, match="must divide the context, 16"):
        train(student, teacher, batches, RECIPE, Method(on_policy=0.5, n_prompt=4, n_new=3))


def test_a_lessons_student_trains_on_text_that_it_is_not_measured_on():
    lm = load("lab-draft", device="cpu")
    tokens, unseen = live_text(lm)
    assert len(tokens) > 50_000 and 2_000 < len(unseen.tokens) < 20_000
    documents = held_out_documents().values()
    texts = [t for i, t in enumerate(documents) if i % 4 == 2 and len(t) < 20_000]
    assert sum(unseen.n_bytes) == sum(len(text.encode()) for text in texts)
    recipe = replace(LIVE, steps=6, batch=4, context=32, reports=2)
    student, curve, bits = live_student(lm, Method(), recipe, progress=False)
    assert [point["step"] for point in curve] == [3, 6]
    assert bits < bits_per_byte(fresh(recipe.config, recipe.seed), unseen, recipe.context)
    assert student.config.n_parameters < 500_000


def test_a_remembered_teacher_gives_its_logits_and_is_asked_once():
    teacher = as_teacher(random_model(0, dtype=torch.float32))
    remembered = Remembered(teacher)
    rows = tokens_of(4, 6)
    first = remembered(rows)
    assert torch.equal(first, teacher(rows).half().float())
    remembered.layers = None  # a second pass would fail
    assert torch.equal(remembered(rows), first)
    assert torch.equal(remembered(rows, last_only=True), first[:, -1:])
    with pytest.raises(TypeError):
        remembered(rows.view(2, 12))  # the same tokens in other rows are another batch


# --- what is kept of the teacher


def held_out():
    tokens = np.random.default_rng(1).integers(1, 23, 150).astype(np.uint16)
    tokens[[0, 60, 100]] = 0
    return HeldOut(tokens, (200, 130, 170))


def test_what_is_kept_equals_a_loop_over_places():
    teacher, student = teacher_and_student(torch.float32)
    as_teacher(student)
    found = retained(student, teacher, held_out(), context=64, batch=2)
    nats, right, same, overlap = [], [], [], []
    documents = np.split(held_out().tokens.astype(np.int64), [60, 100])
    for document in documents:
        tokens = torch.from_numpy(document)
        p, q = (m(tokens[None, :-1])[0].softmax(-1) for m in (teacher, student))
        for place, token in enumerate(tokens[1:].tolist()):
            nats.append(-q[place, token].log())
            right.append(q[place].argmax() == token)
            same.append(q[place].argmax() == p[place].argmax())
            overlap.append(torch.minimum(p[place], q[place]).sum())
    mean = lambda x: torch.stack([torch.as_tensor(v).double() for v in x]).mean()  # noqa: E731
    assert found["bits_per_byte"] == pytest.approx(
        float(torch.stack(nats).sum() / np.log(2) / 500), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx(float(mean(right)), rel=1e-6)
    assert found["agreement"] == pytest.approx(float(mean(same)), rel=1e-6)
    assert found["overlap"] == pytest.approx(float(mean(overlap)), rel=1e-5)
    for prefix, model in (("", student), ("teacher_", teacher)):
        bits = bits_per_byte(model, held_out(), 64)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_copy_keeps_everything():
    teacher, _ = teacher_and_student(torch.float32)
    found = retained(as_teacher(thawed(teacher)), teacher, held_out(), context=64)
    assert found["agreement"] == 1 and found["overlap"] == pytest.approx(1, abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["accuracy"] == found["teacher_accuracy"]


def test_both_authors_texts_are_read_by_both_models():
    teacher, student = teacher_and_student(torch.float32)
    as_teacher(student)
    prompts = prompts_of(held_out(), 4, 5, torch.device("cpu"))
    assert torch.equal(prompts[0], torch.from_numpy(held_out().tokens[:5].astype(np.int64)))
    for author, model in (("student", student), ("teacher", teacher)):
        found = own_text(student, teacher, prompts, n_new=6, rng=rng(2), author=author)
        text = write(model, prompts, n_new=6, rng=rng(2))
        p, q = (m(text[:, :-1])[:, 4:].softmax(-1) for m in (teacher, student))
        want = torch.minimum(p, q).sum(-1).mean()
        assert found["overlap"] == pytest.approx(float(want), rel=1e-5)
        nats = -p.gather(-1, text[:, 5:, None]).log().mean()
        assert found["teacher_nats"] == pytest.approx(float(nats), rel=1e-5)
    with pytest.raises(BadInput, match="author must be student or teacher"):
        own_text(student, teacher, prompts, n_new=6, rng=rng(), author="reader")


# --- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_a_captured_text_follows_the_weights_and_the_seed():
    model = as_teacher(random_model(0, dtype=torch.bfloat16)).cuda()
    prompts = tokens_of(4, 3).cuda()
    dice = torch.Generator("cuda")
    captured = captured_write(model, prompts, n_new=8, rng=dice)
    texts = []
    for seed in (7, 7, 8):
        dice.manual_seed(seed)
        texts.append(captured(prompts).clone())
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :3], prompts)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.norm.weight.fill_(1)
    dice.manual_seed(7)
    assert not torch.equal(captured(prompts), texts[0])
