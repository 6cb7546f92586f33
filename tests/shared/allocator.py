"""Memory that a function allocates, as torch's profiler reports it."""

import gc

import pytest
import torch
from torch.autograd.profiler import profile

counted_with_kernels = pytest.mark.skipif(  # a string, so that nothing is built before the first such test runs
    "not __import__('bessemer.addons.accelerate.kernels.library', fromlist=['available']).available()",
    reason="bytes are counted as the kernels keep them, and there are none here",
)


def live_and_highest(function) -> tuple[int, int]:
    """(bytes still allocated at the end, the peak) while `function` ran; its return value is kept alive until the
    end."""
    gc.collect()  # what dies during `function` would count as freed by it
    with profile(use_cpu=True, profile_memory=True) as profiler:
        alive = function()  # noqa: F841
    live = highest = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return live, highest


def live_bytes(function) -> int:
    return live_and_highest(function)[0]


def kept_bytes(function) -> int:
    """Bytes of the storages that live tensors hold after `function` and did not before. Where threads of gloo take part
    it stands for `live_bytes`: a thread that lets go of a buffer last frees it outside the profiler's sight."""

    def storages() -> dict[int, torch.UntypedStorage]:
        gc.collect()
        plain = (item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
        return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in plain if x.device.type == "cpu"}

    before = storages()  # held, so that no new storage gets the address of an old one
    function()
    return sum(storage.nbytes() for address, storage in storages().items() if address not in before)
