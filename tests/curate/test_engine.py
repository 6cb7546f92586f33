"""Worker processes: a killed one is noticed, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bessemer.addons.curate import origins
from bessemer.addons.curate.jobs import Job, ProcessPool, facts_of
from bessemer.addons.curate.settings import Source
from bessemer.errors import UserError


def _job(folder: Path, file: Path, name: str) -> Job:
    unit = origins.Unit(
        Source("s", str(file), "english", "english", bad="skip", retries=0, pause=0.0), 0,
        (origins.SourcePiece(str(file), ".txt", 0, 1, 1, 0),), 1,
    )  # fmt: skip
    return Job("read", name, folder / name, name, {"unit": unit, "cache": None})


def _wait(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.timeout(120)
def test_a_killed_worker_is_named_and_the_other_jobs_are_done(tmp_path):
    """The first job waits on a pipe that nobody writes to: it is killed, tried again alone, and killed again."""
    fifo = tmp_path / "pipe.txt"
    os.mkfifo(fifo)
    jobs = [_job(tmp_path / "out", path, path.stem) for path in [fifo, *(tmp_path / f"{i}.txt" for i in range(3))]]
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("One.")
    scratch, engine, killed = tmp_path / "out" / ".pipe.tmp", ProcessPool(2), []

    def kill() -> None:
        _wait(lambda: (jobs[3].folder / "facts.json").exists())
        for _ in range(2):
            _wait(lambda: scratch.exists() and scratch.stat().st_ctime_ns not in killed)
            killed.append(scratch.stat().st_ctime_ns)
            for pid in list(engine._pool._processes):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(UserError, match=r"for read of pipe was killed twice.*lower"):
            list(engine.run(jobs))
    finally:
        killer.join()
        engine.close()
    assert len(killed) == 2
    assert facts_of(jobs[0]) is None


def test_user_error_in_a_worker_reaches_the_caller(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n")
    source = Source("s", str(path), "english", "english", bad="refuse")
    unit = origins.units(source, 1 << 20, None)[0][0]
    engine = ProcessPool(2)
    try:
        with pytest.raises(UserError, match="not JSON"):
            list(engine.run([Job("read", "a", tmp_path / "out" / "a", "a", {"unit": unit, "cache": None})]))
    finally:
        engine.close()


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_engine import _job
from bessemer.addons.curate.jobs import ProcessPool
if __name__ == "__main__":
    folder = Path({folder!r})
    print("ready", flush=True)
    list(ProcessPool(2).run([_job(folder / "out", folder / "pipe.txt", "pipe")]))
"""


def test_workers_end_with_their_parent(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    until = time.monotonic() + 60
    while not (workers := _children(parent.pid)) or not (tmp_path / "out" / ".pipe.tmp").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
