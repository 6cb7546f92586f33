"""A run's models as files to publish: an archive for each, with its card and its evaluations, and SHA256SUMS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.addons.families import archive
from bessemer.addons.families.remote import check_new
from bessemer.addons.watch.facts import read
from bessemer.addons.watch.model_card import model_card
from bessemer.config.table import nearest
from bessemer.data.fingerprints import check_finished
from bessemer.data.model_files import SUMS
from bessemer.errors import UserError
from bessemer.hf.replace import replacing

EVALUATION = "evaluation.json"
"""In an archive: {"run", "stage", "evaluations": the rows of results.json for this model}."""


def pack(root: Path, folder: Path, stages: Sequence[str], licence: str | None) -> list[dict[str, Any]]:
    """Writes RUN-STAGE.tar for every finished model of a run, or for those of `stages`, into a new folder. An imported
    model belongs to somebody else and is packed only if it is named."""
    check_new(folder)
    facts = read(root)
    models = {
        stage.name: stage
        for stage in facts.stages
        if stage.finished and (stage.folder / "model" / "config.json").is_file()
    }
    for name in stages:
        if name not in models:
            near = nearest(name, list(models)) if models else "it has none yet"
            raise UserError(f'{root} has no finished model of a stage "{name}"; {near}')
    if not (chosen := stages or [name for name, stage in models.items() if stage.kind != "import"]):
        only = "only imported ones, which are packed if --stage names them" if models else "no finished model"
        raise UserError(f"nothing to pack in {root}: {only}")
    rows, written = facts.evaluations, list[dict[str, Any]]()
    with replacing(folder) as fresh:
        for name in chosen:
            stage, title = models[name], f"{facts.recipe['name']}-{name}"
            check_finished(stage.folder / "model")
            evaluation = {
                "run": facts.recipe["name"],
                "stage": name,
                "evaluations": [row for row in rows if row.get("model") == name],
            }
            target = fresh / f"{title}.tar"
            digest = archive.write(
                target,
                archive.model_files(stage.folder / "model")
                | {
                    archive.CARD: model_card(stage.folder / "model", title, licence, packed=True).encode(),
                    EVALUATION: json.dumps(evaluation, ensure_ascii=False, indent=1).encode(),
                },
            )
            written.append(
                {"file": str(folder / target.name), "stage": name, "bytes": target.stat().st_size, "sha256": digest}
            )
        (fresh / SUMS).write_bytes(archive.sums({Path(one["file"]).name: one["sha256"] for one in written}))
    return written
