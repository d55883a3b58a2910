"""A KV cache in few bits that enters the Transformer as its attend: KIVI's grouping."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import causal_mask
from llmopt_lab.quantization.reference import pack_int4, quantize, unpack_int4


class CodedBlocks:
    """Matrices (rows, cols) as asymmetric codes, a scale and zero point a row, for all layers."""

    def __init__(
        self, shape: tuple[int, ...], bits: int, dtype: torch.dtype, device: torch.device | str
    ):
        *lead, self.cols = shape  # (n_layers, batch, n_kv_heads, n_blocks, rows), cols
        self.bits = bits
        n_bytes = ceil_div(self.cols, 2) if bits <= 4 else self.cols
        kind = torch.uint8 if bits <= 4 else torch.int8
        self.codes = torch.zeros(*lead, n_bytes, dtype=kind, device=device)
        wide = torch.promote_types(dtype, torch.float32)  # as `quantize` makes them
        self.scales = torch.ones(*lead, 1, dtype=wide, device=device)
        self.zeros = torch.zeros(*lead, 1, dtype=torch.int16, device=device)

    def write(self, layer: int, first: int, x: Tensor) -> None:
        """Quantize x (batch, n_kv_heads, n, rows, cols) into blocks first .. first + n - 1."""
        q = quantize(x.reshape(-1, self.cols), bits=self.bits, symmetric=False)
        codes = pack_int4(q.codes) if self.bits <= 4 else q.codes
        blocks = slice(first, first + x.shape[2])
        for kept, new in ((self.codes, codes), (self.scales, q.scales), (self.zeros, q.zeros)):
            place = kept[layer, :, :, blocks]
            place.copy_(new.view(place.shape))

    def read(self, layer: int, n: int) -> Tensor:
        """The first n blocks dequantized, (batch, n_kv_heads, n, rows, cols)."""
        codes = self.codes[layer, :, :, :n]
        if self.bits <= 4:
            codes = unpack_int4(codes, self.cols)
        scales, zeros = self.scales[layer, :, :, :n], self.zeros[layer, :, :, :n]
        return (codes - zeros) * scales

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes


class QuantizedKVCache:
    """Keys and values in `bits` bits, but for the newest tokens: an attend that caches.

        cache = QuantizedKVCache(config, max_tokens=100, bits=4)
        tokens = generate(model, prompt, 20, cache=cache)

    Keys have outlier channels: a key channel has its scale over a block of tokens. Values have
    none: a value has its scale by token. A block can be quantized only when all its tokens are
    there, so the newest tokens stay in the model's dtype until `residual` of them are there; then
    they are quantized together. New tokens see one another in full precision.

    A forward pass that fails half-way leaves the cache as it was.

    Args:
        bits: 2 to 8; up to 4 are held two a byte, wider ones one a byte.
        block_size: tokens that share a key scale; even.
        residual: a multiple of `block_size`, which is the default.

    Raises:
        BadInput: a size does not fit; at a call, new tokens that do not fit, or NaN.

    Cost: `nbytes`. Every call dequantizes all blocks of a layer: on its own this saves memory and
    no time. Source: Liu et al. 2024, KIVI, section 3.2 (https://arxiv.org/abs/2402.02750), which
    quantizes values one by one as they leave the window, not together.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        *,
        max_tokens: int,
        bits: int = 4,
        block_size: int = 32,
        residual: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        residual = block_size if residual is None else residual
        require(batch > 0, f"batch must be positive; got {batch}")
        require(max_tokens > 0, f"max_tokens must be positive; got {max_tokens}")
        require(isinstance(bits, int) and 2 <= bits <= 8, f"bits must be 2 to 8; got {bits!r}")
        require(
            block_size > 0 and block_size % 2 == 0,
            f"block_size must be positive and even, two codes fill a byte; got {block_size}",
        )
        require(
            residual > 0 and residual % block_size == 0,
            f"residual must be a multiple of block_size = {block_size}; got {residual}",
        )
        self.config, self.max_tokens = config, max_tokens
        self.block_size, self.residual = block_size, residual
        n_blocks, d_head = max_tokens // residual * residual // block_size, config.d_head
        lead = (config.n_layers, batch, config.n_kv_heads, n_blocks)
        self.keys = CodedBlocks((*lead, d_head, block_size), bits, dtype, device)  # row: channel
        self.values = CodedBlocks((*lead, block_size, d_head), bits, dtype, device)  # row: token
        empty = torch.zeros(batch, config.n_kv_heads, 0, d_head, dtype=dtype, device=device)
        self.recent = [(empty, empty)] * config.n_layers  # newest keys and values of each layer
        self._next = list(self.recent)  # the same after the forward pass that is under way
        self.length = 0

    @property
    def n_blocks(self) -> int:
        """Quantized blocks of each layer."""
        return (self.length - self.recent[0][0].shape[2]) // self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and zero points of `max_tokens`, and the newest tokens."""
        floats = {id(x): x.nbytes for pair in self.recent for x in pair}
        return self.keys.nbytes + self.values.nbytes + sum(floats.values())

    def next_positions(self, n: int) -> Tensor:
        """Positions of the next `n` tokens, (batch, n) int64."""
        recent = self.recent[0][0]
        return torch.arange(self.length, self.length + n, device=recent.device).expand(
            len(recent), n
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Append k and v, (batch, n_kv_heads, n, d_head), and attend to all tokens so far."""
        old_k, old_v = self.recent[layer]
        batch, n_kv_heads, _, d_head = old_k.shape
        n = k.shape[2]
        end = self.length + n
        require(
            k.shape == v.shape == (batch, n_kv_heads, n, d_head),
            f"the cache holds {batch} rows of {n_kv_heads} KV heads of width {d_head}; "
            f"got k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
        require(
            k.dtype == old_k.dtype and k.device == old_k.device,
            f"the cache is {old_k.dtype} on {old_k.device}, the keys are {k.dtype} on {k.device}: "
            "make the cache with the model's dtype and device",
        )
        require(
            end <= self.max_tokens,
            f"the cache has room for {self.max_tokens} tokens and holds {self.length}; got {n} "
            "more. Make it with a larger max_tokens.",
        )
        n_blocks = self.n_blocks
        k, v = torch.cat((old_k, k.detach()), 2), torch.cat((old_v, v.detach()), 2)
        keys = self.keys.read(layer, n_blocks).mT.flatten(2, 3).to(k.dtype)
        values = self.values.read(layer, n_blocks).flatten(2, 3).to(v.dtype)
        out = F.scaled_dot_product_attention(
            q,
            torch.cat((keys, k), 2),
            torch.cat((values, v), 2),
            attn_mask=None if n in (1, end) else causal_mask(n, end, q.device),
            is_causal=n == end,
            scale=scale,
            enable_gqa=True,
        )
        full = k.shape[2] // self.residual * self.residual  # tokens to quantize
        if full:
            blocks = (full // self.block_size, self.block_size)
            # beyond n_blocks, so unseen until the last layer is through
            self.keys.write(layer, n_blocks, k[:, :, :full].unflatten(2, blocks).mT)
            self.values.write(layer, n_blocks, v[:, :, :full].unflatten(2, blocks))
        self._next[layer] = k[:, :, full:].clone(), v[:, :, full:].clone()
        if layer == self.config.n_layers - 1:
            self.recent, self.length = list(self._next), end
        return out
