"""Finished stages of another run, taken over: `bessemer run RECIPE --reuse runs/other`.

A stage is taken over where it would give the same: same identity (settings, seed, model, format of this version) and
the very same inputs, complete and undamaged. It is copied, records and metric lines included, so the two runs share
nothing afterwards. What does not fit is run as always.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.runs import record
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import sync_folder
from bessemer.runs.metrics import Metrics, read_lines


class Donor:
    """A run whose finished stages may be taken over."""

    def __init__(self, root: Path) -> None:
        if not (root / "recipe.toml").is_file():
            raise UserError(f"--reuse {root}: not a run directory (no recipe.toml in it)")
        self.root = root

    def give(
        self, folder: Path, name: str, fingerprint: str, inputs: dict[str, str], metrics: Metrics
    ) -> dict[str, Any] | None:
        """Copies a finished stage to `folder`, which must not exist; its record, or None where this run has none.

        `inputs` maps the stages it reads to the digests of their output.
        """
        source = {theirs: path for _, theirs, path in stage_folders(self.root)}.get(name)
        done = source and record.read_json(source / "done.json")
        if not done or (done["fingerprint"], done["inputs"]) != (fingerprint, inputs) or record.damage(source, done):
            return None
        fresh = folder.with_name(f"{folder.name}.tmp-reuse")  # left by a kill, it is in nobody's way
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(source, fresh, ignore=lambda at, names: ["state"] if Path(at) == source else [])
        metrics.rewind(name, -1)
        for line in read_lines(self.root / "metrics.jsonl"):
            if line.get("stage") == name:
                metrics.write(name, line["step"], line["tokens"], line["values"])
        os.rename(fresh, folder)
        sync_folder(folder.parent)
        return done
