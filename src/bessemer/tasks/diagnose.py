"""What happens inside a countdown trace: the conditional rates that say what RL changed (rl.md 1 and 7).

A reflective-word counter misses reflection that changes its wording, so tries are counted by their structure. Rates are
sums over many responses divided at the end; `rates` gives None where nothing of the kind happened.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import Problem
from bessemer.tasks.expression import Unparsable, parse_expression
from bessemer.tasks.traces import WORDS
from bessemer.tasks.tries import apply

_NUMBER, _OP = "([0-9]{1,6})", r"([+\-*])"
_TRY = re.compile(
    rf"(\(?{_NUMBER}{_OP}\(?{_NUMBER}\)?{_OP}{_NUMBER}\)?)={_NUMBER}{_OP}{_NUMBER}={_NUMBER}:{_NUMBER}"
    r" ?(low|high|yes|小|大|对)(.*)"
)
# (whole (first) op (second) op (third)) = (left) op (right) = (claimed) : (target) verdict tail
_MEANING = {words[key].strip(): key for words in WORDS.values() for key in ("low", "high", "yes")}
_WAIT = {words["wait"] for words in WORDS.values()}
_ORDER = tuple(words["order"] for words in WORDS.values())


@dataclass(frozen=True)
class Diagnosis:
    """Counts of one response, or of many added up. A hit is a try whose claimed value is the target."""

    responses: int = 0
    tries: int = 0
    repeated: int = 0
    """Tries whose expression, in canonical form, was tried before."""
    steps: int = 0
    steps_right: int = 0
    linked: int = 0
    """Tries whose second step goes on from the first one's result."""
    right_numbers: int = 0
    """Tries that use each number of the problem once."""
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
    """Lines of the trace that are no try of the known form: stray words, private language."""
    systematic: int = 0
    """Responses that open with the sorted numbers."""
    said_yes: int = 0
    """Responses whose last try says yes."""
    gave_up: int = 0
    """Responses that closed their thinking after a last try that did not say yes."""
    answered_yes: int = 0
    """Of `said_yes`, responses that answer with the very expression they said yes to."""

    def __add__(self, other: "Diagnosis") -> "Diagnosis":
        return Diagnosis(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def diagnose(problem: Problem, completion: str) -> Diagnosis:
    reply = parse_reply(completion)
    closed = reply.think is not None
    think = reply.think if closed else completion.partition("<think>")[2]
    seen: set[str] = set()
    count = dict.fromkeys((f.name for f in fields(Diagnosis)), 0) | {"responses": 1}
    last_yes, last_key = None, None
    for number, line in enumerate(think.strip().replace(";", "\n").split("\n")):
        match = _TRY.fullmatch(line.strip()) if len(line) < 100 else None
        if match is None:
            opening = number == 0 and line.startswith(_ORDER)
            count["systematic"] += opening
            count["unread"] += bool(line.strip()) and not opening
            continue
        last_key, last_yes = _count_try(problem, match, seen, count)
    count["said_yes"] = int(bool(last_yes))
    count["gave_up"] = int(closed and last_yes is False)
    count["answered_yes"] = int(bool(last_yes) and _key(reply.answer) == last_key)
    return Diagnosis(**count)


def _count_try(problem: Problem, match: re.Match, seen: set[str], count: dict[str, int]) -> tuple[str | None, bool]:
    """Add one try to `count`; returns its canonical expression and whether it says yes."""
    expression = match[1]
    left, right, claimed, target = (int(match[i]) for i in (7, 9, 10, 11))
    verdict, tail = _MEANING[match[12]], match[13]
    # z-(x op y) or (x op y) then z; a line with its brackets elsewhere is an unlinked try
    if re.fullmatch(r"[0-9]+-\([0-9]+.[0-9]+\)", expression):
        (z, x, y), op, then, middle, kept = _ints(match, 2, 4, 6), match[5], match[3], right, left
    else:
        (x, y, z), op, then, middle, kept = _ints(match, 2, 4, 6), match[3], match[5], left, right
    bracketed = re.fullmatch(r"\([0-9]+.[0-9]+\).[0-9]+|[0-9]+-\([0-9]+.[0-9]+\)", expression) is not None
    linked = bracketed and kept == z and match[8] == then
    key = _key(expression)
    count["tries"] += 1
    count["repeated"] += key in seen
    seen.add(key)
    count["steps"] += 2
    count["steps_right"] += (apply(x, op, y) == middle) + (apply(left, match[8], right) == claimed)
    count["linked"] += linked
    count["right_numbers"] += linked and sorted((x, y, z)) == sorted(problem.meta["numbers"])
    count["right_target"] += target == problem.meta["target"]
    if claimed == problem.meta["target"]:
        count["hits"] += 1
        count["yes_on_hit"] += verdict == "yes"
    else:
        count["misses"] += 1
        count["yes_on_miss"] += verdict == "yes"
        count["low_high_right"] += verdict == ("low" if claimed < problem.meta["target"] else "high")
    count["waits"] += tail in _WAIT
    return key, verdict == "yes"


def _ints(match: re.Match, *groups: int) -> tuple[int, ...]:
    return tuple(int(match[i]) for i in groups)


def _key(expression: str | None) -> str | None:
    try:
        return None if expression is None else parse_expression(expression).canonical
    except Unparsable:
        return None


def rates(diagnoses: Iterable[Diagnosis]) -> dict[str, float | None]:
    """The aha board: counts per response, and conditional rates."""
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
