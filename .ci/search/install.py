"""Gives the built site its own search: python .ci/search/install.py SITE

The theme's index keeps its form; it loses the API's attributes, and its pages get weights and the glossary's terms.
The theme's worker is replaced by worker.js. For a site that is opened without a server, search.js is the index, and
frame.js goes before the theme's script. Pages in Chinese say so to browsers and screen readers.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WEIGHTS = {
    "api/": 0.15, "source/": 0.3, "log.": 0.3, "claims-rules.": 0.4, "results.": 0.5, "keys.": 0.6, "conformance.": 0.6,
    "architecture.": 0.6, "walkthrough.": 0.6, "planner.": 0.7, "glossary.": 0.5, "index.": 0.5, "zh.": 0.5,
    "features.": 0.5, "status.": 0.5, "faq.": 0.9, "notebooks/": 0.7, "vectors.": 0.8,
}  # fmt: skip
"""Beginnings of a page's address: how much its results count beside those of a guide."""


def terms(glossary: str) -> dict[str, list[str]]:
    """Words of a question: how the pages say it. Rows of the glossary's first table, and of "Other words"."""
    found: dict[str, list[str]] = {}
    listed, _, others = glossary.partition("## Other words")
    for english, chinese in re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", listed, re.M):
        names = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", english).split(", ")
        for run in re.findall(r"[\u4e00-\u9fff]{2,}", chinese):
            found.setdefault(run, []).extend(names)
    for english, chinese, here in re.findall(r"^\|(.*)\|(.*)\| (.+) \|$", others, re.M):
        for name in [*english.split(", "), *chinese.split("、")]:
            if name.strip():
                found.setdefault(name.strip(), []).extend(here.split(", "))
    return found


def install(site: Path, glossary: str) -> None:
    index = json.loads((site / "search.json").read_text("utf-8"))
    index["items"] = [item for item in index["items"] if "attribute</code>" not in item["title"]]
    for item in index["items"]:
        item["weight"] = next((weight for start, weight in WEIGHTS.items() if item["location"].startswith(start)), 1.0)
    index["config"]["terms"] = terms(glossary)
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    (site / "search.json").write_text(text, "utf-8")
    (site / "search.js").write_text(f"var __index = {text}", "utf-8")
    for page in (site / "zh.html", *site.rglob("*.zh.html")):
        page.write_text(page.read_text("utf-8").replace('<html lang="en"', '<html lang="zh-Hans"', 1), "utf-8")
    scripts = site / "assets" / "javascripts"
    [worker], [bundle] = scripts.glob("workers/search.*.js"), scripts.glob("bundle.*.js")
    shutil.copyfile(HERE / "worker.js", worker)
    bundle.write_text((HERE / "frame.js").read_text("utf-8") + bundle.read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    install(Path(sys.argv[1]), (HERE.parents[1] / "docs" / "glossary.md").read_text("utf-8"))
