"""One model directory into another, a tensor at a time: FP8 to plain and back, another dtype, without MTP.

- A checkpoint never has to fit in memory to be converted.
- A conversion never writes over its own source, and over another model only when asked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bessemer.addons.families.block_fp8_form import BlockFp8, Scales
from bessemer.data.fingerprints import check_finished
from bessemer.data.model_files import PICKLES, read_object
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import Slot, slots
from bessemer.hf.replace import alone, holds_weights, replacing
from bessemer.hf.safetensors_writer import Form, write_slots
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.system import sync_folder

DEFAULT_IDS = {"bos_token_id": 0, "eos_token_id": 1}


def convert(
    src: str | Path, dst: str | Path, *, mtp: bool = True, dtype: str | torch.dtype | None = None,
    fp8: Scales | None = None, max_shard_bytes: float = deepseek.SHARD_BYTES,
) -> None:  # fmt: skip
    """Rewrites a model directory with one tensor in memory at a time, and verifies it by reading it back.

    FP8 becomes BF16 or `dtype`; dtype None otherwise keeps each tensor as stored. fp8: the scales of an export in block
    FP8; a matrix that has such already keeps its bytes, and dtype (None: bfloat16) applies to the other tensors. All
    files except config and weights are copied. A model at `dst` is replaced, but never the source.
    """
    src = Path(src)
    check_target(src, Path(dst), force=True)
    check_finished(src)
    checkpoint, cfg, layout = deepseek.open_directory(src, mtp, Transformer)
    form = BlockFp8(fp8, checkpoint) if fp8 else deepseek.AS_IS
    forced = deepseek.parse_dtype(dtype) or form.dtype
    main = {slot.name: slot.key for slot in layout if not slot.copy and not slot.index}
    layout = [slot for slot in layout if slot.key != deepseek.TIED_HEAD or not cfg.tie_embeddings]
    keys = {slot.key: main[slot.name] if slot.copy else slot.key for slot in layout}
    for slot in slots(cfg):
        if slot.copy and slot.key in checkpoint.entries:
            deepseek.compare_copy(checkpoint, slot, checkpoint.read(main[slot.name]))
    dtypes = [deepseek.target_dtype(slot, checkpoint.stored_dtype(keys[slot.key]), forced) for slot in layout]

    def read(slot: Slot, dtype: torch.dtype) -> Tensor:
        return checkpoint.read(keys[slot.key], dtype)

    with replacing(Path(dst), deepseek.REPLACED) as fresh:
        copy_config(src, cfg, fresh, forced or checkpoint.stored_dtype(deepseek.EMBEDDING), form)
        write_slots(fresh, layout, dtypes, read, form, max_shard_bytes)


def copy_config(src: Path, cfg: ModelConfig, target: Path, dtype: torch.dtype, form: Form = deepseek.AS_IS) -> None:
    """Writes `cfg` with the ids of `src`, and copies everything there except weights."""
    values = read_object(src / "config.json")
    bos, eos = (default if values.get(k) is None else values[k] for k, default in DEFAULT_IDS.items())
    deepseek.write_config(cfg, target, dtype=dtype, bos=bos, eos=eos, form=form)
    deepseek.copy_files(src, target, companions(src))


def companions(directory: Path) -> list[str]:
    """Names of all files other than config and weights: tokenizer, template and anything else."""
    files = (path for path in directory.iterdir() if path.is_file() and not holds_weights(path))
    return [path.name for path in files if path.name != "config.json" and path.suffix not in PICKLES]


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raises UserError unless a conversion of `source` may write `target`: existing content is replaced only with
    `force`, and the source never."""
    try:
        ours, theirs = source.resolve(), target.resolve()
        is_source = target.exists() and target.samefile(source)
        is_occupied = os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))
    except (OSError, RuntimeError) as error:  # no permission to look; circular symbolic links
        raise UserError(f"{target} cannot be written ({error}); choose another place") from None
    if is_source or ours == theirs or theirs in ours.parents or (ours in theirs.parents and is_occupied):
        where = "is" if is_source or ours == theirs else "lies in" if ours in theirs.parents else "holds"
        raise UserError(f"{target} {where} the model to convert, which is never changed in place; name a new target")
    if is_occupied and not force:
        raise UserError(f"{target} exists already; name a new target, or replace it with --force")


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """`replacing` for a single file."""
    if target.is_dir():
        raise UserError(f"{target} is a directory; name the file to write, such as {target / 'model.gguf'}")
    with alone(target.resolve()) as (fresh, _, target):
        try:
            yield fresh
            os.replace(fresh, target)
            sync_folder(target.parent)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty folder next to a target; what a killed process left there is deleted."""
    with alone(target.resolve().with_name(f"{target.name}.scratch")) as (fresh, _, _):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            yield fresh
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
