"""A real JupyterLab in a real Chromium, for tests that look at what a learner sees.

def test_something(open_lab):
    lab = open_lab(path_or_notebook)
    lab.run_all()
    lab.page.locator(".lm-player")...          # playwright's page
    lab.screenshot("something")                # into the test's temporary folder
    assert lab.errors == []
"""

import json
import os
import re
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from serving import free_port, serving

from llmopt_lab.core.device import version_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",
]


@pytest.fixture(scope="session")
def chromium():
    """One headless browser for the session."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; on Debian: apt-get install chromium")
    if version_of("playwright") is None:
        pytest.skip("playwright is not installed; run: pip install 'llmopt_lab[test]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Server:
    """A running JupyterLab."""

    url: str
    token: str
    root: Path
    settings: Path  # what a user changes in the menus, the theme for one

    def ask(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory):
    """One JupyterLab for the session, with private settings, on a free port."""
    if version_of("jupyterlab") is None:
        pytest.skip("JupyterLab is not installed; run: pip install 'llmopt_lab[lab]'")
    root, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    (home / "config/labconfig").mkdir(parents=True)
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "config/labconfig/page_config.json").write_text(json.dumps(no_news))
    port, token = free_port(), "browser-tests"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}"]
    command += ["--port-retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={root}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    private = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
        "PYTHONPATH": Path(__file__).parents[2],
        "PYTHONWARNINGS": "ignore",
    }
    environment = os.environ | {name: str(value) for name, value in private.items()}
    server = Server(f"http://127.0.0.1:{port}", token, root, home / "settings")
    status = f"{server.url}/api/status?token={token}"
    with serving(command, status, home / "log", env=environment):
        yield server


@dataclass
class Lab:
    """One notebook open in JupyterLab."""

    page: object  # playwright's
    shots: Path
    path: Path  # of the notebook on disk
    errors: list[str] = field(default_factory=list)  # console errors and exceptions in the page

    def run_all(self, timeout_s: float = 120) -> None:
        """Run every cell and wait until the last one is done."""
        self._menu("Run", "Run All Cells")
        self.page.wait_for_function(
            """() => {
                const cells = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
                return cells.every((cell) => /\\[\\d+\\]:/.test(cell.textContent));
            }""",
            timeout=timeout_s * 1000,
            polling=200,  # ms; to look at every frame of the page costs what a lesson's cells cost
        )

    def wait_for_kernel(self) -> None:
        """Running cells before the kernel is idle is silently lost."""
        self.page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)

    def save(self) -> nbformat.NotebookNode:
        """Save as a user does, and read what is on disk then.

        The server answers once the file is whole; the file changes before that.
        """

        def is_of_this_save(response) -> bool:
            return response.request.method == "PUT" and "/api/contents/" in response.url

        with self.page.expect_response(is_of_this_save) as response:
            self._menu("File", "Save Notebook")
        assert response.value.ok, f"the notebook was not saved: {response.value.status}"
        return nbformat.read(self.path, as_version=4)

    def set_theme(self, name: str) -> None:
        """`JupyterLab Light` or `JupyterLab Dark`, from the menu, while the notebook is open."""
        self._menu("Settings", "Theme", name)
        light = str("Dark" not in name).lower()
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def screenshot(self, name: str, target: str | None = None) -> Path:
        """A PNG of the page, or of the first element that a selector finds."""
        file = self.shots / f"{name}.png"
        shown = self.page.locator(target).first if target else self.page
        shown.screenshot(path=file)
        return file

    def settled_box(self, element) -> dict:
        """Where an element is once it stands still: cells that scroll in get their height late."""
        element.scroll_into_view_if_needed()
        before, box = None, element.bounding_box()
        deadline = time.monotonic() + 20
        while box != before:
            assert time.monotonic() < deadline, "the page does not come to rest"
            self.page.wait_for_timeout(400)
            element.scroll_into_view_if_needed()
            before, box = box, element.bounding_box()
        return box

    def player_titled(self, title: str):
        """The first player whose text holds `title`, in view."""
        player = self.page.locator(".lm-player", has_text=title).first
        player.wait_for()
        player.scroll_into_view_if_needed()
        return player

    def explore_with(self, label: str):
        """The first explorer whose text holds `label`, in view and at rest."""
        box = self.page.locator(".widget-vbox", has_text=label).first
        self.settled_box(box)
        return box

    def expect_clean_outputs(self) -> None:
        """No cell on the page wrote to stderr or raised."""
        assert self.page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count() == 0
        assert self.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0

    def n_cells(self) -> int:
        return self.page.locator(".jp-Notebook .jp-Cell").count()

    def _menu(self, *names: str) -> None:
        self.page.keyboard.press("Escape")
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{names[0]}$")).click()
        for name in names[1:]:
            self.page.locator(".lm-Menu-item", has_text=re.compile(f"^{name}")).first.click()


@pytest.fixture(scope="session")
def profile(chromium, tmp_path_factory):
    """A user's browser: it keeps JupyterLab's compiled scripts from page to page, on its disk."""
    with chromium.browser_type.launch_persistent_context(
        tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=QUIET
    ) as context:
        yield context


@pytest.fixture
def open_lab(profile, lab_server, tmp_path):
    """A function that opens a notebook (a path, or a notebook in memory) and gives a `Lab`."""
    pages = {}  # page -> what listens to it

    def open_notebook(notebook, *, wait_for_kernel=True, width=1280, height=1400) -> Lab:
        folder = lab_server.root / f"{tmp_path.name}-{len(pages)}"
        folder.mkdir()
        path = folder / "notebook.ipynb"
        if isinstance(notebook, (str, Path)):
            shutil.copy(notebook, path)
        else:
            # without a kernel named, JupyterLab asks for one
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            notebook.metadata.setdefault("kernelspec", kernel)
            nbformat.write(notebook, path)
        # in the window of the test before, where JupyterLab's scripts are warm, else in a new one
        page = profile.new_page() if pages else profile.pages[0]
        page.set_viewport_size({"width": width, "height": height})
        lab = Lab(page, tmp_path, path)
        pages[page] = {
            "pageerror": lambda error: lab.errors.append(str(error)),
            "console": lambda said: said.type == "error" and lab.errors.append(said.text),
        }
        for event, hear in pages[page].items():
            page.on(event, hear)
        page.goto(
            f"{lab_server.url}/lab/tree/{path.relative_to(lab_server.root)}"
            f"?reset&token={lab_server.token}"
        )
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        if wait_for_kernel:
            lab.wait_for_kernel()
        return lab

    yield open_notebook
    for page, listeners in pages.items():
        for event, hear in listeners.items():
            page.remove_listener(event, hear)
        page.goto("about:blank")
        if page is not profile.pages[0]:
            page.close()
    shutil.rmtree(lab_server.settings, ignore_errors=True)
    for session in json.loads(lab_server.ask("api/sessions")):
        lab_server.ask(f"api/sessions/{session['id']}", "DELETE")
