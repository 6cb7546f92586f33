"""The chat page in headless Chromium, against the real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from page_helpers import Chat, chromium, chunk, make_run, token, wait_for
from serving import Running, running

HOSTILE = """<script>window.owned = 1</script><img src=x onerror='window.owned = 1'> **<b>bold</b>** `<i>` &amp;

```html
<a href=javascript:owned()>
```"""
BAR = ".turn:last-child .answer"
GROW = """async ([words, length]) => {
  const { paint } = await import("./static/text.js"), { looks } = await import("./static/tokens.js");
  const grown = document.createElement("div"), plain = document.createElement("div"), pieces = [];
  let text = "", random = 7, differ = 0, whole;
  for (let i = 0; i < length; i += 1) {
    random = (random * 1103515245 + 12345) % 2 ** 31;
    const word = words[(random >> 8) % words.length];
    text += word;
    pieces.push({ text: word, of: [{ t: word || "<unsaid>", p: -0.1, top: [], experts: null }] });
    paint(grown, text, looks(pieces));
    paint((whole = document.createElement("div")), text, looks(pieces));
    differ += grown.innerHTML !== whole.innerHTML;
  }
  paint(plain, text);
  const said = [...plain.children].map((line) => line.textContent.replace(/\\n$/, "")).join("\\n");
  const marks = whole.querySelectorAll(".mark").length;
  return { differ, text, plain: said, marks };
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    with running(make_run(tmp_path_factory.mktemp("run"))) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture
def chat(browser, server) -> Iterator[Chat]:
    chat = Chat(browser, server.url)
    yield chat
    chat.check()


def test_an_answer_streams_and_its_thought_is_folded(chat, server):
    sampling = {"thinking_budget": 200, "max_tokens": 240, "seed": 3}
    question = "Use 2, 5, 3 to make 30."
    chat.set(**sampling)
    chat.watch()
    chat.ask(question)
    seen = chat.page.evaluate("window.seen")
    assert "thinking open" in seen and "thinking folded" not in seen and seen[-1] == "done folded"
    thought, seconds = re.fullmatch(r"Thought for (\d+) tokens?, ([\d.]+) m?s", chat.text(f"{BAR} summary")).groups()
    told = server.chat(question, **sampling).json()  # the same without a browser and without a stream
    assert chat.answer() == told["choices"][0]["message"]["content"] != ""
    assert chat.answer(".thought") == told["choices"][0]["message"]["reasoning_content"]
    assert int(thought) == told["usage"]["completion_tokens_details"]["reasoning_tokens"] and float(seconds) > 0
    assert re.match(r"\d+ tokens · [\d.]+ tokens/s · first in [\d.]+ m?s", chat.text(f"{BAR} .figures"))
    chat.page.click(f"{BAR} summary")
    chat.page.reload()
    chat.page.wait_for_selector(f"{BAR} .thought[open]")  # the reader's choice is remembered
    assert "script-src 'self'" in chat.reply.headers["content-security-policy"]


def test_stopping_keeps_what_came_and_frees_the_slot(chat, server):
    chat.endless()
    chat.send("Tell me all.")
    chat.page.wait_for_selector(f"{BAR} .line")
    assert server.open_samples == 1
    chat.page.keyboard.press("Escape")
    chat.done()
    assert server.settles()
    assert chat.page.locator(BAR).get_attribute("data-phase") == "stopped"
    assert chat.text(f"{BAR} .thought .lines") and "Stopped" in chat.text(f"{BAR} .trouble")


def test_questions_are_edited_and_answers_retried(chat):
    chat.set(thinking="never", max_tokens=8, seed=5)
    for question in ("one", "two", "three"):
        chat.ask(question)
    first = chat.answer()
    chat.page.click(f"{BAR} >> text=Retry")
    chat.done()
    assert chat.answer() == first  # a fixed seed says the same again
    chat.page.hover(".turn:nth-child(2) .question")
    chat.page.click(".turn:nth-child(2) >> text=Edit")
    chat.page.keyboard.type(" and a half")
    chat.page.keyboard.press("Enter")
    chat.done()
    assert chat.questions() == ["one", "two and a half"]
    chat.page.click("#notice >> text=Undo")
    assert chat.questions() == ["one", "two", "three"]
    chat.page.focus("#question")
    chat.page.keyboard.press("ArrowUp")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("four")
    chat.page.keyboard.press("Enter")
    chat.done()
    assert chat.questions() == ["one", "two", "three\nfour"]
    chat.page.click("#fresh")
    assert chat.questions() == [] and chat.page.is_visible("#start")


def test_two_models_answer_side_by_side_at_once(browser, server):
    chat = Chat(browser, server.url, width=360)
    chat.endless()
    chat.page.click("text=Side by side")
    chat.page.click("text=/^zero$/")
    chat.send("Use 2, 5, 3 to make 30.")
    wait_for(lambda: chat.page.locator(".answer.live:has(.line)").count() == 2, "both answers grow at once")
    chat.page.click(f"{BAR} >> nth=0 >> text=Stop")
    wait_for(lambda: chat.page.locator(".answer.live").count() == 1, "one stops, the other goes on")
    chat.page.click("#stop")
    chat.done()
    assert chat.page.locator(".answer header b").all_text_contents() == ["r1", "zero"]
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360  # columns scroll, the page does not
    assert chat.page.evaluate("document.querySelector('.columns').scrollWidth") > 500
    chat.check()


def test_the_card_shows_probabilities_and_experts(chat):
    chat.set(thinking_budget=4, max_tokens=24, temperature=2, seed=3)
    chat.ask("盛钢水")
    plain = chat.answer()
    chat.page.click("#details")
    chat.page.wait_for_selector(f"{BAR} .text .token")
    assert chat.page.locator(f"{BAR} .token").count() >= 20
    assert chat.answer() == plain and "</think>" in chat.text(f"{BAR} .thought .lines")
    chat.page.hover(f"{BAR} .text .token >> nth=2")
    card = chat.page.locator("#card")
    assert card.is_visible() and card.locator(".others li").count() >= 5
    shares = [float(share.strip("< %")) for share in card.locator(".others").first.locator("b").all_text_contents()]
    assert all(0 < share <= 100 for share in shares) and sum(shares) <= 101
    experts = card.locator("svg").first.get_attribute("aria-label")
    assert re.fullmatch(r"Experts in layer 2: [0-7], [0-7]; layer 3: [0-7], [0-7]", experts)
    chat.page.mouse.move(2, 300)
    chat.page.focus("#details")
    chat.page.locator(f"{BAR} .text").focus()
    chat.page.keyboard.press("ArrowRight")
    card.wait_for(state="visible")
    wait_for(lambda: "%" in chat.text("#said"), "what the card shows is said")


def test_hostile_output_stays_text(chat):
    tokens = [token(HOSTILE, others=("<script>owned = 1</script>",))]
    chat.feed(chunk(reasoning_content=HOSTILE), chunk(content=HOSTILE, tokens=tokens), chunk(finish="stop"))
    chat.page.click("#details")
    chat.ask(HOSTILE)
    assert chat.answer() == HOSTILE and chat.questions() == [HOSTILE]
    chat.page.hover(f"{BAR} .text .token >> nth=0")
    assert "<script>" in chat.text("#card")
    chat.page.click("#details")
    chat.page.wait_for_selector(".token", state="detached")
    assert chat.answer() == HOSTILE  # plain, the marks of the format are hidden but there
    assert chat.page.locator("#middle :is(script, img, b b, a)").count() == 0
    assert chat.page.evaluate("window.owned") is None


def test_tokens_find_their_text(chat):
    """Characters of several tokens, tags without text, text held back: nothing is lost, nothing said twice."""
    half = [
        {**token("bytes:x"), "bytes": list("炉".encode()[:2])},
        {**token("bytes:y"), "bytes": list("炉".encode()[2:])},
    ]
    thought = [
        chunk(tokens=[token("<think>"), token("a"), half[0]], reasoning_content="a"),
        chunk(tokens=[half[1], token(" b")], reasoning_content="炉 b"),
    ]
    held = [chunk(tokens=[token("\n"), token("held")]), chunk(tokens=[token(" back")], content="held back")]
    ends = {
        "apart": [chunk(tokens=[token("</think>")]), *held],
        "with the answer": [chunk(tokens=[token("</think>"), token("held"), token(" back")], content="held back")],
        "no answer": [chunk(tokens=[token("</think>")])],
    }
    chat.page.click("#details")
    for how, end in ends.items():
        chat.feed(*thought, *end, chunk(finish="stop"))
        chat.ask(how)
        assert chat.page.locator(f"{BAR} .thought .token").all_text_contents() == [
            "<think>",
            "a",
            "炉",
            " b",
            "</think>",
        ]
        said = chat.page.locator(f"{BAR} .text .token").all_text_contents()
        assert said == ([] if how == "no answer" else ["held", " back"])


def test_a_text_painted_as_it_grows_is_the_text_painted_at_once(chat):
    words = [
        "**bo",
        "ld** ",
        "2**3",
        "`co",
        "de`",
        "\n",
        "\n\n",
        "```py",
        "\n```\n",
        "<answer>",
        "4</answer>",
        " ",
        "炉",
        "",
    ]
    seen = chat.page.evaluate(GROW, [words, 300])
    assert seen["differ"] == 0 and seen["text"] == seen["plain"] and seen["marks"] >= 10


def test_trouble_is_said_in_plain_words_and_overcome(chat):
    chat.set(thinking="never", max_tokens=6, seed=5)
    chat.feed({"error": {"message": "full", "code": "queue_full"}}, status=429, headers={"Retry-After": "1"})
    chat.send("Is there room?")
    chat.page.wait_for_selector(f"{BAR}[data-phase=queued] >> text=The queue is full.")
    chat.done()  # asked again by itself
    assert chat.answer()

    chat.feed({"error": {"message": "the step failed"}}, status=500)
    chat.ask("Again.")
    assert chat.text(f"{BAR} .trouble") == "The step failed."

    chat.page.route("**/v1/**", lambda route: route.abort())
    chat.page.click(f"{BAR} >> text=Retry")
    chat.page.wait_for_selector("#notice >> text=The server does not answer")
    chat.page.unroute("**/v1/**")
    chat.page.wait_for_selector("#notice", state="hidden")  # found again by itself
    chat.page.click(f"{BAR} >> text=Retry")
    chat.done()
    assert chat.answer()

    def lock(route):
        opened = route.request.headers.get("authorization") == "Bearer sesame"
        route.continue_() if opened else route.fulfill(status=401, json={"error": {"message": "no"}})

    chat.page.route("**/v1/**", lock)
    chat.ask("Locked?")
    chat.page.fill("#key-text", "sesame")
    chat.page.press("#key-text", "Enter")
    chat.page.wait_for_selector("#key", state="hidden")
    chat.page.click(f"{BAR} >> text=Retry")
    chat.done()
    assert chat.answer()


@pytest.mark.parametrize(
    "kept",
    [
        "{",
        "null",
        '[{"question": 1}, 7, null, {"question": "x", "answers": [{"model": [], "text": 5, "pieces": {"text": [0]}}]}]',
    ],
)
def test_broken_storage_costs_no_more_than_itself(browser, server, kept):
    before = "".join(f"localStorage.setItem('bessemer.{name}.1', {json.dumps(kept)});" for name in ("talk", "settings"))
    chat = Chat(browser, server.url, before=f"if (!sessionStorage.seen) {{ {before} sessionStorage.seen = 1; }}")
    chat.set(thinking="never", max_tokens=4, seed=5)
    chat.ask("Still there?")
    answer = chat.answer()
    chat.open()
    assert answer and chat.answer() == answer and chat.questions()[-1] == "Still there?"
    assert chat.page.input_value("#settings [name=max_tokens]") == "4"
    chat.check()
