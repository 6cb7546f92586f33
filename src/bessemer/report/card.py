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
from bessemer.recipe.disk import explained, write_atomic
from bessemer.recipe.values import show_seconds, show_tokens
from bessemer.report import curves, page, stories
from bessemer.report.charts import short
from bessemer.report.facts import RunFacts, StageFacts, read


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
    model = recipe.get("model", {})
    changed = ", ".join(f"{key} {value}" for key, value in model.items() if key != "preset")
    words = [
        f"DeepSeek-V3 architecture, preset {model.get('preset', '?')}" + (f" ({changed})" if changed else ""),
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


def _tiles(facts: RunFacts) -> str:
    tiles = []
    compared = list(_by_task(facts).values())
    for rows in [rows for rows in compared if rows[0].get("temperature") == compared[0][0].get("temperature")][:2]:
        first, last = rows[0], rows[-1]
        before = _percent(first["pass_at_1"], 0) if len(rows) > 1 else ""
        detail = " → ".join(dict.fromkeys(str(row.get("model", "")) for row in (first, last)))
        if "temperature" in last:
            detail += f", T\u00a0{last['temperature']:g}"
        tiles.append(page.tile(f"pass@1, {_task(last)}", _percent(last["pass_at_1"], 0), detail, before))
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


def _by_task(facts: RunFacts) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Evaluation rows that may be compared: same task, language and way of sampling, in the order they were made.

    A model that was evaluated twice (after one stage, and again to compare with the next) counts once, its last row.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in facts.evaluations:
        if isinstance(row.get("pass_at_1"), int | float):
            key = tuple(str(row.get(part, "")) for part in ("task", "language", "samples", "k", "temperature"))
            found.setdefault(key, {})[str(row.get("model", ""))] = row
    return {key: list(rows.values()) for key, rows in found.items()}


def _task(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("task", "language") if row.get(key))


def _evaluation(facts: RunFacts) -> str:
    parts = []
    for rows in _by_task(facts).values():
        samples, k = rows[0].get("samples", 1), rows[0].get("k", rows[0].get("samples", 1))
        lines = []
        for place, row in enumerate(rows):
            interval = _interval(row.get("pass_at_1_interval"))
            after = place == len(rows) - 1 and len(rows) > 1
            rates = [_rate(row, key, rows[0] if after else None) for key in ("pass_at_1", "pass_at_k", "maj_at_k")]
            length = row.get("mean_length")
            lines.append([
                f"<b>{page.text(row.get('model', ''))}</b>" if after else page.text(row.get("model", "")),
                page.meter(row["pass_at_1"], interval, strong=after), *rates,
                f"{length:.1f}" if isinstance(length, int | float) else "–",
            ])  # fmt: skip
        size = f"{rows[0].get('n', '?')} held-out problems, {samples} samples each"
        size += f" at temperature {rows[0]['temperature']:g}" if "temperature" in rows[0] else ""
        heading = f'<h3>{page.text(_task(rows[0]))} <span class="unit">{page.text(size)}</span></h3>'
        headings = ["model", "", "pass@1 %", f"pass@{k} %", f"maj@{k} %", "tokens"]
        parts.append(heading + page.table(headings, lines, numeric=[2, 3, 4, 5], kind="evaluation"))
    return "\n".join(parts)


def _rate(row: dict[str, Any], key: str, before: dict[str, Any] | None) -> str:
    """A rate in percent, the change since `before` beside it, its interval below."""
    if not isinstance(row.get(key), int | float):
        return "–"
    interval = _interval(row.get(f"{key}_interval"))
    between = f"<small>{100 * interval[0]:.1f}–{100 * interval[1]:.1f}</small>" if interval else ""
    change = ""
    if before is not None and isinstance(before.get(key), int | float):
        points = 100 * (row[key] - before[key])
        change = f'<span class="gain{" loss" if points < 0 else ""}">{points:+.1f}</span> '
    return f"{change}<span>{100 * row[key]:.1f}</span>{between}"


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        return float(value[0]), float(value[1])
    return None


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
    Section("evaluation", "Before and after", _evaluation, "no results.json in a stage",
            "Problems never trained on. Bars: pass@1. Whiskers and small figures: 95 % intervals."),
    Section("cost", "What it cost", _cost, "no stage has begun"),
    Section("curves", "Curves", _curves, "no lines in metrics.jsonl", "Where noisy: faint as measured, bold smoothed."),
    Section("experts", "Expert load", curves.expert_loads, "no moe/load metrics",
            "Each row is an expert, time runs to the right. Grey is an even share of the tokens."),
    Section("samples", "Samples", stories.samples, "no samples.md in a stage"),
    Section("rollouts", "Rollouts", stories.rollouts, "no rollouts.jsonl in a stage",
            "What the model answered while it learned: one prompt at several moments where the run asked it again."),
    Section("conformance", "The paper's recipe, here", _conformance, "no conformance.json"),
    Section("recipe", "Do it again", _recipe, "no recipe.toml"),
)  # fmt: skip
