"""Commands on recipes: list the built-in ones, begin one of your own, explain every key."""

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with the package: bessemer run NAME."""
    from bessemer.addons.plan.own_recipe import purpose
    from bessemer.config.builtin import builtin_recipes
    from bessemer.config.table import nearest

    training, data = builtin_recipes(), builtin_recipes(data=True)
    all_recipes = training | data
    if name is not None:
        if name not in all_recipes:
            raise UserError(f'no built-in recipe "{name}"; {nearest(name, list(all_recipes))}')
        text = all_recipes[name].read_text("utf-8")
        print_json({"name": name, "file": str(all_recipes[name]), "text": text}) if as_json else print(text, end="")
        return
    commands = {**dict.fromkeys(training, "bessemer run"), **dict.fromkeys(data, "bessemer data build")}
    if as_json:
        facts = {
            recipe: {
                "command": f"{command} {recipe}",
                "for": purpose(all_recipes[recipe]),
                "file": str(all_recipes[recipe]),
            }
            for recipe, command in commands.items()
        }
        print_json(facts)
        return
    width = max(len(f"{command} {recipe}") for recipe, command in commands.items())
    for recipe, command in commands.items():
        print(f"{f'{command} {recipe}':<{width}}  {purpose(all_recipes[recipe])}")
    print("\nbessemer recipes NAME prints one; bessemer init FILE.toml --from NAME starts your own from it")


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The recipe to write; its stem names the run.")],
    source: Annotated[
        str,
        typer.Option("--from", metavar="NAME", help="The built-in recipe to start from; bessemer recipes lists them."),
    ] = "tiny",
) -> None:
    """Write a recipe of your own, from a built-in one. Files beside it that it names are copied, too."""
    from bessemer.addons.plan.own_recipe import write_own

    written = write_own(file, source)
    print(*written, sep="\n")


def keys(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND[.KEY]]",
            help="A stage kind, model, layout, or data for a data recipe; or one key, such as rl.lr. Default: all keys "
            "of a training recipe.",
        ),
    ] = None,
    json_schema: Annotated[
        bool,
        typer.Option("--json-schema", help="Print a JSON schema, for completion and checks in editors."),
    ] = False,
) -> None:
    """List every key that a recipe may have, its default and what it does."""
    if not json_schema:
        from bessemer.addons.plan.recipe_help import describe_keys
        from bessemer.model.config import PRESETS, ModelConfig

        print(describe_keys(kind, ModelConfig, list(PRESETS)))
        return
    from bessemer.addons.plan.recipe_schema import recipe_schema, schema_of
    from bessemer.config.kinds import recipe_tables

    if kind in (tables := recipe_tables()):
        print_json(schema_of(kind, tables[kind]))
    elif kind is not None:
        known = ", ".join(tables)
        raise UserError(f'--json-schema describes whole recipes; leave "{kind}" out, or name another recipe: {known}')
    else:
        from bessemer.model.config import PRESETS, ModelConfig

        print_json(recipe_schema(ModelConfig, list(PRESETS)))
