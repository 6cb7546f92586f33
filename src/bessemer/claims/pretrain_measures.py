"""What a trained arm is worth: numbers of one finished run, all of them teacher-forced."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch

from bessemer.claims.runs import ArmJob
from bessemer.data.rows import open_rows
from bessemer.hf import hub
from bessemer.train.loss import heldout_nats

ROWS = 64
"""Held-out rows of each part."""


def numbers(job: ArmJob, folder: Path) -> dict[str, float]:
    """All numbers of a run by name."""
    stages = {path.name.partition("-")[2]: path for path in folder.iterdir() if path.is_dir()}
    model = hub.load(stages["pretrain"] / "model", torch.float32, mtp=False)
    parts = {path.parent.name: path.parent for path in stages["corpus"].glob("*/meta.json")}
    bits = {}
    for name, part in parts.items():
        rows = open_rows(part, "heldout")
        n = min(ROWS, rows.n_rows)
        nats, tokens = heldout_nats(model, [rows.batch(range(at, min(at + 16, n))) for at in range(0, n, 16)])
        bits[name] = nats / tokens / math.log(2) / rows.bytes_per_token
    return {"bpb": statistics.fmean(bits.values()), **{f"bpb_{name}": value for name, value in bits.items()}}
