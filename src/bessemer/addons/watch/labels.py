"""Names of runs that are shown together."""

import os
from collections.abc import Sequence
from pathlib import Path

from bessemer.errors import UserError


def run_labels(roots: Sequence[Path]) -> list[str]:
    """Names of run directories, with as much of the path as tells them apart. Raises UserError if two are the same."""
    paths = [root.resolve() for root in roots]
    if len(set(paths)) < len(paths):
        raise UserError("a run is named twice; name runs that differ")
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(paths)
    return [str(path.relative_to(shared)) for path in paths]
