"""The tasks of an RL stage, with the settings that its `task_options` give them, and the order of their turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import gcd
from typing import Any

from bessemer import tasks
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.tasks import Task

OPTIONS = ("share", "languages", "phrasing")
"""What every task takes, besides its own `option_names`."""
MOST_SHARE = 100


def task_of(settings: RLConfig, name: str) -> Task:
    """The task as the stage asks it. UserError for a setting that it does not have."""
    options = dict(settings.task_options.get(name, {}))
    if not options:
        return tasks.get(name)
    where = f'stage "{settings.name}": task_options."{name}"'
    names = [*OPTIONS, *tasks.get(name).option_names()]
    for key in options:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{where} has no setting {key!r}; {hint}Known: {', '.join(names)}")
    options.pop("share", None)
    _check_kinds(options, where)
    try:
        return tasks.get(name, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def mixture(settings: RLConfig, names: Sequence[str]) -> list[Task]:
    """The tasks in the order of their turns."""
    by_name = {name: task_of(settings, name) for name in dict.fromkeys(names)}
    return [by_name[name] for name in round_of(settings, names)]


def round_of(settings: RLConfig, names: Sequence[str]) -> list[str]:
    """A round of turns: each of `names` has as many as its share says, spread evenly."""
    shares = [share_of(settings, name) for name in names]
    return [names[position] for position in turns([share // gcd(*shares) for share in shares])]


def turns(shares: Sequence[int]) -> list[int]:
    """A round in which place n has shares[n] turns, as far apart as they can be; equal shares: 0, 1, 2, ..."""
    due, order = [0] * len(shares), []
    for _ in range(sum(shares)):
        due = [credit + share for credit, share in zip(due, shares, strict=True)]
        order.append(due.index(max(due)))
        due[order[-1]] -= sum(shares)
    return order


def share_of(settings: RLConfig, name: str) -> int:
    share = settings.task_options.get(name, {}).get("share", 1)
    if not isinstance(share, int) or isinstance(share, bool) or not 1 <= share <= MOST_SHARE:
        raise UserError(
            f'stage "{settings.name}": task_options."{name}".share is {share!r}; set its turns in a round, a whole '
            f"number from 1 to {MOST_SHARE}"
        )
    return share


def check(settings: RLConfig) -> None:
    """UserError for options of a task that the stage does not name, or without effect there."""
    trained = settings.tasks + settings.general_tasks
    named = [*dict.fromkeys(trained + settings.heldout.tasks)]
    for name, options in settings.task_options.items():
        where = f'stage "{settings.name}": task_options."{name}"'
        if name not in named:
            raise UserError(f"{where} is of no task that the stage names; it names {', '.join(named)}")
        share_of(settings, name)
        if "share" in options and name not in trained:
            raise UserError(f"{where}.share has no effect on a task that is only evaluated; leave it out")
        if options.get("plain_answers") and settings.accuracy_needs_format:
            raise UserError(
                f"{where}.plain_answers has no effect with accuracy_needs_format = true, which asks for the form"
            )


def _check_kinds(options: Mapping[str, Any], where: str) -> None:
    languages, phrasing = options.get("languages", ["en"]), options.get("phrasing", "seen")
    if not isinstance(languages, list) or not languages or not all(isinstance(language, str) for language in languages):
        raise UserError(f'{where}.languages is {languages!r}; write a list, such as ["en"]')
    if not isinstance(phrasing, str):
        raise UserError(f'{where}.phrasing is {phrasing!r}; write "seen" or "held-out"')
