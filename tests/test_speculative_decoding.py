"""Speculative decoding: the output is the target's. Proved by listing every outcome, then measured.

The oracle of a distribution is the target's own chain of conditional probabilities, multiplied out;
that of greedy text is plain decoding, ours and transformers'.
"""

import itertools
import math

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding import cases, reference, speed, tree
from llmopt_lab.speculative_decoding.cases import TableModel
from llmopt_lab.speculative_decoding.chance import Dice, outcomes
from llmopt_lab.speculative_decoding.drafts import PromptLookup, check_same_vocabulary, skip_layers
from llmopt_lab.speculative_decoding.reader import Reader, tree_mask
from llmopt_lab.speculative_decoding.records import ROOT, Added, Guessed, Judged, Read
from llmopt_lab.speculative_decoding.reference import ModelDraft, residual, speculative_decode
from llmopt_lab.speculative_decoding.speed import AdaptiveK, best_k, break_even, expected_tokens
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree

PROMPT = torch.tensor([0, 2])


def models(n_vocab: int = 3, *, share: float = 0.5) -> tuple[TableModel, TableModel]:
    """A fresh target and a draft that resembles it."""
    like = (TableModel(n_vocab, 1), share)
    return TableModel(n_vocab, 1), TableModel(n_vocab, 2, like=like, name="draft")


def true_distribution(n_new: int, filtered=lambda p: p, *, n_vocab: int = 3, eos: int = -1):
    """Every text that the target can write and its probability, one token after the other."""
    target, found = TableModel(n_vocab, 1), {}

    def write(text: list[int], weight: float) -> None:
        if len(text) == len(PROMPT) + n_new or (len(text) > len(PROMPT) and text[-1] == eos):
            found[tuple(text)] = weight
            return
        p = filtered(target.logits(text))
        for token in range(n_vocab):
            if p[token] > 0:
                write([*text, token], weight * float(p[token]))

    write(PROMPT.tolist(), 1.0)
    return found


def largest_error(got: dict, want: dict) -> float:
    return max(abs(got.get(text, 0.0) - want.get(text, 0.0)) for text in {*got, *want})


def chain_outcomes(*, n_vocab: int = 3, share: float = 0.5, k=2, **settings):
    def program(dice):
        target, draft = models(n_vocab, share=share)
        how = AdaptiveK(**k) if isinstance(k, dict) else k
        return tuple(
            speculative_decode(target, draft, PROMPT, k=how, rng=dice, **settings).tolist()
        )

    return outcomes(program)


# The distribution is the target's


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_every_text_has_the_targets_probability(k, share):
    got = chain_outcomes(share=share, k=k, n_new=4, temperature=1.0)
    want = true_distribution(4, lambda logits: logits.softmax(0))
    assert len(want) == 81 and largest_error(got, want) < 1e-12


def keep_two(logits):
    p = logits.softmax(0)
    p[p.argmin()] = 0
    return p / p.sum()


def nucleus(logits):
    p = (logits / 0.7).softmax(0)
    kept, mass = torch.zeros_like(p), 0.0
    for token in sorted(range(3), key=lambda t: -float(p[t])):
        if mass < 0.8:
            kept[token] = p[token]
        mass += float(p[token])
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("settings", "filtered"),
    [
        ({"temperature": 0.5}, lambda logits: (2 * logits).softmax(0)),
        ({"temperature": 1.0, "top_k": 2}, keep_two),
        ({"temperature": 0.7, "top_p": 0.8}, nucleus),
        ({"temperature": 0.0}, lambda logits: (logits == logits.max()).double()),
    ],
)
def test_temperature_top_k_and_top_p_give_the_targets_filtered_distribution(settings, filtered):
    got = chain_outcomes(n_new=4, **settings)
    assert largest_error(got, true_distribution(4, filtered)) < 1e-12


def test_a_text_that_ends_at_eos_has_the_targets_probability_too():
    got = chain_outcomes(k=3, n_new=4, temperature=1.0, eos=1)
    want = true_distribution(4, lambda logits: logits.softmax(0), eos=1)
    assert any(len(text) < 6 for text in want) and largest_error(got, want) < 1e-12


def test_guessing_further_or_less_far_after_what_was_seen_changes_no_probability():
    start = {"c": 0.3, "most": 3, "alpha": 0.5, "memory": 2.0}
    got = chain_outcomes(k=start, n_new=4, temperature=1.0)
    assert largest_error(got, true_distribution(4, lambda logits: logits.softmax(0))) < 1e-12


@pytest.mark.parametrize(
    ("widths", "proposals"),
    [*itertools.product([(2, 1), (1, 2), (3,)], tree.PROPOSALS), ((2, 2), "top")],
)
def test_every_text_from_a_tree_has_the_targets_probability(widths, proposals):
    def program(dice):
        settings = {"rng": dice, "temperature": 1.0, "n_new": 3, "proposals": proposals}
        out = speculative_decode_tree(*models(), PROMPT, widths=widths, **settings)
        return tuple(out.tolist())

    want = true_distribution(3, lambda logits: logits.softmax(0))
    assert largest_error(outcomes(program), want) < 1e-12


WRONG_RULES = {
    "resample from p": ("residual", lambda p, q: p),
    "keep with chance p": ("chance_to_keep", lambda token, p, q: float(p[token])),
    "keep what p finds likely": ("chance_to_keep", lambda token, p, q: float(p[token] > 0.3)),
    "turn the ratio over": ("chance_to_keep", lambda token, p, q: float(q[token] / p[token])),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_the_proof_sees_a_wrong_rule(name, monkeypatch):
    monkeypatch.setattr(reference, *WRONG_RULES[name])
    got = chain_outcomes(n_new=3, temperature=1.0)
    assert largest_error(got, true_distribution(3, lambda logits: logits.softmax(0))) > 1e-3


def test_a_guess_is_kept_with_chance_one_minus_total_variation():
    def program(dice):
        with recording(Judged) as trace:
            target, draft = models()
            speculative_decode(target, draft, PROMPT, k=1, n_new=2, rng=dice, temperature=1.0)
        return trace.of(Judged)[0].accepted

    target, draft = models()
    p, q = (model.logits(PROMPT.tolist()).softmax(0) for model in (target, draft))
    kept = outcomes(program)[True]
    assert abs(kept - (1 - (p - q).abs().sum() / 2)) < 1e-12
    assert abs(kept - reference.overlap(p, q)) < 1e-12


def test_the_residual_is_what_is_missing():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    assert residual(p, q).tolist() == [1, 0, 0]
    assert torch.equal(residual(p, p), p)  # reached by rounding only


# Listing outcomes


def test_outcomes_are_those_of_the_dice():
    def program(dice):
        if dice.happens(0.25):
            return "early"
        return dice.pick(torch.tensor([0.5, 0.0, 0.5]))

    assert outcomes(program) == {"early": 0.25, 0: 0.375, 2: 0.375}


def test_a_program_that_remembers_its_last_run_is_refused():
    draws = []

    def program(dice):
        draws.append(dice.pick(torch.full((2 + len(draws) // 2,), 1.0) / (2 + len(draws) // 2)))
        return dice.pick(torch.tensor([0.5, 0.5]))

    with pytest.raises(BadInput, match="depend on its dice alone"):
        outcomes(program)


def test_too_many_ways_are_refused():
    with pytest.raises(BadInput, match="more than 10 ways"):
        outcomes(lambda dice: sum(dice.happens(0.5) for _ in range(4)), max_runs=10)


def test_dice_draw_with_their_generator():
    dice = Dice(torch.Generator().manual_seed(0))
    p = torch.tensor([0.2, 0.5, 0.3])
    picked = torch.tensor([dice.pick(p) for _ in range(4000)]).bincount(minlength=3) / 4000
    # 4 standard deviations
    assert ((picked - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()
    happened = sum(dice.happens(0.3) for _ in range(4000)) / 4000
    assert abs(happened - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


# Greedy text


@pytest.fixture(scope="module")
def lab():
    return load("lab-target", device="cpu"), load("lab-draft", device="cpu")


CODE = "def sum_of_squares(values):\n    total = 0\n    for value in values:\n"


def drafts(target, draft):
    return {
        "a small model": draft.model,
        "the text itself": PromptLookup(target.config.n_vocab),
        "skipped layers": skip_layers(target.model, [0, target.config.n_layers - 1]),
    }


@pytest.mark.parametrize("kind", ["a small model", "the text itself", "skipped layers"])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_greedy_text_is_plain_decodings_token_for_token(lab, kind, k):
    target, draft = lab
    prompt = target.encode(CODE)
    want = generate(target.model, prompt, 48)
    got = speculative_decode(target.model, drafts(*lab)[kind], prompt, k=k, n_new=48)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("widths", "proposals"), [((3, 2, 1), "top"), ((1, 1), "distinct")])
def test_greedy_text_from_a_tree_is_plain_decodings(lab, widths, proposals):
    target, draft = lab
    prompt = target.encode(CODE)
    got = speculative_decode_tree(
        target.model, draft.model, prompt, widths=widths, n_new=48, proposals=proposals
    )
    assert torch.equal(got, generate(target.model, prompt, 48))


def test_adaptive_greedy_text_is_plain_decodings(lab):
    target, draft = lab
    prompt = target.encode(CODE)
    k = AdaptiveK(c=0.15)
    got = speculative_decode(target.model, draft.model, prompt, k=k, n_new=48)
    assert torch.equal(got, generate(target.model, prompt, 48)) and k.alpha != 0.8


def test_a_tree_keeps_more_than_a_chain_of_its_depth(lab):
    target, draft = lab
    prompt, kept = target.encode(CODE), []
    for widths in ((1, 1, 1), (4, 2, 1)):
        with recording(Added) as trace:
            settings = {"widths": widths, "n_new": 60, "proposals": "top"}
            speculative_decode_tree(target.model, draft.model, prompt, **settings)
        kept.append(60 / len(trace.of(Added)))
    assert kept[1] > kept[0] > 1


# Caches


@pytest.fixture
def pair():
    model = cases.random_model()
    return model, skip_layers(model, [1])


def run_with_readers(pair, *, n_new=20, k=3):
    model, short = pair
    target = Reader(model, max_tokens=30)
    draft = ModelDraft(short, max_tokens=30, name="draft")
    settings = {"temperature": 1.0, "rng": torch.Generator().manual_seed(3)}
    with recording() as trace:
        out = speculative_decode(target, draft, PROMPT, k=k, n_new=n_new, **settings)
    return target, draft, out, trace


def test_after_the_rounds_both_caches_hold_the_text_and_nothing_else(pair):
    target, draft, out, trace = run_with_readers(pair)
    assert any(not judged.accepted for judged in trace.of(Judged))
    assert target.length == len(out) - 1 and draft.length <= len(out) - 1
    for reader in (target, draft):
        fresh = Reader(reader.model, max_tokens=30)
        fresh.read(out[: reader.length].tolist(), n_last=1)
        held = slice(0, reader.length)
        for got, want in ((reader.cache.keys, fresh.cache.keys),
                          (reader.cache.values, fresh.cache.values)):  # fmt: skip
            torch.testing.assert_close(got[:, :, :, held], want[:, :, :, held])


def test_when_all_guesses_are_kept_the_draft_catches_up_by_two_tokens():
    target, draft = models(share=1.0)  # the same distributions: nothing is refused
    with recording() as trace:
        rng = torch.Generator().manual_seed(0)
        speculative_decode(target, draft, PROMPT, k=3, n_new=8, rng=rng, temperature=1.0)
    assert [read.n for read in trace.of(Read) if read.who == "draft"] == [2, 1, 1, 2, 1, 1]
    assert [read.n for read in trace.of(Read) if read.who == "target"] == [5, 4]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_round_reads_the_targets_weights_once_and_the_drafts_k_times(pair, k):
    """The cost that the docstring states, in bytes of weights, from the passes that took place."""
    target, draft, _, trace = run_with_readers(pair, k=k)
    nbytes = {
        reader.name: sum(weight.nbytes for weight in reader.model.parameters())
        for reader in (target, draft)
    }
    got = sum(nbytes[read.who] for read in trace.of(Read))
    n_rounds, guesses = len(trace.of(Added)), [len(guessed.tokens) for guessed in trace.of(Guessed)]
    assert guesses[0] == k and max(guesses) == k  # fewer at the end of the text only
    assert got == n_rounds * nbytes["target"] + sum(guesses) * nbytes["draft"]


def test_a_round_never_guesses_past_the_end():
    for n_new in range(6):
        with recording() as trace:
            target, draft = models(share=1.0)
            rng = torch.Generator().manual_seed(0)
            out = speculative_decode(
                target, draft, PROMPT, k=4, n_new=n_new, rng=rng, temperature=1.0
            )
        assert len(out) == 2 + n_new
        first = [len(guessed.tokens) for guessed in trace.of(Guessed)][:1]
        assert first == ([min(4, n_new - 1)] if n_new else [])


def test_a_reader_reads_on_after_it_rewound(pair):
    model, _ = pair
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    want = model(torch.tensor([tokens]))[0]
    reader = Reader(model, max_tokens=12)
    reader.read([3, 1, 4, 8, 8, 8], n_last=1)
    reader.rewind(3)
    torch.testing.assert_close(reader.read(tokens[3:], n_last=5), want[3:])
    reader.rewind(100)
    assert reader.length == 8


def test_a_tree_gives_each_node_the_logits_of_its_own_path(pair):
    model, _ = pair
    text, nodes, parents = [3, 1, 4], [5, 6, 7, 8, 9, 5], [ROOT, ROOT, 0, 0, 1, 4]
    paths = [[5], [6], [5, 7], [5, 8], [6, 9], [6, 9, 5]]
    want = torch.stack([model(torch.tensor([text + path]))[0, -1] for path in paths])
    at_once = Reader(model, max_tokens=6, n_nodes=6)
    got = at_once.read(text + nodes, n_last=6, parents=parents)
    torch.testing.assert_close(got, want)
    by_depth = Reader(model, max_tokens=6, n_nodes=6)
    by_depth.read(text, n_last=1)
    for new in (slice(0, 2), slice(2, 5), slice(5, 6)):
        got = by_depth.read(nodes[new], n_last=len(nodes[new]), parents=parents[new])
        torch.testing.assert_close(got, want[new])
    for reader in (at_once, by_depth):
        assert reader.length == 3
        reader.keep([1, 4])
        assert reader.length == 5
        after = model(torch.tensor([[*text, 6, 9, 2]]))[0, -1]
        torch.testing.assert_close(reader.read([2], n_last=1)[0], after)


def test_a_node_sees_itself_and_its_ancestors():
    mask, depths = tree_mask([ROOT, 0, 0, 2, ROOT])
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 2], [0, 2, 3], [4]] and depths == [0, 1, 1, 2, 0]


# Drafts


def lookup(text, k=4, **settings):
    draft = PromptLookup(30, **settings)
    return draft.guess(text, k, reference.Sampling(), Dice()).tokens


def test_prompt_lookup_prefers_the_longest_and_then_the_latest_match():
    assert lookup([1, 2, 3, 9, 2, 3, 8, 7, 2, 3]) == [8, 7, 2, 3]
    assert lookup([1, 2, 3, 9, 5, 2, 3, 8, 7, 1, 2, 3]) == [9, 5, 2, 3]
    assert lookup([1, 2, 3, 9, 5, 2, 3, 8, 7, 1, 2, 3], longest=2) == [8, 7, 1, 2]


def test_prompt_lookup_has_no_guess_where_nothing_repeats():
    assert lookup([1, 2, 3]) == lookup([1]) == lookup([4, 1, 2, 4, 5, 6], shortest=2) == []


@pytest.mark.parametrize("seed", range(20))
def test_prompt_lookup_finds_what_a_plain_search_finds(seed):
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 3, (12,), generator=rng).tolist()
    best = []
    for n in (1, 2, 3):  # a longer match overwrites a shorter one, a later place an earlier one
        for start in range(len(text) - n):
            if text[start : start + n] == text[len(text) - n :]:
                best = text[start + n :]
    assert lookup(text, k=5) == best[:5]


def test_lookup_guesses_keep_the_distribution():
    def program(dice):
        target = TableModel(3, 1)
        settings = {"k": 2, "n_new": 3, "rng": dice, "temperature": 1.0}
        return tuple(speculative_decode(target, PromptLookup(3), PROMPT, **settings).tolist())

    want = true_distribution(3, lambda logits: logits.softmax(0))
    assert largest_error(outcomes(program), want) < 1e-12


def test_skipped_layers_share_the_weights(pair):
    model, short = pair
    assert short.layers[0].mlp.down_proj.weight is not None
    ours, theirs = short.state_dict(), model.state_dict()
    for name, weight in ours.items():
        whole = theirs[name.replace("layers.0.", "layers.1.")]
        assert weight.data_ptr() == whole.data_ptr(), name
    tokens = torch.tensor([[3, 1, 4]])
    everything = skip_layers(model, [0, 1])
    assert torch.equal(everything(tokens), model(tokens))


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [2], [-1]])
def test_layers_that_are_not_there_are_refused(pair, keep):
    with pytest.raises(BadInput, match="keep some of the layers 0 to 1, in order"):
        skip_layers(pair[0], keep)


# Speed


@pytest.mark.parametrize(
    ("alpha", "k"), [*itertools.product([0.0, 0.3, 0.6, 0.9, 1.0], [0, 1, 4, 8])]
)
def test_expected_tokens_is_the_mean_over_the_first_refusal(alpha, k):
    want = sum(alpha**i * (1 - alpha) * (i + 1) for i in range(k)) + alpha**k * (k + 1)
    assert math.isclose(expected_tokens(alpha, k), want, rel_tol=1e-12)
    if alpha < 1:
        closed = (1 - alpha ** (k + 1)) / (1 - alpha)
        assert math.isclose(expected_tokens(alpha, k), closed, rel_tol=1e-12)


class Constant(TableModel):
    """The same logits after every text: acceptance is independent from place to place."""

    def logits(self, text):
        return super().logits([])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_tokens_a_target_call_follow_the_formula_where_acceptance_is_independent(k):
    target = Constant(6, 1)
    draft = Constant(6, 2, like=(TableModel(6, 1), 0.5), name="draft")
    alpha = reference.overlap(target.logits([]).softmax(0), draft.logits([]).softmax(0))
    n_new, rng = 6000, torch.Generator().manual_seed(0)
    with recording(Added) as trace:
        speculative_decode(target, draft, PROMPT, k=k, n_new=n_new, rng=rng, temperature=1.0)
    assert 0.5 < alpha < 0.95
    assert abs(n_new / len(trace.of(Added)) / expected_tokens(alpha, k) - 1) < 0.03


def test_the_best_k_is_the_one_a_search_finds():
    for alpha, c in itertools.product([0.1, 0.5, 0.8, 0.95], [0.0, 0.02, 0.15, 0.5]):
        best = best_k(alpha, c)
        times = [speed.speedup(alpha, k, c) for k in range(33)]
        assert times[best] == max(times) and (best == 0 or times[best - 1] < times[best])
    assert best_k(0.3, 0.4) == 0  # not worth one guess


def test_where_speculation_breaks_even():
    alpha = break_even(4, 0.15)
    assert math.isclose(speed.speedup(alpha, 4, 0.15), 1.0, rel_tol=1e-9)
    assert break_even(1, 1.5) == math.inf
    # a batch so large that 5 rows cost 5 times 1 row: it can only lose
    assert break_even(4, 0.01, verify=5.0) == math.inf


def test_adaptive_k_follows_what_is_kept():
    k = AdaptiveK(c=0.1, most=8)
    for _ in range(40):
        k.learn(k.choose(), 0)
    assert k.choose() == 1 and k.alpha < 0.15
    for _ in range(60):
        n = k.choose()
        k.learn(n, n)
    assert k.choose() == 8


# Bad input


def test_another_vocabulary_is_refused_before_any_work():
    with pytest.raises(BadInput, match=r"share one vocabulary; theirs have 3 and 5 tokens"):
        speculative_decode(TableModel(3, 1), TableModel(5, 1), PROMPT, k=2, n_new=3)


def test_tokenizers_that_number_tokens_otherwise_are_refused(lab):
    target, draft = lab
    check_same_vocabulary(target, draft)
    with pytest.raises(BadInput, match="different vocabularies: '!' is token 1 of the one and 17"):
        check_same_vocabulary(target, load("smollm2-135m", device="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": -1}, "k must not be negative; got -1"),
        ({"n_new": -1}, "n_new must not be negative; got -1"),
        ({"prompt": torch.tensor([[1]])}, r"prompt must be \(n,\) int64"),
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "with n >= 1"),
        ({"temperature": 1.0}, "needs rng=torch.Generator"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    target, draft = models()
    settings = {"prompt": PROMPT, "k": 2, "n_new": 3} | change
    with pytest.raises(BadInput, match=message):
        speculative_decode(target, draft, settings.pop("prompt"), **settings)
    assert target.length == 0


def test_a_used_reader_is_refused():
    target, draft = models()
    target.read([1], n_last=1)
    with pytest.raises(BadInput, match="has read 1 tokens already"):
        speculative_decode(target, draft, PROMPT, k=2, n_new=3)


# Where a text ends


def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(lab):
    target, draft = lab
    prompt = target.encode(CODE)
    stop = reference.stop_strings(["return"], target.decode)
    got = speculative_decode(target.model, draft.model, prompt, k=5, n_new=60, stop=stop)
    plain = generate(target.model, prompt, 60)
    text = target.decode(got[len(prompt) :])
    assert text.endswith("return") and torch.equal(got, plain[: len(got)])
    assert "return" not in target.decode(got[len(prompt) : -1])


def test_each_token_that_stays_is_told_once(lab):
    target, draft = lab
    prompt, told = target.encode(CODE), []
    newline = int(target.encode("\n", add_special_tokens=False)[0])
    got = speculative_decode(
        target.model, draft.model, prompt, k=5, n_new=40, eos=newline, on_token=told.append
    )
    assert told == got[len(prompt) :].tolist()
    plain = generate(target.model, prompt, 40, eos=newline)
    assert torch.equal(got, plain)
