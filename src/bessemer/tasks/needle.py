"""A needle in a haystack: a sentence in a long stretch of real text, begun again at its end and to be completed.

    ... and the crow flew away. The red fox says cobalt. Then the old king ... and all was well.
    The red fox says

This is the form for a model that continues text, as after pre-training. A problem hides several such sentences and
begins one of them again; its depth is the share of the text that lies before it. So a word taken from any of them is
right in one case of `needles`. The haystack is text that its owner splits by document: pages read `texts["train"]`
alone, problems of a split that split's. A key (red fox) of the test split occurs on no page.

Sizes count whatever `measure` counts: characters, or tokens of the model that is asked.
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
from bessemer.tasks.base import CORRECT, WRONG_VALUE, Problem, Task, Verdict, split_of_text

_WHAT = (
    "red blue green black white gray brown golden old young big small tall thin fat slow quick quiet loud brave "
    "shy wise proud poor rich kind cruel lazy busy hungry happy sad sick strong weak wild tame cold warm blind"
)
_WHO = (
    "fox hen wolf dog cat horse cow pig goat sheep lion bear mouse rat crow duck goose frog snake fish "
    "king queen lord duke monk cook judge nurse smith clerk baker miller sailor soldier tailor farmer hunter priest "
    "widow orphan"
)
_WORDS = (
    "pixel tango jazz pizza cocoa guitar piano kiwi tractor nickel cobalt helium neon ozone atom asteroid orbit "
    "satellite sodium lithium uranium vaccine bacteria insulin protein vitamin caffeine nicotine tomato broccoli "
    "avocado paprika vanilla espresso sushi kebab noodle hockey karate subway escalator diesel petrol asphalt "
    "concrete aluminium nylon polyester cellophane zipper sneaker pajamas toaster microwave microscope keyboard "
    "printer transistor voltage hamster llama bison walrus bicycle radio laser taxi galaxy oxygen sandwich "
    "popcorn soccer elevator garage sofa blender telephone telescope computer monitor magnet circuit yoga"
)
WHAT, WHO, WORDS = _WHAT.split(), _WHO.split(), _WORDS.split()
"""WORDS are of our time: old plays and fables, in which they are hidden, hardly use them, as the needle of the usual
test has nothing to do with the essays around it."""
BEGUN = "The {key} says"
SENTENCE = BEGUN + " {word}."

_ANSWER = re.compile(r"\s*([A-Za-z]+)")
_PIECE = re.compile(r"[^.!?\n]*[.!?\n]+[\"'”’)\]]*\s*|[^.!?\n]+\Z")
_Fact = tuple[str, str]


@dataclass(frozen=True)
class NeedleMix:
    """Knobs of the pages, sizes in characters."""

    shortest: float = 80
    """Of a page; sizes are drawn evenly on a logarithmic scale, so that the skill is learnt on short ones first."""
    longest: float = 600
    """Of a page; one that does not fit a row of the corpus is cut there."""
    between: float = 60
    """Text between two sentences, on average; more where `most` bounds their number."""
    most: float = 32
    """Needles of a page, at most; 1: what is to be found is never to be told from others of its kind."""
    times: float = 2.5
    """How often each needle comes on a page, on average. In long pages more of them teach more: every time but the
    first is something to be found."""

    def __post_init__(self) -> None:
        if not 50 <= self.shortest <= self.longest:
            raise UserError(
                f"needle: shortest is {self.shortest:g} and longest {self.longest:g}; set 50 <= shortest <= longest"
            )
        if self.between < 0 or self.times < 2:
            raise UserError(
                f"needle: between is {self.between:g} and times {self.times:g}; set at least 0, and at least 2"
            )
        if not 1 <= self.most <= len(WHO):
            raise UserError(f"needle: most is {self.most:g}; set it between 1 and {len(WHO)}")


class Needle(Task):
    name, domain = "needle", "retrieval"
    all_languages = ("en",)
    phrasings = ("seen",)
    Mix = NeedleMix

    def __init__(self, texts: Mapping[str, Sequence[str]], needles: int = 8, size: int = 2000, **settings):
        """`texts`: the documents of each split. A problem by number has `needles` in `size` characters."""
        super().__init__(**settings)
        self.needles, self.size = needles, size
        self._pieces = {split: [_PIECE.findall(text) for text in owned] for split, owned in texts.items()}

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        depth = self.rng("depth", split, index, seed).random()
        return self.hidden(split, index, self.size, depth, self.needles, seed=seed)

    def hidden(
        self, split: str, index: int, size: int, depth: float, needles: int, *,
        seed: int = 0, measure: Callable[[str], int] = len,
    ) -> Problem:  # fmt: skip
        """A problem whose prompt measures at most `size`, by less than one piece of text, with the needle that is begun
        again at `depth` (0: first of all, 1: at the very end). UserError if the needles leave no room."""
        rng = self.rng("problem", split, index, seed, size, needles, round(depth * 1000))
        facts = _facts(rng, split, needles)
        key, word = facts[0]
        end = "\n" + BEGUN.format(key=key)
        room = size - measure(end) - sum(measure(_sentence(fact)) for fact in facts)
        if room <= 0:
            raise UserError(f"needle: {needles} needles do not fit into {size}; take fewer needles or a longer text")
        pieces, salt = self._filler(split, rng, room, measure), rng.random()
        while True:
            prompt = _planted(pieces, facts, depth, random.Random(salt)) + end
            if measure(prompt) <= size or not pieces:
                break
            pieces.pop()  # the whole can measure a little more than its parts
        meta = {"key": key, "word": word, "depth": depth, "size": size, "needles": needles}
        meta["difficulty"] = int(math.log2(size))
        return Problem(f"{self.name}/{split}/{seed}/{size}/{depth:g}/{index}", prompt, "en", meta)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The first word of the completion; formatted: a full stop after it."""
        found = _ANSWER.match(completion)
        if found is None:
            return Verdict(False, False, NO_ANSWER, None)
        right = found[1] == problem.meta["word"]
        return Verdict(right, completion[found.end() :].startswith("."), CORRECT if right else WRONG_VALUE, found[1])

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """A page: text of the train split with needles in it, each of them at several places."""
        rng, mix = self.rng("document", index, seed), self.mix
        size = mix.shortest * (mix.longest / mix.shortest) ** rng.random()
        each = len(_sentence((f"{WHAT[0]} {WHO[0]}", WORDS[0])))
        facts = _facts(rng, "train", min(int(mix.most), max(2, round(size / (mix.times * (each + mix.between))))))
        said = [fact for fact in facts for _ in range(int(mix.times) + (rng.random() < mix.times % 1))]
        rng.shuffle(said)
        pieces = self._filler("train", rng, size - sum(len(_sentence(fact)) for fact in said), len)
        places = sorted(rng.randint(0, len(pieces)) for _ in said)
        return _joined(pieces, zip(places, said, strict=True)).rstrip()

    def train_problem(self, index: int, seed: int, language: str | None) -> Problem:
        """What a page shows, for a search: no question, and no key of a test."""
        return Problem(f"{self.name}/document/{seed}/{index}", self.document(index, seed), "en")

    def _filler(self, split: str, rng: random.Random, room: float, measure: Callable[[str], int]) -> list[str]:
        """Pieces of consecutive text, document after document, that together measure at most `room`."""
        owned = self._pieces.get(split, [])
        if not any(owned):
            raise UserError(f"needle: there is no text for its {split} split; give a source with more documents")
        filler: list[str] = []
        at = rng.randrange(len(owned))
        first = rng.randrange(len(owned[at])) if owned[at] else 0
        for document in itertools.chain([owned[at][first:]], itertools.cycle(owned[at + 1 :] + owned[:at])):
            for number, piece in enumerate(document):
                piece = piece.rstrip() + "\n" if number == len(document) - 1 else piece
                room -= measure(piece)
                if room < 0:
                    return filler
                filler.append(piece)
        return filler


def _facts(rng: random.Random, split: str, count: int) -> list[_Fact]:
    """(key, word) of so many needles; keys of this split; who speaks and what is said differ from needle to needle."""
    if count > len(WHO):
        raise UserError(f"needle: {count} needles are too many; take at most {len(WHO)}")
    facts: list[_Fact] = []
    words = rng.sample(WORDS, count)
    while len(facts) < count:
        key = f"{rng.choice(WHAT)} {rng.choice([who for who in WHO if all(not k.endswith(who) for k, _ in facts)])}"
        if split_of_text(f"needle {key}") == split:
            facts.append((key, words[len(facts)]))
    return facts


def _sentence(fact: _Fact) -> str:
    return SENTENCE.format(key=fact[0], word=fact[1]) + " "


def _planted(pieces: list[str], facts: list[_Fact], depth: float, rng: random.Random) -> str:
    """The pieces with the facts between them, the first fact at `depth` of the characters, the others anywhere."""
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    at = min(bisect.bisect_left(ends, depth * ends[-1]), len(pieces))
    places = [(at, 0.0 if depth < 0.5 else 1.0, facts[0])]
    places += [(rng.randint(0, len(pieces)), rng.random(), fact) for fact in facts[1:]]
    return _joined(pieces, [(place, fact) for place, _, fact in sorted(places)]).rstrip()


def _joined(pieces: list[str], facts: Iterator[tuple[int, _Fact]] | Sequence[tuple[int, _Fact]]) -> str:
    """The text with each fact before the piece of its number; the facts come in the order of their places."""
    written, begun = [], 0
    for place, fact in facts:
        written += [*pieces[begun:place], _sentence(fact)]
        begun = place
    return "".join([*written, *pieces[begun:]])
