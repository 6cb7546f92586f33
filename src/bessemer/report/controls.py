"""Controls: runs beside the main one that share all with it but the reward, and show what the reward is owed.

A control of an RL stage starts from the same model on the same tasks, and is
    paid by a coin           reward = "random"
    paid for the form alone  reward = "format"
    not paid at all          kind sft, on the very samples that the RL stage itself left
Whatever a control gains too was not learnt from the task. A control that fits several stages is shown beside the first.
"""

from dataclasses import dataclass

from bessemer.eval.tables import Row
from bessemer.report import curves, page, stagetable
from bessemer.report.facts import RunFacts, StageFacts
from bessemer.report.panels import COMPARED, NAMES

_WORDS = {"random": "paid by a coin", "format": "paid for the form alone"}
_SAME_TOKENS = "SFT on the same tokens"


@dataclass(frozen=True)
class Trial:
    """An RL stage paid by the task, and its controls with what sets them apart."""

    main: StageFacts
    arms: tuple[tuple[StageFacts, str], ...]


def trials(facts: RunFacts) -> list[Trial]:
    found: list[Trial] = []
    taken: set[str] = set()
    for main in facts.stages:
        if main.kind == "rl" and _reward(main) == "task":
            free = [stage for stage in facts.stages if stage.name not in taken]
            arms = [(stage, words) for stage in free if (words := _apart(stage, main))]
            taken |= {stage.name for stage, _ in arms}
            if arms:
                found.append(Trial(main, tuple(arms)))
    return found


def arm_names(facts: RunFacts) -> set[str]:
    """Stages that are controls, and so no part of the main line."""
    return {stage.name for trial in trials(facts) for stage, _ in trial.arms}


def main_line(facts: RunFacts) -> list[Row]:
    """Evaluations of what is no control."""
    arms = arm_names(facts)
    return [row for row in facts.evaluations if str(row.get("model", "")) not in arms]


def _apart(stage: StageFacts, main: StageFacts) -> str:
    """What sets `stage` apart from `main`; "" if it is no control of it."""
    if stage.source != main.source:
        return ""
    if stage.kind == "sft" and main.name in (stage.settings.get("samples") or []):
        return _SAME_TOKENS
    if stage.kind == "rl" and stage.settings.get("tasks") == main.settings.get("tasks"):
        return _WORDS.get(_reward(stage), "")
    return ""


def _reward(stage: StageFacts) -> str:
    return str(stage.settings.get("reward", "task"))


def html(facts: RunFacts) -> str:
    """ "" without controls."""
    return "\n".join(_trial(facts, trial) for trial in trials(facts))


def text(facts: RunFacts) -> str:
    """The tables of all trials for a terminal; "" without controls."""
    tables = ((trial, stagetable.text(_rows(facts, trial))) for trial in trials(facts))
    return "\n\n".join(f"controls of {trial.main.name}: {_told(trial)}\n{table}" for trial, table in tables if table)


def _told(trial: Trial) -> str:
    return ", ".join(f"{stage.name} is {words}" for stage, words in trial.arms)


def _rows(facts: RunFacts, trial: Trial) -> list[Row]:
    """Evaluations of where a trial starts from, of its stage and of its controls, in this order."""
    names = [trial.main.source, trial.main.name, *(stage.name for stage, _ in trial.arms)]
    rows = [row for row in facts.evaluations if str(row.get("model", "")) in names]
    return sorted(rows, key=lambda row: names.index(str(row["model"])))


def _trial(facts: RunFacts, trial: Trial) -> str:
    told = "".join(
        f"<li><b>{page.text(stage.name)}</b> {page.text(words)}</li>"
        for stage, words in [(trial.main, "paid by the task"), *trial.arms]
    )
    stages = [trial.main, *(stage for stage, _ in trial.arms)]
    drawn = "".join(curves.compared(stages, metric, _title(metric)) for metric in COMPARED)
    return (
        f'<h3>{page.text(trial.main.name)} <span class="unit">from {page.text(trial.main.source)}</span></h3>'
        f'<ul class="arms">{told}</ul>'
        + (f'<div class="charts">{drawn}</div>' if drawn else "")
        + stagetable.html(facts, _rows(facts, trial))
    )


def _title(metric: str) -> str:
    return {"rl/heldout_pass_at_1": "held-out pass@1", "rl/accuracy": "correct in training"}.get(
        metric, NAMES.get(metric, metric.removeprefix("rl/").replace("_", " "))
    )
