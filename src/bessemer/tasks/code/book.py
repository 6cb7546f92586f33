"""Fifty small functions to write: how each is asked for, what it gives, and one way to write it.

A family takes one argument (n an integer, a a list of integers, s a string of small letters and spaces) and up to two
parameters that stand in the question. Families whose name is in HELD_OUT occur in the test split alone; of the others
every problem belongs to a split by the hash of family and parameters. So the test split asks for functions whose kind
was never trained, and for known kinds with numbers that were never trained.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from bessemer.tasks.base import SPLITS, split_of_text, stable_hash

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PER_FAMILY = 40  # problems at most, so that two parameters do not outweigh one
TESTS = 12
HELD_OUT = (
    "distance", "smaller", "between", "shift", "drop", "tally", "suffix", "erase", "square-sum", "join",
    "reverse-append",
)  # fmt: skip

_SMALL, _WIDE, _SHORT, _LETTER = range(2, 13), range(1, 41), range(1, 6), tuple(LETTERS)


@dataclass(frozen=True)
class Family:
    """`code` is an expression in `argument`, written with the parameters put in; `give` the same as a function."""

    name: str
    argument: str
    ranges: tuple[Sequence[Any], ...]
    difficulty: int
    code: str
    give: Callable[..., Any]
    en: str
    zh: str
    allows: Callable[..., bool] = lambda *parameters: True
    """Which combinations of parameters make sense."""
    empty: bool = True
    """Whether the function is defined for an empty list or string."""


def _sorted_pair(k: Any, m: Any) -> bool:
    return k < m


def _different(c: str, d: str) -> bool:
    return c != d


FAMILIES = {
    family.name: family
    for family in (
        Family("add", "n", (_WIDE,), 1, "n+{0}", lambda n, k: n + k, "n plus {0}", "n加{0}"),
        Family("subtract", "n", (_WIDE,), 1, "{0}-n", lambda n, k: k - n, "{0} minus n", "{0}减n"),
        Family("multiply", "n", (_SMALL,), 1, "n*{0}", lambda n, k: n * k, "{0} times n", "n的{0}倍"),
        Family("affine", "n", (_SMALL, _WIDE), 2, "n*{0}+{1}", lambda n, k, m: n * k + m,
               "{0} times n, plus {1}", "n的{0}倍再加{1}"),
        Family("power", "n", (range(2, 5), _WIDE), 2, "n**{0}+{1}", lambda n, k, m: n**k + m,
               "n to the power {0}, plus {1}", "n的{0}次方再加{1}"),
        Family("remainder", "n", (_SMALL,), 1, "n%{0}", lambda n, k: n % k, "n modulo {0}", "n除以{0}的余数"),
        Family("quotient", "n", (_SMALL,), 1, "n//{0}", lambda n, k: n // k,
               "n divided by {0}, rounded down", "n除以{0}向下取整"),
        Family("divisible", "n", (_SMALL,), 1, "n%{0}==0", lambda n, k: n % k == 0,
               "whether n is divisible by {0}", "n能否被{0}整除"),
        Family("clamp", "n", (_WIDE, _WIDE), 2, "max({0},min({1},n))", lambda n, k, m: max(k, min(m, n)),
               "n limited to the range from {0} to {1}", "把n限制在{0}到{1}之间", _sorted_pair),
        Family("distance", "n", (_WIDE,), 1, "abs(n-{0})", lambda n, k: abs(n - k),
               "the distance from n to {0}", "n与{0}的距离"),
        Family("between", "n", (_WIDE, _WIDE), 1, "{0}<=n<={1}", lambda n, k, m: k <= n <= m,
               "whether n lies from {0} to {1}", "n是否在{0}到{1}之间", _sorted_pair),
        Family("larger", "n", (_WIDE,), 1, "max(n,{0})", lambda n, k: max(n, k),
               "the larger of n and {0}", "n与{0}中较大的"),
        Family("smaller", "n", (_WIDE,), 1, "min(n,{0})", lambda n, k: min(n, k),
               "the smaller of n and {0}", "n与{0}中较小的"),
        Family("digit", "n", (range(10),), 2, "str(n).count('{0}')", lambda n, k: str(n).count(str(k)),
               "how often the digit {0} occurs in n", "n中数字{0}出现的次数"),
        Family("multiples", "n", (_SMALL,), 2, "sum(range(0,n+1,{0}))", lambda n, k: sum(range(0, n + 1, k)),
               "the sum of the multiples of {0} from 0 to n", "从0到n中{0}的倍数之和"),
        Family("total", "a", (_WIDE,), 1, "sum(a)+{0}", lambda a, k: sum(a) + k,
               "the sum of a, plus {0}", "a的总和再加{0}"),
        Family("largest", "a", (_WIDE,), 1, "max(a)+{0}", lambda a, k: max(a) + k,
               "the largest of a, plus {0}", "a中的最大值再加{0}", empty=False),
        Family("smallest", "a", (_WIDE,), 1, "min(a)-{0}", lambda a, k: min(a) - k,
               "the smallest of a, minus {0}", "a中的最小值再减{0}", empty=False),
        Family("spread", "a", (_SMALL,), 2, "(max(a)-min(a))*{0}", lambda a, k: (max(a) - min(a)) * k,
               "{0} times the difference of the largest and the smallest of a",
               "a中最大值与最小值之差的{0}倍", empty=False),
        Family("sum-divisible", "a", (_SMALL,), 2, "sum(x for x in a if x%{0}==0)",
               lambda a, k: sum(x for x in a if x % k == 0),
               "the sum of the numbers in a divisible by {0}", "a中能被{0}整除的数之和"),
        Family("count-greater", "a", (_WIDE,), 2, "sum(x>{0} for x in a)", lambda a, k: sum(x > k for x in a),
               "how many numbers in a are greater than {0}", "a中大于{0}的数有几个"),
        Family("count-between", "a", (_WIDE, _WIDE), 2, "sum({0}<=x<={1} for x in a)",
               lambda a, k, m: sum(k <= x <= m for x in a),
               "how many numbers in a lie from {0} to {1}", "a中有几个数在{0}到{1}之间", _sorted_pair),
        Family("square-sum", "a", (_WIDE,), 3, "sum(x*x for x in a if x>{0})",
               lambda a, k: sum(x * x for x in a if x > k),
               "the sum of the squares of the numbers in a greater than {0}", "a中大于{0}的数的平方和"),
        Family("below", "a", (_WIDE,), 2, "[x for x in a if x<{0}]", lambda a, k: [x for x in a if x < k],
               "the numbers in a smaller than {0}", "a中小于{0}的数"),
        Family("without", "a", (_WIDE,), 2, "[x for x in a if x!={0}]", lambda a, k: [x for x in a if x != k],
               "a without every {0}", "去掉所有{0}的a"),
        Family("scale", "a", (_SMALL,), 2, "[x*{0} for x in a]", lambda a, k: [x * k for x in a],
               "every number in a times {0}", "a中每个数乘以{0}"),
        Family("shift", "a", (_WIDE,), 2, "[x+{0} for x in a]", lambda a, k: [x + k for x in a],
               "every number in a plus {0}", "a中每个数加{0}"),
        Family("first", "a", (_SHORT,), 1, "a[:{0}]",
               lambda a, k: a[:k], "the first {0} elements of a", "a的前{0}个元素"),
        Family("last", "a", (_SHORT,), 1, "a[-{0}:]",
               lambda a, k: a[-k:], "the last {0} elements of a", "a的后{0}个元素"),
        Family("drop", "a", (_SHORT,), 1, "a[{0}:]", lambda a, k: a[k:],
               "a without its first {0} elements", "去掉前{0}个元素的a"),
        Family("step", "a", (range(2, 6),), 1, "a[::{0}]", lambda a, k: a[::k],
               "every element of a at an index divisible by {0}", "a中下标能被{0}整除的元素"),
        Family("rotate", "a", (_SHORT,), 2, "a[{0}:]+a[:{0}]", lambda a, k: a[k:] + a[:k],
               "a with its first {0} elements moved to the end", "把a的前{0}个元素移到末尾"),
        Family("contains", "a", (_WIDE,), 1, "{0} in a", lambda a, k: k in a, "whether {0} is in a", "{0}是否在a中"),
        Family("tally", "a", (_WIDE,), 1, "a.count({0})", lambda a, k: a.count(k),
               "how often {0} occurs in a", "{0}在a中出现的次数"),
        Family("top", "a", (_SHORT,), 2, "sorted(a)[-{0}:]", lambda a, k: sorted(a)[-k:],
               "the {0} largest numbers of a in ascending order", "a中最大的{0}个数，从小到大"),
        Family("bottom", "a", (_SHORT,), 2, "sorted(a)[:{0}]", lambda a, k: sorted(a)[:k],
               "the {0} smallest numbers of a in ascending order", "a中最小的{0}个数，从小到大"),
        Family("ordered", "a", (_WIDE,), 2, "sorted(a+[{0}])", lambda a, k: sorted([*a, k]),
               "the numbers of a and {0} in ascending order", "a的数与{0}一起从小到大排列"),
        Family("letter", "s", (_LETTER,), 1, "s.count('{0}')", lambda s, c: s.count(c),
               "how often {0} occurs in s", "{0}在s中出现的次数"),
        Family("vowels", "s", (("aeiou", "aei", "eio", "aou", "abc", "xyz", "eiou", "rst"),), 2,
               "sum(x in '{0}' for x in s)", lambda s, c: sum(x in c for x in s),
               "how many letters of s are among {0}", "s中属于{0}的字母有几个"),
        Family("replace", "s", (_LETTER, _LETTER), 1, "s.replace('{0}','{1}')", lambda s, c, d: s.replace(c, d),
               "s with every {0} replaced by {1}", "把s中的{0}都换成{1}", _different),
        Family("erase", "s", (_LETTER,), 1, "s.replace('{0}','')", lambda s, c: s.replace(c, ""),
               "s without every {0}", "去掉所有{0}的s"),
        Family("repeat", "s", (range(2, 10),), 1, "s*{0}", lambda s, k: s * k, "s written {0} times", "s重复{0}次"),
        Family("prefix", "s", (_SHORT,), 1, "s[:{0}]", lambda s, k: s[:k],
               "the first {0} characters of s", "s的前{0}个字符"),
        Family("suffix", "s", (_SHORT,), 1, "s[-{0}:]", lambda s, k: s[-k:],
               "the last {0} characters of s", "s的后{0}个字符"),
        Family("starts", "s", (_LETTER,), 1, "s.startswith('{0}')", lambda s, c: s.startswith(c),
               "whether s starts with {0}", "s是否以{0}开头"),
        Family("ends", "s", (_LETTER,), 1, "s.endswith('{0}')", lambda s, c: s.endswith(c),
               "whether s ends with {0}", "s是否以{0}结尾"),
        Family("position", "s", (_LETTER,), 1, "s.find('{0}')", lambda s, c: s.find(c),
               "the index of the first {0} in s, or -1", "s中第一个{0}的下标，没有则为-1"),
        Family("append", "s", (_LETTER,), 1, "s+'{0}'", lambda s, c: s + c, "s followed by {0}", "s后面接{0}"),
        Family("reverse-append", "s", (_LETTER,), 2, "s[::-1]+'{0}'", lambda s, c: s[::-1] + c,
               "s reversed, followed by {0}", "s倒过来再接{0}"),
        Family("palindrome", "s", (_LETTER,), 3, "s+'{0}'==('{0}'+s[::-1])", lambda s, c: s + c == c + s[::-1],
               "whether s followed by {0} is a palindrome", "s后面接{0}是否为回文"),
        Family("join", "s", (_LETTER,), 2, "'{0}'.join(s.split())", lambda s, c: c.join(s.split()),
               "the words of s joined by {0}", "用{0}连接s的各个词"),
        Family("long-words", "s", (_SHORT,), 3, "sum(len(x)>{0} for x in s.split())",
               lambda s, k: sum(len(x) > k for x in s.split()),
               "how many words of s are longer than {0}", "s中长度大于{0}的词有几个"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A family with its parameters: the function a problem asks for."""

    family: Family
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
        return self.family.give(value, *self.parameters)

    def inputs(self, rng: random.Random, count: int) -> list[Any]:
        """Arguments near the edges of the function: around its numbers, with its letters, short ones, long ones."""
        draw = {"n": _integer, "a": _list, "s": _string}[self.family.argument]
        found: list[Any] = []
        while len(found) < count:
            value = draw(self.parameters, rng)
            if value not in ([], "") or self.family.empty:
                found.append(value)
        return found

    def tests(self, rng: random.Random) -> list[tuple[list[Any], Any]]:
        """TESTS pairs (arguments, answer): what tells it from its rivals, then as many different answers as can be.

        Greedy: each time the argument that refutes the most rivals still standing.
        """
        pool = {repr(value): value for value in self.inputs(rng, 8 * TESTS)}
        rivals = self.rivals()
        refuted = {key: {n for n, rival in enumerate(rivals) if self.differs(rival, pool[key])} for key in pool}
        chosen: list[str] = []
        while len(chosen) < TESTS and (best := max(refuted, key=lambda key: len(refuted[key]))) and refuted[best]:
            chosen.append(best)
            beaten = refuted[best]
            refuted = {key: left - beaten for key, left in refuted.items()}
        groups: dict[str, list[str]] = {}
        for key in pool:
            if key not in chosen:
                groups.setdefault(repr(self(pool[key])), []).append(key)
        chosen += [group[n] for n in range(TESTS) for group in groups.values() if n < len(group)]
        return [([pool[key]], self(pool[key])) for key in chosen[:TESTS]]

    def rivals(self) -> list["Wanted"]:
        """Mistakes to be told apart: the family with other parameters, other families with the same ones or nearly."""
        near: list[Any] = []
        for one in self.parameters:
            near += [one - 1, one, one + 1] if isinstance(one, int) else [one]
        found = [one for split in SPLITS for one in wanted(split) if one.family is self.family]
        for family in FAMILIES.values():
            if family.argument == self.family.argument:
                choices = product(*([one for one in near if one in values] for values in family.ranges))
                found += [Wanted(family, chosen) for chosen in choices if family.allows(*chosen)]
        return [one for one in found if one != self]

    def differs(self, other: "Wanted", value: Any) -> bool:
        """Whether they give different things for a value; 1 and True differ."""
        if value in ([], "") and not other.family.empty:
            return True
        mine, others = self(value), other(value)
        return type(mine) is not type(others) or mine != others


@cache
def wanted(split: str) -> tuple[Wanted, ...]:
    """Every function of a split, at most PER_FAMILY of a family."""
    found = []
    for family in FAMILIES.values():
        every = [Wanted(family, chosen) for chosen in product(*family.ranges) if family.allows(*chosen)]
        every.sort(key=lambda one: stable_hash("code", one.key))
        found.extend(one for one in every[:PER_FAMILY] if one.split == split)
    return tuple(found)


def _integer(parameters: Sequence[Any], rng: random.Random) -> int:
    if rng.random() < 0.6 and parameters:
        near = rng.choice(parameters)
        return near * rng.choice((1, 1, 1, 2, 3, 7)) + rng.choice((-1, 0, 0, 1))
    return rng.choice((rng.randint(-9, 30), rng.randint(0, 99), rng.randint(100, 999)))


def _list(parameters: Sequence[Any], rng: random.Random) -> list[int]:
    values = [_integer(parameters, rng) for _ in range(rng.choice((0, 1, 2, 3, 4, 6, 9)))]
    return values + rng.choices(values, k=rng.randint(0, 2)) if values else values


def _string(parameters: Sequence[Any], rng: random.Random) -> str:
    letters = "".join(one for one in parameters if isinstance(one, str)) or rng.choice(LETTERS)
    alphabet = letters * 3 + "".join(rng.choices(LETTERS, k=4)) + " " * rng.choice((0, 0, 2))
    text = "".join(rng.choices(alphabet, k=rng.choice((0, 1, 2, 3, 5, 8, 14))))
    turned = text + text[::-1] if rng.random() < 0.3 else text
    return rng.choice((turned, letters[0] + turned))
