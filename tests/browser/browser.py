"""A real browser and a running page, for tests and for the README's screenshots."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NO_BROWSER = (
    "The browser tests need Chromium: install your system's package (Debian: apt-get install chromium), "
    "or run `.venv/bin/playwright install chromium`, or set CHROMIUM to its path."
)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium from CHROMIUM, from the path, or Playwright's own. RuntimeError says how to get one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Error as error:
            raise RuntimeError(NO_BROWSER) from error
        yield browser
        browser.close()


@contextlib.contextmanager
def serve_page(program: str = "serve.py") -> Iterator[str]:
    """A page in a process of its own, by default as a newcomer starts it; its address once it answers."""
    port = free_port()
    environment = os.environ | {"PORT": str(port), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, program], cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(address: str, server: subprocess.Popen, limit_s: float = 120) -> None:
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        assert server.poll() is None, "the page ended before it answered"
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{address} did not answer within {limit_s} s")
