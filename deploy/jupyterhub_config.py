"""JupyterHub for a class: one container a learner, limits on each, homes that stay.

    LLMOPT_CLASS_PASSWORD=... LLMOPT_ADMIN_PASSWORD=... jupyterhub -f deploy/jupyterhub_config.py

docs/jupyterhub.md explains the choices.
"""

import os

c = get_config()  # noqa: F821  JupyterHub gives it to the files that it loads


def secret(name: str, least: int) -> str:
    """A password from the environment; the hub does not start on a missing or a short one."""
    value = os.environ.get(name, "")
    if len(value) < least:
        raise SystemExit(f"Set {name} to at least {least} characters before you start JupyterHub.")
    return value


# Who may come in: everyone who knows the class's password, under the name they type.
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = secret("LLMOPT_CLASS_PASSWORD", 8)
c.SharedPasswordAuthenticator.admin_password = secret("LLMOPT_ADMIN_PASSWORD", 32)
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {"instructor"}

# Where they work: a container of deploy/Dockerfile's image, removed when it stops.
c.JupyterHub.spawner_class = "docker"
c.DockerSpawner.image = os.environ.get("LLMOPT_IMAGE", "llmopt-lab:latest")
c.DockerSpawner.remove = True
c.DockerSpawner.network_name = os.environ.get("LLMOPT_NETWORK", "llmopt")
c.DockerSpawner.use_internal_ip = True
c.DockerSpawner.volumes = {"llmopt-{username}": "/home/learner"}
c.DockerSpawner.notebook_dir = "/home/learner"
c.Spawner.default_url = "/lab/tree/notebooks/0_start_here.ipynb"
c.Spawner.start_timeout = 600  # seconds, to make a container, and
c.Spawner.http_timeout = 600  # until its server answers: a class starts all at once

# One learner cannot take the machine from the others.
c.Spawner.mem_limit = "4G"
c.Spawner.cpu_limit = 2.0
c.DockerSpawner.extra_host_config = {
    "pids_limit": 512,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}
c.DockerSpawner.extra_create_kwargs = {"user": "learner"}
c.Spawner.environment = {"OMP_NUM_THREADS": "2"}  # torch would take every core of the host

# The hub itself. The proxy runs beside it; containers reach it by its name or address in their
# network, which podman's hosts have only while a container runs.
c.JupyterHub.bind_url = os.environ.get("LLMOPT_BIND", "http://127.0.0.1:8000")
c.JupyterHub.hub_ip = "0.0.0.0"
c.JupyterHub.hub_connect_ip = "127.0.0.1"
c.Spawner.hub_connect_url = f"http://{os.environ.get('LLMOPT_HUB_NAME', 'jupyterhub')}:8081"
c.JupyterHub.active_server_limit = 40
c.JupyterHub.cookie_secret_file = os.environ.get("LLMOPT_COOKIES", "jupyterhub_cookie_secret")
c.JupyterHub.db_url = os.environ.get("LLMOPT_DB", "sqlite:///jupyterhub.sqlite")
