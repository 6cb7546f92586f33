"""Random models as if trained and released, and copies of their directories that differ in one thing."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@torch.no_grad()
def as_released(model: Any, seed: int) -> Any:
    """Gains off 1, biases of the gate off 0, all numbers in BF16."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias_E"):
            tensor.uniform_(-0.3, 0.3, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        tensor.copy_(tensor.bfloat16())
    return model


def changed(
    source: Path, target: Path, tensors: Mapping[str, Callable[[Tensor], Tensor]] | None = None, **config: Any
) -> Path:
    """A copy of a model directory: `tensors` maps a pattern of names to a function; of the keys of `config`, those that
    config.json has replace its own."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            stored = load_file(file)
            for pattern, change in (tensors or {}).items():
                hits = [name for name in stored if re.search(pattern, name)]
                assert hits, pattern
                stored |= {name: change(stored[name]).to(stored[name].dtype).contiguous() for name in hits}
            save_file(stored, target / file.name, {"format": "pt"})
        elif file.name == "config.json":
            values = json.loads(file.read_text())
            known = {key: value for key, value in config.items() if key in values}
            assert known or not config
            (target / file.name).write_text(json.dumps(values | known))
        elif file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def noisy(tensor: Tensor) -> Tensor:
    """Every number by a random 30 % more or less."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))
    return tensor.float() * (1 + 0.3 * noise)
