"""The verb that answers before anything runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, app
from bessemer.errors import UserError


@app.command()
def plan(
    schedule: Annotated[str, typer.Option(metavar="NAME", help="A pipeline schedule: gpipe, 1f1b, interleaved, zb1p, "
                                          "zbv, dualpipe, dualpipe-v.")],
    pp: Annotated[int, typer.Option("--pp", metavar="P", help="Pipeline ranks.")] = 4,
    micro: Annotated[int, typer.Option(metavar="M", help="Micro-batches of a step.")] = 8,
    costs: Annotated[str, typer.Option(metavar="F,I,W[,F&B]", help="Times of a stage's forward, input gradients, "
                                       "weight gradients, and of an overlapped pair (default: the sum).")] = "1,1,1",
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """What a pipeline schedule does, when, and what it leaves idle."""
    from bessemer.parallel import draw
    from bessemer.parallel.schedules import schedule as table_of
    from bessemer.parallel.simulate import simulate
    from bessemer.recipe.disk import explained, write_atomic

    table = table_of(schedule, pp, micro)
    timeline = simulate(table, _costs(costs))
    if svg is not None:
        with explained(svg):
            write_atomic(svg, draw.svg(table, timeline))
    if as_json:
        spans = [[[draw.said(span.step), span.start, span.end] for span in row] for row in timeline.spans]
        facts = {"schedule": table.name, "ranks": table.ranks, "stages": table.stages, "micro_batches": table.micro,
                 "makespan": timeline.makespan, "idle": timeline.idle, "live": timeline.live,
                 "overlapped_pairs": timeline.pairs, "steps": spans}  # fmt: skip
        print(json.dumps(facts))
        return
    print(f"{draw.text(timeline)}\n\n{draw.summary(table, timeline)}")
    if svg is not None:
        print(svg)


def _costs(text: str):
    from bessemer.parallel.simulate import Costs

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (3, 4) or not all(0 < value < float("inf") for value in values):
        raise UserError(f"--costs {text}: write three or four positive numbers, such as 1,1,1 or 1,1,1,2.5")
    return Costs(*values)
