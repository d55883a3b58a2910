"""A model completes a prompt token by token, and the learner may choose otherwise.

lm = load("lab-target")
Complete(NextToken(lm.model), lm.encode, lm.decode, prompt="def add(a, b):\n", eos=lm.eos)
"""

import base64
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path

import anywidget
import torch
import traitlets
from torch import Tensor

from llmopt_lab.core.errors import LabError, require
from llmopt_lab.widgets.draw import (
    BAR_PITCH,
    CARD_PAD,
    TITLE_HEIGHT,
    draw_series,
    number,
    standalone,
    visible,
)
from llmopt_lab.widgets.looks import PLAYER_CSS
from llmopt_lab.widgets.panels import Bar, Bars, Frame, Token, Tokens

HERE = Path(__file__).parent
TEXT_WIDTH, CHART_WIDTH = 460, 400  # px
MAX_TOKENS_SHOWN = 200  # the last of a text
N_STILL = 12  # tokens after the prompt in the picture that a notebook stores


@dataclass(frozen=True)
class Written:
    """One token after the prompt."""

    token: int
    probability: float  # that it had, at the temperature then set
    by_learner: bool


@dataclass(frozen=True)
class Place:
    """A text so far, and what the model expects next."""

    prompt: tuple[int, ...]
    written: tuple[Written, ...]
    p: Tensor  # (n_vocab,) float64, the model's own
    temperature: float
    choice: int  # the token that comes next, unless the learner takes another

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(w.token for w in self.written)]

    @cached_property
    def p_shown(self) -> Tensor:
        """The probabilities that the next token is drawn from; the model's own if none is drawn."""
        return _at_temperature(self.p, self.temperature)


class Complete(anywidget.AnyWidget):
    """Watch a model write: its most probable next tokens, one step at a time or playing.

    The learner types a prompt, writes one token or plays, goes back, sets the temperature (0 takes
    the most probable token, above 0 one is drawn), and clicks a candidate to write that one.

    Args:
        next_token: tokens (list of int) -> probabilities of the next one, (n_vocab,).
        encode: text -> tokens, a list or a tensor (n,).
        decode: tokens (list of int) -> text.
        prompt: to start with.
        eos: the text ends after any of these tokens.
        n_shown: candidates in the chart.
        rng: draws at temperatures above 0; a generator of seed 0 if None.

    What the learner asks for and is not possible, such as an empty prompt, is answered in words.

    Raises:
        BadInput: a prompt that the model refuses, probabilities that are none, n_shown below 2.

    Cost: one call of next_token for each token that the learner asks for, and twelve when the
        widget is displayed, for the picture that the notebook stores.
    """

    _esm = (HERE / "page.js").read_text() + (HERE / "complete.js").read_text()
    _css = (HERE / "page.css").read_text() + PLAYER_CSS
    _ipython_display_ = None  # that of ipywidgets 7 would win over the bundle and its picture

    # What the page asks for and has no answer to yet, oldest first: {"n", "do", "prompt",
    # "temperature", "token"}. A list, because a page in a hurry sends its last state only.
    asked = traitlets.List(traitlets.Dict()).tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)  # the picture in words and SVG, and the last n answered

    def __init__(
        self,
        next_token: Callable[[list[int]], Tensor],
        encode: Callable[[str], Sequence[int] | Tensor],
        decode: Callable[[list[int]], str],
        *,
        prompt: str,
        eos: Collection[int] = (),
        n_shown: int = 8,
        rng: torch.Generator | None = None,
    ):
        require(n_shown >= 2, f"n_shown must be at least 2, to have a choice; got {n_shown}")
        self._next_token, self._encode, self._decode = next_token, encode, decode
        self._eos, self._n_shown = frozenset(eos), n_shown
        self._rng = rng or torch.Generator().manual_seed(0)
        self._start(prompt, temperature=0.0)
        super().__init__(shown=self._picture(self._place, answered=0))

    @property
    def text(self) -> str:
        """The prompt and what has been written after it."""
        return self._decode(self._place.tokens)

    def _start(self, prompt: str, temperature: float) -> None:
        require(prompt != "", "The prompt is empty. Type something for the model to continue.")
        tokens = tuple(int(token) for token in self._encode(prompt))
        self._place = self._at(tokens, (), temperature)
        self._prompt = prompt

    def _at(
        self, prompt: tuple[int, ...], written: tuple[Written, ...], temperature: float
    ) -> Place:
        p = self._next_token([*prompt, *(w.token for w in written)])
        p = torch.as_tensor(p).detach().cpu().double()
        require(
            p.dim() == 1 and len(p) >= self._n_shown,
            f"next_token must return the probabilities (n_vocab,) of {self._n_shown} tokens or "
            f"more; got {tuple(p.shape)}",
        )
        require(
            bool((p >= 0).all()) and abs(float(p.sum()) - 1) < 1e-3,
            f"next_token must return probabilities, none negative, of sum 1; the least is "
            f"{float(p.min()):.3g}, the sum {float(p.sum()):.3g}. For logits, take the softmax.",
        )
        return Place(prompt, written, p, temperature, self._choose(p, temperature))

    def _choose(self, p: Tensor, temperature: float) -> int:
        if temperature == 0:
            return int(p.argmax())
        return int(torch.multinomial(_at_temperature(p, temperature), 1, generator=self._rng))

    def _write(self, place: Place, token: int, by_learner: bool) -> Place:
        require(not self._ended(place), "The text has ended. Go back, or start over.")
        written = Written(token, float(place.p_shown[token]), by_learner)
        return self._at(place.prompt, (*place.written, written), place.temperature)

    def _ended(self, place: Place) -> bool:
        return bool(place.written) and place.written[-1].token in self._eos

    @traitlets.observe("asked")
    def _answer(self, change):
        answered, problem = self.shown["n"], ""
        for request in change["new"]:
            if request["n"] > answered:
                answered = request["n"]
                try:
                    self._do(**request)
                    problem = ""
                except LabError as refused:
                    problem = str(refused)
                except Exception as failed:  # the page waits until it gets an answer
                    problem = f"{type(failed).__name__}: {failed}"
        self.shown = self._picture(self._place, answered, problem)

    def _do(self, n: int, do: str, prompt: str, temperature: float, token: int = 0) -> None:
        if prompt != self._prompt:
            self._start(prompt, temperature)
            do = "step" if do == "step" else "look"  # anything else was meant for the old text
        place = self._place
        if temperature != place.temperature:
            choice = self._choose(place.p, temperature)
            place = replace(place, temperature=temperature, choice=choice)
        match do:
            case "step":
                place = self._write(place, place.choice, by_learner=False)
            case "take":
                place = self._write(place, token, by_learner=True)
            case "back":
                place = self._at(place.prompt, place.written[:-1], temperature)
            case "restart":
                place = self._at(place.prompt, (), temperature)
        self._place = place

    def _picture(self, place: Place, answered: int, problem: str = "") -> dict:
        """What the page shows: two pictures, words, and where in the chart each candidate is."""
        candidates = self._candidates(place)
        rows = [
            {
                "token": token,
                "label": f"write {self._name(token)}, {_percent(place.p_shown[token])}",
                "y": CARD_PAD + TITLE_HEIGHT - 4 + BAR_PITCH * i,  # in the chart, px
                "height": BAR_PITCH,
            }
            for i, token in enumerate(candidates)
        ]
        return {
            "n": answered,
            "text": "".join(_draw(self._text_frame(place), TEXT_WIDTH)),
            "chart": "".join(_draw(self._chart(place, candidates), CHART_WIDTH)),
            "caption": self._caption(place),
            "rows": rows,
            "n_written": len(place.written),
            "ended": self._ended(place),
            "prompt": self._prompt,
            "temperature": place.temperature,
            "problem": problem,
        }

    def _candidates(self, place: Place) -> list[int]:
        """The most probable tokens, and among them the one that comes next."""
        order = place.p_shown.sort(descending=True, stable=True).indices[: self._n_shown].tolist()
        if place.choice not in order:
            order[-1] = place.choice
        return order

    def _chart(self, place: Place, candidates: list[int]) -> Frame:
        p = place.p_shown
        bars = [
            Bar(
                self._name(token),
                round(100 * float(p[token]), 1),
                "new" if token == place.choice else "active",
            )
            for token in candidates
        ]
        rest = max(0.0, 1 - float(p[candidates].sum()))
        bars.append(Bar(f"{len(p) - len(bars):,} others", round(100 * rest, 1), "idle"))
        how = {0: "the most probable is taken", 1: "drawn by these probabilities"}
        title = how.get(place.temperature, f"drawn at temperature {place.temperature:g}")
        legend = (("new", "comes next"), ("active", "could come"), ("idle", "all others together"))
        panel = Bars(f"Next token: {title}", tuple(bars), "%", 100.0)
        words = ", ".join(f"{bar.label} {number(bar.value)} %" for bar in bars)
        return Frame(f"The most probable next tokens: {words}.", (panel,), legend=legend)

    def _text_frame(self, place: Place) -> Frame:
        tokens = [Token(self._decode([token])) for token in place.prompt]
        tokens += [
            Token(
                text := self._decode([w.token]),
                "owner1" if w.by_learner else "active",
                f"{text!r}, {_percent(w.probability)}",
            )
            for w in place.written
        ]
        if place.written:
            tokens[-1] = replace(tokens[-1], tone="new")
        if (before := len(tokens) - MAX_TOKENS_SHOWN) > 0:
            tokens = [Token(f"{_tokens(before)} before"), *tokens[before:]]
        title = f"{_tokens(len(place.prompt))} of prompt, {len(place.written):,} after it"
        legend = (
            ("idle", "prompt"),
            ("active", "the model's"),
            ("owner1", "your choice"),
            ("new", "newest"),
        )
        caption = f"The text so far: {self._decode(place.tokens)}"
        return Frame(caption, (Tokens(title, tuple(tokens)),), legend=legend)

    def _caption(self, place: Place) -> str:
        said = f"The model has read {_tokens(len(place.prompt))}."
        if place.written:
            last = place.written[-1]
            said = f"Token {len(place.written):,}: {self._name(last.token)}, "
            said += f"{'your choice' if last.by_learner else 'written'} at "
            said += f"{_percent(last.probability)}."
        if self._ended(place):
            return f"{said} With it the model ends its text."
        p = place.p_shown
        how = "most probable" if place.temperature == 0 else "drawn"
        said += f" Next, {how}: {self._name(place.choice)}, {_percent(p[place.choice])}."
        equal = float((-torch.special.xlogy(p, p).sum()).exp())
        if equal < 1.15:
            return f"{said} It is all but certain."
        equal = f"{equal:.1f}" if equal < 10 else f"{equal:,.0f}"
        return f"{said} It hesitates as between {equal} equally likely tokens."

    def _name(self, token: int) -> str:
        return f"“{visible(self._decode([token]))}”"

    def __repr__(self) -> str:
        return f"Complete({self._prompt!r} and {_tokens(len(self._place.written))} after it)"

    def _repr_mimebundle_(self, **kwargs):
        """The live widget, and for places without a kernel a picture of the first steps."""
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        # the metadata tells Colab where its widget manager is
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self), "text/html": self._still()}, metadata

    def _still(self) -> str:
        """HTML that needs neither a script nor a style sheet: some steps on from here."""
        place, captions = self._place, [self._caption(self._place)]
        while len(captions) <= N_STILL and not self._ended(place):
            try:
                place = self._write(place, place.choice, by_learner=False)
            except LabError:  # no room for more
                break
            captions.append(self._caption(place))
        frames = {
            self._text_frame(place): TEXT_WIDTH,
            self._chart(place, self._candidates(place)): CHART_WIDTH,
        }
        images = []
        for frame, width in frames.items():
            source = base64.b64encode(standalone(_draw(frame, width)).encode()).decode()
            images.append(
                f'<img alt="{escape(frame.caption)}" src="data:image/svg+xml;base64,{source}"/>'
            )
        items = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
        return (
            f'<figure style="margin:8px 0">{"".join(images)}'
            f"<figcaption>{escape(captions[-1])}</figcaption></figure>"
            f"<details><summary>All steps in words</summary><ol>{items}</ol></details>"
        )


def _at_temperature(p: Tensor, temperature: float) -> Tensor:
    """Softmax of logits / temperature, from the softmax of the logits. 0 leaves it as it is."""
    return p if temperature == 0 else (p.log() / temperature).softmax(-1)


def _draw(frame: Frame, width: int) -> tuple[str, ...]:
    return draw_series([frame], width=width)[0]


def _percent(p: float | Tensor) -> str:
    percent = round(100 * float(p), 1)
    return f"{number(percent)} %" if percent > 0 else "under 0.1 %"


def _tokens(n: int) -> str:
    return f"{n:,} token{'' if n == 1 else 's'}"
