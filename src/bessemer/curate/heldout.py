"""Texts that hold a question of an evaluation, or its solution: the 10-gram rule of R1-Nature D.1.

What is a hit follows `recipe/contamination`, which looks for the same in what a run was trained on. Of a question or
solution of a data set: N words in a row that no other has and that are not figures for the most part. Of one that a
generator wrote, or that is shorter than N: all its words in a row, for two of a kind share ten words and small numbers
by chance. Under SHORTEST words nothing is searched. Words are numbers of 64 bits here (`words`); two different ones are
taken for equal once in 10^19.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bessemer import tasks
from bessemer.curate.words import DIGITS, OPERATOR, Words, words
from bessemer.errors import UserError
from bessemer.tasks.reading.ngrams import run_hashes

SHORTEST = 5
FIGURES = (DIGITS, OPERATOR)
GENERATED = frozenset({"template", "story", "item"})
"""Keys of a problem's meta, one of which it has when a generator wrote it."""


class Asked(NamedTuple):
    """A text that training must not show."""

    name: str
    text: str
    whole: bool
    """All of its words make a hit, not N of them."""


def asked(names: Iterable[str], problems: int) -> list[Asked]:
    """The held-out questions of tasks (all, or so many of an endless task) and what their files say beside them."""
    found: dict[str, Asked] = {}
    for name in names:
        for phrasing in tasks.get(name).phrasings:
            task = tasks.get(name, phrasing=phrasing)
            size = task.size("test")
            for language in task.all_languages:
                for index in range(problems if size is None else size):
                    problem = task.problem("test", index, 0, language)
                    whole = not GENERATED.isdisjoint(problem.meta)
                    found.setdefault(problem.prompt, Asked(problem.id, problem.prompt, whole))
        for one in _beside(name, found):
            found.setdefault(one.text, one)
    return list(found.values())


def _beside(name: str, questions: dict[str, Asked]) -> Iterator[Asked]:
    """The other texts of the lines that held-out questions come from: solutions, above all."""
    path = Path(name.partition(":")[2])
    files = [path / "test.jsonl"] if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
            record = json.loads(line) if line.strip() else {}
            texts = [value for value in record.values() if isinstance(value, str)]
            if path.is_dir() or any(text in questions or text.strip() in questions for text in texts):
                yield from (Asked(f"{file}:{number}", text, False) for text in texts)


class Index:
    """Finds what was asked in blocks of words."""

    def __init__(self, wanted: Sequence[Asked], n: int) -> None:
        if n < SHORTEST:
            raise UserError(f"decontaminate.n is {n}; fewer than {SHORTEST} words in a row are in any page")
        self._asked: list[_Known] = []
        seen: set[bytes] = set()
        for one in wanted:
            found = words([one.text])
            if len(found.hashes_W) >= SHORTEST and (key := found.hashes_W.tobytes()) not in seen:
                seen.add(key)
                whole = one.whole or len(found.hashes_W) < n
                self._asked.append(_Known(one.name, found.hashes_W, whole, np.isin(found.kinds_W, FIGURES)))
        self._places = self._index(n)
        self._keys = {length: np.array(sorted(table), np.uint64) for length, table in self._places.items()}

    def _index(self, n: int) -> dict[int, dict[int, list[tuple[int, int]]]]:
        """length -> hash -> (question, place): the rarest run of one to be found whole, all own runs of the others."""
        hashes = [run_hashes(known.hashes_W, min(n, len(known.hashes_W))).tolist() for known in self._asked]
        common = Counter(one for of_one in hashes for one in set(of_one))
        places: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for number, (known, of_one) in enumerate(zip(self._asked, hashes, strict=True)):
            own = [place for place, one in enumerate(of_one) if common[one] == 1 and known.says(place, n)]
            if known.whole or not own:
                self._asked[number] = known._replace(whole=True)
                own = [min(range(len(of_one)), key=lambda place: (common[of_one[place]], place))]
            for place in own:
                places[min(n, len(known.hashes_W))][of_one[place]].append((number, place))
        return places

    def hits(self, found: Words) -> dict[int, str]:
        """text of the block -> a question that is in it."""
        hit: dict[int, str] = {}
        for length, keys in self._keys.items():
            hashes = run_hashes(found.hashes_W, length)
            if not len(hashes):
                continue
            at = np.searchsorted(keys, hashes).clip(max=len(keys) - 1)
            inside = found.texts_W[: len(hashes)] == found.texts_W[length - 1 :]
            for start in np.flatnonzero((keys[at] == hashes) & inside).tolist():
                text = int(found.texts_W[start])
                if text in hit:
                    continue
                for number, place in self._places[length][int(hashes[start])]:
                    known = self._asked[number]
                    if not known.whole or _whole(found, start - place, known):
                        hit[text] = known.name
                        break
        return hit


class _Known(NamedTuple):
    name: str
    hashes_W: np.ndarray
    whole: bool
    figures_W: np.ndarray
    """bool; which words are numbers and operators."""

    def says(self, place: int, n: int) -> bool:
        """Whether the run of n words there is more than a calculation, which anybody may have done."""
        return n - int(self.figures_W[place : place + n].sum()) >= SHORTEST


def _whole(found: Words, start: int, known: _Known) -> bool:
    """All words of the question from `start` on in one text, and no figure that goes on from its first or last."""
    end = start + len(known.hashes_W)
    if start < 0 or end > len(found.hashes_W) or found.texts_W[start] != found.texts_W[end - 1]:
        return False
    if not np.array_equal(found.hashes_W[start:end], known.hashes_W):
        return False
    return not any(
        known.figures_W[edge]
        and 0 <= out < len(found.hashes_W)
        and found.texts_W[out] == found.texts_W[start]
        and found.kinds_W[out] in FIGURES
        for edge, out in ((0, start - 1), (-1, end))
    )


def save(found: Sequence[Asked], folder: Path) -> Path:
    """A file that `load` reads, named after what is in it."""
    text = json.dumps([list(one) for one in found], ensure_ascii=False)
    path = folder / f"asked-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        for old in folder.glob("asked-*.json"):
            old.unlink()
        scratch = path.with_suffix(".tmp")
        scratch.write_text(text, "utf-8")
        scratch.replace(path)
    return path


def load(path: Path) -> list[Asked]:
    return [Asked(*one) for one in json.loads(path.read_text("utf-8"))]
