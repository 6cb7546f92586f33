"""What CUDA reads from the environment as it starts. `prepare` sets it, before torch is imported, unless a user did.

PYTORCH_ALLOC_CONF        expandable_segments:True    freed memory serves requests of any size: batches of changing
                                                      length do not split it into pieces that fit nothing
CUBLAS_WORKSPACE_CONFIG   :4096:8                     products repeat bit for bit; the 32 MB that torch takes on
                                                      Hopper by itself
"""

from __future__ import annotations

import os
import sys

SEGMENTS = "expandable_segments:True"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name, and the one it had before."""


def prepare() -> None:
    """Without torch. Child processes inherit it."""
    if not sys.platform.startswith("linux"):
        return
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = SEGMENTS
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def without_segments() -> None:
    """Takes back what `prepare` set for the allocator, for a vLLM that sleeps: its memory pool refuses it."""
    if os.environ.get(ALLOCATOR[0]) == SEGMENTS:
        del os.environ[ALLOCATOR[0]]
