"""The chat page in headless Chromium, against the real server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import violations
from page_helpers import Chat, chunk, token, wait_for
from serving import Running

from bessemer.addons.serve import app
from bessemer.addons.serve.scheduler import Scheduler

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
def server(run_server) -> Running:
    return run_server


@pytest.fixture
def chat(browser, server) -> Iterator[Chat]:
    chat = Chat(browser, server.url)
    yield chat
    chat.check()


@pytest.fixture
def slow_steps(monkeypatch):
    """Answers last longer than a slow browser takes to show them, on fast processors too."""
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: (time.sleep(0.01), step(self))[1])


def test_an_answer_streams_and_its_thought_is_folded(chat, server, slow_steps):
    sampling = {"thinking_budget": 200, "max_tokens": 240, "seed": 3}
    question = "Use 2, 5, 3 to make 30."
    chat.set(**sampling)
    chat.watch()
    chat.ask(question)
    seen = chat.page.evaluate("window.seen")
    assert "thinking open" in seen and "thinking folded" not in seen and seen[-1] == "done folded"
    thought, seconds = re.fullmatch(r"Thought for (\d+) tokens?, ([\d.]+) m?s", chat.text(f"{BAR} summary")).groups()
    direct = server.chat(question, **sampling).json()  # the same request without a browser or a stream
    assert chat.answer() == direct["choices"][0]["message"]["content"] != ""
    assert chat.answer(".thought") == direct["choices"][0]["message"]["reasoning_content"]
    assert int(thought) == direct["usage"]["completion_tokens_details"]["reasoning_tokens"] and float(seconds) > 0
    assert re.match(r"\d+ tokens · [\d.\u2009]+ tokens/s · first in [\d.]+ m?s", chat.text(f"{BAR} .figures"))
    chat.page.click(f"{BAR} summary")
    chat.page.reload()
    chat.page.wait_for_selector(f"{BAR} .thought[open]")  # the reader's choice is remembered
    assert "script-src 'self'" in chat.reply.headers["content-security-policy"]


def test_stopping_keeps_what_came_and_frees_the_slot(chat, server, slow_steps):
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
    assert chat.answer() == first  # a fixed seed gives the same answer again
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


def test_a_model_trained_on_single_questions_reads_each_alone(chat):
    chat.set(thinking="never", max_tokens=4, seed=5)
    read = []
    chat.page.on(
        "request",
        lambda request: (
            request.url.endswith("/completions")
            and read.append([message["role"] for message in request.post_data_json["messages"]])
        ),
    )
    for question, reads in (("one", "auto"), ("two", "auto"), ("three", "talk"), ("four", "alone")):
        chat.set(reads=reads)
        chat.ask(question)
        alone = chat.page.locator(f"{BAR} .figures").text_content()
        assert ("read the question alone" in alone) == (question in ("two", "four"))
    assert read == [["user"], ["user"], ["user", "assistant", "user", "assistant", "user"], ["user"]]
    chat.open()  # which answers read the question alone has been saved
    marked = chat.page.locator(".answer .figures").all_text_contents()
    assert ["alone" in message for message in marked] == [False, True, False, True]


def test_two_models_answer_side_by_side_at_once(browser, server, slow_steps):
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
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360  # the columns scroll, not the page
    assert chat.page.evaluate("document.querySelector('.columns').scrollWidth") > 500
    chat.check()


def test_the_card_shows_probabilities_and_experts(chat):
    chat.set(thinking_budget=4, max_tokens=24, temperature=2, seed=3)
    chat.ask("盛钢水")
    plain = chat.answer()
    chat.page.click("#details")
    chat.page.wait_for_selector(f"{BAR} .text .token")
    for part in (f"{BAR} .thought .lines", f"{BAR} .text"):  # whatever was sampled, every character belongs to a token
        assert "".join(chat.page.locator(f"{part} .token").all_text_contents()) == chat.text(part) != ""
    assert chat.answer() == plain and "</think>" in chat.text(f"{BAR} .thought .lines")
    chat.page.hover(f"{BAR} .text .token >> nth=0")
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
    tokens = [token(HOSTILE, alternatives=("<script>owned = 1</script>",))]
    chat.feed(chunk(reasoning_content=HOSTILE), chunk(content=HOSTILE, tokens=tokens), chunk(finish="stop"))
    chat.page.click("#details")
    chat.ask(HOSTILE)
    assert chat.answer() == HOSTILE and chat.questions() == [HOSTILE]
    chat.page.hover(f"{BAR} .text .token >> nth=0")
    assert "<script>" in chat.text("#card")
    chat.page.click("#details")
    chat.page.wait_for_selector(".token", state="detached")
    assert chat.answer() == HOSTILE  # in the plain view the format's marks are hidden but present
    assert chat.page.locator("#middle :is(script, img, b b, a)").count() == 0
    assert chat.page.evaluate("window.owned") is None


def test_tokens_find_their_text(chat):
    """Characters of several tokens, tags without text, text held back: nothing is lost or repeated."""
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
        shown_tokens = chat.page.locator(f"{BAR} .text .token").all_text_contents()
        assert shown_tokens == ([] if how == "no answer" else ["held", " back"])


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


def test_failures_are_explained_and_recovered_from(chat):
    chat.set(thinking="never", max_tokens=6, seed=5)
    chat.feed({"error": {"message": "full", "code": "queue_full"}}, status=429, headers={"Retry-After": "1"})
    chat.send("Is there room?")
    chat.page.wait_for_selector(f"{BAR}[data-phase=queued] >> text=The queue is full.")
    chat.done()  # the page retries by itself
    assert chat.answer()

    chat.feed({"error": {"message": "the step failed"}}, status=500)
    chat.ask("Again.")
    assert chat.text(f"{BAR} .trouble") == "The step failed."

    chat.page.route("**/v1/**", lambda route: route.abort())
    chat.page.click(f"{BAR} >> text=Retry")
    chat.page.wait_for_selector("#notice >> text=The server does not answer")
    chat.page.unroute("**/v1/**")
    chat.page.wait_for_selector("#notice", state="hidden")  # the page finds the server again by itself
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
    "stored",
    [
        "{",
        "null",
        '[{"question": 1}, 7, null, {"question": "x", "answers": [{"model": [], "text": 5, "pieces": {"text": [0]}}]}]',
    ],
)
def test_the_page_survives_broken_storage(browser, server, stored):
    fill = "".join(
        f"localStorage.setItem('bessemer.{name}.1', {json.dumps(stored)});" for name in ("talk", "talks", "settings")
    )
    chat = Chat(browser, server.url, init_script=f"if (!sessionStorage.seen) {{ {fill} sessionStorage.seen = 1; }}")
    chat.set(thinking="never", max_tokens=4, seed=5)
    chat.ask("Still there?")
    answer = chat.answer()
    chat.open()
    assert answer and chat.answer() == answer and chat.questions()[-1] == "Still there?"
    assert chat.page.input_value("#settings [name=max_tokens]") == "4"
    chat.check()


MARKDOWN = """# A *small* head
- one `code` and **bold**
  - nested, (1+2)*(3+4)*(5) and (2)**(3)**(4)
3. three
> said
---
| a | b |
[a link](javascript:owned()) ![x](http://evil.example/x)
2*3*4 = 24, *lean*"""


def test_markdown_is_shown_and_nothing_of_it_runs(chat):
    chat.feed(chunk(content=MARKDOWN), chunk(finish="stop"))
    chat.ask("Show me.")
    lines = chat.page.locator(f"{BAR} .text .line")
    shapes = [" ".join(name.split()[1:]) for name in lines.evaluate_all("all => all.map(line => line.className)")]
    assert shapes == ["h1", "item in0", "item in1", "numbered in0", "quote", "rule", "row", "", ""]
    shown = chat.page.evaluate("document.querySelector('.answer .text').innerText")
    for words in ("A small head", "one code and bold", "(1+2)*(3+4)*(5) and (2)**(3)**(4)", "[a link](javascript:",
                  "2*3*4 = 24, lean"):  # fmt: skip
        assert words in shown, shown
    assert "#" not in shown and "- one" not in shown and chat.page.locator("#middle :is(a, img)").count() == 0
    assert chat.page.locator(f"{BAR} em").all_text_contents() == ["small", "lean"]
    assert chat.answer() == MARKDOWN  # the marks are hidden, not removed
    chat.feed(chunk(reasoning_content="- 3 + 5\n* 4"), chunk(content="2"), chunk(finish="stop"))
    chat.ask("And a thought?")
    assert chat.page.locator(f"{BAR} .thought .item").count() == 0  # a minus there is not a list item


def test_examples_come_from_the_run_and_answers_are_checked(chat):
    """Offers held-out problems of the picked model's tasks; a right answer is marked right and a wrong one wrong."""
    chat.page.click("text=/^zero$/")
    chat.page.wait_for_selector("text=Countdown · English")
    assert chat.page.locator("#start h3").all_text_contents() == ["Countdown · English", "Countdown · Chinese"]
    facts = chat.text(".answering dd")
    assert "practised: Countdown (solves English 42 %, Chinese 39 % of held-out problems)" in facts
    assert "read about: Arithmetic" in facts and "trained on texts of up to 1\u2009100 tokens" in facts
    assert "single questions: reads each alone" in facts
    chat.page.click("text=/^r1$/")
    chat.page.wait_for_selector("text=Arithmetic · English")
    first = ".group >> nth=0 >> .example >> nth=0"
    value = eval(re.search(r"[-\d+*]+", chat.text(first))[0])
    for attempt, verdict in ((value, "✓ Right"), (value + 1, "✗ Wrong: another value")):
        chat.feed(chunk(reasoning_content="so"), chunk(content=f"<answer>{attempt}</answer>"), chunk(finish="stop"))
        if attempt == value:
            chat.page.click(first)
        else:
            chat.page.click(f"{BAR} >> text=Retry")
        chat.done()
        assert chat.page.get_attribute(BAR, "data-phase") == "done" and chat.answer() == f"<answer>{attempt}</answer>"
        chat.page.wait_for_selector(f"{BAR} .verdict:visible")
        assert chat.text(f"{BAR} .verdict").startswith(verdict)
    chat.open()  # the verdict has been saved
    assert chat.text(f"{BAR} .verdict").startswith("✗")
    chat.feed(chunk(content="4"), chunk(finish="stop"))
    chat.ask("Something of my own?")
    assert not chat.page.is_visible(f"{BAR} .verdict")


@pytest.mark.parametrize("model", ["zero", "r1"])
def test_a_cut_answer_says_so_and_continues_from_inside_its_thought(chat, server, model):
    """To continue, the page sends exactly what the model has written: the server ends up with one longer answer."""
    chat.page.click(f"text=/^{model}$/")
    chat.set(thinking="always", max_tokens=30, seed=3, temperature=0)
    chat.endless(thinking=True)
    chat.ask("the fox")
    thought = chat.answer(".thought")
    assert thought and not chat.page.is_visible(f"{BAR} .text")
    assert chat.text(f"{BAR} .trouble") == "Cut off after 30 tokens, inside its thought."
    sent = []
    chat.page.on("request", lambda request: "completions" in request.url and sent.append(request.post_data_json))
    chat.page.click(f"{BAR} >> text=Continue")
    chat.page.wait_for_selector(f"{BAR} .figures >> text=/^60 tokens/")  # the first part has already ended
    opened = f"<think>\n{thought}" if model == "r1" else f"<think>{thought}"
    assert sent[0]["messages"][-1] == {"role": "assistant", "content": opened}
    assert chat.answer(".thought").startswith(thought) and len(chat.answer(".thought")) > len(thought)
    assert re.match("60 tokens", chat.text(f"{BAR} .figures")) and "after 60 tokens" in chat.text(f"{BAR} .trouble")
    assert chat.page.is_visible(f"{BAR} >> text=Continue")


def test_conversations_are_kept_exported_and_deleted(chat):
    for question in ("first *one*", "second"):
        chat.feed(chunk(reasoning_content="so"), chunk(content=f"about {question}"), chunk(finish="stop"))
        chat.ask(question)
        chat.page.click("#fresh")
    chat.page.click("#list")
    assert chat.page.locator(".talk span").all_text_contents() == ["second", "first *one*"]
    chat.page.click(".talk >> nth=1")
    assert chat.questions() == ["first *one*"] and chat.answer() == "about first *one*"
    saved = {}
    for kind in ("Markdown", "JSON"):
        with chat.page.expect_download() as download:
            chat.page.click(f"text=Save as {kind}")
        saved[download.value.suggested_filename] = download.value.path().read_text("utf-8")
    assert saved["conversation.md"].startswith("## first *one*\n\n**r1**, seed ")
    assert saved["conversation.md"].endswith("\n\n> so\n\nabout first *one*\n")
    (turn,) = json.loads(saved["conversation.json"])["turns"]
    assert turn["question"] == "first *one*" and turn["answers"][0]["thought"] == "so"
    chat.open()
    assert chat.questions() == ["first *one*"]  # the conversation that was open
    chat.page.click("#list")
    chat.page.click(".talks li >> nth=1 >> .quiet")
    assert chat.questions() == [] and chat.page.locator(".talk span").all_text_contents() == ["second"]
    chat.page.click("#notice >> text=Undo")
    assert chat.page.locator(".talk span").count() == 2


def test_chinese_and_themes(chat):
    chat.set(theme="dark")
    ink = "getComputedStyle(document.body).color"
    dark = chat.page.evaluate(ink)
    chat.set(theme="light")
    assert chat.page.evaluate(ink) != dark
    chat.page.click("#tune")
    chat.page.select_option("#settings [name=language]", "zh")
    chat.page.wait_for_selector("html[lang=zh-CN] .chip[aria-pressed=true]")
    assert chat.text("#tune") == "设置" and chat.page.get_attribute("#question", "placeholder") == "问 r1"
    chat.feed(chunk(content="好"), chunk(finish="stop"))
    chat.ask("你好")
    assert chat.text(f"{BAR} .acts") == "复制继续重试"
    named = chat.page.locator("button:not(.example), label, h2, summary").all_text_contents()
    untranslated = {"r1", "zero", "Top-p", "Top-k", "Min-p"}  # Chinese uses the same words
    assert {word for word in map(str.strip, named) if re.fullmatch(r"[ -~]+", word)} <= untranslated


def test_every_word_of_the_page_has_a_translation():
    """Each text in a script, in calls of t(...) and in the tables of settings, is in the Chinese list."""
    page = Path(app.__file__).with_name("page")
    scripts = {path.name: path.read_text("utf-8") for path in page.glob("*.js")}
    listed = set(re.findall(r'^\s+.*?"((?:[^"\\]|\\.)*)":', scripts["words.js"], re.M))
    listed |= set(re.findall(r'"((?:[^"\\]|\\.)*)":', scripts["words.js"]))
    texts = {
        words
        for name, text in scripts.items()
        if name != "words.js"
        for call in re.findall(r"\bt\(([^()]*)", text)
        for words in re.findall(r'"([^"]+)"', call.split("{ ")[0])
    }
    assert len(texts) > 60 and texts - listed - {"zero"} == set()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing(browser, server, scheme, width):
    """The empty page with its panels, then a checked answer with its tokens, thought and card. No panel is cut off."""
    chat = Chat(browser, server.url, width=width, color_scheme=scheme)
    for panel in ("#list", "#tune"):
        chat.page.click(panel)
        if width < 1000:  # a panel covers the page
            assert violations(chat.page) == []
            shown = "[...document.querySelectorAll('aside:not([hidden]), aside:not([hidden]) *')]"
            assert chat.page.evaluate(f"{shown}.every(e => e.getBoundingClientRect().right <= innerWidth)")
            chat.page.keyboard.press("Escape")
    assert violations(chat.page) == []
    chat.page.click("#details")
    odds = [token(word, -i) for i, word in enumerate(("one ", "`two` ", "<answer>", "3", "</answer>"))]
    thought = chunk(reasoning_content="one `two` ", tokens=odds[:2])
    chat.feed(thought, chunk(content="<answer>3</answer>", tokens=odds[2:]), chunk(finish="length"))
    chat.page.click(".example >> nth=0")
    chat.page.wait_for_selector(f"{BAR} .verdict.wrong")
    chat.page.click(f"{BAR} summary")
    assert chat.page.locator(f"{BAR} .token").count() >= 5
    chat.page.locator(f"{BAR} .text").focus()
    chat.page.keyboard.press("ArrowRight")
    chat.page.wait_for_selector("#card", state="visible")
    assert violations(chat.page) == []
    chat.check()


def test_colours_are_apart():
    """WCAG contrast of every pair of text and background colours, in both themes, is at least 4.5."""
    style = (Path(app.__file__).parent / "page" / "style.css").read_text("utf-8")
    named = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", style)
    assert len(named) > 18
    shades = [f"shade{n}" for n in range(5)]
    pairs = [("ink", background) for background in ("paper", "card", "soft", *shades)]
    pairs += [(ink, background) for ink in ("muted", "accent") for background in ("paper", "card", "soft")]
    pairs += [(ink, background) for ink in ("good", "bad") for background in ("paper", "card")]
    pairs += [("accent-ink", background) for background in ("accent", "c1", "c2", "c3", "c4")]
    for theme in (1, 2):
        colours = {name[0]: luminance(name[theme]) for name in named}
        for ink, background in pairs:
            light, dark = sorted((colours[ink], colours[background]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, background, theme)


def luminance(colour: str) -> float:
    """Relative luminance as defined by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
