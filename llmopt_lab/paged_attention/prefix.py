"""Prefix caching: who starts with tokens that a full block already holds shares that block.

A block's digest names its tokens and everything before them, because keys and values depend on
both: digest_i = H(digest_(i-1), tokens of block i). Only full blocks have one; they never change.
Source: vLLM, automatic prefix caching (docs/design/prefix_caching.md).
"""

import hashlib
from collections.abc import Sequence

from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import record
from llmopt_lab.paged_attention.records import PrefixHit, Published
from llmopt_lab.paged_attention.reference import PagedCache


def block_digests(tokens: Sequence[int], block_size: int, salt: str = "") -> list[str]:
    """The hash chain over the full blocks of `tokens`, one digest a block.

    `salt` separates what must not be shared: tenants, adapters, models. Two requests with
    different salts have no digest in common.
    """
    digests, parent = [], hashlib.sha256(salt.encode()).hexdigest()
    for start in range(0, len(tokens) - block_size + 1, block_size):
        content = ",".join(str(int(token)) for token in tokens[start : start + block_size])
        parent = hashlib.sha256(f"{parent}:{content}".encode()).hexdigest()
        digests.append(parent)
    return digests


def find_prefix(cache: PagedCache, tokens: Sequence[int], salt: str = "") -> list[int]:
    """Blocks that hold the longest known prefix of `tokens`, changing nothing.

    At most the blocks before the last token: its logits are what the caller is after, so at least
    one token must be computed, even when the prompt is an exact multiple of the block size.
    """
    usable = (len(tokens) - 1) // cache.config.block_size
    blocks = []
    for digest in block_digests(tokens, cache.config.block_size, salt)[:usable]:
        if digest not in cache.pool.blocks:
            break
        blocks.append(cache.pool.blocks[digest])
    return blocks


def admit(
    cache: PagedCache, seq: str, tokens: Sequence[int], *, salt: str = ""
) -> tuple[int, Tensor]:
    """Start `seq` with blocks for all of `tokens`, sharing the known prefix. All or nothing.

    Returns:
        n_reused: leading tokens whose keys and values are already there;
        slots: (len(tokens) - n_reused,) int64, where the keys and values of the rest go.

    Raises:
        OutOfBlocks: the rest does not fit. Nothing was changed.
        BadInput: no tokens, or the name is taken.
    """
    require(len(tokens) > 0, f"{seq!r} has no tokens: a prompt needs at least one")
    require(seq not in cache.tables, f"sequence {seq!r} exists already; release it first")
    hits = find_prefix(cache, tokens, salt)
    # a hit on a cached block takes it out of what can be evicted for the rest
    n_idle = sum(cache.pool.owners[block] == 0 for block in hits)
    n_more = ceil_div(len(tokens), cache.config.block_size) - len(hits)
    cache.require_blocks(seq, n_more + n_idle)
    cache.tables[seq] = []
    for logical, block in enumerate(hits):
        owners = cache.pool.share(block)
        cache.tables[seq].append(block)
        record(PrefixHit(seq, logical, block, owners))
    n_reused = cache.lengths[seq] = len(hits) * cache.config.block_size
    return n_reused, cache.extend(seq, len(tokens) - n_reused)


def publish(cache: PagedCache, seq: str, tokens: Sequence[int], *, salt: str = "") -> None:
    """Name the full blocks of `seq`, which holds `tokens`. Call when all layers are written."""
    cache.require_known(seq)
    length = cache.lengths[seq]
    require(
        len(tokens) >= length, f"{seq!r} has {length} tokens in the cache; got only {len(tokens)}"
    )
    digests = block_digests(tokens[:length], cache.config.block_size, salt)
    for block, digest in zip(cache.tables[seq], digests, strict=False):
        if cache.pool.publish(block, digest):
            record(Published(seq, block, digest))
