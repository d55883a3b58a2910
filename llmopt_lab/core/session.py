"""The set-up of every notebook: Triton's interpreter in time, and one line on this session."""

import platform
import sys

from llmopt_lab import __version__
from llmopt_lab.core.device import GpuFacts, gpu_facts, interpreting, prepare_triton, version_of


def start() -> None:
    """Make this session ready for every chapter and print the line of `describe`.

    Call it before the first `import triton`: without a GPU it switches Triton's CPU interpreter on,
    and Triton reads that switch when a kernel is defined.
    """
    if version_of("triton") is not None:
        prepare_triton()
    print(describe(gpu_facts(), version_of("triton"), interpreting()))


def describe(gpu: GpuFacts | None, triton: str | None, interpreted: bool) -> str:
    """One line: what this session has, and what degrades because of what it lacks."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "ipywidgets"):
        version = triton if package == "triton" else version_of(package)
        versions.append(f"{package} {version or 'missing'}")
    hardware = f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" if gpu else "no GPU"
    return (
        f"llmopt_lab {__version__} | {hardware} | {', '.join(versions)} | "
        f"{what_degrades(gpu, triton, interpreted)}"
    )


def what_degrades(gpu: GpuFacts | None, triton: str | None, interpreted: bool) -> str:
    """The consequence for the kernels, in a sentence without a full stop."""
    if triton is None:
        where = "install it with: pip install triton" if sys.platform == "linux" else "Linux only"
        return f"no Triton ({where}): kernels are left out, the references run"
    if gpu is None:
        mode = "interpreter" if interpreted else "compiler switched on by TRITON_INTERPRET=0"
        return (
            f"kernels run in Triton's CPU {mode}: right but slow, in float32; "
            "the timings shown are recorded ones"
        )
    if interpreted:
        return (
            "TRITON_INTERPRET=1 is set: kernels run interpreted in spite of the GPU, so time none"
        )
    if not gpu.has_tensor_cores_in_triton:
        return (
            "Triton no longer supports this GPU well: kernels run without tensor cores, a matmul "
            "is slow, int8 and fp8 dot products do not compile: those cells use the reference"
        )
    if gpu.capability < (8, 9):
        return "everything runs but fp8, which needs sm_89 or newer: those cells use the reference"
    return "everything runs"
