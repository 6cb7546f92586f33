"""General requests: what is asked, and how it is answered, well and badly.

A request is a family (general_families.toml) with its slots filled from parallel tables in English and Chinese
(general_words.toml). Row i of a table is one thing in both languages, so a request and its twin in the other language
are the same problem and fall into the same split. Texts are `str.format` templates over the slots: slot `name` with the
forms of its table row is `{name[0]}`, `{name[1]}`, ...

There are two aims (R1 2.3.4). Most families are for helpfulness. Those for harmlessness ask for somebody's secret or
for an insult: a good answer declines kindly and contains neither, in the thoughts or after them. Each has a harmless
twin among the helpful ones that looks alike (one's own code, public news, a compliment, borrowing), so that refusing
everything is not helpful.

Train and test requests differ in their slots (the pair hot and small, Anna on Monday), not in single words: every word
occurs in training, but no combination of the test split does. A combination is in the same split in both languages.

Manners are the authors of the pages and the candidates of preference pairs. Each manner but `good` has one flaw that
the written judge sees (general_quality.py). Unsafe ones reveal what was asked for, in the summary or only in the
thoughts, or insult somebody.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from bessemer.tasks.base import TEST_SHARE, Problem, read_toml, stable_hash
from bessemer.tasks.language import share

Texts = dict[str, list[str]]
Entry = tuple[str, ...]
Table = tuple[dict[str, Entry], ...]

AND = {"en": " and ", "zh": "和"}
COMMA = {"en": ", ", "zh": "、"}
OTHER = {"en": "zh", "zh": "en"}

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
HAN = "零一二三四五六七八九"

GOOD = "good"
MANNERS = (GOOD, "curt", "padded", "off-topic", "foreign", "wrong", "cut", "refusal", "rude")
"""Manners of answering a harmless request."""
MANNERS_UNSAFE = (GOOD, "curt", "padded", "off-topic", "foreign", "leak", "leak-thought", "half-leak")
"""Manners of answering an unsafe one."""
HARMLESS = frozenset(MANNERS + MANNERS_UNSAFE) - {"rude", "leak", "leak-thought", "half-leak"}

PHRASES = read_toml(__package__, "general_phrases.toml")
FILLER, REFUSAL, RUDE, NO = (PHRASES[name] for name in ("filler", "refusal", "rude", "no"))


@dataclass(frozen=True)
class RequestFamily:
    """One kind of request."""

    name: str
    slots: list[str]
    """`name` or `name:table`."""
    ask: Texts
    """Wordings of the request; the last one in a language is the held-out phrasing, never used in training."""
    say: Texts
    """Good answers."""
    points: list[str] = field(default_factory=list)
    """What an answer must contain; | separates alternatives."""
    think: dict[str, str] = field(default_factory=dict)
    """Thoughts before the answer; none if it needs no thought."""
    pool: tuple[str, int] | None = None
    """Table and form of the words among which an answer chooses: naming wrong ones too is hedging."""
    single: bool = False
    """Whether the answer must be one sentence."""
    aim: str = "helpful"
    secrets: list[str] = field(default_factory=list)
    """What the answer to an unsafe request must not contain."""
    unsafe: Texts = field(default_factory=dict)
    """Answers that comply with an unsafe request."""


_ENTRIES = read_toml(__package__, "general_families.toml")
FAMILIES = {name: RequestFamily(name, **entry) for name, entry in _ENTRIES.items()}
TABLES: dict[str, str] = read_toml(__package__, "general_words.toml")


@cache
def table(name: str) -> Table:
    """The rows of a table, each {language: forms}."""
    if name == "number":
        return tuple({language: (str(n), spell(n, language)) for language in ("en", "zh")} for n in range(11, 100))
    rows = []
    for line in TABLES[name].strip().split("\n"):
        halves = [tuple(form.strip() for form in half.split("|")) for half in line.split("=")]
        rows.append(dict(zip(("en", "zh"), halves, strict=True)))
    return tuple(rows)


def spell(n: int, language: str) -> str:
    """A number from 0 to 99 in words."""
    tens, ones = divmod(n, 10)
    if language == "zh":
        return (HAN[tens] if tens > 1 else "") + ("十" if tens else "") + (HAN[ones] if ones or not tens else "")
    if n < 20:
        return ONES[n]
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


@dataclass(frozen=True)
class GeneralRequest:
    """`slots` are row numbers of the family's tables, in the order of its slots."""

    family: RequestFamily
    slots: tuple[int, ...]
    language: str

    @classmethod
    def of(cls, problem: Problem) -> "GeneralRequest":
        return cls(FAMILIES[problem.meta["family"]], tuple(problem.meta["slots"]), problem.language)

    def translated(self) -> "GeneralRequest":
        """The same request in the other language."""
        return GeneralRequest(self.family, self.slots, OTHER[self.language])

    @property
    def unsafe(self) -> bool:
        """Whether it asks for something that the answer must not say."""
        return bool(self.family.unsafe)

    def asks(self) -> list[str]:
        """The request in each of its wordings."""
        fields = self._fields()
        return [wording.format(**fields) for wording in self.family.ask[self.language]]

    def answer(self, rng: random.Random) -> tuple[str, str]:
        """(thoughts, summary) of a good answer; empty thoughts if none are needed."""
        fields: dict[str, str | tuple[str, ...]] = {**self._fields()}
        if self.family.name == "list":
            fields["picked"] = _enumerate(rng.sample(self.choice(), self.count), self.language)
        thought = self.family.think.get(self.language, "").format(**fields)
        return thought, rng.choice(self.family.say[self.language]).format(**fields)

    def bad(self, rng: random.Random) -> str:
        """A summary that complies with an unsafe request."""
        return rng.choice(self.family.unsafe[self.language]).format(**self._fields())

    def points(self) -> list[list[str]]:
        """What a summary must contain; each point is a list of alternatives."""
        fields = self._fields()
        return [point.format(**fields).split("|") for point in self.family.points]

    def pool(self) -> list[str]:
        """Words of which a summary should name only the right ones."""
        if self.family.pool is None:
            return []
        name, form = self.family.pool
        return [row[self.language][form] for row in table(name)]

    @property
    def count(self) -> int:
        """How many things a list request asks for; 0 for other requests."""
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
        secrets = [s.format(**r._fields()) for r in (self, self.translated()) for s in self.family.secrets]
        return list(dict.fromkeys(secrets))

    def _fields(self) -> dict[str, tuple[str, ...]]:
        names = [slot.split(":")[0] for slot in self.family.slots]
        rows = zip(_tables(self.family), self.slots, strict=True)
        fields = {name: table(of)[row][self.language] for name, (of, row) in zip(names, rows, strict=True)}
        if self.family.name == "list":
            fields["other"] = (fields["kind"][1 + self.slots[names.index("other")]],)
        return fields


def sample_request(aim: str, split: str, language: str, rng: random.Random) -> GeneralRequest:
    """A request of one aim and split."""
    family = rng.choice([family for family in FAMILIES.values() if family.aim == aim])
    while True:
        slots = tuple(rng.randrange(len(table(of))) for of in _tables(family))
        twice = len(set(_tables(family))) < len(slots) and len(set(slots)) < len(slots)
        if not twice and split_of(family, slots) == split:
            return GeneralRequest(family, slots, language)


def split_of(family: RequestFamily, slots: Sequence[int]) -> str:
    """The split of a request. Two slots from one table are unordered: hot and small is small and hot."""
    named = sorted(zip(_tables(family), slots, strict=True))
    return "test" if stable_hash("general", family.name, *named) < TEST_SHARE * 2**64 else "train"


def _tables(family: RequestFamily) -> list[str]:
    return [slot.split(":")[-1] for slot in family.slots]


def _enumerate(words: Sequence[str], language: str) -> str:
    return COMMA[language].join(words[:-1]) + AND[language] + words[-1]


def manners_for(request: GeneralRequest) -> tuple[str, ...]:
    """The manners in which a request can be answered, the good one first."""
    return MANNERS_UNSAFE if request.unsafe else MANNERS


def answer_in_manner(request: GeneralRequest, manner: str, rng: random.Random) -> tuple[str, str]:
    """(thoughts, summary) of an answer in this manner."""
    language = request.language
    thought, summary = request.answer(rng)
    if manner == "curt":
        return thought, _curt(request, rng)
    if manner == "padded":
        return thought, _padded(summary, language, rng)
    if manner == "off-topic":
        return _other_request(request, rng).answer(rng)
    if manner == "foreign":
        return request.translated().answer(rng)
    if manner == "wrong":
        return mistaken(request, rng).answer(rng)
    if manner == "cut":
        return thought, summary[: rng.randint(len(summary) // 3, 2 * len(summary) // 3)].rstrip()
    if manner == "refusal":
        return thought, rng.choice(REFUSAL[language])
    if manner == "rude":
        return thought, _shuffle_join([summary, rng.choice(RUDE[language])], language, rng)
    if manner == "leak":
        return thought, request.bad(rng)
    if manner == "leak-thought":
        return request.bad(rng), summary
    if manner == "half-leak":
        return thought, _shuffle_join([summary, request.bad(rng)], language, rng)
    return thought, summary


def _curt(request: GeneralRequest, rng: random.Random) -> str:
    """The bare points."""
    if request.unsafe:
        return rng.choice(NO[request.language])
    if request.count:
        return " ".join(rng.sample(request.choice(), request.count))
    return " ".join(next(c for c in point if share(c, request.language) == 1.0) for point in request.points())


def _padded(summary: str, language: str, rng: random.Random) -> str:
    parts = [summary, *rng.sample(FILLER[language], 2), summary, rng.choice(FILLER[language])]
    return (" " if language == "en" else "").join(parts[: rng.randint(3, 5)])


def _other_request(request: GeneralRequest, rng: random.Random) -> GeneralRequest:
    """A request of the train split from another family."""
    while True:
        other = sample_request("helpful", "train", request.language, rng)
        if other.family.name != request.family.name:
            return other


def mistaken(request: GeneralRequest, rng: random.Random) -> GeneralRequest:
    """The same request with one or more slots confused."""
    while True:
        other = sample_request(request.family.aim, "train", request.language, rng)
        if other.family.name == request.family.name and other.slots != request.slots:
            keeps = [rng.random() < 0.5 for _ in request.slots]
            slots = tuple(a if keep else b for keep, a, b in zip(keeps, request.slots, other.slots, strict=True))
            new = slots != request.slots and len(set(slots)) > 1
            if new and split_of(request.family, slots) == "train":
                return GeneralRequest(request.family, slots, request.language)


def _shuffle_join(parts: list[str], language: str, rng: random.Random) -> str:
    rng.shuffle(parts)
    return (" " if language == "en" else "").join(parts)
