"""Compile Triton kernels for GPUs that are not here: a script, because the interpreter is on here.

    specs = [{"kernel": "llmopt_lab.paged_attention.kernels:_merge_kernel", "target": "sm_90",
              "signature": {"part_ptr": "*fp32", ...}, "constexprs": {...}, "options": {...}}]
    compile_ahead(specs) -> [{"shared": bytes, "registers": n, "spills": bytes}, ...]

The compiler itself checks neither that shared memory fits the chip nor that registers do.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
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
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, text=True, bufsize=1,
    )  # fmt: skip


def _compile(spec: dict) -> dict:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = spec["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: spec["signature"].get(arg, "constexpr") for arg in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(k),): _tuples(v) for k, v in spec["constexprs"].items()}
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
    compiled, said = _compile_aloud(
        source(kernel, signature, constexprs, attrs),
        target=GPUTarget(backend, architecture, lanes),
        options=spec.get("options", {}),
    )
    facts = {"shared": compiled.metadata.shared, "registers": None, "spills": None}
    if backend == "cuda":
        facts["registers"] = int(re.search(r"Used (\d+) registers", said)[1])
        facts["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return facts


def _tuples(value):
    """Tuples came as JSON's lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _compile_aloud(source, **options):
    """A kernel, and what its assembler said; Triton's cache keeps both."""
    import triton
    from triton.runtime.cache import get_cache_manager

    # True: the cache had the kernel from elsewhere, without what was said
    for triton.knobs.compilation.always_compile in (False, True):
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            compiled = triton.compile(source, **options)
        cache = get_cache_manager(compiled.hash)
        if heard.getvalue():
            cache.put(heard.getvalue(), "assembler.log", binary=False)
        log = cache.get_file("assembler.log")
        if log or options["target"].backend != "cuda":
            break
    return compiled, Path(log).read_text() if log else ""


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
