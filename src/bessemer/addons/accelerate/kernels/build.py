"""Compiles the kernels with the machine's C++ compiler, once, into a cache.

A library's name contains hashes of everything it depends on: sources and flags, then the compiler and the C library.
Instruction sets are chosen by name and never by -march=native, so a cache in a home directory shared by several
machines holds a library for each. A machine without a compiler uses a library that another machine built.

Processes that start together build once, under a lock. A library is tried in a separate process and appears under its
name complete or not at all; its SHA-256, stored next to it, is checked before it is loaded. A failed build is not
retried for an hour, so not by every process of a test run either; `forget_failures` lifts that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bessemer.addons.accelerate.kernels import cache
from bessemer.addons.accelerate.kernels.cache import BuildError
from bessemer.system import granted_cores

SOURCES = Path(__file__).parent / "cpp"
HEADER = "gemm.hpp"
COMMON = (
    "-std=gnu++17", "-O2", "-fpeel-loops", "-funswitch-loops", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w",
)  # fmt: skip
"""gnu++17 and not c++17: only the former lets GCC contract a * b + c. No -ffast-math: NaN and infinity must survive.
Loops are already vectorised: full -O3 builds twice as long and runs no faster than its two flags named here."""
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2")
AVX512 = (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")), "-mprefer-vector-width=512")
FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": AVX2,
    "neon": ("-march=armv8-a",),
    "baseline": (),
    "emulated-amx": ("-DBESSEMER_EMULATE_TILES", "-O1", *(AVX2 if platform.machine() == "x86_64" else ())),
}
"""Compiler flags for each instruction set. Features are listed one by one because GCC knows -march=x86-64-v3 only from
version 11 on. The last set runs AMX's code on any machine of the last ten years, slowly, for tests; with -O1 it builds
in two thirds of the time and is no slower."""
SECONDS = 120
"""A build takes about 10 s on two cores. One that takes longer than this is stuck."""
AGAIN_SECONDS = 3600
"""A failed build is tried again after this time."""
MESSAGE_BYTES = 65536
"""How much of a compiler's messages is kept; the rest is read and dropped."""
TRIAL = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).bessemer_check())"


def compiler() -> list[str]:
    """The C++ compiler command: $CXX, which may have arguments, else the first of g++, c++ and clang++ found."""
    named = os.environ.get("CXX", "").split()
    for words in [named] if named else (["g++"], ["c++"], ["clang++"]):
        if path := shutil.which(words[0]):
            return [path, *words[1:]]
    missing = f"CXX names {named[0]}, which is not found" if named else "no C++ compiler"
    raise BuildError(f"{missing}; install g++", final=True)


def built(instructions: str) -> Path:
    """The path of the library for an instruction set, built if the cache lacks it. Raises BuildError if that fails."""
    flags = [*COMMON, *FLAGS[instructions]]
    name = f"kernels-{instructions}-{_hash_of_sources(flags)}"
    folder = cache.folder()
    try:
        command = compiler()
    except BuildError:
        older = sorted(folder.glob(f"{name}-*.so"), key=os.path.getmtime)
        if library := next(filter(cache.intact, reversed(older)), None):
            return library
        raise
    path = folder / f"{name}-{_hash_of_compiler(command)}.so"
    if cache.intact(path):
        return path
    try:
        with cache.locked(path.with_suffix(".lock")):
            if not cache.intact(path):
                _build_once(command, flags, path)
    except OSError as error:
        why = f"the kernels cannot be built in {folder} ({error.strerror or error})"
        raise BuildError(f"{why}; free some space, or set {cache.VARIABLE} to another folder", final=True) from None
    return path


def forget_failures() -> None:
    """Lets the next process retry failed builds."""
    with contextlib.suppress(BuildError, OSError):
        for record in cache.folder().glob("*.failed"):
            record.unlink()


def _hash_of_sources(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for source in sorted(SOURCES.glob("*.[ch]pp")):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _hash_of_compiler(command: Sequence[str]) -> str:
    """Hashes the files of the command and not what it prints: every start needs this, and a compiler may hang."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    facts = [libc, *command]
    for path in filter(None, map(shutil.which, command)):
        with contextlib.suppress(OSError):
            info = os.stat(path)
            facts.append(f"{os.path.realpath(path)} {info.st_size} {info.st_mtime_ns}")
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def _build_once(command: Sequence[str], flags: Sequence[str], path: Path) -> None:
    """Builds, unless a build failed within the last hour."""
    record = path.with_suffix(".failed")
    with contextlib.suppress(OSError, ValueError):
        if time.time() - record.stat().st_mtime < AGAIN_SECONDS:
            final, why = record.read_text().split(" ", 1)
            raise BuildError(why, final=final == "final")
    try:
        _build(command, flags, path)
    except BuildError as error:
        with contextlib.suppress(OSError):
            record.write_text(f"{'final' if error.final else 'this'} {error}")
        raise
    record.unlink(missing_ok=True)


def _build(command: Sequence[str], flags: Sequence[str], path: Path) -> None:
    """Compiles every source, links, tries the result, and moves it to `path`."""
    cache.sweep(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-", ignore_cleanup_errors=True) as work:
        until = time.monotonic() + SECONDS
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)  # largest first
        objects = [f"{work}/{source.stem}.o" for source in sources]
        start = [*command, *flags, *_shared_header(command, flags, until, work)]
        _run([[*start, "-c", str(source), "-o", f"{work}/{source.stem}.o"] for source in sources], until, work)
        result = Path(work, path.name)
        libraries = () if sys.platform == "darwin" else ("-ldl",)
        _run([[*command, "-shared", "-o", str(result), *objects, *libraries]], until, work)
        if not result.is_file():
            raise BuildError(f"{command[0]} reported success but wrote nothing")
        result.chmod(0o700)
        _try(result)
        digest = Path(work, "sha256")
        digest.write_text(hashlib.sha256(result.read_bytes()).hexdigest())
        os.replace(digest, path.with_suffix(".sha256"))
        os.replace(result, path)


def _shared_header(command: Sequence[str], flags: Sequence[str], until: float, work: str) -> list[str]:
    """Precompiles the header that all sources include, which saves a fifth of the time, and returns the flags to use
    it. A compiler that cannot do this reads the header for each source."""
    if not (SOURCES / HEADER).exists():
        return []
    header = Path(work, "shared.hpp")
    header.write_text(f'#include "{SOURCES / HEADER}"\n')
    with contextlib.suppress(BuildError):
        _run([[*command, *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]], until, work)
    return ["-include", str(header)]


def _run(commands: Sequence[Sequence[str]], until: float, temporary: str) -> None:
    """Runs the commands, as many at a time as there are cores. Raises BuildError if one fails or runs past `until`, and
    OSError if the disk is full."""
    waiting, running = list(commands), 0
    most = granted_cores()
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and running < most:
                    command = waiting.pop(0)
                    job = _started(command, temporary)
                    assert job.stderr is not None
                    selector.register(job.stderr, selectors.EVENT_READ, (command[0], job, bytearray()))
                    running += 1
                ready = selector.select(max(0, until - time.monotonic()))
                if time.monotonic() > until:
                    raise BuildError(f"{commands[0][0]} did not finish within {SECONDS} s", final=True)
                for key, _ in ready:
                    name, job, message = key.data
                    piece = os.read(key.fd, MESSAGE_BYTES)
                    message += piece[: MESSAGE_BYTES - len(message)]
                    if not piece:
                        selector.unregister(key.fileobj)
                        running -= 1
                        _finished(name, job, message, until)
        finally:
            for key in list(selector.get_map().values()):
                _end(key.data[1])


def _started(command: Sequence[str], temporary: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"LC_ALL": "C", "TMPDIR": temporary},
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started ({error.strerror})", final=True) from None


def _finished(name: str, job: subprocess.Popen[bytes], message: bytes, until: float) -> None:
    try:
        status = job.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(job)
        raise BuildError(f"{name} did not finish within {SECONDS} s", final=True) from None
    assert job.stderr is not None
    job.stderr.close()
    if status < 0:
        raise BuildError(f"{name} was killed by {_signal(status)}")
    if status:
        text = message.decode(errors="replace")
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in text:
                raise OSError(number, os.strerror(number))
        lines = [line for line in text.splitlines() if line.strip() and "ld returned" not in line] or ["no message"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{name} failed: {''.join(filter(str.isprintable, line)).strip()[:200]}")


def _end(job: subprocess.Popen[bytes]) -> None:
    """Ends a command and the processes it started, by its process group, whose number is not reused before `wait`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    if job.stderr is not None:
        job.stderr.close()


def _try(library: Path) -> None:
    """Loads a new library and runs it in another process, so that a bad one crashes that process and not this one."""
    if not sys.executable:  # Python inside another program
        return
    command = [sys.executable, "-I", "-S", "-c", TRIAL, str(library)]
    try:
        trial = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError("the built kernels hang", final=True) from None
    if trial.returncode < 0:
        raise BuildError(f"the built kernels crash ({_signal(trial.returncode)})")
    if trial.returncode == 2:
        raise BuildError("the built kernels compute wrong numbers")
    if trial.returncode:
        last = (trial.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        last = last.replace(str(library), library.name)[:200]
        raise BuildError(f"the built kernels cannot be loaded: {last}", final="map segment" in last)


def _signal(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
