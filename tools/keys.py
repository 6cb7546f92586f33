"""Lists the keys of recipes that no committed recipe sets.

    python tools/keys.py            how many keys there are, and those that nothing sets
    python tools/keys.py --check    fails if there are more of these than `MOST`

Recipes are the TOML files of `FOLDERS`, the presets of [model] among them, the TOML blocks and the `--set` arguments of
the documentation, and the recipes inside the programs of bench/. A key that several tables inherit counts once. A new
key needs a recipe that uses it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from bessemer.config.kinds import recipe_tables, stage_tables
from bessemer.config.recipe import Head, LayoutConfig
from bessemer.config.table import tables_in
from bessemer.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("recipes", "examples", "bench", "claims", "src/bessemer/model")
MOST = 10
"""Keys that may be in no recipe."""
Key = tuple[str, str]
"""Class that defines a key, and the key."""


def keys_of(table: type[BaseModel]) -> Iterator[tuple[str, Key]]:
    """(key with the tables around it, what it is) of every key of a table."""
    for name, field in table.model_fields.items():
        owner = next(base for base in reversed(table.__mro__) if name in getattr(base, "model_fields", {}))
        key = field.alias or name
        inner = next(iter(tables_in(field.annotation)), None)
        yield key, (owner.__name__, key)
        if inner is not None:
            yield from ((f"{key}.{rest}", value) for rest, value in keys_of(inner))


def every_table() -> dict[str, type[BaseModel]]:
    tables = {"": Head, "layout": LayoutConfig, "model": ModelConfig, **recipe_tables(), **stage_tables()}
    return {kind: table for kind, table in tables.items() if table.__module__.startswith("bessemer.")}  # not a user's


def texts() -> Iterator[str]:
    """The text of every committed recipe, whole or in part."""
    for folder in FOLDERS:
        yield from (path.read_text("utf-8") for path in (ROOT / folder).rglob("*.toml"))
    for path in (ROOT / "bench").rglob("*.py"):
        yield from (text for text in re.findall(r'"""(.*?)"""', path.read_text("utf-8"), re.S) if "[[stage]]" in text)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")):
        if path.name not in ("CHANGELOG.md", "log.md", "results.md"):
            text = path.read_text("utf-8")
            yield from re.findall(r"```toml\n(.*?)```", text, re.S)
            yield "\n".join(re.findall(r"--set [\w-]+\.([\w.-]+=[^\s`]*)", text))
    for path in (*(ROOT / "claims").rglob("*.toml"), *(ROOT / "claims" / "src").rglob("*.py")):  # overrides in a list
        yield "\n".join(re.findall(r"[\"'][a-z{}-]+\.([\w.]+=)", path.read_text("utf-8")))


def is_set(key: str, text: str) -> bool:
    """Whether a text sets a key, the last part of its address, in any table."""
    last = re.escape(key.rpartition(".")[2])
    return bool(
        re.search(
            rf"(?m)^\s*#?\s*([\w.]+\.)?\"?{last}\"?(\.[\w.]+)? ?=|[{{,] *{last} ?=|^\[+([\w.]+\.)?{last}[\].]", text
        )
    )


def count() -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
    """(every key, those that no recipe sets), each with the addresses that it has."""
    keys: dict[Key, list[str]] = {}
    for kind, table in every_table().items():
        for key, value in keys_of(table):
            keys.setdefault(value, []).append(f"{kind}.{key}".lstrip("."))
    recipes = list(texts())
    return keys, {value: names for value, names in keys.items() if not any(is_set(value[1], text) for text in recipes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    keys, unset = count()
    print(f"{len(keys)} keys, {len(unset)} of them in no recipe")
    for names in unset.values():
        print("  " + ", ".join(names))
    if args.check and len(unset) > MOST:
        raise SystemExit(f"at most {MOST} keys may be in no recipe: add one that needs the new key, or drop the key")


if __name__ == "__main__":
    main()
