"""How the kernels are built: real compilers, real processes, real damage. Most tests build three lines of C++."""

import ctypes
import fcntl  # noqa: F401 (as nobody, who may not read Python's files, no module can be imported any more)
import multiprocessing
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from bessemer.addons.accelerate.kernels import build, cache, library
from bessemer.addons.accelerate.kernels.cache import BuildError

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
CLANG = shutil.which("clang++")
SMALL = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int bessemer_start() { return 0; }
EXPORT int bessemer_check() { return CHECK; }
"""
START = """
#include "FOLDER/library.cpp"
extern "C" void product_float32(i64, i64, i64, const float*, i64, i64, const float*, i64, i64, float*, i64, i64, i64) {}
extern "C" void product_bfloat16(i64, i64, i64, const bf16*, i64, i64, const bf16*, i64, i64, float*, i64, i64, i64) {}
"""
PROCESS = """
import sys
from pathlib import Path
from bessemer.addons.accelerate.kernels import build
build.SOURCES = Path(sys.argv[1])
try:
    print(build.built("baseline"))
except build.BuildError as refused:
    print("refused:", refused)
"""
NOBODY = 54_321
needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be someone else")
pytestmark = needs_gxx


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """An empty cache and a small source tree."""
    folder, sources = tmp_path / "cache", tmp_path / "cpp"
    sources.mkdir()
    for path in [tmp_path, *tmp_path.parents] if os.getuid() == 0 else ():  # for the user nobody, too
        if not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
    (sources / "small.cpp").write_text(SMALL.replace("CHECK", "0"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(script): makes $CXX a script that adds a line to `runs` at every call."""

    def made(script: str, name: str = "compiler") -> Path:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/runs"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return made


def runs(tmp_path) -> int:
    """Compiler calls so far: two a build, one for the source and one to link."""
    path = tmp_path / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def process(sources: Path, before: str = "") -> subprocess.Popen[str]:
    """A fresh process that requests the library."""
    command = [sys.executable, "-c", before + PROCESS, str(sources)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def forked(work: Callable[[], object]) -> object:
    """work() in a fork of this process, which may change its own rights."""

    def answer(pipe: Connection) -> None:
        try:
            pipe.send(work())
        except BuildError as error:
            pipe.send(str(error))

    context = multiprocessing.get_context("fork")
    parent_end, child_end = context.Pipe()
    child = context.Process(target=answer, args=(child_end,))
    child.start()
    child_end.close()
    try:
        assert parent_end.poll(60)
        return parent_end.recv()
    finally:
        child.join()


def as_nobody() -> object:
    """What a user without rights to our folders gets."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return build.built("baseline")


def refused() -> str:
    """The one-line reason why there is no library."""
    with pytest.raises(BuildError) as why:
        build.built("baseline")
    assert str(why.value).isprintable() and len(str(why.value)) < 400
    return str(why.value)


def test_it_is_built_once_and_silently(cache_dir, compiler, tmp_path, capfd):
    compiler(f'echo noise; echo noise >&2; exec {GXX} "$@"')
    path = build.built("baseline")
    assert build.built("baseline") == path and cache.intact(path) and runs(tmp_path) == 2
    assert ctypes.CDLL(str(path)).bessemer_start() == 0
    assert capfd.readouterr() == ("", "")
    assert stat.S_IMODE(cache_dir.stat().st_mode) == 0o700
    assert sorted(p.suffix for p in cache_dir.iterdir()) == [".lock", ".sha256", ".so"]


def test_what_it_follows_from_is_in_the_name(compiler, tmp_path, monkeypatch):
    names = [build.built("baseline").name]
    monkeypatch.setitem(build.FLAGS, "baseline", ("-DOTHER",))
    names.append(build.built("baseline").name)
    (build.SOURCES / "new.hpp").write_text("")
    names.append(build.built("baseline").name)
    compiler(f'exec {GXX} "$@"')
    names.append(build.built("baseline").name)
    compiler(f'exec {GXX} -O1 "$@"')
    names.append(build.built("baseline").name)
    assert len(set(names)) == 5


def test_a_compiler_may_have_arguments(compiler, tmp_path, monkeypatch):
    path = compiler(f'shift; exec {GXX} "$@"')
    monkeypatch.setenv("CXX", f"{path} one")
    assert cache.intact(build.built("baseline"))


def test_processes_that_start_together_build_once(compiler, tmp_path):
    compiler(f'sleep 0.2; exec {GXX} "$@"')
    started = [process(build.SOURCES) for _ in range(4)]
    assert len({job.communicate(timeout=60)[0] for job in started}) == 1
    assert runs(tmp_path) == 2 and cache.intact(build.built("baseline"))


def test_no_compiler(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused() == "no C++ compiler; install g++"
    monkeypatch.setenv("CXX", "icpx-of-the-future")
    assert "icpx-of-the-future" in refused()


def test_without_a_compiler_another_machine_s_library_serves(tmp_path, monkeypatch):
    path = build.built("baseline")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.built("baseline") == path
    with path.open("ab") as file:
        file.write(b"x")
    assert refused().startswith("no C++ compiler")


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo 'small.cpp:1: error: no \x1b[31mluck' >&2; exit 1", "failed: small.cpp:1: error: no [31mluck"),
     ("exit 3", "failed: no message"), ("kill -SEGV $$", "was killed by SIGSEGV"),
     ("printf '\\377\\376\\0\\n\\r' >&2; exit 1", "failed: "), ("exit 0", "reported success but wrote nothing"),
     ('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"', "the built kernels cannot be loaded"),
     (f'exec {GXX} -DCHECK=2 "$@"', "the built kernels compute wrong numbers"),
     (f'exec {GXX} -DCHECK="*(volatile int*)8" "$@"', "the built kernels crash (SIGSEGV)")],
)  # fmt: skip
def test_broken_compilers(compiler, tmp_path, script, words):
    (build.SOURCES / "small.cpp").write_text(SMALL)
    compiler(script)
    assert words in refused()
    tried = runs(tmp_path)
    assert words in refused() and runs(tmp_path) == tried  # not again by every process that starts
    build.forget_failures()
    assert words in refused() and runs(tmp_path) == 2 * tried


@pytest.mark.parametrize(
    "script", ["sleep 1000 & echo $! > pid; wait", "exec yes error >&2", "sleep 1000 & echo $! > pid"]
)
def test_a_compiler_that_does_not_end(compiler, monkeypatch, tmp_path, script):
    monkeypatch.setattr(build, "SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    compiler(script)
    start = time.monotonic()
    with pytest.raises(BuildError, match="did not finish within") as why:
        build.built("baseline")
    assert time.monotonic() - start < 5 and why.value.final
    if (tmp_path / "pid").exists():
        state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
        while state.exists() and state.read_text().split()[2] != "Z":
            assert time.monotonic() - start < 5, "it still runs"
            time.sleep(0.01)


def test_a_file_that_is_no_program(tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    path.write_bytes(b"\0garbage")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "cannot be started" in refused()


def test_a_compiler_that_was_mended_is_tried_again(compiler, tmp_path):
    compiler("exit 1")
    refused()
    compiler(f'exec {GXX} "$@"')
    assert cache.intact(build.built("baseline"))


def test_a_build_killed_in_the_middle_starts_again(cache_dir, compiler, tmp_path):
    compiler(f'[ -e {tmp_path}/go ] || touch {tmp_path}/begun; [ -e {tmp_path}/go ] || sleep 3; exec {GXX} "$@"')
    first = process(build.SOURCES)
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    (leftover,) = cache_dir.glob("build-*")
    (tmp_path / "go").touch()
    assert cache.intact(build.built("baseline")) and leftover.exists()
    long_ago = time.time() - 2 * cache.LEFT_SECONDS
    os.utime(leftover, (long_ago, long_ago))
    build.built("neon" if platform.machine() == "aarch64" else "avx2")
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no digest", "digest of bytes", "empty"])
def test_a_damaged_library_is_built_again(compiler, tmp_path, damage):
    compiler(f'exec {GXX} "$@"')
    path = build.built("baseline")
    content, digest = path.read_bytes(), path.with_suffix(".sha256")
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "one bit":
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "no digest":
        digest.unlink()
    elif damage == "digest of bytes":
        digest.write_bytes(b"\xff\xfe")
    else:
        path.write_bytes(b"")
    assert not cache.intact(path)
    assert build.built("baseline") == path and cache.intact(path) and runs(tmp_path) == 4


def test_a_cache_that_can_only_be_read(cache_dir):
    """Serves what it holds, whether it belongs to the user or to an administrator."""
    cache_dir.mkdir()
    cache_dir.chmod(0o555)
    assert "Permission denied" in forked(as_nobody)
    cache_dir.chmod(0o755)
    path = build.built("baseline")
    path.chmod(0o755)
    cache_dir.chmod(0o555)
    assert forked(as_nobody) == path
    cache_dir.chmod(0o755)


def test_a_full_disk_is_not_remembered(cache_dir, compiler):
    compiler("echo 'as: out.o: No space left on device' >&2; exit 1")
    assert refused().endswith(
        f"{cache_dir} (No space left on device); free some space, or set {cache.VARIABLE} to another folder"
    )
    assert not list(cache_dir.glob("*.failed"))


def test_a_full_cache(cache_dir):
    """With a limit of 4 KB a file the build is refused; once the limit is gone, it works again."""
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    assert process(build.SOURCES, small).communicate(timeout=60)[0].startswith("refused: ")
    build.forget_failures()
    assert cache.intact(build.built("baseline"))


def test_a_cache_that_others_can_write_to(cache_dir):
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    assert "others can write to it" in refused()
    cache_dir.chmod(0o700)
    path = build.built("baseline")
    path.chmod(0o722)
    assert not cache.intact(path)
    assert build.built("baseline") == path and cache.intact(path)


@needs_root
def test_a_cache_of_someone_else(cache_dir):
    path = build.built("baseline")
    os.chown(path, NOBODY, NOBODY)
    assert not cache.intact(path)
    os.chown(cache_dir, NOBODY, NOBODY)
    assert "belongs to someone else" in refused()


def test_a_cache_that_is_a_file(cache_dir):
    cache_dir.write_text("")
    assert "set BESSEMER_KERNEL_CACHE to a folder of yours" in refused()


@needs_root
def test_an_environment_server_that_is_gone(monkeypatch):
    """A container's user without HOME or an entry in /etc/passwd."""
    for name in ("HOME", "XDG_CACHE_HOME", cache.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert forked(as_nobody) == "no home directory for the kernels; set BESSEMER_KERNEL_CACHE to a folder of yours"


def test_libraries_that_nobody_uses_go(cache_dir):
    old, used = build.built("baseline"), build.built("emulated-amx")
    long_ago = time.time() - 2 * cache.UNUSED_SECONDS
    for path in (old, used):
        os.utime(path, (long_ago, long_ago))
    build.built("emulated-amx")
    (build.SOURCES / "new.hpp").write_text("")
    build.built("baseline")
    assert used.exists() and not list(cache_dir.glob(f"{old.stem}*"))


# --- the choice of instructions --------------------------------------------------------------------------------------


def found(monkeypatch, flags: str, tmp_path) -> list[str]:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags\t\t: fpu\n")
    monkeypatch.setattr(library, "CPUINFO", path)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return library._candidates()


@pytest.mark.parametrize(
    ("processor", "more", "expected"),
    [("Skylake laptop, Zen 3, Alder Lake", "", ["avx2", "baseline"]),
     ("Skylake server", "avx512f avx512bw avx512cd avx512dq avx512vl", ["avx512", "avx2", "baseline"]),
     ("Knights Landing", "avx512f avx512cd avx512er avx512pf", ["avx2", "baseline"]),
     ("Zen 4", "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16",
      ["avx512bf16", "avx512", "avx2", "baseline"]),
     ("Sapphire Rapids", "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_bf16 amx_tile amx_int8",
      ["amx", "avx512bf16", "avx512", "avx2", "baseline"])],
)  # fmt: skip
def test_instruction_sets_of_processors(monkeypatch, tmp_path, processor, more, expected):
    assert found(monkeypatch, f"fpu sse2 ssse3 fma movbe f16c bmi1 avx avx2 bmi2 {more}", tmp_path) == expected


def test_other_machines(monkeypatch, tmp_path):
    assert found(monkeypatch, "fpu sse2 avx", tmp_path) == ["baseline"]
    monkeypatch.setattr(library, "CPUINFO", tmp_path / "none")
    assert library._candidates() == ["baseline"]
    for machine, expected in (("arm64", "neon"), ("aarch64", "neon"), ("riscv64", "baseline")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert library._candidates() == [expected]


def forbid_amx() -> None:
    """seccomp: arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails with EPERM, as a virtual machine or a sandbox may do."""
    libc = ctypes.CDLL(None, use_errno=True)
    load_call, load_argument, is_equal, ret = 0x20, 0x20, 0x15, 0x06
    program = b"".join(
        struct.pack("HBBI", *rule)
        for rule in [
            (load_call, 0, 0, 0), (is_equal, 0, 3, 158), (load_argument, 0, 0, 16), (is_equal, 0, 1, 0x1023),
            (ret, 0, 0, 0x00050000 | 1), (ret, 0, 0, 0x7FFF0000),
        ]
    )  # fmt: skip
    program_bytes = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program_bytes)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="AMX is of x86")
def test_a_processor_that_lists_amx_and_may_not_use_it(monkeypatch, tmp_path):
    """The real start function, refused by the operating system's kernel."""
    (build.SOURCES / "small.cpp").write_text(
        START.replace("FOLDER", str(ROOT / "src/bessemer/addons/accelerate/kernels/cpp"))
    )
    monkeypatch.setattr(build, "TRIAL", "")
    monkeypatch.delenv(library.VARIABLE, raising=False)
    sets = "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_bf16 amx_tile"
    if "avx512vl" not in library._features():
        pytest.skip("the library to fall to needs AVX-512")
    assert found(monkeypatch, f"fma avx2 bmi1 bmi2 {sets}", tmp_path)[0] == "amx"

    def without_permission() -> object:
        forbid_amx()
        library.forget()
        return library.status()

    assert forked(without_permission) == ("avx512bf16", "avx512bf16 (the system does not let this process use AMX)")


def state(monkeypatch, **environment: str) -> library.Status:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library._found.__wrapped__()[1]


def test_the_reason_is_reported(monkeypatch, compiler, tmp_path):
    assert state(monkeypatch, BESSEMER_KERNELS="off").why == "off (BESSEMER_KERNELS=off)"
    assert "is not one of auto, off, amx" in state(monkeypatch, BESSEMER_KERNELS="sse9").why
    compiler("echo 'error: broken' >&2; exit 1")
    status = state(monkeypatch, BESSEMER_KERNELS="auto")
    assert status == ("off", f"off ({tmp_path}/compiler failed: error: broken)")


def test_a_hanging_compiler_is_not_retried_per_instruction_set(monkeypatch, compiler, tmp_path):
    monkeypatch.setattr(build, "SECONDS", 0.3)
    compiler("sleep 100")
    assert "did not finish" in state(monkeypatch, BESSEMER_KERNELS="auto").why
    assert runs(tmp_path) == 1


def test_a_library_without_our_functions(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "TRIAL", "")
    (build.SOURCES / "small.cpp").write_text("int nothing;")
    assert "cannot be loaded" in state(monkeypatch, BESSEMER_KERNELS="baseline").why


# --- the kernels themselves ------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86")
@pytest.mark.parametrize("command", [GXX, CLANG])
@pytest.mark.parametrize("instructions", ["amx", "avx512bf16"])
def test_code_for_bf16_compiles(command, instructions, tmp_path, monkeypatch):
    """Few machines build this code. Code generation, which takes most of the time, is left out."""
    if command is None:
        pytest.skip("no clang++")
    monkeypatch.setattr(build, "SOURCES", ROOT / "src/bessemer/addons/accelerate/kernels/cpp")
    flags, until = [*build.COMMON, *build.FLAGS[instructions]], time.monotonic() + 100
    start = [command, *flags, *build._shared_header([command], flags, until, str(tmp_path)), "-fsyntax-only"]
    assert (tmp_path / "shared.hpp.gch").exists()
    build._run([[*start, str(source)] for source in build.SOURCES.glob("*.cpp")], until, str(tmp_path))


def test_an_installed_wheel_builds_them_from_a_folder_it_cannot_write_to(tmp_path, monkeypatch, cache_dir):
    pytest.importorskip("setuptools")
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    make = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    sources = [path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.suffix in (".cpp", ".hpp")]
    assert len(sources) > 5 and {path.as_posix() for path in sources} <= names
    folders = [path for path in [site, *site.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    best = library._candidates()[0]
    show = f"from bessemer.addons.accelerate.kernels import build; print(build.__file__, build.built({best!r}))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", show], env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    for folder in folders:
        folder.chmod(0o755)
    assert done.returncode == 0 and done.stderr == ""
    file, path = done.stdout.split()
    assert Path(file).is_relative_to(site) and Path(path).parent == cache_dir and cache.intact(Path(path))
