"""Worked examples: training pages of a task whose author thinks and is right, and R1's form of an answer."""

from __future__ import annotations

from collections.abc import Iterator

from bessemer.errors import UserError
from bessemer.tasks.answer import parse_reply, r1_form, summary
from bessemer.tasks.base import Problem, Task, Written, stable_hash
from bessemer.tasks.language import consistency
from bessemer.tasks.registry import get

SUMMARIES = {
    "en": (
        "The answer is <answer>{}</answer>.",
        "So the answer is <answer>{}</answer>.",
        "This gives <answer>{}</answer>.",
        "The result is <answer>{}</answer>.",
        "Final answer: <answer>{}</answer>.",
        "<answer>{}</answer> is the answer.",
    ),
    "zh": (
        "答案是<answer>{}</answer>。",
        "所以答案是<answer>{}</answer>。",
        "由此得到<answer>{}</answer>。",
        "结果是<answer>{}</answer>。",
        "最终答案：<answer>{}</answer>。",
        "<answer>{}</answer>就是答案。",
    ),
}
"""What follows the thoughts in R1's form if the model wrote no summary: a sentence in the language of the question,
chosen by a hash of the problem."""
FIRST_PAGES, LOOKED_AT = 4096, 400
"""The search for examples starts at one of the first FIRST_PAGES pages of a task and reads LOOKED_AT pages."""


def in_r1_form(problem: Problem, text: str) -> str:
    """An answer as thoughts and a summary: the model's own if it wrote more than the tagged answer. Unchanged if no
    answer can be read."""
    reply, final = parse_reply(text), summary(text)
    if reply.answer is None:
        return text
    if final == f"<answer>{reply.answer}</answer>":
        sentences = SUMMARIES[problem.language]
        final = sentences[stable_hash("summary", problem.id) % len(sentences)].format(reply.answer.strip())
    return r1_form((reply.think or "").strip(), final)


def examples(task: Task, language: str, key: str) -> Iterator[Written]:
    """Pages of the train split that think in their own language and are right; `key` chooses where to begin. UserError
    for a task without pages, and when LOOKED_AT pages have no more of them."""
    pages = get(task.name, languages=[language])
    first = stable_hash("example", key) % FIRST_PAGES
    for index in range(first, first + LOOKED_AT):
        page = pages.written(index, language=language)
        verdict = pages.verify(page.problem, page.response)
        if page.author != "direct" and verdict.sound and consistency(page.response, language) == 1:
            yield page
    raise UserError(
        f"{task.name}: too few worked examples among {LOOKED_AT} pages in {language} leave room for an answer; "
        "use fewer shots, or lower max_new_tokens (--max-tokens)"
    )
