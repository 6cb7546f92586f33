"""Checkpoints that many ranks write together, and models exported from a checkpoint.

The format is that of `train.checkpoint`; any other layout can read it, including a single process. A tensor that
several ranks hold is written by one of them. All ranks save together and see the same outcome: if one cannot
write, the save fails on all. `Saver` writes in the background, from copies, while training continues.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.accelerate.background import Background
from bessemer.addons.distributed import process_groups
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader
from bessemer.addons.distributed.chunked_files import write_chunked
from bessemer.addons.distributed.process_groups import GroupSpec
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import Slot
from bessemer.hf.safetensors_reader import cast
from bessemer.model.config import ModelConfig
from bessemer.model.moe import EXPERTS
from bessemer.model.transformer import Transformer
from bessemer.train import checkpoint
from bessemer.train.checkpoint_files import Damaged, write_synced


class AllOrNone:
    """What the ranks write together in a folder, on threads that save: it succeeds on all of them or fails on all.
    Collective."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # a group of its own, because its messages overlap those of the training
        everyone = tuple(range(dist.get_world_size()))
        process_groups.make([GroupSpec("files", everyone)], torch.device("cpu"))
        self.group = process_groups.get("files", everyone)

    def temporary(self, step: int) -> Path:
        """Where the files of a checkpoint are written before it is complete."""
        return self.folder / f".tmp-step-{step:08d}"

    def __call__(self, work: Callable[[], Any] | None, step: int) -> list[Any]:
        """Every rank's result of `work` (None: nothing to do), or on all of them the UserError of the first that
        failed, and the files written so far are removed."""
        result, failure = None, ""
        try:
            result = work() if work is not None else None
        except OSError as error:
            failure = f"rank {dist.get_rank()} cannot write: {error.strerror or error}"
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure), group=self.group)
        if failures := [failure for _, failure in outcomes if failure]:
            if dist.get_rank() == 0:  # all have come here, so nobody writes any more
                shutil.rmtree(self.temporary(step), ignore_errors=True)
            raise UserError(
                f"cannot save step {step} in {self.folder}: {failures[0]}. Earlier checkpoints are intact; free some "
                "space or choose a run directory that all ranks can write to, then run again"
            )
        return [result for result, _ in outcomes]


class Saver:
    """Writes one rank's files. Every rank has one and calls `save` and `finish` at the same steps."""

    def __init__(self, state_dir: Path, config: dict[str, Any], keep: int):
        self.state_dir, self.config, self.keep = state_dir, config, keep
        self._together, self.background = AllOrNone(state_dir), Background("saving")

    def save(
        self, step: int, tensors: dict[str, Tensor], counters: dict[str, Any], copied: torch.cuda.Event | None = None
    ) -> Path:
        """Starts writing state_dir/step-XXXXXXXX and returns that path. `tensors` are this rank's, by their names on
        disk: copies, or tensors that do not change before `finish`, complete once `copied` has happened. Waits for the
        previous save and raises its error."""
        text = checkpoint.as_json(counters)

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            self._write(step, tensors, text)

        self.background.begin(write)
        return self.state_dir / f"step-{step:08d}"

    def finish(self) -> None:
        """Waits until the last save is on disk. UserError on all ranks if any could not write; earlier checkpoints are
        then untouched."""
        self.background.finish()

    def _write(self, step: int, tensors: dict[str, Tensor], counters: bytes) -> None:
        me, temporary = dist.get_rank(), self._together.temporary(step)

        def begin() -> None:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.state_dir)
            temporary.mkdir()

        def finish() -> None:
            files = {_file(rank): file_sums for rank, file_sums in enumerate(sums) if file_sums}
            for name, text in (
                ("counters.json", counters),
                ("config.json", json.dumps(self.config, indent=1).encode()),
            ):
                files[name] = write_synced(temporary / name, text)
            checkpoint.seal(temporary, step, files)
            checkpoint.put_in_place(temporary, self.state_dir, step, self.keep)

        self._together(begin if me == 0 else None, step)
        sums = self._together((lambda: write_chunked(temporary / _file(me), tensors)) if tensors else None, step)
        self._together(finish if me == 0 else None, step)


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def export(
    checkpoint: Path, cfg: ModelConfig, directory: Path, *, kind: Literal["model", "ema"] = "model",
    dtype: torch.dtype = torch.float32, network: type[Transformer] = Transformer, **options: Any,
) -> None:  # fmt: skip
    """Writes the float32 masters in a checkpoint of this class of `network`, or their moving average ("ema"), rounded
    to this compute dtype, as a Hugging Face directory, with one tensor in memory at a time. `options` as in
    `deepseek.write`. Raises Damaged for a damaged file."""
    _export(CheckpointReader(checkpoint), cfg, directory, kind, dtype, network, options)


def of_checkpoint(checkpoint: Path, directory: Path, *, mtp: bool = True, **options: Any) -> None:
    """Exports the float32 masters of a checkpoint that stores its model config, as those of all stages do; `options` as
    in `deepseek.write`. UserError if it is damaged or not of a language model."""
    try:
        reader = CheckpointReader(checkpoint)
        cfg = ModelConfig(**reader.config)
        cfg = cfg if mtp else cfg.model_copy(update={"n_mtp": 0})
        _export(reader, cfg, directory, "model", torch.float32, Transformer, options)
    except Damaged as damage:
        raise UserError(f"checkpoint {checkpoint} is damaged ({damage}); use the one before it") from None
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint} holds no language model: {str(error).splitlines()[0]}") from None


def _export(
    reader: CheckpointReader, cfg: ModelConfig, directory: Path, kind: str, dtype: torch.dtype,
    network: type[Transformer], options: dict[str, Any],
) -> None:  # fmt: skip
    with torch.device("meta"):
        state = network(cfg).to_compute(dtype).state_dict()

    def read(slot: Slot, stored_dtype: torch.dtype) -> Tensor:
        name, index = f"{kind}/{slot.name}", slot.index
        if gate := re.fullmatch(r"(layers|mtp)\.(\d+)\..*bias_E", slot.name):
            name = f"bias/{'mtp' if gate[1] == 'mtp' else ''}{gate[2]}"
        elif EXPERTS in slot.name:
            name, index = f"{name}/{index[0]}", index[1:]
        (value,) = reader.read([name]).values()
        value = (value[index] if index else value).to(state[slot.name].dtype)
        return cast(value, stored_dtype, slot.key)

    deepseek.write(cfg, read, lambda slot: state[slot.name].dtype, directory, kind=network, **options)
