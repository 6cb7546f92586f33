"""The command that places the experts of a model on a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from bessemer.addons.families.options import Model, NoVerify, Seed, read_prompts
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


def placement(
    model: Model,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that the experts are spread over.")],
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Expert replicas in total. Default: experts, rounded up to a multiple of GPUs."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that hold the GPUs.")] = 1,
    task: Annotated[list[str] | None, typer.Option(help="Traffic: problems of a task; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="Traffic: prompts, in the format of bessemer generate.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 32,
    loads: Annotated[Path | None, typer.Option(help="File that stores the loads between calls.")] = None,
    seed: Seed = 0,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Place the experts on GPUs by their measured loads (EPLB), and print the gain."""
    from bessemer.addons.distributed import expert_placement as placing
    from bessemer.addons.families.named_models import model_dir
    from bessemer.hf.deepseek import read_config

    if not task and not file:
        raise UserError("no traffic: name a task with --task (such as countdown), or a file of prompts with --file")
    folder = model_dir(model)
    if replicas is None:
        replicas = -(-read_config(folder).n_routed_experts // gpus) * gpus
    facts = placing.report(
        folder, replicas=replicas, gpus=gpus, nodes=nodes, prompts=read_prompts(file) if file else (),
        names=task or (), problems=problems, seed=seed, loads_file=loads,
    )  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        print(placing.describe(facts))
