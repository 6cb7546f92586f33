"""The files that a stage reads from outside its run: found through marks in its table, hashed, compared.

Besides its identity, a stage's record holds {name as in the recipe: {file in it: SHA-256}}, and the commit of each
address on the hub. A stage whose files have changed is another stage. A name that is missing from the record, or leads
nowhere now, is not compared: a stage stays finished when its data is removed.

Registered sources and packages are pinned in `data/sources.toml`; "shards:" enter the identity by their own checksums.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bessemer import plugins
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig, named_plugins, named_sources, named_tasks
from bessemer.data import documents, fingerprints, sources
from bessemer.tasks.registry import source_of

Files = dict[str, dict[str, str]]
TASK, NEEDLE = "task:", "needle:"
"""Prefixes of corpus parts that are made from a task or from another source."""
OF_THEIR_OWN = SHARDS, PACKAGE = "shards:", "package:"
"""Prefixes of names whose checksums are elsewhere in the identity."""


def read_by(config: StageConfig) -> Files:
    """What the stage reads, hashed as it is now."""
    found = {name: _hashes(name) for name in _paths(config) if not name.startswith(OF_THEIR_OWN)}
    for address in {documents.hub_address(name) for name in named_sources(config) if name.startswith(places.HUB)}:
        if (commit := places.known_revision(address)) is not None:
            found[address] = {"": commit}
    for kind, name in [("stages", config.kind), *named_plugins(config)]:
        found |= {code: {"": digest} for code, digest in plugins.digest(kind, name).items()}
    return {name: hashes for name, hashes in found.items() if hashes}


def with_folder(recipe: Recipe, run: Path) -> Recipe:
    """The recipe as its run keeps it: with the path to its folder if a name in it is relative to that folder."""
    names = [name.removeprefix(SHARDS) for config in recipe.stages for name in _paths(config)]
    names += [code for config in recipe.stages for code in plugins.digest("stages", config.kind)]
    if any(not name.startswith(PACKAGE) and not Path(name).is_absolute() for name in names):
        return recipe.model_copy(update={"folder": recipe.folder and os.path.relpath(recipe.folder, run)})
    return recipe.model_copy(update={"folder": None})


def _paths(config: StageConfig) -> list[str]:
    """The names that lead to files, and those that begin with one of `OF_THEIR_OWN`."""
    named, paths, registered = named_tasks(config), list[str](), sources.registered()
    for name in named_sources(config):
        is_task, name = name.startswith(TASK), name.removeprefix(TASK)
        if is_task and not name.startswith(NEEDLE):
            named.append(name)
        elif (name := name.removeprefix(NEEDLE)) and not name.startswith(places.HUB) and name not in registered:
            paths.append(name)
    plugged = [name.rpartition(":")[0] for _, name in named_plugins(config) if plugins.OWN_FILE.fullmatch(name)]
    return [source[0] for name in named if (source := source_of(name)) is not None] + plugged + paths


def _hashes(name: str) -> dict[str, str]:
    """The hash of a file, or those of the files in a directory that are read."""
    path = places.located(name)
    if path.is_file():
        return {"": fingerprints.sha256(path)}
    files = documents.files_under(path, documents.is_text)
    if (path / "config.json").is_file():  # a model, or a folder of data that has such a file too
        top = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        files = sorted({*files, *top})
    names = [str(file.relative_to(path)) for file in files]
    return dict(zip(names, fingerprints.sha256_of_all(files), strict=True))


def changed(record: dict[str, Any] | None, files: Files) -> str:
    """How files differ from a stage's record, e.g. "notes.txt changed since the run of 2026-11-26 10:02"; "" if they do
    not, or if the record holds none."""
    recorded: Files = (record or {}).get("files", {})
    differ = []
    for name in recorded.keys() & files.keys():
        for file in sorted(recorded[name].keys() | files[name].keys()):
            old_hash, new_hash = recorded[name].get(file), files[name].get(file)
            if old_hash != new_hash:
                change = "is gone" if new_hash is None else "is new" if old_hash is None else "changed"
                differ.append(f"{Path(name) / file if file else name} {change}")
    if not differ:
        return ""
    more = f" and {len(differ) - 2} more" if len(differ) > 2 else ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((record or {})["since"]))
    return f"{', '.join(sorted(differ)[:2])}{more} since the run of {when}"
