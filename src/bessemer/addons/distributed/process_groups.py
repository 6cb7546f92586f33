"""Process groups: each made once, for all stages of a run, with the layout's timeout.

`make` is collective: every rank names the same groups in the same order, including those it is not in, which cost it a
few microseconds each (6,500 of them for V3). Only members have a communicator, which NCCL creates at first use. This is
why no device is bound to the default group: torch would then split the communicator of the whole world for every group.
`make` uses each new GPU group at once, in the common order and before any other kernel can hold the device.

Uses of the same ranks share a group if one thread makes them in turn. What may run side by side has its own groups:

    sums       gradients, weights, norms, loads: the main thread
    experts    rows for the experts: the exchange's thread and stream (`chunk.Overlapped`)
    messages   from one pipeline rank to another: a group for each direction, since NCCL runs the operations of a group
               one after the other
    files      checkpoints: the saving thread, on the CPU
    meetings   setting up DeepEP's buffers, and the meeting of its ranks before a step: the main thread, on the CPU
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import ClassVar, Literal, NamedTuple, cast
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist

from bessemer.addons.distributed import watchdog

Use = Literal["sums", "experts", "messages", "files", "meetings"]
ON_CPU: tuple[Use, ...] = ("files", "meetings")

CTAS: dict[Use, int] = {"messages": 4, "experts": 20, "sums": 16}
"""The most thread blocks of a communication kernel, each of which takes a streaming multiprocessor from computation. V3
gives its experts' rows 20 of 132 (3.2.2). Gradient sums run alongside backward."""

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
    "TORCH_FR_BUFFER_SIZE": "2000",
}
"""What CUDA and torch read when they start: a queue for each stream, so that a kernel waiting for another rank holds up
no other; eager loading, because loading a kernel in a step waits for the whole device; torch's flight recorder."""


at_leave: list[Callable[[], object]] = []
"""Called in this order to free resources before a run's groups are destroyed; collective, so not after an error."""


class GroupSpec(NamedTuple):
    use: Use
    ranks: tuple[int, ...]
    """In ascending order; for messages, (sender, receiver)."""

    @property
    def shared(self) -> GroupSpec:
        """The group that serves it. A rank by itself needs only one for all uses but files."""
        return self if len(self.ranks) > 1 or self.use == "files" else GroupSpec("sums", self.ranks)


class _Groups:
    """Groups made since the default group. Only torch keeps them alive: a fork must not have to destroy them."""

    timeout: timedelta | None = None
    world: Callable[[], object] = staticmethod(lambda: None)
    named: ClassVar[set[GroupSpec]] = set()
    """Including those of other ranks."""
    mine: ClassVar[WeakValueDictionary[GroupSpec, dist.ProcessGroup]] = WeakValueDictionary()


def set_environment() -> None:
    """Sets ENVIRONMENT, except what the user has set. To be called on every rank before CUDA starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def begin(timeout: float) -> None:
    """Sets the timeout, in seconds, of the groups made from now on; called by `Ranks.join`."""
    _Groups.timeout = timedelta(seconds=timeout)


def make(specs: Iterable[GroupSpec], device: torch.device) -> None:
    """Makes the groups that do not exist yet. Collective over all ranks of the world."""
    world = dist.group.WORLD
    if _Groups.world() is not world:
        _Groups.world, _Groups.named, _Groups.mine = ref(world), set(), WeakValueDictionary()
    me, new = dist.get_rank(), []
    for spec in dict.fromkeys(spec.shared for spec in specs):
        if spec not in _Groups.named:
            process_group = _new(spec, device)
            _Groups.named.add(spec)
            if me in spec.ranks:
                _Groups.mine[spec] = process_group
                new.append(spec)
    for spec in new:
        _connect(spec, me, device)


def get(use: Use, ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group that `make` has made and this rank is in; else KeyError."""
    return _Groups.mine[GroupSpec(use, tuple(ranks)).shared]


def _new(spec: GroupSpec, device: torch.device) -> dist.ProcessGroup:
    """Ranks outside the group get a placeholder from torch, which they do not use."""
    backend, options = ("gloo", None) if spec.use in ON_CPU else _backend(spec.use, device)
    return cast(
        dist.ProcessGroup,
        dist.new_group(
            sorted(spec.ranks), _Groups.timeout, backend, options, group_desc=f"{spec.use} {len(spec.ranks)}"
        ),
    )


def _backend(use: Use, device: torch.device) -> tuple[str | None, object]:
    """(backend, options) for tensors of a device; None: the default group's."""
    if device.type != "cuda":
        return None, None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True  # a small kernel that others wait for goes before large ones
    if use in CTAS:
        options.config.max_ctas = CTAS[use]
    return "nccl", options


def _connect(spec: GroupSpec, me: int, device: torch.device) -> None:
    """Runs a group's first operation, which makes its connections and for which all members wait."""
    if spec.use in ON_CPU or (spec.use != "messages" and device.type != "cuda"):
        return  # gloo's are there already
    greeting, group = torch.zeros(1, device=device), _Groups.mine[spec]
    with watchdog.waiting("a first message", spec.ranks):
        if spec.use != "messages":
            dist.all_reduce(greeting, group=group)
        elif me == spec.ranks[0]:
            dist.send(greeting, spec.ranks[1], group)
        else:
            dist.recv(greeting, spec.ranks[0], group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
