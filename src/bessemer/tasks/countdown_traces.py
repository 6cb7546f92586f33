"""Countdown traces: the authors who write the pages of the pre-training corpus, and rates measured on any trace.

RL can only amplify what the corpus contains, so the corpus contains every behaviour in realistic proportion: most
authors are sloppy and give up early; few go through all tries in order. Three properties are deliberate.
  Verdicts are reliable: a hit is always called "yes". Thinking helps only a model that can verify.
  A mode is one decision: the systematic author opens with `order:` and the numbers sorted, so a policy can choose that
  mode with one token; without such a word, RL never left random, repeating tries.
  Persistence has a word: some authors end a refuted try with `wait`, always followed by another try.

`diagnose` counts the events of a trace, and `rates` turns the counts into conditional rates that show what RL changed.
Counting reflective words would miss reflection in other words, so tries are recognised by their structure. Counts are
summed over many responses before they are divided; a rate without any event is None.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

from bessemer.errors import UserError
from bessemer.tasks.answer import parse_reply, thought
from bessemer.tasks.base import Problem, check_shares
from bessemer.tasks.countdown_expressions import (
    Try,
    Unparsable,
    all_tries,
    apply,
    canonicals,
    ordered_tries,
    parse_expression,
)

WORDS = {
    "en": {"low": " low", "high": " high", "yes": " yes", "wait": " wait", "order": "order:"},
    "zh": {"low": "小", "high": "大", "yes": "对", "wait": ",等等", "order": "排序:"},
}
"""A verdict is one token in both languages: V3's pre-split glues the English space, and isolates the Chinese word."""


@dataclass(frozen=True)
class TraceMix:
    """Settings of the countdown documents: shares between 0 and 1, except `max_tries`."""

    drill_share: float = 0.16
    """Documents that are drill pages: they are long, about a third of the tokens."""
    direct: float = 0.12
    """Problem pages that answer without thinking."""
    direct_right: float = 0.5
    """The share of those whose author happens to know a right answer; the others write a random expression."""
    sloppy: float = 0.45
    """Thinking pages by authors who try at random, make slips, give up soon and sometimes call a miss a hit."""
    average: float = 0.30
    """Thinking pages by authors who do not repeat themselves and calculate well, but give up soon."""
    careful: float = 0.13
    """Thinking pages by authors who neither slip nor repeat themselves."""
    systematic: float = 0.12
    """Thinking pages by authors who walk through all tries in a fixed order."""
    slip_sloppy: float = 0.10
    """Chance that a step's result is wrong, per step."""
    slip_average: float = 0.03
    """The same for the average author; careful and systematic authors never slip."""
    give_up_sloppy: float = 0.55
    """Chance to stop after a try that misses; the author then answers with a random expression."""
    give_up_average: float = 0.35
    """The same for the average author."""
    give_up_careful: float = 0.20
    """The same for the careful author."""
    give_up_systematic: float = 0.07
    """The same for the systematic author."""
    give_up_last: float = 0.60
    """Chance that an author who gives up answers with the last, refuted try; the others write a random expression."""
    false_yes: float = 0.05
    """Chance that a sloppy author says yes to a miss."""
    wait: float = 0.20
    """Chance that an average or careful author writes `wait` before another try."""
    other_language: float = 0.10
    """Thinking pages whose verdicts are in the other language: the mixing that a language reward later removes."""
    truncated: float = 0.05
    """Thinking pages that break off before the answer."""
    max_tries: int = 20
    """Every author stops after this many tries."""

    def __post_init__(self) -> None:
        rates = [name for name in self.__dataclass_fields__ if name != "max_tries"]
        check_shares(self, rates, sums_to_one=("sloppy", "average", "careful", "systematic"))
        if self.max_tries < 1:
            raise UserError(f"TraceMix.max_tries is {self.max_tries}; set it to at least 1")

    def author(self, rng: random.Random) -> "Author":
        """The author of the next problem page."""
        if rng.random() < self.direct:
            return Author("direct")
        kinds = (
            Author("sloppy", self.slip_sloppy, self.give_up_sloppy, self.false_yes),
            Author("average", self.slip_average, self.give_up_average, wait=self.wait),
            Author("careful", give_up=self.give_up_careful, wait=self.wait),
            Author("systematic", give_up=self.give_up_systematic),
        )
        return rng.choices(kinds, [self.sloppy, self.average, self.careful, self.systematic])[0]


@dataclass(frozen=True)
class Author:
    """Habits of one writer, as chances per step (`slip`) or per missed try."""

    kind: str
    slip: float = 0.0
    give_up: float = 0.0
    false_yes: float = 0.0
    wait: float = 0.0

    def tries(self, numbers: tuple[int, int, int], rng: random.Random) -> Iterator[Try]:
        """The tries this author makes, in order, until the caller stops."""
        if self.kind == "systematic":
            yield from ordered_tries(numbers)
            return
        pool, keys, seen = all_tries(numbers), canonicals(numbers), set()
        order = _endless(len(pool), rng) if self.kind == "sloppy" else rng.sample(range(len(pool)), len(pool))
        for i in order:
            if self.kind != "sloppy" and keys[i] in seen:
                continue
            seen.add(keys[i])
            yield pool[i].swapped() if rng.random() < 0.5 else pool[i]

    def slips(self, rng: random.Random) -> Callable[[int, int], int]:
        """For Try.write: the value this author writes down, now and then a slip."""

        def written(value: int, largest: int) -> int:
            if rng.random() >= self.slip:
                return value
            wrong = value + rng.choice((-10, -2, -1, 1, 2, 10))
            return wrong if 0 <= wrong <= largest else value

        return written


def respond(
    numbers: tuple[int, int, int], target: int, author: Author, mix: TraceMix, words: dict[str, str], rng: random.Random
) -> str:
    """What `author` writes after `Assistant:`. `numbers` sorted ascending; `words` is WORDS of one language."""
    if author.kind == "direct":
        right = [t for t in all_tries(numbers) if t.value == target] if rng.random() < mix.direct_right else None
        return f"<answer>{_guess(right or all_tries(numbers), rng)}</answer>"
    lines = []
    answer = expression = None
    if author.kind == "systematic":
        lines.append(words["order"] + ",".join(map(str, sorted(numbers, reverse=True))))
    for count, attempt in enumerate(author.tries(numbers, rng), start=1):
        steps, claimed, expression = attempt.write(author.slips(rng))
        line = f"{steps}:{target}"
        if claimed == target or rng.random() < author.false_yes:
            lines.append(line + words["yes"])
            answer = expression
            break
        line += words["low"] if claimed < target else words["high"]
        if count == mix.max_tries or rng.random() < author.give_up:
            lines.append(line)
            break
        lines.append(line + (words["wait"] if rng.random() < author.wait else ""))
    if rng.random() < mix.truncated:
        return "<think>" + "\n".join(lines[: rng.randint(1, len(lines))])
    if answer is None:
        answer = expression if rng.random() < mix.give_up_last else _guess(all_tries(numbers), rng)
    return "<think>" + "\n".join(lines) + f"</think><answer>{answer}</answer>"


def _guess(pool: Sequence[Try], rng: random.Random) -> str:
    picked = rng.choice(pool)
    return (picked.swapped() if rng.random() < 0.5 else picked).expression


def _endless(n: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.randrange(n)


_N, _OP = "(?:0|[1-9][0-9]{0,3})", r"[+\-*]"  # four digits keep every expression within parse_expression's bounds
_PAIR = rf"\((?P<x>{_N})(?P<op>{_OP})(?P<y>{_N})\)"
_REST = rf"=(?P<claimed>{_N}):(?P<target>{_N}) ?(?P<verdict>low|high|yes|小|大|对)(?P<tail>.*)"
_FORMS = tuple(
    re.compile(form + _REST)
    for form in (
        rf"(?P<expression>{_PAIR}(?P<then>{_OP})(?P<z>{_N}))=(?P<middle>{_N})(?P<step>{_OP})(?P<kept>{_N})",
        rf"(?P<expression>(?P<z>{_N})(?P<then>{_OP}){_PAIR})=(?P<kept>{_N})(?P<step>{_OP})(?P<middle>{_N})",
    )
)
"""(x op y)then z=middle step kept=claimed:target verdict tail, and the same with z in front."""
_MEANING = {words[key].strip(): key for words in WORDS.values() for key in ("low", "high", "yes")}
_WAIT = {words["wait"] for words in WORDS.values()}
_ORDER = tuple(words["order"] for words in WORDS.values())


@dataclass(frozen=True)
class Diagnosis:
    """Counts of one response, or sums over many. A hit is a try whose claimed value is the target."""

    responses: int = 0
    tries: int = 0
    repeated: int = 0
    """Tries whose expression, in canonical form, occurred before."""
    steps: int = 0
    steps_right: int = 0
    linked: int = 0
    """Tries whose second step is what remains of their expression: after (3*7)+6 comes 21+6."""
    right_numbers: int = 0
    """Linked tries that use each number of the problem once."""
    right_target: int = 0
    """Tries compared with the target of the problem."""
    hits: int = 0
    yes_on_hit: int = 0
    misses: int = 0
    yes_on_miss: int = 0
    low_high_right: int = 0
    """Misses called low or high correctly."""
    waits: int = 0
    unread: int = 0
    """Lines of the trace that are not a try of the known form: stray words, private language."""
    systematic: int = 0
    """Responses that open with the sorted numbers."""
    said_yes: int = 0
    """Responses whose last try says yes."""
    gave_up: int = 0
    """Responses that closed their thinking after a last try that did not say yes."""
    answered_yes: int = 0
    """Those of `said_yes` whose answer is exactly the accepted expression."""

    def __add__(self, other: "Diagnosis") -> "Diagnosis":
        return Diagnosis(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def diagnose(problem: Problem, completion: str) -> Diagnosis:
    """Count what happens in one completion."""
    reply = parse_reply(completion)
    closed = reply.think is not None
    think = thought(completion)
    seen: set[str] = set()
    count = dict.fromkeys((f.name for f in fields(Diagnosis)), 0) | {"responses": 1}
    last_key, last_yes = None, None
    for number, line in enumerate(think.strip().replace(";", "\n").split("\n")):
        match = next((m for form in _FORMS if (m := form.fullmatch(line.strip()))), None)
        if match is None:
            opening = number == 0 and line.startswith(_ORDER)
            count["systematic"] += opening
            count["unread"] += bool(line.strip()) and not opening
            continue
        last_key, last_yes = _count_try(problem, match, seen, count)
    count["said_yes"] = int(last_yes is True)
    count["gave_up"] = int(closed and last_yes is False)
    count["answered_yes"] = int(last_yes is True and _canonical(reply.answer) == last_key)
    return Diagnosis(**count)


def _count_try(problem: Problem, match: re.Match, seen: set[str], count: dict[str, int]) -> tuple[str, bool]:
    """Add one try to `count`; returns its canonical expression and whether it says yes."""
    numbers, goal = sorted(problem.meta["numbers"]), problem.meta["target"]
    expression, op, then, step, verdict = match.group("expression", "op", "then", "step", "verdict")
    x, y, z, middle, kept, claimed, target = map(int, match.group("x", "y", "z", "middle", "kept", "claimed", "target"))
    left, right = (middle, kept) if expression.startswith("(") else (kept, middle)
    linked, verdict, key = (then, z) == (step, kept), _MEANING[verdict], _tried(expression)
    assert key is not None, expression
    count["tries"] += 1
    count["repeated"] += key in seen
    seen.add(key)
    count["steps"] += 2
    count["steps_right"] += (apply(x, op, y) == middle) + (apply(left, step, right) == claimed)
    count["linked"] += linked
    count["right_numbers"] += linked and sorted((x, y, z)) == numbers
    count["right_target"] += target == goal
    if claimed == goal:
        count["hits"] += 1
        count["yes_on_hit"] += verdict == "yes"
    else:
        count["misses"] += 1
        count["yes_on_miss"] += verdict == "yes"
        count["low_high_right"] += verdict == ("low" if claimed < goal else "high")
    count["waits"] += match["tail"] in _WAIT
    return key, verdict == "yes"


def _canonical(expression: str | None) -> str | None:
    """Canonical form; None if the text is not an expression."""
    try:
        return None if expression is None else parse_expression(expression).canonical
    except Unparsable:
        return None


_tried = lru_cache(maxsize=1 << 14)(_canonical)
"""Cached, for the short expressions of tries: samples of a problem write the same ones again and again."""


def rates(diagnoses: Iterable[Diagnosis]) -> dict[str, float | None]:
    """Counts per response, and conditional rates."""
    d = sum(diagnoses, Diagnosis())
    parts = {
        "tries": (d.tries, d.responses),
        "waits": (d.waits, d.responses),
        "repeated": (d.repeated, d.tries),
        "step_right": (d.steps_right, d.steps),
        "linked": (d.linked, d.tries),
        "right_numbers": (d.right_numbers, d.tries),
        "right_target": (d.right_target, d.tries),
        "yes_given_hit": (d.yes_on_hit, d.hits),
        "yes_given_miss": (d.yes_on_miss, d.misses),
        "low_high_given_miss": (d.low_high_right, d.misses),
        "unread": (d.unread, d.unread + d.tries),
        "systematic": (d.systematic, d.responses),
        "said_yes": (d.said_yes, d.responses),
        "gave_up": (d.gave_up, d.responses),
        "answered_yes": (d.answered_yes, d.said_yes),
    }
    return {name: (part / whole if whole else None) for name, (part, whole) in parts.items()}
