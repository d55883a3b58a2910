"""The output layer and the distillation loss together, as the kernel has them, in plain PyTorch.

The logits of all tokens are n_tokens x n_vocab numbers, far more than everything else of a step.
Here a chunk of tokens has its logits in a buffer, which becomes their gradient and is used again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.distillation.records import RowsDone
from llmopt_lab.distillation.reference import check_temperature


def linear_kl(
    hidden: Tensor, weight: Tensor, teacher: Tensor, *, temperature: float = 1.0,
    mask: Tensor | None = None, chunk: int = 64, tile: int = 64,
) -> Tensor:
    """T^2 * mean KL(softmax(teacher / T) || softmax(hidden weight^T / T)). Differentiable.

    `kernels.linear_kl_triton` step by step, and the same gradients: they are complete when the
    forward pass is.

    Args:
        hidden: (n_tokens, d).
        weight: (n_vocab, d).
        teacher: (n_tokens, n_vocab) logits; no gradient goes there.
        temperature: T.
        mask: (n_tokens,) bool, True for tokens that count; None: all.
        chunk: tokens whose logits are in memory at once.
        tile: tokens of the vocabulary that are on chip at once.

    Returns:
        A scalar, the dtype of `hidden`.

    Raises:
        BadInput: shapes or dtypes that do not fit, no token that counts, a temperature, chunk or
            tile that is not positive.

    Memory traffic: `linear_kl_traffic`. Extra memory: chunk * n_vocab numbers and the gradients.
    """
    check_linear(hidden, weight, teacher, mask)
    check_temperature(temperature)
    require(chunk > 0 and tile > 0, f"chunk and tile must be positive; got {chunk} and {tile}")
    counts = hidden.new_ones(len(hidden), dtype=torch.bool) if mask is None else mask
    return LinearKL.apply(hidden, weight, teacher.detach(), temperature, counts, chunk, tile)


class LinearKL(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher, temperature, counts, chunk, tile):
        every = slice(0, len(weight))
        loss = hidden.new_empty(len(hidden))
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))     # (chunk, n_vocab)
        n = int(counts.sum())
        for rows in tiles(len(hidden), chunk):
            part = slice(0, rows.stop - rows.start)     # of the buffer
            logits = load("hidden", hidden, rows) @ load("weight", weight, every).T
            store("logits", buffer, part, logits)
            kl_rows(buffer[part], teacher, loss, rows, counts[rows], temperature, tile)
            difference = load("logits", buffer, part)                       # (chunk, n_vocab) q - p
            factor = temperature / n
            store("d_hidden", d_hidden, rows, factor * difference @ load("weight", weight, every))
            more = factor * difference.T @ load("hidden", hidden, rows)     # (n_vocab, d)
            if rows.start > 0:
                more = load("d_weight", d_weight, every) + more
            store("d_weight", d_weight, every, more)
        ctx.save_for_backward(d_hidden, d_weight)
        return temperature**2 * loss.sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_loss * d_hidden, d_loss * d_weight, None, None, None, None, None


def kl_rows(
    logits: Tensor, teacher: Tensor, loss: Tensor, rows: slice, counts: Tensor,
    temperature: float, tile: int,
) -> None:
    """Overwrite the logits of a chunk (chunk, n_vocab) by q - p, and write the loss of its rows."""
    n_vocab = logits.shape[1]
    lse_q = lse_p = logits.new_full((len(logits),), -torch.inf)             # (chunk,)
    for cols in tiles(n_vocab, tile):
        z_q = load("logits", logits, (slice(None), cols)) / temperature     # (chunk, tile)
        z_p = load("teacher", teacher, (rows, cols)) / temperature
        lse_q = torch.logaddexp(lse_q, z_q.logsumexp(1))
        lse_p = torch.logaddexp(lse_p, z_p.logsumexp(1))

    kl = logits.new_zeros(len(logits))                                      # (chunk,)
    for cols in reversed(list(tiles(n_vocab, tile))):   # what was read last is still near
        log_q = load("logits", logits, (slice(None), cols)) / temperature - lse_q[:, None]
        log_p = load("teacher", teacher, (rows, cols)) / temperature - lse_p[:, None]
        q, p = log_q.exp(), log_p.exp()
        kl = kl + (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)
        store("logits", logits, (slice(None), cols), (q - p).masked_fill(~counts[:, None], 0))
    store("loss", loss, rows, kl.masked_fill(~counts, 0))
    record(RowsDone(rows, loss[rows], lse_q, lse_p))


def linear_kl_traffic(n_tokens: int, d: int, n_vocab: int, chunk: int) -> tuple[int, int]:
    """Elements that `linear_kl` reads and writes, products included: (read, written).

    The logits of a chunk are written once and read three times: twice for the loss, whose second
    walk overwrites them by their gradient, and once for the two products behind it. The weight is
    read twice a chunk, and its gradient written once a chunk and read before each but the first.
    """
    n_chunks = ceil_div(n_tokens, chunk)
    logits = n_tokens * n_vocab
    weight = n_vocab * d
    read = 2 * n_tokens * d + 3 * logits + 2 * logits   # hidden, student's and teacher's logits
    read += n_chunks * 2 * weight + (n_chunks - 1) * weight
    written = 2 * logits + n_tokens * d + n_chunks * weight + n_tokens
    return read, written


def check_linear(hidden: Tensor, weight: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Refuse bad input before any work."""
    require(
        hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        "hidden must be (n_tokens, d) and weight (n_vocab, d); "
        f"got {tuple(hidden.shape)} and {tuple(weight.shape)}. A batch is hidden.flatten(0, 1).",
    )
    shape = (len(hidden), len(weight))
    require(
        tuple(teacher.shape) == shape,
        f"teacher must be logits of shape {shape}; got {tuple(teacher.shape)}",
    )
    require(
        min(hidden.numel(), weight.numel()) > 0,
        f"nothing may be empty; got {tuple(hidden.shape)} and {tuple(weight.shape)}",
    )
    require(
        hidden.is_floating_point() and hidden.dtype == weight.dtype == teacher.dtype,
        f"all must share a floating dtype; got {hidden.dtype}, {weight.dtype} and {teacher.dtype}",
    )
    require(
        mask is None or (mask.dtype == torch.bool and tuple(mask.shape) == shape[:1]),
        f"mask must be bool of shape {shape[:1]}; "
        f"got {None if mask is None else (mask.dtype, tuple(mask.shape))}",
    )
    require(mask is None or bool(mask.any()), "mask leaves no token that counts")
