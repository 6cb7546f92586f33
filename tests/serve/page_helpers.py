"""The chat page under test: a run of two small random models and headless Chromium; `serving.running` is the server.

The weights are random, so answers are noise that hardly ever ends by itself, and tests set budgets. What a model must
say for a test (hostile text, errors) is fed to the browser in place of the server's reply.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bessemer.data.chat import ADDED, THINK_END
from bessemer.data.tokenizer import Tokenizer
from bessemer.hf import deepseek
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.runs.directory import write_done

TEXTS = ["the quick brown fox jumps over the lazy dog", "<think>2+2=4</think> <answer>4</answer>", "盛钢水的炉子"] * 8
CONTEXT = 4096
RECIPE = """name = "noise"
[[stage]]
kind = "corpus"
row_length = 1000
parts = {fables = "fables-en", sums = "task:arithmetic", search = "task:countdown"}
[[stage]]
kind = "pretrain"
from = "corpus"
[[stage]]
kind = "rl"
name = "zero"
from = "pretrain"
tasks = ["countdown"]
max_new_tokens = [["0", 100], ["9", "1.1K"]]
[[stage]]
kind = "rl"
name = "r1"
from = "zero"
tasks = ["arithmetic"]
[[stage]]
kind = "eval"
models = ["zero", "r1"]
"""
SOLVED = {("zero", "en"): 0.42, ("zero", "zh"): 0.39, ("r1", "en"): 0.5}
SAID = """lines => lines.map(line => {
  const copy = line.cloneNode(true);
  for (const unsaid of copy.querySelectorAll(".unsaid")) unsaid.remove();
  return copy.textContent;
})"""

WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    for (const answer of document.querySelectorAll(".answer")) {
      window.seen.push(`${answer.dataset.phase} ${answer.querySelector(".thought").open ? "open" : "folded"}`);
    }
  }).observe(document.getElementById("turns"), { subtree: true, childList: true, attributes: true });
}"""


def make_run(root: Path) -> Path:
    """A run directory with the finished stages `zero` and `r1`, each in its own template."""
    (root / "recipe.toml").write_text(RECIPE)
    shape = dict(
        dim=32, n_layers=3, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_activated_experts=2,
        n_expert_groups=4, n_limited_groups=2, max_seq_len=CONTEXT, init_std=0.2,
    )  # fmt: skip
    for number, style in enumerate(("zero", "r1"), 1):
        folder = root / f"{number:02}-{style}"
        tokenizer = Tokenizer.train(TEXTS, 320, chat_style=style)
        model = Transformer(preset("tiny", vocab_size=tokenizer.vocab_size, **shape)).initialise(number)
        deepseek.save(model, folder / "model")
        tokenizer.save(folder / "model")
        write_done(folder, {"fingerprint": "", "inputs": {}}, {}, 1.0)
    (root / "03-eval").mkdir()
    rows = [
        {"model": model, "task": "countdown", "language": language, "temperature": temperature, "pass_at_1": share}
        for (model, language), share in SOLVED.items()
        for temperature, share in ((1.0, share / 2), (0.6, share))
    ]
    (root / "03-eval" / "results.json").write_text(json.dumps({"rows": rows}))
    return root


def wait_for(true, description: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"never: {description}"
        time.sleep(0.02)


class Chat:
    """What a person does with the page, and what they see. Any error or warning in the browser fails `check`."""

    def __init__(self, browser, url: str, width: int = 1100, init_script: str = "", **options):
        self.url, self.expected = url, 0
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 760}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)  # a loaded machine can stall for many seconds
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith(url + "/") or self.foreign.append(request.url))
        if init_script:
            self.page.add_init_script(init_script)
        self.open()

    def open(self) -> None:
        self.reply = self.page.goto(self.url)
        self.page.wait_for_selector(".chip[aria-pressed=true]")

    def check(self) -> None:
        """No request left the server, and the browser complained only about statuses that the test itself made."""
        serious = [text for text in self.complaints if not ("Failed to load resource" in text and self.expected)]
        self.context.close()
        assert not serious and not self.foreign

    def set(self, **settings: Any) -> None:
        """Types into the settings panel; each keyword is a field's name."""
        self.page.click("#tune")
        for name, value in settings.items():
            field = self.page.locator(f"#settings [name={name}]")
            (field.select_option if field.evaluate("e => e.tagName") == "SELECT" else field.fill)(str(value))
        self.page.click("#tune")

    def send(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def done(self, answers: str = ".turn:last-child .answer") -> None:
        """Waits until these answers have ended in any way."""
        self.page.wait_for_selector(answers)
        ended = ":is([data-phase=done], [data-phase=stopped], [data-phase=failed])"
        wait_for(
            lambda: self.page.locator(answers).count() == self.page.locator(answers + ended).count(), f"{answers} ended"
        )

    def ask(self, question: str) -> None:
        self.send(question)
        self.done()

    def watch(self) -> None:
        """From now on `window.seen` collects every pair of phase and thought state (open, folded) that is shown."""
        self.page.evaluate(WATCH)

    def endless(self, thinking: bool = False) -> None:
        """Lets answers run past their end, since noise that happens to end early would prove nothing; with `thinking`,
        their thoughts too."""
        more = {"ignore_eos": True} | ({"logit_bias": {str(ADDED.index(THINK_END)): -100}} if thinking else {})

        def go_on(route):
            route.continue_(post_data=json.dumps(route.request.post_data_json | more))

        self.page.route("**/v1/chat/completions", go_on)

    def text(self, selector: str) -> str:
        """textContent: includes folded text."""
        return self.page.locator(selector).first.text_content()

    def answer(self, part: str = ".text") -> str:
        """The last answer's text (or `.thought`) as the model wrote it, without tokens that have no text."""
        lines = self.page.locator(f".turn:last-child .answer {part} .line").evaluate_all(SAID)
        return "\n".join(line.removesuffix("\n") for line in lines)

    def questions(self) -> list[str]:
        return self.page.locator(".question p").all_text_contents()

    def feed(
        self, *chunks: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None, times: int = 1
    ) -> None:
        """The next answer requests get these chunks. With a status other than 200, the first chunk is the body."""
        if status == 200:
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            kind = "text/event-stream"
        else:
            body, kind, self.expected = json.dumps(chunks[0]), "application/json", self.expected + 1
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=status, headers={"Content-Type": kind, **(headers or {})}, body=body),
            times=times,
        )  # fmt: skip


def chunk(finish: str | None = None, tokens: list[dict] | None = None, **delta: str) -> dict[str, Any]:
    """One chunk of a chat completion."""
    logprobs = {"content": tokens} if tokens else None
    routing = {"routing": [[[0, 1]]] * len(tokens)} if tokens else {}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs, **routing}]}


def token(text: str, logprob: float = -0.5, alternatives: tuple[str, ...] = ()) -> dict[str, Any]:
    """One token of a chunk; its `bytes` may be replaced by part of a character's."""
    top = [{"token": alternative, "logprob": logprob - 1, "bytes": None} for alternative in alternatives]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": top}
