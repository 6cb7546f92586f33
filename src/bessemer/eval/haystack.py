"""The needle task over a source of real text: pages from its training documents, problems from those held out.

The rule that holds documents out is the corpus's own (`data.encoded.is_heldout`), so a corpus and an evaluation that
name the same source and the same share agree on every document.
"""

from pathlib import Path
from typing import Any

from bessemer.data import sources
from bessemer.data.encoded import is_heldout
from bessemer.errors import UserError
from bessemer.tasks.needle import Needle

NEEDLE = "needle:"


def needle(source: str, share: float, cache: Path | None, **settings: Any) -> Needle:
    """The task in the text of `source`, of which `share` of the documents is held out. UserError where that leaves
    nothing to ask about; `settings` as for `Needle`."""
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for document in sources.documents(source, cache):
        texts["test" if is_heldout(document.text, share) else "train"].append(document.text)
    for split, owned in texts.items():
        if not owned:
            raise UserError(
                f'no document of "{source}" is in the {split} split at heldout = {share:g}; give a larger source, or '
                "another heldout"
            )
    return Needle(texts, **settings)
