"""Files of a run: writing that survives a kill at any moment, JSON records, the conversations that a stage exports.

Invariant: a file written by `write_atomic` has its old or its new content, never anything in between. Errors of the
operating system become UserErrors that name the path and the fix.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bessemer.data.chat import Message
from bessemer.errors import UserError
from bessemer.hf.replace import lacking
from bessemer.system import sync_folder

BACK = "bring it back, or run the same command again for a new one"
CONVERSATIONS = "samples.jsonl"
"""The file of conversations that a stage exports for SFT: one JSON object per line, {"messages": [...]}."""
JUDGED = "judged.jsonl"
"""The file of judged answers that a reward model was trained and measured on: records of `data/formats`."""
ROLLOUTS = "rollouts.jsonl"
"""The file of answers to the few held-out problems that RL asks repeatedly."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


PIECE = 1 << 20


def pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, at most PIECE at a time."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def write_atomic(path: Path, data: str | bytes | Iterator[str] | Iterator[bytes]) -> None:
    """Write a temporary file in the same folder, fsync it, rename it, and fsync the folder. An iterator's pieces are
    written as they come."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for piece in (data,) if isinstance(data, str | bytes) else data:
                file.write(piece.encode("utf-8", "replace") if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether this is what `write_atomic`, `reuse` or a plan of shards left when killed, if nothing writes there."""
    return ".tmp-" in path.name


def explain(error: BaseException, path: Path) -> UserError | None:
    """The UserError for `error`, or None if it is a bug. The message names `path` if the error names no file."""
    # libraries that write from Rust or C++ (safetensors, torch) raise their own types, with the system's message
    number = error.errno if isinstance(error, OSError) else None
    where = error.filename if isinstance(error, OSError) and error.filename else path
    if number in _FULL or "No space left on device" in str(error):
        lack = lacking(Path(where).parent)
        return UserError(
            f"disk full: cannot write {where}; free some {lack} and run the same command again; what was saved is kept"
        )
    if number == errno.EFBIG:
        return UserError(
            f"cannot write {where}: it would exceed the maximum size of a file, this process's (ulimit -f) or the file "
            "system's; raise it and run the same command again; what was saved is kept"
        )
    if number == errno.ENAMETOOLONG:
        return UserError(f"the name {str(where)[:40]}... is too long for the file system; give a shorter one")
    if number in _AWAY:
        assert isinstance(error, OSError)
        return UserError(
            f"the disk of {where} does not respond ({error.strerror}); repair or mount it, and run the same command "
            "again"
        )
    if isinstance(error, FileExistsError | NotADirectoryError) and not Path(where).is_dir():
        return UserError(f"{where}: a file is in the way; move it, or choose another folder (--out)")
    if isinstance(error, FileNotFoundError) and not path.exists():
        return UserError(f"{path} has vanished while it was in use: deleted, moved, or its disk unmounted; {BACK}")
    if number in _FORBIDDEN:
        why = error.strerror if isinstance(error, OSError) else error
        return UserError(
            f"no permission for {where} ({why}); change its owner or mode, or choose another folder (--out)"
        )
    return None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusals inside the block into UserErrors that name the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (refusal := explain(error, path)) is not None:
            raise refusal from error
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or unreadable."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):  # RecursionError: nested too deeply
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def json_lines(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Records as the lines of a file."""
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def conversation_line(messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """A conversation, and the tools that it describes, as a line of the CONVERSATIONS file, without the line break."""
    return json.dumps({"messages": list(messages)} | ({"tools": list(tools)} if tools else {}), ensure_ascii=False)


def write_conversations(folder: Path, lines: Iterable[str]) -> None:
    """Write the whole CONVERSATIONS file in a stage's folder."""
    write_atomic(folder / CONVERSATIONS, (f"{line}\n" for line in lines))


def conversation_texts(folder: Path) -> Iterator[str]:
    """The contents of each conversation in a stage's folder, as one text."""
    with open(folder / CONVERSATIONS, encoding="utf-8") as file:
        for line in file:
            yield "\n".join(message["content"] for message in json.loads(line)["messages"])
