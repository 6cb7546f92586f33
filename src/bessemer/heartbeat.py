"""Progress signals from work of unknown length, such as long samples: other ranks wait as long as they keep coming
(`dist.ranks.meet`)."""

count = 0
"""Signals so far."""


def beat() -> None:
    """Signals progress; call it once for each small piece of such work."""
    global count
    count += 1
