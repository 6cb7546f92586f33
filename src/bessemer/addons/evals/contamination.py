"""Whether held-out questions occur in the training data: the paper's 10-gram test, and a comparison of problems
(R1-Nature D.1 drops pages that share a 10-gram with an evaluation question; here they are reported).

There are two searches, because either one alone misleads.

By words. Training texts are searched for runs of N words from the questions (in Chinese, a word is a character; see
`addons/tasks/ngrams.py`). What counts as a hit depends on where a question comes from:
  from a data set     N consecutive words that no other question of the evaluation has: runs that questions share
                      are the wording of the task ("how many ... are left?") and prove nothing.
  from a generator    all of its words in order, not continued by a number or operator at either end: another problem
                      of the generator may share ten words and two small numbers by chance, and "compute 3 + 4" is not
                      "compute 3 + 4 * 2". This also applies to questions shorter than N words and to those without a
                      run of their own. Questions of fewer than SHORTEST words are not searched: any page may contain
                      "what is 3?".

By problem. A training problem (from RL, rejection sampling, or a page made from a task) is the same as a held-out one
if both are of one family and have the same `identity`: everything the verifier needs, whatever the order of the
numbers, the language and the phrasing. The split by numbers rules out such matches by construction.

Only the questions and one piece of text are in memory. Hashes find candidates and the words decide, so no hit is a hash
collision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bessemer.addons.curate.decontaminate import GENERATED
from bessemer.addons.tasks.ngrams import SHORTEST, NgramIndex
from bessemer.addons.tasks.readable import words
from bessemer.tasks import Problem

N = 10
PIECE = 1 << 17
"""Words searched at once."""
UNKNOWN, FIGURE = 0, 1
"""Ids of words that occur in no question: ordinary words, and numbers or operators."""
NOT_NEEDED = frozenset({"template", "difficulty"})
"""Keys of meta that describe the phrasing of a problem, not its content."""
UNORDERED = frozenset({"numbers", "terms"})
"""Keys of meta whose lists mean the same thing in any order: "3, 7, 2" is "2, 3, 7"."""


@dataclass
class _Question:
    """A held-out question: all problems with the same words."""

    words: list[str]
    ids: np.ndarray
    whole: bool
    """Whether a hit takes all of its words, not just N of them."""
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Match:
    """The strongest evidence that a problem is in the training data."""

    problem: Problem
    stage: str
    by: str
    run: int
    of: int
    text: str

    @property
    def strength(self) -> tuple[float, int]:
        return (2.0 if self.by == "problem" else self.run / self.of, self.run)


class ContaminationSearch:
    """Add training texts and training problems, then read the `result`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._numbers: dict[str, int] = {}
        """Ids of the questions' words; the ids UNKNOWN and FIGURE, below them, are never part of a hit."""
        self._questions = self._read()
        self._figure = np.array([False, True, *map(_is_figure, self._numbers)])
        self._same: dict[Hashable, list[Problem]] = defaultdict(list)
        for problem in self._problems:
            self._same[identity(problem)].append(problem)
        phrases, whole = (
            [question.ids for question in self._questions],
            [question.whole for question in self._questions],
        )
        self._index = NgramIndex(phrases, whole, N)
        self._matches: dict[str, _Match] = {}
        self._seen: dict[str, Counter[str]] = defaultdict(Counter)
        self._piece: list[int] = []
        self._stage = ""

    def add_stage(self, stage: str, data: Iterable[Problem | str], most_words: int) -> None:
        """Search the training data of a stage: all its problems, and its texts up to `most_words` words."""
        words = most_words
        for item in data:
            if isinstance(item, Problem):
                self.add_problem(stage, item)
            elif words > 0:
                words -= self.add_text(stage, item)
            else:
                self._seen[stage].update(texts_left_out=1)

    def add_text(self, stage: str, text: str) -> int:
        """Search a training text of a stage; returns its number of words."""
        if stage != self._stage:
            self._flush()
            self._stage = stage
        text_words = words(text)
        numbers = self._numbers
        self._piece += [numbers[word] if word in numbers else int(_is_figure(word)) for word in text_words]
        self._piece.append(UNKNOWN)  # no run continues into the next text
        seen = self._seen[stage]
        seen["texts"] += 1
        seen["words"] += len(text_words)
        if len(self._piece) >= PIECE:
            self._flush()
        return len(text_words)

    def add_problem(self, stage: str, problem: Problem) -> None:
        """Compare a training problem of a stage with the held-out ones, and search its prompt as a text."""
        self._seen[stage]["problems"] += 1
        for question in self._same.get(identity(problem), ()):
            length = len(words(question.prompt))
            self._note(_Match(question, stage, "problem", length, length, problem.prompt))
        self.add_text(stage, problem.prompt)

    def result(self) -> dict[str, Any]:
        """The result as JSON: `n` (N); numbers of `checked` and `hit` problems, of hits `by_words` and `by_problem`,
        and of problems `too_short` to be searched by words; the `worst` example; up to 20 ids in `hits`; and
        `searched`, the amount of data of each stage."""
        self._flush()
        matches = sorted(self._matches.values(), key=lambda match: match.strength, reverse=True)
        by = Counter(match.by for match in matches)
        worst = None
        if matches:
            match = matches[0]
            worst = {"problem": match.problem.id, "prompt": match.problem.prompt, "stage": match.stage, "by": match.by,
                     "words": match.run, "of": match.of, "text": match.text}  # fmt: skip
        return {
            "n": N,
            "unit": "words; in Chinese, characters",
            "checked": len(self._problems),
            "hit": len(matches),
            "by_words": by["words"],
            "by_problem": by["problem"],
            "too_short": sum(len(q.problems) for q in self._questions if len(q.words) < SHORTEST),
            "worst": worst,
            "hits": [match.problem.id for match in matches[:20]],
            "searched": {where: dict(counts) for where, counts in self._seen.items()},
        }

    def _read(self) -> list[_Question]:
        questions: dict[tuple[str, ...], _Question] = {}
        for problem in self._problems:
            prompt = words(problem.prompt)
            question = questions.get(tuple(prompt))
            if question is None:
                ids = [self._numbers.setdefault(word, len(self._numbers) + 2) for word in prompt]
                whole = _generated(problem) or len(prompt) <= N
                question = _Question(prompt, np.array(ids, np.uint64), whole)
                questions[tuple(prompt)] = question
            question.problems.append(problem)
        return list(questions.values())

    def _flush(self) -> None:
        ids_N, self._piece = np.array(self._piece, np.uint64), []
        for start, length, places in self._index.matches(ids_N):
            for number, position in places:
                self._compare(ids_N, start - position, number, position, length)

    def _compare(self, ids_N: np.ndarray, start: int, number: int, position: int, length: int) -> None:
        """Extend the match of the question's run at `place` with the text, in both directions, and note it if it is
        long enough. `start`: where the question would begin in the text."""
        question = self._questions[number]
        size = len(question.ids)
        first, last = max(0, -start), min(size, len(ids_N) - start)
        differs = np.flatnonzero(ids_N[start + first : start + last] != question.ids[first:last]) + first
        if ((differs >= position) & (differs < position + length)).any():
            return  # equal hashes of different words
        before, after = differs[differs < position], differs[differs >= position + length]
        low = int(before[-1]) + 1 if len(before) else first
        high = int(after[0]) if len(after) else last
        whole = self._index.whole[number]
        if high - low >= (size if whole else N) and not (whole and self._continues(ids_N, start, size)):
            text = " ".join(question.words[low:high])
            for problem in question.problems:
                self._note(_Match(problem, self._stage, "words", high - low, size, text))

    def _continues(self, ids_N: np.ndarray, start: int, size: int) -> bool:
        """Whether a number or operator at either end of the question is next to another one in the text."""
        return any(
            0 <= out < len(ids_N) and self._figure[int(ids_N[out])] and self._figure[int(ids_N[end])]
            for out, end in ((start - 1, start), (start + size, start + size - 1))
        )

    def _note(self, match: _Match) -> None:
        previous = self._matches.get(match.problem.id)
        if previous is None or match.strength > previous.strength:
            self._matches[match.problem.id] = match


def identity(problem: Problem) -> Hashable:
    """Equal for two problems that differ only in wording. A question from a data set is identified by its words."""
    if not _generated(problem):
        return tuple(words(problem.prompt))
    needed = {key: value for key, value in problem.meta.items() if key not in NOT_NEEDED}
    return problem.id.split("/")[0], _canonical(needed)


def _generated(problem: Problem) -> bool:
    return not GENERATED.isdisjoint(problem.meta)


def _canonical(value: object) -> Hashable:
    """Tables and lists as tuples; values under a key of UNORDERED are sorted, at every depth."""
    if isinstance(value, dict):
        return tuple((key, (_sorted if key in UNORDERED else _canonical)(value[key])) for key in sorted(value))
    return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value


def _sorted(value: object) -> Hashable:
    return tuple(sorted(map(_sorted, value), key=repr)) if isinstance(value, list | tuple) else _canonical(value)


def _is_figure(word: str) -> bool:
    """A number or an operator."""
    return not word[0].isalpha()


def summary(result: dict[str, Any]) -> str:
    """The result as a sentence."""
    searched = result["searched"].values()
    total = sum(counts.get("words", 0) for counts in searched)
    problems = sum(counts.get("problems", 0) for counts in searched)
    left_out = sum(counts.get("texts_left_out", 0) for counts in searched)
    text = (
        f"contamination: {result['hit']} of {result['checked']} held-out problems found in {total:,} words and "
        f"{problems:,} problems of training (by {result['n']}-grams and by their numbers)"
    )
    if left_out:
        text += f"; {left_out:,} texts were not searched (searched_words)"
    if worst := result["worst"]:
        text += f"; worst: {worst['problem']} in {worst['stage']}, by {worst['by']}: {worst['text'][:80]!r}"
    return text
