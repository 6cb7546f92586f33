"""Checkpoints that are either complete or absent.

    state/step-00000123/{model,optimizer,gates,rng,extras}.safetensors  counters.json  config.json  manifest.json
                        rank-00000.safetensors ...                      what many ranks write in place of the five

Files are written under a temporary name, synced and then renamed: a kill at any instant leaves the previous checkpoint.
The manifest holds the SHA-256 of every file and of itself; a damaged checkpoint is reported with the file at fault and
passed over: never used, never skipped silently. Nothing is pickled.

`save` writes the checkpoint of one process, `dist.sharded_checkpoint` that of many ranks. `load` reads both for one
process, `checkpoint_reader` tensor by tensor. A sharded checkpoint stores every tensor whole under its name in the
whole network, and a routed expert under its own number (`model/layers.3.ffn.experts.w13/17`), so that nothing in a file
depends on the layout that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.hf.replace import lacking
from bessemer.model.moe import EXPERTS
from bessemer.system import sync_folder

FORMAT = 1
"""Raised by one when older code could misread the files."""
_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class State:
    """Content of a checkpoint."""

    tensors: dict[str, dict[str, Tensor]]
    """File stem -> tensors, e.g. model, optimizer, gates, rng, extras."""
    counters: dict[str, Any]
    """Plain JSON: step, tokens, rows, random states, whatever else the run counts."""
    config: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that must be the same in a run that resumes from the checkpoint."""

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for part in self.tensors.values() for tensor in part.values())


class Damaged(Exception):
    """A checkpoint that must not be used; the message names file and damage."""


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
    files = {}
    for stem, tensors in state.tensors.items():
        files[f"{stem}.safetensors"] = write_tensors(directory / f"{stem}.safetensors", tensors)
    for name, text in (("counters.json", counters), ("config.json", json.dumps(state.config, indent=1).encode())):
        files[name] = write_synced(directory / name, [text])
    seal(directory, step, files)


def seal(directory: Path, step: int, files: dict[str, str]) -> None:
    """Writes the manifest of the files and their SHA-256, the last file of a checkpoint."""
    manifest = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_synced(directory / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    sync_folder(directory)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes and syncs a safetensors file; returns its SHA-256. The library's own writer needs a second copy of the
    tensors in memory and turns a full disk into its own exception.

    Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    body = (memoryview(_bytes(tensor)) for tensor in tensors.values())
    return write_synced(path, _chain(len(head).to_bytes(8, "little"), head, body))


def write_synced(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Writes the pieces, waits until they are on the disk, returns their SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chain(start: bytes, head: bytes, body: Iterable[memoryview]) -> Iterable[bytes | memoryview]:
    yield start
    yield head
    yield from body


def _bytes(tensor: Tensor):
    return tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy()


def latest(
    state_dir: Path, config: dict[str, Any] | None = None, warn: Callable[[str], None] = warnings.warn
) -> tuple[Path, State] | None:
    """The newest complete checkpoint, whatever layout wrote it; None if there is none at all.

    Each damaged one is reported through `warn` with the file at fault. UserError if all are damaged, or for another
    config or a newer format.
    """
    sweep(state_dir)
    paths = steps(state_dir)
    for path in reversed(paths):
        try:
            state = load(path)
        except Damaged as damage:
            warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
            continue
        if config is not None:
            check_config(state.config, config, path)
        return path, state
    if paths:
        raise none_intact(state_dir, len(paths))
    return None


def none_intact(state_dir: Path, n: int) -> UserError:
    return UserError(f"none of the {n} checkpoints in {state_dir} is intact; delete it to start this stage again")


def load(path: Path) -> State:
    """Reads and verifies one checkpoint, whatever layout wrote it; raises Damaged, or UserError if newer code did."""
    manifest = verified_manifest(path)
    for name, expected in manifest["files"].items():
        verify(path, name, expected)
    counters, config = read_json(path, "counters.json"), read_json(path, "config.json")
    files = [name for name in manifest["files"] if name.endswith(".safetensors")]
    if not any(map(is_sharded, files)):
        tensors = {Path(name).stem: safetensors.torch.load_file(path / name) for name in files}
        return State(tensors, counters, config)
    tensors = {stem: {} for stem in PREFIXES}
    for file in files:
        for name, tensor in safetensors.torch.load_file(path / file).items():
            kind = name.partition("/")[0]
            stem = kind if kind in ("model", "rng", "extras") else "gates" if kind in ("bias", "load") else "optimizer"
            tensors[stem][name.removeprefix(PREFIXES[stem])] = tensor
    tensors = {stem: stacked(named) for stem, named in tensors.items()}
    tensors["optimizer"]["steps"] = torch.tensor(counters.pop("updates"))
    return State(tensors, counters, config)


PREFIXES = {"model": "model/", "optimizer": "", "gates": "", "rng": "rng/", "extras": "extras/"}
"""File stem of one process's checkpoint -> prefix of its tensors' names in a sharded one."""


def is_sharded(file: str) -> bool:
    """Whether many ranks wrote the file."""
    return file.startswith("rank-")


def companion_name(companion: str, name: str) -> str:
    """The name of a companion's tensor in the checkpoint that holds its state (`Checkpointed.companions`)."""
    return f"extras/{companion}/{name if name.startswith('model/') else f'optimizer/{name}'}"


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks the experts that a sharded checkpoint stores one by one."""
    experts: dict[str, dict[int, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        if expert := re.fullmatch(rf"(.*{re.escape(EXPERTS)}.*)/(\d+)", name):
            experts.setdefault(expert[1], {})[int(expert[2])] = tensor
        else:
            others[name] = tensor
    return others | {name: torch.stack([of[i] for i in range(len(of))]) for name, of in experts.items()}


def verified_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises Damaged, or UserError if newer code wrote it."""
    manifest = read_json(path, "manifest.json")
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise Damaged("manifest.json does not match its own checksum")
    named = re.fullmatch(r"step-(\d{8,})", path.name)
    if named and int(named[1]) != manifest["step"]:
        raise Damaged(f"manifest.json is that of step {manifest['step']}")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer Bessemer (checkpoint format {manifest['format']}, this one reads up to "
            f"{FORMAT}); upgrade, or delete it to continue from an older checkpoint"
        )
    return manifest


def verify(path: Path, name: str, expected: str) -> None:
    """Raises Damaged unless the file has this SHA-256."""
    try:
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise Damaged(f"{name} does not match its checksum")
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from error


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


def read_json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{name}: {error}") from error
