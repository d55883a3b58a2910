"""`llmopt grade PATH...`: points for exercise notebooks, one or a class's, from outside.

A file given is only read. Every locked cell comes back from the canonical exercise notebook, so an
edited, deleted or pasted check changes nothing. The cells run in a process that is shut in
(`sandbox.py`); the checks run in another one, which asks the first for the learner's results
(`judge.py`). Files are graded `jobs` at a time, each on its own: what one does reaches no other.
Each result is written when it is there, so a run that was stopped goes on where it was.
docs/grading.md says what this protects against and what not.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from llmopt_lab.core.errors import LabError, Missing, require
from llmopt_lab.grading.submissions import (
    Score,
    Submission,
    Verdict,
    canonical_of,
    find_submissions,
    read_canonical,
    read_learners,
    titles_of,
)

EXERCISES = Path(__file__).resolve().parents[2] / "exercises"
SLACK_S = 240.0  # for starting processes and for the checks' own work
# no GPU: a process that has started one must not fork, and kernels are graded in the interpreter
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
MAX_LINE = 64 << 20  # bytes of a worker's answer


class Worker:
    """A process that grades one notebook after the other. It is replaced when it fails."""

    def __init__(self, settings: dict):
        self.settings, self.process = settings, None

    def grade(self, path: Path) -> dict:
        """The worker's answer about one notebook; `{"error": ..}` if it fails itself."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmopt_lab.grading.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip
            self._write(self.settings)
        self._write(str(path))
        line = self._read(time.monotonic() + self.settings["limits"]["total_timeout"] + SLACK_S)
        if not line:
            self.close()
            error = f"{path}: the judge itself failed; its messages are above"
            return {"error": error}
        return json.loads(line)

    def close(self) -> None:
        """End it with all that it has started."""
        process, self.process = self.process, None
        if process is not None:
            for fd in (process.stdin, process.stdout):
                with suppress(OSError):
                    fd.close()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _write(self, value) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self, deadline: float) -> bytes:
        """A line, or nothing if it died or took too long."""
        data, fd = bytearray(), self.process.stdout.fileno()
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(fd, 1 << 16) if ready else b""
            if not part or len(data) > MAX_LINE:
                return b""
            data += part
        return bytes(data)


def grade(
    paths: Sequence[str | Path],
    *,
    cell_timeout: int | float = 60.0,
    total_timeout: int | float = 600.0,
    memory: int = 4 << 30,
    processes: int = 128,
    out: str | Path | None = None,
    exercises: str | Path = EXERCISES,
    jobs: int = 1,
    container: str = "",
    checks: Sequence[str] = (),
    again: bool = False,
    grade_one: Callable[[Path], dict] | None = None,
) -> list[Score]:
    """Grade notebooks, `jobs` at a time. One that cannot be graded gets an error, not the others.

    Args:
        paths: notebooks, and folders of them (see `find_submissions`).
        cell_timeout, total_timeout: seconds, for one cell and for one notebook.
        memory, processes: bytes and number (threads count), for all that one notebook starts.
        out: a folder for scores.csv, canvas.csv, scores.json, scores.xml (JUnit) and
            report.html, and for what is done already: a second run with the same `out` grades
            only what is new or has changed.
        exercises: the folder of the canonical notebooks.
        container: an image, or "auto", to run each notebook in a container.
        checks: modules that register more exercises, to be imported by the judge.
        again: grade everything, whatever is done already.
        grade_one: takes a worker's place: a path -> its answer, a dictionary as `worker.py` makes.

    Raises:
        BadInput: no paths, a limit that is not positive, no exercise notebooks in `exercises`.
        Missing: IPython is not installed.

    Cost: about 5 s to start a worker, then a second or so a notebook and what its cells take.
    """
    require(len(paths) > 0, "name at least one notebook or folder to grade")
    limits = {
        "cell_timeout": cell_timeout, "total_timeout": total_timeout, "memory": memory,
        "processes": processes,
    }  # fmt: skip
    wrong = {name: value for name, value in {**limits, "jobs": jobs}.items() if not value > 0}
    require(not wrong, f"time-outs, memory, processes and jobs must be positive; got {wrong}")
    require(
        out is None or not Path(out).exists() or Path(out).is_dir(),
        f"out must be a folder; {out} is a file",
    )
    if not hasattr(os, "fork"):
        raise Missing(
            "grading shuts processes in, which needs Linux or macOS (on Windows: WSL). Your own "
            "score without that: python -m pytest -p llmopt_lab.grading.nbval_points --nbval-lax "
            "--nbval-current-env exercises/1_paged_attention.ipynb"
        )
    for module in ("IPython", "psutil", "nbformat"):
        if importlib.util.find_spec(module) is None:
            raise Missing(f"grading needs {module}. Run: pip install llmopt_lab[lab]")
    canonical = read_canonical(Path(exercises))
    submissions = find_submissions(paths)
    engine, image = _engine(container)
    folders = {str(Path(p) if Path(p).is_dir() else Path(p).resolve().parent) for p in paths}
    solutions = Path(exercises).resolve().parent / "solutions"
    settings = {
        "limits": limits, "exercises": str(Path(exercises).resolve()), "checks": list(checks),
        "hidden": [*sorted(folders), str(solutions), *([str(out)] if out else [])],
        "engine": engine, "image": image,
    }  # fmt: skip
    store = Store(Path(out) / "graded" if out else None, _digest(settings), again)
    local, workers = threading.local(), []

    def run(path: Path) -> dict:
        if grade_one is not None:
            return grade_one(path)
        canonical_of(read_learners(path), canonical, path)  # no worker for what cannot be read
        if not hasattr(local, "worker"):
            local.worker = Worker(settings)
            workers.append(local.worker)
        return local.worker.grade(path)

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_graded, s, store, run): i for i, s in enumerate(submissions)}
        done = tqdm(as_completed(futures), "grading", len(futures), unit="notebook", disable=None)
        scores: dict[int, Score] = {futures[future]: future.result() for future in done}
    except BaseException:  # stopped by Ctrl-C, for instance: no process stays behind
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        for worker in workers:
            worker.close()
    pool.shutdown()
    ordered = [scores[i] for i in range(len(submissions))]
    if out is not None:
        from llmopt_lab.grading import report

        titles = {k: v for n in canonical.values() for k, v in titles_of(n).items()}
        report.write_all(ordered, Path(out), titles)
    return ordered


class Store:
    """Results on disk, one file each, by what was graded and by what; written whole or not."""

    def __init__(self, folder: Path | None, digest: str, again: bool):
        self.folder, self.digest, self.again = folder, digest, again
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def key(self, content: bytes) -> str:
        return hashlib.sha256(self.digest.encode() + content).hexdigest()[:32]

    def read(self, key: str) -> dict | None:
        if self.folder is None or self.again:
            return None
        with suppress(OSError, ValueError):
            return json.loads((self.folder / f"{key}.json").read_text("utf-8"))
        return None

    def write(self, key: str, answer: dict) -> None:
        if self.folder is not None:
            part = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}.part"
            part.write_text(json.dumps(answer), "utf-8")
            part.replace(self.folder / f"{key}.json")


def _graded(submission: Submission, store: Store, run: Callable[[Path], dict]) -> Score:
    """The score of one submission, from the store or from a worker; never an exception."""
    who = {"student": submission.student, "student_id": submission.student_id}
    path = submission.path
    if submission.problem:
        return Score(str(path), error=submission.problem, **who)
    try:
        with suppress(OSError):
            key = store.key(path.read_bytes()) if path.is_file() and not path.is_symlink() else ""
            answer = store.read(key) if key else None
            if answer is None:
                answer = run(path)
                if key and "error" not in answer:
                    store.write(key, answer)
            if "error" in answer:
                return Score(str(path), error=answer["error"], **who)
            verdicts = tuple(Verdict(**v) for v in answer["verdicts"])
            rest = {name: answer.get(name, {}) for name in ("minutes", "plan")}
            missing = tuple(answer.get("missing", ()))
            return Score(
                str(path), verdicts, notebook=answer.get("notebook", ""), missing=missing, **rest,
                **who,
            )  # fmt: skip
        return Score(str(path), error=f"{path} cannot be read", **who)
    except LabError as error:
        return Score(str(path), error=str(error), **who)
    except Exception as error:  # noqa: BLE001  one submission must not stop the others
        return Score(str(path), error=f"{path}: {type(error).__name__}: {error}", **who)


def _engine(container: str) -> tuple[str, str]:
    if not container:
        return "", ""
    from llmopt_lab.grading.sandbox import find_engine, find_image

    engine = find_engine()
    return engine, find_image(engine, container)


def _digest(settings: dict) -> str:
    """Of all that decides about a verdict besides the notebook: checks, notebooks, limits."""
    digest = hashlib.sha256(json.dumps(settings["limits"]).encode() + settings["image"].encode())
    files = [*Path(__file__).parent.glob("*.py"), *Path(settings["exercises"]).glob("*.ipynb")]
    files += [
        Path(spec.origin) for name in settings["checks"] if (spec := importlib.util.find_spec(name))
    ]
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def table(scores: Sequence[Score]) -> str:
    """The scores as plain text: one line an exercise, and below each notebook what to do next."""
    blocks = []
    for score in scores:
        if score.error:
            blocks.append(f"{score.file}\n  cannot be graded: {score.error}")
            continue
        width = max(len(v.exercise) for v in score.verdicts)
        lines = [score.file]
        for v in score.verdicts:
            state = "done" if v.earned == v.points else v.misconception or "not yet"
            lines.append(f"  {v.exercise:{width}}  {v.earned}/{v.points}  {state}")
        lines.append(f"  {'points':{width}}  {score.earned}/{score.points}")
        for v in score.verdicts:
            if v.message:
                lines.append(f"\n  {v.exercise}: {v.message}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def summary(scores: Sequence[Score]) -> str:
    """A class in a few lines: a line a notebook."""
    width = max(len(s.student) for s in scores)
    lines = []
    for s in scores:
        points = f"cannot be graded: {s.error}" if s.error else f"{s.earned}/{s.points}"
        lines.append(f"{s.student:{width}}  {s.notebook:24}  {points}")
    return "\n".join(lines)


def isolation(scores: Sequence[Score]) -> str:
    """One line: what of the isolation this system refused; empty if nothing."""
    missing = sorted({what for s in scores for what in s.missing})
    if not missing:
        return ""
    return (
        f"Not isolated on this system: {', '.join(missing)}. Grade strangers' notebooks elsewhere, "
        "or with --container; docs/grading.md says what this means."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llmopt grade`."""
    parser.add_argument(
        "files", nargs="+", help="exercise notebooks that learners filled in, or folders of them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write them as JUnit XML")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="CSV, JSON, JUnit and a page go there; for a folder of submissions FOLDER-grades",
    )  # fmt: skip
    parser.add_argument(
        "--cell-timeout", type=float, default=60.0, metavar="S", help="for one cell (60)"
    )
    parser.add_argument(
        "--total-timeout", type=float, default=600.0, metavar="S", help="for one notebook (600)"
    )
    parser.add_argument(
        "--memory", type=int, default=4096, metavar="MIB", help="for one notebook (4096)"
    )
    parser.add_argument(
        "--processes", type=int, default=128, metavar="N",
        help="processes and threads of one notebook (128)",
    )  # fmt: skip
    parser.add_argument(
        "--exercises", type=Path, default=EXERCISES, metavar="FOLDER", help="canonical notebooks"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="notebooks at a time (one a core)")
    parser.add_argument(
        "--container", default="", metavar="IMAGE",
        help="run each notebook in a container of this image; `auto` builds one",
    )  # fmt: skip
    parser.add_argument(
        "--checks", action="append", default=[], metavar="MODULE",
        help="a module that registers more exercises",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also what was graded already")


def run(args: argparse.Namespace) -> int:
    """Grade and print. Returns 0 if every point was earned, 1 if not, 2 if a file is unreadable."""
    for file in filter(None, (args.json, args.junit)):
        require(file.parent.is_dir(), f"cannot write {file}: there is no folder {file.parent}")
    folder = next((Path(f) for f in args.files if Path(f).is_dir()), None)
    out = args.out
    if out is None and folder is not None:
        out = folder.resolve().with_name(f"{folder.resolve().name}-grades")
    try:
        scores = grade(
            args.files,
            cell_timeout=args.cell_timeout,
            total_timeout=args.total_timeout,
            memory=args.memory << 20,
            processes=args.processes,
            out=out,
            exercises=args.exercises,
            jobs=args.jobs or os.cpu_count() or 1,
            container=args.container,
            checks=args.checks,
            again=args.again,
        )
    except KeyboardInterrupt:
        if out is None:
            raise
        raise LabError(f"stopped. What is done is in {out}; the same command goes on") from None
    text = summary(scores) if folder else table(scores)
    print(text.encode("utf-8", "replace").decode())  # file names may hold bytes that are no text
    if line := isolation(scores):
        print(f"\n{line}", file=sys.stderr)
    if out is not None:
        print(f"\nwritten to {out}: scores.csv, canvas.csv, scores.json, scores.xml, report.html")
    from llmopt_lab.grading import report

    if args.json:
        report.write_json(scores, args.json)
    if args.junit:
        report.write_junit(scores, args.junit)
    if any(score.error for score in scores):
        return 2
    return 0 if all(score.earned == score.points for score in scores) else 1
