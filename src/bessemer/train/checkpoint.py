"""Checkpoints that are either complete or absent.

    state/step-00000123/{model,optimizer,gates,rng,extras}.safetensors  counters.json  config.json  manifest.json
                        rank-00000.safetensors ...                      what many ranks write in place of the five

Files are written under a temporary name, synced and then renamed: a kill at any instant leaves the previous checkpoint.
The manifest holds checksums of every file (`checkpoint_files`) and of itself; a damaged checkpoint is reported with the
file at fault and passed over: never used, never skipped silently. Nothing is pickled.

`save` writes the checkpoint of one process and `open_state` reads it, with no more than a tensor of it in memory. Those
of many ranks come with distributed training (the hook `sharded-state`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bessemer import plugins
from bessemer.errors import UserError
from bessemer.hf.replace import lacking
from bessemer.system import sync_folder
from bessemer.train.checkpoint_files import Damaged, TensorFile, verify, write_synced, write_tensors

FORMAT = 3
"""Raised by one when files are written in another way; only this one is read."""


@dataclass
class State:
    """Content of a checkpoint."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem -> tensors, e.g. model, optimizer, gates, rng, extras. `open_state` gives tensors that are read when
    asked for."""
    counters: dict[str, Any]
    """Plain JSON: step, tokens, rows, random states, whatever else the run counts."""
    config: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that must be the same in a run that resumes from the checkpoint."""

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for part in self.tensors.values() for tensor in part.values())

    def read(self) -> None:
        """Reads and verifies all tensors that are not in memory."""
        self.tensors = {stem: dict(part) for stem, part in self.tensors.items()}


class Under(Mapping[str, Tensor]):
    """The tensors whose names begin with a prefix, under the rest of their names."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save(state_dir: Path, step: int, state: State, keep: int = 2, counters: bytes | None = None) -> Path:
    """Writes state_dir/step-XXXXXXXX and deletes all but the newest `keep` checkpoints. `counters`: the state's
    counters as JSON, if they may have changed since.

    A full or unwritable disk is a UserError; the previous checkpoint is untouched and the partial one is gone.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    sweep(state_dir)
    temporary = state_dir / f".tmp-step-{step:08d}"
    try:
        temporary.mkdir()
        _write(temporary, step, state, as_json(state.counters) if counters is None else counters)
        return put_in_place(temporary, state_dir, step, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        shortage = _shortage(state_dir, state.bytes())
        raise UserError(
            f"cannot save step {step} in {state_dir}: {error.strerror} ({shortage}). Earlier "
            "checkpoints are intact; make room or choose another run directory, then run again"
        ) from error


def _shortage(folder: Path, need: int) -> str:
    if not folder.is_dir():
        return "the folder has vanished"
    if (lack := lacking(folder)) != "space":
        return f"no {lack}"
    free = shutil.disk_usage(folder).free
    return f"needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB free"


def put_in_place(temporary: Path, state_dir: Path, step: int, keep: int) -> Path:
    """Renames a finished directory to the checkpoint of its step and deletes all but the newest `keep`."""
    final, old = state_dir / f"step-{step:08d}", state_dir / f".old-step-{step:08d}"
    if final.exists():  # the same step again, after a rollback
        final.rename(old)
    temporary.rename(final)
    sync_folder(state_dir)
    shutil.rmtree(old, ignore_errors=True)
    for path in steps(state_dir)[:-keep]:
        shutil.rmtree(path)
    return final


def settle(state_dir: Path) -> None:
    """After the end of a stage: of checkpoints of more than SMALL bytes only the newest stays, from which the stage's
    models can be written again. Only `bessemer replay` reads earlier ones; those in KEPT stay."""
    for path in steps(state_dir)[:-1]:
        if sum(file.stat().st_size for file in path.iterdir()) > SMALL:
            shutil.rmtree(path)


SMALL = 1 << 28
"""Bytes of a checkpoint that costs nothing to keep, such as one of `tiny`."""
KEPT = "kept"
"""Folder, next to the newest checkpoints, of those that no later one replaces."""


def keep(path: Path) -> None:
    """Adds a checkpoint to those kept for good, as hard links, which take space only once the originals are deleted."""
    final, temporary = path.parent / KEPT / path.name, path.parent / KEPT / f".tmp-{path.name}"
    if final.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    copy(path, temporary)
    temporary.rename(final)


def copy(path: Path, target: Path) -> None:
    """Copies a checkpoint to another folder, as hard links where the file system has them."""

    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination)
        except OSError:
            shutil.copy2(source, destination)

    shutil.copytree(path, target, copy_function=link)


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _write(directory: Path, step: int, state: State, counters: bytes) -> None:
    files: dict[str, Any] = {}
    for stem, tensors in state.tensors.items():
        files[f"{stem}.safetensors"] = write_tensors(directory / f"{stem}.safetensors", tensors)
    for name, text in (("counters.json", counters), ("config.json", json.dumps(state.config, indent=1).encode())):
        files[name] = write_synced(directory / name, text)
    seal(directory, step, files)


def seal(directory: Path, step: int, files: Mapping[str, Any]) -> None:
    """Writes the manifest of the files and their checksums, the last file of a checkpoint."""
    manifest = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_synced(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(directory)


def latest(
    state_dir: Path,
    config: dict[str, Any] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    use: Callable[[State], object] = State.read,
) -> tuple[Path, State] | None:
    """The newest checkpoint, whatever layout wrote it, in which `use` finds no damage; None if there is none at all.
    `use` is called with one checkpoint after another until it reads one to the end.

    Each damaged one is reported through `warn` with the file at fault. UserError if all are damaged, or for another
    config or a newer format.
    """
    sweep(state_dir)
    paths = steps(state_dir)
    for path in reversed(paths):
        try:
            state = open_state(path)
            if config is not None:
                check_config(state.config, config, path)
            use(state)
        except Damaged as damage:
            warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
            continue
        return path, state
    if paths:
        raise none_intact(state_dir, len(paths))
    return None


def newest_whole(state_dir: Path) -> Path | None:
    """The newest checkpoint in which every byte is as it was written; None if there is none."""

    def verify_all(state: State) -> None:
        for part in state.tensors.values():
            for name in part:
                part[name]

    with suppress(UserError):
        newest = latest(state_dir, warn=lambda text: None, use=verify_all)
        return None if newest is None else newest[0]
    return None


def none_intact(state_dir: Path, n: int) -> UserError:
    return UserError(f"none of the {n} checkpoints in {state_dir} is intact; delete it to start this stage again")


def load(path: Path) -> State:
    """Reads and verifies all of a checkpoint, whatever layout wrote it; raises Damaged, or UserError for another
    format."""
    state = open_state(path)
    state.read()
    return state


def open_state(path: Path) -> State:
    """A checkpoint whose tensors are read, and verified, when asked for; raises as `load` does."""
    sums = verified_manifest(path)["files"]
    if any(map(is_sharded, sums)):
        opened = plugins.hook("sharded-state")
        if opened is None:
            raise UserError(f"{path} was written by many ranks; the add-on for distributed training reads it")
        return opened(path)
    files = {Path(name).stem: TensorFile(path / name, sums[name]) for name in sums if name.endswith(".safetensors")}
    return State(files, *(read_json(path, name, sums) for name in ("counters.json", "config.json")))


def is_sharded(file: str) -> bool:
    """Whether many ranks wrote the file."""
    return file.startswith("rank-")


def verified_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises Damaged, or UserError if another version wrote it."""
    manifest = read_json(path, "manifest.json")
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise Damaged("manifest.json does not match its own checksum")
    named = re.fullmatch(r"step-(\d{8,})", path.name)
    if named and int(named[1]) != manifest["step"]:
        raise Damaged(f"manifest.json is that of step {manifest['step']}")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path} was written by another version of Bessemer (checkpoint format {manifest['format']}, this one "
            f"reads {FORMAT}); use that version, or delete {path.parent} to start the stage again"
        )
    return manifest


def check_config(saved: object, ours: object, path: Path, field: str = "") -> None:
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
    """Removes what a killed save left; restores a checkpoint it had moved aside if its successor is missing."""
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


def read_json(path: Path, name: str, sums: Mapping[str, Any] | None = None) -> Any:
    """A file of a checkpoint, verified if `sums`, from its manifest, are given."""
    if sums is not None:
        verify(path / name, sums.get(name, ""))
    try:
        return json.loads((path / name).read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{name}: {error}") from error
