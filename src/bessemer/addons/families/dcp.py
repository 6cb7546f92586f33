"""torch.distributed.checkpoint (DCP): a model directory as a DCP checkpoint, and back.

Keys are the Hugging Face names, as in torchtitan's `to_hf` and `from_hf`; config and tokenizer are next to the tensors.
A plain model directory needs no conversion for DCP: `HuggingFaceStorageReader` reads its safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bessemer.addons.distributed.dcp_reader import DCPReader, alone, read_metadata
from bessemer.addons.families import conversion
from bessemer.data.fingerprints import check_finished
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots
from bessemer.hf.replace import replacing
from bessemer.hf.safetensors_writer import TensorSpec, write_tensors
from bessemer.model.transformer import Transformer


def export(source: Path, target: Path, dtype: torch.dtype | None = None, mtp: bool = True) -> None:
    """Writes a model directory as a DCP checkpoint, with FP8 dequantised. All tensors are in memory at once. Replaces
    whatever is at `target`."""
    check_finished(source)
    checkpoint, cfg, layout = deepseek.open_directory(source, mtp, Transformer)
    stored = [(slot, checkpoint.stored_dtype(slot.key)) for slot in layout if slot.key in checkpoint.entries]
    tensors = {slot.key: checkpoint.read(slot.key, deepseek.target_dtype(slot, kind, dtype)) for slot, kind in stored}
    with replacing(target, deepseek.REPLACED) as fresh:
        conversion.copy_config(source, cfg, fresh, dtype or checkpoint.stored_dtype(deepseek.EMBEDDING))
        with alone():
            dcp.save(tensors, storage_writer=FileSystemWriter(fresh, thread_count=1), no_dist=True)


def tensors(folder: Path, metadata: Metadata) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor with its name, one in memory at a time."""
    reader = DCPReader(folder, metadata)
    for name, record in metadata.state_dict_metadata.items():
        if isinstance(record, TensorStorageMetadata):
            state = {name: torch.empty(record.size, dtype=record.properties.dtype)}
            try:
                with alone():
                    dcp.load(state, storage_reader=reader, no_dist=True)
            except (Exception, CheckpointException):  # the latter is not an Exception, and its message is pages long
                raise UserError(f"{folder}: tensor {name} cannot be read: its file is damaged; copy it again") from None
            yield name, state[name]


def convert(folder: Path, target: Path, like: Path | None = None, **how: Any) -> None:
    """Writes a DCP checkpoint as a model directory, with config and tokenizer from `like`, by default from `folder`
    itself. `how`: as in `conversion.convert`. Only the model's tensors are written, not for example the optimizer's."""
    metadata, beside = read_metadata(folder), like or folder
    if not (beside / "config.json").is_file():
        raise UserError(f"{beside} has no config.json; name a model directory of the same shape with --like")
    cfg = deepseek.read_config(beside)
    embeddings = [name for name in metadata.state_dict_metadata if name.endswith(deepseek.EMBEDDING)]
    if len(embeddings) != 1:
        raise UserError(
            f"{folder} has {len(embeddings) or 'no'} tensors called {deepseek.EMBEDDING}; its tensors need "
            f"Hugging Face's names, but the first here are {', '.join(list(metadata.state_dict_metadata)[:3])}"
        )
    prefix = embeddings[0].removesuffix(deepseek.EMBEDDING)
    key_of = {prefix + slot.key: slot.key for slot in slots(cfg)}
    records = {name: record for name, record in metadata.state_dict_metadata.items() if name in key_of}
    tensors_only = {name: entry for name, entry in records.items() if isinstance(entry, TensorStorageMetadata)}
    metadata.state_dict_metadata = dict(tensors_only)
    plan = [TensorSpec(key_of[name], entry.properties.dtype, tuple(entry.size)) for name, entry in tensors_only.items()]
    with conversion.scratch(target) as plain:
        write_tensors(plain, plan, (tensor for _, tensor in tensors(folder, metadata)), deepseek.SHARD_BYTES)
        deepseek.copy_files(beside, plain, ["config.json", *conversion.companions(beside)])
        conversion.convert(plain, target, **how)
