"""Process groups: each made once, for all stages of a run, with the layout's timeout.

`make` is collective: every rank names the same groups in the same order, those it is not in as well, which costs it a
few microseconds each (6,500 of them for V3). Only members have a communicator. NCCL makes it at the first use, so no
device is bound to the default group: torch would otherwise split the communicator of the whole world once for every
group. `make` uses each new group of a GPU at once, in the common order and before any other kernel can hold the device.

Groups of the same ranks are one where one thread uses them in turn. What may run side by side has groups of its own:

    sums       gradients, weights, norms, loads: the main thread
    experts    rows for the experts: the exchange's thread and stream (`chunk.Overlapped`)
    messages   from one pipeline rank to another: a group for each direction, since NCCL runs the operations of a group
               one after the other
    files      checkpoints: the saving thread, on the CPU
    meetings   DeepEP's buffers are set up, and its ranks meet before a step: the main thread, on the CPU
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import ClassVar, Literal, NamedTuple, cast
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist

from bessemer.dist import watchdog

Use = Literal["sums", "experts", "messages", "files", "meetings"]
ON_CPU: tuple[Use, ...] = ("files", "meetings")

CTAS: dict[Use, int] = {"messages": 4, "experts": 20, "sums": 16}
"""Most blocks of a communication kernel, each of which takes a streaming multiprocessor from computation; V3 gives its
experts' rows 20 of 132 (3.2.2). Sums of gradients run next to backward."""

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
    "TORCH_FR_BUFFER_SIZE": "2000",
}
"""What CUDA and NCCL read when they start: a queue for each stream, so that a kernel that waits for another rank holds
up no other; no kernel loaded in the middle of a step, which waits for the whole device; torch's flight recorder."""


at_leave: list[Callable[[], object]] = []
"""What is freed, in this order, before a run's groups are destroyed; collective, so not after an error."""


class Wanted(NamedTuple):
    use: Use
    ranks: tuple[int, ...]
    """In ascending order; of messages, from whom to whom."""

    @property
    def shared(self) -> Wanted:
        """The group that serves it: alone, a rank needs one for all uses."""
        return self if len(self.ranks) > 1 or self.use == "files" else Wanted("sums", self.ranks)


class _Made:
    """What was made since the default group. Torch alone keeps groups alive: a fork must not have to destroy them."""

    timeout: timedelta | None = None
    world: Callable[[], object] = staticmethod(lambda: None)
    named: ClassVar[set[Wanted]] = set()
    """Also those of other ranks."""
    mine: ClassVar[WeakValueDictionary[Wanted, dist.ProcessGroup]] = WeakValueDictionary()


def set_environment() -> None:
    """Before CUDA starts, in every rank; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def begin(timeout: float) -> None:
    """Groups made from now on wait at most so many seconds, as `Ranks.join` does."""
    _Made.timeout = timedelta(seconds=timeout)


def make(wanted: Iterable[Wanted], device: torch.device) -> None:
    """Makes those that are not there yet. Collective over all ranks of the world."""
    world = dist.group.WORLD
    if _Made.world() is not world:
        _Made.world, _Made.named, _Made.mine = ref(world), set(), WeakValueDictionary()
    me, new = dist.get_rank(), []
    for one in dict.fromkeys(one.shared for one in wanted):
        if one not in _Made.named:
            made = _new(one, device)
            _Made.named.add(one)
            if me in one.ranks:
                _Made.mine[one] = made
                new.append(one)
    for one in new:
        _connect(one, me, device)


def get(use: Use, ranks: Sequence[int]) -> dist.ProcessGroup:
    """One that was made, of which this rank is a member."""
    return _Made.mine[Wanted(use, tuple(ranks)).shared]


def _new(one: Wanted, device: torch.device) -> dist.ProcessGroup:
    """What torch returns to ranks outside is no group, and they do not use it."""
    backend, options = ("gloo", None) if one.use in ON_CPU else _backend(one.use, device)
    return cast(
        dist.ProcessGroup,
        dist.new_group(sorted(one.ranks), _Made.timeout, backend, options, group_desc=f"{one.use} {len(one.ranks)}"),
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


def _connect(one: Wanted, me: int, device: torch.device) -> None:
    """The first operation of a group makes its connections, for which all members wait."""
    if one.use in ON_CPU or (one.use != "messages" and device.type != "cuda"):
        return  # gloo's are there already
    greeting, group = torch.zeros(1, device=device), _Made.mine[one]
    with watchdog.waiting("a first message", one.ranks):
        if one.use != "messages":
            dist.all_reduce(greeting, group=group)
        elif me == one.ranks[0]:
            dist.send(greeting, one.ranks[1], group)
        else:
            dist.recv(greeting, one.ranks[0], group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
