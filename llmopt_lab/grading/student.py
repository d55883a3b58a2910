"""The learner's process: it runs the cells of one notebook and answers what the judge asks.

Nothing here is trusted. It has no verdicts and no points; `judge.py` has those, and sits in
another process. `python -m llmopt_lab.grading.student` speaks on its standard input and output,
which is how it runs in a container; elsewhere `sandbox.py` forks it.
"""

import contextlib
import os
import re
import sys

from llmopt_lab.core.trace import Record, open_trace, recording
from llmopt_lab.grading.checks import launched
from llmopt_lab.grading.wire import Channel, Garbled, Peer

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Student(Peer):
    """The learner's end of the wire."""

    def __init__(self, channel: Channel):
        super().__init__(channel)
        self.shell = make_shell()
        os.register_at_fork(after_in_child=self._hang_up)  # a copy of us has no say
        self.n_told = 0  # steps of the open trace that the judge knows

    def _hang_up(self) -> None:
        for fd in (self.channel.read_fd, self.channel.write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)

    def work(self) -> None:
        """Serve until the judge hangs up."""
        with contextlib.suppress(EOFError):
            while True:
                message, blobs = self.receive()
                self.codec.start_call()
                self.n_told = 0
                with self._recording(message.get("recording")):
                    self.serve(message, blobs)

    def perform(self, message: dict, blobs: list[bytes]):
        match message["do"]:
            case "run":
                return self.run(message["source"])
            case "evaluate":
                return self.shell.ev(message["source"])
            case "get":
                return getattr(self.codec.given[message["handle"]], message["name"])
            case "gradients":
                return self.give_gradients(message, blobs)
            case "call":
                target = self.codec.given[message["handle"]]
                args, kwargs = self.arguments(message, blobs)
                if "grid" in message:
                    with launched():
                        return target[tuple(message["grid"])](*args, **kwargs)
                return target(*args, **kwargs)
        raise Garbled(f"the judge wants {message['do']!r}")

    def run(self, source: str) -> list:
        """Run a cell: [whether it ended without an error, its message, whether it said exit]."""
        self.shell.said_exit = False
        result = self.shell.run_cell(source)
        error = result.error_before_exec or result.error_in_exec
        if self.shell.said_exit or isinstance(error, SystemExit):
            return [False, "this cell ends the session: it calls exit() or quit()", True]
        if error is None:
            return [True, "", False]
        return [False, ANSI.sub("", f"{type(error).__name__}: {_text_of(error)}")[:500], False]

    def serve(self, message: dict, blobs: list[bytes]) -> None:
        try:
            super().serve(message, blobs)
        except Garbled as error:  # the answer cannot be sent
            told = self.codec.encode_error(error, [])
            self.post({"do": "raise", "error": told, "records": [], "back": []}, [])

    def extras(self, blobs: list[bytes]) -> dict:
        """What was recorded since the last message, and what was borrowed."""
        trace, records = open_trace(), []
        if trace is not None and self.recorded is trace:
            records = [self.codec.encode(s.what, blobs) for s in trace.steps[self.n_told :]]
            self.n_told = len(trace)
        return {"records": records, "back": self.codec.give_back(blobs)}

    @contextlib.contextmanager
    def _recording(self, only: list[str] | None):
        """Record if the judge does, the same kinds."""
        self.recorded = None
        if only is None:
            yield
            return
        kinds = [Record._kinds[name] for name in only if name in Record._kinds]
        with recording(*(kinds or ([_NoKind] if only else []))) as self.recorded:
            yield


class _NoKind(Record):
    pass


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  a learner's own class may do anything in __str__
        return ""


def make_shell():
    """IPython without a terminal, a history or a kernel: cells, magics, `get_ipython()`."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    shell.said_exit = False

    def ask_exit() -> None:
        shell.said_exit = True

    shell.ask_exit = ask_exit
    shell._tee = lambda channel: contextlib.nullcontext()  # newer ones keep all that is printed
    return shell


def main() -> None:
    """Speak on standard input and output; the learner's code gets neither."""
    read_fd, write_fd = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    sys.stdin = open(0)  # noqa: SIM115
    channel = Channel(read_fd, write_fd)
    channel.send(b'{"missing": []}', b"")
    Student(channel).work()
    os._exit(0)  # not waiting for the learner's threads


if __name__ == "__main__":
    main()
