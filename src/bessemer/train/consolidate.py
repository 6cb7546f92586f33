"""A Hugging Face directory out of a training checkpoint, one tensor in memory at a time, whatever layout wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer.model import hub
from bessemer.model.config import ModelConfig
from bessemer.model.hub_names import Slot
from bessemer.model.transformer import Transformer
from bessemer.train.sharded import EXPERTS, Source


def export(
    checkpoint: Path, cfg: ModelConfig, directory: Path, *, kind: Literal["model", "ema"] = "model",
    dtype: torch.dtype = torch.float32, **options: Any,
) -> None:  # fmt: skip
    """The masters of a checkpoint, or their moving average, rounded as a model of this compute dtype has them.
    `options` as in `hub.write`. Damaged for a file that is not as it was written."""
    source = Source(checkpoint)
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
