"""Documents of countdown with more numbers: pages by authors who try a little and give up.

The honest way to a solution is a long search, and no page shows one: an author stops after a miss with the chance
`give_up`. RL has to find out that going on pays.

A try is a chain, `(((8-3)*2)+7)-1=5*2=10+7=17-1=16:24 low`: the expression first, so that the answer is a literal copy
of its start, then one step at a time. A value is never negative and never above LARGEST. Three habits of search are in
the corpus, and a policy may choose among them line by line: another try at random; the last try with one operator
changed or two numbers exchanged; and, after the word `back`, the nearest earlier try changed in that way.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bessemer.errors import UserError
from bessemer.tasks.base import check_shares
from bessemer.tasks.countdown_expressions import LARGEST, OPS, apply
from bessemer.tasks.countdown_traces import WORDS

BACK = {"en": "back ", "zh": "回到"}
ANY = {op: OPS.replace(op, "") for op in OPS}
RAISED, LOWERED = {"-": "+*", "+": "*", "*": ""}, {"*": "+-", "+": "-", "-": ""}
"""The operators that one may be changed into: any, those that make more of two numbers, those that make less."""


@dataclass(frozen=True)
class SearchMix:
    """Settings of the documents: shares between 0 and 1, except `max_tries`."""

    drill_share: float = 0.15
    """Documents that are drill pages: facts, comparisons, and tries with their changes."""
    direct: float = 0.12
    """Problem pages that answer with a random expression and no thought."""
    knows: float = 0.20
    """Thinking pages whose author knows the solution, and tries nothing else."""
    adjust: float = 0.35
    """Chance that a try is the last one changed."""
    back: float = 0.15
    """Chance that a try is the nearest earlier one changed, where the last one is not the nearest."""
    directed: float = 0.7
    """Changes of an operator that move the value towards the target, as far as one can tell without computing it."""
    give_up: float = 0.50
    """Chance to stop after a miss; the author then answers with the last, refuted try."""
    slip: float = 0.02
    """Chance that the result of a step is wrong."""
    truncated: float = 0.03
    """Thinking pages that break off before the answer."""
    max_tries: int = 20
    """Every author stops after this many tries."""

    def __post_init__(self) -> None:
        check_shares(self, [name for name in self.__dataclass_fields__ if name != "max_tries"])
        if self.adjust + self.back > 1:
            raise UserError(f"SearchMix: adjust + back is {self.adjust + self.back:.4g}; make it at most 1")
        if self.max_tries < 1:
            raise UserError(f"SearchMix.max_tries is {self.max_tries}; set it to at least 1")


class Chain(NamedTuple):
    """A try: the numbers in order, and the operators between them."""

    numbers: tuple[int, ...]
    ops: str

    @property
    def values(self) -> list[int]:
        """The value after each step."""
        values = [self.numbers[0]]
        for op, number in zip(self.ops, self.numbers[1:], strict=True):
            values.append(apply(values[-1], op, number))
        return values[1:]

    @property
    def fits(self) -> bool:
        return all(0 <= value <= LARGEST for value in self.values)

    @property
    def expression(self) -> str:
        text = str(self.numbers[0])
        for op, number in zip(self.ops, self.numbers[1:], strict=True):
            text = f"({text}{op}{number})"
        return text[1:-1]

    def write(self, slip: float, rng: random.Random) -> tuple[str, int]:
        """The try as text, and the value that it claims: with the chance `slip` a step's result is wrong, and the
        author goes on from there."""
        steps, claimed = "", self.numbers[0]
        for n, (op, number) in enumerate(zip(self.ops, self.numbers[1:], strict=True)):
            steps += f"{op}{number}=" if n else "="
            claimed = apply(claimed, op, number)
            if rng.random() < slip:
                claimed += rng.choice((-10, -2, -1, 1, 2, 10))
            claimed = min(max(claimed, 0), LARGEST)
            steps += str(claimed)
        return f"{self.expression}{steps}", claimed

    def changed(self, rng: random.Random, among: Mapping[str, str] = ANY) -> Chain:
        """One operator changed into one of those that `among` has for it, or two numbers exchanged."""
        for _ in range(100):
            numbers, ops = list(self.numbers), list(self.ops)
            if rng.random() < 0.5:
                n = rng.randrange(len(ops))
                ops[n] = rng.choice(among[ops[n]] or ops[n])
            else:
                a, b = rng.sample(range(len(numbers)), 2)
                numbers[a], numbers[b] = numbers[b], numbers[a]
            chain = Chain(tuple(numbers), "".join(ops))
            if chain != self and chain.fits:
                return chain
        return drawn(self.numbers, rng)


def drawn(numbers: Sequence[int], rng: random.Random) -> Chain:
    """A try at random."""
    while True:
        chain = Chain(tuple(rng.sample(numbers, len(numbers))), "".join(rng.choice(OPS) for _ in numbers[1:]))
        if chain.fits:
            return chain


def solution(numbers: Sequence[int], target: int, rng: random.Random) -> Chain:
    """A chain with the value `target`; a try at random if a thousand of these are not enough."""
    chains = (drawn(numbers, rng) for _ in range(1_000))
    return next((chain for chain in chains if chain.values[-1] == target), drawn(numbers, rng))


def respond(numbers: Sequence[int], target: int, mix: SearchMix, language: str, rng: random.Random) -> tuple[str, str]:
    """(kind of author, what is written after `Assistant:`)."""
    words, chain = WORDS[language], drawn(numbers, rng)
    if rng.random() < mix.direct:
        return "direct", f"<answer>{chain.expression}</answer>"
    if rng.random() < mix.knows:
        chain = solution(numbers, target, rng)
    lines: list[str] = []
    nearest, distance, opening = chain, LARGEST, ""
    while True:
        steps, claimed = chain.write(mix.slip, rng)
        verdict = "yes" if claimed == target else "low" if claimed < target else "high"
        lines.append(f"{opening}{steps}:{target}{words[verdict]}")
        if claimed == target or len(lines) == mix.max_tries or rng.random() < mix.give_up:
            break
        if abs(claimed - target) <= distance:
            nearest, distance = chain, abs(claimed - target)
        habit, opening = rng.random(), ""
        if habit < mix.back and nearest != chain:
            chain, opening = nearest, BACK[language]
        if habit < mix.back + mix.adjust:
            low = chain.values[-1] < target
            chain = chain.changed(rng, (RAISED if low else LOWERED) if rng.random() < mix.directed else ANY)
        else:
            chain = drawn(numbers, rng)
    if rng.random() < mix.truncated:
        return "searching", "<think>" + "\n".join(lines)
    return "searching", "<think>" + "\n".join(lines) + f"</think><answer>{chain.expression}</answer>"


def drill(numbers: Sequence[int], listed: str, language: str, rng: random.Random) -> list[str]:
    """Two lines of a drill page: a try with the numbers as a prompt lists them and the same changed, or two steps."""
    words = WORDS[language]
    if rng.random() < 0.5:
        chain = drawn(numbers, rng)
        return [f"{listed}:{chain.write(0.0, rng)[0]}", chain.changed(rng).write(0.0, rng)[0]]
    lines = []
    for _ in range(2):
        value, target = rng.randint(0, LARGEST), rng.randint(1, 60)
        if rng.random() < 0.5:
            op, number = rng.choice(OPS), rng.randint(1, max(numbers))
            while not 0 <= apply(value, op, number) <= LARGEST:
                value = rng.randint(0, LARGEST)
            lines.append(f"{value}{op}{number}={apply(value, op, number)}")
        else:
            value = rng.choice((target, max(0, target + rng.randint(-5, 5)), value))
            verdict = "yes" if value == target else "low" if value < target else "high"
            lines.append(f"{value}:{target}{words[verdict]}")
    return lines
