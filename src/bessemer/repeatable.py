"""Hashes that every process agrees on, and random numbers of the global generators that repeat, for code which is not
ours and may draw them."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts alone; Python's own hash() changes with PYTHONHASHSEED."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@contextmanager
def repeatable(*parts: object) -> Iterator[None]:
    """Seeds the global generators of random and, if they are loaded, numpy and torch (on the CPU) from `parts`. Their
    states are put back afterwards, so nothing else notices what was drawn."""
    texts = (str(part).encode("utf-8", "backslashreplace").decode() for part in parts)  # surrogates have no UTF-8
    seed, undo = stable_hash(*texts), [partial(random.setstate, random.getstate())]
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        undo.append(partial(numpy.random.set_state, numpy.random.get_state()))
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
        torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        for restore in undo:
            restore()
