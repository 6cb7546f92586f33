"""A study as text for the terminal and as one HTML page: the verdict, every rule with its interval, the controls, the
arms, and every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from bessemer.addons.evals.intervals import Interval, over_seeds
from bessemer.addons.study.file import RuleTable
from bessemer.addons.study.report import StudyReport
from bessemer.addons.study.rule import FEWEST, Comparison, power
from bessemer.addons.study.seeds import fewest
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html

STYLES = """
.scale { display: block; position: relative; height: 18px; min-width: 180px; background: var(--soft); }
.scale span { position: absolute; top: 0; bottom: 0; }
.scale .zero { border-left: 1px solid var(--muted); }
.scale .bound { border-left: 2px dashed var(--accent); }
.scale .zone { background: var(--accent-soft); }
.scale .reach { top: 8px; bottom: 8px; background: var(--ink); }
.scale .at { width: 7px; height: 7px; margin: 5.5px 0 0 -3.5px; border-radius: 50%; background: var(--ink); }
.holds, .does-not-hold, .cannot-tell { white-space: nowrap; }
.holds { color: var(--good); } .does-not-hold { color: var(--bad); } .cannot-tell { color: var(--muted); }
"""


def number(value: float | None) -> str:
    return "–" if value is None else "unbounded" if math.isinf(value) else f"{value:.4g}"


def shown(interval: Interval | None) -> str:
    """ "0.214 (0.181 to 0.247)"; a single value has no interval."""
    if interval is None:
        return "–"
    if math.isinf(interval.high):
        return number(interval.middle)
    return f"{number(interval.middle)} ({number(interval.low)} to {number(interval.high)})"


def asked(rule: RuleTable) -> str:
    less = f" - {rule.second}" if rule.second else ""
    return f"{rule.first}{less} {rule.side} {rule.by:g}"


def needed(comparison: Comparison) -> str:
    """How many seeds the seen spread asks for."""
    if comparison.chance is None:
        return "–"
    wanted = "more than 1000" if comparison.seeds_needed is None else str(comparison.seeds_needed)
    return f"{wanted} (power of {len(comparison.values)}: {comparison.chance:.0%})"


_HEADINGS = ("", "asked", "mean and interval", "verdict", "seeds needed")


def _rows(comparisons: Sequence[Comparison], kind: str) -> list[list[str]]:
    return [
        [f"{kind}: {c.rule.name}", asked(c.rule), shown(c.interval), str(c.verdict), needed(c)] for c in comparisons
    ]


def arms(report: StudyReport) -> list[list[str]]:
    """Rows of (arm and figure, its values' mean and interval, seeds, failed runs)."""
    rows = []
    for arm, by_seed in report.values.items():
        failed = sum(result["arm"] == arm for result in report.failed)
        names = list(dict.fromkeys(name for figures in by_seed.values() for name in figures))
        for name in names or [""]:
            values = [figures[name] for figures in by_seed.values() if name in figures]
            interval = over_seeds(values, report.study.table.confidence) if values else None
            rows.append([f"{arm} {name}".rstrip(), shown(interval), str(len(values)), str(failed)])
    return rows


def text(report: StudyReport) -> str:
    """The study for a terminal."""
    table = report.study.table
    figures = page.grid([["arm, figure", "mean and interval", "seeds", "failed"], *arms(report)])
    rules = page.grid([list(_HEADINGS), *_rows(report.rules, "rule"), *_rows(report.controls, "control")])
    said = f"{table.name}: {report.verdict}: {table.claim}"
    why = "".join(f"\n  {reason}" for reason in report.why)
    failed = "".join(f"\n  {r['arm']}-{r['seed']}: {r['failed']}" for r in report.failed)
    runs = f"{len(report.results)} of {report.runs} runs have ended, {len(report.failed)} failed{failed}"
    return f"{figures}\n\n{rules}\n\n{runs}\n{said}{why}"


def _scale(comparison: Comparison, low: float, high: float) -> Html:
    """A comparison's interval on the scale from `low` to `high`, with its bound and 0."""
    rule, interval = comparison.rule, comparison.interval

    def at(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    def mark(kind: str, value: float) -> str:
        return f'<span class="{kind}" style="left:{at(value):.2f}%"></span>'

    def span(kind: str, start: float, end: float) -> str:
        return f'<span class="{kind}" style="left:{at(start):.2f}%;width:{at(end) - at(start):.2f}%"></span>'

    drawn = span("zone", -rule.by, rule.by) if rule.side == "within" else mark("bound", rule.by)
    drawn += mark("zero", 0.0)
    if interval is not None:
        drawn += span("reach", interval.low, interval.high) + mark("at", interval.middle)
    return Html(f'<span class="scale" aria-hidden="true">{drawn}</span>')


def _ends(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    marks = [0.0]
    for comparison in comparisons:
        marks += [comparison.rule.by, -comparison.rule.by if comparison.rule.side == "within" else 0.0]
        marks += [end for end in comparison.interval or () if math.isfinite(end)]
    low, high = min(marks), max(marks)
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


def _verdict(name: str) -> Html:
    return Html(f'<b class="{name.replace(" ", "-")}">{page.text(name)}</b>')


def _comparisons(comparisons: Sequence[Comparison]) -> Html:
    low, high = _ends(comparisons)
    rows = []
    for c in comparisons:
        values = ", ".join(f"seed {seed}: {value:+.4g}" for seed, value in c.values.items())
        asks = Html(f"{page.text(asked(c.rule))}<small>expected {c.rule.expected:g}</small>")
        result = Html(f"{page.text(shown(c.interval))}<small>{page.text(values)}</small>")
        doubts = Html(f"{_verdict(c.verdict)}<small>{page.text('; '.join(c.doubts))}</small>")
        rows.append([c.rule.name, asks, _scale(c, low, high), result, doubts, needed(c)])
    return page.table(("", "asked", "", "mean and interval", "verdict", "seeds needed"), rows)


def document(report: StudyReport) -> str:
    """The page."""
    table, facts = report.study.table, report.facts()
    tiles = page.tiles([
        page.tile("verdict", report.verdict, table.claim),
        page.tile("runs", f"{len(report.results)} of {report.runs}", f"{len(report.failed)} failed"),
        page.tile("seeds", str(len(table.seeds)), f"{table.confidence:.0%} intervals over seeds"),
        page.tile("rule", report.study.hash[:12], "SHA-256 of what was fixed before the first run"),
    ])  # fmt: skip
    why = page.join(*(page.paragraph(reason, "note") for reason in report.why))
    figures = page.table(("arm, figure", "mean and interval", "seeds", "failed"), arms(report), numeric=(1, 2, 3))
    about = page.table(("arm", "what it changes"), [[name, arm.about] for name, arm in table.arm.items()])
    runs = [
        [f"{r['arm']}-{r['seed']}", ", ".join(f"{k} {v:.4g}" for k, v in r["figures"].items()) or r["failed"],
         f"{r['seconds'] / 60:.1f}", str(r["attempts"])]
        for r in report.results
    ]  # fmt: skip
    body = [
        Html(f'<header><div class="brand">study</div><h1>{page.text(table.name)}</h1></header>'),
        page.paragraph(table.question, "lead"),
        tiles,
        why,
        page.section("rules", "Rules", _comparisons(report.rules), "Differences within each seed. Dashed: the bound."),
        page.section("controls", "Controls", _comparisons(report.controls), "Each must hold, or the study is blind.")
        if report.controls
        else "",
        page.section("arms", "Arms", page.join(figures, about)),
        page.section("runs", "Runs", page.table(("run", "figures", "minutes", "attempts"), runs, numeric=(2, 3))),
        Html(f"<footer>{page.text(', '.join(map(str, facts['machine'].values())))}</footer>"),
    ]
    return page.document(table.name, page.join(*body), STYLES)


def before(report: StudyReport, minutes: dict[str, float | None], at_once: int) -> str:
    """What --dry-run says: arms, runs, minutes, and the power of every rule."""
    table = report.study.table
    n = len(table.seeds)
    rows = [["", "runs", "minutes each", "what it changes"]]
    rows += [
        [name, str(n), number(took), table.arm[name].about if name in table.arm else f"up to {table.shared}"]
        for name, took in minutes.items()
    ]
    known = [took for took in minutes.values() if took is not None]
    total = sum(known) * n / at_once
    budget = "" if table.minutes is None else f", budget {table.minutes:g}"
    lines = [page.grid(rows), f"{n * len(minutes)} runs, about {total:.0f} minutes, {at_once} at a time{budget}", ""]
    chances = [["", "asked", f"power with {n} seeds"]]
    for rule in report.study.comparisons:
        if rule.spread is None:
            spreads = [s * abs(rule.expected - rule.by) / 50 for s in range(200, 0, -1)]
            bears = next((s for s in spreads if power(rule, n, s, table.confidence) >= table.power), None)
            said = f"{table.power:.0%} up to a spread of {number(bears)}" if bears else "too few seeds at any spread"
        else:
            chance = power(rule, n, rule.spread, table.confidence)
            more = fewest(partial(_chance, rule, rule.spread, table.confidence), table.power, FEWEST)
            said = f"{chance:.0%} at a spread of {rule.spread:g}; {table.power:.0%} takes {more} seeds"
        chances.append([rule.name, asked(rule), said])
    return "\n".join([*lines, page.grid(chances), f"rule {report.study.hash[:16]}"])


def _chance(rule: RuleTable, spread: float, confidence: float, n: int) -> float:
    return power(rule, n, spread, confidence)
