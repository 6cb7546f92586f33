"""What happens in a countdown trace: rates that RL changes, measured on any trace (the hook `trace`).

`diagnose` counts the events of a trace, and `rates` turns the counts into conditional rates that show what RL changed.
Counting reflective words would miss reflection in other words, so tries are recognised by their structure. Counts are
summed over many responses before they are divided; a rate without any event is None.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

from bessemer.tasks.answer import parse_reply, thought
from bessemer.tasks.base import Problem
from bessemer.tasks.countdown_expressions import Unparsable, apply, parse_expression
from bessemer.tasks.countdown_traces import WORDS

SHOWN = ("step_right", "right_numbers", "yes_given_hit", "yes_given_miss", "repeated", "gave_up")
"""Rates that say what RL changed: arithmetic, copying, verdicts, persistence."""

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


def read(problem: Problem, answer: str) -> "Diagnosis | None":
    """The counts of an answer to countdown with three numbers; None for any other problem."""
    traced = "target" in problem.meta and len(problem.meta.get("numbers", ())) == 3
    return diagnose(problem, answer) if traced else None


def metrics(traces: "Iterable[Diagnosis]") -> dict[str, float]:
    """The metrics of a rollout, without those that have nothing to count."""
    values = rates(traces)
    return {f"rl/trace/{name}": value for name in SHOWN if (value := values[name]) is not None}


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
    return {name: (part / total if total else None) for name, (part, total) in parts.items()}
