"""Paged attention in plain PyTorch: the pool, the cache with its block tables, the page walk."""

from collections import OrderedDict, deque

import torch
from torch import Tensor

from llmopt_lab.core.errors import OutOfBlocks, require
from llmopt_lab.core.memory import ceil_div, load, store
from llmopt_lab.core.trace import record
from llmopt_lab.paged_attention.records import (
    Allocated,
    CacheConfig,
    CopiedOnWrite,
    Evicted,
    Extended,
    Forked,
    Refused,
    Released,
    Shared,
)


class BlockPool:
    """Hands out block numbers and counts their owners. It never touches keys or values.

    At any time every block is in exactly one of three places:
        free     owners[block] == 0, its content means nothing
        cached   owners[block] == 0, its content has a digest: it can be found again, or evicted
        owned    owners[block] == number of block tables that hold it, at least 1
    """

    def __init__(self, n_blocks: int):
        require(n_blocks > 0, f"n_blocks must be positive; got {n_blocks}")
        self.free = deque(range(n_blocks))
        self.cached: OrderedDict[int, None] = OrderedDict()    # least recently used first
        self.owners = [0] * n_blocks
        self.digests: dict[int, str] = {}                      # block -> name of its content
        self.blocks: dict[str, int] = {}                       # and back

    @property
    def n_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and cached ones after eviction."""
        return len(self.free) + len(self.cached)

    def allocate(self, n: int) -> list[int]:
        """Hand out `n` blocks with one owner each, or none at all. O(1) a block.

        Raises:
            OutOfBlocks: fewer than `n` are available. Nothing was changed.
        """
        if n > self.n_available:
            raise OutOfBlocks(
                f"{n} blocks needed, {self.n_available} of {len(self.owners)} available. "
                "Release a sequence, or build the pool with more blocks."
            )
        blocks = [self.free.popleft() if self.free else self._evict() for _ in range(n)]
        for block in blocks:
            self.owners[block] = 1
        return blocks

    def share(self, block: int) -> int:
        """One more table holds `block`; back comes the number of its owners."""
        self.cached.pop(block, None)
        self.owners[block] += 1
        return self.owners[block]

    def release(self, block: int) -> int:
        """One table less holds `block`; back comes the number of owners left."""
        require(self.owners[block] > 0, f"block {block} has no owner: it was released twice")
        self.owners[block] -= 1
        if self.owners[block] == 0:
            if block in self.digests:
                self.cached[block] = None
            else:
                self.free.append(block)
        return self.owners[block]

    def publish(self, block: int, digest: str) -> bool:
        """Name the content of a full block; False if another block has that content already."""
        if digest in self.blocks or block in self.digests:
            return False
        self.blocks[digest] = block
        self.digests[block] = digest
        return True

    def _evict(self) -> int:
        block, _ = self.cached.popitem(last=False)
        del self.blocks[self.digests.pop(block)]
        record(Evicted(block))
        return block


class PagedCache:
    """Keys and values of many sequences, all layers, in one pool of blocks.

    keys, values:  (n_layers, n_blocks, block_size, n_kv_heads, d_head)
    tables[seq]:   block numbers; token t of seq is in slot t % block_size
                   of block tables[seq][t // block_size], in every layer
    lengths[seq]:  tokens of seq
    """

    def __init__(self, config: CacheConfig, *, device: torch.device | str = "cpu"):
        c = config
        shape = (c.n_layers, c.n_blocks, c.block_size, c.n_kv_heads, c.d_head)
        self.config = config
        self.pool = BlockPool(c.n_blocks)
        self.keys = torch.zeros(shape, dtype=c.dtype, device=device)
        self.values = torch.zeros(shape, dtype=c.dtype, device=device)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def extend(self, seq: str, n_tokens: int) -> Tensor:
        """Make room for `n_tokens` more tokens at the end of `seq`; a new name starts a sequence.

        Returns:
            (n_tokens,) int64 slots, block * block_size + offset, where `write` puts them.

        Raises:
            OutOfBlocks: the pool cannot serve all of them. Nothing was changed.

        A last block that others share is copied first (copy-on-write), because it is about to be
        written. Cost: O(blocks added), and one block copied at most.
        """
        require(n_tokens > 0, f"n_tokens must be positive; got {n_tokens}")
        table, length = self.tables.get(seq, []), self.lengths.get(seq, 0)
        block_size = self.config.block_size
        n_more = ceil_div(length + n_tokens, block_size) - len(table)
        must_copy = length % block_size != 0 and self.pool.owners[table[-1]] > 1
        self.require_blocks(seq, n_more + must_copy)
        if must_copy:
            self._copy_on_write(seq)
        table = self.tables.setdefault(seq, [])
        for block in self.pool.allocate(n_more):
            table.append(block)
            record(Allocated(seq, len(table) - 1, block))
        self.lengths[seq] = length + n_tokens
        record(Extended(seq, length + n_tokens, n_tokens))
        return self.slots(seq, length)

    def slots(self, seq: str, start: int = 0) -> Tensor:
        """Slots of the tokens of `seq` from `start` on, (lengths[seq] - start,) int64."""
        tokens = torch.arange(start, self.lengths[seq])
        blocks = torch.tensor(self.tables[seq], dtype=torch.int64)[tokens // self.config.block_size]
        slots = blocks * self.config.block_size + tokens % self.config.block_size
        return slots.to(self.keys.device)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (n_tokens, n_kv_heads, d_head) each, into their slots."""
        where = (layer, slots // self.config.block_size, slots % self.config.block_size)
        store("K", self.keys, where, keys)
        store("V", self.values, where, values)

    def append(self, seq: str, keys: Tensor, values: Tensor) -> None:
        """`extend` and `write` for a cache of one layer: (n_tokens, n_kv_heads, d_head) each."""
        require(
            self.config.n_layers == 1 and keys.shape == values.shape
            and keys.shape[1:] == (self.config.n_kv_heads, self.config.d_head),
            f"append needs keys and values (n_tokens, {self.config.n_kv_heads}, "
            f"{self.config.d_head}) and a cache of 1 layer; got {tuple(keys.shape)}, "
            f"{tuple(values.shape)} and {self.config.n_layers} layers",
        )
        self.write(0, self.extend(seq, len(keys)), keys, values)

    def fork(self, parent: str, child: str) -> None:
        """Start `child` with the tokens of `parent`, without copying any of them."""
        self.require_known(parent)
        require(child not in self.tables, f"sequence {child!r} exists already; release it first")
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        record(Forked(parent, child, self.lengths[child]))
        for logical, block in enumerate(self.tables[child]):
            owners = self.pool.share(block)
            record(Shared(child, logical, block, owners))

    def release(self, seq: str) -> None:
        """Give back every block of `seq`, its last one first: the first to be evicted."""
        self.require_known(seq)
        del self.lengths[seq]
        for block in reversed(self.tables.pop(seq)):
            owners = self.pool.release(block)
            record(Released(seq, block, owners, cached=block in self.pool.cached))

    def table_tensor(self, seqs: list[str]) -> tuple[Tensor, Tensor]:
        """Block tables (batch, max_blocks) int32, padded with 0, and lengths (batch,) int32."""
        width = max((len(self.tables[seq]) for seq in seqs), default=0)
        rows = [self.tables[seq] + [0] * (width - len(self.tables[seq])) for seq in seqs]
        tables = torch.tensor(rows, dtype=torch.int32, device=self.keys.device)
        lengths = [self.lengths[seq] for seq in seqs]
        return tables, torch.tensor(lengths, dtype=torch.int32, device=self.keys.device)

    def require_blocks(self, seq: str, n: int) -> None:
        """Raise OutOfBlocks, before anything is changed, unless `n` blocks are available."""
        if n > self.pool.n_available:
            record(Refused(seq, n, self.pool.n_available))
            raise OutOfBlocks(
                f"{seq!r} needs {n} more blocks, {self.pool.n_available} of "
                f"{self.config.n_blocks} are available. Nothing was changed: release or preempt "
                "a sequence and ask again."
            )

    def require_known(self, seq: str) -> None:
        require(seq in self.tables, f"no sequence {seq!r}; have {sorted(self.tables)}")

    def _copy_on_write(self, seq: str) -> None:
        table = self.tables[seq]
        source, (block,) = table[-1], self.pool.allocate(1)
        for layer in range(self.config.n_layers):
            store("K", self.keys, (layer, block), load("K", self.keys, (layer, source)))
            store("V", self.values, (layer, block), load("V", self.values, (layer, source)))
        self.pool.release(source)
        table[-1] = block
        record(CopiedOnWrite(seq, len(table) - 1, source, block))


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int, *,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query over the tokens of one sequence, read block by block in place.

    Args:
        q: (n_heads, d_head), the query of the newest token.
        keys, values: (n_blocks, block_size, n_kv_heads, d_head), the pool, one layer.
        table: (max_blocks,) int32, the sequence's block table.
        length: tokens to attend to; 0 gives zeros.
        scale: of the scores; 1/sqrt(d_head) if None.

    Returns:
        (n_heads, d_head), the dtype of `q`. Query head h reads KV head h // group.

    Raises:
        BadInput: a shape does not fit, or the table is too short for `length`.

    Memory traffic: q and the result once, 4 bytes a block for the table, and
    2 * length * n_kv_heads * d_head elements of keys and values: the unwritten slots of the last
    block are not read. The softmax is kept as a running maximum, total and weighted sum, so no
    score leaves the chip; chapter 2 derives it.
    Source: Kwon et al. 2023, section 4.1, equation (4) (https://arxiv.org/abs/2309.06180).
    """
    n_heads, d_head, n_kv_heads, block_size = _check(q, keys, values, table, length, scale)
    scale = d_head**-0.5 if scale is None else scale
    q_g = load("Q", q, slice(None)).view(n_kv_heads, -1, d_head)        # (n_kv_heads, group, d)
    m = torch.full(q_g.shape[:2], -torch.inf, dtype=q.dtype)            # (n_kv_heads, group)
    total = torch.zeros_like(m)                                         # (n_kv_heads, group)
    acc = torch.zeros_like(q_g)                                         # (n_kv_heads, group, d)
    for logical in range(ceil_div(length, block_size)):
        block = int(load("table", table, logical))
        filled = slice(0, min(block_size, length - logical * block_size))
        k = load("K", keys, (block, filled)).transpose(0, 1)            # (n_kv_heads, filled, d)
        v = load("V", values, (block, filled)).transpose(0, 1)          # (n_kv_heads, filled, d)
        scores = scale * q_g @ k.transpose(1, 2)                        # (.., group, filled)
        m_new = torch.maximum(m, scores.amax(dim=2))
        shrink = torch.exp(m - m_new)                                   # rescales the old sums
        p = torch.exp(scores - m_new[:, :, None])                       # (.., group, filled)
        total = shrink * total + p.sum(dim=2)
        acc = shrink[:, :, None] * acc + p @ v
        m = m_new
    out = torch.empty_like(q)
    if length > 0:
        acc = acc / total[:, :, None]
    store("O", out, slice(None), acc.view(n_heads, d_head))
    return out


def _check(q, keys, values, table, length, scale) -> tuple[int, int, int, int]:
    """Refuse bad input before any work: (n_heads, d_head, n_kv_heads, block_size)."""
    require(
        q.ndim == 2 and q.numel() > 0,
        f"q must be (n_heads, d_head), not empty; got {tuple(q.shape)}",
    )
    require(
        keys.ndim == 4 and keys.shape == values.shape,
        "keys and values must both be (n_blocks, block_size, n_kv_heads, d_head); "
        f"got {tuple(keys.shape)} and {tuple(values.shape)}",
    )
    (n_heads, d_head), (n_blocks, block_size, n_kv_heads, d_key) = q.shape, keys.shape
    require(d_head == d_key, f"q and keys must share d_head; got {d_head} and {d_key}")
    require(
        q.dtype == keys.dtype == values.dtype and q.is_floating_point(),
        f"q, keys, values must share a floating dtype; got {q.dtype}, {keys.dtype}, {values.dtype}",
    )
    require(
        n_kv_heads > 0 and n_heads % n_kv_heads == 0,
        f"n_heads must be a multiple of n_kv_heads; got {n_heads} and {n_kv_heads}",
    )
    require(
        scale is None or -torch.inf < scale < torch.inf,
        f"scale must be a finite number; got {scale}",
    )
    require(
        table.ndim == 1 and table.dtype == torch.int32,
        f"table must be (max_blocks,) int32; got {tuple(table.shape)} {table.dtype}",
    )
    require(
        0 <= length <= len(table) * block_size,
        f"length must be 0 to {len(table) * block_size}, the {len(table)} blocks of the table; "
        f"got {length}",
    )
    used = table[: ceil_div(length, block_size)]
    require(
        used.numel() == 0 or 0 <= int(used.min()) and int(used.max()) < n_blocks,
        f"the table names a block outside the pool of {n_blocks}: {used.tolist()}",
    )
    return n_heads, d_head, n_kv_heads, block_size
