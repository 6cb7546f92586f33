"""The command `bessemer rehearse`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


def rehearse(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NxDEVICE", help="Devices, such as 2048xH800.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Leave out the stages after this one.")] = None,
    processes: Annotated[
        int, typer.Option(min=2, max=8, help="The most processes at a time. With 8, three axes run together.")
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(metavar="NAME", help="Writes NAME.html and NAME.json. Default: rehearsal-RECIPE-CLUSTER."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="CERTIFICATE", help="Say whether recipe and code are still the certified ones."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rehearse a run before the cluster: a miniature of it on processes here, the full size computed, and what neither
    proves. Ends with 1 if the certificate refuses the run."""
    from bessemer.addons.plan.rehearsal import certificate

    if check is not None:
        if cluster or set_ or until or out:
            raise UserError("--check reads a certificate; leave out --cluster, --set, --until and --out")
        found = certificate.check(check, recipe)
        if as_json:
            print_json({"holds": not found, "reasons": found})
        else:
            print("\n".join(f"no: {reason}" for reason in found) or "yes: recipe and code are the certified ones")
        sys.exit(1 if found else 0)
    if recipe is None or cluster is None:
        missing = "a recipe" if recipe is None else "--cluster, such as 2048xH800"
        raise UserError(f"nothing to rehearse; name {missing}, or --check CERTIFICATE")
    _rehearse(recipe, cluster, set_ or [], until, processes, out, as_json)


def _rehearse(
    recipe: str, cluster: str, overrides: list[str], until: str | None, processes: int, out: Path | None, as_json: bool
) -> None:  # fmt: skip
    from bessemer.addons.plan.commands import write_page
    from bessemer.addons.plan.hardware import parse_cluster
    from bessemer.addons.plan.rehearsal import certificate, page
    from bessemer.escape import escaped_json

    spec = parse_cluster(cluster)
    before = signal.signal(signal.SIGTERM, _stopped)  # so that the processes are ended
    try:
        facts = certificate.certify(
            recipe, overrides, spec, processes, lambda text: print(text, file=sys.stderr, flush=True), until
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    name = out or Path(f"rehearsal-{facts['name']}-{facts['cluster']}")
    for ending, text in ((".json", escaped_json(json.dumps(facts, indent=1)) + "\n"), (".html", page.document(facts))):
        write_page(name.with_name(name.name + ending), text)
    if as_json:
        print_json(facts)
    else:
        print(page.describe(facts))
        print(f"\n{name}.html and {name}.json")
    sys.exit(0 if facts["verdict"] == certificate.PASSED else 1)


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
