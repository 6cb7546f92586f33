"""The report card of a run: one self-contained HTML file made from the run directory alone.

`write(root)` reads the facts and writes `report.html` beside them, atomically. Each section is a function of the facts
that returns HTML, or "" when the run has nothing for it; those are named in one line at the end.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.config.units import show_seconds, show_tokens
from bessemer.eval import contamination
from bessemer.eval.tables import by_sampling
from bessemer.report import controls, curves, formats, learning, longcontext, page, stagetable, stories
from bessemer.report.charts import short
from bessemer.report.facts import RunFacts, StageFacts, read
from bessemer.runs.files import explained, write_atomic


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    body: Callable[[RunFacts], str]
    needs: str
    """What a run must record for it, for the line that says it is missing."""
    lead: str = ""


def write(root: Path) -> Path:
    """Make `report.html` in the run directory `root`; return its path."""
    path = root / "report.html"
    html = render(read(root))
    with explained(path):
        write_atomic(path, html)
    return path


def table(root: Path) -> str:
    """The tables of the run in `root` for a terminal: stages, controls, formats, long context; "" when it has none
    of them."""
    facts = read(root)
    tables = (
        stagetable.text(controls.main_line(facts)), controls.text(facts), formats.text(facts), longcontext.text(facts),
    )  # fmt: skip
    return "\n\n".join(filter(None, tables))


def render(facts: RunFacts) -> str:
    parts, anchors, missing = [], [], []
    for section in SECTIONS:
        if body := section.body(facts):
            parts.append(page.section(section.anchor, section.title, body, section.lead))
            anchors.append(f'<a href="#{section.anchor}">{page.text(section.title)}</a>')
        else:
            missing.append(f"{section.title.lower()} ({section.needs})")
    if missing:
        said = "Left out, since the run recorded nothing for it: " + "; ".join(missing) + "."
        parts.append(f'<p class="missing">{page.text(said)}</p>')
    name = str(facts.recipe.get("name", facts.root.name))
    head = f"{_head(facts, name)}\n<nav>{''.join(anchors)}</nav>"
    made = time.strftime("%Y-%m-%d %H:%M")
    foot = f"<footer>bessemer {page.text(__version__)} · written {made} from {page.text(facts.root)}</footer>"
    return page.document(f"{name} · bessemer", "\n".join([head, *parts, foot]))


def _head(facts: RunFacts, name: str) -> str:
    recipe = facts.recipe
    words = [
        _origin(recipe),
        " → ".join(stage.name for stage in facts.stages) or "no stage has begun",
        f"seed {recipe.get('seed', 0)}",
    ]
    if facts.finished_at:
        words.append(time.strftime("%Y-%m-%d", time.localtime(facts.finished_at)))
    unfinished = [str(table["name"]) for table in recipe.get("stage", []) if not _finished(facts, table.get("name"))]
    note = f'<p class="note">Not finished yet: {page.text(", ".join(unfinished))}.</p>' if unfinished else ""
    return (
        f'<header><div class="brand">Bessemer report</div><h1>{page.text(name)}</h1>'
        f'<p class="sub">{page.text(" · ".join(words))}</p>{note}<div class="tiles">{_tiles(facts)}</div></header>'
    )


def _finished(facts: RunFacts, name: Any) -> bool:
    return any(stage.name == name and stage.finished for stage in facts.stages)


def _origin(recipe: dict[str, Any]) -> str:
    """What the models of a recipe are: brought in from elsewhere, or of our architecture."""
    model, stages = recipe.get("model", {}), recipe.get("stage", [])
    words = [f"imported: {table['model']}" for table in stages if table.get("kind") == "import" and "model" in table]
    if not words or any(table.get("kind") == "pretrain" for table in stages):
        changed = ", ".join(f"{key} {value}" for key, value in model.items() if key != "preset")
        named = f"DeepSeek-V3 architecture, preset {model.get('preset', '?')}"
        words.insert(0, named + (f" ({changed})" if changed else ""))
    return " · ".join(words)


def _tiles(facts: RunFacts) -> str:
    tiles = []
    for rows in _headline(facts):
        first, last = rows[0], _last_taught(facts, rows)
        before = _percent(first["pass_at_1"], 0) if last is not first else ""
        detail = " → ".join(dict.fromkeys(str(row.get("model", "")) for row in (first, last)))
        if isinstance(last.get("temperature"), int | float):
            detail += f", T\u00a0{last['temperature']:g}"
        task = " ".join(str(last[key]) for key in ("task", "language") if last.get(key))
        tiles.append(page.tile(f"pass@1, {task}", _percent(last["pass_at_1"], 0), detail, before))
    for stage in facts.stages:
        finals = [series.values[-1] for name, series in stage.series.items() if name.startswith("val/bpb/")]
        numbers = [value for value in finals if isinstance(value, int | float)]
        if numbers:
            mean = sum(numbers) / len(numbers)
            tiles.append(page.tile("bits per byte", f"{mean:.2f}", f"held-out, {len(numbers)} domains, {stage.name}"))
            break
    trained = sum(max((max(series.tokens) for series in stage.series.values()), default=0) for stage in facts.stages)
    if trained:
        tiles.append(page.tile("tokens trained on", show_tokens(trained), "all stages"))
    minutes = facts.seconds / 60
    tiles.append(page.tile("wall time", f"{minutes:.1f} min", f"{len(facts.stages)} stages, restarts included"))
    return "".join(tiles)


def _cost(facts: RunFacts) -> str:
    if not facts.stages:
        return ""
    longest = max(stage.seconds for stage in facts.stages) or 1.0
    rows = []
    for stage in facts.stages:
        mark = "" if stage.finished else ' <span class="pill off">unfinished</span>'
        bar = f'<div class="meter strong"><b style="width:{100 * stage.seconds / longest:.1f}%"></b></div>'
        told = page.text(_summary(stage))
        kind = page.text(stage.kind) if stage.kind != stage.name else ""
        minutes, told = f"{stage.seconds / 60:.1f}", f'<span class="told">{told}</span>'
        rows.append([page.text(stage.name) + mark, kind, bar, minutes, told])
    rows.append(["<b>all</b>", "", "", f"<b>{facts.seconds / 60:.1f}</b>", page.text(show_seconds(facts.seconds))])
    return page.table(["stage", "kind", "", "minutes", "what came of it"], rows, numeric=[3], kind="cost")


def _summary(stage: StageFacts) -> str:
    """The plain facts of a stage's summary in one line."""
    told = []
    for key, value in stage.summary.items():
        if isinstance(value, bool | str):
            told.append(f"{key.replace('_', ' ')} {value}")
        elif isinstance(value, int | float):
            told.append(f"{key.replace('_', ' ')} {short(value)}")
    return ", ".join(told)


def _headline(facts: RunFacts) -> list[list[dict[str, Any]]]:
    """At most two comparisons of the same task under the first way of sampling: its rows, model by model."""
    tables = list(by_sampling(controls.main_line(facts)).values())
    return [list(rows.values()) for rows in tables[0].values()][:2] if tables else []


def _last_taught(facts: RunFacts, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last model that learnt by reward and comes from the first one; without such, the last of all."""
    by_name = {stage.name: stage for stage in facts.stages}

    def comes_from(name: str, first: str) -> bool:
        for _ in facts.stages:  # so that a circle in a recipe ends too
            if name not in by_name or name == first:
                break
            name = by_name[name].source
        return name == first

    first = str(rows[0].get("model", ""))
    for row in reversed(rows[1:]):
        name = str(row.get("model", ""))
        if name in by_name and by_name[name].kind == "rl" and comes_from(name, first):
            return row
    return rows[-1]


def _stages(facts: RunFacts) -> str:
    tables = stagetable.html(facts, controls.main_line(facts))
    searched = [contamination.summary(stage.contamination) for stage in facts.stages if stage.contamination]
    return tables + "".join(f'<p class="missing">{page.text(words)}.</p>' for words in searched) if tables else ""


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def _curves(facts: RunFacts) -> str:
    drawn = curves.curves(facts)
    others = curves.not_drawn(facts)
    if drawn and others:
        drawn += f'<p class="missing">{page.text("Also in metrics.jsonl: " + ", ".join(others))}.</p>'
    return drawn


def _conformance(facts: RunFacts) -> str:
    if not facts.conformance:
        return ""
    rows = []
    for row in facts.conformance:
        pill = '<span class="pill on">on</span>' if row.get("on") else '<span class="pill off">off</span>'
        rows.append([pill, *(page.text(row.get(key, "")) for key in ("item", "section", "paper", "here"))])
    return page.table(["", "item", "section", "in the paper", "here"], rows, kind="conformance")


def _recipe(facts: RunFacts) -> str:
    root = facts.root
    commands = [f"bessemer run {root}/recipe.toml --out {root}", f"bessemer chat {root}", f"bessemer report {root}"]
    return page.block("\n".join(commands)) + page.fold(
        "recipe.toml, every default written out", page.block(facts.recipe_text)
    )


SECTIONS = (
    Section("stages", "Stage by stage", _stages, "no results.json in a stage",
            "Problems never trained on. Small figures and whiskers: 95 % intervals. Bold: the best of its line."),
    Section("learning", "Watching it learn", learning.html, "no rl/ metrics",
            "Where noisy: faint as measured, bold smoothed."),
    Section("rollouts", "Rollouts", stories.rollouts, "no rollouts.jsonl in a stage",
            "What the model answered while it learned: one prompt at several moments where the run asked it again."),
    Section("controls", "Controls", controls.html, "no stage beside another one with another reward",
            "The same start and the same problems, paid otherwise: what they gain too was not learnt from the task."),
    Section("formats", "Number formats", formats.html, "no two pre-trainings that differ by number format alone"),
    Section("long", "Long context", longcontext.html, "no long.json in a stage",
            "Text never trained on, sentences with keys never trained on; greedy answers, counted when exact."),
    Section("curves", "Training", _curves, "no lines in metrics.jsonl",
            "Where noisy: faint as measured, bold smoothed."),
    Section("experts", "Expert load", curves.expert_loads, "no moe/load metrics",
            "Each row is an expert, time runs to the right. Grey is an even share of the tokens."),
    Section("samples", "Samples", stories.samples, "no samples.md in a stage"),
    Section("cost", "What it cost", _cost, "no stage has begun"),
    Section("conformance", "The paper's recipe, here", _conformance, "no conformance.json"),
    Section("recipe", "Do it again", _recipe, "no recipe.toml"),
)  # fmt: skip
