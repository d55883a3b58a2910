"""A teacher's logits on disk: the k likeliest tokens of each place, and what that costs in error.

With a cache the teacher runs once, not once an epoch. All of a row in half precision is 2 n_vocab
bytes a token: 98 GB for a million tokens of 49,152. The k likeliest are 4 to 6 bytes each.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.distillation.divergences import forward_kl
from llmopt_lab.distillation.records import TopK
from llmopt_lab.distillation.reference import check_logits, check_temperature, log_softened

INT16_TOKENS = 1 << 15


def keep_top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k largest softened log-probabilities of each row of logits (.., n_vocab), as stored.

    They are the exact ones of the whole softmax, so the mass of what is left out is known too:
    1 - sum of the kept. A cache is for one temperature: the others need the whole row.

    Raises:
        BadInput: no logits, a `k` that is not 1 to n_vocab, a temperature out of range.
    """
    check_logits("logits", logits)
    check_temperature(temperature)
    n_vocab = logits.shape[-1]
    require(1 <= k <= n_vocab, f"k must be 1 to {n_vocab}; got {k}")
    log_p, tokens = log_softened(logits, temperature).topk(k, dim=-1)
    small = torch.int16 if n_vocab <= INT16_TOKENS else torch.int32
    return TopK(log_p.half(), tokens.to(small), n_vocab)


def nbytes_of(kept: TopK) -> int:
    """Of the cache."""
    return kept.log_p.nbytes + kept.tokens.nbytes


def top_k_kl(
    kept: TopK, student_logits: Tensor, *, temperature: float = 1.0, rest: str = "bucket"
) -> Tensor:
    """KL(teacher || student) of each row as far as the cache tells, (..) nats, differentiable.

    Args:
        kept: of `keep_top_k`, at the same temperature.
        student_logits: (.., n_vocab).
        rest: what becomes of the teacher's mass outside the k tokens:
            "bucket":       all other tokens are one: its mass is held to the student's. Never
                            above the true KL (the rest's own shape is lost), and equal at k = V.
            "renormalise":  the k tokens are scaled to sum to 1: the student is told that nothing
                            else ever happens, and its own rest is pressed to 0.

    Raises:
        BadInput: shapes that do not fit, an unknown `rest`.
    """
    check_temperature(temperature)
    require(rest in ("bucket", "renormalise"), f"rest must be bucket or renormalise; got {rest!r}")
    require(
        student_logits.shape[-1] == kept.n_vocab
        and student_logits.shape[:-1] == kept.tokens.shape[:-1],
        f"the cache is of {tuple(kept.tokens.shape[:-1])} rows and {kept.n_vocab:,} tokens; got "
        f"logits {tuple(student_logits.shape)}",
    )
    log_q = log_softened(student_logits, temperature).gather(-1, kept.tokens.long())  # (.., k)
    log_p = kept.log_p.to(log_q.dtype)
    if rest == "renormalise":
        return forward_kl(log_p.log_softmax(-1), log_q)
    if log_p.shape[-1] == kept.n_vocab:
        return forward_kl(log_p, log_q)
    return forward_kl(with_rest(log_p), with_rest(log_q))


def with_rest(log_p: Tensor) -> Tensor:
    """(.., k) log-probabilities and one more: of everything else."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    tiny = torch.finfo(log_p.dtype).eps  # half precision may have rounded the kept above 1
    return torch.cat((log_p, rest.clamp_min(tiny).log()), dim=-1)


def cache_error(
    teacher_logits: Tensor, student_logits: Tensor, k: int, *, temperature: float = 1.0
) -> dict[str, float]:
    """What a cache of k tokens gets wrong on these rows, (rows, n_vocab) each.

    Returns:
        bytes_per_row; share_of_full (of 2 n_vocab bytes); mass (mean that the cache keeps); and for
        both ways with the rest, the relative errors of the mean loss and of its gradient:
        bucket_loss, bucket_gradient, renormalise_loss, renormalise_gradient.
    """
    kept = keep_top_k(teacher_logits, k, temperature=temperature)
    n_rows = kept.tokens[..., 0].numel()
    found = {
        "bytes_per_row": nbytes_of(kept) / n_rows,
        "share_of_full": nbytes_of(kept) / n_rows / (2 * kept.n_vocab),
        "mass": float(kept.log_p.double().exp().sum(-1).mean()),
    }
    z = student_logits.detach().requires_grad_()
    log_p = log_softened(teacher_logits, temperature)
    exact = forward_kl(log_p, log_softened(z, temperature)).mean()
    (want,) = torch.autograd.grad(exact, z)
    for rest in ("bucket", "renormalise"):
        loss = top_k_kl(kept, z, temperature=temperature, rest=rest).mean()
        (got,) = torch.autograd.grad(loss, z)
        found[f"{rest}_loss"] = abs(float((loss / exact).detach()) - 1)
        found[f"{rest}_gradient"] = float((got - want).norm() / want.norm())
    return found
