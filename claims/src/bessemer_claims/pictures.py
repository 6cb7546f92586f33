"""The pictures of the claims page: an interval beside what the claim needs and its control, and V3's bill at the rates
of other runs. Every mark also stands beside the picture as a number."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.addons.evals.intervals import Interval
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims import phrases, planned
from bessemer_claims.phrases import COLON, word
from bessemer_claims.verdict import PartFinding


def measured(claim: str, finding: PartFinding, others: Sequence[PartFinding] = ()) -> Html:
    """A part's interval and its threshold, on one scale with `others`; the paper's figure is a diamond, the positive
    control grey."""
    assert finding.part is not None and finding.value is not None, "only parts of a rule have pictures"
    reach = _reach(finding)
    threshold, margin = float(finding.part.threshold or 0), float(finding.part.margin or 0)
    marks = [mark for part in (finding, *others) for mark in _marks(part)]
    low, high = min(marks), max(marks)
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def span(kind: str, of: Interval) -> str:
        width = 100 * (of.high - of.low) / (high - low)
        return f'<span class="{kind}" style="left:{at(of.low)};width:{width:.2f}%"></span>'

    zone = ""
    if finding.part.side == "equal":
        zone = span("zone", Interval(threshold, threshold - margin, threshold + margin))
    control = ""
    if finding.control is not None:
        control = span("reach control", finding.control)
        control += f'<span class="at control" style="left:{at(finding.control.middle)}"></span>'
    paper = "" if finding.part.paper is None else f'<span class="paper" style="left:{at(finding.part.paper)}"></span>'
    drawn = (
        f'{zone}<span class="none" style="left:{at(threshold)}"></span>'
        f'<span class="threshold" style="left:{at(phrases.bound(finding.part))}"></span>{control}{span("reach", reach)}'
        f'<span class="at" style="left:{at(reach.middle)}"></span>{paper}'
    )
    figures = f'<b class="figures"><i class="key"></i>{phrases.value(claim, finding)}</b>'
    return Html(
        f'<div class="gap"><span>{phrases.plain(claim, finding)}</span>{figures}'
        f'<span class="scale" aria-hidden="true">{drawn}</span>{_legend(claim, finding)}</div>'
    )


def _legend(claim: str, finding: PartFinding) -> Html:
    """The numbers of the other marks, and what follows."""
    part = finding.part
    assert part is not None, "only parts of a rule have pictures"
    lines = [("threshold", phrases.needed(claim, finding))]
    if finding.control is not None:
        lines.append(("control", phrases.controlled(claim, finding)))
    if part.paper is not None:
        amount = phrases.both(phrases.amount(claim, finding, part.paper))
        lines.append(("paper", page.join(word("published_effect"), amount, by=COLON)))
    conclusion = page.join(
        phrases.outcome(claim, finding), phrases.role(finding), phrases.runs(finding) if finding.seeds else "", by=" · "
    )
    marked = "".join(f'<small><i class="key {kind}"></i>{text}</small>' for kind, text in lines)
    return Html(f"{marked}<small>{conclusion}</small>")


def _reach(finding: PartFinding) -> Interval:
    """The interval of a part; for a single run, its value."""
    assert finding.value is not None, "a picture needs a value"
    return finding.interval or Interval(finding.value, finding.value, finding.value)


def _marks(finding: PartFinding) -> list[float]:
    """Everything that the picture of a part must hold."""
    assert finding.part is not None, "only parts of a rule have intervals"
    threshold, margin = float(finding.part.threshold or 0), float(finding.part.margin or 0)
    marks = [*_reach(finding), threshold, phrases.bound(finding.part), 0.0]
    marks += [threshold - margin, threshold + margin] if finding.part.side == "equal" else []
    marks += [finding.part.paper] if finding.part.paper is not None else []
    return marks + ([*finding.control] if finding.control is not None else [])


def cost() -> Html:
    """A row for every run: where its rate puts V3's bill."""
    view, floor = planned.outside_view(), planned.floor()
    inside = planned.inside_view()
    own, *others = planned.reference()
    top = 1.06 * max(view["high"], *(run["v3_hours"] for run in planned.reference()))

    def at(hours: float) -> str:
        return f"left:{100 * hours / top:.2f}%"

    def row(name: str, hours: float, mark: str, band: str = "", kind: str = "") -> str:
        amount = word(
            "bill",
            hours=hours,
            wan=100 * hours,
            dollars=planned.DOLLARS * hours,
            dollars_wan=100 * planned.DOLLARS * hours,
            days=hours * 1e6 / planned.GPUS / 24,
        )
        line = f'<span class="line" style="{at(view["published"])}"></span>'
        dot = f'<span class="dot {mark}" style="{at(hours)}"></span>'
        return (
            f'<div class="run {kind}"><span>{page.text(name)}</span><span class="track" aria-hidden="true">{band}{line}'
            f'{dot}</span><span class="amount">{amount}</span></div>'
        )

    def band(low: float, high: float) -> str:
        return f'<span class="band" style="{at(low)};width:{100 * (high - low) / top:.2f}%"></span>'

    def planner(name: str, low: float, middle: float, high: float) -> str:
        title = word(name, low=low, high=high, low_wan=100 * low, high_wan=100 * high)
        return row(title, middle, "middle", band(low, high))

    rows = [
        row(own["name"], own["v3_hours"], "own", kind="own"),
        *(row(run["name"], run["v3_hours"], "same", kind="own") for run in others if run["same_network"]),
        planner("cost_planner", view["low"], view["median"], view["high"]),
        planner("cost_draws", inside.low, inside.median, inside.high),
        *(row(run["name"], run["v3_hours"], "") for run in others if not run["same_network"]),
        row(word("cost_floor"), floor, "middle"),
    ]
    note = word("cost_note", dollars=planned.DOLLARS, gpus=planned.GPUS)
    return Html(f'<div class="runs">{"".join(rows)}</div>{page.paragraph(note, "unit")}')
