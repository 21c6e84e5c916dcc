"""A real browser without a window, that opens one page."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.mesh import environment, missing

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome-headless-shell")


@contextmanager
def open_page(url: str, path: Path) -> Iterator[None]:
    """The page is open as long as the context. Its files are under `path`."""
    command = next((found for name in NAMES if (found := shutil.which(name))), None) or missing("chromium")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--no-proxy-server", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--remote-debugging-port=0", f"--user-data-dir={path / 'browser'}",
    ]  # fmt: skip
    with open(path / "browser.log", "wb") as log:
        process = subprocess.Popen(
            [command, *options, url], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(),
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
