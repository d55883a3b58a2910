"""Errors, device facts, Triton's interpreter switch, and the line a notebook starts with."""

import os
import re
import subprocess
import sys

import pytest
import torch

from llmopt_lab.core import device, errors, session
from llmopt_lab.core.device import GpuFacts, gpu_facts, interpreting, pick_device, version_of
from llmopt_lab.core.errors import BadInput, LabError, Missing, require, require_same_shape


def test_every_error_of_ours_is_a_lab_error_and_the_builtin_that_fits():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) >= 5 and all(issubclass(kind, LabError) for kind in kinds)
    assert issubclass(BadInput, ValueError) and issubclass(Missing, ImportError)
    assert issubclass(errors.OutOfBlocks, MemoryError)


def test_require_raises_its_message_only_when_the_condition_fails():
    require(True, "unseen")
    with pytest.raises(BadInput, match="^k must be positive; got -1; use 1 or more$"):
        require(False, "k must be positive; got -1; use 1 or more")


def test_require_same_shape_names_both_tensors_and_shapes():
    require_same_shape("a and b", torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(BadInput, match=r"k and v must .*got \(2, 3\) and \(3, 2\)"):
        require_same_shape("k and v", torch.zeros(2, 3), torch.zeros(3, 2))


def test_the_picked_device_can_hold_a_tensor():
    assert torch.ones(2, device=pick_device()).sum() == 2


def test_gpu_facts_are_there_exactly_when_a_gpu_is():
    assert (gpu_facts() is not None) == torch.cuda.is_available()


def test_versions_are_read_and_a_missing_package_is_none():
    assert version_of("torch") == torch.__version__
    assert version_of("no-such-package-as-this") is None


@pytest.mark.parametrize(("set_before", "interpreted"), [(None, True), ("0", False), ("1", True)])
def test_without_a_gpu_the_interpreter_is_switched_on_unless_told_otherwise(
    monkeypatch, set_before, interpreted
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "version_of", lambda package: "3.7.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, "triton.language", raising=False)
    if set_before is not None:
        monkeypatch.setenv("TRITON_INTERPRET", set_before)
    device.prepare_triton()
    assert interpreting() == interpreted


def test_an_import_of_triton_that_came_too_early_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "version_of", lambda package: "3.7.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton.language", errors)
    with pytest.raises(LabError, match="Restart the kernel"):
        device.prepare_triton()


def test_with_a_gpu_the_interpreter_stays_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "version_of", lambda package: "3.7.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device.prepare_triton()
    assert not interpreting()


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(device, "version_of", lambda package: None)
    with pytest.raises(Missing, match="pip install triton"):
        device.prepare_triton()


def gpu(name: str, capability: tuple[int, int]) -> GpuFacts:
    return GpuFacts(name, capability, 16 << 30, 4 << 20, 40, "580.1")


@pytest.mark.parametrize(
    ("facts", "triton", "interpreted", "words"),
    [
        (None, "3.7.1", True, "CPU interpreter: right but slow, in float32"),
        (None, "3.7.1", False, "TRITON_INTERPRET=0"),
        (None, None, False, "no Triton"),
        (gpu("NVIDIA H100", (9, 0)), "3.7.1", False, "everything runs"),
        (gpu("NVIDIA H100", (9, 0)), "3.7.1", True, "TRITON_INTERPRET=1 is set"),
        (gpu("NVIDIA H100", (9, 0)), None, False, "no Triton"),
        (gpu("NVIDIA A100", (8, 0)), "3.6.0", False, "everything runs but fp8"),
        (gpu("Tesla T4", (7, 5)), "3.6.0", False, "without tensor cores"),
        (gpu("Tesla T4", (7, 5)), "3.6.0", False, "int8 and fp8 dot products do not compile"),
    ],
)
def test_the_session_line_says_what_there_is_and_what_degrades(facts, triton, interpreted, words):
    line = session.describe(facts, triton, interpreted)
    assert "\n" not in line and words in line
    assert (facts.name if facts else "no GPU") in line
    assert f"triton {triton or 'missing'}" in line
    assert re.search(r"Python 3\.1\d", line) and f"torch {torch.__version__}" in line


def test_the_set_up_cell_switches_the_interpreter_on_before_triton_is_imported():
    program = (
        "from llmopt_lab.core.session import start\nstart()\n"
        "from llmopt_lab.core.triton_check import kernel_error\nprint('error', kernel_error())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True
    )
    line, result = done.stdout.splitlines()
    assert line.startswith("llmopt_lab ") and result == "error 0.0"
    assert not done.stderr
