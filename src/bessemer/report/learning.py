"""Watching it learn: for every stage of reinforcement learning its alarms, and the curves that tell what it learns.

Controls are not among them: they are drawn beside the stage they belong to (`controls`).
"""

from bessemer.report import controls, curves, page
from bessemer.report.facts import RunFacts, StageFacts
from bessemer.report.panels import LEARNING
from bessemer.rl.alarms import Alarm, AlarmTracker


def html(facts: RunFacts) -> str:
    """ "" when no stage learnt by reward."""
    arms = controls.arm_names(facts)
    return "\n".join(_stage(stage) for stage in facts.stages if stage.learns_by_reward and stage.name not in arms)


def _stage(stage: StageFacts) -> str:
    last = max(step for step, _ in stage.lines)
    about = [f"{last} steps"]
    if (tasks := stage.settings.get("tasks")) and isinstance(tasks, list):
        about.append(", ".join(str(task) for task in tasks))
    heading = f'<h3>{page.text(stage.name)} <span class="unit">{page.text(" · ".join(about))}</span></h3>'
    return f"{heading}\n{_alarms(stage)}\n{curves.panels(stage, LEARNING)}"


def _alarms(stage: StageFacts) -> str:
    """Every alarm the stage raised, when, and whether it stands at the end."""
    tracker = AlarmTracker(stage.lines)
    if not tracker.raised:
        return '<p class="calm">No alarm.</p>'
    standing = {alarm.code: alarm for alarm in tracker.active}
    return "".join(
        _alarm(step, standing.get(code, alarm), code in standing) for code, (step, alarm) in tracker.raised.items()
    )


def _alarm(step: int, alarm: Alarm, stands: bool) -> str:
    when = f"since step {step}" if stands else f"at step {step}, over by the end"
    return (
        f'<div class="alarm{"" if stands else " over"}"><b>{page.text(alarm.title)}</b> '
        f'<span class="unit">{page.text(when)}</span><p>{page.text(_sentence(alarm.message))}</p>'
        f'<p class="unit">Likely cause: {page.text(alarm.cause)}. What to do: {page.text(alarm.advice)}.</p></div>'
    )


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."
