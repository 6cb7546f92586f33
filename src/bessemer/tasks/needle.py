"""A needle in a haystack: one sentence to be found again in a long stretch of real text.

    User: ... and the crow flew away. The number of the red fox is 47. Then ...
    The number of the red fox?
    Assistant: The number of the red fox is 47.

A problem hides several such sentences and asks for one; its depth is the share of the text that lies before it. So
answering with any number that stands there is right in one case of `needles`. The haystack is text that its owner
splits by document: pages read `texts["train"]` alone, problems of a split that split's. A key (red fox) of the test
split occurs on no page.

Sizes count whatever `measure` counts: characters, or tokens of the model that is asked.
"""

import bisect
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bessemer.errors import UserError
from bessemer.tasks.answer import NO_ANSWER
from bessemer.tasks.base import CORRECT, WRONG_VALUE, Problem, Task, Verdict, Written, split_of_text

_WHAT = (
    "red blue green black white gray brown golden old young big small tall thin fat slow quick quiet loud brave "
    "shy wise proud poor rich kind cruel lazy busy hungry happy sad sick strong weak wild tame cold warm blind"
)
_WHO = (
    "fox hen wolf dog cat horse cow pig goat sheep lion bear mouse rat crow duck goose frog snake fish "
    "king queen lord duke monk cook judge nurse smith clerk baker miller sailor soldier tailor farmer hunter priest "
    "widow orphan"
)
WHAT, WHO = _WHAT.split(), _WHO.split()
NUMBERS = range(10, 100)
SENTENCE = "The number of the {key} is {number}."
QUESTION = "The number of the {key}?"

_ANSWER = re.compile(r"\bis ([0-9]{1,9})\b")
_PIECE = re.compile(r"[^.!?\n]*[.!?\n]+[\"'”’)\]]*\s*|[^.!?\n]+\Z")


@dataclass(frozen=True)
class NeedleMix:
    """Knobs of the pages, sizes in characters."""

    shortest: float = 150
    """Of a page; sizes are drawn evenly on a logarithmic scale, so that the skill is learnt on short ones first."""
    longest: float = 600
    """Of a page: what fits a row of the corpus, or it is cut."""
    between: float = 120
    """Text per needle, on average."""
    asked: float = 0.8
    """Needles that are asked for, as a share of those on the page."""

    def __post_init__(self) -> None:
        if not 50 <= self.shortest <= self.longest:
            raise UserError(
                f"needle: shortest is {self.shortest:g} and longest {self.longest:g}; set 50 <= shortest <= longest"
            )
        if self.between < 10 or not 0 < self.asked <= 1:
            raise UserError(
                f"needle: between is {self.between:g} and asked {self.asked:g}; set at least 10, and above 0 up to 1"
            )


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
        """A problem whose prompt measures at most `size`, by less than one piece of text, with the needle that is asked
        for at `depth` (0: first of all, 1: just before the question). UserError if the needles leave no room."""
        rng = self.rng("problem", split, index, seed, size, needles, round(depth * 1000))
        facts = _facts(rng, split, needles)
        (key, number), question = facts[0], QUESTION.format(key=facts[0][0])
        room = size - measure("\n" + question) - sum(measure(_sentence(*fact)) for fact in facts)
        if room <= 0:
            raise UserError(
                f"needle: {needles} needles and a question do not fit into {size}; take fewer needles or a longer text"
            )
        pieces = self._filler(split, rng, room, measure)
        while True:
            prompt = _planted(pieces, facts, depth, rng.random()) + "\n" + question
            if measure(prompt) <= size or not pieces:
                break
            pieces.pop()  # the whole can measure a little more than its parts
        meta = {"key": key, "number": number, "depth": depth, "size": size, "needles": needles}
        meta["difficulty"] = int(math.log2(size))
        return Problem(f"{self.name}/{split}/{seed}/{size}/{depth:g}/{index}", prompt, "en", meta)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The first number that the completion states; formatted: it is the sentence and nothing else."""
        found = _ANSWER.search(completion)
        if found is None:
            return Verdict(False, False, NO_ANSWER, None)
        answer = str(int(found[1]))
        right = answer == str(problem.meta["number"])
        formatted = completion.strip() == SENTENCE.format(key=problem.meta["key"], number=answer)
        return Verdict(right, formatted, CORRECT if right else WRONG_VALUE, answer)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        """Text with needles, broken by questions about what stood anywhere before them, the first as `problem`."""
        rng, mix = self.rng("document", index, seed), self.mix
        size = mix.shortest * (mix.longest / mix.shortest) ** rng.random()
        count = max(2, round(size / (mix.between + 2 * len(_sentence(WHAT[0] + " " + WHO[0], 10)))))
        facts = _facts(rng, "train", count)
        room = size - sum(len(_sentence(*fact)) * (1 + 2 * mix.asked) for fact in facts)
        gaps = self._filler("train", rng, max(20, round(room)), len)
        places = sorted(rng.randint(0, len(gaps)) for _ in facts)
        turns, told, begun, text = [], [], 0, ""
        for place, fact in zip(places, facts, strict=True):
            text += "".join(gaps[begun:place]) + _sentence(*fact)
            begun = place
            told.append(fact)
            while told and rng.random() < mix.asked / (1 + mix.asked):
                turns.append((text, told.pop(rng.randrange(len(told)))))
                text = ""
        text += "".join(gaps[begun:])
        left = [told.pop(rng.randrange(len(told))) for _ in range(math.ceil(mix.asked * len(told)))]
        turns += [(text if n == 0 else "", fact) for n, fact in enumerate(left or [facts[-1]])]
        (first, (key, number)), *others = turns
        response = _said(key, number)
        for text, (other, value) in others:
            response += f"\nUser: {text.rstrip()}{chr(10) if text.strip() else ''}{QUESTION.format(key=other)}"
            response += f"\nAssistant:{_said(other, value)}"
        prompt = first.rstrip() + "\n" + QUESTION.format(key=key)
        meta = {"key": key, "number": number, "difficulty": int(math.log2(size))}
        return Written(Problem(f"{self.name}/document/{seed}/{index}", prompt, "en", meta), "author", response)

    def train_problem(self, index: int, seed: int, language: str | None) -> Problem:
        return self.written(index, seed).problem

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


def _facts(rng: random.Random, split: str, count: int) -> list[tuple[str, int]]:
    """(key, number) of so many needles; keys of this split, all different, numbers different while they last."""
    facts: dict[str, int] = {}
    numbers = itertools.chain.from_iterable(rng.sample(NUMBERS, len(NUMBERS)) for _ in itertools.count())
    while len(facts) < count:
        key = f"{rng.choice(WHAT)} {rng.choice(WHO)}"
        if key not in facts and split_of_text(f"needle {key}") == split:
            facts[key] = next(numbers)
    return list(facts.items())


def _sentence(key: str, number: int) -> str:
    return SENTENCE.format(key=key, number=number) + " "


def _said(key: str, number: int) -> str:
    return " " + SENTENCE.format(key=key, number=number)


def _planted(pieces: list[str], facts: list[tuple[str, int]], depth: float, salt: float) -> str:
    """The pieces with the facts between them, the first fact at `depth` of the characters, the others anywhere."""
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    rng = random.Random(salt)
    at = min(bisect.bisect_left(ends, depth * ends[-1]), len(pieces))
    places = [(at, 0.0 if depth < 0.5 else 1.0, facts[0])]
    places += [(rng.randint(0, len(pieces)), rng.random(), fact) for fact in facts[1:]]
    written, begun = [], 0
    for place, _, fact in sorted(places):
        written += [*pieces[begun:place], _sentence(*fact)]
        begun = place
    return "".join([*written, *pieces[begun:]]).rstrip()
