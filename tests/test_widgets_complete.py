"""Complete: a model of six tokens writes, the learner interferes, the page gets its answers."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from math import log

import pytest
import torch

pytest.importorskip("anywidget", reason="the widget needs anywidget; GPU test machines lack it")

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.widgets.complete import Complete
from llmopt_lab.widgets.player import MAX_STATE

VOCAB = ["<end>", "\n", "    ", "a", "b", "<c>"]
END, NEWLINE, INDENT, A, B, C = range(6)
LOGITS = torch.tensor(  # row: the last token; column: the next
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-9.0, 0.0, 3.0, 1.0, 0.5, 0.0],
        [-9.0, -1.0, -2.0, 2.0, 2.2, 0.1],
        [-2.0, 0.3, 0.1, 0.0, 3.0, 1.0],
        [0.5, 2.0, 0.1, 1.9, -1.0, 1.0],
        [4.0, 0.2, 0.1, 0.3, 0.4, 0.5],
    ],
    dtype=torch.float64,
)


def bigram(tokens):
    return LOGITS[tokens[-1]].softmax(-1)


def encode(text):
    found = re.findall("|".join(map(re.escape, VOCAB)), text)
    assert "".join(found) == text
    return [VOCAB.index(word) for word in found]


def decode(tokens):
    return "".join(VOCAB[token] for token in tokens)


def complete(prompt="a", **options) -> Complete:
    return Complete(bigram, encode, decode, prompt=prompt, **({"n_shown": 3} | options))


def ask(widget, *requests: dict) -> dict:
    """Send requests as the page does, all of them at once, and return what it then shows."""
    first = widget.shown["n"] + 1
    usual = {"do": "look", "prompt": widget.shown["prompt"], "temperature": 0.0}
    sent = [usual | {"n": first + i} | request for i, request in enumerate(requests)]
    widget.set_state({"asked": sent})
    assert widget.shown["n"] == first + len(requests) - 1
    return widget.shown


STEP, BACK, RESTART = {"do": "step"}, {"do": "back"}, {"do": "restart"}


def drawn(svg: str) -> list[str]:
    return [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def bars(widget) -> list[tuple[str, str]]:
    """(token, percent) of each bar of the chart."""
    words = drawn(widget.shown["chart"])[1:]
    return list(zip(words[0::2], words[1::2], strict=False))[: widget._n_shown + 1]


def test_at_temperature_0_it_writes_what_greedy_decoding_writes():
    widget, tokens = complete(), [A]
    for _ in range(6):
        tokens.append(int(LOGITS[tokens[-1]].argmax()))
        assert ask(widget, STEP)["problem"] == ""
        assert widget.text == decode(tokens)


def test_the_chart_has_the_probabilities_in_order_and_the_rest_as_one_bar():
    widget = complete()
    p = (100 * bigram([A])).tolist()
    want = sorted(range(6), key=lambda token: -p[token])[:3]
    assert [name for name, _ in bars(widget)] == ["“b”", "“<c>”", "“↵”", "3 others"]
    percents = [float(value.removesuffix(" %")) for _, value in bars(widget)]
    assert percents == pytest.approx(
        [*(p[t] for t in want), 100 - sum(p[t] for t in want)], abs=0.06
    )
    assert [row["token"] for row in widget.shown["rows"]] == want == [B, C, NEWLINE]
    assert widget.shown["rows"][0]["label"] == "write “b”, 76.1 %"


def test_a_candidate_button_lies_over_its_bar():
    widget = complete()
    root = ET.fromstring(widget.shown["chart"])
    tops = [float(rect.get("y")) for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    for row, top in zip(widget.shown["rows"], tops[1:4], strict=True):  # the first is the card
        inset = row["y"] - 18  # the panels stand 18 px inside the card
        assert inset <= top and top + 22 <= inset + row["height"]


def test_a_token_the_learner_takes_is_written_and_the_model_goes_on_from_it():
    widget = complete()
    shown = ask(widget, {"do": "take", "token": NEWLINE})
    assert widget.text == "a\n"
    assert shown["caption"].startswith(
        "Token 1: “↵”, your choice at 5.1 %. Next, most probable: “····”"
    )
    ask(widget, STEP)
    assert widget.text == "a\n    "
    assert "your choice" in drawn(widget.shown["text"])


def test_going_back_gives_the_place_before_and_starting_over_the_prompt():
    widget = complete()
    places = [widget.shown]
    for _ in range(3):
        places.append(ask(widget, STEP))
    assert [place["n_written"] for place in places] == [0, 1, 2, 3]
    for before in (places[2], places[1]):
        assert ask(widget, BACK) | {"n": 0} == before | {"n": 0}
    ask(widget, STEP)
    for _ in range(2):
        assert ask(widget, RESTART) | {"n": 0} == places[0] | {"n": 0}
    assert ask(widget, BACK)["n_written"] == 0


def test_at_a_temperature_the_chart_is_the_softmax_of_the_logits_over_it():
    widget = complete()
    for temperature in (0.3, 1.0, 1.7):
        ask(widget, {"temperature": temperature})
        want = (LOGITS[A] / temperature).softmax(-1)
        assert_close(widget._place.p_shown, want)
    title = drawn(widget.shown["chart"])[0]
    assert title == "Next token: drawn at temperature 1.7"


def test_what_comes_next_is_drawn_by_the_probabilities_shown():
    widget = complete(rng=torch.Generator().manual_seed(5))
    counts = torch.zeros(6)
    for i in range(3000):
        ask(widget, {"temperature": 1.5 - 1e-9 * (i % 2)})  # a change draws anew
        counts[widget._place.choice] += 1
    want = (LOGITS[A] / 1.5).softmax(-1)
    spread = (want * (1 - want) / 3000).sqrt()
    assert ((counts / 3000 - want).abs() < 4 * spread).all()


def test_the_token_announced_is_the_token_written():
    widget = complete(rng=torch.Generator().manual_seed(2))
    shown = ask(widget, {"temperature": 2.0})
    outside = 0
    for _ in range(40):
        token = widget._place.choice
        name = re.search(r"Next, drawn: (“.*?”)", shown["caption"])[1]
        assert token in [row["token"] for row in shown["rows"]]
        outside += token not in widget._place.p_shown.topk(3).indices
        assert name == widget._name(token) and bars(widget)[-1][0] == "3 others"
        shown = ask(widget, {"do": "step", "temperature": 2.0})
        assert widget._place.written[-1].token == token
    assert outside > 0  # a token from beyond the chart was announced in it


def test_two_widgets_of_one_seed_write_one_text():
    def written(seed):
        widget = complete(rng=torch.Generator().manual_seed(seed))
        ask(widget, *[{"do": "step", "temperature": 1.5}] * 20)
        return widget.text

    assert written(3) == written(3) != written(4)


@pytest.mark.parametrize("n_equal", [2, 3, 6])
def test_the_hesitation_is_that_between_equally_likely_tokens(n_equal):
    p = torch.tensor([1 / n_equal] * n_equal + [0.0] * (6 - n_equal))
    widget = Complete(lambda tokens: p, encode, decode, prompt="a", n_shown=3)
    assert f"as between {n_equal}.0 equally likely tokens." in widget.shown["caption"]


def test_the_hesitation_of_unequal_tokens_is_the_exponential_of_the_entropy():
    p = [0.7, 0.2, 0.1, 0.0, 0.0, 0.0]
    widget = Complete(lambda tokens: torch.tensor(p), encode, decode, prompt="a", n_shown=3)
    want = 2.718281828 ** -sum(x * log(x) for x in p if x)
    assert f"as between {want:.1f} equally" in widget.shown["caption"]


def test_a_sure_model_is_said_to_be_sure():
    p = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    widget = Complete(lambda tokens: p, encode, decode, prompt="a", n_shown=3)
    assert widget.shown["caption"].endswith("“a”, 100 %. It is all but certain.")


def test_a_new_prompt_starts_over_and_a_step_after_it_is_made():
    widget = complete()
    ask(widget, STEP, STEP)
    assert ask(widget, {"prompt": "b\n"})["n_written"] == 0
    assert widget.text == "b\n"
    ask(widget, STEP)
    ask(widget, {"do": "step", "prompt": "a\n"})
    assert widget.text == "a\n    "


def test_a_candidate_of_the_old_text_is_not_written_after_a_new_prompt():
    widget = complete()
    ask(widget, {"do": "take", "token": C, "prompt": "b"})
    assert widget.text == "b"


def test_an_empty_prompt_gets_an_answer_in_words_and_changes_nothing():
    widget = complete()
    before = ask(widget, STEP)
    shown = ask(widget, {"do": "step", "prompt": ""})
    assert shown["problem"] == "The prompt is empty. Type something for the model to continue."
    assert shown | {"n": 0, "problem": ""} == before | {"n": 0}
    assert ask(widget, STEP)["problem"] == "" and widget._place.written[1:]


def test_a_model_that_refuses_a_long_text_is_quoted_and_nothing_is_written():
    def short(tokens):
        if len(tokens) > 3:
            raise BadInput(f"room for 3 tokens; got {len(tokens)}")
        return bigram(tokens)

    widget = Complete(short, encode, decode, prompt="a", n_shown=3)
    shown = ask(widget, STEP, STEP, STEP)
    assert shown["problem"] == "room for 3 tokens; got 4"
    assert shown["n_written"] == 2 and len(widget.text) == len("ab\n")
    assert ask(widget, {"prompt": "aaaa"})["problem"] == "room for 3 tokens; got 4"
    assert ask(widget, BACK)["problem"] == ""


def test_a_function_of_the_learner_that_breaks_is_reported_in_words():
    def broken(tokens):
        return bigram(tokens) if len(tokens) < 2 else {}["nothing"]

    widget = Complete(broken, encode, decode, prompt="a", n_shown=3)
    assert ask(widget, STEP)["problem"] == "KeyError: 'nothing'"
    assert widget.text == "a"


def test_the_text_ends_at_an_end_token_until_the_learner_goes_back():
    widget = complete(eos=[END])
    ask(widget, {"do": "take", "token": C}, STEP)
    assert widget.text == "a<c><end>" and widget.shown["ended"]
    assert widget.shown["caption"].endswith("With it the model ends its text.")
    for request in (STEP, {"do": "take", "token": A}):
        assert "has ended" in ask(widget, request)["problem"]
    assert not ask(widget, BACK)["ended"]


def test_an_end_token_in_the_prompt_ends_nothing():
    widget = complete("<end>a", eos=[END])
    ask(widget, STEP)
    assert widget.text == "<end>ab"
    assert ask(complete("a<end>", eos=[END]), STEP)["problem"] == ""


def test_requests_that_were_answered_are_not_answered_again():
    widget = complete()
    request = {"n": 1, "do": "step", "prompt": "a", "temperature": 0.0}
    widget.set_state({"asked": [request]})
    widget.set_state({"asked": [request, request | {"n": 2}]})
    assert widget.shown["n_written"] == 2 and widget.shown["n"] == 2


def test_spaces_and_line_ends_of_the_text_are_visible():
    widget = complete("a\n    b")
    assert drawn(widget.shown["text"])[1:5] == ["a", "↵", "····", "b"]


def test_a_long_text_shows_its_end_and_stays_small():
    widget = complete("ab" * 3000)
    ask(widget, *[STEP] * 5)
    assert "5,805 tokens before" in drawn(widget.shown["text"])
    assert len(json.dumps(widget.shown).encode()) < MAX_STATE / 8


def html_of(widget) -> str:
    bundle = widget._repr_mimebundle_()
    return (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]


def test_the_stored_output_is_a_picture_of_the_first_steps_and_takes_none():
    widget = complete()
    html = html_of(widget)
    assert html == html_of(widget) == html_of(complete())
    assert "<script" not in html and "<style" not in html
    assert widget.text == "a"
    root = ET.fromstring(f"<div>{html}</div>")
    text, chart = (
        base64.b64decode(image.get("src").removeprefix("data:image/svg+xml;base64,")).decode()
        for image in root.iter("img")
    )
    assert "1 token of prompt, 12 after it" in text and "prefers-color-scheme:dark" in chart
    said = [image.get("alt") for image in root.iter("img")]
    assert said[0].startswith("The text so far: ab")
    assert re.fullmatch(
        r"The most probable next tokens: (“.+” [\d.]+ %, ){3}3 others .* %\.", said[1]
    )
    steps = [item.text for item in root.iter("li")]
    assert len(steps) == 13 and steps[0] == widget.shown["caption"]
    ask(widget, *[STEP] * 12)
    assert steps[-1] == widget.shown["caption"]


def test_the_stored_picture_stops_where_the_text_ends_or_the_room_does():
    def short(tokens):
        if len(tokens) > 3:
            raise BadInput("no room")
        return bigram(tokens)

    assert html_of(Complete(short, encode, decode, prompt="a", n_shown=3)).count("<li>") == 3
    assert html_of(complete("<c>", eos=[END])).count("<li>") == 2


def test_the_bundle_offers_the_live_widget_and_a_steady_text():
    widget = complete()
    ask(widget, STEP)
    data = widget._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == "Complete('a' and 1 token after it)"
    assert Complete._ipython_display_ is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: complete(""), "The prompt is empty"),
        (lambda: complete(n_shown=1), "n_shown must be at least 2; got 1|n_shown .* got 1"),
        (lambda: complete(n_shown=7), r"\(n_vocab,\) of 7 tokens or more; got \(6,\)"),
        (
            lambda: Complete(lambda t: LOGITS[A], encode, decode, prompt="a", n_shown=3),
            "none negative, of sum 1; the least is -2.*take the softmax",
        ),
        (
            lambda: Complete(lambda t: LOGITS.softmax(-1), encode, decode, prompt="a", n_shown=3),
            r"got \(6, 6\)",
        ),
        (
            lambda: Complete(
                lambda t: torch.full((6,), torch.nan), encode, decode, prompt="a", n_shown=3
            ),
            "the least is nan",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_at_once(make, says):
    with pytest.raises(BadInput, match=says):
        make()
