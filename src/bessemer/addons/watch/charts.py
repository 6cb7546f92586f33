"""Chart panels: curves and heat maps as inline SVG, drawn by matplotlib and coloured by the page.

Colours in a drawing are placeholders that become CSS variables, so that one SVG serves light and dark themes; text
stays text in the page's font. Titles, units and legends are HTML (`page.chart`), so that escaping is in one place.

Lines differ by hue and by dash: the hues are distinct to colour-blind readers, the dashes in black and white. For
`plot.js`, which shows values and zooms, a drawing names its lines (`data-line`: "3", or "3 raw" as measured) and says
where its axes lie and what they span (`data-axes`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bessemer.addons.watch import page

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

SERIES = 6  # hues, shades and dashes
_PLACEHOLDERS = {"ink": "#010201", "muted": "#010202", "line": "#010203"}
_PLACEHOLDERS |= {f"s{number}": f"#0103{number:02x}" for number in range(1, SERIES + 1)}
_PLACEHOLDERS |= {f"r{number}": f"#0104{number:02x}" for number in range(1, SERIES + 1)}
_MOST_POINTS = 240  # per line: more than the chart has pixels to show
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2.4)),
                            (0, (4, 1.4, 1.2, 1.4, 1.2, 1.4)))  # fmt: skip
_EDGE, _PAD = 3.0, 5.0  # points between a drawing's edge and its labels, and between these and the axes
_SMOOTH_FROM = 60  # number of points from which a line is drawn faint, with its smoothed form on top
# idle, even, overloaded; the middle is a grey that is visible on white and on black
_SHARE_COLOURS = LinearSegmentedColormap.from_list("share", ["#e2885c", "#e6dfc8", "#6fb58a"])
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#2a6fb0", "#b9bab6", "#d4641c"])


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    """"": the only line of a chart, with its first and last values in the chart's heading instead of a legend."""
    x: Sequence[float]
    y: Sequence[float]


def panel(
    title: str, unit: str, curves: Sequence[Curve], salt: str, *, ordered: bool = False, floor: float | None = None,
    ceiling: float | None = None, log: bool = False, names: Sequence[str] = (),
) -> page.Html:  # fmt: skip
    """A chart panel of `curves`, with the ends of the drawn lines in the legend. `ordered`: shades of one hue; the rest
    as for `lines`."""
    looks = _looks(len(curves), ordered)
    drawn = [(curve.x, curve.y, *look) for curve, look in zip(curves, looks, strict=True)]
    svg = lines(drawn, salt, floor, ceiling, log, names)
    if not curves[0].label:
        return page.chart(title, unit, svg, last=_first_to_last(curves[0].y))
    legend = [(*look, curve.label, short(_ends(curve.y)[1])) for curve, look in zip(curves, looks, strict=True)]
    return page.chart(title, unit, svg, legend)


def _looks(count: int, ordered: bool) -> list[tuple[str, int]]:
    """CSS variable names and numbers of dashes for `count` lines: hues, with dashes that shift at every round of them
    (in `watch.js`, too), or shades of one hue for ordered things such as layers."""
    if not ordered:
        return [(f"s{at % SERIES + 1}", (at + at // SERIES) % SERIES + 1) for at in range(count)]
    return [(f"r{1 + round(at * (SERIES - 1) / max(1, count - 1))}", at % SERIES + 1) for at in range(count)]


def lines(
    curves: Sequence[tuple[Sequence[float], Sequence[float], str, int]], salt: str, floor: float | None = None,
    ceiling: float | None = None, log: bool = False, names: Sequence[str] = (),
) -> str:  # fmt: skip
    """SVG of curves (x, y, colour name, number of the dash). `salt` makes the ids of an SVG unique on its page.
    `names`: labels of x = 0, 1, 2 and so on."""
    with rc_context(_style(salt)):
        figure, axes = _canvas(2.3)
        for i, (x, y, colour, dash) in enumerate(curves):
            x, y = _thin(x, y)
            smooth, ink = _smooth(y), _PLACEHOLDERS[colour]
            if len(y) >= _SMOOTH_FROM:
                axes.plot(x, y, color=ink, gid=f"line-{i} raw", linewidth=0.8, alpha=0.28)
            mark = "o" if len(y) == 1 else None
            style = _DASHES[dash - 1]
            axes.plot(x, smooth, color=ink, gid=f"line-{i}", linewidth=1.7, marker=mark, markersize=4, linestyle=style)
        if log and _is_wide(value for _, y, *_ in curves for value in y):
            axes.set_yscale("log")
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
            low, high = axes.get_ylim()
            axes.set_ylim(low if floor is None else min(floor, low), high if ceiling is None else max(ceiling, high))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.grid(axis="y", color=_PLACEHOLDERS["line"], linewidth=0.7)
        _finish(axes)
        if names:
            axes.set_xticks(range(len(names)), names)
        return _svg(figure, axes, readable=True, named=bool(names))


def heat(x: Sequence[float], loads: Sequence[Sequence[float]], salt: str) -> str:
    """SVG of experts (down) over time (across); 1 is an even share, 2 and above have the full colour."""
    with rc_context(_style(salt)):
        figure, axes = _canvas(1.7)
        step = max(1, len(loads) // _MOST_POINTS)
        shares = []
        for row in loads[::step]:
            mean = sum(row) / len(row)
            shares.append([value / mean if mean else 0.0 for value in row])
        across = list(zip(*shares, strict=True))  # experts by time
        extent = (min(x), max(x) if max(x) > min(x) else min(x) + 1, len(across) - 0.5, -0.5)
        axes.imshow(
            across, aspect="auto", cmap=_LOAD_COLOURS, vmin=0.0, vmax=2.0, extent=extent, interpolation="nearest"
        )
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _finish(axes)
        return _svg(figure, axes)


def cells(shares: Sequence[Sequence[float]], down: Sequence[str], across: Sequence[str], salt: str) -> str:
    """SVG of shares between 0 and 1, one row of cells for each of `down`, with the percentage in every cell."""
    with rc_context(_style(salt)):
        figure, axes = _canvas(0.7 + 0.24 * len(down))
        axes.imshow(shares, aspect="auto", cmap=_SHARE_COLOURS, vmin=0.0, vmax=1.0, interpolation="nearest")
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color="#10140f", fontsize=8)
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(down)), down)
        axes.tick_params(colors=_PLACEHOLDERS["muted"], length=0, pad=_PAD)
        axes.spines[:].set_visible(False)
        return _svg(figure, axes)


def _is_wide(values: Iterable[float]) -> bool:
    """Whether numbers span enough, and are positive enough, for a logarithmic axis to help."""
    values = list(values)
    return min(values) > 0 and max(values) / min(values) > 30


def short(value: float) -> str:
    """1234567 -> "1.23M"; for axes and headlines."""
    size = abs(float(f"{value:.3g}"))
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= unit:
            return f"{value / unit:.3g}{suffix}"
    if size != 0 and size < 0.001:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.3g}"


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of groups of points, so that a long run leaves a small file."""
    size = -(-len(y) // _MOST_POINTS)
    if size == 1:
        return list(x), list(y)
    groups = range(0, len(y), size)
    return (
        [sum(x[start : start + size]) / len(x[start : start + size]) for start in groups],
        [sum(y[start : start + size]) / len(y[start : start + size]) for start in groups],
    )


def _smooth(y: list[float]) -> list[float]:
    """A centred mean over about a thirtieth of the line; short lines are returned unchanged."""
    if len(y) < _SMOOTH_FROM:
        return y
    reach = max(1, len(y) // 60)
    windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
    return [sum(window) / len(window) for window in windows]


def _first_to_last(y: Sequence[float]) -> str:
    first, last = map(short, _ends(y))
    return last if len(y) == 1 else f"{first} → {last}"


def _ends(y: Sequence[float]) -> tuple[float, float]:
    """Both ends of a line, as drawn if it is smoothed, else as a mean of a few points: one noisy step must not stand
    beside a smooth line as its value."""
    if len(y) >= _SMOOTH_FROM:
        smooth = _smooth(_thin(y, y)[1])
        return smooth[0], smooth[-1]
    few = max(1, len(y) // 10)
    return sum(y[:few]) / few, sum(y[-few:]) / few


def _style(salt: str) -> dict[RcKeyType, Any]:
    return {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.linewidth": 0.7, "path.simplify": True}


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, height))
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    return figure, axes


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(colors=_PLACEHOLDERS["muted"], length=0, pad=_PAD)
    axes.margins(x=0.01)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_PLACEHOLDERS["line"])


def _place(figure: Figure, axes: Axes) -> None:
    """Margins that hold the tick labels. matplotlib's own layouts draw a figure once more to measure them, which takes
    as long as the drawing; these labels are short, and the page's font is not the one that would be measured."""
    width, height = (72 * float(inches) for inches in figure.get_size_inches())
    size = float(rcParams["font.size"])
    across, down = ([0.6 * size * len(label) for label in _labels(axis)] for axis in (axes.xaxis, axes.yaxis))
    figure.subplots_adjust(
        left=(_EDGE + max(_PAD + max(down), across[0] / 2)) / width,
        right=1 - (_EDGE + across[-1] / 2) / width,
        bottom=(_EDGE + _PAD + size) / height,
        top=1 - (_EDGE + size / 2) / height,
    )


def _labels(axis: Axis) -> list[str]:
    """The tick labels within the view; a single empty one if there are none."""
    low, high = sorted(axis.get_view_interval())
    places = [location for location in axis.get_majorticklocs() if low <= location <= high]
    return list(axis.get_major_formatter().format_ticks(places)) or [""]


def _svg(figure: Figure, axes: Axes, readable: bool = False, named: bool = False) -> str:
    """The drawing. `readable`: `plot.js` can read and zoom its lines; `named`: x has names."""
    _place(figure, axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue, whose DOCTYPE names a remote file
    for name, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    if readable:
        text = re.sub(r'id="line-(\d+(?: raw)?)"', r'data-line="\1"', text)
        text = text.replace("<svg ", f"<svg data-axes='{json.dumps(_extent(figure, axes) | {'named': named})}' ", 1)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _extent(figure: Figure, axes: Axes) -> dict[str, Any]:
    """For both axes: [first, last] in the drawing's units, and the values there. y runs downwards in a drawing."""
    width, height = 72 * figure.get_size_inches()
    box = axes.get_position()
    return {
        "x": [round(width * box.x0, 3), round(width * box.x1, 3), *map(float, axes.get_xlim())],
        "y": [round(height * (1 - box.y0), 3), round(height * (1 - box.y1), 3), *map(float, axes.get_ylim())],
        "log": axes.get_yscale() == "log",
    }
