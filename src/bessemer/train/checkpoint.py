"""Checkpoints that are either whole or not there.

    state/step-00000123/{model,optimizer,gates,rng,extras}.safetensors  counters.json  config.json  manifest.json

Written under a temporary name, every file synced, then renamed: a kill at any instant leaves the previous checkpoint.
The manifest holds the SHA-256 of every file and of itself; a damaged checkpoint is reported by file and passed over,
never used and never skipped in silence. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.train.tensorfile import write_synced, write_tensors

FORMAT = 1
"""Raised by one when older code could misread the files."""


@dataclass
class State:
    """Content of a checkpoint."""

    tensors: dict[str, dict[str, Tensor]]
    """File stem -> tensors, e.g. model, optimizer, gates, rng, extras."""
    counters: dict[str, Any]
    """Plain JSON: step, tokens, rows, random states, whatever else the run counts."""
    config: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that must be equal when the checkpoint is used again."""


class Damaged(Exception):
    """A checkpoint that must not be used; the message names file and damage."""


def save(state_dir: Path, step: int, state: State, keep: int = 2) -> Path:
    """Writes state_dir/step-XXXXXXXX and deletes all but the newest `keep` checkpoints.

    A full or unwritable disk is a UserError; the previous checkpoint is untouched and the partial one is gone.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    sweep(state_dir)
    temporary = state_dir / f".tmp-step-{step:08d}"
    try:
        temporary.mkdir()
        _write(temporary, step, state)
        return put_in_place(temporary, state_dir, step, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need = sum(t.numel() * t.element_size() for part in state.tensors.values() for t in part.values())
        free = shutil.disk_usage(state_dir).free
        raise UserError(
            f"cannot save step {step} in {state_dir}: {error.strerror} (needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB "
            "free). Earlier checkpoints are intact; make room or choose another run directory, then run again"
        ) from error


def put_in_place(temporary: Path, state_dir: Path, step: int, keep: int) -> Path:
    """A finished directory becomes the checkpoint of its step; all but the newest `keep` go."""
    final, old = state_dir / f"step-{step:08d}", state_dir / f".old-step-{step:08d}"
    if final.exists():  # the same step again, after a rollback
        final.rename(old)
    temporary.rename(final)
    _sync_dir(state_dir)
    shutil.rmtree(old, ignore_errors=True)
    for path in steps(state_dir)[:-keep]:
        shutil.rmtree(path)
    return final


def _write(directory: Path, step: int, state: State) -> None:
    files = {}
    for stem, tensors in state.tensors.items():
        files[f"{stem}.safetensors"] = write_tensors(directory / f"{stem}.safetensors", tensors)
    for name, value in (("counters.json", state.counters), ("config.json", state.config)):
        files[name] = write_synced(directory / name, [json.dumps(value, indent=1).encode()])
    seal(directory, step, files)


def seal(directory: Path, step: int, files: dict[str, str]) -> None:
    """Writes the manifest over files and their SHA-256: the last file of a checkpoint."""
    manifest = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_synced(directory / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    _sync_dir(directory)


def latest(
    state_dir: Path, config: dict[str, Any] | None = None, warn: Callable[[str], None] = warnings.warn,
    read: Callable[[Path], State] | None = None,
) -> tuple[Path, State] | None:  # fmt: skip
    """The newest whole checkpoint, None if there is none at all; `read` (default: `load`) reads one.

    Each damaged one is reported through `warn` with the file at fault. All damaged, another config, or a newer format:
    UserError.
    """
    sweep(state_dir)
    found = steps(state_dir)
    for path in reversed(found):
        try:
            state = (read or load)(path)
        except Damaged as damage:
            warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
            continue
        if config is not None:
            check_config(state.config, config, path)
        return path, state
    if found:
        raise none_whole(state_dir, len(found))
    return None


def none_whole(state_dir: Path, n: int) -> UserError:
    return UserError(f"none of the {n} checkpoints in {state_dir} is whole; delete it to start this stage again")


def load(path: Path) -> State:
    """Reads and verifies one checkpoint; raises Damaged, or UserError if newer code wrote it."""
    manifest = verified_manifest(path)
    for name, expected in manifest["files"].items():
        verify(path, name, expected)
    tensors = {
        Path(name).stem: safetensors.torch.load_file(path / name)
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return State(tensors, read_json(path, "counters.json"), read_json(path, "config.json"))


def verified_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; Damaged, or UserError if newer code wrote it."""
    manifest = read_json(path, "manifest.json")
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise Damaged("manifest.json does not match its own checksum")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer Bessemer (checkpoint format {manifest['format']}, this one reads up to "
            f"{FORMAT}); upgrade, or delete it to go on from an older checkpoint"
        )
    return manifest


def verify(path: Path, name: str, expected: str) -> None:
    """Damaged unless the file has this SHA-256."""
    try:
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise Damaged(f"{name} does not match its checksum")
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from error


def check_config(saved: Any, ours: Any, path: Path, field: str = "") -> None:
    """UserError naming the first field in which a checkpoint's config differs from this run's."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        for key in [*ours, *(k for k in saved if k not in ours)]:
            name = f"{field}.{key}" if field else key
            check_config(saved.get(key, "(not set)"), ours.get(key, "(not set)"), path, name)
    elif saved != (ours := json.loads(json.dumps(ours))):  # tuples become lists on disk
        raise UserError(
            f"{field} is {ours!r} in this run but {saved!r} in the checkpoint {path}; change it back, or use a new run "
            f"directory (or delete {path.parent}) to start again"
        )


def steps(state_dir: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted(path for path in state_dir.glob("step-*") if path.is_dir())


def sweep(state_dir: Path) -> None:
    """Removes what a killed save left; a checkpoint it had moved aside comes back if its successor never arrived."""
    for old in state_dir.glob(".old-step-*"):
        target = state_dir / old.name.removeprefix(".old-")
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for leftover in state_dir.glob(".tmp-step-*"):
        shutil.rmtree(leftover)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{name}: {error}") from error


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
