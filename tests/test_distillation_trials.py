"""What the exercises' checks are told about a learner's function: bytes, modes, weights."""

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.distillation.trials import RATE, SmallModel, bytes_held, one_step, tokens_of


def grow(x, n, keep):
    """n tensors of x's size, all kept or one at a time."""
    kept = []
    for _ in range(n):
        y = x + 1
        kept = [*kept, y] if keep else [y]
        del y
    return len(kept)


@pytest.mark.parametrize(("keep", "alive"), [(True, 5), (False, 2)])
def test_bytes_are_those_alive_at_once(keep, alive):
    x = torch.zeros(10, dtype=torch.float64)
    assert bytes_held(grow, x, 5, keep) == (5 if keep else 1, 80, 80 * alive)


def test_a_view_counts_once_and_with_its_whole_storage():
    result, largest, most = bytes_held(lambda: torch.zeros(6, 4)[1:2].T)
    assert (tuple(result.shape), largest, most) == ((4, 1), 96, 96)


def test_what_autograd_makes_is_seen():
    w = torch.ones(3, 2, requires_grad=True)
    (gradient,), largest, _ = bytes_held(
        lambda: torch.autograd.grad((torch.ones(50, 3) @ w).square().sum(), w)
    )
    assert_close(gradient, torch.full((3, 2), 300.0))
    assert largest == 50 * 3 * 4


def test_a_step_that_does_nothing_leaves_models_as_their_seeds_make_them():
    told = one_step(lambda *args: None, 3, temperature=1.0, student_trains=True)
    assert told["returned"] is None and told["gradients_on"]
    assert told["teacher_calls"] == told["student_calls"] == []
    for who, seed in (("student", 3), ("teacher", 4)):
        for got, want in zip(told[f"{who}_weights"], SmallModel(seed).parameters(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("student_trains", [True, False])
def test_modes_graphs_and_left_over_gradients_are_told(student_trains):
    def step(student, teacher, tokens, optimizer, temperature):
        assert (temperature, tokens.tolist()) == (2.0, tokens_of(5).tolist())
        teacher(tokens)
        with torch.no_grad():
            teacher.eval()(tokens)
            student(tokens)
        optimizer.step()  # on what was left over
        torch.set_grad_enabled(False)

    told = one_step(step, 5, temperature=2.0, student_trains=student_trains)
    assert told["teacher_calls"] == [(True, True), (False, False)]
    assert told["student_calls"] == [(student_trains, False)]
    assert not told["gradients_on"] and torch.is_grad_enabled()
    for got, before in zip(told["student_weights"], SmallModel(5).parameters(), strict=True):
        assert_close(got, before - RATE)


def test_a_model_in_training_mode_answers_otherwise():
    model, tokens = SmallModel(0), tokens_of(0)
    assert not torch.allclose(model(tokens), model.eval()(tokens))
