"""One general request: a family of the phrasebook with its slots filled, and what can be said about it.

Train and test requests differ in their slots (the pair hot and small, Anna on Monday), not in single words: every word
is seen in training, no combination of the test split is. A combination is in the same split in both languages.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bessemer.tasks.base import TEST_SHARE, Problem, stable_hash
from bessemer.tasks.general.phrasebook import BY_NAME, FAMILIES, Family
from bessemer.tasks.general.vocabulary import table

AND = {"en": " and ", "zh": "和"}
COMMA = {"en": ", ", "zh": "、"}
OTHER = {"en": "zh", "zh": "en"}


@dataclass(frozen=True)
class Request:
    """`slots` are row numbers of the family's tables, in the order of its slots."""

    family: Family
    slots: tuple[int, ...]
    language: str

    @classmethod
    def of(cls, problem: Problem) -> "Request":
        return cls(BY_NAME[problem.meta["family"]], tuple(problem.meta["slots"]), problem.language)

    def translated(self) -> "Request":
        """The same request in the other language."""
        return Request(self.family, self.slots, OTHER[self.language])

    @property
    def unsafe(self) -> bool:
        """Whether it asks for what must not be said."""
        return bool(self.family.unsafe)

    def asks(self) -> list[str]:
        """The request in each of its wordings."""
        fields = self._fields()
        return [way.format(**fields) for way in self.family.ask[self.language]]

    def answer(self, rng: random.Random) -> tuple[str, str]:
        """(thoughts, summary) of a good answer; empty thoughts where none are needed."""
        fields = self._fields()
        if self.family.name == "list":
            fields["picked"] = _joined(rng.sample(self.choice(), self.count), self.language)
        thought = self.family.think.get(self.language, "").format(**fields)
        return thought, rng.choice(self.family.say[self.language]).format(**fields)

    def bad(self, rng: random.Random) -> str:
        """A summary that does what an unsafe request asks for."""
        return rng.choice(self.family.unsafe[self.language]).format(**self._fields())

    def points(self) -> list[list[str]]:
        """What a summary must hold; each point is a list of alternatives."""
        fields = self._fields()
        return [point.format(**fields).split("|") for point in self.family.points]

    def pool(self) -> list[str]:
        """Words of which only the right ones should be named."""
        if self.family.pool is None:
            return []
        name, form = self.family.pool
        return [row[self.language][form] for row in table(name)]

    @property
    def count(self) -> int:
        """How many things a list asks for; 0 when none is asked for."""
        return int(self._fields()["count"][1]) if self.family.name == "list" else 0

    def choice(self) -> list[str]:
        """The things that may be on the list."""
        fields = self._fields()
        return [word for word in fields["kind"][1:] if word != fields["other"][0]]

    def excluded(self) -> str:
        """The thing that must not be on it."""
        return self._fields()["other"][0]

    def secrets(self) -> list[str]:
        """What must not be written, in either language."""
        found = [s.format(**r._fields()) for r in (self, self.translated()) for s in self.family.secrets]
        return list(dict.fromkeys(found))

    def _fields(self) -> dict[str, tuple[str, ...]]:
        names = [slot.split(":")[0] for slot in self.family.slots]
        rows = zip(_tables(self.family), self.slots, strict=True)
        fields = {name: table(of)[row][self.language] for name, (of, row) in zip(names, rows, strict=True)}
        if self.family.name == "list":
            fields["other"] = (fields["kind"][1 + self.slots[names.index("other")]],)
        return fields


def draw(aim: str, split: str, language: str, rng: random.Random) -> Request:
    """A request of one aim and split."""
    family = rng.choice([family for family in FAMILIES if family.aim == aim])
    while True:
        slots = tuple(rng.randrange(len(table(of))) for of in _tables(family))
        twice = len(set(_tables(family))) < len(slots) and len(set(slots)) < len(slots)
        if not twice and split_of(family, slots) == split:
            return Request(family, slots, language)


def split_of(family: Family, slots: Sequence[int]) -> str:
    """Two slots of one table are unordered: hot and small is small and hot."""
    named = sorted(zip(_tables(family), slots, strict=True))
    return "test" if stable_hash("general", family.name, *named) < TEST_SHARE * 2**64 else "train"


def _tables(family: Family) -> list[str]:
    return [slot.split(":")[-1] for slot in family.slots]


def _joined(words: Sequence[str], language: str) -> str:
    return COMMA[language].join(words[:-1]) + AND[language] + words[-1]
