"""Opens a model directory of any family: its network or its reward model, and adapters on it.

The format of DeepSeek-V2 and V3 is our own, and `deepseek` reads it. A `Family` of an add-on reads each other one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bessemer.config.training import LoRAConfig
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.families import architecture_of, family
from bessemer.hf.mapping import FAMILIES
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Scorer, Transformer


def is_own(directory: str | Path) -> bool:
    """Whether config.json declares the architecture of `Transformer`."""
    return architecture_of(Path(directory)) in FAMILIES


def own_config(directory: str | Path) -> ModelConfig | None:
    """The config of a network of our own family; None for any other."""
    return deepseek.read_config(directory) if is_own(directory) else None


def load(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", mtp: bool = True
) -> LanguageModel:
    """The network of a directory. dtype and mtp as in `deepseek.load`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name the folder that holds config.json")
    if is_own(directory):
        return deepseek.load(directory, dtype, device, mtp)
    return family(architecture_of(directory)).load(directory, dtype, device)


@torch.no_grad()
def read_into(model: LanguageModel, directory: Path) -> None:
    """Replaces the weights of a network by those of a directory that holds one of the same shapes."""
    if isinstance(model, Transformer):
        deepseek.read_into(model, directory)
        return
    stored = load(directory, torch.float32, model.embed.weight.device).state_dict()
    for name, own in model.state_dict().items():
        own.copy_(stored[name])


def load_scorer(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LanguageModel:
    """The reward model of a directory."""
    directory = Path(directory)
    if not directory.is_dir() or is_own(directory):
        return deepseek.load(directory, dtype=dtype, device=device, kind=Scorer)
    return family(architecture_of(directory)).load_scorer(directory, dtype, device)


def adapted(model: LanguageModel, config: LoRAConfig, seed: int, base: Path, stage: str) -> tuple[LanguageModel, str]:
    """`Family.attach` for the model of `base`."""
    return family(architecture_of(base)).attach(model, config, seed, base, stage)
