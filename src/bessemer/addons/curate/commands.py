"""Commands on training data: build, check and export."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, print_json

data = typer.Typer(
    help="Training data: raw text to tokenised shards, and a run's outputs as data sets.", no_args_is_help=True
)


@data.command()
def build(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A data recipe: a file, or data for the built-in one.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override table.key or SOURCE.key; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory. Default: data/NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read, filter, deduplicate, decontaminate and tokenise; finished jobs are skipped."""
    from bessemer.addons.curate import data_recipe, report
    from bessemer.config import places
    from bessemer.config.builtin import find_recipe
    from bessemer.runs.files import write_atomic

    recipe = find_recipe(recipe, data=True)
    loaded = data_recipe.load(recipe, set_ or [])
    folder = out or Path("data") / loaded.name
    try:
        revisions = folder / places.REVISIONS
        if not (folder / "work").exists() and not revisions.exists():  # sources from the hub may be added later
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(revisions, "{}\n")
        begun = (folder / "work").exists() and not revisions.exists()  # by a version that pinned nothing: leave it so
        with places.of_recipe(recipe.absolute().parent, None if begun else revisions):
            facts = data_recipe.build(loaded, folder)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print_json(facts | {"directory": str(folder)})
        return
    print(report.text(facts))
    print(f"\nfull report: {folder / 'report.json'}; for a training recipe:")
    parts = ", ".join(f'{part} = "shards:{folder / part}"' for part in facts["parts"])
    print(f"parts = {{ {parts} }}")


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of data build.")],
    as_json: AsJson = False,
) -> None:
    """Compare every file of a build with its checksum."""
    from bessemer.addons.curate.output import check as compare

    facts = compare(folder)
    if as_json:
        print_json(facts)
        return
    parts = ", ".join(f"{name} {part['tokens']:,} tokens" for name, part in facts["parts"].items())
    print(f"{folder} is intact: {facts['documents']} document files; {parts}")


@data.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write STAGE-KIND.jsonl.")],
    stage: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this stage; may be repeated. Default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export what a run's stages made as data sets that TRL reads: conversations for SFT, preferences, rollouts."""
    from bessemer.addons.curate.export import export as export_run
    from bessemer.runs.directory import run_dir

    written = export_run(run_dir(run), folder, stage or [])
    if as_json:
        print_json(written)
        return
    for file in written:
        print(f"{file['file']}: {file['records']:,} records of {file['stage']}")
