"""Signs that this process gets on with work whose end nobody knows, such as long samples: others wait for it as long
as they come (`dist.ranks.meet`)."""

count = 0
"""Signs so far."""


def beat() -> None:
    """Called once for each small piece of such work."""
    global count
    count += 1
