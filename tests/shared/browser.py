"""Headless Chromium for the tests of the pages, and axe-core, which finds accessibility faults in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test, with the reason, if there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with playwright, which is not installed"
    )
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if binary is None:
        pytest.skip(f"the page is tested in a browser, and none of {', '.join(CHROMIUM)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=ARGUMENTS)
        yield browser
        browser.close()


def violations(page: Any) -> list[str]:
    """What axe-core, with its best practices, finds on a page in its present state: rule, element and reason."""
    folder = pytest.importorskip("axe_playwright_python", reason="axe-core comes with axe-playwright-python")
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(resources.files(folder.__name__).joinpath("axe.min.js").read_text("utf-8") + ";0")
    entries = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in entries for node in rule["nodes"]]
