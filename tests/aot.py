"""Compile Triton kernels for GPUs that are not here: a script, because the interpreter is on here.

    specs = [{"kernel": "llmopt_lab.paged_attention.kernels:_merge_kernel", "target": "sm_90",
              "signature": {"part_ptr": "*fp32", ...}, "constexprs": {...}, "options": {...}}]
    compile_ahead(specs) -> [{"shared": bytes, "registers": n, "spills": bytes}, ...]

The compiler itself checks neither that shared memory fits the chip nor that registers do.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ANSWER = "compiled: "
# target: (backend, architecture, lanes a warp, most shared memory of one program in bytes)
TARGETS = {
    "sm_75": ("cuda", 75, 32, 64 << 10),  # T4
    "sm_80": ("cuda", 80, 32, 163 << 10),  # A100
    "sm_89": ("cuda", 89, 32, 99 << 10),  # L4
    "sm_90": ("cuda", 90, 32, 227 << 10),  # H100
    "sm_100": ("cuda", 100, 32, 227 << 10),  # B200
    "gfx942": ("hip", "gfx942", 64, 64 << 10),  # MI300
}


def compile_ahead(specs: list[dict]) -> list[dict]:
    """Compile every spec in a process without the interpreter, which all tests of a run share."""
    compiler = _compiler()
    compiler.stdin.write(json.dumps(specs) + "\n")
    compiler.stdin.flush()
    for line in compiler.stdout:  # Triton may print lines of its own
        if line.startswith(ANSWER):
            answer = json.loads(line.removeprefix(ANSWER))
            assert isinstance(answer, list), answer
            return answer
    _compiler.cache_clear()
    raise AssertionError(f"the compiler died: exit status {compiler.wait()}")


@functools.cache
def _compiler() -> subprocess.Popen:
    """The process that compiles; it ends with this one, as its standard input does."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, text=True, bufsize=1,
    )  # fmt: skip


def _compile(spec: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = spec["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: spec["signature"].get(arg, "constexpr") for arg in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(k),): v for k, v in spec["constexprs"].items()}
    # as the launcher finds them: tensors and the strides named in `aligned` divide by 16
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg in spec.get("aligned", ())
    }
    backend, architecture, lanes, _ = TARGETS[spec["target"]]
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source  # noqa: N813
    compiled = triton.compile(
        source(kernel, signature, constexprs, attrs),
        target=GPUTarget(backend, architecture, lanes),
        options=spec.get("options", {}),
    )
    facts = {"shared": compiled.metadata.shared, "registers": None, "spills": None}
    if backend == "cuda":
        facts |= _resources(compiled.asm["ptx"])
    return facts


def _resources(ptx: str) -> dict:
    """Registers and spilled bytes a thread, as the assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\S+)", ptx, re.M)[1].split(",")[0]
    capability = int(re.search(r"\d+", target)[0])
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spilled = re.findall(r"(\d+) bytes spill", report)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": sum(map(int, spilled)),
    }


def _serve() -> None:
    """Answer every line of specs: facts, or the text of the error."""
    for line in sys.stdin:
        try:
            answer: list | str = [_compile(spec) for spec in json.loads(line)]
        except Exception:  # noqa: BLE001  the caller's test fails with it
            answer = traceback.format_exc()[-3000:]
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
