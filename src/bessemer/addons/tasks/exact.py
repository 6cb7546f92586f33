"""Answers that are compared exactly: `choice:PATH`, multiple choice, and `puzzle:PATH`, an answer that is text or data.

A choice (the STEM prompts of R1-Nature B.3.1, GPQA, MMLU) has a question, the choices, and the right one as its letter,
its number from 0, or its text. The answer is the letter, alone or followed by the text of that choice. Lines in GPQA's
own form have no order of choices, so they are shuffled by a hash of the question; `choice:PATH@shuffle` does so for all
lines.

A puzzle (the logic prompts) has one answer. Text is compared letter by letter, except for the amount of white space. A
list, an object, a number or a truth value is compared as JSON: the order of a list counts, that of keys does not.
"""

import json
import math
import re
from string import ascii_uppercase
from typing import Any

from bessemer.addons.tasks.files import FileTask, Question
from bessemer.addons.tasks.letters import LetterReader, letter_of
from bessemer.addons.tasks.maths_questions import no_value, peeled
from bessemer.addons.tasks.sandbox import same
from bessemer.tasks.base import CORRECT, UNPARSABLE, WRONG_VALUE, Problem, stable_random

MAX_CHARS = 4000
"""Maximum length in characters of an answer that is read."""
SHUFFLE = "@shuffle"
_ASK_LETTER = {"en": "Answer with the letter of one choice.", "zh": "请用一个选项的字母作答。"}
_ASK_JSON = {"en": "Give the answer as JSON.", "zh": "请以JSON格式作答。"}
_FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)
_WITH_COMMAS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


class MultipleChoice(FileTask):
    domain = "stem"
    reader = LetterReader()
    family = "choice"
    form = '{"question": "...", "choices": ["...", "..."], "answer": "B"}'

    def __init__(self, path: str, **settings: Any):
        self.shuffle = SHUFFLE in path
        super().__init__(path, **settings)

    @classmethod
    def source(cls, argument: str) -> tuple[str, str | None]:
        return super().source(argument.replace(SHUFFLE, ""))

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        if "Correct Answer" in record:  # GPQA
            names = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
            choices = [" ".join(cls.text(record, where, [name]).split()) for name in names]
            return Question(cls.text(record, where, ["Question"]), {"choices": choices, "gold": "A", "shuffle": True})
        question = cls.text(record, where)
        listed = next((record[name] for name in ("choices", "options") if name in record), None)
        labels: list[Any] = list(ascii_uppercase)
        if isinstance(listed, dict) and isinstance(listed.get("text"), list):  # ARC
            labels, listed = listed["label"] if isinstance(listed.get("label"), list) else labels, listed["text"]
        elif isinstance(listed, dict):
            labels, listed = list(listed), list(listed.values())
        if not isinstance(listed, list) or not 2 <= len(listed) <= 26:
            raise cls.wrong(where, "no list of 2 to 26 choices under 'choices' or 'options'", record)
        choices = [" ".join(str(entry).split()) if isinstance(entry, str | int | float) else "" for entry in listed]
        if not all(choices):
            raise cls.wrong(where, "a choice is empty or not text", record)
        answer = next((record[name] for name in ("answer", "answerKey", "answer_letter") if name in record), None)
        if isinstance(answer, int) and not isinstance(answer, bool):
            places = {answer} & set(range(len(choices)))
        else:
            text = " ".join(answer.split()) if isinstance(answer, str) else ""
            named = labels[: len(choices)] if text in labels[: len(choices)] else choices
            places = {n for n, entry in enumerate(named) if entry == text}
        if len(places) != 1:
            fault = f"the answer {answer!r} names {'no' if not places else 'more than one'} choice"
            raise cls.wrong(where, f"{fault}; it is a letter, a number from 0, or the text of a choice", record)
        return Question(question, {"choices": choices, "gold": ascii_uppercase[places.pop()]})

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        problem = super().make(split, index, seed, language, phrasing)
        meta = dict(problem.meta)  # the task keeps its own, for the next call
        choices, gold = list(meta["choices"]), meta["gold"]
        if meta.pop("shuffle", self.shuffle):
            right = choices[ascii_uppercase.index(gold)]
            stable_random("choices", problem.prompt).shuffle(choices)
            gold = ascii_uppercase[choices.index(right)]
        lettered = [f"{letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
        prompt = "\n".join([problem.prompt, "", *lettered, "", _ASK_LETTER[problem.language]])
        return Problem(problem.id, prompt, problem.language, meta | {"choices": choices, "gold": gold})

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        choices = dict(zip(ascii_uppercase, problem.meta["choices"], strict=False))
        letter = letter_of(peeled(answer), choices) if len(answer) <= MAX_CHARS else None
        if letter not in choices:
            return UNPARSABLE, None
        return CORRECT if letter == problem.meta["gold"] else WRONG_VALUE, letter


class Puzzle(FileTask):
    domain = "logic"
    family = "puzzle"
    form = '{"question": "...", "answer": "..."}, where the answer is text, a number, a list or an object'

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        question, answer = cls.text(record, where), record.get("answer")
        if answer is None or answer in ("", [], {}) or (isinstance(answer, str) and not answer.strip()):
            raise cls.wrong(where, "no answer under 'answer'", record)
        if not _valued(answer):
            raise cls.wrong(where, f"the answer {answer!r} is not a value, or contains one that is not", record)
        return Question(question, {"gold": answer})

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        problem = super().make(split, index, seed, language, phrasing)
        if not isinstance(problem.meta["gold"], list | dict):
            return problem
        prompt = f"{problem.prompt}\n\n{_ASK_JSON[problem.language]}"
        return Problem(problem.id, prompt, problem.language, problem.meta)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        gold, answer = problem.meta["gold"], answer.strip()
        fence = _FENCE.fullmatch(answer) if len(answer) <= 2 * MAX_CHARS else None
        text = fence[1].strip() if fence else peeled(answer)
        if not text or len(text) > MAX_CHARS:
            return UNPARSABLE, None
        if isinstance(gold, str):
            text = " ".join(text.split())
            return CORRECT if text == " ".join(peeled(gold).split()) else WRONG_VALUE, text
        if isinstance(gold, bool):
            text = text.lower()
        elif isinstance(gold, int | float) and _WITH_COMMAS.fullmatch(text):
            text = text.replace(",", "")
        try:
            value = json.loads(text)
            return CORRECT if same(gold, value) else WRONG_VALUE, json.dumps(value, sort_keys=True)
        except (ValueError, RecursionError):
            return UNPARSABLE, None


def _valued(answer: Any) -> bool:
    """Whether no part of an answer is NaN, infinite, or a word for "not available"."""
    if isinstance(answer, list | dict):
        return all(map(_valued, answer.values() if isinstance(answer, dict) else answer))
    return not no_value(answer) if isinstance(answer, str) else not isinstance(answer, float) or math.isfinite(answer)
