"""What an adapter returned against what is expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = {"b": "booleans", "i": "integers", "f": "numbers"}


class Unusable(Exception):
    """A result that cannot be compared; its text says why."""


@dataclass(frozen=True)
class Difference:
    """`relative` is 0 for equal results, and infinite where no number measures the difference."""

    relative: float
    text: str

    def agrees(self, tolerance: float) -> bool:
        return self.relative <= tolerance


def plain(value: Any) -> Any:
    """Lists and numbers of Python from whatever holds them: numpy, torch, JAX, tuples."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value


def difference(got: Any, expected: Any) -> Difference:
    """Unusable if the result has another shape or type, or holds NaN."""
    got = plain(got)
    if isinstance(expected, (str, list, dict)) or expected is None:
        return of_json(got, expected)
    wanted = np.asarray(expected)
    kind = wanted.dtype.kind
    try:
        array = np.array(got, dtype=np.float64)
    except (TypeError, ValueError):
        raise Unusable(f"{KINDS[kind]} of shape {list(wanted.shape)} are expected, not {short(got)}") from None
    if array.shape != wanted.shape:
        raise Unusable(f"shape {list(wanted.shape)} is expected, not {list(array.shape)}")
    if np.isnan(array).any():
        raise Unusable(f"{int(np.isnan(array).sum())} of {array.size} numbers are NaN")
    return of_numbers(array, wanted) if kind == "f" else of_exact(array, wanted)


def of_numbers(array: Any, wanted: Any) -> Difference:
    finite = np.isfinite(wanted)
    if (array[~finite] != wanted[~finite]).any() or not np.isfinite(array[finite]).all():
        return Difference(math.inf, "infinities stand elsewhere")
    if not finite.any():
        return Difference(0.0, "")
    gaps = np.where(finite, np.abs(np.where(finite, array, 0.0) - np.where(finite, wanted, 0.0)), 0.0)
    size = float(np.abs(wanted[finite]).max())
    relative = float(gaps.max()) / (size or 1.0)
    at = np.unravel_index(int(gaps.argmax()), gaps.shape)
    where = f"[{', '.join(map(str, at))}]" if at else ""
    return Difference(relative, f"{where} is {float(array[at]):.6g}, expected {float(wanted[at]):.6g}".strip())


def of_exact(array: Any, wanted: Any) -> Difference:
    wrong = array != wanted.astype(np.float64)
    if not wrong.any():
        return Difference(0.0, "")
    at = tuple(int(index[0]) for index in np.nonzero(np.atleast_1d(wrong)))
    first = f"{np.atleast_1d(array)[at]:g}, expected {np.atleast_1d(wanted)[at]:g}"
    if not wanted.ndim:
        return Difference(math.inf, f"is {first}")
    where = f"[{', '.join(map(str, at))}]"
    return Difference(math.inf, f"{int(wrong.sum())} of {wrong.size} differ; {where} is {first}")


def of_json(got: Any, expected: Any) -> Difference:
    if got == expected:
        return Difference(0.0, "")
    if isinstance(expected, str) and isinstance(got, str):
        common = min(len(got), len(expected))
        at = next((n for n in range(common) if got[n] != expected[n]), common)
        return Difference(math.inf, f"from character {at}: {got[at : at + 24]!r}, expected {expected[at : at + 24]!r}")
    if isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        wrong = [n for n in range(len(got)) if got[n] != expected[n]]
        n = wrong[0]
        return Difference(
            math.inf, f"{len(wrong)} of {len(got)} differ; [{n}] is {short(got[n])}, expected {short(expected[n])}"
        )
    if type(got) is not type(expected):
        raise Unusable(f"{named(expected)} is expected, not {short(got)}")
    return Difference(math.inf, f"is {short(got)}, expected {short(expected)}")


def named(value: Any) -> str:
    if value is None:
        return "null"
    return "a string" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
