"""Wrong and right attempts at chapter 6's exercises. Each wrong one is a mistake people make."""

import math

import torch
import torch.nn.functional as F

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.memory import tiles
from llmopt_lab.distillation.trials import bytes_held, one_step

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

INF = torch.inf


def logs(z, t=1.0):
    return torch.log_softmax(z / t, dim=-1)


def kl_of(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# 1. soft_loss


def softening(
    rows=kl_of,
    mean=torch.mean,
    teacher=lambda z, t: logs(z, t),
    student=lambda z, t: logs(z, t),
    factor=lambda t: t**2,
):
    """An attempt: how it makes logarithms, rows, their mean and T^2. As it stands, it is right."""

    def soft_loss(student_logits, teacher_logits, temperature):
        log_p, log_q = teacher(teacher_logits, temperature), student(student_logits, temperature)
        return factor(temperature) * mean(rows(log_p, log_q))

    return soft_loss


def with_kl_div(reduction="batchmean", flat=False):
    def soft_loss(student_logits, teacher_logits, temperature):
        if flat:
            student_logits = student_logits.flatten(0, -2)
            teacher_logits = teacher_logits.flatten(0, -2)
        q = F.log_softmax(student_logits / temperature, dim=-1)
        p = F.softmax(teacher_logits / temperature, dim=-1)
        if reduction == "mean":  # torch warns of its own mean
            return F.kl_div(q, p, reduction="none").mean() * temperature**2
        return F.kl_div(q, p, reduction=reduction) * temperature**2

    return soft_loss


def log_of_softmax(z, t):
    return torch.softmax(z / t, dim=-1).log()


# 2. task_loss


def predicting(
    rows=lambda z: z[:, :-1],
    labels=lambda x: x[:, 1:],
    loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
):
    def task_loss(logits, tokens):
        return loss(rows(logits), labels(tokens))

    return task_loss


def loops_over_rows(logits, tokens):
    """Right: row by row."""
    total, n = 0.0, 0
    for z, x in zip(logits, tokens.tolist(), strict=True):
        for i, label in enumerate(x[1:]):
            total = total + torch.logsumexp(z[i], 0) - z[i, label]
            n += 1
    tokens.zero_()  # a check's inputs are its own
    return total / n


# 3. logit_gradient


def deriving(
    gap=lambda p, q: q - p,
    rows=lambda p: p.shape[:-1].numel(),
    factor=lambda t: t,
):
    def logit_gradient(p, q, temperature):
        return factor(temperature) * gap(p, q) / rows(p)

    return logit_gradient


def derives_in_place(p, q, temperature):
    """Right: the same, written over its arguments."""
    return q.sub_(p).mul_(temperature).div_(p[..., 0].numel())


def derives_by_autograd(p, q, temperature):
    """Right: T log q are logits that have q for their softened softmax."""
    z = (temperature * q.log()).requires_grad_()
    loss = softening()(z, temperature * p.log(), temperature)
    return torch.autograd.grad(loss, z)[0]


# 4. measured_power


def measuring(
    loss=lambda s, t, temperature: kl_of(logs(t, temperature), logs(s, temperature)).mean(),
    size=torch.norm,
    power=lambda low, high, ratio: math.log(low / high) / math.log(ratio),
    of=lambda z, temperature: z,
):
    def measured_power(student_logits, teacher_logits, low, high):
        sizes = []
        for temperature in (low, high):
            z = student_logits.clone().requires_grad_()
            wanted = of(z, temperature)
            (gradient,) = torch.autograd.grad(loss(wanted, teacher_logits, temperature), wanted)
            sizes.append(float(size(gradient)))
        return power(*sizes, high / low)

    return measured_power


def measures_the_loss(student_logits, teacher_logits, low, high):
    at = [
        float(kl_of(logs(teacher_logits, t), logs(student_logits, t)).mean()) for t in (low, high)
    ]
    return math.log(at[0] / at[1]) / math.log(high / low)


def measures_the_softened(student_logits, teacher_logits, low, high):
    sizes = []
    for t in (low, high):
        z = (student_logits / t).requires_grad_()
        kl_of(logs(teacher_logits, t), logs(z)).mean().backward()
        sizes.append(z.grad.norm())
    return torch.log(sizes[0] / sizes[1]) / math.log(high / low)


def measures_in_closed_form(student_logits, teacher_logits, low, high):
    def size(t):
        gap = (student_logits / t).softmax(-1) - (teacher_logits / t).softmax(-1)
        return gap.square().sum().sqrt() / t

    return torch.log(size(high) / size(low)) / -math.log(high / low)


# 5. rows_that_count


def counting(begin=lambda at, start, stop, tokens: start <= at, end=lambda at, stop: at < stop):
    def rows_that_count(tokens, n_prompt, n_text):
        at = torch.arange(1, tokens.shape[1])[None]
        return begin(at, n_prompt[:, None], n_text[:, None], tokens) & end(at, n_text[:, None])

    return rows_that_count


def by_the_padding(also_prompt):
    def rows_that_count(tokens, n_prompt, n_text):
        at = torch.arange(1, tokens.shape[1])[None]
        inside = tokens[:, 1:] != 0
        if also_prompt:
            return inside & (at >= n_prompt[:, None]) & (at < n_text[:, None])
        return inside & (at < n_text[:, None])

    return rows_that_count


def for_all_alike(tokens, n_prompt, n_text):
    at = torch.arange(1, tokens.shape[1])
    return ((at >= n_prompt.max()) & (at < n_text.max())).expand(len(tokens), -1)


def full_width(tokens, n_prompt, n_text):
    at = torch.arange(tokens.shape[1])
    return (at >= n_prompt[:, None]) & (at < n_text[:, None])


def fills_slices(tokens, n_prompt, n_text):
    """Right: one text at a time."""
    mask = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
    for row, first, last in zip(mask, n_prompt.tolist(), n_text.tolist(), strict=True):
        row[first - 1 : last - 1] = True
    tokens.zero_()
    return mask


# 6. distillation_loss


def mixing(wrong=""):
    """An attempt, with the mistake called `wrong`; right without."""

    def distillation_loss(student_logits, teacher_logits, labels, mask, temperature, soft_weight):
        if wrong != "teacher trains":
            teacher_logits = teacher_logits.detach()
        soft_mask = torch.ones_like(mask) if wrong in ("no mask", "no soft mask") else mask
        hard_mask = torch.ones_like(mask) if wrong in ("no mask", "no hard mask") else mask
        if wrong == "others":
            soft_mask = hard_mask = ~mask
        log_p = logs(teacher_logits, temperature)
        log_q = logs(student_logits.detach() if wrong == "no soft" else student_logits, temperature)
        rows = kl_of(log_q, log_p) if wrong == "reverse" else kl_of(log_p, log_q)
        if wrong == "entropy":
            rows = -(log_p.exp() * log_q).sum(-1)
        z = student_logits.detach() if wrong == "no hard" else student_logits
        z = z / temperature if wrong == "soft labels" else z
        hard_rows = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
        hard_rows = hard_rows.view(labels.shape)
        if wrong == "times mask":
            soft = (rows * mask).sum() / mask.sum()
            hard = (hard_rows * mask).sum() / mask.sum()
        elif wrong == "texts":
            soft, hard = (
                (torch.where(mask, x, 0).sum(1) / mask.sum(1)).mean() for x in (rows, hard_rows)
            )
        else:
            soft, hard = rows[soft_mask].mean(), hard_rows[hard_mask].mean()
        if wrong == "all rows":
            soft, hard = (x * mask.sum() / mask.numel() for x in (soft, hard))
        if wrong == "batch":
            soft = soft * mask.sum() / len(mask)
        if wrong == "vocabulary":
            soft = soft / student_logits.shape[-1]
        power = {"no t": 0, "t": 1}.get(wrong, 2)
        rest = {"rest": 1.0, "soft alone": 0.0}.get(wrong, 1 - soft_weight)
        if wrong == "swap":
            soft_weight, rest = rest, soft_weight
        if wrong == "t twice":
            hard = hard * temperature**2
        loss = soft_weight * temperature**power * soft + rest * hard
        return loss.item() if wrong == "item" else loss.detach() if wrong == "detach" else loss

    return distillation_loss


def picks_rows(student_logits, teacher_logits, labels, mask, temperature, soft_weight):
    """Right: the rows that count, and torch's own losses."""
    s, t = student_logits[mask], teacher_logits[mask].detach()
    soft = F.kl_div(
        logs(s, temperature), logs(t, temperature), reduction="batchmean", log_target=True
    )
    hard = F.nll_loss(logs(s), labels[mask])
    labels.zero_()
    return torch.lerp(hard, temperature**2 * soft, soft_weight)


def with_where(student_logits, teacher_logits, labels, mask, temperature, soft_weight):
    """Right: means over rows that are blanked."""
    n, blank = mask.sum(), ~mask[..., None]
    s, t = (z.masked_fill(blank, 0.0) for z in (student_logits, teacher_logits.detach()))
    soft = torch.where(mask, kl_of(logs(t, temperature), logs(s, temperature)), 0).sum() / n
    picked = logs(s).gather(-1, labels.where(mask, 0)[..., None])[..., 0]
    hard = -torch.where(mask, picked, 0).sum() / n
    return soft_weight * temperature**2 * soft + (1 - soft_weight) * hard


def looks_up_every_label(student_logits, teacher_logits, labels, mask, temperature, soft_weight):
    picked = logs(student_logits).gather(-1, labels[..., None])[..., 0]
    rows = kl_of(logs(teacher_logits.detach(), temperature), logs(student_logits, temperature))
    hard, soft = -picked[mask].mean(), rows[mask].mean()
    return soft_weight * temperature**2 * soft + (1 - soft_weight) * hard


# 7. train_step


def stepping(wrong=""):
    def train_step(student, teacher, tokens, optimizer, temperature):
        if wrong != "no eval":
            teacher.eval()
        if wrong != "as it came":
            student.train()
        if wrong == "for good":
            torch.set_grad_enabled(False)
            target = teacher(tokens)
            return 0.0
        if wrong in ("detach", "trains"):
            target = teacher(tokens).detach()
        else:
            with torch.no_grad():
                target = teacher(tokens)
        if wrong == "asks twice":
            with torch.no_grad():
                target = (target + teacher(tokens)) / 2
        if wrong == "student without":
            with torch.no_grad():
                logits = student(tokens)
            return softening()(logits, target, temperature).item()
        loss = softening()(student(tokens), target, temperature)
        if wrong == "batch":
            loss = with_kl_div()(student(tokens), target, temperature)
        if wrong == "batchmean":
            loss = loss * tokens.shape[1]
        if wrong == "no t":
            loss = loss / temperature**2
        if wrong != "keeps":
            optimizer.zero_grad()
        if wrong == "early step":
            for weight in student.parameters():
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            return loss.item()
        (-loss if wrong == "climbs" else loss).backward()
        if wrong == "late zero":
            optimizer.zero_grad()
        if wrong != "no step":
            optimizer.step()
        if wrong == "twice":
            optimizer.step()
        if wrong == "teacher moves":
            with torch.no_grad():
                for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.lerp_(other, 0.1)
        return loss if wrong == "graph" else None if wrong == "none" else loss.item()

    return train_step


def steps_with_a_frozen_teacher(student, teacher, tokens, optimizer, temperature):
    """Right: a frozen teacher keeps no graph, with gradients on or off."""
    teacher.requires_grad_(False).train(False)
    optimizer.zero_grad(set_to_none=False)
    loss = softening()(student.train()(tokens), teacher(tokens), temperature)
    loss.backward()
    optimizer.step()
    return loss.detach()


# 8. both_ways


def comparing(
    kl=lambda a, b: torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(-1),
    pair=lambda forward, reverse: (forward, reverse),
):
    def both_ways(p, q):
        wide = p.expand_as(q)
        return pair(kl(wide, q), kl(q, wide))

    return both_ways


def compares_with_xlogy(p, q):
    """Right: torch.xlogy knows that 0 log 0 is 0."""
    found = []
    for a, b in ((p.expand_as(q), q), (q, p.expand_as(q))):
        ratio = torch.where((a > 0) & (b > 0), a / b, torch.where(a > 0, INF, 1.0))
        found.append(torch.xlogy(a, ratio).sum(-1))
    p.zero_()
    return found


# 9. top_k


def storing(
    rows=lambda z: torch.log_softmax(z, -1),
    pick=lambda x, k: x.topk(k),
    value=lambda x: x.half(),
    number=lambda tokens, n: tokens.to(torch.int16 if n <= 32768 else torch.int32),
):
    def store_top_k(teacher_logits, k):
        log_p, tokens = pick(rows(teacher_logits), k)
        return value(log_p), number(tokens, teacher_logits.shape[-1])

    return store_top_k


def renormalising(x):
    log_p, tokens = x
    return log_p.log_softmax(-1), tokens


def stores_sorted_by_number(teacher_logits, k):
    """Right: a softmax of its own, and in the order of the tokens."""
    log_p = teacher_logits - teacher_logits.logsumexp(-1, keepdim=True)
    tokens = log_p.argsort(-1, descending=True)[:, :k].sort(-1).values
    small = torch.int32 if tokens.new_tensor(teacher_logits.shape[-1]) > 2**15 else torch.int16
    return torch.take_along_dim(log_p, tokens, -1).half(), tokens.to(small)


def restoring(wrong=""):
    def loss_from_store(log_p, tokens, student_logits):
        log_q = torch.log_softmax(student_logits, -1)
        log_q_all, log_q = log_q, log_q.gather(-1, tokens.long())
        half = log_p
        log_p = log_p.float()
        if wrong == "renormalises":
            return kl_of(log_p.log_softmax(-1), log_q)
        if wrong == "both":
            return kl_of(log_p.log_softmax(-1), log_q.log_softmax(-1))
        few = kl_of(log_p, log_q)
        if wrong == "half":
            few = (half.exp() * (log_p - log_q)).sum(-1)
        rest_p = 1 - (half if wrong == "half" else log_p).exp().sum(-1)
        rest_q = 1 - log_q.exp().sum(-1)
        if wrong == "unclamped":
            return few + rest_p * (rest_p.log() - rest_q.log())
        rest_p = rest_p.clamp_min(0)
        if wrong == "few":
            return few
        if wrong == "itself":
            return few + rest_p
        if wrong == "spread":
            n = student_logits.shape[-1] - tokens.shape[-1]
            even = (rest_p / n)[:, None]
            others = torch.ones_like(log_q_all).scatter(-1, tokens.long(), 0)
            return few + (others * torch.xlogy(even, even / log_q_all.exp())).sum(-1)
        if wrong == "student's":
            return few + rest_q * (rest_q / rest_p).log()
        if wrong == "reverse":
            return kl_of(log_q, log_p) + rest_q * (rest_q / rest_p).log()
        kl = few + torch.xlogy(rest_p.float(), rest_p.float() / rest_q)
        return kl.mean() if wrong == "mean" else kl

    return loss_from_store


def restores_with_one_more_token(log_p, tokens, student_logits):
    """Right: the rest is appended, in float64."""
    q = student_logits.double().softmax(-1)
    q = q.gather(-1, tokens.to(torch.int64))
    p = log_p.double().exp()
    p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp_min(0)], -1) for x in (p, q))
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


def gathers_small_integers(log_p, tokens, student_logits):
    return kl_of(log_p.float(), student_logits.log_softmax(-1).gather(-1, tokens))


# 11. chunked_kl


def chunking(wrong=""):
    def chunked_kl(hidden, weight, teacher_hidden, teacher_weight, chunk):
        n = len(hidden)
        loss, d_hidden, d_weight = 0.0, torch.zeros_like(hidden), torch.zeros_like(weight)
        todo = list(tiles(n, chunk))
        if wrong == "drops":
            todo = [rows for rows in todo if rows.stop - rows.start == chunk] or todo
        size = n
        for rows in todo:
            log_q = logs(hidden[rows] @ weight.T)
            log_p = logs(teacher_hidden[rows] @ teacher_weight.T)
            part = kl_of(log_q, log_p) if wrong == "reverse" else kl_of(log_p, log_q)
            p = log_p.exp()
            if wrong == "hard":
                p = F.one_hot(p.argmax(-1), p.shape[1]).to(p)
            difference = log_q.exp() - p
            if wrong == "uphill":
                difference = -difference
            if wrong == "average":
                size = (rows.stop - rows.start) * len(todo)
            if wrong == "means":
                size = rows.stop - rows.start
            if wrong == "sum":
                size = 1
            of_gradient = {"no mean": 1, "chunk": rows.stop - rows.start}.get(wrong, size)
            down, into = weight, hidden
            if wrong == "teacher":
                down, into = teacher_weight, teacher_hidden
            if wrong == "teacher":
                d_hidden = torch.zeros_like(teacher_hidden) if rows.start == 0 else d_hidden
                d_weight = torch.zeros_like(teacher_weight) if rows.start == 0 else d_weight
            d_hidden[rows] = difference @ down / of_gradient
            more = difference.T @ into[rows] / of_gradient
            if wrong == "last":
                loss, d_weight = part.sum() / size, more
            else:
                loss, d_weight = loss + part.sum() / size, d_weight + more
        return loss, d_hidden, d_weight

    return chunked_kl


def all_at_once(hidden, weight, teacher_hidden, teacher_weight, chunk):
    return chunking()(hidden, weight, teacher_hidden, teacher_weight, len(hidden))


def with_autograd_at_once(hidden, weight, teacher_hidden, teacher_weight, chunk):
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    losses = []
    for rows in tiles(len(h), chunk):
        log_p = logs(teacher_hidden[rows] @ teacher_weight.T)
        losses.append(kl_of(log_p, logs(h[rows] @ w.T)).sum())
    loss = sum(losses) / len(h)
    return loss, *torch.autograd.grad(loss, (h, w))


def autograd_a_chunk(hidden, weight, teacher_hidden, teacher_weight, chunk):
    """Right: autograd, but once a chunk."""
    loss, d_weight, d_hidden = 0.0, torch.zeros_like(weight), []
    for h, t in zip(hidden.split(chunk), teacher_hidden.split(chunk), strict=True):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        part = kl_of(logs(t @ teacher_weight.T), logs(h @ w.T)).sum() / len(hidden)
        part.backward()
        loss += part.item()
        d_hidden.append(h.grad)
        d_weight += w.grad
    return torch.tensor(loss, dtype=hidden.dtype), torch.cat(d_hidden), d_weight


# 12. kl_kernel


@triton.jit
def row_kl(
    student_ptr, teacher_ptr, mask_ptr, kl_ptr, n_vocab, temperature,
    TILE: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student_row = student_ptr + row * n_vocab
    teacher_row = teacher_ptr + row * n_vocab
    if WRONG == "row 0":
        student_row = student_ptr
        teacher_row = teacher_ptr
    other = -float("inf")
    if WRONG == "padding":
        other = 0.0
    end = n_vocab
    if WRONG == "drop":
        end = n_vocab // TILE * TILE
    if WRONG == "first":
        end = TILE
    m_s = -float("inf")
    m_t = -float("inf")
    total_s = 0.0
    total_t = 0.0
    gap = 0.0
    for first in range(0, end, TILE):
        col = first + tl.arange(0, TILE)
        z_s = tl.load(student_row + col, col < n_vocab, other=other)
        z_t = tl.load(teacher_row + col, col < n_vocab, other=other)
        if WRONG == "invert":
            z_s = z_s * temperature
            z_t = z_t * temperature
        elif WRONG != "cold":
            z_s = z_s / temperature
            z_t = z_t / temperature
        if WRONG == "reverse":
            z_s, z_t = z_t, z_s
        new_s = tl.maximum(m_s, tl.max(z_s))
        new_t = tl.maximum(m_t, tl.max(z_t))
        if WRONG == "overflow":
            new_s = 0.0
            new_t = 0.0
        base = tl.where(new_t == -float("inf"), 0.0, new_t)
        if WRONG == "tile":
            base = new_t
        shrink_s = tl.exp(m_s - new_s)
        shrink_t = tl.exp(m_t - base)
        e = tl.exp(z_t - base)
        more = tl.sum(tl.where(e > 0, e * (z_t - z_s), 0.0))
        if WRONG == "zero":
            more = tl.sum(tl.where(col < n_vocab, e * (z_t - z_s), 0.0))
        if WRONG == "last":
            total_s = 0.0
            total_t = 0.0
            gap = 0.0
        if WRONG == "student":
            shrink_s = 1.0
        total_s = total_s * shrink_s + tl.sum(tl.exp(z_s - new_s))
        if WRONG == "total":
            total_t = total_t + tl.sum(e)
        else:
            total_t = total_t * shrink_t + tl.sum(e)
        if WRONG == "gap":
            gap = gap + more
        else:
            gap = gap * shrink_t + more
        m_s = new_s
        m_t = new_t
    lse_s = m_s + tl.log(total_s)
    lse_t = m_t + tl.log(total_t)
    kl = gap / total_t - lse_t + lse_s
    if WRONG == "no denominators":
        kl = gap / total_t
    if WRONG == "undivided":
        kl = gap - lse_t + lse_s
    if WRONG == "swapped":
        kl = gap / total_t + lse_t - lse_s
    if WRONG == "no maxima":
        kl = gap / total_t - tl.log(total_t) + tl.log(total_s)
    if WRONG == "bits":
        kl = gap / total_t - (m_t + tl.log2(total_t)) + (m_s + tl.log2(total_s))
    if WRONG == "cross":
        kl = 0.0
        for first in range(0, n_vocab, TILE):
            col = first + tl.arange(0, TILE)
            z_s = tl.load(student_row + col, col < n_vocab, other=0.0) / temperature
            z_t = tl.load(teacher_row + col, col < n_vocab, other=-float("inf")) / temperature
            kl += tl.sum(tl.exp(z_t - lse_t) * (lse_s - z_s))
    if WRONG == "square":
        kl = kl * temperature * temperature
    counts = tl.load(mask_ptr + row) != 0
    if WRONG == "times":
        kl = kl * counts.to(tl.float32)
    elif WRONG == "others":
        kl = tl.where(counts, 0.0, kl)
    elif WRONG != "ignored" and WRONG != "skips":
        kl = tl.where(counts, kl, 0.0)
    if WRONG == "skips":
        tl.store(kl_ptr + row, kl, counts)
    elif WRONG == "all rows":
        tl.store(kl_ptr + row + tl.arange(0, TILE), kl)
    elif WRONG != "nothing":
        tl.store(kl_ptr + row, kl)


@triton.jit
def two_passes(
    student_ptr, teacher_ptr, mask_ptr, kl_ptr, n_vocab, temperature, TILE: tl.constexpr
):  # fmt: skip
    """Right: one tile as wide as the row, the probabilities themselves, and an early return."""
    row = tl.program_id(0)
    if tl.load(mask_ptr + row) == 0:
        tl.store(kl_ptr + row, 0.0)
        return
    col = tl.arange(0, 64)
    ok = col < n_vocab
    z_s = tl.load(student_ptr + row * n_vocab + col, ok, other=-float("inf")) / temperature
    z_t = tl.load(teacher_ptr + row * n_vocab + col, ok, other=-float("inf")) / temperature
    z_s -= tl.max(z_s, axis=0)
    z_t -= tl.max(z_t, axis=0)
    log_q = z_s - tl.log(tl.sum(tl.exp(z_s), axis=0))
    log_p = z_t - tl.log(tl.sum(tl.exp(z_t), axis=0))
    p = tl.exp(log_p)
    tl.store(kl_ptr + row, tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=0))


@triton.jit
def raises_in_the_kernel(
    student_ptr, teacher_ptr, mask_ptr, kl_ptr, n_vocab, temperature, TILE: tl.constexpr
):  # fmt: skip
    tl.store(kl_ptr, no_such_name)  # noqa: F821


class RowKL:
    """`row_kl` with one mistake, launched like any kernel."""

    fn = row_kl.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: row_kl[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "distillation.soft_loss": [
        (with_kl_div(), "divides-by-the-batch"),
        (with_kl_div("mean"), "divides-by-the-vocabulary"),
        (with_kl_div("sum"), "adds-up-all-rows"),
        (softening(factor=lambda t: 1), "forgets-t-squared"),
        (softening(factor=lambda t: t), "multiplies-by-t"),
        (softening(rows=lambda p, q: kl_of(q, p)), "turns-the-divergence-over"),
        (softening(student=lambda z, t: logs(z)), "softens-the-teacher-alone"),
        (softening(teacher=lambda z, t: logs(z)), "softens-the-student-alone"),
        (
            softening(teacher=lambda z, t: logs(z * t), student=lambda z, t: logs(z * t)),
            "multiplies-the-logits",
        ),
        (softening(rows=lambda p, q: -(p.exp() * q).sum(-1)), "forgets-the-teachers-entropy"),
        (
            softening(rows=lambda p, q: (p.exp() * (p - q.exp())).sum(-1)),
            "gives-probabilities-for-logarithms",
        ),
        (softening(student=log_of_softmax), "takes-the-log-of-a-softmax"),
        (softening(rows=lambda p, q: -kl_of(p, q)), "wrong-sign"),
        (softening(mean=lambda x: x), "not-a-scalar"),
        (softening(mean=lambda x: x.detach().mean()), "cuts-the-gradient"),
    ],
    "distillation.task_loss": [
        (predicting(rows=lambda z: z, labels=lambda x: x), "predicts-itself"),
        (
            predicting(rows=lambda z: z[:, 1:], labels=lambda x: x[:, :-1]),
            "predicts-the-token-before",
        ),
        (
            predicting(rows=lambda z: z, labels=lambda x: x, loss=F.cross_entropy),
            "the-guides-line",
        ),
        (
            lambda logits, tokens: F.cross_entropy(logits[:, :-1], tokens[:, 1:]),
            "takes-places-for-classes",
        ),
        (
            predicting(
                loss=lambda z, y: F.cross_entropy(z.reshape(len(z), z.shape[2], z.shape[1]), y)
            ),
            "reshapes-for-transposing",
        ),
        (predicting(loss=lambda z, y: -logs(z)[..., y].mean()), "broadcasts-the-labels"),
        (
            predicting(
                loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")
            ),
            "adds-up-all-rows",
        ),
        (
            predicting(
                loss=lambda z, y: (
                    F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / len(z)
                )
            ),
            "adds-up-the-text",
        ),
        (
            predicting(loss=lambda z, y: F.nll_loss(z.flatten(0, 1), y.flatten())),
            "skips-the-softmax",
        ),
        (
            predicting(loss=lambda z, y: F.cross_entropy(z.softmax(-1).flatten(0, 1), y.flatten())),
            "softmax-twice",
        ),
        (predicting(rows=lambda z: z.detach()[:, :-1]), "cuts-the-gradient"),
        (lambda logits, tokens: None, "returns-nothing"),
    ],
    "distillation.logit_gradient": [
        (deriving(lambda p, q: p - q), "points-uphill"),
        (deriving(rows=lambda p: 1), "forgets-the-mean"),
        (deriving(rows=len), "divides-by-the-batch"),
        (deriving(rows=torch.numel), "divides-by-the-vocabulary"),
        (deriving(factor=lambda t: 1), "forgets-t"),
        (deriving(factor=lambda t: 1 / t), "forgets-t-squared"),
        (deriving(factor=lambda t: t**2), "forgets-the-inner-derivative"),
        (
            deriving(lambda p, q: q - F.one_hot(p.argmax(-1), p.shape[-1])),
            "hardens-the-teacher",
        ),
        (deriving(lambda p, q: q.log() - p.log()), "subtracts-logarithms"),
        (deriving(lambda p, q: -p / q), "stops-at-q"),
        (deriving(lambda p, q: -p), "forgets-the-denominator"),
        (lambda p, q, temperature: p * (p / q).log(), "takes-the-kls-terms"),
        (lambda p, q, temperature: None, "returns-nothing"),
    ],
    "distillation.measured_power": [
        (
            measuring(
                loss=lambda s, t, temperature: softening()(s, t, temperature),
            ),
            "measures-with-the-t-squared",
        ),
        (measures_the_loss, "measures-the-loss"),
        (measures_the_softened, "gradient-of-the-softened-logits"),
        (measuring(power=lambda a, b, r: math.log(b / a) / math.log(r)), "wrong-sign"),
        (measuring(power=lambda a, b, r: a / b), "returns-the-ratio"),
        (measuring(power=lambda a, b, r: math.log(a / b)), "forgets-the-distance"),
        (measuring(power=lambda a, b, r: math.log2(a / b)), "logarithm-to-base-2"),
        (
            measuring(loss=lambda s, t, temperature: kl_of(logs(t), logs(s, temperature)).mean()),
            "softens-the-student-alone",
        ),
        (measuring(size=lambda g: g.abs().max()), "takes-the-largest"),
        (lambda s, t, low, high: 2.0, "takes-it-on-trust"),
    ],
    "distillation.rows_that_count": [
        (by_the_padding(True), "loses-the-end"),
        (by_the_padding(False), "masks-by-the-token"),
        (
            counting(lambda at, a, b, x: a <= at - 1, lambda at, b: at - 1 < b),
            "asks-about-the-input",
        ),
        (counting(lambda at, a, b, x: a < at), "loses-the-first-token"),
        (counting(end=lambda at, b: at <= b), "counts-one-of-the-padding"),
        (counting(end=lambda at, b: at < b - 1), "stops-one-early"),
        (counting(lambda at, a, b, x: at > 0), "counts-the-prompt"),
        (counting(end=lambda at, b: at > 0), "counts-the-padding"),
        (
            counting(lambda at, a, b, x: at.expand(len(b), -1) > 0, lambda at, b: at > 0),
            "counts-all",
        ),
        (for_all_alike, "one-length-for-all"),
        (lambda *args: ~counting()(*args), "the-other-rows"),
        (full_width, "one-row-too-many"),
        (lambda *args: counting()(*args).float(), "weights-for-a-mask"),
        (lambda *args: counting()(*args).long(), "numbers-for-a-mask"),
    ],
    "distillation.distillation_loss": [
        (mixing("no mask"), "masks-nothing"),
        (mixing("no soft mask"), "masks-the-labels-alone"),
        (mixing("no hard mask"), "masks-the-soft-part-alone"),
        (mixing("others"), "the-other-rows"),
        (mixing("all rows"), "divides-by-all-rows"),
        (mixing("batch"), "divides-by-the-batch"),
        (mixing("texts"), "each-text-alike"),
        (mixing("vocabulary"), "divides-by-the-vocabulary"),
        (mixing("no t"), "forgets-t-squared"),
        (mixing("t"), "multiplies-by-t"),
        (mixing("t twice"), "t-squared-on-both"),
        (mixing("soft labels"), "softens-the-labels-part"),
        (mixing("swap"), "swaps-the-weights"),
        (mixing("rest"), "forgets-the-rest-of-the-weight"),
        (mixing("soft alone"), "soft-part-alone"),
        (mixing("reverse"), "turns-the-divergence-over"),
        (mixing("entropy"), "forgets-the-teachers-entropy"),
        (mixing("times mask"), "nan-times-zero"),
        (mixing("teacher trains"), "trains-the-teacher"),
        (mixing("no soft"), "cuts-the-soft-part"),
        (mixing("no hard"), "cuts-the-labels-part"),
        (mixing("item"), "not-a-scalar"),
        (mixing("detach"), "cuts-the-gradient"),
        (looks_up_every_label, "looks-up-label-minus-100"),
    ],
    "distillation.train_step": [
        ((stepping("no eval"), one_step), "teacher-drops-out"),
        ((stepping("as it came"), one_step), "student-sleeps"),
        ((stepping("detach"), one_step), "keeps-the-teachers-graph"),
        ((stepping("for good"), one_step), "switches-gradients-off-for-good"),
        ((stepping("asks twice"), one_step), "runs-the-teacher-again"),
        ((stepping("batch"), one_step), "runs-the-student-again"),
        ((stepping("student without"), one_step), "cuts-the-gradient"),
        ((stepping("batchmean"), one_step), "divides-by-the-batch"),
        ((stepping("no t"), one_step), "forgets-t-squared"),
        ((stepping("keeps"), one_step), "keeps-old-gradients"),
        ((stepping("no step"), one_step), "nothing-moves"),
        ((stepping("early step"), one_step), "steps-before-backward"),
        ((stepping("climbs"), one_step), "climbs"),
        ((stepping("twice"), one_step), "steps-twice"),
        ((stepping("teacher moves"), one_step), "trains-the-teacher"),
        ((stepping("graph"), one_step), "returns-the-graph"),
        ((stepping("none"), one_step), "returns-nothing"),
        (stepping(), "returns-other-things"),
    ],
    "distillation.both_ways": [
        (comparing(pair=lambda a, b: (b, a)), "swaps-the-two"),
        (comparing(lambda a, b: (a * (a.log() - b.log())).sum(-1)), "nan-from-nothing"),
        (
            comparing(lambda a, b: (a * ((a + 1e-9) / (b + 1e-9)).log()).sum(-1)),
            "hides-the-infinity",
        ),
        (comparing(lambda a, b: -torch.xlogy(a, b).sum(-1)), "forgets-the-entropy"),
        (
            comparing(lambda a, b: torch.where(a > 0, a * (a / b).log2(), 0).sum(-1)),
            "in-bits",
        ),
        (
            comparing(lambda a, b: torch.where(a > 0, a * (a / b).log(), 0).mean(-1)),
            "divides-by-the-places",
        ),
        (
            comparing(lambda a, b: torch.where(a > 0, a * (b / a).log(), 0).sum(-1)),
            "wrong-sign",
        ),
        (comparing(pair=lambda a, b: (a, a)), "forward-twice"),
        (comparing(pair=lambda a, b: (b, b)), "reverse-twice"),
        (
            comparing(lambda a, b: torch.where(a > 0, a * (a / b).log(), 0).sum()),
            "one-number-for-all",
        ),
        (lambda p, q: p, "returns-other-things"),
    ],
    "distillation.top_k": [
        ((storing(rows=lambda z: z), restoring()), "stores-logits"),
        (
            (storing(pick=lambda x, k: renormalising(x.topk(k))), restoring()),
            "renormalises",
        ),
        ((storing(value=lambda x: x.exp().half()), restoring()), "stores-probabilities"),
        ((storing(pick=lambda x, k: x.topk(k, largest=False)), restoring()), "keeps-the-least"),
        (
            (
                storing(
                    pick=lambda x, k: (x[:, :k], torch.arange(k).expand(len(x), -1)),
                ),
                restoring(),
            ),
            "keeps-the-first",
        ),
        ((storing(value=lambda x: x), restoring()), "stores-wide-numbers"),
        ((storing(number=lambda x, n: x), restoring()), "stores-wide-tokens"),
        ((storing(number=lambda x, n: x.to(torch.int16)), restoring()), "wraps-around"),
        ((storing(value=lambda x: x.bfloat16()), restoring()), "stores-bfloat16"),
        (
            (storing(pick=lambda x, k: (x, torch.zeros_like(x).long())), restoring()),
            "stores-the-whole-row",
        ),
        ((lambda logits, k: logits.topk(k - 1), restoring()), "stores-another-shape"),
        ((storing(), restoring("renormalises")), "renormalises-the-teacher"),
        ((storing(), restoring("both")), "renormalises-both"),
        ((storing(), restoring("few")), "forgets-the-rest"),
        ((storing(), restoring("itself")), "adds-the-rest-itself"),
        ((storing(), restoring("spread")), "spreads-the-rest"),
        ((storing(), restoring("student's")), "the-students-rest-weighs"),
        ((storing(), restoring("reverse")), "turns-the-divergence-over"),
        ((storing(), restoring("half")), "computes-in-half-precision"),
        ((storing(), restoring("unclamped")), "nan-from-nothing"),
        ((storing(), restoring("mean")), "mean-for-all-rows"),
        ((storing(), gathers_small_integers), "raises"),
        (storing(), "returns-other-things"),
    ],
    "distillation.share_of_what": [
        (lambda: (0.967, 0.864, 0.513), "mean-of-the-shares"),
        (lambda: (0.025, 0.864, 0.513), "takes-the-difference"),
        (lambda: (0.77, 0.864, 0.513), "takes-the-students-score"),
        (lambda: (0.031, 0.864, 0.513), "what-is-lost"),
        (lambda: (96.9, 86.4, 51.3), "in-percent"),
        (lambda: (0.969, 0.911, 0.513), "another-task"),
        (lambda: (0.969, 0.864, 0.143), "forgets-the-teachers-chance"),
        (lambda: (0.969, 0.864, 3.104), "forgets-the-students-chance"),
        (lambda: (0.969, 0.864, 0.739), "chance-of-three-answers"),
        (lambda: (0.969, 0.864, "half"), "not-a-number"),
        (lambda: 0.969, "returns-other-things"),
    ],
    "distillation.chunked_kl": [
        ((chunking("sum"), bytes_held), "adds-up-all-rows"),
        ((chunking("average"), bytes_held), "averages-the-chunks"),
        ((chunking("means"), bytes_held), "adds-up-the-chunks-means"),
        ((chunking("drops"), bytes_held), "drops-the-last-chunk"),
        ((chunking("last"), bytes_held), "last-chunk-only"),
        ((chunking("uphill"), bytes_held), "points-uphill"),
        ((chunking("no mean"), bytes_held), "forgets-the-mean-in-the-gradient"),
        ((chunking("chunk"), bytes_held), "divides-by-the-chunk"),
        ((chunking("teacher"), bytes_held), "gradient-of-the-teachers-layer"),
        ((chunking("reverse"), bytes_held), "turns-the-divergence-over"),
        ((chunking("hard"), bytes_held), "hardens-the-teacher"),
        ((all_at_once, bytes_held), "materialises-the-logits"),
        ((with_autograd_at_once, bytes_held), "keeps-every-chunk"),
        ((lambda *args: chunking()(*args)[0], bytes_held), "returns-other-things"),
    ],
    "distillation.kl_kernel": [
        (RowKL("times"), "nan-times-zero"),
        (RowKL("ignored"), "counts-the-masked-row"),
        (RowKL("others"), "the-other-rows"),
        (RowKL("skips"), "skips-the-masked-row"),
        (RowKL("zero"), "nan-from-nothing"),
        (RowKL("tile"), "nan-from-an-empty-tile"),
        (RowKL("overflow"), "subtracts-no-maximum"),
        (RowKL("padding"), "counts-the-padding"),
        (RowKL("drop"), "drops-the-last-tile"),
        (RowKL("first"), "reads-the-first-tile-only"),
        (RowKL("row 0"), "everybody-takes-row-0"),
        (RowKL("total"), "forgets-to-rescale-the-total"),
        (RowKL("gap"), "forgets-to-rescale-the-gap"),
        (RowKL("student"), "forgets-to-rescale-the-student"),
        (RowKL("last"), "keeps-the-last-tile"),
        (RowKL("cold"), "forgets-the-temperature"),
        (RowKL("invert"), "multiplies-by-the-temperature"),
        (RowKL("square"), "multiplies-by-t-squared"),
        (RowKL("reverse"), "turns-the-divergence-over"),
        (RowKL("no denominators"), "forgets-the-denominators"),
        (RowKL("undivided"), "forgets-to-divide-by-the-total"),
        (RowKL("swapped"), "swaps-the-denominators"),
        (RowKL("no maxima"), "forgets-the-maxima"),
        (RowKL("cross"), "cross-entropy"),
        (RowKL("bits"), "in-bits"),
        (RowKL("all rows"), "writes-past-its-rows"),
        (RowKL("nothing"), "stores-nothing"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "distillation.soft_loss": [softening(), with_kl_div(flat=True)],
    "distillation.task_loss": [
        predicting(),
        predicting(loss=lambda z, y: F.cross_entropy(z.transpose(1, 2), y)),
        loops_over_rows,
    ],
    "distillation.logit_gradient": [
        deriving(),
        derives_in_place,
        derives_by_autograd,
    ],
    "distillation.measured_power": [measuring(), measures_in_closed_form],
    "distillation.rows_that_count": [counting(), fills_slices],
    "distillation.distillation_loss": [mixing(), picks_rows, with_where],
    "distillation.train_step": [(stepping(), one_step), (steps_with_a_frozen_teacher, one_step)],
    "distillation.both_ways": [comparing(), compares_with_xlogy],
    "distillation.top_k": [
        (storing(), restoring()),
        [stores_sorted_by_number, restores_with_one_more_token],
    ],
    "distillation.share_of_what": [
        lambda: (77.0 / 79.5, 59.9 / 69.3, 9.9 / 19.3),
        lambda: [torch.tensor(0.969), 0.864, 0.513],
    ],
    "distillation.chunked_kl": [(chunking(), bytes_held), (autograd_a_chunk, bytes_held)],
    "distillation.kl_kernel": [RowKL(""), two_passes],
}
