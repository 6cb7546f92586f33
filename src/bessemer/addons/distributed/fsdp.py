"""FSDP2: a model of another family, sharded over data-parallel ranks (Zhao et al. 2023; torch's `fully_shard`).

Every decoder layer is a unit, and the root holds the rest: embedding, final norm and head. A rank keeps 1 / N of every
parameter, of its gradient and of its moments, split along the first dimension. Forward gathers a layer, computes and
frees it; backward gathers it again and scatters the sums of its gradients.

    shard   float32 masters, which are also what is saved; parameters that are frozen have the compute dtype
    gather  in the compute dtype
    sums    of gradients, in float32, over ranks and micro-batches; nothing is averaged

Rank 0 reads the model into host memory and sends one layer at a time; the other ranks never hold a second one. The
root stays gathered from a forward until `reshard`, because the loss reads the head after forward. Everything here is
collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bessemer.addons.distributed import watchdog
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel


class ShardedModel:
    """A model whose parameters are sharded. `model` is the module that stages know."""

    def __init__(self, model: LanguageModel, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.model, self.device, self.compute_dtype = model, device, compute_dtype
        self.empty = _empty(model)
        """The model without storage, to gather into."""
        self.units = [*layers_of(model), model]
        shard_(self.units, device, compute_dtype)
        register_fsdp_forward_method(model, "train_outputs")
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        """Parameters by all their names. While a unit is gathered the model itself has other tensors."""

    def reshard(self) -> None:
        """Frees what is gathered, so that the next forward gathers the current weights."""
        for unit in self.units:
            cast(FSDPModule, unit).reshard()

    def gather(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor of the model's state, on this rank's device. Forward may not have gathered it (`reshard`).
        Collective."""
        shard = self.tensors.get(name)
        if shard is None:
            return self.model.state_dict()[name]
        with torch.no_grad(), watchdog.waiting(name, range(dist.get_world_size())):
            return whole(shard.to(dtype or shard.dtype))

    def gather_into(self, model: LanguageModel) -> None:
        """Copies all weights into a whole model of the same shape, one tensor at a time. Collective."""
        self.reshard()
        for name, tensor in _unique(model.named_parameters(remove_duplicate=False)):
            tensor.data.copy_(self.gather(name, tensor.dtype))

    def whole_model(self, dtype: torch.dtype) -> LanguageModel:
        """A whole model with storage for `gather_into`; its parameters are not filled."""
        model = deepcopy(self.empty)
        _replace(model, lambda tensor: torch.empty(tensor.shape, dtype=dtype, device=self.device))
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer.clone()
        return model.requires_grad_(False)

    def bytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(local(tensor).nbytes for _, tensor in _unique(self.tensors.items()))


def layers_of(model: LanguageModel) -> list[nn.Module]:
    """The decoder layers; UserError if the model has no list of them."""
    n = model.cfg.n_layers
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    lists = [(name, module) for name, module in named if len(module) == n]
    if not lists:
        kind = getattr(model.cfg, "model_type", type(model).__name__)
        raise UserError(f"FSDP2 cannot wrap {kind}: it has no list of {n} decoder layers; train it with --processes 1")
    return list(min(lists, key=lambda entry: entry[0].count("."))[1])


def shard_(
    units: Iterable[nn.Module], device: torch.device, compute_dtype: torch.dtype, whole_root: bool = False
) -> None:
    """Shards every unit over all ranks, inner ones first, with rank 0's weights; the last is the root, which may stay
    whole on all ranks. Collective."""
    units = [*units]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    owners = _owners(units)
    for unit in units:
        _send(unit, owners, device, compute_dtype)
        is_root = unit is units[-1]
        if is_root and whole_root:
            continue
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not is_root)
        sharded = cast(FSDPModule, unit)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has sums alone


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor from the shards of all ranks. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, shard: DTensor) -> Tensor:
    """The part of a whole tensor that belongs to this rank's shard."""
    rows = -(-shard.shape[0] // dist.get_world_size())
    return tensor[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


Owners = dict[int, list[tuple[dict[str, Any], str]]]
"""Where a tensor is registered, by its id: (a module's parameters or buffers, its name there)."""


def _owners(units: Iterable[nn.Module]) -> Owners:
    owners: Owners = {}
    modules = {id(module): module for unit in units for module in unit.modules()}
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((cast(dict[str, Any], table), name))
    return owners


def _send(unit: nn.Module, owners: Owners, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Puts rank 0's tensors in place of those that no inner unit holds, on all ranks."""
    for name, tensor in _unique([*unit.named_parameters(), *unit.named_buffers()]):
        if id(tensor) not in owners:
            continue  # sent already
        is_parameter, dtype = isinstance(tensor, nn.Parameter), tensor.dtype
        if is_parameter:
            dtype = torch.float32 if tensor.requires_grad else compute_dtype
        if dist.get_rank() == 0:
            sent = tensor.detach().to(device, dtype, copy=True).contiguous()
        else:
            sent = torch.empty(tensor.shape, dtype=dtype, device=device)
        with watchdog.waiting(name, [0] if dist.get_rank() else range(dist.get_world_size())):
            dist.broadcast(sent, 0)
        new = nn.Parameter(sent, requires_grad=tensor.requires_grad) if is_parameter else sent
        for table, key in owners.pop(id(tensor)):
            table[key] = new


def _empty(model: LanguageModel) -> LanguageModel:
    """A copy of the model without storage."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=tensor.requires_grad)
    return deepcopy(model, memo)


def _replace(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Gives every parameter new storage; tied ones stay tied."""
    for places in _owners([model]).values():
        table, name = places[0]
        if isinstance(tensor := table[name], nn.Parameter):
            new = nn.Parameter(make(tensor), requires_grad=tensor.requires_grad)
            for table, name in places:
                table[name] = new


def _unique(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once, with its first name."""
    seen = set()
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
