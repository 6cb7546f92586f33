"""Text before a question (`Preamble`): worked examples (few-shot prompts, R1 5), their controls, and a prefix of the
user's own.

An example is a separate conversation before the question's, with its own start and end, as documents share a row in
pre-training. So it keeps its thoughts even in R1's template, which drops those of earlier turns. Every question has its
own examples, from the train split, the same for every model with the same tokenizer.

    worked           thoughts and a correct answer, in the language of the question
    direct           the same questions, and their correct answers without thoughts
    other-language   worked, in the task's other language
    fables           the same number of tokens and documents, but fables in the language of the question
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from bessemer.addons.tasks.worked import examples, in_r1_form
from bessemer.config.evaluation import ShotKind
from bessemer.data import sources
from bessemer.data.chat import exchange, question_ids, render_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.eval.preamble import Preamble
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import Problem, Task, Written, stable_hash

FABLES = {"en": "fables-en", "zh": "fables-zh"}


@dataclass(frozen=True)
class Shots(Preamble):
    """Examples before a question, or a prefix."""

    count: int = 0
    kind: ShotKind = "worked"
    prefix: str = ""
    """Text before the examples, as a separate document."""

    def check(self, task: Task) -> None:
        """UserError for a task of several turns, or without pages to take examples from."""
        if task.episodic:
            raise UserError(f"{task.name} has multi-turn episodes and takes neither shots nor a prefix")
        for language in task.languages if self.count else ():
            next(examples(task, language, ""))

    def facts(self) -> dict[str, int | str]:
        described: dict[str, int | str] = {"shots": self.count, "shot_kind": self.kind} if self.count else {}
        return described | ({"prefix": self.prefix} if self.prefix else {})

    def encoder(
        self, tokenizer: Tokenizer, task: Task, room: int, cache: Path | None = None
    ) -> Callable[[Problem], list[int]]:
        prefix_ids = [] if not self.prefix else _document(tokenizer, tokenizer.encode(self.prefix))

        def encode(problem: Problem) -> list[int]:
            question = question_ids(tokenizer, problem.prompt)
            if not self.count:
                return prefix_ids + question
            pages = self._pages(tokenizer, task, problem, (room - len(prefix_ids) - len(question)) // self.count)
            examples = [_page(tokenizer, page, direct=self.kind == "direct") for page in pages]
            if self.kind == "fables":
                examples = _fables(tokenizer, problem, [len(ids) for ids in examples], cache)
            return [*prefix_ids, *chain.from_iterable(examples), *question]

        return encode

    def _pages(self, tokenizer: Tokenizer, task: Task, problem: Problem, longest: int) -> list[Written]:
        """The examples of a problem, each of at most `longest` ids; the same pages for all kinds but other-language."""
        language = problem.language
        if self.kind == "other-language":
            language = next((candidate for candidate in task.all_languages if candidate != language), "")
            if not language:
                raise UserError(f"{task.name} has only one language; use a kind of shots other than other-language")
        pages = examples(task, language, problem.id)
        return list(islice((page for page in pages if len(_page(tokenizer, page)) <= longest), self.count))


def _page(tokenizer: Tokenizer, page: Written, direct: bool = False) -> list[int]:
    text = page.response
    if direct:
        text = f"<answer>{parse_reply(text).answer}</answer>"
    elif tokenizer.chat_style == "r1":
        text = in_r1_form(page.problem, text)
    return render_ids(tokenizer, exchange(page.problem.prompt, text), add_generation_prompt=False)


def _document(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids, tokenizer.end_id]


def _fables(tokenizer: Tokenizer, problem: Problem, lengths: list[int], cache: Path | None) -> list[list[int]]:
    """Documents of fables, of exactly these lengths; a fable that is too short is followed by the next one's words."""
    texts = _texts(problem.language, cache)
    at, fables = stable_hash("fable", problem.id), []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(texts[at % len(texts)] + "\n")
            at += 1
        fables.append([*_document(tokenizer, ids)[: length - 1], tokenizer.end_id])
    return fables


@lru_cache(maxsize=4)
def _texts(language: str, cache: Path | None) -> tuple[str, ...]:
    if language not in FABLES:
        raise UserError(f"there are fables in {', '.join(FABLES)}, but none in {language}; use another kind of shots")
    return tuple(document.text for document in sources.documents(FABLES[language], cache))
