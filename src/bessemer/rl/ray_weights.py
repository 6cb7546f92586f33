"""Weights on their way from the trainer to a rollout worker: plain bytes under their names, nothing pickled.

`packed` gives views where the tensors lie in this machine's memory, so handing them to an object store is one copy, and
what a worker reads there is mapped, not copied; `load` copies it into the worker's network. The worker's network then
has the trainer's dtypes and, bit for bit, its values, routing biases included.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bessemer.errors import UserError


class Packed(NamedTuple):
    """One tensor."""

    dtype: str
    """As torch calls it: "bfloat16"."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Its bytes, uint8."""


def packed(state: Mapping[str, Tensor]) -> dict[str, Packed]:
    """A model's state dict, in its order."""
    return {name: _packed(tensor.detach()) for name, tensor in state.items()}


def tensor_of(item: Packed) -> Tensor:
    """A view of the bytes; whoever writes to it writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes
        flat = torch.from_numpy(item.data)
    return flat.view(getattr(torch, item.dtype)).view(item.shape)


@torch.no_grad()
def load(model: nn.Module, items: Mapping[str, Packed]) -> None:
    """Puts the weights into a network of the same shape; UserError where it is another."""
    state = model.state_dict(keep_vars=True)
    if state.keys() != items.keys() or any(tuple(held.shape) != items[name].shape for name, held in state.items()):
        raise UserError("a rollout worker's model is not the trainer's: its folder changed since the run began")
    for name, held in state.items():
        fresh = tensor_of(items[name])
        if held.dtype != fresh.dtype:
            held.data = torch.empty_like(held, dtype=fresh.dtype)
        held.data.copy_(fresh)


def _packed(tensor: Tensor) -> Packed:
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return Packed(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy())
