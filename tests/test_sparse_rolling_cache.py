"""The rolling cache with sinks: equal to a loop over tokens that keeps a plain list of keys.

Results are compared as float32: RoPE's tables are float32, whatever the dtype of the model.
"""

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.nn import ModelConfig, Transformer
from llmopt_lab.nn.generate import KVCache, generate
from llmopt_lab.nn.transformer import rope_tables, rotate
from llmopt_lab.sparse_attention.patterns import streaming
from llmopt_lab.sparse_attention.records import Rolled
from llmopt_lab.sparse_attention.rolling_cache import RollingCache, stream_greedy, stream_nats

CONFIG = ModelConfig(
    n_vocab=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=32,
    rope_theta=100.0, max_positions=40,
)  # fmt: skip


def model(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(config).double()
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return built.requires_grad_(False)


def text(n: int) -> torch.Tensor:
    return torch.randint(37, (n,), generator=torch.Generator().manual_seed(3))


class ListOfKeys:
    """The oracle: per layer a list of (token, key before RoPE, value), evicted one at a time."""

    def __init__(self, window: int, n_sinks: int):
        self.window, self.n_sinks = window, n_sinks
        self.kept = {layer: [] for layer in range(CONFIG.n_layers)}

    def place(self, token: int) -> int:
        return min(token, self.n_sinks + self.window - 1)

    def __call__(self, q, k, v, *, layer, scale):
        kept, token = self.kept[layer], self.token

        def turn(x, by):
            cos, sin = rope_tables(CONFIG, torch.tensor([[by]]), x.dtype)
            return rotate(x, cos, sin)

        kept.append((token, turn(k, -self.place(token)), v))
        if len(kept) > self.n_sinks + self.window:
            kept.pop(self.n_sinks)
        keys = torch.cat([turn(key, i) for i, (_, key, _) in enumerate(kept)], 2)
        values = torch.cat([value for *_, value in kept], 2)
        keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
        return (scale * q @ keys.mT).softmax(-1) @ values

    def logits(self, lm: Transformer, tokens: torch.Tensor) -> torch.Tensor:
        rows = []
        for self.token, token in enumerate(tokens.tolist()):
            position = torch.tensor([[self.place(self.token)]])
            rows.append(lm(torch.tensor([[token]]), position, attend=self)[0])
        return torch.cat(rows)


def read(lm, cache, tokens, step):
    parts = tokens.split(step)
    return torch.cat([lm(p[None], cache.next_positions(len(p)), attend=cache)[0] for p in parts])


@pytest.mark.parametrize(("window", "n_sinks"), [(1, 0), (1, 2), (5, 0), (6, 3), (13, 4), (36, 4)])
def test_it_equals_a_list_of_keys_with_the_oldest_taken_out(window, n_sinks):
    lm, tokens = model(), text(47)
    want = ListOfKeys(window, n_sinks).logits(lm, tokens)
    for step in (1, 3, 8):
        cache = RollingCache(CONFIG, window=window, n_sinks=n_sinks, dtype=torch.float64)
        if step > cache.config.max_positions - window - n_sinks + 1:
            continue
        assert_close(read(lm, cache, tokens, step).float(), want, f"step {step}")


def test_before_anything_is_forgotten_it_is_causal_attention():
    lm, tokens = model(), text(20)
    cache = RollingCache(CONFIG, window=16, n_sinks=4, dtype=torch.float64)
    assert_close(read(lm, cache, tokens, 7).float(), lm(tokens[None])[0])


def test_one_layer_without_sinks_sees_what_the_mask_says():
    """Distances inside a window are the text's, so one layer equals attention under the mask."""
    one = ModelConfig(37, 32, 1, 4, 2, 8, 32, rope_theta=100.0, max_positions=40)
    lm, tokens = model(one), text(33)

    def masked(q, k, v, *, layer, scale):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        mask = streaming(5, 0).mask(33, 33)
        return (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    cache = RollingCache(one, window=5, n_sinks=0, dtype=torch.float64)
    assert_close(read(lm, cache, tokens, 4).float(), lm(tokens[None], attend=masked)[0])


def test_it_keeps_the_sinks_and_the_window_in_the_same_bytes():
    cache = RollingCache(CONFIG, window=6, n_sinks=2, dtype=torch.float64)
    before, kept = cache.nbytes, []
    with recording(Rolled) as trace:
        for part in text(31).split(4):
            model()(part[None], cache.next_positions(len(part)), attend=cache)
            kept.append(cache.kept())
    assert kept[0] == [0, 1, 2, 3] and kept[1] == list(range(8))
    assert kept[2] == [0, 1, *range(6, 12)] and kept[-1] == [0, 1, *range(25, 31)]
    assert cache.nbytes == before == 2 * 2 * 2 * 8 * 8 * 8
    assert [r.n_forgotten for r in trace.of(Rolled)] == [0, 0, 4, 4, 4, 4, 4, 3]
    assert str(trace.of(Rolled)[-1]) == (
        "tokens 28 to 30 come in, 3 are forgotten; kept: sinks 0 to 1 and 25 to 30"
    )


def test_positions_never_leave_the_model_however_long_the_text():
    cache = RollingCache(CONFIG, window=30, n_sinks=4)
    lm = model().float()
    for part in text(400).split(cache.max_step):
        for piece in part.split(min(6, cache.max_step)):
            positions = cache.next_positions(len(piece))
            assert positions.max() < CONFIG.max_positions
            lm(piece[None], positions, attend=cache)
    assert cache.length == 400


def test_a_long_text_is_judged_token_by_token():
    lm, tokens = model(), text(60)
    logits = ListOfKeys(9, 2).logits(lm, tokens[:-1])
    want = -logits.log_softmax(-1)[torch.arange(59), tokens[1:]]
    for step in (1, 7, 29):
        cache = RollingCache(CONFIG, window=9, n_sinks=2, dtype=torch.float64)
        assert_close(stream_nats(lm, tokens, cache, step=step).float(), want)


def test_greedy_decoding_goes_on_past_the_models_positions():
    lm, prompt = model(), text(9)
    cache = RollingCache(CONFIG, window=30, n_sinks=4, dtype=torch.float64)
    out = stream_greedy(lm, prompt, 60, cache, step=4)
    assert len(out) == 69 and torch.equal(out[:9], prompt)
    plain = generate(lm, prompt, 20, cache=KVCache(CONFIG, max_tokens=29, dtype=torch.float64))
    assert torch.equal(out[:29], plain)


def test_what_does_not_fit_is_refused():
    for settings, message in [
        ({"window": 0}, "window must be positive"),
        ({"window": 3, "n_sinks": -1}, "n_sinks must not be negative"),
        ({"window": 38, "n_sinks": 4}, "knows 40 positions"),
        ({"window": 3, "batch": 0}, "batch must be positive"),
    ]:
        with pytest.raises(BadInput, match=message):
            RollingCache(CONFIG, **settings)
    lm = model()
    cache = RollingCache(CONFIG, window=9, n_sinks=2, dtype=torch.float64)
    with pytest.raises(BadInput, match="1 to 40 tokens fit"):
        cache.next_positions(41)
    with pytest.raises(BadInput, match="the cache is torch.float32"):
        lm(text(3)[None], attend=RollingCache(CONFIG, window=9))
    with pytest.raises(BadInput, match="the cache holds 1 rows"):
        lm(text(4).view(2, 2), attend=cache)
    assert cache.length == 0 and not cache.keys.any()
    with pytest.raises(BadInput, match="n > 1"):
        stream_nats(lm, text(1), cache)
    cache.length = 3
    with pytest.raises(BadInput, match="must be empty"):
        stream_greedy(lm, text(3), 1, cache)
