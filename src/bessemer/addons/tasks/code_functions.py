"""The functions of the task `code`: families of small functions, their hidden tests, and the authors of its pages.

A family (code_functions.toml) takes one argument (n an integer, a a list of integers, s a string of lower-case letters
and spaces) and up to two parameters that the question states. Families in HELD_OUT occur only in the test split; in the
others a hash of family and parameters decides the split. So the test split asks for functions of kinds never trained
on, and of known kinds with parameters never trained on.

On a page, a thinker states in words what is asked, writes an expression, tries it on one value and compares with the
expected result: `n+3:f(4)=7:7 yes`. Verdicts are true except where a sloppy author calls a miss a hit, so checking
helps a model that has learnt to calculate, as in countdown. Every function on a page, right or wrong, is of the train
split.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from bessemer.tasks.base import SPLITS, check_shares, read_toml, split_of_text, stable_hash

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PER_FAMILY = 40  # problems at most, so that two parameters do not outweigh one
TESTS = 12
CHECKS = 4  # expressions a thinker tries at most
WORDS = {"en": {"yes": " yes", "no": " no"}, "zh": {"yes": "对", "no": "错"}}
_ALLOWS: dict[str | None, Callable[..., bool]] = {
    None: lambda *parameters: True,
    "ascending": lambda first, second: first < second,
    "different": lambda first, second: first != second,
}


@dataclass(frozen=True)
class FunctionFamily:
    """`code` is an expression in `argument`, with the parameters put in by `str.format`."""

    name: str
    argument: str
    ranges: tuple[Sequence[Any], ...]
    difficulty: int
    code: str
    en: str
    zh: str
    allows: Callable[..., bool]
    """Which combinations of parameters make sense."""
    empty: bool = True
    """Whether the function is defined for an empty list or string."""


def _families(data: dict[str, Any]) -> dict[str, FunctionFamily]:
    ranges = {name: range(*ends) for name, ends in data["ranges"].items()} | {"letter": tuple(LETTERS)}

    def values(field: str | list[Any]) -> Sequence[Any]:
        if isinstance(field, str):
            return ranges[field]
        return range(*field) if isinstance(field[0], int) else tuple(field)

    families = {}
    for name, entry in data["function"].items():
        allows = _ALLOWS[entry.pop("allows", None)]
        families[name] = FunctionFamily(name, ranges=tuple(map(values, entry.pop("ranges"))), allows=allows, **entry)
    return families


_DATA = read_toml(__package__, "code_functions.toml")
HELD_OUT = tuple(_DATA["held_out"])
FAMILIES = _families(_DATA)


@dataclass(frozen=True)
class TargetFunction:
    """A family with its parameters: the function a problem asks for."""

    family: FunctionFamily
    parameters: tuple[Any, ...]

    @property
    def key(self) -> str:
        return f"{self.family.name}:{','.join(map(str, self.parameters))}"

    @property
    def split(self) -> str:
        return "test" if self.family.name in HELD_OUT else split_of_text(self.key)

    @property
    def code(self) -> str:
        return self.family.code.format(*self.parameters)

    def words(self, language: str) -> str:
        return (self.family.en if language == "en" else self.family.zh).format(*self.parameters)

    def __call__(self, value: Any) -> Any:
        return GIVES[self.family.name](value, *self.parameters)

    def inputs(self, rng: random.Random, count: int) -> list[Any]:
        """Arguments near the edges of the function: around its numbers, with its letters, short ones, long ones."""
        sample = {"n": _integer, "a": _list, "s": _string}[self.family.argument]
        values: list[Any] = []
        while len(values) < count:
            value = sample(self.parameters, rng)
            if value not in ([], "") or self.family.empty:
                values.append(value)
        return values

    def tests(self, rng: random.Random) -> list[tuple[list[Any], Any]]:
        """TESTS pairs (arguments, answer): first those that refute rivals, then as many distinct answers as possible.

        Greedy: each test takes the argument that refutes the most rivals not yet refuted.
        """
        pool = {repr(value): value for value in self.inputs(rng, 8 * TESTS)}
        rivals = self.rivals()
        refuted = {key: {n for n, rival in enumerate(rivals) if self.differs(rival, pool[key])} for key in pool}
        chosen: list[str] = []
        while len(chosen) < TESTS and (best := max(refuted, key=lambda key: len(refuted[key]))) and refuted[best]:
            chosen.append(best)
            beaten = refuted[best]
            refuted = {key: unbeaten - beaten for key, unbeaten in refuted.items()}
        groups: dict[str, list[str]] = {}
        for key in pool:
            if key not in chosen:
                groups.setdefault(repr(self(pool[key])), []).append(key)
        chosen += [group[n] for n in range(TESTS) for group in groups.values() if n < len(group)]
        return [([pool[key]], self(pool[key])) for key in chosen[:TESTS]]

    def rivals(self) -> list["TargetFunction"]:
        """Likely mistakes: the family with other parameters, other families with the same parameters or neighbours."""
        near: list[Any] = []
        for parameter in self.parameters:
            near += [parameter - 1, parameter, parameter + 1] if isinstance(parameter, int) else [parameter]
        rivals = [rival for split in SPLITS for rival in functions_of(split) if rival.family is self.family]
        for family in FAMILIES.values():
            if family.argument == self.family.argument:
                choices = product(*([value for value in near if value in values] for values in family.ranges))
                rivals += [TargetFunction(family, chosen) for chosen in choices if family.allows(*chosen)]
        return [rival for rival in rivals if rival != self]

    def differs(self, other: "TargetFunction", value: Any) -> bool:
        """Whether their results for a value differ; 1 and True differ."""
        if value in ([], "") and not other.family.empty:
            return True
        result, other_result = self(value), other(value)
        return type(result) is not type(other_result) or result != other_result


@cache
def functions_of(split: str) -> tuple[TargetFunction, ...]:
    """Every function of a split, at most PER_FAMILY of a family."""
    functions: list[TargetFunction] = []
    for family in FAMILIES.values():
        every = [TargetFunction(family, chosen) for chosen in product(*family.ranges) if family.allows(*chosen)]
        every.sort(key=lambda function: stable_hash("code", function.key))
        functions.extend(function for function in every[:PER_FAMILY] if function.split == split)
    return tuple(functions)


def _integer(parameters: Sequence[Any], rng: random.Random) -> int:
    if rng.random() < 0.6 and parameters:
        near = rng.choice(parameters)
        return near * rng.choice((1, 1, 1, 2, 3, 7)) + rng.choice((-1, 0, 0, 1))
    return rng.choice((rng.randint(-9, 30), rng.randint(0, 99), rng.randint(100, 999)))


def _list(parameters: Sequence[Any], rng: random.Random) -> list[int]:
    values = [_integer(parameters, rng) for _ in range(rng.choice((0, 1, 2, 3, 4, 6, 9)))]
    return values + rng.choices(values, k=rng.randint(0, 2)) if values else values


def _string(parameters: Sequence[Any], rng: random.Random) -> str:
    letters = "".join(parameter for parameter in parameters if isinstance(parameter, str)) or rng.choice(LETTERS)
    alphabet = letters * 3 + "".join(rng.choices(LETTERS, k=4)) + " " * rng.choice((0, 0, 2))
    text = "".join(rng.choices(alphabet, k=rng.choice((0, 1, 2, 3, 5, 8, 14))))
    mirrored = text + text[::-1] if rng.random() < 0.3 else text
    return rng.choice((mirrored, letters[0] + mirrored))


@dataclass(frozen=True)
class CodeMix:
    """Settings of the code documents, shares between 0 and 1."""

    direct: float = 0.2
    """Pages that answer without thinking."""
    direct_right: float = 0.5
    """The share of those that are right."""
    sloppy: float = 0.5
    """Thinking pages by authors who err, give up and call misses hits; the others continue until they are right."""
    wrong_sloppy: float = 0.6
    """Chance that a sloppy author's next expression is wrong."""
    wrong_careful: float = 0.3
    """The same for a careful one."""
    give_up: float = 0.5
    """Chance that a sloppy author answers with an expression just refuted."""
    false_yes: float = 0.05
    """Chance that a sloppy author says yes to it."""
    truncated: float = 0.03
    """Thinking pages that break off before the answer."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


def definition(argument: str, code: str) -> str:
    return f"def f({argument}):\n    return {code}"


def respond(goal: TargetFunction, language: str, mix: CodeMix, rng: random.Random) -> tuple[str, str]:
    """(author, what is written after `Assistant:`)."""
    argument = goal.family.argument
    if rng.random() < mix.direct:
        answer = goal if rng.random() < mix.direct_right else _other(goal, rng)
        return "direct", f"<answer>{definition(argument, answer.code)}</answer>"
    author = "sloppy" if rng.random() < mix.sloppy else "careful"
    wrong = mix.wrong_sloppy if author == "sloppy" else mix.wrong_careful
    lines, words = [goal.words(language)], WORDS[language]
    for count in range(1, CHECKS + 1):
        last = count == CHECKS and author == "careful"
        attempt = _other(goal, rng) if rng.random() < wrong and not last else goal
        value = _distinguishing_value(goal, attempt, rng)
        right = attempt(value) == goal(value)
        yes = right or (author == "sloppy" and rng.random() < mix.false_yes)
        tried = f"{attempt.code}:f({value!r})={attempt(value)!r}:{goal(value)!r}"
        lines.append(f"`{tried}`{words['yes' if yes else 'no']}")
        if yes or (author == "sloppy" and rng.random() < mix.give_up):
            break
    if rng.random() < mix.truncated:
        return author, "<think>" + "\n".join(lines)
    return author, "<think>" + "\n".join(lines) + f"</think><answer>{definition(argument, attempt.code)}</answer>"


def _other(goal: TargetFunction, rng: random.Random) -> TargetFunction:
    """A likely mistake: the same function with other numbers, or another function with the same numbers."""
    same_family = _train_functions(goal.family.name) if rng.random() < 0.5 else ()
    pool: Sequence[TargetFunction] = [function for function in same_family if function != goal] or [
        function
        for function in (TargetFunction(family, goal.parameters) for family in _like(goal.family))
        if function.split == "train" and function.family.allows(*function.parameters)
    ]
    return rng.choice(
        pool or [function for function in functions_of("train") if function.family.argument == goal.family.argument]
    )


@cache
def _train_functions(name: str) -> tuple[TargetFunction, ...]:
    return tuple(function for function in functions_of("train") if function.family.name == name)


def _like(family: FunctionFamily) -> list[FunctionFamily]:
    """Other families over the same argument whose parameters come from the same ranges."""
    return [
        other
        for other in FAMILIES.values()
        if other is not family and other.argument == family.argument and other.ranges == family.ranges
    ]


def _distinguishing_value(goal: TargetFunction, attempt: TargetFunction, rng: random.Random) -> Any:
    """A short value on which a wrong attempt differs from the goal, if a few samples contain one."""
    values = sorted(
        (value for value in goal.inputs(rng, 12) if value not in ([], "")), key=lambda value: len(repr(value))
    )
    usable = [value for value in values if len(repr(value)) <= 16] or values[:1]
    distinguishing = [value for value in usable if attempt(value) != goal(value)]
    return rng.choice(distinguishing or usable)


GIVES: dict[str, Callable[..., Any]] = {
    "add": lambda n, k: n + k,
    "subtract": lambda n, k: k - n,
    "multiply": lambda n, k: n * k,
    "affine": lambda n, k, m: n * k + m,
    "power": lambda n, k, m: n**k + m,
    "remainder": lambda n, k: n % k,
    "quotient": lambda n, k: n // k,
    "divisible": lambda n, k: n % k == 0,
    "clamp": lambda n, k, m: max(k, min(m, n)),
    "distance": lambda n, k: abs(n - k),
    "between": lambda n, k, m: k <= n <= m,
    "larger": lambda n, k: max(n, k),
    "smaller": lambda n, k: min(n, k),
    "digit": lambda n, k: str(n).count(str(k)),
    "multiples": lambda n, k: sum(range(0, n + 1, k)),
    "total": lambda a, k: sum(a) + k,
    "largest": lambda a, k: max(a) + k,
    "smallest": lambda a, k: min(a) - k,
    "spread": lambda a, k: (max(a) - min(a)) * k,
    "sum-divisible": lambda a, k: sum(x for x in a if x % k == 0),
    "count-greater": lambda a, k: sum(x > k for x in a),
    "count-between": lambda a, k, m: sum(k <= x <= m for x in a),
    "square-sum": lambda a, k: sum(x * x for x in a if x > k),
    "below": lambda a, k: [x for x in a if x < k],
    "without": lambda a, k: [x for x in a if x != k],
    "scale": lambda a, k: [x * k for x in a],
    "shift": lambda a, k: [x + k for x in a],
    "first": lambda a, k: a[:k],
    "last": lambda a, k: a[-k:],
    "drop": lambda a, k: a[k:],
    "step": lambda a, k: a[::k],
    "rotate": lambda a, k: a[k:] + a[:k],
    "contains": lambda a, k: k in a,
    "tally": lambda a, k: a.count(k),
    "top": lambda a, k: sorted(a)[-k:],
    "bottom": lambda a, k: sorted(a)[:k],
    "ordered": lambda a, k: sorted([*a, k]),
    "letter": lambda s, c: s.count(c),
    "vowels": lambda s, c: sum(x in c for x in s),
    "replace": lambda s, c, d: s.replace(c, d),
    "erase": lambda s, c: s.replace(c, ""),
    "repeat": lambda s, k: s * k,
    "prefix": lambda s, k: s[:k],
    "suffix": lambda s, k: s[-k:],
    "starts": lambda s, c: s.startswith(c),
    "ends": lambda s, c: s.endswith(c),
    "position": lambda s, c: s.find(c),
    "append": lambda s, c: s + c,
    "reverse-append": lambda s, c: s[::-1] + c,
    "palindrome": lambda s, c: s + c == c + s[::-1],
    "join": lambda s, c: c.join(s.split()),
    "long-words": lambda s, k: sum(len(x) > k for x in s.split()),
}
"""What each family returns, written independently of the expressions in its data file. These judge answers; a test
compares them with the expressions that prompts and documents show."""
