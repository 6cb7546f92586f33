"""Checkpoints that many ranks write together and any other layout can read, one process included.

    state/step-00000123/rank-00000.safetensors ...  counters.json  config.json  manifest.json

as in `checkpoint`: whole or not there, every file with its SHA-256 in the manifest. Tensors are stored whole under the
names of the whole network, a routed expert under its own number (`model/layers.3.ffn.experts.w13/17`), so that nothing
in a file tells which layout wrote it. What several ranks hold is written by one of them. A rank reads the files that
hold what it needs, and verifies those; what one process wrote (`checkpoint.save`) is found under the same names.

All ranks save together and see the same outcome: one that cannot write makes it fail on all. `Saver` writes in the
background, from copies, while training goes on.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.moe import EXPERTS
from bessemer.train import checkpoint
from bessemer.train.checkpoint import Damaged, State
from bessemer.train.tensorfile import write_synced, write_tensors

_PARTS = {"model": "model/", "optimizer": "", "gates": "", "rng": "rng/", "extras": "extras/"}
"""What the names of each file of `checkpoint` begin with here."""


class Saver:
    """One rank's pen. Every rank has one and calls `save` and `finish` at the same steps."""

    def __init__(self, state_dir: Path, config: dict[str, Any], keep: int):
        self.state_dir, self.config, self.keep = state_dir, config, keep
        # its own group: its messages go on beside those of the training
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> Path:
        """Begins state_dir/step-XXXXXXXX; `tensors` are what this rank writes, by the names on disk: copies, or what
        does not change before `finish`. Waits for the save before it, and raises what became of that."""
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(step, tensors, counters), name="saving")
        self._thread.start()
        return self.state_dir / f"step-{step:08d}"

    def finish(self) -> None:
        """Waits until the last save is on the disk. UserError on all ranks if any could not write; then earlier
        checkpoints are untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, step: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        try:
            self._together_write(step, tensors, counters)
        except BaseException as error:
            self._failure = error

    def _together_write(self, step: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        me, temporary = dist.get_rank(), self.state_dir / f".tmp-step-{step:08d}"

        def begin() -> None:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.state_dir)
            temporary.mkdir()

        def finish() -> None:
            files = {_file(rank): digest for rank, digest in enumerate(sums) if digest}
            for name, value in (("counters.json", counters), ("config.json", self.config)):
                files[name] = write_synced(temporary / name, [json.dumps(value, indent=1).encode()])
            checkpoint.seal(temporary, step, files)
            checkpoint.put_in_place(temporary, self.state_dir, step, self.keep)

        self._together(begin if me == 0 else None, step)
        sums = self._together((lambda: write_tensors(temporary / _file(me), tensors)) if tensors else None, step)
        self._together(finish if me == 0 else None, step)

    def _together(self, work: Callable[[], Any] | None, step: int) -> list[Any]:
        """Every rank's result of `work` (None: nothing to do), or on all of them the UserError of the first that
        failed."""
        result, failure = None, ""
        try:
            result = work() if work is not None else None
        except OSError as error:
            failure = f"rank {dist.get_rank()} cannot write: {error.strerror}"
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure), group=self._group)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            raise UserError(
                f"cannot save step {step} in {self.state_dir}: {failures[0]}. Earlier checkpoints are intact; make "
                "room, or choose a run directory that all ranks can write, then run again"
            )
        return [result for result, _ in outcomes]


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class _Place(NamedTuple):
    """Where a tensor lies: a file, a key in it, and the row where experts are stacked."""

    file: str
    key: str
    row: int | None


class Source:
    """An opened checkpoint, written by any layout or by one process. Damaged, or UserError if newer code wrote it."""

    def __init__(self, path: Path):
        self.path, self._sums = path, checkpoint.verified_manifest(path)["files"]
        self._verified: set[str] = set()
        self.places: dict[str, _Place] = {}
        for file in (file for file in self._sums if file.endswith(".safetensors")):
            self._index(file)
        self.counters, self.config = (checkpoint.read_json(path, name) for name in ("counters.json", "config.json"))

    @property
    def together(self) -> bool:
        """Whether ranks wrote it together."""
        return any(file.startswith("rank-") for file in self._sums)

    @property
    def updates(self) -> int:
        """Steps that the optimizer has made."""
        return self.counters["updates"] if self.together else int(self.read(["steps"])["steps"])

    def verify(self, names: Iterable[str]) -> None:
        """Damaged unless the files that hold these tensors are whole; UserError for one that is not there."""
        for file in {self._place(name).file for name in names}:
            self._verify(file)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, in this order. UserError for one that is not there; files are verified when first
        read."""
        names, wanted = list(names), {}
        for name in names:
            wanted.setdefault(self._place(name).file, []).append(name)
        found = {}
        for file, mine in wanted.items():
            self._verify(file)
            with _open(self.path / file) as opened:
                for name in mine:
                    _, key, row = self.places[name]
                    found[name] = opened.get_tensor(key) if row is None else opened.get_slice(key)[row]
        return {name: found[name] for name in names}

    def _place(self, name: str) -> _Place:
        if name not in self.places:
            raise UserError(
                f"the checkpoint {self.path} has no {name}; it belongs to another model, or to a run with other "
                "settings"
            )
        return self.places[name]

    def _verify(self, file: str) -> None:
        if file not in self._verified:
            checkpoint.verify(self.path, file, self._sums[file])
            self._verified.add(file)

    def _index(self, file: str) -> None:
        with _open(self.path / file) as opened:
            prefix = _PARTS.get(Path(file).stem)
            for key in opened.keys():  # noqa: SIM118 (no dictionary)
                if prefix is None:
                    self.places[key] = _Place(file, key, None)
                elif EXPERTS in key:
                    for row in range(opened.get_slice(key).get_shape()[0]):
                        self.places[f"{prefix}{key}/{row}"] = _Place(file, key, row)
                else:
                    self.places[prefix + key] = _Place(file, key, None)


def read(path: Path) -> State:
    """A checkpoint of any layout as one process keeps it."""
    source = Source(path)
    if not source.together:
        return checkpoint.load(path)
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in _stacked(source.read(source.places)).items():
        kind = name.partition("/")[0]
        part = kind if kind in ("model", "rng", "extras") else "gates" if kind in ("bias", "load") else "optimizer"
        tensors[part][name.removeprefix(_PARTS[part])] = tensor
    counters = dict(source.counters)
    tensors["optimizer"]["steps"] = torch.tensor(counters.pop("updates"))
    return State(tensors, counters, source.config)


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(rf"(.*{re.escape(EXPERTS)}.*)/(\d+)", name)
        if expert:
            found.setdefault(expert[1], {})[int(expert[2])] = tensor
        else:
            found[name] = tensor
    return {n: torch.stack([t[i] for i in range(len(t))]) if isinstance(t, dict) else t for n, t in found.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library's own type
        raise Damaged(f"{path.name}: {error}") from error
