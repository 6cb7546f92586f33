"""Checkpoints that many ranks write together and any other layout can read.

    state/step-00000123/rank-00000.safetensors ...  counters.json  config.json  manifest.json

as in `checkpoint`: whole or not there, every file with its SHA-256 in the manifest. Tensors are stored whole under the
names of the whole network, a routed expert under its own number (`model/layers.3.ffn.experts.w13/17`), so that nothing
in a file tells which layout wrote it. What several ranks hold is written by one of them, chosen by the name. A rank
reads the files that hold what it needs, and verifies those.

All ranks call `save` and see the same outcome: one that cannot write makes it fail on all.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from bessemer.errors import UserError
from bessemer.train import checkpoint
from bessemer.train.checkpoint import Damaged
from bessemer.train.tensorfile import write_synced, write_tensors

EXPERTS = ".experts."


def pieces(tensors: dict[str, Tensor], first_expert: int = 0) -> dict[str, Tensor]:
    """By the names on disk: stacks of experts, of which the first is number `first_expert`, one by one."""
    found = {}
    for name, tensor in tensors.items():
        if EXPERTS in name:
            found |= {f"{name}/{first_expert + i}": part for i, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def save(
    state_dir: Path, step: int, tensors: dict[str, Tensor], counters: dict[str, Any], config: dict[str, Any],
    keep: int = 2,
) -> Path:  # fmt: skip
    """Writes state_dir/step-XXXXXXXX; `tensors` are this rank's by the names on disk. UserError on all ranks if any
    cannot write; then earlier checkpoints are untouched."""
    me, everyone = dist.get_rank(), [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(tensors))
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(everyone):
        for name in names:
            holders.setdefault(name, []).append(rank)
    mine = {n: t for n, t in tensors.items() if holders[n][zlib.crc32(n.encode()) % len(holders[n])] == me}
    temporary, file = state_dir / f".tmp-step-{step:08d}", f"rank-{me:05d}.safetensors"

    def begin() -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(state_dir)
        temporary.mkdir()

    _together(begin if me == 0 else None, state_dir, step)
    sums = _together(lambda: write_tensors(temporary / file, mine), state_dir, step)

    def finish() -> None:
        files = {f"rank-{rank:05d}.safetensors": digest for rank, digest in enumerate(sums)}
        for name, value in (("counters.json", counters), ("config.json", config)):
            files[name] = write_synced(temporary / name, [json.dumps(value, indent=1).encode()])
        checkpoint.seal(temporary, step, files)
        checkpoint.put_in_place(temporary, state_dir, step, keep)

    _together(finish if me == 0 else None, state_dir, step)
    return state_dir / f"step-{step:08d}"


def _together(work: Any, state_dir: Path, step: int) -> list[Any]:
    """Every rank's result of `work` (None: nothing to do), or on all of them the UserError of the first that failed."""
    result, failure = None, ""
    try:
        result = work() if work is not None else None
    except OSError as error:
        failure = f"rank {dist.get_rank()} cannot write: {error.strerror}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise UserError(
            f"cannot save step {step} in {state_dir}: {failures[0]}. Earlier checkpoints are intact; make room, or "
            "choose a run directory that all ranks can write, then run again"
        )
    return [result for result, _ in outcomes]


def load(path: Path, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(the tensors of these names on disk, counters, config). Damaged, or UserError for a name that is not there."""
    files = checkpoint.verified_manifest(path)["files"]
    where = {}
    for file in (file for file in files if file.endswith(".safetensors")):
        where |= dict.fromkeys(_names(path / file), file)
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name not in where:
            raise UserError(
                f"the checkpoint {path} has no {name}; it belongs to another model, or to a run with other settings"
            )
        wanted.setdefault(where[name], []).append(name)
    found = {}
    for file, mine in wanted.items():
        checkpoint.verify(path, file, files[file])
        with _open(path / file) as opened:
            found |= {name: opened.get_tensor(name) for name in mine}
    return found, *(checkpoint.read_json(path, name) for name in ("counters.json", "config.json"))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library's own type
        raise Damaged(f"{path.name}: {error}") from error


def _names(path: Path) -> list[str]:
    with _open(path) as opened:
        return list(opened.keys())


def names(path: Path) -> list[str]:
    """All names in a checkpoint."""
    files = checkpoint.verified_manifest(path)["files"]
    return sorted(name for file in files if file.endswith(".safetensors") for name in _names(path / file))


def whole(path: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """All tensors of a prefix under their names in the network, experts stacked again: for an export."""
    mine = [name for name in names(path) if name.startswith(prefix)]
    tensors, *_ = load(path, mine)
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stacked = re.fullmatch(r"(.*)/(\d+)", name.removeprefix(prefix))
        if stacked:
            found.setdefault(stacked[1], {})[int(stacked[2])] = tensor
        else:
            found[name.removeprefix(prefix)] = tensor
    return {n: torch.stack([t[i] for i in range(len(t))]) if isinstance(t, dict) else t for n, t in found.items()}
