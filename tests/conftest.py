"""Test settings. Needs pytest and torch only: GPU machines have little more.

Without a GPU, kernels run in Triton's CPU interpreter and tests marked `gpu` are left out, aloud.
Memory nobody wrote reads as NaN, so a kernel that forgets a part of its output fails.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

# One thread a worker: workers share the cores. The kernels of notebooks inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from llmopt_lab.core.device import interpreting

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

left_out: dict[str, int] = {}  # worker ("" without xdist) -> number of gpu tests it left out


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="count a skipped test as failed: in CI a missing browser must not pass unseen",
    )


def pytest_report_header(config):
    mode = "interpreter" if interpreting() else "compiler"
    device = torch.cuda.get_device_name() if HAS_GPU else "none"
    return f"torch {torch.__version__}, GPU: {device}, kernels: Triton's {mode}"


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` opens only files with such tests: GPU machines lack what the others import."""
    if config.option.markexpr != "gpu":
        return None
    folder = collection_path.is_dir()
    files = collection_path.rglob("test_*.py") if folder else [collection_path]
    return None if any("mark.gpu" in file.read_text() for file in files) else True


def pytest_collection_modifyitems(config, items):
    """Leave `gpu` tests out where they cannot run."""
    if HAS_GPU and not interpreting():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    left_out[""] = len(gpu)


def pytest_collection_finish():
    """Triton's interpreter looks through triton.language again at every call of a device function.

    A launch has replaced what is to be replaced: without the repetitions kernels take a quarter
    less time.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    tl, replace = interpreter.tl, interpreter._patch_lang

    def replace_once(fn):
        languages = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return replace(fn)

    interpreter._patch_lang = replace_once


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out.get("", 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    left_out[node.gateway.id] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter):
    n_left_out = max(left_out.values(), default=0)  # every xdist worker collects every test
    if n_left_out:
        why = "TRITON_INTERPRET=1 is set" if HAS_GPU else "no GPU here"
        terminalreporter.write_line(
            f"{n_left_out} GPU tests were left out: {why}. On a machine with a GPU run: "
            'python -m pytest -m gpu -o addopts=""'
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `alone` measures time: the other workers wait until it is done."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    with _turn(run, item.get_closest_marker("alone")) if run else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def _turn(run: str, alone):
    """Two locks that all workers know. `alone` shuts the gate, then waits for who is inside."""
    from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock

    folder = Path(tempfile.gettempdir())
    names = (folder / f"llmopt-{run}-gate", folder / f"llmopt-{run}-inside")
    with open(names[0], "w") as gate, open(names[1], "w") as inside:
        flock(gate, LOCK_EX if alone else LOCK_SH)
        if not alone:
            flock(gate, LOCK_UN)
        flock(inside, LOCK_EX if alone else LOCK_SH)
        try:
            yield
        finally:
            flock(inside, LOCK_UN)
            flock(gate, LOCK_UN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.option.fail_on_skip:
        report.outcome = "failed"
        report.longrepr = f"skipped, and --fail-on-skip is set: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.outcome == "skipped" and collector.config.option.fail_on_skip:
        report.outcome = "failed"
        report.longrepr = (
            f"{collector.nodeid} skipped, and --fail-on-skip is set: {_reason(report)}"
        )
    return report


def _reason(report) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
