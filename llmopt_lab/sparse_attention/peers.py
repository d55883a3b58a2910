"""What `llmopt bench sparse_attention` times: our kernels and their peers, one function each.

Each takes the inputs of a case and gives the call to time. All work on (batch, n_heads, n, d_head);
a peer with another layout gets a copy in it, and its mask, before the clock starts. Ours makes its
lists inside the call.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing
from llmopt_lab.core.memory import tiles
from llmopt_lab.sparse_attention.block_lists import cover
from llmopt_lab.sparse_attention.patterns import AnyOf, Causal, Full, Pattern, Sinks, SlidingWindow
from llmopt_lab.sparse_attention.records import BlockLists

Call = Callable[[], Tensor | tuple[Tensor, ...]]
ROWS = 1024  # query rows that the oracle computes at a time


def masked_rows(pattern: Pattern, lists: BlockLists | None, n_q: int, n_k: int, rows, device):
    """Which keys some queries see, (rows, n_k); the lists are shared by all heads."""
    tokens = torch.arange(rows.start, rows.stop, device=device)
    seen = pattern.at(n_k).allowed(tokens + n_k - n_q, torch.arange(n_k, device=device))
    if lists is not None:
        live = lists.live()[tokens // lists.tile_q]
        seen = seen & live.repeat_interleave(lists.tile_k, 1)[:, :n_k]
    return seen


def forward_oracle(q, k, v, pattern: Pattern, lists: BlockLists | None = None) -> Tensor:
    """Attention under the mask in float64, some rows of one head at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    for rows in tiles(q.shape[2], ROWS):
        mask = masked_rows(pattern, lists, q.shape[2], k.shape[2], rows, q.device)
        for head in _heads(q):
            wide = [q[head][rows].double(), k[head].double(), v[head].double()]
            out[head][rows] = _dense(*wide, mask)
    return out


def backward_oracle(q, k, v, d_out, pattern: Pattern, lists: BlockLists | None = None) -> Tensor:
    """d_q, d_k and d_v in float64 by autograd, one behind the other as one vector."""
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for rows in tiles(q.shape[2], ROWS):
        mask = masked_rows(pattern, lists, q.shape[2], k.shape[2], rows, q.device)
        for head in _heads(q):
            wide = [x[head].double().requires_grad_() for x in (q, k, v)]
            out = _dense(wide[0][rows], *wide[1:], mask)
            part = torch.autograd.grad(out, wide, d_out[head][rows].double())
            for grad, more in zip(grads, part, strict=True):
                grad[head] += more
    return torch.cat([grad.flatten() for grad in grads])


def _heads(q: Tensor):
    return [(seq, head) for seq in range(q.shape[0]) for head in range(q.shape[1])]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0) @ v


# Forward


def ours(q, k, v, pattern, lists=None) -> Call:
    from llmopt_lab.sparse_attention.kernels import sparse_attention_triton

    return lambda: sparse_attention_triton(q, k, v, pattern, lists=lists)


def ours_in_triton(q, k, v, pattern, lists=None) -> Call:
    """The kernel for every GPU, where the launcher would take the one for Hopper."""
    from llmopt_lab.sparse_attention.kernels import forward_into, walk_of

    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    walk = walk_of(q, k, pattern, lists)

    def call() -> Tensor:
        forward_into(out, lse, q, k, v, walk=walk, scale=q.shape[3] ** -0.5)
        return out

    return call


def flex(q, k, v, pattern, lists=None) -> Call:
    compiled, mask = _compiled_flex(q, k, pattern, lists)
    tiles = {}
    rows, cols = mask.BLOCK_SIZE
    if min(rows, cols) < 128:  # its own tiles must divide the blocks
        tiles = {"BLOCK_M": rows, "BLOCK_N": cols, "num_warps": 4}
    return lambda: compiled(q, k, v, block_mask=mask, kernel_options=tiles)


_latest: dict = {}  # the compiled function and the mask of the latest row, for all its input sets


def _compiled_flex(q: Tensor, k: Tensor, pattern: Pattern, lists: BlockLists | None):
    from torch.nn.attention.flex_attention import flex_attention

    if gpu_facts() is None:
        raise Missing("flex_attention is only compiled for a GPU here")
    row = (pattern, id(lists), q.shape, k.shape)
    if row not in _latest:
        _latest.clear()
        torch.compiler.reset()  # or the ninth size is past its limit and runs uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)
        _latest[row] = compiled, block_mask(q, k, pattern, lists)
    return _latest[row]


def block_mask(q: Tensor, k: Tensor, pattern: Pattern, lists: BlockLists | None = None):
    """flex_attention's mask of the same rule: blocks of 128 x 128, or those of the lists."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = mask_rule(pattern, k.shape[2], str(q.device))
    rows = cols = 128
    if lists is not None:
        live, whole = lists.live(), rule
        rows, cols = lists.tile_q, lists.tile_k
        rule = lambda b, h, i, j: whole(b, h, i, j) & live[i // rows, j // cols]  # noqa: E731
    return create_block_mask(
        rule, None, None, q.shape[2], k.shape[2], device=q.device, BLOCK_SIZE=(rows, cols)
    )


@lru_cache(maxsize=16)
def mask_rule(pattern: Pattern, n_k: int, device: str) -> Callable:
    """The pattern as a function of indices, for as many queries as keys.

    Windows and sinks are written as their users write them, other patterns band by band, and those
    of many bands as a look-up in the mask of their blocks.
    """
    match pattern:
        case Full():
            return lambda b, h, i, j: j >= 0
        case Causal():
            return lambda b, h, i, j: j <= i
        case SlidingWindow(width, True):
            return lambda b, h, i, j: (j <= i) & (i - j < width)
        case AnyOf((SlidingWindow(width, True), Sinks(sinks))):
            return lambda b, h, i, j: (j <= i) & ((i - j < width) | (j < sinks))
    terms = pattern.at(n_k).terms()
    if len(terms) > 8:
        size = terms[0][0].grain
        n_blocks = -(-n_k // size)
        first = torch.arange(n_blocks, device=device) * size
        table = pattern.at(n_k).allowed(first, first)
        return lambda b, h, i, j: table[i // size, j // size]

    def holds(band, i, j):
        i, j = i // band.grain, j // band.grain
        inside = (i >= band.row_begin) & (i < band.row_end)
        inside = inside & (j >= band.col_begin) & (j < band.col_end)
        on_diagonal = (i - j >= band.low) & (i - j <= band.high) & ((i - j) % band.step == 0)
        return inside & on_diagonal

    def rule(b, h, i, j):
        seen = None
        for term in terms:
            held = holds(term[0], i, j)
            for band in term[1:]:
                held = held & holds(band, i, j)
            seen = held if seen is None else seen | held
        return seen

    return rule


def flash_attention_3(q, k, v, pattern, lists=None) -> Call:
    from flash_attn_interface import flash_attn_func

    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    window = _local(pattern, lists)
    return lambda: flash_attn_func(*rows_first, causal=True, window_size=window).transpose(1, 2)


def flash_attention_2(q, k, v, pattern, lists=None) -> Call:
    """torch's own build of it, whose operator knows a window that SDPA does not pass on."""
    if not q.is_cuda:
        raise Missing("torch's FlashAttention-2 needs a GPU")
    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    left, right = _local(pattern, lists)
    n = q.shape[2]

    def call() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            *rows_first, None, None, n, n, 0.0, True, False,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out.transpose(1, 2)

    return call


def _local(pattern: Pattern, lists: BlockLists | None) -> tuple[int, int]:
    """(keys to the left, keys to the right) of a plain window."""
    if lists is None and isinstance(pattern, SlidingWindow) and pattern.causal:
        return pattern.width - 1, 0
    if lists is None and isinstance(pattern, Causal):
        return -1, 0
    raise Missing("FlashAttention knows windows and nothing else")


def dense_mask(q, k, v, pattern, lists=None) -> Call:
    """SDPA with the mask as a tensor: every block is computed."""
    rows = slice(0, q.shape[2])
    if q.shape[2] * k.shape[2] > 1 << 29:
        raise Missing("the mask alone would take more than half a GiB")
    mask = masked_rows(pattern, lists, q.shape[2], k.shape[2], rows, q.device)

    def call() -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return call


# Backward: the gradient alone, from what the forward pass kept


def ours_backward(q, k, v, d_out, pattern, lists=None) -> Call:
    from llmopt_lab.sparse_attention.kernels import backward_of, sparse_attention_triton, walk_of

    out, lse = sparse_attention_triton(q, k, v, pattern, lists=lists, return_lse=True)
    d_lse, walk = torch.zeros_like(lse), walk_of(q, k, pattern, lists)
    return lambda: backward_of(q, k, v, out, lse, d_out, d_lse, walk, q.shape[3] ** -0.5)


def flex_backward(q, k, v, d_out, pattern, lists=None) -> Call:
    compiled, mask = _compiled_flex(q, k, pattern, lists)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = compiled(*inputs, block_mask=mask)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def flash_attention_2_backward(q, k, v, d_out, pattern, lists=None) -> Call:
    if not q.is_cuda:
        raise Missing("torch's FlashAttention-2 needs a GPU")
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v, d_out)]
    left, right = _local(pattern, lists)
    n, aten = q.shape[2], torch.ops.aten
    window = {"window_size_left": left, "window_size_right": right}
    out, lse, seed, offset, _ = aten._flash_attention_forward(
        *rows[:3], None, None, n, n, 0.0, True, False, **window
    )

    def call() -> tuple[Tensor, ...]:
        grads = aten._flash_attention_backward(
            rows[3], *rows[:3], out, lse, None, None, n, n, 0.0, True, seed, offset, **window
        )
        return tuple(grad.transpose(1, 2) for grad in grads)

    return call


# Lists: the number of live blocks of 128 keys of every block of 128 queries


def lists_oracle(q, k, pattern) -> Tensor:
    made = cover(pattern, q.shape[2], k.shape[2], tile_q=128, tile_k=128, device=q.device)
    return made.n_live


def our_lists(q, k, pattern) -> Call:
    from llmopt_lab.sparse_attention.kernels import walk_of

    walk = walk_of(q, k, pattern)._replace(block_q=128, block_k=128)
    return lambda: walk.lists(of_keys=False)[2][0]


def flex_lists(q, k, pattern) -> Call:
    if gpu_facts() is None:
        raise Missing("flex_attention is only compiled for a GPU here")

    def call() -> Tensor:
        mask = block_mask(q, k, pattern)
        return (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0]

    return call


OURS = Contender("ours", ours, ours=True)
TRITON = Contender("ours in Triton", ours_in_triton, ours=True)
FLEX = Contender("flex_attention", flex)
WINDOW = (
    OURS,
    TRITON,
    FLEX,
    Contender("FlashAttention-3", flash_attention_3),
    Contender("FlashAttention-2", flash_attention_2),
    Contender("SDPA, mask as a tensor", dense_mask),
)
BLOCKS = (OURS, TRITON, FLEX)
BACKWARD = (
    Contender("ours", ours_backward, ours=True),
    Contender("flex_attention", flex_backward),
    Contender("FlashAttention-2", flash_attention_2_backward),
)
LISTS = (
    Contender("ours", our_lists, ours=True),
    Contender("flex_attention, not compiled", flex_lists),
)
