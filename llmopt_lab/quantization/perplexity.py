"""What a model loses by quantization: bits per byte of text it has not seen, and calibration text.

Bits per byte compare models of different tokenizers, and perplexity does not:
bits per byte = log2(perplexity) * tokens / bytes.
"""

import hashlib
import sysconfig
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.transformer import Attend, Transformer
from llmopt_lab.nn.weights import LanguageModel

# Modules of the standard library that no held-out file is, for calibration.
CALIBRATION_MODULES = (
    "ast", "calendar", "configparser", "difflib", "doctest", "ftplib", "inspect", "locale",
    "mailbox", "optparse", "pathlib", "pdb", "pickle", "shutil", "smtplib", "subprocess",
    "tarfile", "threading", "turtle", "uuid",
)  # fmt: skip


def calibration_tokens(
    lm: LanguageModel, n: int, length: int, *, rng: torch.Generator
) -> tuple[Tensor, str]:
    """`n` random windows of `length` tokens of the standard library's source, and its SHA-256.

    None of CALIBRATION_MODULES is held out. The text is the running Python's, so another version
    gives other windows; the hash says which.
    """
    require(n > 0 and length > 0, f"n and length must be positive; got {n} and {length}")
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in CALIBRATION_MODULES]
    tokens = torch.cat([lm.encode(text) for text in texts])
    require(len(tokens) > length, f"{len(tokens)} tokens are too few for windows of {length}")
    starts = torch.randint(len(tokens) - length + 1, (n,), generator=rng)
    rows = torch.stack([tokens[start : start + length] for start in starts])
    return rows, hashlib.sha256("".join(texts).encode()).hexdigest()


def held_out_windows(lm: LanguageModel, n: int, length: int) -> tuple[Tensor, int]:
    """The first `length` + 1 tokens of the `n` first long enough held-out files, and their bytes.

    Returns:
        (n, length + 1) int64, and the UTF-8 bytes of what is predicted: all but the first token.

    Raises:
        BadInput: fewer than `n` files are that long.
    """
    documents = [lm.encode(text) for text in held_out_documents().values()]
    long_enough = [tokens[: length + 1] for tokens in documents if len(tokens) > length][:n]
    require(
        len(long_enough) == n,
        f"{len(long_enough)} held-out files have more than {length} tokens; asked for {n}",
    )
    n_bytes = sum(len(lm.decode(tokens[1:]).encode()) for tokens in long_enough)
    return torch.stack(long_enough), n_bytes


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    tokens: Tensor,
    n_bytes: int,
    *,
    attend: Attend | None = None,
    batch: int = 4,
) -> float:
    """Bits the model needs for a byte of text.

    Args:
        tokens: (n, length + 1) int64; each row is read from its first token on and all others are
            predicted.
        n_bytes: of the predicted text, all rows together.
        attend: replaces the model's; it must be stateless.

    Cost: one pass of all tokens, `batch` rows at a time.
    """
    require(n_bytes > 0, f"n_bytes must be positive; got {n_bytes}")
    nats = 0.0
    for rows in tokens.split(batch):
        logits = model(rows[:, :-1], attend=attend).flatten(0, 1)
        nats += float(F.cross_entropy(logits.double(), rows[:, 1:].flatten(), reduction="sum"))
    return nats / log(2) / n_bytes


def perplexity(bits: float, n_tokens: int, n_bytes: int) -> float:
    """exp of the mean nats a token, from bits per byte."""
    return 2 ** (bits * n_bytes / n_tokens)
