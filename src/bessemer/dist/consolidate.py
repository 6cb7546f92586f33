"""A Hugging Face directory out of a training checkpoint, one tensor in memory at a time, whatever layout wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.model.config import ModelConfig
from bessemer.hf.names import Slot
from bessemer.model.moe import EXPERTS
from bessemer.model.transformer import Transformer
from bessemer.train.checkpoint import Damaged
from bessemer.dist.sharded_checkpoint import Source


def export(
    checkpoint: Path, cfg: ModelConfig, directory: Path, *, kind: Literal["model", "ema"] = "model",
    dtype: torch.dtype = torch.float32, **options: Any,
) -> None:  # fmt: skip
    """The masters of a checkpoint, or their moving average, rounded as a model of this compute dtype has them.
    `options` as in `hub.write`. Damaged for a file that is not as it was written."""
    _export(Source(checkpoint), cfg, directory, kind, dtype, options)


def of_checkpoint(checkpoint: Path, directory: Path, *, mtp: bool = True, **options: Any) -> None:
    """The same of a checkpoint whose config is in it, as every stage's is: its float32 masters; `options` as in
    `hub.write`. UserError if it is damaged, or none of a language model."""
    try:
        source = Source(checkpoint)
        cfg = ModelConfig(**source.config)
        _export(source, cfg if mtp else cfg.model_copy(update={"n_mtp": 0}), directory, "model", torch.float32, options)
    except Damaged as damage:
        raise UserError(f"checkpoint {checkpoint} is damaged ({damage}); take the one before it") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint} is none of a language model: {str(error).splitlines()[0]}") from None


def _export(
    source: Source, cfg: ModelConfig, directory: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    with torch.device("meta"):
        state = Transformer(cfg).to_compute(dtype).state_dict()

    def read(slot: Slot, wanted: torch.dtype) -> Tensor:
        name, index = f"{kind}/{slot.name}", slot.index
        if gate := re.fullmatch(r"(layers|mtp)\.(\d+)\..*bias_E", slot.name):
            name = f"bias/{'mtp' if gate[1] == 'mtp' else ''}{gate[2]}"
        elif EXPERTS in slot.name:
            name, index = f"{name}/{index[0]}", index[1:]
        (value,) = source.read([name]).values()
        value = (value[index] if index else value).to(state[slot.name].dtype)
        return value.to(wanted)

    hub.write(cfg, read, lambda slot: state[slot.name].dtype, directory, **options)
