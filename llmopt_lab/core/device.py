"""What this machine can run. The only place that asks torch.cuda or the environment."""

import importlib.metadata
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache

import torch

from llmopt_lab.core.errors import LabError, Missing


def pick_device() -> torch.device:
    """The GPU if this session has one that Triton can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as the driver describes it."""

    name: str
    capability: tuple[int, int]  # (9, 0) on an H100
    memory_bytes: int
    l2_bytes: int
    n_sms: int
    driver: str

    @property
    def has_tensor_cores_in_triton(self) -> bool:
        """Triton 3.3 dropped sm_75 and older: it still compiles there, without tensor cores."""
        return self.capability >= (8, 0)


def gpu_facts() -> GpuFacts | None:
    """The facts of the current GPU, or None without one."""
    if not torch.cuda.is_available():
        return None
    return _facts_of(torch.cuda.current_device())


@cache  # launchers ask at every launch, and the driver's version takes an NVML session
def _facts_of(device: int) -> GpuFacts:
    p = torch.cuda.get_device_properties(device)
    return GpuFacts(
        name=p.name,
        capability=(p.major, p.minor),
        memory_bytes=p.total_memory,
        l2_bytes=p.L2_cache_size,
        n_sms=p.multi_processor_count,
        driver=_driver_version(),
    )


def _driver_version() -> str:
    """The driver's version; without NVML, the CUDA version that torch was built for."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version if isinstance(version, str) else version.decode()
    except Exception:  # noqa: BLE001  no NVML binding, or AMD: the driver's name is not worth an error
        return f"unknown (torch built for CUDA {torch.version.cuda or torch.version.hip})"


def version_of(package: str) -> str | None:
    """Installed version of a package, or None. torch's own names its build, as in 2.11.0+cu128."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare_triton() -> None:
    """Call before `import triton`: without a GPU, switch Triton's CPU interpreter on.

    Triton reads the switch when a kernel is defined, so it must be set before. An explicit
    TRITON_INTERPRET in the environment wins.

    Raises:
        Missing: Triton is not installed.
        LabError: there is no GPU, and Triton was imported too early to be switched.
    """
    if version_of("triton") is None:
        raise Missing(
            "this needs Triton, which is not installed. On Linux: pip install triton. "
            "Elsewhere use the reference: Triton has no build for macOS and Windows."
        )
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        if "triton.language" in sys.modules:
            raise LabError(
                "Triton was imported before its CPU interpreter was switched on (torch imports it "
                "now and then). Restart the kernel and run the set-up cell, or any import from "
                "llmopt_lab.core.device followed by prepare_triton(), first."
            )
        os.environ["TRITON_INTERPRET"] = "1"


def interpreting() -> bool:
    """Whether Triton kernels run under the CPU interpreter in this session."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def software_facts() -> dict[str, str | None]:
    """Versions a benchmark result or a bug report needs."""
    names = ("torch", "triton", "numpy", "ipywidgets", "anywidget", "jupyterlab", "nbval")
    return {name: version_of(name) for name in names}


def hardware_facts() -> dict:
    """The GPU as JSON-ready facts, or the CPU's thread count without one."""
    gpu = gpu_facts()
    return asdict(gpu) if gpu else {"name": "CPU", "threads": torch.get_num_threads()}
