"""Is a held-out question in what the model was trained on? The paper's 10-gram test, and the problem's own numbers
(R1-Nature D.1: pages that share a 10-gram with an evaluation question are dropped; here they are found and told).

Two searches, because either alone misleads.

By words. Training texts are searched for runs of N words of the questions (a word in Chinese is a character; see
`tasks/ngrams.py`). What counts as a hit depends on where a question comes from:
  from a data set     N words in a row that no other question of the evaluation has: what several questions share is
                      the wording of the task ("how many ... are left?") and says nothing;
  from a generator    all of its words in a row, and no number or operator that goes on from those it begins or ends
                      with: another problem from it may share ten words and two small numbers by chance, and "compute
                      3 + 4" is not "compute 3 + 4 * 2". So must questions shorter than N and those without words of
                      their own. Under SHORTEST words nothing is searched: any page may say "what is 3?".

By problem. Training problems (those RL and rejection sampling asked, those behind the pages of a task) are the same as
a held-out one when they are of one family and `identity` is equal: everything the verifier needs, whatever the
order of the numbers, the language and the phrasing. The split by numbers promises that it never happens.

Memory holds the questions and one piece of text. Hashes find, the words themselves decide, so no hit is a collision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bessemer.curate.decontaminate import GENERATED, SHORTEST
from bessemer.tasks import Problem
from bessemer.tasks.ngrams import run_hashes, words

N = 10
PIECE = 1 << 17
"""Words searched at once."""
UNKNOWN, FIGURE = 0, 1
"""Ids of words that no question has; the second of numbers and operators among them."""
NOT_NEEDED = frozenset({"template", "difficulty"})
"""Keys of meta that are how a problem is asked, not what."""
UNORDERED = frozenset({"numbers", "terms"})
"""Keys of meta whose lists say the same in any order: "3, 7, 2" is "2, 3, 7"."""


@dataclass
class _Question:
    """A held-out question: all problems with the same words."""

    words: list[str]
    ids: np.ndarray
    needed: int
    """Words in a row that make a hit."""
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Found:
    """The strongest sign of a problem in training."""

    problem: Problem
    where: str
    by: str
    run: int
    of: int
    text: str

    @property
    def strength(self) -> tuple[float, int]:
        return (2.0 if self.by == "problem" else self.run / self.of, self.run)


class Search:
    """Show it training texts and training problems, then ask for the `result`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._numbers: dict[str, int] = {}
        """Ids of the words of the questions, above UNKNOWN and FIGURE, which can be part of no hit."""
        self._questions = self._read()
        self._figure = np.array([False, True, *map(_is_figure, self._numbers)])
        self._same: dict[Hashable, list[Problem]] = defaultdict(list)
        for problem in self._problems:
            self._same[identity(problem)].append(problem)
        self._places = self._index()
        self._keys = {length: np.array(sorted(table), np.uint64) for length, table in self._places.items()}
        self._found: dict[str, _Found] = {}
        self._seen: dict[str, Counter[str]] = defaultdict(Counter)
        self._piece: list[int] = []
        self._where = ""

    def stage(self, where: str, shown: Iterable[Problem | str], most_words: int) -> None:
        """Search what the stage `where` showed: all its problems, and its texts up to `most_words` words."""
        left = most_words
        for one in shown:
            if isinstance(one, Problem):
                self.problem(where, one)
            elif left > 0:
                left -= self.text(where, one)
            else:
                self._seen[where].update(texts_left_out=1)

    def text(self, where: str, text: str) -> int:
        """Search a training text of the stage `where`; returns its number of words."""
        if where != self._where:
            self._flush()
            self._where = where
        found = words(text)
        known = self._numbers
        self._piece += [known[word] if word in known else int(_is_figure(word)) for word in found]
        self._piece.append(UNKNOWN)  # no run goes on into the next text
        self._seen[where].update(texts=1, words=len(found))
        if len(self._piece) >= PIECE:
            self._flush()
        return len(found)

    def problem(self, where: str, problem: Problem) -> None:
        """Compare a training problem of the stage `where`, its prompt too."""
        self._seen[where].update(problems=1)
        for same in self._same.get(identity(problem), ()):
            length = len(words(same.prompt))
            self._note(_Found(same, where, "problem", length, length, problem.prompt))
        self.text(where, problem.prompt)

    def result(self) -> dict[str, Any]:
        """The finding as JSON: `n` (N), `checked` and `hit` problems, `by_words` and `by_problem`, the `worst` example,
        up to 20 ids in `hits`, what each stage showed in `searched`, `too_short` to be searched by words."""
        self._flush()
        found = sorted(self._found.values(), key=lambda one: one.strength, reverse=True)
        by = Counter(one.by for one in found)
        worst = None
        if found:
            one = found[0]
            worst = {"problem": one.problem.id, "prompt": one.problem.prompt, "stage": one.where, "by": one.by,
                     "words": one.run, "of": one.of, "text": one.text}  # fmt: skip
        return {
            "n": N,
            "unit": "words; in Chinese, characters",
            "checked": len(self._problems),
            "hit": len(found),
            "by_words": by["words"],
            "by_problem": by["problem"],
            "too_short": sum(len(q.problems) for q in self._questions if len(q.words) < SHORTEST),
            "worst": worst,
            "hits": [one.problem.id for one in found[:20]],
            "searched": {where: dict(counts) for where, counts in self._seen.items()},
        }

    def _read(self) -> list[_Question]:
        questions: dict[tuple[str, ...], _Question] = {}
        for problem in self._problems:
            found = words(problem.prompt)
            question = questions.get(tuple(found))
            if question is None:
                ids = [self._numbers.setdefault(word, len(self._numbers) + 2) for word in found]
                whole = _generated(problem) or len(found) < N
                question = _Question(found, np.array(ids, np.uint64), len(found) if whole else N)
                questions[tuple(found)] = question
            question.problems.append(problem)
        return list(questions.values())

    def _index(self) -> dict[int, dict[int, list[tuple[_Question, int]]]]:
        """length -> hash -> where in which question that run of words stands. Of a question that must be found whole,
        its rarest run; of the others, all that are theirs alone."""
        hashes = [run_hashes(question.ids, min(N, len(question.ids))).tolist() for question in self._questions]
        common = Counter(h for of_one in hashes for h in set(of_one))
        places: dict[int, dict[int, list[tuple[_Question, int]]]] = defaultdict(lambda: defaultdict(list))
        for question, of_one in zip(self._questions, hashes, strict=True):
            if len(question.words) < SHORTEST:
                continue
            own = [place for place, h in enumerate(of_one) if common[h] == 1]
            if question.needed == len(question.words) or not own:
                question.needed = len(question.words)
                own = [min(range(len(of_one)), key=lambda place: (common[of_one[place]], place))]
            for place in own:
                places[min(N, len(question.words))][of_one[place]].append((question, place))
        return places

    def _flush(self) -> None:
        ids_N, self._piece = np.array(self._piece, np.uint64), []
        for length, keys in self._keys.items():
            hashes = run_hashes(ids_N, length)
            nearest = keys[np.searchsorted(keys, hashes).clip(max=len(keys) - 1)]
            for at in np.flatnonzero(nearest == hashes):
                for question, place in self._places[length][int(hashes[at])]:
                    self._compare(ids_N, int(at) - place, question, place, length)

    def _compare(self, ids_N: np.ndarray, start: int, question: _Question, place: int, length: int) -> None:
        """The question laid against the text so that its run at `place` lies on the run that was found."""
        size = len(question.ids)
        first, last = max(0, -start), min(size, len(ids_N) - start)
        differs = np.flatnonzero(ids_N[start + first : start + last] != question.ids[first:last]) + first
        if ((differs >= place) & (differs < place + length)).any():
            return  # equal hashes of different words
        before, after = differs[differs < place], differs[differs >= place + length]
        low = int(before[-1]) + 1 if len(before) else first
        high = int(after[0]) if len(after) else last
        whole = question.needed == size
        if high - low >= question.needed and not (whole and self._goes_on(ids_N, start, size)):
            text = " ".join(question.words[low:high])
            for problem in question.problems:
                self._note(_Found(problem, self._where, "words", high - low, size, text))

    def _goes_on(self, ids_N: np.ndarray, start: int, size: int) -> bool:
        """Whether the first or last word of the question is a figure and has another beside it in the text."""
        return any(
            0 <= out < len(ids_N) and self._figure[int(ids_N[out])] and self._figure[int(ids_N[end])]
            for out, end in ((start - 1, start), (start + size, start + size - 1))
        )

    def _note(self, one: _Found) -> None:
        known = self._found.get(one.problem.id)
        if known is None or one.strength > known.strength:
            self._found[one.problem.id] = one


def identity(problem: Problem) -> Hashable:
    """Equal for two problems that are the same, however they are asked. A question of a data set is its words."""
    if not _generated(problem):
        return tuple(words(problem.prompt))
    needed = {key: value for key, value in problem.meta.items() if key not in NOT_NEEDED}
    return problem.id.split("/")[0], _canonical(needed)


def _generated(problem: Problem) -> bool:
    return not GENERATED.isdisjoint(problem.meta)


def _canonical(value: Any) -> Hashable:
    """Tables and lists as tuples; what stands under a key of UNORDERED is sorted, at every depth."""
    if isinstance(value, dict):
        return tuple((key, (_sorted if key in UNORDERED else _canonical)(value[key])) for key in sorted(value))
    return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value


def _sorted(value: Any) -> Hashable:
    return tuple(sorted(map(_sorted, value), key=repr)) if isinstance(value, list | tuple) else _canonical(value)


def _is_figure(word: str) -> bool:
    """A number or an operator."""
    return not word[0].isalpha()


def line(result: dict[str, Any]) -> str:
    """The finding in a sentence."""
    searched = result["searched"].values()
    total = sum(counts.get("words", 0) for counts in searched)
    problems = sum(counts.get("problems", 0) for counts in searched)
    left_out = sum(counts.get("texts_left_out", 0) for counts in searched)
    told = (
        f"contamination: {result['hit']} of {result['checked']} held-out problems found in {total:,} words and "
        f"{problems:,} problems of training ({result['n']}-grams, and by their numbers)"
    )
    if left_out:
        told += f"; {left_out:,} texts were not searched (searched_words)"
    if worst := result["worst"]:
        told += f"; worst: {worst['problem']} in {worst['stage']}, by {worst['by']}: {worst['text'][:80]!r}"
    return told
