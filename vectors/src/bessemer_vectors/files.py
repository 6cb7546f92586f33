"""The files: data/TOPIC.json for every topic, and data/index.json with their hashes.

A topic's file is one JSON object:

    format      "bessemer-vectors/1"
    topic, title, formula, sources, tolerance     as in `topics`
    inputs, outputs    name: {type, shape, meaning}
    cases       list of {name, why, inputs, expected, rivals}

`inputs` and `expected` of a case map names to values. An array is {"type": "float64", "int64" or "bool", "shape":
[2, 3], "values": [[...], [...]]}, nested like its shape, row-major. Anything else is plain JSON. Floats are written
with the fewest digits that read back as the same float64; JSON has no infinities: they are "inf" and "-inf".
A rival is what a known bug or another convention gives for the same inputs: {formula, source, expected}. A case may
hold `example`, outputs to look at that are not compared.

The index holds {format, files: {name: {sha256, topic}}, sha256}: the hash of each file's bytes, and over all of them
the SHA-256 of the lines "HASH  NAME" in alphabetical order.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "bessemer-vectors/1"
DATA = Path(__file__).parent / "data"
INDEX = "index.json"
KINDS: dict[str, Any] = {"float64": np.float64, "int64": np.int64, "bool": np.bool_}
INFINITE = {"inf": float("inf"), "-inf": float("-inf")}


def encode(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, np.ndarray):
        kind = next((name for name, dtype in KINDS.items() if value.dtype == dtype), None)
        if kind is None:
            raise ValueError(f"arrays are float64, int64 or bool, not {value.dtype}")
        return {"type": kind, "shape": list(value.shape), "values": _finite(value.tolist())}
    return value.item() if isinstance(value, np.generic) else value


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(entry) for entry in values]
    return str(values) if isinstance(values, float) and values in INFINITE.values() else values


def decode(value: Any) -> Any:
    """The value of an encoded one. ValueError if an array's shape and values differ."""
    if not (isinstance(value, dict) and value.keys() == {"type", "shape", "values"}):
        return value
    return np.array(_numbers(value["values"]), dtype=KINDS[value["type"]]).reshape(value["shape"])


def _numbers(values: Any) -> Any:
    if isinstance(values, list):
        return [_numbers(entry) for entry in values]
    return INFINITE[values] if isinstance(values, str) else values


def text(value: Any, indent: int = 0) -> str:
    """JSON with a line per key and per innermost list, always the same for the same value."""
    if isinstance(value, dict) and value:
        pad = " " * (indent + 1)
        rows = [f"{pad}{json.dumps(key)}: {text(entry, indent + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(entry, (list, dict)) for entry in value):
        pad = " " * (indent + 1)
        return "[\n" + ",\n".join(pad + text(entry, indent + 1) for entry in value) + "\n" + " " * indent + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def combined(hashes: dict[str, str]) -> str:
    """One hash over the hashes of all files, by name."""
    return sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
