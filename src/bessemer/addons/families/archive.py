"""A model as one file to download: `bessemer pack` writes NAME.tar, `bessemer pull NAME.tar` unpacks it.

- An archive holds one folder, NAME, that transformers and vLLM read as it is. Its SHA256SUMS lists every file but the
  card, which its owner may edit; whoever loads the folder compares them (`fingerprints.check_finished`).
- The same files give the same bytes: names are sorted, and there are no dates and owners.
- An archive may come from anybody. Only regular files with the names of a model's files are taken out of it, each
  header is read alone, so none is longer than 512 bytes, and the folder appears when all hashes are right.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from bessemer.addons.families.remote import FILES, check_new
from bessemer.data.fetch import sha256_of
from bessemer.data.fingerprints import listed
from bessemer.data.model_files import SUMS, check_regular
from bessemer.errors import UserError
from bessemer.hf.replace import replacing

CARD = "README.md"
_PIECE = 1 << 20


def model_files(directory: Path) -> dict[str, Path]:
    """The files of a model directory that belong into its archive: weights, configuration, tokenizer."""
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_file() and _known(path.name)}


def _known(name: str) -> bool:
    safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    return bool(safe) and (name in (CARD, SUMS) or any(fnmatch(name, pattern) for pattern in FILES))


def write(target: Path, files: Mapping[str, Path | bytes]) -> str:
    """Writes the archive of these files at `target`, and returns its SHA-256."""
    contents: dict[str, Path | bytes] = {**files}
    contents[SUMS] = sums({name: _digest(content) for name, content in files.items() if name != CARD})
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in sorted(contents.items()):
            info = tarfile.TarInfo(f"{target.stem}/{name}")
            with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
                info.size = file.seek(0, io.SEEK_END)
                file.seek(0)
                tar.addfile(info, file)
    return sha256_of(target)


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


def sums(digests: Mapping[str, str]) -> bytes:
    """The text of a SHA256SUMS file: digests by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def unpack(archive: Path, target: Path) -> None:
    """Unpacks an archive into a new folder. Raises UserError unless its files are those that its SHA256SUMS lists."""
    check_new(target)
    try:
        check_regular(archive)
        with open(archive, "rb") as file, replacing(target) as fresh:
            found = dict(_members(archive, file, fresh))
            if SUMS not in found:
                raise _foreign(archive, f"it holds no {SUMS}")
            expected, written = listed(fresh / SUMS), found.keys() - {SUMS, CARD}
            for name in sorted(written | expected.keys()):
                if name not in written:
                    raise UserError(f"{archive} is not whole: {name} is missing; download it again")
                if found[name] != expected.get(name):
                    raise UserError(f"{archive}: {name} does not have the SHA-256 in its {SUMS}; download it again")
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror or error}") from None


def _members(archive: Path, file: IO[bytes], folder: Path) -> Iterator[tuple[str, str]]:
    """Writes every file of an archive into `folder`; yields its name and SHA-256."""
    written: set[str] = set()
    while any(header := file.read(tarfile.BLOCKSIZE)):
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError):
            raise _foreign(archive, "it has a block that is no header of a tar file") from None
        above, _, name = member.name.rpartition("/")
        if member.type != tarfile.REGTYPE or not above or "/" in above or not _known(name):
            raise _foreign(archive, f"it holds {member.name[:80]!r}")
        if name in written:
            raise _foreign(archive, f"it holds {name} twice")
        written.add(name)
        digest, left = hashlib.sha256(), member.size
        with open(folder / name, "wb") as out:
            while left > 0:
                if not (piece := file.read(min(left, _PIECE))):
                    raise UserError(f"{archive} is cut off within {name}; download it again")
                out.write(piece)
                digest.update(piece)
                left -= len(piece)
        file.seek(-member.size % tarfile.BLOCKSIZE, io.SEEK_CUR)
        yield name, digest.hexdigest()


def _foreign(archive: Path, why: str) -> UserError:
    return UserError(f"{archive} is not an archive that bessemer pack wrote: {why}; nothing was unpacked")
