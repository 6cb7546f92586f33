"""Every random state a step can depend on, as tensors and JSON: torch, CUDA, numpy, Python, named generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture(generators: dict[str, np.random.Generator] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON values that `restore` takes."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    values = {
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
        "generators": {key: _plain(g.bit_generator.state) for key, g in (generators or {}).items()},
    }
    return tensors, values


def restore(
    tensors: dict[str, Tensor], values: dict[str, Any], generators: dict[str, np.random.Generator] | None = None
) -> None:
    """Sets every state back. CUDA states of devices that are not here are left out."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    for key, generator in (generators or {}).items():
        generator.bit_generator.state = values["generators"][key]


def _plain(state: Any) -> Any:
    """Bit-generator state with arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
