"""Tries out the patterns of an untrusted tokenizer before they are used.

A pre-tokenizer or normalizer may contain regular expressions that take exponential time on a run of one letter, or
gigabytes to compile. The library gives up with a panic, which is not an Exception and prints a stack trace. So unknown
patterns are first compiled and run on short texts in a limited child process (`python -m` this module).
A pattern can still fail on another text; `explained` reports that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from bessemer.addons.tasks.child import Child, NoReply, bounded, confine, serve
from bessemer.data.tokenizer import KNOWN, regular_expressions
from bessemer.errors import UserError

CPU_SECONDS = 2.0
"""Processor time for all texts; usual patterns take a millisecond."""
PATIENCE = 120.0
"""Seconds to wait for the reply, since the machine may be busy."""
MEMORY = 1 << 29
RUN = 48
"""Characters in a run: enough for 2^48 steps, too few for a pattern of quartic time to matter."""
TEXTS = [run + end for run in (c * RUN for c in "aA1 .\n\tx_é漢") for end in ("", "!", "!abxyz019 \n")]
TEXTS += ["ab" * RUN, " a" * RUN, "a1" * RUN, " \n" * RUN, "a." * RUN, "aA" * RUN]


def check(spec: dict[str, Any], where: str) -> None:
    """Raises UserError for patterns that explode; our own need no trial. `spec`: a parsed tokenizer.json."""
    parts = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
    if KNOWN.issuperset(regular_expressions(parts)):
        return
    try:
        reply = _child(os.getpid()).exchange(parts, PATIENCE)
    except NoReply as error:
        why = f"take more than {CPU_SECONDS:g} s of processor time" if error.out_of_time else f"crash ({error})"
        raise UserError(
            f"{where}: its patterns {why} on {len(TEXTS)} short texts; use the tokenizer of a model you trust"
        ) from error
    if "error" in reply:
        raise UserError(f"{where}: its normalizer or pre-tokenizer does not work: {reply['error']}")


@contextmanager
def explained() -> Iterator[None]:
    """Turns a panic of the library in the block into a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library creates it at run time: there is nothing to import
            raise
        raise UserError(
            f"this tokenizer fails on this text ({str(error)[:200]}); use one of a model you trust"
        ) from None


@cache
def _child(pid: int) -> Child:
    """One child per process: a forked worker must not write to its parent's pipe."""
    return Child("bessemer.addons.families.patterns")


def main() -> None:
    import tokenizers  # noqa: F401  before the limit

    confine(MEMORY)
    serve(_answer)


def _answer(parts: dict[str, Any]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        with bounded(CPU_SECONDS):
            tok = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
            for text in TEXTS:
                tok.encode(text)
    except BaseException as error:  # a panic of the Rust library is not an Exception
        return {"error": str(error)[:200]}
    return {}


if __name__ == "__main__":
    main()
