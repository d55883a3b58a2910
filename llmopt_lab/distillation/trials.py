"""What a function does to two models, or to memory, told in plain values.

Models, their modes and the operators that run cannot be seen from another process. So these run
beside the function that they watch, and whoever judges it reads what they return.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SmallModel(nn.Module):
    """tokens (batch, n) -> logits (batch, n, 6), float64, with a dropout that leaves no chance.

    In training mode it doubles every other channel. `calls` has, for each call, whether it was in
    training mode and whether the call kept a graph.
    """

    def __init__(self, seed: int):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(6, 4, generator=rng, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(4, 6, generator=rng, dtype=torch.float64))
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table[tokens]
        self.calls.append((self.training, x.requires_grad))
        if self.training:
            x = x * torch.tensor([1, 2, 1, 2]).to(x)
        return x @ self.out


RATE = 0.5  # of the optimiser


def one_step(
    train_step: Callable, seed: int, *, temperature: float, student_trains: bool
) -> dict[str, object]:
    """Call `train_step` once on two small models, and tell what it did.

    The student is SmallModel(seed), with gradients of 1 left over in it; the teacher, in training
    mode, is SmallModel(seed + 1).

    Args:
        train_step: train_step(student, teacher, tokens, optimizer, temperature).
        seed: of models and tokens.
        temperature: handed on.
        student_trains: the mode in which the student is handed over.

    Returns:
        returned; gradients_on, whether they still are; the calls of teacher and student, see
        SmallModel; and the weights of both, afterwards.
    """
    student, teacher = SmallModel(seed).train(student_trains), SmallModel(seed + 1)
    for weight in student.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    try:
        returned = train_step(student, teacher, tokens_of(seed), optimizer, temperature)
        gradients_on = torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    return {
        "returned": returned,
        "gradients_on": gradients_on,
        "teacher_calls": teacher.calls,
        "student_calls": student.calls,
        "teacher_weights": [weight.detach().clone() for weight in teacher.parameters()],
        "student_weights": [weight.detach().clone() for weight in student.parameters()],
    }


def tokens_of(seed: int) -> Tensor:
    """(2, 4) tokens for `one_step`."""
    return torch.randint(6, (2, 4), generator=torch.Generator().manual_seed(seed))


def bytes_held(function: Callable, *args) -> tuple[object, int, int]:
    """Call it: (its result, bytes of the largest tensor that was made, most bytes at one time).

    Counted are tensors that operators return while it runs, whole storages, on any device, its
    arguments not; what lives on inside an autograd graph alone is not seen.
    """
    with _Held() as held:
        result = function(*args)
    return result, held.largest, held.most


class _Held(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = self.most = 0
        self.alive: list[weakref.ref] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
                self.alive.append(weakref.ref(leaf))
        living = [(ref, tensor) for ref in self.alive if (tensor := ref()) is not None]
        self.alive = [ref for ref, _ in living]
        storages = (tensor.untyped_storage() for _, tensor in living)
        self.most = max(self.most, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return result
