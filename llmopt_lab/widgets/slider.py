"""One slider over a few values, native: it has a name, and says its value, to every reader."""

from collections.abc import Sequence
from pathlib import Path

import anywidget
import traitlets

from llmopt_lab.core.errors import require

HERE = Path(__file__).parent


class Slider(anywidget.AnyWidget):
    """A labelled slider; `value` is one of `values`, and `index` its place among them.

    While it is dragged only the page follows; Python hears the value on which it comes to rest.

    Raises:
        BadInput: a value that is not among the values.
    """

    _esm = (HERE / "page.js").read_text() + (HERE / "slider.js").read_text()
    _css = (HERE / "page.css").read_text()

    label = traitlets.Unicode().tag(sync=True)
    options = traitlets.List(traitlets.Unicode()).tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)

    def __init__(self, label: str, values: Sequence, value: object):
        self.values = tuple(values)
        self._require(value)
        options = [str(one) for one in self.values]
        super().__init__(label=label, options=options, index=self.values.index(value))

    @property
    def value(self) -> object:
        """Where the slider stands."""
        return self.values[self.index]

    @value.setter
    def value(self, value: object) -> None:
        self._require(value)
        self.index = self.values.index(value)

    def _require(self, value: object) -> None:
        require(value in self.values, f"{value!r} is not among {self.values}")

    @traitlets.validate("index")
    def _inside(self, proposal):
        """Also what the page sends passes here."""
        last = len(self.values) - 1
        require(0 <= proposal["value"] <= last, f"index is {proposal['value']}, not 0 to {last}")
        return proposal["value"]

    def __repr__(self) -> str:
        return f"Slider({self.label}: {self.value!r})"
