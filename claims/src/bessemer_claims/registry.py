"""The claims, the rules that decide them and the experiments behind them: the package's data files as typed objects."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from bessemer.config.table import ConfigTable
from bessemer.errors import UserError

Text = Annotated[list[str], Field(min_length=2, max_length=2)]
"""[English, Chinese]."""
LANGUAGES = ("en", "zh")


class Source(ConfigTable):
    """A document that cards cite; the head of sources.toml explains the fields."""

    name: Text
    title: str
    date: Annotated[str, Field(pattern=r"^\d{4}(-\d{2}){0,2}$")]
    url: Annotated[str, Field(pattern="^https://")] | None = None


@dataclass(frozen=True)
class Citation:
    """A place in a source: "Table 4", "section 2.3.2"."""

    key: str
    source: Source
    places: tuple[tuple[str, str], ...]
    """Each in English and Chinese."""

    def label(self, language: int) -> str:
        """Name and places: "V3 technical report, Table 1"."""
        return (", ", "，")[language].join([self.source.name[language], *(place[language] for place in self.places)])

    def facts(self) -> dict[str, Any]:
        return {"source": self.label(0), "title": self.source.title, "date": self.source.date, "url": self.source.url}


PLACES = (
    (r"(Supplementary )?Table (\d+)", lambda m: (m[0], f"{'补充' * bool(m[1])}表 {m[2]}")),
    (r"Figure (\d+)", lambda m: (m[0], f"图 {m[1]}")),
    (r"Appendix ([A-Z][\d.]*)", lambda m: (m[0], f"附录 {m[1]}")),
    (r"(\d+(?:\.\d+)*)", lambda m: (f"section {m[1]}", f"{m[1]} 节")),
    (r"abstract", lambda m: (m[0], "摘要")),
    (r"list of authors", lambda m: (m[0], "作者名单")),
    (r"release ([\d.]+)", lambda m: (m[0], f"{m[1]} 版")),
    (r"(DGX-\w+|EP \d+|\d\d\d\d-\d\d-\d\d)", lambda m: (m[0], m[0])),
)
"""How a place in a source is written, and what it is called in English and Chinese."""


def citation(written: str) -> Citation:
    """ "key" or "key: place, place"; ValueError for an unknown source and for a place of another form."""
    key, _, where = written.partition(": ")
    if key not in sources():
        near = difflib.get_close_matches(key, sources(), n=1, cutoff=0.3)
        raise ValueError(f"no source {key!r} in sources.toml{'; did you mean ' + near[0] + '?' if near else ''}")
    return Citation(key, sources()[key], tuple(_place(place) for place in where.split(", ") if place))


def _place(written: str) -> tuple[str, str]:
    for form, name in PLACES:
        if match := re.fullmatch(form, written):
            return name(match)
    raise ValueError(f"{written!r} is no place in a source; write Table 4, Figure 2, Appendix B.1, 2.3.2 or abstract")


class PublishedScore(ConfigTable):
    """Two published scores on the same problems, in percent."""

    on: str
    problems: int
    one: float
    other: float


class ClaimEntry(ConfigTable):
    """One claim; the head of claims.toml explains the fields."""

    kinds: Annotated[str, Field(pattern="^[RXSAN]+$")]
    experiment: str
    text: Text
    paper: str | Text
    source: list[str] = Field(default_factory=list)
    arms: str = ""
    audit: Literal["holds", "fails", "mixed", "unclear", "unknowable"] | None = None
    figures: dict[str, float] = Field(default_factory=dict)
    scores: list[PublishedScore] = Field(default_factory=list)
    found: Text | None = None
    seen: Text | None = None
    longer: Text | None = None
    limit: Text | None = None

    def published(self, language: int) -> str:
        return self.paper if isinstance(self.paper, str) else self.paper[language]

    def citations(self) -> list[Citation]:
        """What the card cites, each with the place in it."""
        return [citation(written) for written in self.source]

    def sources(self) -> tuple[str, str]:
        """What the card cites, in words, in both languages; or that nothing was published."""
        if not self.source:
            english, chinese = read_toml("sources.toml")["none"]["figure"]
            return english, chinese
        english, chinese = ([cited.label(language) for cited in self.citations()] for language in (0, 1))
        return "; ".join(english), "；".join(chinese)

    @model_validator(mode="after")
    def _complete(self) -> ClaimEntry:
        self.citations()
        if self.audit and not self.source:
            raise ValueError("an audit needs a source")
        if self.audit and "A" not in self.kinds:
            raise ValueError("an audit needs A among the kinds")
        if self.kinds[0] in "XSAN" and self.found is None:
            raise ValueError("what was found is missing")
        return self


Role = Literal["documents", "seen", "consistency", "prediction", "beside"]
"""What a part of a rule speaks to: whether documents bear the claim out; whether a run shows it; only that this package
agrees with the figures typed into it; what the planner predicts; another question than the claim's. The last three
decide neither answer."""
ROLES: dict[str, Role] = {"X": "documents", "B": "documents", "S": "prediction", "R": "seen"}
"""Kind of a part -> its role, unless the part names another."""


class Part(ConfigTable):
    """One part of a rule; the head of rules.toml explains the fields."""

    kind: Literal["X", "S", "B", "R"]
    side: Literal["above", "below", "equal", "between", "outside"]
    metric: str = ""
    threshold: float | int | None = None
    printed: str | None = None
    margin: float | int | None = None
    paper: float | None = None
    positive: str = ""
    negative: str = ""
    low: str = ""
    high: str = ""
    role: Role | None = None
    harm: bool = False

    @property
    def speaks_to(self) -> Role:
        return self.role or ROLES[self.kind]

    @model_validator(mode="after")
    def _complete(self) -> Part:
        if self.side in ("between", "outside"):
            complete = bool(self.low and self.high)
        elif self.kind == "X" and self.side == "equal":
            complete = self.printed is not None
        else:
            complete = self.threshold is not None
        if not complete:
            raise ValueError(f"{self.kind} {self.side}: nothing to compare with")
        if self.kind in "RB" and self.margin is None:
            raise ValueError(f"{self.metric or self.kind}: the smallest effect of interest is missing")
        return self


class ClaimRule(ConfigTable):
    """What decides a claim."""

    parts: list[Part]
    needs: Literal["all", "any"] = "any"
    same: str = ""


class Rules(ConfigTable):
    """The contents of rules.toml."""

    date: str
    before: list[str]
    """Hashes of older rules whose runs still count: a run's numbers do not follow from the rules that judge it."""
    confidence: float
    seeds: int
    false_share: float
    aa_confidence: float
    aa_seeds: int
    claim: dict[str, ClaimRule]


class PrintedFigure(ConfigTable):
    """A figure of docs/results.md beside a rule; the head of r1-small.toml explains the fields."""

    like: str
    name: Text
    unit: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    values: list[float] = Field(default_factory=list)
    before: float | None = None
    after: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> PrintedFigure:
        forms = (bool(self.values), None not in (self.mean, self.low, self.high), None not in (self.before, self.after))
        if sum(forms) != 1:
            raise ValueError("needs values, or mean, low and high, or before and after")
        return self


class PrintedRuns(ConfigTable):
    """Runs of which only the printed figures are left."""

    size: Text
    where: str
    seeds: int
    figures: dict[str, list[PrintedFigure]]


class Experiment(ConfigTable):
    """What is run, or would be."""

    does: Text
    limit: Text


Table = TypeVar("Table", bound=ConfigTable)


def data(name: str) -> bytes:
    """A data file of this package."""
    return resources.files("bessemer_claims").joinpath(name).read_bytes()


def read_toml(name: str) -> dict[str, Any]:
    return tomllib.loads(data(name).decode())


def entry(kind: type[Table], values: dict[str, Any], where: str) -> Table:
    """A table of a data file; an error in it becomes a UserError of one sentence that names file and key."""
    try:
        return kind(**values)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise UserError(f"{where}{': ' + key if key else ''}: {wrong['msg']}") from None


@cache
def sources() -> dict[str, Source]:
    """Everything that can be cited, by key, the account itself included."""
    table = read_toml("sources.toml")
    return {key: entry(Source, row, f"sources.toml, {key}") for key, row in table.items() if key != "none"}


@cache
def experiments() -> dict[str, Experiment]:
    table = read_toml("experiments.toml")
    return {name: entry(Experiment, values, f"experiments.toml, {name}") for name, values in table.items()}


@cache
def claims() -> dict[str, ClaimEntry]:
    """All claims in the order of the account."""
    entries = {}
    for name, values in read_toml("claims.toml").items():
        entries[name] = entry(ClaimEntry, values, f"claims.toml, {name}")
        if entries[name].experiment not in experiments():
            raise UserError(f"claims.toml, {name}: no experiment {entries[name].experiment}")
    return entries


@cache
def metrics() -> dict[str, dict[str, list[str]]]:
    """Claim -> metric of its rule -> [English, Chinese, unit]; "beside CLAIM" -> what else its card shows -> the same;
    "control" -> control -> [English, Chinese]."""
    table = read_toml("metrics.toml")
    for name, figures in r1_small().figures.items():
        table.setdefault(f"beside {name}", {}).update(
            {figure.name[0]: [*figure.name, figure.unit] for figure in figures}
        )
    return table


@cache
def r1_small() -> PrintedRuns:
    table = read_toml("r1-small.toml")
    own = {key: table.pop(key) for key in ("size", "where", "seeds")}
    return entry(PrintedRuns, own | {"figures": table}, "r1-small.toml")


@cache
def rules() -> Rules:
    read = entry(Rules, read_toml("rules.toml"), "rules.toml")
    named = read.claim.keys() | {rule.same for rule in read.claim.values() if rule.same}
    if unknown := named - claims().keys():
        raise UserError(f"rules.toml: no claim {', '.join(sorted(unknown))}")
    return read


@cache
def verdicts_1() -> dict[str, str]:
    """Claim -> its verdict under rules 1, as recorded when rules 2 took their place."""
    return {name: verdict for verdict, names in read_toml("verdicts-1.toml").items() for name in names.split()}


def rules_hash() -> str:
    """The hash of rules.toml, which shows a reader that no rule changed after a result."""
    return hashlib.sha256(data("rules.toml")).hexdigest()


def counts(hash_: str) -> bool:
    """Whether results that carry this hash of their rules count today."""
    return hash_ == rules_hash() or hash_ in rules().before


def chosen(names: Sequence[str]) -> list[str]:
    """The ids of `--only`, in the account's order; UserError for an unknown one, with the nearest."""
    entries = claims()
    requested = [name.strip().upper() for name in names if name.strip()]
    for name in requested:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise UserError(f'no claim "{name}"; {hint}bessemer claims --list shows all {len(entries)}')
    if not requested:
        raise UserError("--only needs at least one id, such as L6 or M7; bessemer claims --list shows them")
    return [name for name in entries if name in requested]


def listing() -> str:
    """Every claim with its kinds and its experiment, for `--list`, and what the letters mean; nothing is computed."""
    lines = [f"{name:<4} {claim.kinds:<3} {claim.experiment:<4} {claim.text[0]}" for name, claim in claims().items()]
    return "\n".join([*lines, "", LEGEND])


LEGEND = """\
id, kinds of evidence (R a run here, X exact computation, S the planner, A published figures or a source, N nobody
outside can test it), experiment, claim. `bessemer claims --part none --only ID` shows evidence and verdict,
`bessemer claims --full --only ID --dry-run` the runs behind it."""
