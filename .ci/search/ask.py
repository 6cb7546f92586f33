"""Asks the built site the questions of questions.toml in Chromium: python .ci/search/ask.py SITE [--least N]

SITE is a folder, which is opened as files without a server, or an address. A question is answered if the first result
leads to one of its pages; where the question names a section, to that section. Without a browser nothing is asked.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "shared"))

import pytest  # noqa: E402
from browser import chromium  # noqa: E402
from playwright.sync_api import TimeoutError  # noqa: E402


def first(page: Any, root: str, words: str) -> str:
    """Where the first result for some words leads, below the root; empty if there is none."""
    links = page.locator("dialog li a[href]")
    page.locator("dialog input").fill("")
    links.first.wait_for(state="detached")
    page.locator("dialog input").fill(words)
    try:
        links.first.wait_for(state="attached", timeout=3000)
    except TimeoutError:
        return ""
    href = links.first.evaluate("link => link.href")
    path, mark, anchor = href.removeprefix(root).partition("#")
    return path.partition("?")[0] + mark + unquote(anchor)


def answers(found: str, wanted: list[str]) -> bool:
    """Whether a result is one of the wanted pages or sections; a page in Chinese has its name with .zh."""
    found = found.replace(".zh.html", ".html")
    return any(found == page or ("#" not in page and found.partition("#")[0] == page) for page in wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.toml")
    parser.add_argument("--least", type=int, default=0, help="fewer right first results are an error")
    options = parser.parse_args()
    root = options.site if "://" in options.site else Path(options.site).resolve().as_uri()
    root = root.rstrip("/") + "/"
    questions = tomllib.loads(options.questions.read_text("utf-8"))["question"]
    right = 0
    with chromium() as browser:
        page = browser.new_page()
        page.goto(root + "index.html")
        page.locator("[data-md-component=search] button").click()
        page.locator("dialog [role=status]").filter(has_not_text="Loading").wait_for(state="attached")
        for question in questions:
            found = first(page, root, question["text"])
            good = answers(found, question["pages"])
            right += good
            print(f"{'ok   ' if good else 'WRONG'} {question['text']:<42} {found or 'nothing'}")
    print(f"the right page is first for {right} of {len(questions)} questions")
    return right < options.least


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except pytest.skip.Exception as reason:
        print(f"the search was not asked: {reason}")
