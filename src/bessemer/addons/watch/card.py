"""The report card of a run: one self-contained HTML file, made only from the run directory.

`write(root)` reads the facts and writes `report.html` into the run directory, atomically. SECTIONS lists what is on the
page: each section is a function from facts to HTML, "" if the run has nothing for it; such sections are named in one
line at the end.

What the model wrote is there as samples of each stage, and as answers to the same prompts during training
(`transcripts.py`).
"""

import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.addons.evals import contamination
from bessemer.addons.evals.tables import stage_tables
from bessemer.addons.watch import comparisons, page, panels, transcripts, why_text
from bessemer.addons.watch.charts import short
from bessemer.addons.watch.facts import RunFacts, StageFacts, read
from bessemer.addons.watch.page import Html
from bessemer.addons.watch.transcripts import cut, spread
from bessemer.config.units import show_seconds, show_tokens
from bessemer.runs.files import explained, write_atomic

Sample = tuple[str, str]
"""Heading and text of a sample in samples.md."""

_SAMPLES = 8  # shown per stage with one prompt, spread from first to last
_PER_PROMPT, _SAMPLED = 5, 4  # samples shown of each of several prompts, and the number of these

CONFORMANCE_STATES = ("as published", "scaled", "adapted", "off")
"""How closely a run follows an item of the papers, closest first; `addons/plan/conformance.py` decides which."""


def samples(facts: RunFacts) -> Html:
    """The samples of each stage, prompt by prompt, spread from first to last; "" if no stage left any."""
    parts = []
    for stage in facts.stages:
        prompts = _by_prompt(stage.samples)
        shown = [spread(lines, _PER_PROMPT if len(prompts) > 1 else _SAMPLES) for lines in prompts[:_SAMPLED]]
        if shown:
            count = f"{len(stage.samples)} samples" if len(stage.samples) != 1 else "1 sample"
            count += f" of {len(prompts)} prompts" if len(prompts) > 1 else ""
            number = sum(map(len, shown))
            parts.append(page.heading(stage.name, count + (f", {number} shown" if number < len(stage.samples) else "")))
        for at, lines in enumerate(shown):
            if len(shown) > 1:
                parts.append(page.paragraph(f"Prompt {at + 1}: {_opening(lines)}", "lead"))
            parts += [
                page.fold(title, page.block(text), opened=i in (0, len(lines) - 1))
                for i, (title, text) in enumerate(lines)
            ]
    return page.join(*parts)


def _by_prompt(lines: list[Sample]) -> list[list[Sample]]:
    """The samples of each prompt. Every stage asks its prompts in one order, so those at the same place of a step
    belong together; steps with one sample each have one prompt."""
    steps: dict[str, list[Sample]] = {}
    for line in lines:
        steps.setdefault(line[0].split(" · ")[0], []).append(line)
    if len(steps) < 2:
        return [lines] if lines else []
    groups: dict[int, list[Sample]] = {}
    for step in steps.values():
        for i, line in enumerate(step):
            groups.setdefault(i, []).append(line)
    return list(groups.values())


def _opening(lines: list[Sample]) -> str:
    """The words that all texts of a prompt begin with: the prompt."""
    texts = [text for _, text in lines]
    pairs = zip(min(texts), max(texts), strict=False)  # what the first and the last of an order share, all share
    shared = "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) if len(texts) > 1 else ""
    return cut(" ".join(shared.split()), 160) or "…"


@dataclass(frozen=True)
class PageSection:
    """One section of the page."""

    anchor: str
    title: str
    body: Callable[[RunFacts], Html]
    needs: str
    """What a run without this section lacks; "" if that is not worth mentioning."""
    lead: str = ""


def write(root: Path) -> Path:
    """Make `report.html` in the run directory `root`; return its path."""
    path = root / "report.html"
    html = render(read(root))
    with explained(path):
        write_atomic(path, html)
    return path


def summary(root: Path) -> tuple[Path, str]:
    """The path of the report, which it writes, and the run's tables for a terminal."""
    return write(root), table(root)


def table(root: Path) -> str:
    """The tables of a run for a terminal: stages, controls, formats, long contexts, and a problem before and after RL;
    "" when it has none of them."""
    facts = read(root)
    main = comparisons.stage_table_text(comparisons.main_rows(facts))
    sections = (text(facts) for text in (comparisons.controls_text, comparisons.formats_text, comparisons.long_text))
    return "\n\n".join(filter(None, (main, *sections, transcripts.before_and_after(facts))))


def render(facts: RunFacts) -> str:
    parts, anchors, missing = [], [], []
    for section in SECTIONS:
        if body := section.body(facts):
            parts.append(page.section(section.anchor, section.title, body, section.lead))
            anchors.append(f'<a href="#{section.anchor}">{page.text(section.title)}</a>')
        elif section.needs:
            missing.append(f"{section.title.lower()} ({section.needs})")
    if missing:
        words = f"Left out because the run recorded nothing for it: {'; '.join(missing)}."
        parts.append(page.paragraph(words, "missing"))
    name = str(facts.recipe.get("name", facts.root.name))
    nav = Html(f"<nav>{''.join(anchors)}</nav>")
    date = time.strftime("%Y-%m-%d %H:%M")
    foot = Html(f"<footer>bessemer {page.text(__version__)} · written {date} from {page.text(facts.root)}</footer>")
    return page.document(f"{name} · bessemer", page.join(_head(facts, name), nav, *parts, foot), names=facts.names)


def _head(facts: RunFacts, name: str) -> Html:
    stages = " → ".join(stage.name for stage in facts.stages) or "no stage has started"
    words = [_origin(facts.recipe), stages, f"seed {facts.recipe.get('seed', 0)}"]
    if facts.finished_at:
        words.append(time.strftime("%Y-%m-%d", time.localtime(facts.finished_at)))
    finished = {stage.name for stage in facts.stages if stage.finished}
    unfinished = [str(table["name"]) for table in facts.recipe.get("stage", []) if table.get("name") not in finished]
    note = page.paragraph(f"Not finished yet: {', '.join(unfinished)}.", "note") if unfinished else ""
    return Html(
        f'<header><div class="brand">Bessemer report</div><h1>{page.text(name)}</h1>'
        f"{page.paragraph(' · '.join(words), 'sub')}{note}{page.tiles(_tiles(facts))}</header>"
    )


def _origin(recipe: dict[str, Any]) -> str:
    """Where the models of a recipe come from: imported, or of the DeepSeek-V3 architecture."""
    model, stages = recipe.get("model", {}), recipe.get("stage", [])
    words = [f"imported: {table['model']}" for table in stages if table.get("kind") == "import" and "model" in table]
    if not words or any(table.get("kind") == "pretrain" and "corpus" not in table for table in stages):
        changed = ", ".join(f"{key} {value}" for key, value in model.items() if key != "preset")
        named = f"DeepSeek-V3 architecture, preset {model.get('preset', '?')}"
        words.insert(0, named + (f" ({changed})" if changed else ""))
    return " · ".join(words)


def _tiles(facts: RunFacts) -> list[Html]:
    tiles = []
    for what, scores, temperature in _headline(facts):
        first, last = next(iter(scores)), facts.recipe.get("main")
        last = last if last in scores else [*scores][-1]
        baseline = scores[first] if last != first else ""
        detail = " → ".join(dict.fromkeys((first, last)))
        if isinstance(temperature, int | float):
            detail += f", T\u00a0{temperature:g}"
        tiles.append(page.tile(what, scores[last], detail, baseline))
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
    minutes = f"{facts.seconds / 60:.1f} min"
    return [*tiles, page.tile("wall time", minutes, f"{len(facts.stages)} stages, restarts included")]


def _cost(facts: RunFacts) -> Html:
    if not facts.stages:
        return Html()
    longest = max(stage.seconds for stage in facts.stages) or 1.0
    rows = []
    for stage in facts.stages:
        name = page.join(stage.name, "" if stage.finished else page.pill("unfinished"), by=" ")
        kind = stage.kind if stage.kind != stage.name else ""
        result = Html(f'<span class="result">{page.text(_summary(stage))}</span>')
        bar = page.meter(stage.seconds / longest, strong=True)
        rows.append([name, kind, bar, f"{stage.seconds / 60:.1f}", result])
    total = Html(f"<b>{facts.seconds / 60:.1f}</b>")
    rows.append([Html("<b>all</b>"), "", "", total, show_seconds(facts.seconds)])
    return page.table(["stage", "kind", "", "minutes", "result"], rows, numeric=[3], kind="cost")


def _summary(stage: StageFacts) -> str:
    """The scalar values of a stage's summary in one line."""
    words = []
    for key, value in stage.summary.items():
        if isinstance(value, bool | str):
            words.append(f"{key.replace('_', ' ')} {value}")
        elif isinstance(value, int | float):
            words.append(f"{key.replace('_', ' ')} {short(value)}")
    return ", ".join(words)


def _headline(facts: RunFacts) -> list[tuple[str, dict[str, str], Any]]:
    """(what, {model: its figure}, temperature) with the first sampling settings: the run's own reward, if it has one,
    and pass@1 of one or two tasks; of more tasks, their mean and the first."""
    rows = comparisons.main_rows(facts)
    if not (tables := stage_tables(rows)):
        return []
    lines = [line for _, lines in tables[0].accuracy for line in lines]
    if len(lines) > 2:
        lines.insert(0, replace(tables[0].overall[0], label=f"mean of {len(lines)} rows"))
    shown = [(f"pass@1, {line.label}", line) for line in lines[:2]]
    shown = [(line.label, line) for line in tables[0].overall if line.measure.key == "reward"] + shown
    parts = []
    for what, line in shown:
        scores = {
            model: line.measure.figure(cell.value, 0) + (" %" if line.measure.share else "")
            for model, cell in zip(tables[0].models, line.cells, strict=True)
            if cell
        }
        if scores:
            parts.append((what, scores, rows[0].get("temperature")))
    return parts


def _stages(facts: RunFacts) -> Html:
    if not (tables := comparisons.stage_table_html(facts, comparisons.main_rows(facts))):
        return tables
    searches = [contamination.summary(stage.contamination) for stage in facts.stages if stage.contamination]
    return page.join(tables, *(page.paragraph(f"{words}.", "missing") for words in searches))


def _learning(facts: RunFacts) -> Html:
    return panels.learning(facts, comparisons.control_names(facts))


def _conformance(facts: RunFacts) -> Html:
    """Every item of the papers' recipes, as published and in this run."""
    if not facts.conformance:
        return Html()
    rows = [
        [
            page.pill(state := row["state"], state not in ("adapted", "off")),
            *(row.get(key, "") for key in ("item", "section", "paper", "here")),
        ]
        for row in facts.conformance
    ]
    count = page.paragraph(f"{conformance_summary(facts.conformance)}.", "lead")
    return page.join(count, page.table(["", "item", "section", "in the paper", "here"], rows, kind="conformance"))


def _recipe(facts: RunFacts) -> Html:
    root = shlex.quote(str(facts.root))
    commands = [f"bessemer run {root}/recipe.toml --out {root}", f"bessemer chat {root}", f"bessemer report {root}"]
    recipe = page.fold("recipe.toml with every default", page.block(facts.recipe_text))
    return page.join(page.block("\n".join(commands)), recipe)


SECTIONS = (
    PageSection("stages", "Stage by stage", _stages, "no results.json in a stage",
            "Problems never trained on. Small figures and whiskers: 95 % intervals. Bold: the best in its row."),
    PageSection("rollouts", "Rollouts", transcripts.rollouts, "no rollouts.jsonl in a stage",
            "The model's answers as it learned, at several moments, for prompts that the run asked repeatedly. "
            "After a line with equations: whether they hold."),
    PageSection("learning", "Watching it learn", _learning, "no rl/ metrics",
            "Noisy curves: faint as measured, bold smoothed."),
    PageSection("why", "Why the reward rose", why_text.html, "",
            "Answers before and after: what became more frequent, and what that earns among answers to one problem. "
            "Associations, not experiments."),
    PageSection("controls", "Controls", comparisons.controls_html, "no stages that differ by reward",
            "The same start and problems with a different reward: a control's gains are not learnt from the task."),
    PageSection("formats", "Number formats", comparisons.formats_html,
            "no two pre-training stages that differ only in number format"),
    PageSection("long", "Long context", comparisons.long_html, "no long.json in a stage",
            "Text and keys never trained on; greedy answers, which must be exact."),
    PageSection("curves", "Training", panels.training, "no lines in metrics.jsonl",
            "Noisy curves: faint as measured, bold smoothed."),
    PageSection("experts", "Expert load", panels.expert_loads, "no moe/load metrics",
            "Each row is an expert; time runs to the right. Grey is an even share of the tokens."),
    PageSection("samples", "Samples", samples, "no samples.md in a stage"),
    PageSection("cost", "What it cost", _cost, "no stage has started"),
    PageSection("conformance", "The papers' recipe in this run", _conformance, "no conformance.json"),
    PageSection("recipe", "Run it again", _recipe, "no recipe.toml"),
)  # fmt: skip


def conformance_summary(rows: list[dict[str, Any]]) -> str:
    """ "24 of 44 items of the papers' recipe as published, 9 scaled, 7 adapted, 4 off"."""
    counts = Counter(row["state"] for row in rows)
    first, *others = CONFORMANCE_STATES
    return ", ".join(
        [f"{counts[first]} of {len(rows)} items of the papers' recipe {first}", *(f"{counts[s]} {s}" for s in others)]
    )
