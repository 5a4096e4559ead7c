"""Shared by all tests: the built book and a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserType

ROOT = Path(__file__).resolve().parents[1]
# As root Chromium has no sandbox; the rest keeps it from looking for its maker's hosts.
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def make(target: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``make target``, whoever called us."""
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", target], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def html() -> Path:
    """The folder of the built book; builds it where it is missing or older than its sources."""
    cache = ROOT / ".pytest_cache"
    cache.mkdir(exist_ok=True)
    with FileLock(cache / "book.lock"):  # tests run in several processes
        done = make("_build/html/.stamp")
    if done.returncode:
        pytest.fail(f"the book does not build:\n{done.stdout[-6000:]}", pytrace=False)
    return ROOT / "_build" / "html"


def _launch(chromium: BrowserType) -> Browser:
    """Chromium of the system, else Playwright's own, else Debian's package (as root)."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None and not Path(chromium.executable_path).exists():
        install = [sys.executable, "-m", "playwright", "install", "chromium"]
        if subprocess.run(install, capture_output=True, timeout=300).returncode:
            if os.name != "posix" or os.geteuid() != 0 or not shutil.which("apt-get"):
                raise RuntimeError("no system Chromium, Playwright could not fetch one, and not root on Debian")
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True, timeout=300)
            subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], capture_output=True, timeout=900)
            path = shutil.which("chromium")
    return chromium.launch(executable_path=path, args=CHROMIUM)


@pytest.fixture(scope="module")  # not for the session: while it is open, its event loop runs, and asyncio.run() cannot
def browser() -> Iterator[Browser]:
    """Headless Chromium. Where none can be had the test is skipped, or fails if ``PEFTREF_REQUIRE_BROWSER`` is set."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            instance = _launch(playwright.chromium)
        except (Error, RuntimeError, subprocess.TimeoutExpired) as error:
            reason = f"no browser: {error}"
            if os.environ.get("PEFTREF_REQUIRE_BROWSER"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        yield instance
        instance.close()
