"""The last linear layer and the distillation loss as one operation, forward and backward, on a GPU.

The logits of all tokens are never in memory. A chunk of tokens at a time, the logits go into one
buffer (a product by the vendor's library), one Triton kernel turns them in place into their own
gradient and adds up the loss, and two more products carry that gradient on. The kernel owns a row
of logits and walks it twice, tile by tile: once for the two softmax denominators; once, back to
front, for loss and gradient. What the first walk read last the second reads first, so much of the
row is still in the caches.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmopt_lab.core.device import interpreting, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import check_dtype, jit
from llmopt_lab.core.memory import tiles

prepare_triton()

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)   # exp(x) == exp2(x * LOG2_E), exp2 is one instruction
WIDTH = 8                                   # tokens of a lane: 16 bytes in half precision
CHUNK_BYTES = 256 << 20                     # of the buffers that hold a chunk's logits, at most
FEWEST_ROWS = 256                           # of a chunk: below, the products lose their speed
FEW_CHUNKS = 16                             # whose sum may be rounded to half precision after each


@jit
def _load_logits(row_ptr, token, n_vocab, scale_log2):
    """The logits of some tokens of a row, times log2(e) / T: -inf past its end."""
    z = tl.load(row_ptr + token, token < n_vocab, other=-float("inf"))
    return z.to(tl.float32) * scale_log2


@jit
def _absorb(m, total, z):
    """Fold (LANES, WIDTH) logits into each lane's running maximum and sum of exp2(z - m)."""
    m_new = tl.maximum(m, tl.max(z, axis=1))                            # (LANES,)
    base = tl.where(m_new == -float("inf"), 0.0, m_new)     # nothing yet: -inf - -inf would be NaN
    p = tl.exp2(z - base[:, None])                                      # (LANES, WIDTH)
    return m_new, total * tl.exp2(m - base) + tl.sum(p, axis=1)


@jit
def _lse(m, total):
    """log2 of the sum of exp2 of a whole row, from what each lane has."""
    m_row = tl.max(m, axis=0)
    return m_row + tl.log2(tl.sum(total * tl.exp2(m - m_row), axis=0))


@jit
def _kl_rows_kernel(
    student_ptr,                    # (n_rows, n_vocab) logits; becomes the difference q - p
    teacher_ptr,                    # (n_rows, n_vocab) logits
    mask_ptr,                       # (n_rows,) bool, where MASKED
    loss_ptr,                       # (n_rows,) float32
    student_row, teacher_row,       # strides in elements; a row is contiguous
    n_vocab, scale_log2,            # scale_log2 = log2(e) / T
    MASKED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):
    """One program: KL(teacher || student) of one row, and softmax(student) - softmax(teacher).

    A tile is LANES x WIDTH tokens, and a thread holds whole lanes: maxima and sums stay within
    lanes until the row is through, so no thread waits for another on the way.
    """
    LANES: tl.constexpr = TILE // WIDTH
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row
    teacher_ptr += row * teacher_row
    place = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]     # (LANES, WIDTH)
    if MASKED:  # noqa: SIM102  the compiler decides this one, and the mask the next
        if tl.load(mask_ptr + row) == 0:        # whatever the logits are
            for first in range(0, n_vocab, TILE):
                token = first + place
                zero = tl.zeros((LANES, WIDTH), student_ptr.dtype.element_ty)
                tl.store(student_ptr + token, zero, token < n_vocab)
            tl.store(loss_ptr + row, 0.0)
            return
    n_tiles = tl.cdiv(n_vocab, TILE)

    m_s = tl.full((LANES,), -float("inf"), tl.float32)
    m_t, total_s, total_t = m_s, tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for tile in tl.range(0, n_tiles, num_stages=STAGES):
        token = tile * TILE + place
        z_s = _load_logits(student_ptr, token, n_vocab, scale_log2)     # (LANES, WIDTH)
        z_t = _load_logits(teacher_ptr, token, n_vocab, scale_log2)
        m_s, total_s = _absorb(m_s, total_s, z_s)
        m_t, total_t = _absorb(m_t, total_t, z_t)
    lse_s, lse_t = _lse(m_s, total_s), _lse(m_t, total_t)

    loss = tl.zeros((LANES,), tl.float32)
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        token = (n_tiles - 1 - step) * TILE + place
        log_q = _load_logits(student_ptr, token, n_vocab, scale_log2) - lse_s   # (LANES, WIDTH)
        log_p = _load_logits(teacher_ptr, token, n_vocab, scale_log2) - lse_t
        q, p = tl.exp2(log_q), tl.exp2(log_p)
        loss += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=1)
        tl.store(student_ptr + token, (q - p).to(student_ptr.dtype.element_ty), token < n_vocab)
    tl.store(loss_ptr + row, tl.sum(loss, axis=0) / LOG2_E)


class Tiles(NamedTuple):
    """Tokens of the vocabulary that a program holds at once, its warps, and tiles on the way."""

    tile: int
    n_warps: int
    n_stages: int = 1


def choose_tiles(n_vocab: int) -> Tiles:
    """Of the row kernel, for a vocabulary, in this session."""
    if interpreting():
        return Tiles(16, 4)         # small, so that small examples have several
    return tiles_for(n_vocab)


def tiles_for(n_vocab: int) -> Tiles:
    """On a GPU: 16 numbers a thread."""
    return Tiles(2048, 4) if n_vocab <= 2048 else Tiles(4096, 8)


def kl_rows(
    student: Tensor, teacher: Tensor, loss: Tensor, *,
    temperature: float = 1.0, mask: Tensor | None = None, tiles: Tiles | None = None,
) -> None:
    """Overwrite student logits by softmax(student / T) - softmax(teacher / T), and write the loss.

    Args:
        student, teacher: (n_rows, n_vocab), rows contiguous.
        loss: (n_rows,) float32, becomes KL(teacher || student) of the softened rows in nats.
        mask: (n_rows,) bool; where False, loss and gradient are 0 whatever the logits are.

    Cost: reads both logits twice, writes one; the second read mostly from the caches.
    """
    tile, n_warps, n_stages = tiles or choose_tiles(student.shape[1])
    if len(student) == 0:
        return
    _kl_rows_kernel[(len(student),)](
        student, teacher, student if mask is None else mask, loss,
        student.stride(0), teacher.stride(0), student.shape[1], LOG2_E.value / temperature,
        MASKED=mask is not None, TILE=tile, WIDTH=WIDTH, STAGES=n_stages, num_warps=n_warps,
    )  # fmt: skip


def linear_kl_triton(
    hidden: Tensor, weight: Tensor, teacher: Tensor, *, teacher_weight: Tensor | None = None,
    temperature: float = 1.0, mask: Tensor | None = None, chunk: int | None = None,
) -> Tensor:
    """T^2 * mean KL(softmax(teacher logits / T) || softmax(hidden weight^T / T)). Differentiable.

    The gradients of `hidden` and `weight` are made in the forward pass, chunk by chunk, and only
    multiplied by what comes from above in the backward pass, once.

    Args:
        hidden: (n_tokens, d), the student's input of its output layer.
        weight: (n_vocab, d), that layer.
        teacher: (n_tokens, n_vocab), the teacher's logits; or, with `teacher_weight`, its hidden
            states (n_tokens, d_teacher). No gradient goes there.
        teacher_weight: (n_vocab, d_teacher), the teacher's output layer.
        temperature: T.
        mask: (n_tokens,) bool, True for tokens that count; None: all. The mean is over these.
        chunk: tokens whose logits are in memory at once; None: what CHUNK_BYTES hold.

    Returns:
        A scalar, float32.

    Raises:
        BadInput: shapes, dtypes or devices that do not fit, rows that are not contiguous, a
            temperature that is not positive and finite, bfloat16 under the interpreter.

    Cost: three products of 2 n_tokens d n_vocab operations, a fourth for the teacher's hidden
    states. Extra memory: a chunk's logits (twice with `teacher_weight`), and the two gradients.
    Each product sums in float32. The weight's gradient is summed over at most FEW_CHUNKS chunks in
    the weight's dtype, over more in float32: that takes 4 bytes a weight, and a chunk's own.
    Source: the chunks are those of Hsu et al. 2024, Liger Kernel (https://arxiv.org/abs/2410.10989);
    the loss that of Hinton et al. 2015.
    """
    _check(hidden, weight, teacher, teacher_weight, temperature, mask, chunk)
    teachers = [x if x is None else x.detach() for x in (teacher, teacher_weight)]
    return LinearKL.apply(hidden, weight, *teachers, temperature, mask, chunk)


class LinearKL(torch.autograd.Function):
    """`linear_kl_triton` with its gradients, which exist when the forward pass is done."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher, teacher_weight, temperature, mask, chunk):
        rows, d_hidden, d_weight = loss_and_sums(
            hidden, weight, teacher, teacher_weight, temperature=temperature, mask=mask,
            chunk=chunk, wanted=ctx.needs_input_grad[:2],
        )  # fmt: skip
        n = rows.new_tensor(len(rows)) if mask is None else mask.sum().clamp_min(1)
        ctx.sums, ctx.factor, ctx.dtype = (d_hidden, d_weight), temperature / n, hidden.dtype
        return temperature**2 * rows.sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        require(
            ctx.sums is not None,
            "linear_kl_triton scales its gradients in place, so it goes backward once: call it "
            "again for another backward pass",
        )
        (d_hidden, d_weight), ctx.sums = ctx.sums, None
        factor = d_loss * ctx.factor
        d_hidden, d_weight = (
            None if gradient is None else gradient.mul_(factor).to(ctx.dtype)
            for gradient in (d_hidden, d_weight)
        )
        return d_hidden, d_weight, None, None, None, None, None


def loss_and_sums(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor | None = None, *,
    temperature: float = 1.0, mask: Tensor | None = None, chunk: int | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """KL of each token, (n_tokens,) float32, and the sums (q - p) weight and (q - p)^T hidden.

    Not yet divided by the number of tokens: in half precision small numbers would be lost.
    """
    n_tokens, n_vocab = len(hidden), len(weight)
    chunk = chunk or choose_chunk(n_tokens, n_vocab, weight.itemsize, teacher_weight is not None)
    loss = torch.empty(n_tokens, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    few = n_tokens <= FEW_CHUNKS * chunk
    d_weight = torch.empty_like(weight) if wanted[1] else None
    buffers = [
        weight.new_empty(min(chunk, n_tokens), n_vocab)
        for _ in range(1 if teacher_weight is None else 2)
    ]
    for rows in tiles(n_tokens, chunk):
        n = rows.stop - rows.start
        z_s = torch.mm(hidden[rows], weight.T, out=buffers[0][:n])      # (n, n_vocab)
        if teacher_weight is None:
            z_t = teacher[rows]
        else:
            z_t = torch.mm(teacher[rows], teacher_weight.T, out=buffers[1][:n])
        kl_rows(
            z_s, z_t, loss[rows], temperature=temperature, mask=None if mask is None else mask[rows]
        )
        difference = z_s                                                # (n, n_vocab) q - p
        if d_hidden is not None:
            torch.mm(difference, weight, out=d_hidden[rows])
        if d_weight is not None and few:
            d_weight.addmm_(difference.T, hidden[rows], beta=float(rows.start > 0))
        elif d_weight is not None:
            part = difference.T @ hidden[rows]
            d_weight = part.float() if rows.start == 0 else d_weight.add_(part)
    return loss, d_hidden, d_weight


def choose_chunk(n_tokens: int, n_vocab: int, itemsize: int, with_teacher: bool) -> int:
    """Tokens of a chunk: equal chunks, as few as CHUNK_BYTES allow."""
    fit = CHUNK_BYTES // (n_vocab * itemsize * (2 if with_teacher else 1))
    n_chunks = triton.cdiv(n_tokens, max(fit, FEWEST_ROWS))
    return triton.cdiv(triton.cdiv(n_tokens, n_chunks), 128) * 128      # whole tiles of a product


def _check(hidden, weight, teacher, teacher_weight, temperature, mask, chunk) -> None:
    """Refuse bad input before any work."""
    require(
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        "hidden must be (n_tokens, d) and weight (n_vocab, d); "
        f"got {tuple(hidden.shape)} and {tuple(weight.shape)}. A batch is hidden.flatten(0, 1).",
    )
    require(
        hidden.numel() > 0 and weight.numel() > 0,
        f"hidden and weight must not be empty; got {tuple(hidden.shape)} and {tuple(weight.shape)}",
    )
    n_tokens, n_vocab = len(hidden), len(weight)
    if teacher_weight is None:
        require(
            tuple(teacher.shape) == (n_tokens, n_vocab),
            f"teacher must be logits of shape {(n_tokens, n_vocab)}; got {tuple(teacher.shape)}. "
            "Hidden states need teacher_weight=.",
        )
    else:
        require(
            teacher.dim() == 2 and len(teacher) == n_tokens
            and tuple(teacher_weight.shape) == (n_vocab, teacher.shape[1]),
            f"teacher must be ({n_tokens}, d_teacher) and teacher_weight ({n_vocab}, d_teacher), "
            f"one vocabulary for both models; got {tuple(teacher.shape)} and "
            f"{tuple(teacher_weight.shape)}",
        )
    check_dtype(hidden.dtype, hidden)
    given = {"weight": weight, "teacher": teacher, "teacher_weight": teacher_weight}
    for name, x in given.items():
        if x is None:
            continue
        same = x.dtype == hidden.dtype or (name == "teacher" and teacher_weight is None)
        require(
            same and x.is_floating_point() and x.device == hidden.device,
            f"{name} must be {hidden.dtype} on {hidden.device} like hidden; "
            f"got {x.dtype} on {x.device}",
        )
    if teacher_weight is None:
        require(
            teacher.stride(1) == 1,
            f"a row of the teacher's logits must be contiguous; got strides {teacher.stride()}: "
            "call .contiguous()",
        )
    require(
        mask is None or (mask.dtype == torch.bool and mask.shape == (n_tokens,)
                         and mask.device == hidden.device and mask.is_contiguous()),
        f"mask must be bool of shape {(n_tokens,)} on {hidden.device}; "
        f"got {None if mask is None else (mask.dtype, tuple(mask.shape), mask.device)}",
    )
    require(
        0 < temperature < math.inf,
        f"temperature must be a positive finite number; got {temperature}",
    )
    require(chunk is None or chunk > 0, f"chunk must be positive, or None; got {chunk}")
    if teacher.dtype == torch.bfloat16:
        check_dtype(teacher.dtype, teacher)
