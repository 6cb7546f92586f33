"""Commands about training text: build it, check it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, app, print_json

data = typer.Typer(help="Training text: from raw sources to clean, tokenised shards.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A data recipe, such as recipes/data.toml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override table.key or SOURCE.key; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to put it. Default: data/NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read, filter, deduplicate, decontaminate and tokenise; what is done already is not done again."""
    from bessemer.curate import report
    from bessemer.pipeline import curation

    loaded = curation.load(recipe, set_ or [])
    folder = out or Path("data") / loaded.name
    try:
        facts = curation.build(loaded, folder)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print_json(facts | {"directory": str(folder)})
        return
    print(report.text(facts))
    print(f"\nall of it: {folder / 'report.json'}; in a training recipe:")
    parts = ", ".join(f'{part} = "shards:{folder / part}"' for part in facts["parts"])
    print(f"parts = {{ {parts} }}")


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What data build made.")],
    as_json: AsJson = False,
) -> None:
    """Compare every file of a build with its checksum."""
    from bessemer.curate.output import check as compare

    found = compare(folder)
    if as_json:
        print_json(found)
        return
    parts = ", ".join(f"{name} {part['tokens']:,} tokens" for name, part in found["parts"].items())
    print(f"{folder} is as it was written: {found['documents']} document files; {parts}")
