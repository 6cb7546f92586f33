"""`bessemer watch`: a live page of runs, built only from their directories, which it never writes to.

The page requests the state of every run and, when a run has new lines, the curves that are on the screen. Curves are
thinned to what a screen can show, so a hundred thousand lines cost no more than a few hundred. `serve` of a run has the
same page at /watch/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from bessemer.addons.serve import ServeConfig
from bessemer.addons.serve.http import LOOPBACK_HOSTS, UnsignalledServer, add_page, bind
from bessemer.addons.serve.middleware import RequestGuard
from bessemer.addons.serve.protocol import ApiError
from bessemer.addons.serve.run_follower import RunFollower
from bessemer.addons.watch import chinese
from bessemer.addons.watch.curves import LEARNING, LOADS, TRAINING, Panel, label, order
from bessemer.addons.watch.following import Over, StageLines, smoothed, thinned
from bessemer.addons.watch.labels import run_labels
from bessemer.runs.directory import run_dir
from bessemer.runs.metrics import plain

PAGES = (Path(__file__).with_name("watch_page"), Path(__file__).with_name("page"))
"""The page's own files, and those of the chat page that it shares."""
ALARM = ("title", "message", "cause", "advice")
"""The texts of an alarm."""
FIRST = ("Training loss", "Validation", "Expert imbalance", "Gradient norm", "Speed", "Accuracy", "Held-out problems",
         "Reward", "Length", "Entropy")  # fmt: skip
"""Plots shown before the user has chosen."""
MOST_LINES = 12
"""Most lines of one run in a plot; if there are more, evenly spaced ones are shown."""


def watch(runs: Sequence[str | Path], *, port: int = 8100, ready: Callable[[str], None] = print) -> None:
    """Serves the page on the loopback address until a signal ends it. `ready` gets its address; port 0 is a free one.

    Raises UserError if a run does not exist or is named twice, or if the port is taken.
    """
    roots = [run_dir(run) for run in runs]
    followers = [RunFollower(root, name) for root, name in zip(roots, run_labels(roots), strict=True)]
    with bind("127.0.0.1", port) as bound:
        bound.listen(64)
        for follower in followers:
            follower.start()
        ready(f"http://127.0.0.1:{bound.getsockname()[1]}/")
        server_of(followers).run(sockets=[bound])


def server_of(followers: Sequence[RunFollower]) -> UnsignalledServer:
    return UnsignalledServer(
        uvicorn.Config(build(followers), ws="none", lifespan="off", log_level="error", access_log=False,
                       server_header=False, proxy_headers=False, timeout_graceful_shutdown=2)
    )  # fmt: skip


def build(followers: Sequence[RunFollower]) -> FastAPI:
    """The application that serves only this page."""
    app = FastAPI(title="Bessemer", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    app.add_exception_handler(ApiError, refused)
    add_watch(app, followers)
    app.add_middleware(RequestGuard, config=ServeConfig(hosts=LOOPBACK_HOSTS))
    return app


def add_watch(app: FastAPI, followers: Sequence[RunFollower], home: str = "/", chat: str | None = None) -> None:
    """Adds the page at `home`. `chat`: the chat page's address relative to it."""
    add_page(app, *PAGES, home=home)

    def answer(value: dict[str, Any], texts: Iterable[str] = ()) -> Response:
        """Plain JSON whatever a file held: no NaN, and lone surrogates escaped. `texts`: those with a Chinese form."""
        body = json.dumps(plain(value | {"zh": chinese.of_texts(texts)}), allow_nan=False, separators=(",", ":"))
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    @app.get(f"{home}api/state", include_in_schema=False)
    def state() -> Response:
        for follower in followers:
            follower.start()
        runs = [follower.state() for follower in followers]
        names = dict.fromkeys(stage["name"] for run in runs for stage in run["stages"])
        stages = [{"name": name, **_drawn(followers, name)} for name in names]
        shown = [text for stage in stages for panel in stage["panels"] for text in (panel["title"], panel["unit"])]
        shown += [layer["label"] for stage in stages for layer in stage["layers"]]
        shown += [alarm[key] for run in runs for alarm in run["alarms"] for key in ALARM]
        shown += [sentence for run in runs for sentence in run["trouble"]]
        return answer({"runs": runs, "stages": stages, "chat": chat}, shown)

    @app.get(f"{home}api/curves", include_in_schema=False)
    def curves(
        stage: str, panel: str, over: Over = "step", low: float | None = None, high: float | None = None
    ) -> Response:
        bounds = (-math.inf if low is None else low, math.inf if high is None else high)
        lines = []
        for run, follower in enumerate(followers):
            with follower.lock:
                stage_lines = follower.store.stages.get(stage)
                names = _metrics(stage_lines, panel) if stage_lines else []
                measured = [(name, *stage_lines.curve(name, over, *bounds)) for name in names] if stage_lines else []
            lines += [line | {"run": run} for line in map(_line, measured) if line["x"]]
        return answer({"lines": lines}, [line["label"] for line in lines])

    @app.get(f"{home}api/experts", include_in_schema=False)
    def experts(stage: str, layer: str) -> Response:
        maps = []
        for run, follower in enumerate(followers):
            with follower.lock:
                stage_lines = follower.store.stages.get(stage)
                loads = stage_lines.loads.get(LOADS + layer) if stage_lines else None
                if stage_lines and loads and loads.rows:
                    steps = [stage_lines.steps[row] for row in loads.rows]
                    maps.append({"run": run, "steps": steps, "shares": list(loads.shares)})
        return answer({"maps": maps})

    @app.get(f"{home}api/rollouts", include_in_schema=False)
    def rollouts(stage: str, most: int = Query(12, ge=1, le=24)) -> Response:
        rows = []
        for run, follower in enumerate(followers):
            tail = follower.rollouts.get(stage)
            rows += [{"run": run, **line} for line in tail.newest[-most:]] if tail else []
        return answer({"rollouts": rows})


def _drawn(followers: Sequence[RunFollower], stage: str) -> dict[str, Any]:
    """The plots that a stage has numbers for in any run, and the layers that it has expert loads for."""
    numbers: dict[str, None] = {}
    loads: dict[str, None] = {}
    for follower in followers:
        with follower.lock:
            if stage_lines := follower.store.stages.get(stage):
                numbers |= dict.fromkeys(name for name, column in stage_lines.columns.items() if column.rows)
                loads |= dict.fromkeys(name for name, layer in stage_lines.loads.items() if layer.rows)
    layers = [
        {"key": name.removeprefix(LOADS), "label": label(name)}
        for name in sorted(loads, key=order) if name.startswith(LOADS)
    ]  # fmt: skip
    panels = [
        {"key": panel.title, "title": panel.title, "unit": panel.unit, "log": panel.log, "floor": panel.floor,
         "ceiling": panel.ceiling, "ordered": panel.ordered, "first": panel.title in FIRST}
        for panel in {panel.title: panel for panel in TRAINING + LEARNING}.values()
        if any(_belongs_to(name, panel.title) for name in numbers)
    ]  # fmt: skip
    others = sorted(
        name for name in numbers if not any(_belongs_to(name, panel.title) for panel in TRAINING + LEARNING)
    )
    panels += [{"key": name, "title": name, "unit": "", "log": False, "floor": None, "ceiling": None,
                "ordered": False, "first": False} for name in others]  # fmt: skip
    return {"panels": panels, "layers": layers}


def _named(title: str) -> Iterator[Panel]:
    """The panels with this title: training and RL each have a gradient norm."""
    return (panel for panel in TRAINING + LEARNING if panel.title == title)


def _belongs_to(name: str, title: str) -> bool:
    return any(
        name.startswith(metric) if metric.endswith("/") else name == metric
        for panel in _named(title) for metric in panel.metrics
    )  # fmt: skip


def _metrics(lines: StageLines, key: str) -> list[str]:
    """The metrics of a plot that a stage has numbers for, in the order of their lines."""
    measured = [name for name, column in lines.columns.items() if column.rows]
    if key in measured:
        return [key]
    names: list[str] = []
    for panel in _named(key):
        for metric in panel.metrics:
            below = sorted((name for name in measured if name.startswith(metric)), key=order)
            names += below if metric.endswith("/") else [name for name in below if name == metric]
        if panel.most:
            names = sorted(names, key=lambda name: -max(lines.columns[name].values))[: panel.most]
    if len(names) <= MOST_LINES:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]


def _line(curve: tuple[str, list[float], list[float]]) -> dict[str, Any]:
    """One line of a plot: the measured values, the smoothed ones drawn over them if noisy, and the drawn line's end."""
    name, x, y = curve
    faint, bold = thinned(x, y), smoothed(x, y)
    end = bold[1][-1] if bold[1] else y[-1] if y else None
    columns = {"x": (faint[0], 15), "y": (faint[1], 6), "sx": (bold[0], 15), "sy": (bold[1], 6)}
    short = {key: [float(f"{value:.{digits}g}") for value in values] for key, (values, digits) in columns.items()}
    return {"metric": name, "label": label(name), "last": end, "points": len(y), **short}
