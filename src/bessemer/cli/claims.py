"""`bessemer claims`: published claims about DeepSeek-V3 and R1, each with its evidence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, app, print_json, write_page
from bessemer.errors import UserError


@app.command()
def claims(
    only: Annotated[str | None, typer.Option(metavar="IDS", help="Some claims, such as L6,M7.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="The claims and their ids; computes nothing.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page to write. Default: claims.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a popular account says of DeepSeek-R1: 119 claims, computed, audited, or open, on one page.

    Exit status 1: a published figure is not what arithmetic gives."""
    from bessemer.claims import registry

    if list_ and only is not None:
        raise UserError("--only has no effect on --list; leave it out")
    if out is not None and (list_ or as_json or only is not None):
        other = "--list" if list_ else "--json" if as_json else "--only"
        raise UserError(f"--out has no effect with {other}, which writes no page; leave one of them out")
    if list_:
        known = registry.claims()
        print_json({name: one.model_dump() for name, one in known.items()}) if as_json else print(registry.listing())
        return
    names = list(registry.claims()) if only is None else registry.chosen(only.split(","))
    from bessemer.claims import cards

    made = cards.make(names)
    if as_json:
        print_json({"rules": registry.rules_hash(), "claims": [card.facts() for card in made]})
    else:
        print(cards.describe(made))
    if not as_json and only is None:
        from bessemer.claims import page

        path = out or Path("claims.html")
        write_page(path, page.document(made))
        print(path)
    if wrong := [f"{card.name} ({label})" for card in made for label in card.wrong_equalities]:
        print(f"arithmetic does not give: {'; '.join(wrong)}", file=sys.stderr)
        raise typer.Exit(1)
