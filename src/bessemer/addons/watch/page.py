"""The HTML of a report: a few generic pieces from which every page is built.

Every piece takes plain text, escapes it and returns `Html`, which the other pieces insert unchanged. Model output is
hostile: `text` escapes its markup and makes control characters visible, and `block` cuts long text. The page has one
script of our own (`_SCRIPTS`) and a policy that forbids loading anything and running any script except the one with its
hash. It is written in English and carries its Chinese, which the browser shows if asked.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import resources

from rich.cells import cell_len

from bessemer.addons.watch import chinese

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"
_SCRIPTS = ("speech/speech.js", "page.js")
"""Run first, and seen by the others."""
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
LONGEST = 4000  # characters of one completion that are shown


class Html(str):
    """Markup. Pieces insert it unchanged, whereas they escape a plain string."""


def text(value: object) -> Html:
    """Any value as safe HTML text."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).replace("\r\n", "\n").translate(_CONTROLS), quote=True))


def join(*parts: str, by: str = "\n") -> Html:
    """The parts that are not empty, one after another."""
    return Html(by.join(text(part) for part in parts if part))


def block(value: object, after: Callable[[str], Html] = lambda line: Html()) -> Html:
    """Model output, verbatim line by line, cut if too long; `after` gives what follows a line."""
    full = str(value).replace("\r\n", "\n")
    cut = f"\n… {len(full) - LONGEST:,} more characters" if len(full) > LONGEST else ""
    lines = "\n".join(text(line) + after(line) for line in (full[:LONGEST] + cut).split("\n"))
    return Html(f"<pre>{lines}</pre>")


def document(title: str, body: str, styles: str = "", script: str = "", names: Collection[str] = ()) -> str:
    """A whole page; `styles` and `script` add to those of this module. `names` have no Chinese, and a body that marks
    Chinese itself is left to it."""

    def read(name: str) -> str:
        return resources.files("bessemer.addons.watch").joinpath(name).read_text(encoding="utf-8")

    shared = "".join(re.sub("^export ", "", read(name), flags=re.M) for name in _SCRIPTS)
    scripts = [read("card.js"), read("plot.js"), *([script] if script else [])]
    script = '"use strict";\n' + shared + "\n".join(f"{{\n{part}}}" for part in scripts)
    policy = _POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    title, body, carried, switch = text(title), text(body), "", ""
    if 'lang="zh' not in body:
        words = chinese.of_page(f"<title>{title}</title>{body}", script)
        shown = {english: said for english, said in words.items() if english not in names}
        carried = f' data-zh="{text(json.dumps(shown, ensure_ascii=False))}"'
        switch = '<button id="language" type="button" hidden></button>\n'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>\n{read('card.css')}{styles}</style>\n</head>\n<body>\n<main{carried}>\n{switch}{body}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, body: str, lead: str = "") -> Html:
    return Html(
        f'<section id="{anchor}">\n<h2>{text(title)}</h2>\n{paragraph(lead, "lead") if lead else ""}\n{text(body)}\n'
        "</section>"
    )


def heading(title: str, unit: str = "") -> Html:
    """The heading of a panel or of a group of panels, such as a stage."""
    unit = Html(f' <span class="unit">{text(unit)}</span>') if unit else ""
    return Html(f"<h3>{text(title)}{unit}</h3>")


def paragraph(body: str, kind: str) -> Html:
    return Html(f'<p class="{kind}">{text(body)}</p>')


def tile(label: str, value: str, detail: str = "", before: str = "") -> Html:
    """A headline figure; with `before` it reads "before -> value"."""
    old = f'<span class="before">{text(before)}</span><span class="arrow">→</span>' if before else ""
    return Html(
        f'<div class="tile"><div class="label">{text(label)}</div><div class="value">{old}{text(value)}</div>'
        f'<div class="detail">{text(detail)}</div></div>'
    )


def tiles(panels: Iterable[str]) -> Html:
    return Html(f'<div class="tiles">{"".join(panels)}</div>')


def pill(word: str, on: bool = False) -> Html:
    return Html(f'<span class="pill {"on" if on else "off"}">{text(word)}</span>')


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str] | str],
    numeric: Sequence[int] = (),
    kind: str = "",
    row_headings: bool = False,
) -> Html:
    """A table panel. A row that is a string is the heading of the rows below it; `numeric` columns are right-aligned;
    `row_headings`: the first column names the rows and the others share the width."""

    def cell(name: str, column: int, value: object) -> str:
        mark = ' class="n"' if column in numeric else ""
        name = "td" if name == "th" and not value else name  # an empty heading names nothing
        return f"<{name}{mark}>{text(value)}</{name}>"

    body = []
    for row in rows:
        if isinstance(row, str):
            body.append(f'<tr class="group"><th colspan="{len(headings)}"><span>{text(row)}</span></th></tr>')
            continue
        first = [f'<th scope="row">{text(row[0])}</th>'] if row_headings else []
        cells = first + [cell("td", i, value) for i, value in enumerate(row)][len(first) :]
        body.append(f"<tr>{''.join(cells)}</tr>")
    if row_headings:
        n_values = len(headings) - 1
        columns = (
            f'<colgroup><col style="width:22%"><col span="{n_values}" style="width:{78 / n_values:.1f}%"></colgroup>'
        )
        head = "<td></td>" + "".join(f'<th scope="col">{text(value)}</th>' for value in headings[1:])
    else:
        columns, head = "", "".join(cell("th", i, value) for i, value in enumerate(headings))
    body_html = "\n".join(body)
    inner = f"{columns}<thead><tr>{head}</tr></thead>\n<tbody>{body_html}</tbody>"
    return Html(f'<div class="scroll"><table class="{kind}">{inner}</table></div>')


def meter(share: float, interval: tuple[float, float] | None = None, strong: bool = False) -> Html:
    """A bar from 0 to 1 with its interval as a whisker."""

    def percent(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value)):.2f}%"

    whisker = ""
    if interval is not None:
        low, high = interval
        whisker = f'<i style="left:{percent(low)};width:{percent(high - low)}"></i>'
    kind = "meter strong" if strong else "meter"
    return Html(f'<div class="{kind}"><b style="width:{percent(share)}"></b>{whisker}</div>')


def chart(title: str, unit: str, svg: str, legend: Sequence[tuple[str, int, str, str]] = (), last: str = "") -> Html:
    """A chart panel: `legend` holds (colour name, number of the dash, label, last value) of every line."""
    names = "".join(
        f'<li><span class="k{dash}" style="color:var(--{colour})"></span><b>{text(label)}</b>'
        f"<em>{text(value)}</em></li>"
        for colour, dash, label, value in legend
    )
    names = f'<ul class="legend">{names}</ul>' if names else ""
    last = f'<span class="last">{text(last)}</span>' if last else ""
    return Html(
        f'<figure class="chart"><figcaption><span class="title">{text(title)}</span>{last}'
        f'<span class="unit">{text(unit)}</span></figcaption>{svg}{names}</figure>'
    )


def charts(panels: Iterable[str]) -> Html:
    """A grid of chart panels; "" without any."""
    inner = "".join(panels)
    return Html(f'<div class="charts">{inner}</div>' if inner else "")


def fold(summary: str, body: str, opened: bool = False) -> Html:
    """A panel that opens with a click."""
    return Html(f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{text(body)}</details>")


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column left-aligned, the others right-aligned. A Chinese character takes two
    columns."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - cell_len(cell))
            padded.append(blank + cell if column else cell + blank)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
