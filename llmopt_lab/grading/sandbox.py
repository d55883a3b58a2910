"""Where a learner's code runs: limits, a place of its own, and how it is ended.

On Linux each process is forked from one that has torch loaded already, and shut in: memory, CPU
time, file size, open files and processes are limited; its network has no device; it sees its own
processes only; all folders are read-only but one in memory; and the hidden folders are empty. What
a system refuses is reported, not hidden: `Box.missing`. With a container engine, `in_container` is
the command that does it instead. docs/grading.md says what this protects against and what not.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from llmopt_lab.core.errors import BadInput, LabError, require
from llmopt_lab.grading.wire import Channel, Stopped

NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY_NOSUID = 442, -100, 0x8000, 3
NOBODY = 2_000_000_000  # numbers from here on belong to no user of the machine
COVERED = ("/run", "/tmp", "/var/tmp", "/dev/shm")  # sockets, other people's files
START_TIMEOUT = 120.0  # seconds
PACKAGE = Path(__file__).resolve().parents[2]
ENGINES = ("docker", "podman")


@dataclass(frozen=True)
class Limits:
    """What one submission may use. Seconds, and bytes; processes include threads."""

    cell_timeout: float = 60.0
    total_timeout: float = 600.0
    memory: int = 4 << 30
    file_size: int = 64 << 20
    processes: int = 128

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value > 0, f"{name} must be positive; got {value}")


@dataclass
class Box:
    """A learner's process, from outside: its channel, what it lacks, and its end."""

    channel: Channel
    pid: int
    limits: Limits
    missing: list[str]
    end: Callable[[], None] = lambda: None
    folder: str = ""
    counted: float = 0.0

    def watch(self) -> None:
        """Raise `Stopped` if the process and all it has started use more than they may.

        A page that several processes share is counted once where the system can tell.
        """
        if time.monotonic() < self.counted:
            return
        family = _family(self.pid)
        if len(family) > self.limits.processes + 2:
            raise Stopped("processes", f"it started more than {self.limits.processes} processes")
        memory = sum(_resident(member) for member in family[2:])  # the first two are ours
        self.counted = time.monotonic() + 0.3
        if memory > self.limits.memory:
            raise Stopped("memory", f"it used more than {self.limits.memory >> 20:,} MiB")

    def stop(self) -> None:
        """End it and everything it has started."""
        import psutil

        self.end()
        for _ in range(400):
            children = _family(self.pid)[1:]
            if not children:
                break
            for member in children:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            time.sleep(0.005)
        with contextlib.suppress(psutil.Error):
            psutil.Process(self.pid).kill()
        for fd in {self.channel.read_fd, self.channel.write_fd}:
            with contextlib.suppress(OSError):
                os.close(fd)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _family(pid: int) -> list:
    """The process and everything below it that is alive."""
    import psutil

    try:
        parent = psutil.Process(pid)
        below = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    alive = []
    for member in below:
        with contextlib.suppress(psutil.Error):
            if member.status() != psutil.STATUS_ZOMBIE:
                alive.append(member)
    return [parent, *alive]


def _resident(process) -> int:
    """Bytes of memory of its own or shared with others, without the files that it has mapped."""
    import psutil

    for file, names in (
        ("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")),
        ("status", ("RssAnon:", "RssShmem:")),
    ):
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
            found = [int(line.split()[1]) for line in lines if line.startswith(names)]
            if found:
                return 1024 * sum(found)
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


class Nursery:
    """Forks learners' processes from one that has imported everything, so each starts at once.

    Make it before the first tensor is computed: a process with threads must not fork.
    """

    def __init__(self, hidden: Sequence[str | Path] = ()):
        self.hidden = [str(Path(path).resolve()) for path in hidden]
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.control.close()
            _serve_nursery(theirs)
            os._exit(0)
        theirs.close()

    def start(self, limits: Limits) -> Box:
        """A new process that runs `student.Student`.

        Raises:
            LabError: it did not start.
        """
        ours, theirs = socket.socketpair()
        folder = tempfile.mkdtemp(prefix="llmopt-grade-")
        spec = {"limits": asdict(limits), "folder": folder, "hidden": self.hidden}
        text = json.dumps(spec).encode()
        socket.send_fds(self.control, [struct.pack(">I", len(text)) + text], [theirs.fileno()])
        theirs.close()
        (pid,) = struct.unpack(">I", self.control.recv(4, socket.MSG_WAITALL))
        fd = ours.detach()
        channel = Channel(fd, os.dup(fd))
        box = Box(channel, pid, limits, [], partial(_freeze, pid), folder)
        box.missing = _greet(box, "a process for a learner's code")
        channel.watch = box.watch
        return box


def _freeze(pid: int) -> None:
    """So that it reaps nobody while its family is being counted and ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def _serve_nursery(control: socket.socket) -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        head, fds, _, _ = socket.recv_fds(control, 4, 1)
        if not head:
            return
        spec = json.loads(control.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                _enter(spec, fds[0])
            except BaseException:  # noqa: BLE001  the other end tells it
                import traceback

                text = json.dumps({"failed": traceback.format_exc()[-1500:]})
                Channel(fds[0], os.dup(fds[0])).send(text.encode(), b"")
            finally:
                os._exit(1)
        os.close(fds[0])
        control.sendall(struct.pack(">I", pid))


def _enter(spec: dict, fd: int) -> None:
    """In the new process: shut yourself in, then run the learner's code in a child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for low in (0, 1, 2):
        os.dup2(nothing, low)
    # new ones: the old ones may hold what the worker has read ahead
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 16)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    limits, folder = Limits(**spec["limits"]), spec["folder"]
    number = NOBODY + os.getpid()  # each its own, so that one's processes are not another's
    missing = shut_in(limits, folder, spec["hidden"])
    inner = os.fork()  # the first process of its own tree of processes, where there is one
    if inner:
        _wait_for(inner)
        os._exit(0)
    if "processes" not in missing and not _mount("proc", "/proc", "proc"):
        missing.append("the list of processes")
    missing += drop_rights(limits, folder, number, "processes" in missing)
    learner = os.fork()
    if learner:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _wait_for(learner)
        os._exit(0)
    channel = Channel(fd, os.dup(fd))
    channel.send(json.dumps({"missing": missing}).encode(), b"")
    from llmopt_lab.grading.student import Student

    Student(channel).work()
    os._exit(0)


def _wait_for(pid: int) -> None:
    """Until that child ends; other orphans that end meanwhile are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.wait()[0] != pid:
            pass


def shut_in(limits: Limits, folder: str, hidden: Sequence[str]) -> list[str]:
    """Namespaces and mounts for this process; what the system refused, in words."""
    if not sys.platform.startswith("linux"):
        return ["files", "network", "processes"]
    missing = []
    user, group = os.getuid(), os.getgid()
    parts = {"network": NEW_NET, "processes": NEW_PID, "files": NEW_NS | NEW_IPC}
    if user == 0:
        missing = [name for name, flag in parts.items() if not _unshare(flag)]
    elif _unshare(NEW_USER | NEW_NET | NEW_PID | NEW_NS | NEW_IPC):
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for file, text in maps.items():
            with contextlib.suppress(OSError):
                Path(f"/proc/self/{file}").write_text(text)
    else:
        missing = list(parts)
    if "files" not in missing and not _cover(limits, folder, hidden):
        missing.append("files")
    return missing


def _cover(limits: Limits, folder: str, hidden: Sequence[str]) -> bool:
    """Everything read-only, some folders empty, one folder in memory to write into."""
    size = f"size={limits.file_size * 4},nr_inodes=20000,mode=777"
    ok = _mount("none", "/", None, MS_REC | MS_PRIVATE)
    attributes = struct.pack("QQQQ", RDONLY_NOSUID, 0, 0, 0)
    ok &= 0 == _libc().syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)
    )
    needed = sorted(
        {Path(p).resolve() for p in (*filter(None, sys.path), sys.prefix, sys.base_prefix, PACKAGE)}
    )
    for name in (*COVERED, Path.home(), *hidden):
        place = Path(name).resolve()
        if place.is_dir() and place != Path("/") and place not in needed:
            ok &= _empty(place, [p for p in needed if p.is_relative_to(place)])
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return _mount("tmpfs", folder, "tmpfs", data=size) and ok


def _empty(place: Path, but: list[Path]) -> bool:
    """Mount an empty folder over a place, and show again what the course's Python needs in it."""
    tops = [p for p in but if not any(q != p and p.is_relative_to(q) for q in but)]
    fds = {path: os.open(path, os.O_PATH) for path in tops if path.exists()}
    shared = "mode=777" if place == Path("/dev/shm") else "mode=755"
    ok = _mount("tmpfs", str(place), "tmpfs", data=f"size=16m,{shared}")
    for path, fd in fds.items():
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        ok &= _mount(f"/proc/self/fd/{fd}", str(path), None, MS_BIND | MS_REC)
        os.close(fd)
    return ok


def drop_rights(limits: Limits, folder: str, number: int, shared: bool) -> list[str]:
    """Limits, an environment and a user without rights; what could not be had, in words.

    `shared`: the processes of the user who grades count as well, so the limit goes on top.
    """
    missing, processes = [], limits.processes
    if os.getuid() == 0:
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o777)
        try:
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
        except OSError:
            missing.append("a user of its own")
    else:
        processes += _n_tasks_of(os.getuid()) if shared else 0
        header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", *[0] * 6)
        if (call := SYS_CAPSET.get(os.uname().machine)) is not None:
            _libc().syscall(call, header, none)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(limits.total_timeout) + 1),
        (resource.RLIMIT_FSIZE, limits.file_size),
        (resource.RLIMIT_NOFILE, 512),
        (resource.RLIMIT_DATA, limits.memory),
        (getattr(resource, "RLIMIT_NPROC", None), processes),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError, TypeError):
            missing.append(f"limit {kind}")
    os.chdir(folder)
    keep = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(("LC_", "TRITON_"))}
    os.environ.clear()
    os.environ.update(
        keep, HOME=folder, TMPDIR=folder, IPYTHONDIR=f"{folder}/.ipython", MPLBACKEND="Agg",
        TRITON_CACHE_DIR=f"{folder}/.triton", OMP_NUM_THREADS="1",
    )  # fmt: skip
    tempfile.tempdir = None
    return missing


_KEPT = ("PATH", "PYTHONPATH", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


def _n_tasks_of(user: int) -> int:
    import psutil

    found = psutil.process_iter(["uids", "num_threads"])
    return sum(
        p.info["num_threads"] or 1 for p in found if p.info["uids"] and p.info["uids"].real == user
    )


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        _libc().prctl(option, value, 0, 0, 0)


def _unshare(flags: int) -> bool:
    return _libc().unshare(flags) == 0


def _mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> bool:
    flags = flags or MS_NOSUID | MS_NODEV
    text = [x.encode() if x is not None else None for x in (source, target, kind)]
    return _libc().mount(*text, ctypes.c_ulong(flags), data.encode() or None) == 0


# containers


def find_engine() -> str:
    """The path of docker or podman: the first one that answers.

    Raises:
        BadInput: none does.
    """
    said = []
    for name in ENGINES:
        path = shutil.which(name)
        if path is None:
            said.append(f"{name}: not found")
            continue
        answer = _ask(path, "version")  # docker's client is often there without its daemon
        if answer.returncode == 0:
            return path
        said.append(f"{name}: {(answer.stderr.strip().splitlines() or ['no answer'])[-1]}")
    raise BadInput(
        f"no container engine: {'; '.join(said)}. Install or start one, or leave --container out: "
        "then each submission runs in a process that is shut in by the system itself"
    )


def _ask(engine: str, *question: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [engine, *question], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def in_container(engine: str, image: str, limits: Limits, name: str) -> list[str]:
    """The command that runs one learner's process in a container of its own.

    It speaks on standard input and output. The image has Python, torch and the `lab` extra; the
    package itself is mounted, read-only, so that it is the judge's version.
    """
    return [
        engine, "run", "--rm", "--interactive", f"--name={name}", "--network=none", "--read-only",
        "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=65534:65534", "--ipc=none",
        f"--memory={limits.memory}", f"--memory-swap={limits.memory}",
        f"--pids-limit={limits.processes}", f"--ulimit=fsize={limits.file_size}",
        "--ulimit=nofile=512", "--ulimit=core=0", "--pull=never",
        f"--tmpfs=/work:size={limits.file_size * 4},mode=1777", "--workdir=/work",
        f"--volume={PACKAGE / 'llmopt_lab'}:/course/llmopt_lab:ro",
        "--env=PYTHONPATH=/course", "--env=HOME=/work", "--env=TMPDIR=/work",
        "--env=MPLBACKEND=Agg", "--env=OMP_NUM_THREADS=1", image,
        "python", "-m", "llmopt_lab.grading.student",
    ]  # fmt: skip


def start_container(engine: str, image: str, limits: Limits) -> Box:
    """A learner's process in a container."""
    name = f"llmopt-grade-{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        in_container(engine, image, limits, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def end() -> None:
        subprocess.run([engine, "kill", name], capture_output=True, timeout=60, check=False)
        process.kill()
        process.wait()

    # they outlive the objects, which a garbage collection may close
    fds = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
    process.stdin.close()
    process.stdout.close()
    box = Box(Channel(*fds), process.pid, limits, [], end)
    box.missing = _greet(box, f"the container of image {image}")
    return box


def _greet(box: Box, what: str) -> list[str]:
    """Wait for the first message; what of the isolation the system refused."""
    box.channel.deadline = time.monotonic() + START_TIMEOUT
    why = "it said nothing"
    try:
        hello = json.loads(box.channel.receive()[0])
        if "missing" in hello:
            return hello["missing"]
        why = hello.get("failed", why)
    except (EOFError, TimeoutError, ValueError) as error:
        why = repr(error)
    box.stop()
    raise LabError(f"{what} did not start: {why}")


DOCKERFILE = """\
FROM python:3.12-slim
COPY pyproject.toml constraints.txt README.md LICENSE /course/
COPY llmopt_lab /course/llmopt_lab
RUN pip install --no-cache-dir -c /course/constraints.txt "/course[lab]" \\
    && pip uninstall -y llmopt_lab
"""
AUTO = "llmopt-lab-grade"


def find_image(engine: str, image: str) -> str:
    """The image that is asked for; "auto" is built from this checkout if it is not there yet.

    Raises:
        BadInput: it is not there.
        LabError: it cannot be built.
    """
    auto = image == "auto"
    name = AUTO if auto else image
    there = _ask(engine, "image", "inspect", name).returncode == 0
    program = Path(engine).name
    require(
        there or auto,
        f"no image {image} in {program}: build it first, or {program} pull {image}. "
        "--container auto builds one",
    )
    if not there:
        require(
            (PACKAGE / "pyproject.toml").exists(),
            "--container auto builds its image from a checkout of the course; this is an installed "
            "package. Name an image that has torch and the `lab` extra",
        )
        print(f"building the image {AUTO}; minutes the first time", file=sys.stderr)
        command = [engine, "build", "--tag", AUTO, "--file", "-", str(PACKAGE)]
        built = subprocess.run(command, input=DOCKERFILE, text=True, check=False)
        if built.returncode != 0:
            raise LabError(f"{' '.join(command)} failed; its messages are above")
    return name
