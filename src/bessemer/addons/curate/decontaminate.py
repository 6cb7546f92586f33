"""Finds texts that contain a question of an evaluation or its solution: the 10-gram rule of R1-Nature D.1.

A hit is defined as in `eval/contamination`, which searches the training texts of a run. A question or solution from a
data set hits with N consecutive words that no other problem contains and that are not mostly numbers. A generated
question, or one shorter than N words, hits only as a whole, because two generated questions share ten words and small
numbers by chance. Texts under SHORTEST words are not searched for. Words are 64-bit hashes (`words`); two different
words collide once in 10^19."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bessemer import tasks
from bessemer.addons.curate.words import DIGITS, OPERATOR, WordBlock, words
from bessemer.addons.tasks.code_files import TESTS
from bessemer.addons.tasks.files import FileTask
from bessemer.addons.tasks.ngrams import SHORTEST, NgramIndex
from bessemer.addons.tasks.tools import without_tools
from bessemer.errors import UserError

FIGURES = (DIGITS, OPERATOR)
GENERATED = frozenset({"template", "story", "item"})
"""Keys of `Problem.meta`; a generated problem has at least one of them."""


class EvalText(NamedTuple):
    """A text that must not occur in training data."""

    name: str
    """The problem's; its texts share one."""
    text: str
    whole: bool
    """Whether only the whole text is a hit."""


def eval_texts(names: Iterable[str], problems: int) -> list[EvalText]:
    """The held-out questions of tasks (all, or `problems` of an endless task) and the other texts of their files."""
    every: dict[EvalText, None] = {}
    for name in map(without_tools, names):
        texts: dict[EvalText, None] = {}
        for phrasing in tasks.get(name).phrasings:
            task = tasks.get(name, phrasing=phrasing)
            size = task.size("test")
            if size == 0:
                raise UserError(
                    f"decontaminate.tasks: {name} holds out no problem, so nothing would be searched for; write @test "
                    "after a file's name, or add test.jsonl to a directory"
                )
            # A file's problems have a language each, and None gives all of them once.
            for language in (None,) if isinstance(task, FileTask) else task.all_languages:
                for index in range(problems if size is None else size):
                    problem = task.problem("test", index, 0, language)
                    whole = not GENERATED.isdisjoint(problem.meta)
                    called = _name(task, problem)
                    texts[EvalText(called, problem.prompt, whole)] = None
                    texts |= {EvalText(called, text, False): None for text in _other_texts(task, problem)}
        if texts and not searched_for(texts):  # a server asks its questions in episodes
            raise UserError(
                f"decontaminate.tasks: no question of {name} has {SHORTEST} words, so nothing would be searched for; "
                "leave it out"
            )
        every |= texts
    return list(every)


def searched_for(texts: Iterable[EvalText]) -> int:
    """The number of problems with a text that is long enough."""
    return len({eval_text.name for eval_text in texts if len(words([eval_text.text]).hashes_W) >= SHORTEST})


def _name(task: tasks.Task, problem: tasks.Problem) -> str:
    return f"{task.files['test'].path}:{problem.meta['line']}" if isinstance(task, FileTask) else problem.id


def _other_texts(task: tasks.Task, problem: tasks.Problem) -> Iterator[str]:
    """The other texts in the line of a held-out question, mainly solutions. Tests of programs, which may take many
    megabytes, are left out."""
    if isinstance(task, FileTask):
        file = task.files["test"]
        for key, value in file.record(file.row(problem.meta["line"])).items():
            if isinstance(value, str) and key not in TESTS:
                yield value


class Index:
    """Searches blocks of words for evaluation texts."""

    def __init__(self, texts: Sequence[EvalText], n: int) -> None:
        if n < SHORTEST:
            raise UserError(f"decontaminate.n is {n}; raise it to {SHORTEST} or more, as fewer words match any page")
        self._phrases: list[_Phrase] = []
        names: dict[bytes, str] = {}
        problem: dict[str, str] = {}
        """Name -> that of the first problem with the same question, which comes before a problem's other texts."""
        for eval_text in texts:
            block = words([eval_text.text])
            key = block.hashes_W.tobytes()
            problem.setdefault(eval_text.name, names.get(key, eval_text.name))
            if len(block.hashes_W) >= SHORTEST and key not in names:
                names[key] = problem[eval_text.name]
                whole = eval_text.whole or len(block.hashes_W) < n
                self._phrases.append(_Phrase(eval_text.name, block.hashes_W, whole, np.isin(block.kinds_W, FIGURES)))
        phrases, are_whole = [phrase.hashes_W for phrase in self._phrases], [phrase.whole for phrase in self._phrases]
        self._index = NgramIndex(
            phrases, are_whole, n, lambda number, start: self._phrases[number].is_specific(start, n),
            [problem[phrase.name] for phrase in self._phrases],
        )  # fmt: skip

    def hits(self, block: WordBlock) -> dict[int, str]:
        """Index of a text in the block -> name of an evaluation text that it contains."""
        hit: dict[int, str] = {}
        for start, length, places in self._index.matches(block.hashes_W):
            text = int(block.texts_W[start])
            if text in hit or block.texts_W[start + length - 1] != text:
                continue
            for number, offset in places:
                phrase = self._phrases[number]
                if not self._index.whole[number] or _has_all_words(block, start - offset, phrase):
                    hit[text] = phrase.name
                    break
        return hit


class _Phrase(NamedTuple):
    name: str
    hashes_W: np.ndarray
    whole: bool
    figures_W: np.ndarray
    """bool; which words are numbers or operators."""

    def is_specific(self, start: int, n: int) -> bool:
        """Whether the n-gram at `start` is more than a calculation, which can occur by chance."""
        return n - int(self.figures_W[start : start + n].sum()) >= SHORTEST


def _has_all_words(block: WordBlock, start: int, phrase: _Phrase) -> bool:
    """Whether the block has all words of `phrase` from `start` on, in one text and without a number on either side."""
    end = start + len(phrase.hashes_W)
    if start < 0 or end > len(block.hashes_W) or block.texts_W[start] != block.texts_W[end - 1]:
        return False
    if not np.array_equal(block.hashes_W[start:end], phrase.hashes_W):
        return False
    return not any(
        phrase.figures_W[edge]
        and 0 <= out < len(block.hashes_W)
        and block.texts_W[out] == block.texts_W[start]
        and block.kinds_W[out] in FIGURES
        for edge, out in ((0, start - 1), (-1, end))
    )


def save(texts: Sequence[EvalText], folder: Path) -> Path:
    """Write a file for `load`, named after a hash of its content."""
    text = json.dumps([list(eval_text) for eval_text in texts], ensure_ascii=False)
    path = folder / f"asked-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        for old in folder.glob("asked-*.json"):
            old.unlink()
        scratch = path.with_suffix(".tmp")
        scratch.write_text(text, "utf-8")
        scratch.replace(path)
    return path


def load(path: Path) -> list[EvalText]:
    return [EvalText(*fields) for fields in json.loads(path.read_text("utf-8"))]
