"""Fetch: hashes are always checked, writes atomic, downloads one at a time; an error says what to put where.

Small programs stand in for the registries; nothing leaves the machine.
"""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile

import pytest

from bessemer.addons.accelerate.kernels.cache import folder as kernels_folder
from bessemer.data import fetch as fetching
from bessemer.data.fetch import Package, cache_dir, fetch
from bessemer.errors import UserError


@pytest.fixture
def wheel(tmp_path):
    """A wheel with one text file, and its pin."""
    path = tmp_path / "store" / "tiny_text-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny_text/text.txt"), "hello\n")
        archive.writestr(
            zipfile.ZipInfo("tiny_text-1.0.dist-info/METADATA"),
            "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n",
        )
        archive.writestr(
            zipfile.ZipInfo("tiny_text-1.0.dist-info/WHEEL"),
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(zipfile.ZipInfo("tiny_text-1.0.dist-info/RECORD"), "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, Package("pypi", "tiny-text", "1.0", path.name, sha256, "MIT", 0.001)


def copies(path, count=None):
    """A client that copies `path` into the given folder and counts its calls."""

    def command(package, folder):
        if count is not None:
            count.append(folder)
        return [
            sys.executable,
            "-c",
            f"import shutil, time; time.sleep(0.2); shutil.copy({str(path)!r}, {str(folder)!r})",
        ]

    return command


def test_a_file_put_there_by_hand_is_used_after_its_check(wheel, tmp_path, monkeypatch):
    path, package = wheel
    monkeypatch.setattr(fetching, "_command", lambda *_: pytest.fail("no download is needed"))
    folder = tmp_path / "cache" / "packages"
    folder.mkdir(parents=True)
    (folder / package.filename).write_bytes(path.read_bytes())
    fetched = fetch(package, tmp_path / "cache")
    assert zipfile.ZipFile(fetched).read("tiny_text/text.txt") == b"hello\n"


def test_one_flipped_bit_is_an_error_and_the_file_is_removed(wheel, tmp_path, monkeypatch):
    path, package = wheel
    monkeypatch.setattr(fetching, "_command", copies(path))
    fetched = fetch(package, tmp_path / "cache")
    damaged = bytearray(fetched.read_bytes())
    damaged[10] ^= 1
    fetched.write_bytes(damaged)
    with pytest.raises(UserError, match=package.sha256):
        fetch(package, tmp_path / "cache")
    assert not fetched.exists()
    assert fetch(package, tmp_path / "cache").read_bytes() == path.read_bytes()


def test_a_wrong_download_does_not_stay_in_the_cache(wheel, tmp_path, monkeypatch):
    path, package = wheel
    path.write_bytes(path.read_bytes() + b"x")
    monkeypatch.setattr(fetching, "_command", copies(path))
    with pytest.raises(UserError, match=r"not the pinned tiny-text 1\.0"):
        fetch(package, tmp_path / "cache")
    assert [f for f in os.listdir(tmp_path / "cache" / "packages") if not f.endswith(".lock")] == []


def test_offline_the_error_names_file_and_folder(wheel, tmp_path, monkeypatch):
    _, package = wheel
    failing = [sys.executable, "-c", "import sys; sys.exit('no route to host')"]
    monkeypatch.setattr(fetching, "_command", lambda *_: failing)
    with pytest.raises(UserError) as error:
        fetch(package, tmp_path / "cache")
    for word in ("no route to host", package.filename, package.sha256, str(tmp_path / "cache" / "packages")):
        assert word in str(error.value)


def test_concurrent_fetches_download_once(wheel, tmp_path, monkeypatch):
    path, package = wheel
    calls = []
    monkeypatch.setattr(fetching, "_command", copies(path, calls))
    threads = [threading.Thread(target=fetch, args=(package, tmp_path / "cache")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_pip_itself_delivers_the_file_under_the_pinned_name(wheel, tmp_path, monkeypatch):
    """The real client against a folder instead of an index."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("no pip here")
    path, package = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    assert fetch(package, tmp_path / "cache").read_bytes() == path.read_bytes()


def test_npm_is_called_so_that_no_script_runs(wheel, tmp_path, monkeypatch):
    path, package = wheel
    package = Package("npm", "tiny", "1.0", path.name, package.sha256, "MIT", 0.001)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nfor last; do :; done\ncp {path} "$last"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    assert fetch(package, tmp_path / "cache").read_bytes() == path.read_bytes()
    arguments = (tmp_path / "asked").read_text()
    assert arguments.startswith("pack tiny@1.0") and "--ignore-scripts" in arguments


def test_a_missing_client_is_named(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_command", lambda *_: ["no-such-client"])
    with pytest.raises(UserError, match="no-such-client"):
        fetch(wheel[1], tmp_path / "cache")


def test_one_cache_for_downloads_and_kernels_wherever_a_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("BESSEMER_CACHE", "BESSEMER_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "bessemer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "bessemer" and kernels_folder() == cache_dir() / "kernels"
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "env"))
    assert cache_dir() == tmp_path / "env"
    assert cache_dir(tmp_path / "given") == tmp_path / "given"
    assert {path.name for path in tmp_path.iterdir()} <= {"xdg"}, "nothing in the working directory"


def test_a_cache_that_cannot_be_written_names_the_variable(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set BESSEMER_CACHE"):
        fetch(wheel[1], tmp_path / "file")
