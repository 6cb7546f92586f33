"""The run directory: its owner, its lock, the folder of each stage, and the records in that folder.

    runs/NAME/{recipe.toml, plan.json, metrics.jsonl, conformance.json, report.html, NN-stage/, NN-stage.stale-K/}

`stage.json` records what a stage was made from, `done.json` that its output is complete. `identity` is everything that
determines a stage's output: format, settings, seed, model, derived facts, and the fingerprints of its inputs; its hash
is the fingerprint. `done.json` is written last and atomically, with size and sha256 of every output file, so it exists
exactly when the stage is complete. Output is every file in the stage's folder outside `state/`, except the records.

Invariants: one process at a time (a POSIX lock on `.lock`, which the system frees even after kill -9 and `check` takes
again if somebody deleted it); one recipe name per directory; a stage's output is never deleted, only moved aside.
"""

import hashlib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import IO, Any

from bessemer import __version__
from bessemer.config.builtin import FORMAT_LINE, RUN_FORMAT, check_run_format
from bessemer.data.fetch import sha256_of
from bessemer.data.fingerprints import sha256
from bessemer.errors import UserError
from bessemer.runs.files import BACK, explained, is_temporary, read_json, write_atomic, write_json
from bessemer.runs.metrics import Metrics
from bessemer.system import claim, sync_folder

PLAN = "plan.json"
"""What the hook `progress` keeps: {"seconds": {stage: estimate}, "interval": of what was to run, "share": of a core
that the measurement got, "left": {"seconds", "time"}}."""
_RECORDS = {"done.json", "stage.json", "wall.json"}
_STAGE = re.compile(r"(\d\d+)-([A-Za-z0-9][A-Za-z0-9_-]*)")


class RunDir:
    """An open run directory. Use `with RunDir.open(...)`: leaving the block frees the lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock, self.killed = _take_lock(root)
        """A message about the previous holder of the lock if it was killed, else empty."""

    @classmethod
    def open(cls, root: Path, name: str) -> "RunDir":
        """Create or enter `root` for the recipe called `name`."""
        with explained(root):
            try:
                root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # /proc and the like, where nothing can be created
                raise UserError(
                    f"cannot make the folder {root} ({error.strerror}); choose another one with --out"
                ) from None
            if not (root / "recipe.toml").exists():
                other_files = sorted(
                    path.name for path in root.iterdir() if path.name != ".lock" and not is_temporary(path)
                )
                if other_files:
                    raise UserError(
                        f"{root} is not a run directory and not empty (it holds {', '.join(other_files[:3])}); "
                        "choose another folder with --out"
                    )
            elif (owner := recipe_name(root)) != name:
                raise UserError(
                    f'{root} belongs to the recipe "{owner}", not "{name}"; choose another folder with --out, '
                    "or change the recipe's name back"
                )
            check_run_format(root)
            return cls(root)

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.truncate(0)  # only a killed process leaves a line behind
        self._lock.close()

    def check(self) -> None:
        """Raises UserError if this process no longer holds the directory. Takes a deleted lock again."""
        if not self.root.is_dir():
            why = "deleted, moved, or its disk unmounted"
            raise UserError(f"{self.root} has vanished while the run was using it: {why}; {BACK}")
        path, status = self.root / ".lock", os.fstat(self._lock.fileno())
        if path.exists() and os.path.samestat(path.stat(), status):
            return
        try:
            lock, _ = _take_lock(self.root)
        except UserError as error:
            raise UserError(f"the lock of this run was deleted, and it ends here: {error}") from None
        self._lock.close()
        self._lock = lock

    def record_recipe(self, text: str) -> None:
        path, text = self.root / "recipe.toml", FORMAT_LINE.format(__version__, RUN_FORMAT) + text
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)

    def folder(self, number: int, name: str) -> Path:
        """The folder of stage `name`, the recipe's `number`-th (from 1). Renames it if its number has changed."""
        folder = self.root / f"{number:02d}-{name}"
        for found_number, found_name, path in stage_folders(self.root):
            if found_name == name and found_number != number:
                os.rename(path, folder)
        return folder

    def set_aside(self, folder: Path, name: str, metrics: Metrics) -> Path:
        """Move a stage's folder, with its metric lines, to NN-name.stale-K."""
        count = 1
        while (aside := folder.with_name(f"{folder.name}.stale-{count}")).exists():
            count += 1
        # copy the lines before the rename and drop them after it, so a kill in between loses none
        lines = [line for line in metrics.lines() if line.get("stage") == name]
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
            write_atomic(folder / "metrics.jsonl", text)
        os.rename(folder, aside)
        sync_folder(self.root)
        metrics.rewind(name, -1)
        return aside


def _take_lock(root: Path) -> tuple[IO[str], str]:
    """The lock, and a message if its last holder was killed: a holder writes "PROCESS OOM-KILLS" while it runs."""
    lock = open(root / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
    lock.seek(0)
    fields = lock.read().split()
    if not claim(lock, fields[0] if fields else ""):
        holder = fields[0] if fields else "another process"
        lock.close()
        raise UserError(
            f"{root} is in use by another run (process {holder}); wait for it, stop it, or choose another --out"
        )
    lock.truncate(0)
    lock.write(f"{os.getpid()} {_oom_kills()}\n")
    lock.flush()
    killed = ""
    if len(fields) == 2:
        memory = fields[1].isdigit() and int(fields[1]) < _oom_kills()
        why = " (this machine has run out of memory since: if that was why, use shorter rows or fewer workers)"
        killed = (
            f"the last attempt (process {fields[0]}) was killed{why if memory else ''}; continuing from what it saved"
        )
    return lock, killed


def _oom_kills() -> int:
    """Processes that this machine's kernel has killed for lack of memory; 0 if it does not say."""
    try:
        return int(dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines()).get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def recipe_name(root: Path) -> str:
    """The name of the recipe that a run directory belongs to."""
    try:
        return str(read_recipe(root)["name"])
    except (OSError, KeyError, ValueError) as error:  # invalid TOML or UTF-8
        raise UserError(f"{root}/recipe.toml cannot be read ({error}); choose another folder with --out") from None


def read_recipe(root: Path) -> dict[str, Any]:
    """A run's recipe as TOML; raises OSError or ValueError."""
    with open(root / "recipe.toml", "rb") as file:
        return tomllib.load(file)


def stage_folders(root: Path) -> list[tuple[int, str, Path]]:
    """(number, stage name, folder) in order, without the folders set aside."""
    folders = []
    for path in root.iterdir():
        if path.is_dir() and (match := _STAGE.fullmatch(path.name)):
            folders.append((int(match[1]), match[2], path))
    return sorted(folders)


def run_dir(name: str | Path) -> Path:
    """A run directory from a path, or from the name of a run under runs/."""
    for path in (Path(name), Path("runs") / name):
        if (path / "recipe.toml").is_file():
            return path
    raise UserError(f"{name} is not a run directory (no recipe.toml in it); {available_runs()}")


def writing_models(root: Path) -> list[tuple[str, Path]]:
    """(stage, folder) of every finished model that writes text, not of reward models; last the recipe's `main`."""
    models = []
    for _, name, folder in stage_folders(root):
        config = read_json(folder / "model" / "config.json")
        if config is None or not (folder / "done.json").is_file():
            continue
        if not str(config.get("architectures", "")).count("ForSequenceClassification"):
            models.append((name, folder))
    try:
        main = read_recipe(root).get("main")
    except (OSError, ValueError, RecursionError):  # a damaged recipe does not keep anyone from the models
        main = None
    return sorted(models, key=lambda model: model[0] == main)


def available_runs() -> str:
    """What to name, for an error."""
    names = sorted(path.parent.name for path in Path("runs").glob("*/recipe.toml"))
    return f"available runs: {', '.join(f'runs/{name}' for name in names)}" if names else "there are none in runs/ here"


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The differences of two identities as text: 'lr 0.003 -> 0.001, seed 7 -> 8'."""
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
            words.append(f"{short} {_short(before.get(key))} -> {_short(after.get(key))}")
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= 40 else text[:37] + "..."


def write_stage_record(
    folder: Path, identity: dict[str, Any], inputs: dict[str, str], files: dict[str, dict[str, str]], since: float
) -> None:
    """Write stage.json. `inputs` maps the stages it reads to the digests of their output, which a rerun may change;
    `files` are those it reads from outside the run (`pipeline/inputs.py`), as they were at the Unix time `since`."""
    record = {
        "fingerprint": digest(identity),
        "identity": identity,
        "inputs": inputs,
        "files": files,
        "since": round(since),
    }
    write_json(folder / "stage.json", record)


def write_done(
    folder: Path, record: dict[str, Any], summary: dict[str, Any], seconds: float, cpu_seconds: float = 0.0
) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in outputs(folder)
    }
    done = {
        "fingerprint": record["fingerprint"], "inputs": record["inputs"], "summary": summary,
        "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3),
        "outputs": files, "digest": digest(files), "version": __version__,
    }  # fmt: skip
    done = json.loads(json.dumps(done))  # as it will be read back
    write_json(folder / "done.json", done | {"checksum": digest(done)})
    return done


def read_done(folder: Path) -> dict[str, Any] | None:
    """The record of a complete stage. None if it is missing or damaged: the stage then runs again, and its output is
    compared with what later stages were made from."""
    done = read_json(folder / "done.json") or {}
    is_complete = isinstance(done.get("summary"), dict) and isinstance(done.get("seconds"), int | float)
    is_complete = (
        is_complete and {"fingerprint", "inputs"} <= done.keys() and done.get("digest") == digest(done.get("outputs"))
    )
    return done if is_complete else None


def outputs(folder: Path) -> list[Path]:
    """The stage's output files, in a fixed order."""
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "state"
        and not (path.parent == folder and path.name in _RECORDS)
        and not any(map(is_temporary, (path, *path.relative_to(folder).parents)))
    )  # fmt: skip


def damage(folder: Path, done: dict[str, Any]) -> str:
    """How the output differs from its record, or the record from what was written; '' if both are intact."""
    return next(iter(damages(folder, done).values()), "")


def damages(folder: Path, done: dict[str, Any]) -> dict[str, str]:
    """How every damaged file of the output, or done.json itself, differs from what was written, by its name."""
    if not done.keys() >= {"fingerprint", "inputs", "summary", "seconds", "outputs", "digest"}:
        return {"done.json": "done.json is broken"}
    if done.get("checksum") != digest({k: v for k, v in done.items() if k != "checksum"}):
        return {"done.json": "done.json is not what was written (checksum differs)"}
    broken = {}
    for name, fact in done["outputs"].items():
        path = folder / name
        if not path.is_file():
            broken[name] = f"{name} is missing"
        elif path.stat().st_size != fact["size"]:
            broken[name] = f"{name} has {path.stat().st_size} bytes instead of {fact['size']}"
        elif sha256(path, fresh=True) != fact["sha256"]:
            broken[name] = f"{name} is not what was written (checksum differs)"
    return broken
