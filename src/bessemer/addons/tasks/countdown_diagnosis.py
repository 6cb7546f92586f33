"""What happens in a countdown trace: rates that RL changes, measured on any trace (the hook `trace`).

`diagnose` counts the events of a trace, and `rates` turns the counts into conditional rates that show what RL changed.
Counting reflective words would miss reflection in other words, so tries are recognised by their structure. Counts are
summed over many responses before they are divided; a rate without any event is None.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

from bessemer.addons.tasks.countdown_search import BACK
from bessemer.tasks.answer import parse_reply, thought
from bessemer.tasks.base import Problem
from bessemer.tasks.countdown_expressions import Unparsable, apply, parse_expression
from bessemer.tasks.countdown_traces import WORDS

SHOWN = ("step_right", "right_numbers", "yes_given_hit", "yes_given_miss", "repeated", "returned", "gave_up")
"""Rates that say what RL changed: arithmetic, copying, verdicts, persistence."""

_N, _OP = "(?:0|[1-9][0-9]{0,3})", r"[+\-*]"  # four digits keep every expression within parse_expression's bounds
_CHAIN = rf"\({{0,6}}{_N}(?:{_OP}{_N}\))*{_OP}{_N}"  # ((8-3)*2)+7
_FRONT = rf"{_N}{_OP}\({_N}{_OP}{_N}\)"  # 9-(8-3)
_LINE = re.compile(
    rf"(?P<back>{'|'.join(BACK.values())})?(?P<expression>{_CHAIN}|{_FRONT})(?P<steps>(?:={_N}{_OP}{_N}){{0,6}})"
    rf"=(?P<claimed>{_N}):(?P<target>{_N}) ?(?P<verdict>low|high|yes|小|大|对)(?P<tail>.*)"
)
"""expression = step ... = claimed:target verdict tail; a step is the value so far, an operator, and the next number."""
_TERMS = re.compile(rf"{_N}|{_OP}")
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
    """Tries whose steps are what remains of their expression: after (3*7)+6 comes 21+6."""
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
    returned: int = 0
    """Tries after `back` that differ from an earlier one, not the last, in one operator or two numbers."""
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
    """The counts of an answer to countdown; None for any other problem."""
    traced = "target" in problem.meta and "numbers" in problem.meta
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
    seen: dict[str, list[str]] = {}
    count = dict.fromkeys((f.name for f in fields(Diagnosis)), 0) | {"responses": 1}
    last_key, last_yes = None, None
    for number, line in enumerate(think.strip().replace(";", "\n").split("\n")):
        match = _LINE.fullmatch(line.strip())
        if match is None or not _whole(match):
            opening = number == 0 and line.startswith(_ORDER)
            count["systematic"] += opening
            count["unread"] += bool(line.strip()) and not opening
            continue
        last_key, last_yes = _count_try(problem, match, seen, count)
    count["said_yes"] = int(last_yes is True)
    count["gave_up"] = int(closed and last_yes is False)
    count["answered_yes"] = int(last_yes is True and _canonical(reply.answer) == last_key)
    return Diagnosis(**count)


def _count_try(
    problem: Problem, match: re.Match, seen: dict[str, list[str]], count: dict[str, int]
) -> tuple[str, bool]:
    """Add one try to `count`, and its terms to `seen`; returns its canonical expression and whether it says yes."""
    numbers, goal = sorted(problem.meta["numbers"]), problem.meta["target"]
    claimed, verdict, terms = int(match["claimed"]), _MEANING[match["verdict"]], _TERMS.findall(match["expression"])
    key = _tried(match["expression"])
    assert key is not None, match["expression"]
    count["tries"] += 1
    count["repeated"] += key in seen
    earlier = list(seen.values())[:-1]
    count["returned"] += match["back"] is not None and any(_is_change(terms, other) for other in earlier)
    seen[key] = seen.pop(key, terms)
    front = not match["expression"].startswith("(") and "(" in match["expression"]
    if front:  # z-(x-y): the pair comes first
        terms = [*terms[2:], terms[1], terms[0]]
    right, linked = _steps_right(terms, match["steps"], claimed, front)
    count["steps"] += len(terms) // 2
    count["steps_right"] += right
    count["linked"] += linked
    count["right_numbers"] += linked and sorted(map(int, terms[::2])) == numbers
    count["right_target"] += int(match["target"]) == goal
    if claimed == goal:
        count["hits"] += 1
        count["yes_on_hit"] += verdict == "yes"
    else:
        count["misses"] += 1
        count["yes_on_miss"] += verdict == "yes"
        count["low_high_right"] += verdict == ("low" if claimed < goal else "high")
    count["waits"] += match["tail"] in _WAIT
    return key, verdict == "yes"


def _whole(match: re.Match) -> bool:
    """Whether the line has all steps of an expression whose parentheses close."""
    operators = len(_TERMS.findall(match["expression"])) // 2
    return match["steps"].count("=") == operators - 1 and _tried(match["expression"]) is not None


def _steps_right(terms: list[str], steps: str, claimed: int, front: bool) -> tuple[int, bool]:
    """(steps computed right, whether the steps are what remains of the expression); `terms` in order of calculation."""
    written = [_TERMS.findall(step) for step in steps.split("=")[1:]]
    if front:
        written = [step[::-1] for step in written]
    lines = [terms[:3], *written]
    values = [*(int(step[0]) for step in written), claimed]
    swaps = [False] * len(written) + [front]
    right = sum(
        apply(*((int(b), op, int(a)) if swap else (int(a), op, int(b)))) == value
        for (a, op, b), value, swap in zip(lines, values, swaps, strict=True)
    )
    return right, all(step[1:] == terms[3 + 2 * n : 5 + 2 * n] for n, step in enumerate(written))


def _is_change(terms: list[str], other: list[str]) -> bool:
    """Whether one operator differs, or two numbers are exchanged."""
    if len(terms) != len(other):
        return False
    places = [n for n, (a, b) in enumerate(zip(terms, other, strict=True)) if a != b]
    if len(places) == 1:
        return places[0] % 2 == 1
    return len(places) == 2 and all(terms[a] == other[b] for a, b in (places, places[::-1]))


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
        "returned": (d.returned, d.tries),
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
