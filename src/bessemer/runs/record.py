"""What is known about a stage on disk: what it was made from (`stage.json`) and that it is whole (`done.json`).

`identity` is everything a stage's output follows from: format, settings, seed, model, derived facts, and the
fingerprints of its inputs; its hash is the fingerprint. `done.json` is written last and atomically, with size and
sha256 of every output file, so it exists exactly when the stage is complete. Output is every file of the stage's folder
outside `state/` and besides the records themselves.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.runs.files import sha256, write_atomic

RUN_FORMAT = 1  # raise it when run directories change in a way that old ones cannot be continued
_RECORDS = {"done.json", "stage.json", "wall.json"}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any], renamed: dict[str, str]) -> str:
    """In words, what separates two identities: 'lr 0.003 -> 0.001, seed 7 -> 8'.

    Identities hold the old names of `renamed` keys (old -> new); the text has the new ones.
    """
    before, after = _flat(old), _flat(new)
    changed = [key for key in after | before if before.get(key) != after.get(key)]
    words = []
    for key in changed:
        short = key.removeprefix("settings.").removeprefix("derived.")
        if key.startswith("inputs."):
            words.append(f'its input "{key.removeprefix("inputs.")}" changed')
        elif key == "format":
            words.append("this version writes the stage differently")
        else:
            words.append(f"{renamed.get(short, short)} {_short(before.get(key))} -> {_short(after.get(key))}")
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= 40 else text[:37] + "..."


def write_begun(folder: Path, what: dict[str, Any], inputs: dict[str, str]) -> None:
    """`inputs` maps the stages it reads to the digests of their output, which a rerun may change."""
    write_json(folder / "stage.json", {"fingerprint": digest(what), "identity": what, "inputs": inputs})


def write_done(folder: Path, begun: dict[str, Any], summary: dict[str, Any], seconds: float) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in outputs(folder)
    }
    done = {
        "fingerprint": begun["fingerprint"], "inputs": begun["inputs"], "summary": summary,
        "seconds": round(seconds, 3),
        "outputs": files, "digest": digest(files), "version": __version__,
    }  # fmt: skip
    write_json(folder / "done.json", done)
    return done


def outputs(folder: Path) -> list[Path]:
    """The stage's output files, in a fixed order."""
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "state"
        and not (path.parent == folder and path.name in _RECORDS) and ".tmp-" not in path.name
    )  # fmt: skip


def damage(folder: Path, done: dict[str, Any]) -> str:
    """Why the recorded output is no longer there as it was written; '' when it is."""
    for name, fact in done["outputs"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != fact["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {fact['size']}"
        if sha256(path) != fact["sha256"]:
            return f"{name} is not what was written (checksum differs)"
    return ""


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a record; None when there is none, or when it is unreadable and so worth nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
