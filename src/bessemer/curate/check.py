"""Whether what a build left is still what it wrote: every document file, every shard, the tokenizer."""

import json
from pathlib import Path
from typing import Any

from bessemer.data import shards
from bessemer.data.fetch import sha256_of
from bessemer.errors import UserError
from bessemer.hf.foreign_tokenizer import load_tokenizer

AGAIN = "run bessemer data build again with the same recipe and --out"


def check(folder: Path) -> dict[str, Any]:
    """{"documents": files, "parts": {name: {"shards": n, "tokens": n}}}; UserError naming a file that differs."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        files, parts, fingerprint = manifest["documents"], manifest["parts"], manifest["tokenizer"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a finished build; {AGAIN}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}); {AGAIN}") from None
    for name, wanted in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; delete {folder / 'work'} and {AGAIN}")
        if sha256_of(file) != wanted:
            raise UserError(f"{file} was altered since it was written; delete {folder / 'work'} and {AGAIN}")
    if load_tokenizer(folder / "tokenizer").fingerprint != fingerprint:
        raise UserError(f"{folder / 'tokenizer'} is another tokenizer than the shards were made with; {AGAIN}")
    found = {}
    for part in parts:
        meta = shards.read_meta(folder / part)
        shards.check(folder / part, meta)
        sides = meta["parts"].values()
        found[part] = {
            "shards": sum(len(side["shards"]) for side in sides), "tokens": sum(side["tokens"] for side in sides)
        }  # fmt: skip
    return {"documents": len(files), "parts": found}
