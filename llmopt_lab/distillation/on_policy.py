"""On-policy distillation: the student writes, the teacher says what it would have written.

Off policy, a student sees only texts that it would not have begun itself; at work it goes on from
its own tokens, mistakes included, where nothing was learned (exposure bias). On policy, the rows of
the loss are the places of the student's own texts. The text is a sample: no gradient goes through
the choice of its tokens.

Source: Agarwal et al. 2023, GKD, Algorithm 1 (https://arxiv.org/abs/2306.13649).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.distillation.divergences import forward_kl
from llmopt_lab.distillation.records import Written
from llmopt_lab.distillation.reference import (
    Divergence,
    check_same_vocabulary,
    distillation_loss,
    teacher_logits,
)
from llmopt_lab.nn.generate import KVCache
from llmopt_lab.nn.transformer import Transformer


def on_policy_loss(
    student: Transformer,
    teacher: Transformer,
    prompts: Tensor,
    *,
    n_new: int,
    rng: torch.Generator,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
) -> Tensor:
    """The soft loss on texts that the student writes now, over the tokens that it wrote.

    Args:
        student, teacher: models of one vocabulary, the teacher `as_teacher`.
        prompts: (rows, n_prompt) int64, n_prompt >= 1.
        n_new: tokens that the student adds to each, sampled at temperature 1.
        rng: of the draws, on the student's device.
        temperature, divergence: as for `distillation_loss`. With `jsd` this is GKD; with
            `reverse_kl` it is what MiniLLM minimises, without its policy gradient.

    Returns:
        A scalar.

    Raises:
        BadInput: other vocabularies, no prompt, more tokens than the models have positions, a
            teacher that is in training mode.

    Cost: n_new + 1 passes of the student (one with a gradient), one of the teacher.
    """
    check_same_vocabulary(teacher, student)
    tokens = write(student, prompts, n_new=n_new, rng=rng)
    place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    own = (place >= prompts.shape[1] - 1).expand(len(tokens), -1)  # places that predict its tokens
    return distillation_loss(
        student(tokens[:, :-1]),
        teacher_logits(teacher, tokens[:, :-1]),
        temperature=temperature,
        mask=own,
        divergence=divergence,
    )


@torch.no_grad()
def write(
    model: Transformer,
    prompts: Tensor,
    *,
    n_new: int,
    rng: torch.Generator | None,
    temperature: float = 1.0,
    who: str = "student",
) -> Tensor:
    """Continue all prompts at once by n_new sampled tokens each: (rows, n_prompt + n_new) int64.

    `prompts` (rows, n_prompt) int64; `rng` on the model's device, not needed at `temperature` 0,
    which is greedy. No token ends a text: after the separator the model begins another one.

    Raises:
        BadInput: no prompt, no new token, more tokens than the model has positions, or a negative
            temperature.

    Cost: one pass over the prompts and n_new - 1 of one token a row. Nothing waits for the device,
    so on a GPU the whole call can be captured in a graph (`captured_write`).
    """
    require(
        prompts.dim() == 2 and prompts.numel() > 0 and prompts.dtype == torch.int64,
        f"prompts must be (rows, n_prompt) int64, not empty; got {prompts.dtype} "
        f"{tuple(prompts.shape)}",
    )
    require(n_new > 0, f"n_new must be positive; got {n_new}")
    require(
        prompts.shape[1] + n_new <= model.config.max_positions,
        f"the model knows {model.config.max_positions} positions; "
        f"got prompts of {prompts.shape[1]} and {n_new} new tokens",
    )
    require(temperature >= 0, f"temperature must be 0 (greedy) or positive; got {temperature}")
    require(
        temperature == 0 or rng is not None,
        "sampling at a temperature above 0 needs rng=torch.Generator().manual_seed(...)",
    )
    tokens = [prompts]
    cache = KVCache(
        model.config,
        len(prompts),
        max_tokens=prompts.shape[1] + n_new,
        dtype=model.dtype,
        device=model.device,
    )
    for _ in range(n_new):
        positions = cache.next_positions(tokens[-1].shape[1])
        logits = model(tokens[-1], positions, attend=cache, last_only=True)[:, -1]
        tokens.append(draw(logits, temperature, rng)[:, None])
    tokens = torch.cat(tokens, dim=1)
    record(Written(who, tokens, prompts.shape[1]))
    return tokens


def draw(logits: Tensor, temperature: float, rng: torch.Generator | None) -> Tensor:
    """A token for each row of logits (rows, n_vocab), (rows,) int64, without a look at the values.

    The largest of log p + Gumbel noise has the distribution p (Gumbel 1954); the noise is -log of
    an exponential number.
    """
    if temperature == 0:
        return logits.argmax(-1)
    waits = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=rng)
    return (logits.float() / temperature - waits.log()).argmax(-1)


def captured_write(
    model: Transformer, prompts: Tensor, *, n_new: int, rng: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """`write` as a function of the prompts alone; on a GPU, all its steps as one CUDA graph.

    A graph reads the model's weights where they lie, so it follows their training, and draws on
    from `rng`. It returns the same memory at every call. On a CPU it is `write`.

    Args:
        prompts: an example: later calls take the same shape.
    """
    call = lambda prompts: write(model, prompts, n_new=n_new, rng=rng)  # noqa: E731
    if not prompts.is_cuda:
        return call
    prompts = prompts.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        call(prompts)  # makes what is kept between calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        tokens = call(prompts)

    def replay(new: Tensor) -> Tensor:
        prompts.copy_(new)
        graph.replay()
        return tokens

    return replay
