"""The search of the documentation's site, in a page that is opened from disk. `make site` asks the whole site."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from browser import chromium

SEARCH = Path(__file__).resolve().parents[1] / ".ci" / "search"
PAGE = """<!doctype html><meta charset="utf-8"><body><script src="frame.js"></script><script>
const worker = new Worker("worker.js")
let told
worker.onmessage = ({ data }) => told(data)
window.send = message => new Promise(resolve => { told = resolve; worker.postMessage(message) })
</script>"""
GLOSSARY = """| term | 中文 | meaning |
|---|---|---|
| [dead group](tasks.md), flat group | 无对比组 | equal rewards |

## Other words

| you may say | 你可能会说 | here |
|---|---|---|
| oom | 显存不足、爆显存 | out of memory |
| | 服务器 | server |
"""
ITEMS = [
    ("api/rl.html#LoRA", "LoRA", "<p>LoRA of LoRA</p>", 0.15),
    ("guide.html#lora", "LoRA", "<p>Trains two <code>matrices</code> on a server.</p>", 1.0),
    ("troubleshooting.html#memory", "Out of memory", "<p>Lower <code>micro_tokens</code>.</p>", 1.0),
    ("groups.html", "Groups", "<p>A dead group teaches nothing. Runs resume.</p>", 1.0),
    ("zh.html", "训练", "<p>断点续训，奖励函数</p>", 1.0),
    *((f"page{number}.html", f"Page {number}", "<p>pages of words</p>", 1.0) for number in range(12)),
]


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    for name in ("frame.js", "worker.js"):
        shutil.copy(SEARCH / name, folder)
    (folder / "index.html").write_text(PAGE, "utf-8")
    terms = runpy.run_path(str(SEARCH / "install.py"))["terms"](GLOSSARY)
    items = [dict(zip(("location", "title", "text", "weight"), item, strict=True)) | {"path": []} for item in ITEMS]
    with chromium() as browser:
        page = browser.new_page()
        page.goto((folder / "index.html").as_uri())
        answer = page.evaluate(f"send({json.dumps({'type': 0, 'data': {'config': {'terms': terms}, 'items': items}})})")
        assert answer["type"] == 1

        def asked(words, place=None):
            query = {"type": 2, "data": {"input": words, "page": place}}
            return page.evaluate(f"send({json.dumps(query)})")["data"]

        yield asked


@pytest.mark.parametrize(
    ("words", "location"),
    [
        ("LoRA", "guide.html#lora"),  # before the API, whose title is the same
        ("how does training run out of memory", "troubleshooting.html#memory"),  # not every word is there
        ("OOM", "troubleshooting.html#memory"),
        ("resuming", "groups.html"),
        ("resu", "groups.html"),  # while it is typed
        ("memroy", "troubleshooting.html#memory"),
        ("micro_tokens", "troubleshooting.html#memory"),
        ("续训", "zh.html"),
        ("奖励函数怎么写", "zh.html"),
        ("爆显存怎么办", "troubleshooting.html#memory"),
        ("无对比组", "groups.html"),
        ("服务器", "guide.html#lora"),
    ],
)
def test_a_question_finds_its_page(ask, words, location):
    assert ITEMS[ask(words)["items"][0]["id"]][0] == location


def test_nothing_is_found_for_words_that_are_nowhere(ask):
    assert ask("quixotic zebras")["items"] == [] and ask("  ")["items"] == []


def test_results_come_in_pages(ask):
    first = ask("pages")
    assert first["pagination"]["total"] == 12 and len(first["items"]) == 10
    rest = ask("pages", first["pagination"]["next"])
    assert len({item["id"] for item in first["items"] + rest["items"]}) == 12 and rest["pagination"]["next"] is None


def test_found_words_are_marked_in_the_text(ask):
    fields = {match["field"]: match["value"] for match in ask("matrices")["items"][0]["matches"]}
    [mark] = fields["text"]["highlight"]["ranges"]
    assert (
        fields["text"]["text"][mark["start"] : mark["end"]] == "matrices" and not fields["title"]["highlight"]["ranges"]
    )
