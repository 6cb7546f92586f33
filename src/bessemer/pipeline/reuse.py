"""`--reuse RUN`: copies finished stages of another run if this run would make the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bessemer.config.builtin import check_run_format
from bessemer.config.places import REVISIONS
from bessemer.errors import UserError
from bessemer.pipeline.inputs import Files, changed
from bessemer.runs.directory import damage, read_done, stage_folders
from bessemer.runs.files import read_json, write_atomic
from bessemer.runs.metrics import Metrics, read_lines
from bessemer.system import sync_folder


class Donor:
    """A run whose finished stages may be copied."""

    def __init__(self, root: Path) -> None:
        if not (root / "recipe.toml").is_file():
            raise UserError(f"--reuse {root}: not a run directory (no recipe.toml in it)")
        check_run_format(root)
        self.root = root

    def folder(self, name: str) -> Path | None:
        """The folder of the stage `name`."""
        return {stage: path for _, stage, path in stage_folders(self.root)}.get(name)

    def give_revisions(self, root: Path) -> None:
        """Copies the hub commits that this run has pinned to the run in `root`, if that has none."""
        if (self.root / REVISIONS).is_file() and not (root / REVISIONS).exists():
            write_atomic(root / REVISIONS, (self.root / REVISIONS).read_bytes())

    def give(
        self, name: str, folder: Path, fingerprint: str, inputs: dict[str, str], files: Files, metrics: Metrics
    ) -> tuple[dict[str, Any] | None, str]:
        """Copies the finished stage `name` to `folder`, which must not exist. Returns (its record, ""), or None and, if
        the only reason is changed files, which.

        `inputs` maps the stages it reads to the digests of their output.
        """
        source = self.folder(name)
        done = None if source is None else read_done(source)
        if source is None or not done or (done.get("fingerprint"), done.get("inputs")) != (fingerprint, inputs):
            return None, ""
        if why := changed(read_json(source / "stage.json"), files):
            return None, why
        if damage(source, done):
            return None, ""
        fresh = folder.with_name(f"{folder.name}.tmp-reuse")  # a kill may leave it; the runner removes it
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(source, fresh, ignore=lambda at, names: ["state"] if Path(at) == source else [])
        metrics.rewind(name, -1)
        for line in read_lines(self.root / "metrics.jsonl"):
            if line.get("stage") == name:
                metrics.write(name, line["step"], line["tokens"], line["values"], line.get("time"))
        os.rename(fresh, folder)
        sync_folder(folder.parent)
        return done, ""
