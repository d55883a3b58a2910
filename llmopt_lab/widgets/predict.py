"""A prediction that locks before the answer shows.

    guess = Predict("How many bytes of KV cache does one token take?", unit="KiB")
    guess                                  # the learner locks a number in
    ...                                    # the cell that measures
    guess.reveal(measured)                 # the answer, and how far off the prediction was

Nothing waits: run from top to bottom without a learner, a notebook shows the question and goes on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import anywidget
import traitlets

from llmopt_lab.core.errors import BadInput, require
from llmopt_lab.widgets.draw import number

HERE = Path(__file__).parent
RIGHT_WITHIN = 0.1  # relative error of a number that counts as right, unless the question says

_locked: list["Predict"] = []


@dataclass(frozen=True)
class Prediction:
    """One locked prediction; `answer` is None until it is revealed."""

    question: str
    guess: float | int | str
    answer: float | int | str | None
    unit: str
    blind: bool  # locked before the answer was revealed
    right: bool | None

    @property
    def factor(self) -> float | None:
        """guess / answer, where both are positive numbers."""
        if isinstance(self.guess, str) or self.answer is None:
            return None
        return self.guess / self.answer if self.guess > 0 and self.answer > 0 else None


class Predict(anywidget.AnyWidget):
    """Ask for a number, or for one of `choices`, and lock it before showing the answer.

    Args:
        question: one sentence.
        answer: what is right, if it is known already; else call `reveal` when it is. The page
            learns it only after the lock.
        unit: of the number.
        choices: what to choose from, instead of a number.
        tolerance: relative error of a number that counts as right; 0.1 when None.
        explain: shown with the answer.

    Raises:
        BadInput: an answer that is not a finite number or not among the choices, fewer than two
            different choices, a negative tolerance.
    """

    _esm = (HERE / "page.js").read_text() + (HERE / "predict.js").read_text()
    _css = (HERE / "page.css").read_text()
    _ipython_display_ = None  # that of ipywidgets 7 would win over the bundle

    question = traitlets.Unicode().tag(sync=True)
    unit = traitlets.Unicode().tag(sync=True)
    choices = traitlets.List(traitlets.Unicode()).tag(sync=True)
    guess = traitlets.Unicode().tag(sync=True)
    locked = traitlets.Bool(False).tag(sync=True)
    verdict = traitlets.Unicode().tag(sync=True)
    explanation = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        question: str,
        *,
        answer: float | int | str | None = None,
        unit: str = "",
        choices: Sequence[str] | None = None,
        tolerance: float | int | None = None,
        explain: str = "",
    ):
        require(question.strip() != "", "a prediction needs a question; got an empty one")
        require(
            choices is None or len(set(choices)) == len(choices) >= 2,
            f"choices must be two or more different texts; got {choices!r}",
        )
        require(
            tolerance is None or tolerance >= 0,
            f"tolerance is a relative error, 0 or more; got {tolerance}",
        )
        super().__init__(question=question, unit=unit, choices=list(choices or []))
        self.answer = None
        self._explain = explain
        self._tolerance = RIGHT_WITHIN if tolerance is None else tolerance
        self._blind = True
        if answer is not None:
            self._set_answer(answer)

    def lock(self, guess: float | int | str) -> None:
        """Lock a prediction in from Python, as the button does.

        Raises:
            BadInput: locked already, not a finite number, or not among the choices.
        """
        require(not self.locked, f"a prediction stays as it was locked: {self!r}")
        self.guess = str(self._read(guess))
        self.locked = True

    def reveal(self, answer: float | int | str) -> "Predict":
        """Give the answer. It shows at once if the prediction is locked, else after the lock.

        Returns the widget, so that the last line of the measuring cell shows it again.

        Raises:
            BadInput: not a finite number, or not among the choices.
        """
        self._set_answer(answer)
        self._blind = self.locked and self._blind
        return self

    def prediction(self) -> Prediction | None:
        """What was locked in and how it turned out, or None before the lock."""
        if not self.locked:
            return None
        guess = self._read(self.guess)
        right = None if self.answer is None else self._is_right(guess)
        return Prediction(self.question, guess, self.answer, self.unit, self._blind, right)

    @staticmethod
    def locked_in() -> list[Prediction]:
        """Every prediction locked in this session, in the order of locking."""
        return [asked.prediction() for asked in _locked]

    def _set_answer(self, answer: float | int | str) -> None:
        self.answer = self._read(answer)
        self._tell()

    @traitlets.validate("guess")
    def _keep(self, proposal):
        return self.guess if self.locked else proposal["value"]

    @traitlets.validate("locked")
    def _check(self, proposal):
        """Also what the page sends passes here; a lock never opens again."""
        if proposal["value"]:
            self._read(self.guess)
        return proposal["value"] or self.locked

    @traitlets.observe("locked")
    def _enter(self, change):
        if change["new"]:
            _locked.append(self)
            self._tell()

    def _tell(self) -> None:
        if not self.locked or self.answer is None:
            return
        with self.hold_trait_notifications():
            self.verdict = self._judge(self._read(self.guess))
            self.explanation = self._explain

    def _judge(self, guess: float | int | str) -> str:
        answer, said = self._say(self.answer), self._say(guess)
        if self._is_right(guess):
            return f"Right: {answer}." if answer == said else f"Right: {answer}; you said {said}."
        if isinstance(guess, str):
            return f"It is {answer}; you said {said}."
        direction = "high" if guess > self.answer else "low"
        if guess > 0 and self.answer > 0:
            factor = max(guess / self.answer, self.answer / guess)
            times = f"{factor:.2f}" if factor < 1.995 else f"{factor:.1f}"
            miss = f"{times if factor < 99.95 else number(round(factor))} times too {direction}"
        else:
            miss = f"{self._say(abs(guess - self.answer))} too {direction}"
        return f"It is {answer}; you said {said}: {miss}."

    def _is_right(self, guess: float | int | str) -> bool:
        if isinstance(guess, str):
            return guess == self.answer
        return abs(guess - self.answer) <= self._tolerance * abs(self.answer)

    def _read(self, value: float | int | str) -> float | int | str:
        """A guess or an answer as a number, or as one of the choices."""
        if self.choices:
            require(
                value in self.choices,
                f"{value!r} is none of the choices: {', '.join(self.choices)}",
            )
            return value
        try:
            read = float(value) if isinstance(value, str) else value
            finite = math.isfinite(read)
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise BadInput(f"{self.question!r} asks for a finite number; got {value!r}")
        return read

    def _say(self, value: float | int | str) -> str:
        read = self._read(value)
        return read if isinstance(read, str) else f"{number(read)} {self.unit}".strip()

    def __repr__(self) -> str:
        state = f"locked at {self._say(self.guess)}" if self.locked else "not locked yet"
        return f"Predict({self.question} {state})"

    def _repr_mimebundle_(self, **kwargs):
        """The live widget, and for places without a kernel the question with a hidden answer."""
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        # the metadata tells Colab where its widget manager is
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        parts = [f"<p><strong>{escape(self.question)}</strong></p>"]
        if self.choices:
            items = "".join(f"<li>{escape(choice)}</li>" for choice in self.choices)
            parts.append(f"<ul>{items}</ul>")
        if self.answer is not None:
            answer = escape(f"{self._say(self.answer)}. {self._explain}".strip())
            parts.append(f"<details><summary>The answer</summary><p>{answer}</p></details>")
        return {**data, "text/plain": repr(self), "text/html": "".join(parts)}, metadata
