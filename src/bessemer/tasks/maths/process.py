"""The referee's half of `maths`: math-verify on one whole expression.

math-verify looks for something that parses anywhere in a text. Here the text of the answer tags is one expression or
nothing: it is put between dollar signs as it stands, and only LaTeX so delimited is read, without any fallback.
"""

import logging
import warnings
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.maths.algebra import guard_sympy

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error:
    raise UserError(f"judging mathematics needs math-verify ({error}): pip install math-verify") from error

guard_sympy()
logging.disable(logging.WARNING)  # it warns that its own timeout is off, which is the point
warnings.simplefilter("ignore")
_CONFIG = [LatexExtractionConfig()]
MAX_CANONICAL = 200


def warm(request: dict[str, Any]) -> None:
    """One verdict of each expensive kind, once, so that a fork finds the tables and caches they need."""
    if not _warmed:
        _warmed.append(True)
        for gold, answer in (("x^2+2x+1", "(x+1)^2"), (r"\sqrt{3}", "1.7"), (r"\{1,2\}", "1,3"), ("x=3", "y=3")):
            verify(_parsed(gold), _parsed(answer), timeout_seconds=None)


_warmed: list[bool] = []


def read(prepared: None, request: dict[str, Any]) -> dict[str, Any]:
    """Whether a gold answer is an expression."""
    return {"read": bool(_parsed(request["gold"]))}


def same(prepared: None, request: dict[str, Any]) -> dict[str, Any]:
    """{"same": verdict, "canonical": how sympy writes the answer}, or canonical None where it is no expression."""
    answer = _parsed(request["answer"])
    if not answer:
        return {"same": False, "canonical": None}
    equal = verify(_parsed(request["gold"]), answer, timeout_seconds=None)
    return {"same": bool(equal), "canonical": str(answer[0])[:MAX_CANONICAL]}


def _parsed(text: str) -> list[Any]:
    """What math-verify reads; strings it could not make sense of are left out."""
    found = parse(f"${text}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in found if not isinstance(expression, str)]
