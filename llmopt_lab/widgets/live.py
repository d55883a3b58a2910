"""A picture that changes while a cell runs, such as the loads of a model in training.

live = Live()
for report in training:
    live.show(frame_of(report))
"""

import base64
from html import escape

from IPython import get_ipython
from IPython.display import display

from llmopt_lab.widgets.draw import draw_frame
from llmopt_lab.widgets.panels import Frame


class Live:
    """One output that `show` draws anew each time; the last picture stays in the notebook.

    Nothing waits for a page: executed without one, only the last picture is kept. Outside a
    notebook each caption is printed.
    """

    def __init__(self):
        self._handle = None

    def show(self, frame: Frame) -> None:
        """Put `frame` in the place of what was shown before."""
        if get_ipython() is None:
            print(frame.caption)
            return
        picture = base64.b64encode(draw_frame(frame).encode()).decode()
        caption = escape(frame.caption)
        html = (
            f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{picture}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
        data = {"text/html": html, "text/plain": frame.caption}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
