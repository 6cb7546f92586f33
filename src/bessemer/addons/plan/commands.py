"""What a run costs and whether it fits, how a recipe differs from the papers', what this machine can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.common import AsJson, print_json
from bessemer.cli.runs import print_table
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.addons.distributed.timeline import Costs
    from bessemer.addons.plan.other_models import OtherModel
    from bessemer.config.recipe import Recipe


def plan(
    words: Annotated[list[str] | None, typer.Argument(metavar="[MODEL|RECIPE]", help="A preset such as v3, or a "
                                                      "recipe.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NxDEVICE", help="Devices, such as 2048xH800.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="layout.pp, layout.ep, "
                    "layout.dp, layout.cp, node, schedule, tokens, batch, seq, micro_rows, precision, optimizer, "
                    "moments, mtp, packed, routing, recompute, stages, in_step, usd, model.KEY; takes several; may be "
                    "repeated. With --here as in bessemer run.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the best layout that fits.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Measure this machine, some seconds for each way the "
                                       "stages train, and predict the run.")] = False,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="The run whose finished stages correct the "
                                             "times. Default with --here: runs/NAME.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a page, with its Gantt chart.")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="NAME", help="Show only a pipeline schedule: gpipe, 1f1b, "
                                                 "interleaved, zb1p, zbv, dualpipe, dualpipe-v.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", metavar="P", help="With --schedule: pipeline ranks. "
                                           "Default: 4.")] = None,
    micro: Annotated[int | None, typer.Option("--micro", metavar="M", help="With --schedule: micro-batches per step. "
                                              "Default: 8.")] = None,
    costs: Annotated[str | None, typer.Option(metavar="F,I,W[,F&B]", help="With --schedule: times of a stage's "
                                              "forward, input gradients, weight gradients, and of an overlapped pair "
                                              "(without it: the sum). Default: 1,1,1.")] = None,
    svg: Annotated[Path | None, typer.Option(help="With --schedule: write its chart to this file.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Predict what a run would cost and whether it fits."""
    names = [word for word in words or [] if "=" not in word]
    settings = [*(set_ or []), *(word for word in words or [] if "=" in word)]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)}: one model or recipe at a time")
    target = names[0] if names else None
    targets = [name for name, value in (("--schedule", schedule), ("a model or recipe", target)) if value]
    if len(targets) != 1:
        targeted = f"both {' and '.join(targets)}" if targets else "nothing"
        raise UserError(f"{targeted} to plan; give a model or recipe, or --schedule NAME")
    costing: dict[str, object] = {"--cluster": cluster, "--search": search, "--html": html}
    idle = {} if target and not here else costing
    idle |= {} if target else {"--run": run}
    idle |= {} if target else {"--here": here, "--set": settings}
    timed: dict[str, object] = {"--pp": pp, "--micro": micro, "--costs": costs, "--svg": svg}
    idle |= {} if schedule else {name: value is not None for name, value in timed.items()}
    if ignored := [name for name, value in idle.items() if value]:
        mend = f"use --set layout.pp={pp}" if ignored[0] == "--pp" and target and not here else "leave it out"
        raise UserError(f"{ignored[0]} has no effect on {'--here' if target and here else targets[0]}; {mend}")
    if schedule is not None:
        _schedule(schedule, pp, micro, costs, svg, as_json)
    elif target is not None and here:
        _here(target, settings, run, as_json)
    elif target is not None:
        _cost(target, cluster, settings, search, run, html, as_json)


def conformance(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or a run.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a recipe with the papers', item by item; run nothing."""
    from rich.table import Table
    from rich.text import Text

    from bessemer.addons.plan.conformance import rows
    from bessemer.addons.watch.card import CONFORMANCE_STATES, conformance_summary
    from bessemer.config import places
    from bessemer.config.recipe import Recipe

    loaded = Recipe.load(recipe, set_ or [])
    with places.of_recipe(loaded.folder):
        items = rows(loaded)
    if as_json:
        print_json(items)
        return
    table = Table("", "item", "in the paper", "here", title=conformance_summary(items), title_justify="left")
    for row in sorted(items, key=lambda row: CONFORMANCE_STATES.index(row["state"])):
        table.add_row(*(Text(row[key]) for key in ("state", "item", "paper", "here")))
    print_table(table)


def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Where runs would be stored.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Measure this machine: what it can run, and what will be slow on it. Under torchrun, all machines are
    measured together: which rank is where, and how fast they reach each other."""
    from bessemer.addons.distributed import links
    from bessemer.addons.distributed import many_processes as many
    from bessemer.addons.plan import doctor as machine

    if not many.started():
        facts: dict[str, Any] | None = machine.examine(folder)
    elif facts := many.examine(lambda: machine.examine(folder)):
        facts["notes"] += machine.as_notes(links.notes(facts["links"]))
    if facts is None:
        return
    if as_json:
        print_json(facts)
    else:
        print(machine.describe(facts))


def _cost(
    target: str, on: str | None, settings: list[str], search: bool, run: Path | None, html: Path | None, as_json: bool
) -> None:  # fmt: skip
    from dataclasses import replace

    from bessemer.addons.plan import inference, other_plan, plan_config, record, render, stage_memory
    from bessemer.addons.plan.cost import ideas as worth
    from bessemer.addons.plan.cost import plan_run
    from bessemer.addons.plan.hardware import parse_cluster
    from bessemer.addons.plan.search import search as best_layouts
    from bessemer.addons.plan.stage_costs import AS_IF, stage_costs
    from bessemer.config import places

    options = plan_config.parse(settings)
    if (other := plan_config.other_model(target, options)) is not None:
        _cost_of_other(*other, on, settings, search, run, html, as_json)
        return
    name, cfg, config, recipe = plan_config.resolve(target, options)
    if on is None:
        raise UserError("name the devices to plan for: --cluster 2048xH800 (or --here, for this machine)")
    devices = parse_cluster(on)
    rl_only = recipe is not None and config.tokens is None and any(stage.kind == "rl" for stage in recipe.stages)
    tokens = 0.0 if rl_only else plan_config.tokens_of(config, name)
    result = None
    search = search or bool(not options.has_layout and devices.size % config.ranks)  # the layout is for another cluster
    if search:
        config = config.for_search(options)
    if search or (not config.has_layout and devices.size > 1):
        result = best_layouts(cfg, config, devices)
        setup = result.candidates[0].setup
    else:
        setup = plan_config.setup(config, cfg, devices)
    price = config.usd or devices.device.usd_hour
    run_plan = plan_run(cfg, setup, tokens, config.rows if config.batch and len(config.batch) > 1 else None, price)
    ideas = worth(run_plan)
    stages, served = stage_costs(run_plan, recipe), inference.cheapest_unit(setup.shape, setup.device, setup.fp8)
    offer = None if served is None else served.facts(price)
    seconds = {cost.name: 3600 * cost.gpu_hours / devices.size for cost in stages}
    run_plan = replace(run_plan, interval=record.of_run(seconds, record.measured(run), run_plan.interval))
    needs, faults = {}, []
    if recipe is not None:
        with places.of_recipe(recipe.folder):
            needs = stage_memory.of_stages(recipe, devices.size, devices.device)
            faults = [text for need in needs.values() if (text := stage_memory.fault(recipe, need, devices.device))]
    as_if = recipe is not None and plan_config.planned(recipe) is None
    title = name + AS_IF * as_if
    if html is not None:
        from bessemer.addons.plan import plan_page

        write_page(html, plan_page.document(title, run_plan, ideas))
    if as_json:
        facts = run_plan.facts() | {"name": name, "without": ideas, "serving": offer}
        if recipe is not None:
            facts["stage_memory"] = {name: need.facts() for name, need in needs.items()}
            facts |= {"as_if_model": as_if, "stages": [cost.facts(run_plan.interval) for cost in stages]}
        if result is not None:
            runners_up = [candidate.facts() for candidate in result.candidates[1:]]
            facts |= {"considered": result.considered, "runners_up": runners_up, "refused": dict(result.rejected)}
        print_json(facts)
        return
    if result is not None:
        print(render.describe_search(result) + "\n")
    print(render.describe(title, run_plan, ideas, stages, offer))
    if recipe is not None:
        print("\n" + "\n".join([*other_plan.describe_memory(needs.values(), devices), *faults]))
    if html is not None:
        print(html)


def _cost_of_other(
    recipe: Recipe, model: OtherModel, on: str | None, settings: list[str], search: bool, run: Path | None,
    html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """The plan of a recipe whose model is of another family."""
    from bessemer.addons.plan.hardware import parse_cluster
    from bessemer.addons.plan.other_plan import plan_other

    if unused := [name for name, value in (("--set", settings), ("--search", search), ("--html", html)) if value]:
        raise UserError(f"{unused[0]} has no effect on a model of another family ({model.family}); leave it out")
    if on is None:
        raise UserError("name the devices to plan for: --cluster 8xH100")
    planned = plan_other(recipe, model, parse_cluster(on), run)
    print_json(planned.facts()) if as_json else print(planned.describe())


def _here(target: str, overrides: list[str], run: Path | None, as_json: bool) -> None:
    from bessemer.addons.plan.estimate import estimate
    from bessemer.config import places
    from bessemer.config.recipe import Recipe

    recipe = Recipe.load(target, overrides)
    with places.of_recipe(recipe.folder):
        prediction = estimate(recipe, run=run or Path("runs") / recipe.name)
    if as_json:
        print_json(prediction.facts())
    else:
        print(prediction.describe())


def _schedule(
    name: str, pp: int | None, micro: int | None, costs: str | None, svg: Path | None, as_json: bool
) -> None:  # fmt: skip
    from bessemer.addons.distributed.schedules import schedule as table_of
    from bessemer.addons.distributed.timeline import as_svg, as_text, label, simulate, summary

    table = table_of(name, 4 if pp is None else pp, 8 if micro is None else micro)
    timeline = simulate(table, _costs("1,1,1" if costs is None else costs))
    if svg is not None:
        write_page(svg, as_svg(table, timeline))
    if as_json:
        spans = [[[label(span.step), span.start, span.end] for span in row] for row in timeline.spans]
        facts = {"schedule": table.name, "ranks": table.ranks, "stages": table.stages, "micro_batches": table.micro,
                 "makespan": timeline.makespan, "idle": timeline.idle, "live": timeline.live,
                 "overlapped_pairs": timeline.pairs, "steps": spans}  # fmt: skip
        print(json.dumps(facts))
        return
    print(f"{as_text(timeline)}\n\n{summary(table, timeline)}")
    if svg is not None:
        print(svg)


def _costs(text: str) -> Costs:
    from bessemer.addons.distributed.timeline import Costs

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (3, 4) or not all(0 < value < float("inf") for value in values):
        raise UserError(f"--costs {text}: write three or four positive numbers, such as 1,1,1 or 1,1,1,2.5")
    return Costs(*values)


def whatif(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="The recipe of a run, or one derived from it; or the run.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="A change; may be repeated.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="The existing run. Default: the run given, or runs/NAME.")
    ] = None,
    usd: Annotated[float | None, typer.Option(min=0.0, help="Price of this machine per hour, in dollars.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages of a run a change would rerun, with time, memory and price. Nothing is run or moved."""
    from bessemer.addons.plan import whatif as fates
    from bessemer.config.builtin import run_of
    from bessemer.config.recipe import Recipe
    from bessemer.runs.directory import run_dir

    loaded = Recipe.load(recipe, set_ or [])
    root = run_of(recipe) or Path("runs") / loaded.name if run is None else run_dir(run)
    answer = fates.whatif(loaded, root, usd)
    if as_json:
        print_json(answer.facts())
    else:
        print(answer.describe())


def write_page(path: Path, text: str) -> None:
    """Writes a page or chart where the user wants it. Replaces only an older page or chart."""
    from bessemer.runs.files import explained, write_atomic

    with explained(path):
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the file to write")
        if path.exists():
            with open(path, "rb") as file:
                begins = file.read(4)
            if begins != text.encode()[:4]:
                raise UserError(f"{path} exists and is something else; name another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path.parent} is a file, not a folder; name another file to write") from None
        write_atomic(path, text)
