"""Sliders over a Player: change what a run is made of, and step through what comes out.

Explore(
    lambda n_blocks: Player(frames_of_a_run(n_blocks)),
    n_blocks=Choice("blocks in the pool", (12, 16, 24, 48), 16),
)
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import ipywidgets

from llmopt_lab.core.errors import LabError, require
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.slider import Slider

VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Choice:
    """One slider: its label, the values it can take, and the one it starts with."""

    label: str
    options: tuple
    value: object


class Explore(ipywidgets.VBox):
    """A slider a keyword argument of `make`, above the Player that `make` returns.

    `make` runs in Python at each change of a slider and should take well under a second; what it
    made is kept, so going back is instant. A `LabError` it raises, such as a pool too small for a
    request, is shown in words in the player's place.

    Raises:
        BadInput: no slider, or a start value that is not among the options.
        LabError: `make` refuses the start values.
    """

    _ipython_display_ = None  # that of ipywidgets 7 would win over the bundle

    def __init__(self, make: Callable[..., Player], **choices: Choice):
        require(len(choices) > 0, "Explore needs at least one slider: name=Choice(...)")
        for name, choice in choices.items():
            require(
                choice.value in choice.options,
                f"{name} starts at {choice.value!r}, which is not among {choice.options}",
            )
        self.make = make
        self._made: dict[tuple, ipywidgets.Widget] = {}
        self.sliders = {
            name: Slider(choice.label, choice.options, choice.value)
            for name, choice in choices.items()
        }
        self._first = make(**self.values)
        self._made[tuple(self.values.values())] = self._first
        # a box of its own for what changes: a slider that is drawn anew would lose the focus
        self._place = ipywidgets.VBox([self._first])
        super().__init__(children=[*self.sliders.values(), self._place])
        for slider in self.sliders.values():
            slider.observe(self._redraw, names="index")

    @property
    def values(self) -> dict:
        """Where the sliders stand."""
        return {name: slider.value for name, slider in self.sliders.items()}

    @property
    def shown(self) -> ipywidgets.Widget:
        """The Player on show, or the message in its place."""
        return self._place.children[0]

    def _redraw(self, _change) -> None:
        self._place.children = [self._result()]

    def _result(self) -> ipywidgets.Widget:
        key = tuple(self.values.values())
        if key not in self._made:
            try:
                self._made[key] = self.make(**self.values)
            except LabError as error:
                text = f'<p role="alert"><strong>Not possible:</strong> {escape(str(error))}</p>'
                self._made[key] = ipywidgets.HTML(text)
        return self._made[key]

    def __repr__(self) -> str:
        at = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"Explore({at}: {self.shown if isinstance(self.shown, Player) else 'not possible'})"

    def _repr_mimebundle_(self, **kwargs):
        """The live widgets; where there is no kernel, the first player's still picture."""
        data, metadata = self._first._repr_mimebundle_(**kwargs)
        view = {**data[VIEW], "model_id": self.model_id}
        return {**data, VIEW: view, "text/plain": repr(self)}, metadata
