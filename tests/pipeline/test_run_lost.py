"""A run that loses its directory, and disks that fail: each ends in one line that says why."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from bessemer import system
from bessemer.errors import UserError
from bessemer.runs.directory import RunDir
from bessemer.runs.files import explain, explained


def lines(toy):
    path = toy.out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_lock_that_is_deleted_admits_nobody(toy):
    """The run takes it again within seconds; if another run was faster, the first ends and writes nothing more."""
    toy.write(pause=1.0)
    process = toy.start()
    toy.wait_for(lambda: lines(toy) >= 1)
    (toy.out / ".lock").unlink()
    toy.wait_for((toy.out / ".lock").exists)
    status, _, output = toy.run()
    assert status == 2 and f"is in use by another run (process {process.pid})" in output
    (toy.out / ".lock").unlink()
    with open(toy.out / ".lock", "w") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine.write("123 0")
        mine.flush()
        _, output = process.communicate(timeout=30)
        assert process.returncode == 2 and "the lock of this run was deleted, and it ends here" in output
        assert "in use by another run (process 123)" in output


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """The number of a living process in the file takes their place; a lock that is held is still one."""
    with open(tmp_path / "lock", "w") as file:
        for number, held in ((errno.ENOLCK, False), (errno.EACCES, True)):
            error = OSError(number, os.strerror(number))
            monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=error))
            assert system.claim(file, "") == (not held)
            assert not system.claim(file, str(os.getppid()))


def test_a_run_directory_that_vanishes(toy):
    toy.write(pause=0.5)
    process = toy.start()
    toy.wait_for(lambda: lines(toy) >= 1)
    toy.out.rename(toy.out.with_name("moved"))
    _, output = process.communicate(timeout=30)
    assert process.returncode == 2 and "has vanished while" in output and "Traceback" not in output
    assert not toy.out.exists()


def test_the_next_attempt_says_that_the_last_was_killed(tmp_path):
    with RunDir.open(tmp_path, "toy") as rundir:
        assert not rundir.killed
    assert (tmp_path / ".lock").read_text() == ""
    (tmp_path / ".lock").write_text("123 999999999\n")
    with RunDir.open(tmp_path, "toy") as rundir:
        assert rundir.killed == "the last attempt (process 123) was killed; continuing from what it saved"
    if "oom_kill 0\n" not in Path("/proc/vmstat").read_text():
        (tmp_path / ".lock").write_text("123 0\n")
        with RunDir.open(tmp_path, "toy") as rundir:
            assert "has run out of memory since" in rundir.killed
    (tmp_path / ".lock").write_text("123\n")  # as version 0.1 leaves it after every run
    assert not RunDir.open(tmp_path, "toy").killed


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_does_not_answer(tmp_path, number):
    message = f"the disk of {tmp_path}/x does not respond \\({os.strerror(number)}\\)"
    with pytest.raises(UserError, match=message), explained(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x"), tmp_path) is None, "a bug of ours"


INODES = """
import sys
from pathlib import Path
import torch
from bessemer.runs.files import explained, write_atomic
from bessemer.train.checkpoint import State, save
folder = Path(sys.argv[1])
def many():
    for number in range(9):
        write_atomic(folder / str(number), "x")

for what in (many, lambda: save(folder, 1, State({}, {}, {}))):
    try:
        with explained(folder):
            what()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_disk_without_inodes_is_not_reported_as_full(tmp_path):
    mount = f'mount -t tmpfs -o nr_inodes=6 none {tmp_path} && exec {sys.executable} -c "$1" {tmp_path}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", INODES], capture_output=True, text=True)
    if re.search("unshare|mount", done.stderr):
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert not done.stderr and len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        assert line.startswith("UserError") and "inodes (each file takes one; all 6 are taken, see df -i)" in line
        assert "MB" not in line
