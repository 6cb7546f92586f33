"""The Task contract, and the stable randomness of every task.

Invariants: whatever a task returns is a pure function of (task, settings, split, index, seed, language), the same in
every process and on every machine; and the train and test sets are disjoint because a problem's split is a hash of
its numbers (`split_of`), one rule shared by all tasks, so one task's training pages cannot leak another's test set.
"""

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib import resources
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from bessemer.errors import UserError
from bessemer.repeatable import stable_hash
from bessemer.tasks.answer import (
    AROUND,
    NO_ANSWER,
    SEVERAL,
    TEXT_AROUND,
    VALUE,
    Reader,
    Reply,
    parse_reply,
    summary,
)
from bessemer.tasks.language import consistency

SPLITS = ("train", "test")
TEST_SHARE = 0.10
CORRECT, WRONG_VALUE, WRONG_NUMBERS, UNPARSABLE = "correct", "wrong-value", "wrong-numbers", "unparsable"
_INTEGER = re.compile("-?[0-9]{1,300}")


@dataclass(frozen=True)
class Problem:
    """One question. `prompt` is the question without a chat template; `meta` holds what the verifier needs.

    `meta["difficulty"]` is a small integer, larger for harder; docs/tasks.md says what it counts in each task.
    """

    id: str
    prompt: str
    language: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A judgement. Accuracy and format are two terms (R1 2.2.2): `correct` says whether the answer that can be read is
    right, `formatted` whether the form is kept. `reason` names the first fault, in reading (`answer.py`) or else in the
    answer. `answer` is canonical, for voting, and None when none could be read."""

    correct: bool
    formatted: bool
    reason: str
    answer: str | None
    summary: bool = False
    """Whether the form is R1's, a summary that states the answer, in a task that takes R1-Zero's two blocks too."""
    partial: float | None = None
    """Credit from 0 to 1, from a task that grades more finely than right or wrong; None from any other."""

    def __post_init__(self) -> None:
        if self.partial is not None and not 0.0 <= self.partial <= 1.0:
            raise UserError(f"a verdict gives the credit {self.partial}; give a number from 0 to 1, or None")

    @property
    def score(self) -> float:
        """The credit of the answer, 0 to 1: what RL rewards as accuracy. `correct` is what evaluations count."""
        return float(self.correct) if self.partial is None else self.partial

    @property
    def sound(self) -> bool:
        """Whether the answer is correct and nothing is wrong with the tags either."""
        return self.correct and self.reason == CORRECT


class Judged(NamedTuple):
    verdict: Verdict
    language: float
    """`consistency` of the answer with the language of its problem."""


Grade = tuple[str, str | None] | tuple[str, str | None, float | None]
"""(reason, canonical answer), and the partial credit if there is any."""
MOST_AROUND = 100_000
"""Maximum characters around a correct answer: outside the thoughts, and outside the answer itself. A model that does
not mark its thoughts may reason for 32K tokens of three characters before it answers. The form allows
`answer.AROUND`."""


@dataclass(frozen=True)
class NoMix:
    """The mix of a task without pre-training documents."""


@dataclass(frozen=True)
class TaskOptions:
    """Settings of a task's problems and verdicts. An RL stage sets them with `task_options`."""

    plain_answers: float = 0.0
    """Credit, 0 to 1, of a right answer that is stated without tags or a box: as all of the text after the thoughts, as
    its last line, or as its last word. It lets a model that does not know the form begin (R1: none). Such an answer is
    not correct."""

    def __post_init__(self) -> None:
        check_shares(self, ["plain_answers"])


class Task:
    """Base class. A subclass writes `make`, `grade` if answers are not integers, and `written` if there are documents.
    The class attributes say what else differs."""

    name: str
    """Set on the class, or on the object if the name carries an argument. A recipe's FILE.py:CLASS replaces it."""
    domain: str = "own"
    """The word by which evaluations group their results, such as "search". Set on the class or the object."""
    all_languages: tuple[str, ...] = ("en", "zh")
    """Set on the class, or on the object if a file decides."""
    reader: ClassVar[Reader] = VALUE
    """Reads the answer from a reply; by default from tags, boxes and sentences such as "the answer is 42"."""
    phrasings: ClassVar[tuple[str, ...]] = ("seen", "held-out")
    episodic: ClassVar[bool] = False
    """Whether a problem is an episode of several turns."""
    translated: bool = False
    """Whether problem n is the same in every language."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """What `get` was given besides the name: `get(name, **settings)` makes the same task in another process."""
    judged_by: frozenset[str] = frozenset()
    """Aims of the reward models that are needed to judge its answers; empty if `verify` judges them."""
    Mix: ClassVar[type] = NoMix
    """Dataclass with the settings of the task's pre-training documents."""
    Options: ClassVar[type] = TaskOptions
    """Dataclass with the settings of its problems and verdicts."""

    def __init__(self, languages: Sequence[str] | None = None, phrasing: str = "seen", **settings: Any):
        """`languages` narrows the task; `phrasing="held-out"` asks in wordings no document uses; the rest sets
        `Options` and `Mix`."""
        self.languages = tuple(languages or self.all_languages)
        for language in self.languages:
            known(language, self.all_languages, f"task {self.name!r} has no language")
        self.phrasing = known(phrasing, self.phrasings, f"task {self.name!r} has no phrasing")
        options, mix = ([f.name for f in fields(kind)] for kind in (self.Options, self.Mix))
        for key in settings:
            known(key, [*dict.fromkeys([*options, *self.option_names(), *mix])], f"task {self.name!r} has no setting")
        self.options = self.Options(**{key: value for key, value in settings.items() if key in options})
        self.mix = self.Mix(**{key: value for key, value in settings.items() if key in mix})

    def option_names(self) -> list[str]:
        """The settings of the problems and verdicts, by name."""
        idle = set() if type(self).verify is Task.verify else {"plain_answers"}  # they work in `verify`
        return [f.name for f in fields(self.Options) if f.name not in idle]

    def problem(self, split: str, index: int, seed: int = 0, language: str | None = None) -> Problem:
        """Problem number `index` of a split. `language=None` samples one of `self.languages`."""
        known(split, SPLITS, "there is no split")
        if index < 0:
            raise UserError(f"there is no problem {index}; count from 0")
        language = self._language(language, split, index, seed)
        return self.make(split, index, seed, language, self.phrasing)

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        """`problem`, with language and phrasing chosen."""
        raise NotImplementedError

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judge the text that follows `Assistant:`, including a `<think>` that the template already wrote. An answer
        with more than MOST_AROUND characters around it is not correct, however it is stated."""
        reply = parse_reply(completion, self.reader)
        if reply.answers and _around(completion, reply, self.reader) > MOST_AROUND:
            return Verdict(False, False, TEXT_AROUND, None)
        if reply.fault == NO_ANSWER and self.options.plain_answers:
            credit = self.options.plain_answers * self._right_in_plain_text(problem, completion)
            return Verdict(False, False, NO_ANSWER, None, partial=credit)
        reason, answer, *partial = self._judge(problem, reply)
        formatted = reply.formatted and reason != SEVERAL
        return Verdict(reason == CORRECT, formatted, reply.fault or reason, answer, reply.form == "summary", *partial)

    def _judge(self, problem: Problem, reply: Reply) -> "Grade":
        """The grade of the answer; for several texts, only if their values agree."""
        if not reply.answers:
            return UNPARSABLE, None
        judged = [self.grade(problem, text) for text in reply.answers]
        if len(judged) > 1 and (judged[0][1] is None or len({answer for _, answer, *_ in judged}) > 1):
            return self.grade_together(problem, reply.answers)
        return judged[-1]

    def _right_in_plain_text(self, problem: Problem, completion: str) -> bool:
        text = summary(completion)
        if not text or len(text) > AROUND:
            return False
        line = text.splitlines()[-1]
        stated = dict.fromkeys((text, line.strip(), line.split()[-1].strip(".,:;!?*$。，！？")))
        return any(self.grade(problem, answer)[0] == CORRECT for answer in stated)

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        """The tools that its prompts describe, in the form that OpenAI's API and chat templates take."""
        return []

    @property
    def apart(self) -> bool:
        """Whether processes of their own judge the answers, because a verdict takes long."""
        return False

    def begin(self, problem: Problem, completion: str) -> None:
        """An answer is complete: if processes of their own judge it, they may start. Does not wait."""

    def begun(self, problem: Problem, completion: str) -> bool:
        """Whether such a process judges the answer, or has judged it."""
        return False

    def judged(self, problem: Problem, completion: str) -> Judged:
        """The verdict on an answer, and its language. UserError if a user can mend why there is none."""
        return Judged(self.verify(problem, completion), consistency(completion, problem.language))

    @classmethod
    def repeated(cls) -> dict[str, Any]:
        """Methods in whose place a user's own class gets others that draw the same random numbers for the same
        arguments, besides those that every task has (user_code.py)."""
        return {}

    @classmethod
    def source(cls, argument: str) -> tuple[str, str | None] | None:
        """The file or directory that `NAME:argument` takes its problems from, and the split that they all belong to,
        if one does. None without a file."""
        return None

    def size(self, split: str) -> int | None:
        """Number of distinct problems in a split; None if unlimited."""
        return None

    def grade(self, problem: Problem, answer: str) -> "Grade":
        """The reason code of the text inside the answer tags ("correct" earns the reward), its canonical form and, if
        the task grades more finely than right or wrong, the credit that the text earns, 0 to 1. By default the answer
        is the integer `meta["value"]`."""
        value = problem.meta.get("value")
        if not isinstance(value, int):
            raise UserError(
                f'{self.name}: problem {problem.id} has meta["value"] = {value!r}, and without a method `grade` the '
                "answer is that integer; set it, or define grade"
            )
        return grade_integer(answer, value)

    def grade_together(self, problem: Problem, answers: Sequence[str]) -> tuple[str, str | None]:
        """`grade` for texts that state different values. They contradict each other, unless a task knows better."""
        return SEVERAL, None

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """Pre-training document number `index`, about problems of the train split only, in the seen phrasings."""
        return self.written(index, seed, language).text

    def written(self, index: int, seed: int = 0, language: str | None = None) -> "Written":
        """The problem page of a document index, with its author."""
        raise UserError(
            f"task {self.name!r} has no pre-training documents; use it for RL and evaluation, and take the text of "
            "the corpus from a task that has them, such as countdown, logic or words"
        )

    def train_problem(self, index: int, seed: int, language: str | None) -> Problem:
        """The problem of a document. The order differs from RL's, so that document i is not about problem i."""
        language = self._language(language, "document", index, seed)
        return self.make("train", index, stable_hash("documents", seed), language, "seen")

    def rng(self, *parts: object) -> random.Random:
        return stable_random(self.name, *parts)

    def _language(self, language: str | None, *parts: object) -> str:
        if language is None:
            return self.languages[stable_hash(self.name, "language", *parts) % len(self.languages)]
        return known(language, self.languages, f"task {self.name!r} has no language")


@dataclass(frozen=True)
class Written:
    """A document before it becomes text: `response` is what `author` wrote after `Assistant:`."""

    problem: Problem
    author: str
    response: str

    @property
    def text(self) -> str:
        return page(self.problem.prompt, self.response)

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The page as a conversation."""
        return {"role": "user", "content": self.problem.prompt}, {"role": "assistant", "content": self.response}

    @property
    def several_turns(self) -> bool:
        return len(self.messages) > 2


def _around(completion: str, reply: Reply, reader: Reader) -> int:
    """Characters of a completion outside its thoughts and the answers that it states."""
    before, opened, rest = completion.partition("<think>")
    _, closed, after = (rest if opened else before).partition("</think>")
    outside = len(before) * bool(opened) + len(after) if closed else len(completion)
    return outside - sum(len(reader.bare(answer).strip()) for answer in reply.answers)


def page(prompt: str, response: str) -> str:
    """R1-Zero's plain-text form, which pre-training documents and the `zero` chat template share."""
    return f"User: {prompt}\nAssistant:{response}"


def stable_random(*parts: object) -> random.Random:
    return random.Random(stable_hash(*parts))


def split_of(numbers: Sequence[int]) -> str:
    """The split of a multiset of operands, the same for all tasks and orders."""
    return "test" if stable_hash("split", *sorted(numbers)) < TEST_SHARE * 2**64 else "train"


def split_of_text(text: str, test_share: float = TEST_SHARE) -> str:
    """The split of a text, such as a formula or a question."""
    return "test" if stable_hash("split", text) < test_share * 2**64 else "train"


def read_toml(package: str, name: str) -> dict[str, Any]:
    """Reads a data file of a package."""
    return tomllib.loads(resources.files(package).joinpath(name).read_text("utf-8"))


def read_templates(package: str, name: str, task: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The wordings of a task's questions in such a file, by (language, phrasing)."""
    texts = read_toml(package, name)[task]
    return {
        (language, phrasing): tuple(texts[language][phrasing]) for language in texts for phrasing in texts[language]
    }


def grade_integer(answer: str, value: int) -> tuple[str, str | None]:
    """For `grade`: the answer must be one integer in ASCII digits; an unevaluated chain is not an answer."""
    if not _INTEGER.fullmatch(answer.strip(" \r\n\t")):
        return UNPARSABLE, None
    return CORRECT if int(answer) == value else WRONG_VALUE, str(int(answer))


def check_shares(mix: object, rates: Sequence[str], sums_to_one: Sequence[str] = ()) -> None:
    """Raise UserError for a rate outside 0..1, or shares that do not add up to 1."""
    kind = type(mix).__name__
    for name in rates:
        if not 0.0 <= getattr(mix, name) <= 1.0:
            raise UserError(f"{kind}.{name} is {getattr(mix, name)}; set it between 0 and 1")
    total = sum(getattr(mix, name) for name in sums_to_one)
    if sums_to_one and abs(total - 1.0) > 1e-6:
        raise UserError(f"{kind}: {' + '.join(sums_to_one)} is {total:.4g}; make these shares add up to 1")


def known(value: str, allowed: Sequence[str], complaint: str) -> str:
    """The value, or a UserError that names the nearest of those allowed."""
    if value in allowed:
        return value
    if not allowed:
        raise UserError(f"{complaint} {value!r}; it takes none")
    nearest = get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
    raise UserError(f"{complaint} {value!r}; did you mean {nearest!r}? Known: {', '.join(allowed)}")
