"""The report card's HTML: small pieces, each escaping what it is given.

Every piece takes plain text and returns HTML. What a model wrote is hostile: it goes through `text`, which escapes
markup, shows control characters instead of obeying them, and cuts what is too long. The page carries one script, ours
(`card.js`), and a policy that forbids loading anything and running any script but the one with its hash.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib import resources

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
LONGEST = 4000  # characters of one completion that are shown


def text(value: object) -> str:
    """Any value as safe HTML text."""
    return html.escape(str(value).replace("\r\n", "\n").translate(_CONTROLS), quote=True)


def block(value: object) -> str:
    """Model output: as it is, line by line, cut when too long."""
    whole = str(value)
    cut = f"\n… {len(whole) - LONGEST:,} more characters" if len(whole) > LONGEST else ""
    return f"<pre>{text(whole[:LONGEST] + cut)}</pre>"


def document(title: str, body: str) -> str:
    css, script = (
        resources.files("bessemer.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("card.css", "card.js")
    )
    policy = _POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{text(title)}</title>\n'
        f"<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return f'<section id="{anchor}">\n<h2>{text(title)}</h2>\n{lead}\n{body}\n</section>'


def tile(label: str, value: str, detail: str = "", before: str = "") -> str:
    """A headline figure; with `before` it reads "before -> value"."""
    old = f'<span class="before">{text(before)}</span><span class="arrow">→</span>' if before else ""
    return (
        f'<div class="tile"><div class="label">{text(label)}</div><div class="value">{old}{text(value)}</div>'
        f'<div class="detail">{text(detail)}</div></div>'
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), kind: str = "") -> str:
    """Rows of cells that are HTML already; `numeric` columns are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="n"' if place in numeric else "" for place in range(len(row))]
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    head = cells("th", [text(heading) for heading in headings])
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def meter(share: float, interval: tuple[float, float] | None, strong: bool) -> str:
    """A bar from 0 to 1 with its interval as a whisker."""

    def percent(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value)):.2f}%"

    whisker = ""
    if interval is not None:
        low, high = interval
        whisker = f'<i style="left:{percent(low)};width:{percent(high - low)}"></i>'
    return f'<div class="meter{" strong" if strong else ""}"><b style="width:{percent(share)}"></b>{whisker}</div>'


def chart(title: str, unit: str, svg: str, legend: Sequence[tuple[str, str, str]] = (), last: str = "") -> str:
    """A drawing with its names: `legend` holds (colour name, label, last value)."""
    names = "".join(
        f'<li><span style="background:var(--{colour})"></span>{text(label)}<em>{text(value)}</em></li>'
        for colour, label, value in legend
    )
    names = f'<ul class="legend">{names}</ul>' if names else ""
    last = f'<span class="last">{text(last)}</span>' if last else ""
    return (
        f'<figure class="chart"><figcaption><span class="title">{text(title)}</span>{last}'
        f'<span class="unit">{text(unit)}</span></figcaption>{svg}{names}</figure>'
    )


def fold(summary: str, body: str, opened: bool = False) -> str:
    """Something to open; `summary` is HTML."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{body}</details>"
