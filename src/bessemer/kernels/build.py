"""Compiles the kernels with the machine's C++ compiler, once, into a cache.

The library's name holds a hash of everything that it follows from: the sources, the flags, and the compiler's version.
Instruction sets are chosen by name and never by -march=native, so a cache on a home directory that several machines
share holds a library for each. A lock makes processes that start together build once. A library appears under its
name complete or not at all; beside it lies its SHA-256, with which it is compared before it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE = "BESSEMER_KERNEL_CACHE"
"""Environment variable: the folder of the built libraries instead of ~/.cache/bessemer/kernels."""
SOURCES = Path(__file__).parent / "cpp"
COMMON = ("-std=gnu++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w")
"""gnu++17 and not c++17: only the former lets GCC contract a * b + c. No -ffast-math: NaN and infinity must survive."""
FLAGS: dict[str, tuple[str, ...]] = {
    "amx": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "neon": ("-march=armv8-a",),
    "baseline": (),
    "emulated-amx": ("-march=x86-64-v3", "-DBESSEMER_EMULATE_TILES"),
}
"""Compiler flags of every instruction set. The last one runs AMX's code on any machine of the last ten years, slowly,
for tests."""
SECONDS = 300
"""A compiler that takes longer is stuck."""


class BuildError(Exception):
    """Why there is no library: one line."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of g++, c++ and clang++."""
    named = os.environ.get("CXX", "").split()
    if named:
        return shutil.which(named[0])
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def built(instructions: str) -> Path:
    """The path of the library for an instruction set, built if the cache lacks it. BuildError says what failed."""
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler (g++ or clang++)")
    flags = [*COMMON, *FLAGS[instructions]]
    folder = _cache_folder()
    path = folder / f"kernels-{instructions}-{_fingerprint(command, flags)}.so"
    if intact(path):
        return path
    try:
        with _locked(folder / f"{path.stem}.lock"):
            if not intact(path):
                _build(command, flags, path)
    except OSError as error:
        raise BuildError(f"the kernels cannot be written to {folder}: {error.strerror or error}") from None
    return path


def intact(path: Path) -> bool:
    """Whether the library exists with the content that was built, and only its owner can have written it."""
    try:
        info = path.stat()
        mine = info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return mine and path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = Path(os.environ.get(CACHE) or home / "bessemer" / "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
        raise BuildError(f"{folder} belongs to someone else or cannot be written; set {CACHE} to a folder of yours")
    except OSError as error:
        raise BuildError(f"{folder} cannot be used ({error.strerror}); set {CACHE} to a folder of yours") from None


def _fingerprint(command: str, flags: list[str]) -> str:
    version = subprocess.run([command, "--version"], capture_output=True, timeout=SECONDS, check=False).stdout
    digest = hashlib.sha256(repr((command, version, flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(command: str, flags: list[str], path: Path) -> None:
    """Compiles every source in a process of its own, links, and moves the result to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
        jobs = [
            subprocess.Popen(
                [command, *flags, "-c", str(source), "-o", f"{work}/{source.stem}.o"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for source in sorted(SOURCES.glob("*.cpp"))
        ]  # fmt: skip
        for job in jobs:
            _finish(job, command)
        result = Path(work, path.name)
        objects = sorted(map(str, Path(work).glob("*.o")))
        link = [command, "-shared", "-o", str(result), *objects, *(() if os.uname().sysname == "Darwin" else ("-ldl",))]
        _finish(subprocess.Popen(link, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), command)
        result.chmod(0o700)
        digest = Path(work, "sha256")
        digest.write_text(hashlib.sha256(result.read_bytes()).hexdigest())
        os.replace(digest, path.with_suffix(".sha256"))
        os.replace(result, path)


def _finish(job: subprocess.Popen[str], command: str) -> None:
    try:
        _, errors = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        raise BuildError(f"{command} did not finish within {SECONDS} s") from None
    if job.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines() or ["no message"]
        raise BuildError(f"{command} failed: {lines[0].strip()[:200]}")
