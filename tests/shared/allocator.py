"""Memory that a function allocates, as torch's profiler reports it."""

import gc

import pytest
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
