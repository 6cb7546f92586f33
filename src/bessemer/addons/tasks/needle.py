"""A needle in a haystack: a sentence hidden in a long real text, repeated at its end for the model to complete.

    ... and the crow flew away. The red fox says cobalt. Then the old king ... and all was well.
    The red fox says

This form suits a model that continues text, as after pre-training. A problem hides several such sentences and begins
one of them again; its depth is the share of the text before it. Copying the word of a random sentence is right once in
`needles` times. The caller splits the haystack text by document: pages read only `texts["train"]`, and problems only
the text of their split. A key (red fox) of the test split occurs on no page.

Sizes are in the units of `measure`: characters, or tokens of the model under test.
"""

import bisect
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bessemer.errors import UserError
from bessemer.tasks.answer import NO_ANSWER
from bessemer.tasks.base import CORRECT, WRONG_VALUE, Problem, Task, Verdict, read_toml, split_of_text

ADJECTIVES, SPEAKERS, WORDS = (words.split() for words in read_toml(__package__, "needle.toml").values())
"""WORDS are modern, so the old plays and fables that hide them hardly use them; in the usual test, too, the needle has
nothing to do with the essays around it."""
STEM = "The {key} says"
SENTENCE = STEM + " {word}."

_ANSWER = re.compile(r"\s*([A-Za-z]+)")
_PIECE = re.compile(r"[^.!?\n]*[.!?\n]+[\"'”’)\]]*\s*|[^.!?\n]+\Z")
_Fact = tuple[str, str]


@dataclass(frozen=True)
class NeedleMix:
    """Settings of the pages, sizes in characters."""

    shortest: float = 80
    """Shortest page; sizes are uniform on a logarithmic scale, so that the skill is learnt on short pages first."""
    longest: float = 600
    """Longest page; one that does not fit a row of the corpus is cut there."""
    between: float = 60
    """Text between two needles, on average; more if `most` bounds their number."""
    most: float = 32
    """Maximum needles per page; with 1 a page never has rival sentences."""
    times: float = 2.5
    """Mean number of times each needle occurs on a page. More repeats teach more: every occurrence but the first is
    something to retrieve."""

    def __post_init__(self) -> None:
        if not 50 <= self.shortest <= self.longest:
            raise UserError(
                f"needle: shortest is {self.shortest:g} and longest {self.longest:g}; set 50 <= shortest <= longest"
            )
        if self.between < 0 or self.times < 2:
            raise UserError(
                f"needle: between is {self.between:g} and times {self.times:g}; set at least 0, and at least 2"
            )
        if not 1 <= self.most <= len(SPEAKERS):
            raise UserError(f"needle: most is {self.most:g}; set it between 1 and {len(SPEAKERS)}")


class Needle(Task):
    name, domain = "needle", "retrieval"
    all_languages = ("en",)
    phrasings = ("seen",)
    Mix = NeedleMix

    def __init__(self, texts: Mapping[str, Sequence[str]], needles: int = 8, size: int = 2000, **settings):
        """`texts`: the documents of each split. `problem` hides `needles` sentences in `size` characters."""
        super().__init__(**settings)
        self.needles, self.haystack_size = needles, size
        self._pieces = {split: [_PIECE.findall(text) for text in documents] for split, documents in texts.items()}

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        depth = self.rng("depth", split, index, seed).random()
        return self.hidden(split, index, self.haystack_size, depth, self.needles, seed=seed)

    def hidden(
        self,
        split: str,
        index: int,
        size: int,
        depth: float,
        needles: int,
        *,
        seed: int = 0,
        measure: Callable[[str], int] = len,
    ) -> Problem:
        """A problem whose prompt measures at most `size`, and at least `size` minus one piece of text.

        The needle to complete is at `depth` (0: at the start, 1: at the end). UserError if the needles do not
        fit.
        """
        rng = self.rng("problem", split, index, seed, size, needles, round(depth * 1000))
        facts = _facts(rng, split, needles)
        key, word = facts[0]
        end = "\n" + STEM.format(key=key)
        room = size - measure(end) - sum(measure(_sentence(fact)) for fact in facts)
        if room <= 0:
            raise UserError(f"needle: {needles} needles do not fit into {size}; use fewer needles or a longer text")
        pieces, salt = self._filler(split, rng, room, measure), rng.random()
        while True:
            prompt = _plant(pieces, facts, depth, random.Random(salt)) + end
            if measure(prompt) <= size or not pieces:
                break
            pieces.pop()  # the whole can measure a little more than its parts
        meta = {"key": key, "word": word, "depth": depth, "size": size, "needles": needles}
        meta["difficulty"] = int(math.log2(size))
        return Problem(f"{self.name}/{split}/{seed}/{size}/{depth:g}/{index}", prompt, "en", meta)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges the first word of the completion; formatted if a full stop follows it."""
        match = _ANSWER.match(completion)
        if match is None:
            return Verdict(False, False, NO_ANSWER, None)
        right = match[1] == problem.meta["word"]
        return Verdict(right, completion[match.end() :].startswith("."), CORRECT if right else WRONG_VALUE, match[1])

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """A page: text of the train split with needles in it, each of them at several places."""
        rng, mix = self.rng("document", index, seed), self.mix
        size = mix.shortest * (mix.longest / mix.shortest) ** rng.random()
        sentence_length = len(_sentence((f"{ADJECTIVES[0]} {SPEAKERS[0]}", WORDS[0])))
        facts = _facts(
            rng, "train", min(int(mix.most), max(2, round(size / (mix.times * (sentence_length + mix.between)))))
        )
        sentences = [fact for fact in facts for _ in range(int(mix.times) + (rng.random() < mix.times % 1))]
        rng.shuffle(sentences)
        pieces = self._filler("train", rng, size - sum(len(_sentence(fact)) for fact in sentences), len)
        places = sorted(rng.randint(0, len(pieces)) for _ in sentences)
        return _joined(pieces, zip(places, sentences, strict=True)).rstrip()

    def train_problem(self, index: int, seed: int, language: str | None) -> Problem:
        """The page itself, for contamination search: it has no question, and no key of the test split."""
        return Problem(f"{self.name}/document/{seed}/{index}", self.document(index, seed), "en")

    def _filler(self, split: str, rng: random.Random, room: float, measure: Callable[[str], int]) -> list[str]:
        """Pieces of consecutive text, document after document, that together measure at most `room`."""
        documents = self._pieces.get(split, [])
        if not any(documents):
            raise UserError(f"needle: there is no text for its {split} split; use a source with more documents")
        filler: list[str] = []
        at = rng.randrange(len(documents))
        first = rng.randrange(len(documents[at])) if documents[at] else 0
        rest = itertools.cycle(documents[at + 1 :] + documents[:at])
        for document in itertools.chain([documents[at][first:]], rest):
            for number, piece in enumerate(document):
                piece = piece.rstrip() + "\n" if number == len(document) - 1 else piece
                room -= measure(piece)
                if room < 0:
                    return filler
                filler.append(piece)
        return filler


def _facts(rng: random.Random, split: str, count: int) -> list[_Fact]:
    """`count` pairs (key, word) with keys of this split, all speakers and words different."""
    if count > len(SPEAKERS):
        raise UserError(f"needle: {count} needles are too many; use at most {len(SPEAKERS)}")
    facts: list[_Fact] = []
    words = rng.sample(WORDS, count)
    while len(facts) < count:
        unused = [speaker for speaker in SPEAKERS if all(not k.endswith(speaker) for k, _ in facts)]
        key = f"{rng.choice(ADJECTIVES)} {rng.choice(unused)}"
        if split_of_text(f"needle {key}") == split:
            facts.append((key, words[len(facts)]))
    return facts


def _sentence(fact: _Fact) -> str:
    return SENTENCE.format(key=fact[0], word=fact[1]) + " "


def _plant(pieces: list[str], facts: list[_Fact], depth: float, rng: random.Random) -> str:
    """The pieces with the facts between them, the first fact at `depth` of the characters, the others anywhere."""
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    at = min(bisect.bisect_left(ends, depth * ends[-1]), len(pieces))
    places = [(at, 0.0 if depth < 0.5 else 1.0, facts[0])]
    places += [(rng.randint(0, len(pieces)), rng.random(), fact) for fact in facts[1:]]
    return _joined(pieces, [(position, fact) for position, _, fact in sorted(places)]).rstrip()


def _joined(pieces: list[str], facts: Iterator[tuple[int, _Fact]] | Sequence[tuple[int, _Fact]]) -> str:
    """The text with each fact before the piece at its place; the facts come in the order of their places."""
    parts, done = [], 0
    for position, fact in facts:
        parts += [*pieces[done:position], _sentence(fact)]
        done = position
    return "".join([*parts, *pieces[done:]])
