"""Puts what the units left where people and training recipes look for it: a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bessemer.curate import documents, tokens
from bessemer.curate.origins import Unit
from bessemer.curate.settings import Settings
from bessemer.curate.work import Job
from bessemer.hf.foreign_tokenizer import load_tokenizer

MANIFEST = "manifest.json"
_OF_TOKENIZER = ("tokenizer", "chat_template", "special_tokens")
"""How the files of a tokenizer begin, in a folder that may be a model's."""


def lay_out(
    out: Path, units: Sequence[Unit], writes: Sequence[Job], facts: Sequence[dict[str, Any]], tokenizer: Path,
    settings: Settings,
) -> None:  # fmt: skip
    """tokenizer/, documents/, a folder for each part, and the manifest over them. Parts of an earlier recipe go."""
    made = load_tokenizer(tokenizer)
    parts = list(dict.fromkeys(unit.source.part for unit in units))
    for old in _parts_before(out):
        if old not in parts and Path(old).name == old:
            shutil.rmtree(out / old, ignore_errors=True)
    _replace(out / "tokenizer", lambda folder: shutil.copytree(tokenizer, folder, ignore=_others))
    checksums: dict[str, str] = {}

    def lay(folder: Path) -> None:
        folder.mkdir(parents=True)
        for unit, job, of_job in zip(units, writes, facts, strict=True):
            target = folder / f"{unit.name}.jsonl.zst"
            target.parent.mkdir(exist_ok=True)
            tokens.place(job.folder / documents.NAME, target)
            checksums[f"documents/{unit.name}.jsonl.zst"] = of_job["sha256"]

    _replace(out / "documents", lay)
    for part in parts:
        of_part = [
            (job.folder, of_job["shards"])
            for unit, job, of_job in zip(units, writes, facts, strict=True)
            if unit.source.part == part
        ]
        tokens.seal(out / part, of_part, made, settings.tokens, settings.seed)
    manifest = {"tokenizer": made.fingerprint, "documents": checksums, "parts": parts}
    write(out / MANIFEST, json.dumps(manifest, indent=1))


def write(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text + "\n", "utf-8")
    os.replace(scratch, path)


def _parts_before(out: Path) -> list[str]:
    try:
        return json.loads((out / MANIFEST).read_text("utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []


def _others(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(_OF_TOKENIZER)]


def _replace(target: Path, make: Callable[[Path], Any]) -> None:
    scratch = target.with_name(f".{target.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
