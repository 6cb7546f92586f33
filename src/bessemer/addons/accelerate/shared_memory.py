"""Memory that processes share."""

import os

SHARED = "/dev/shm"
"""Where the system keeps shared memory; containers often grant little of it."""


def shared_free() -> int:
    """Free bytes of shared memory; 0 if there is none."""
    try:
        stats = os.statvfs(SHARED)
    except OSError:
        return 0
    return stats.f_bavail * stats.f_frsize
