"""bench/gpu/first_hour.py without a GPU: a rehearsal with real processes, its page, and checks that fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "bench" / "gpu"


def first_hour(out, *arguments):
    command = [sys.executable, str(GPU / "first_hour.py"), "--out", str(out), "--rehearse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.timeout(600)
def test_a_rehearsal_goes_on_where_it_stopped_and_tells_of_checks_that_fail(tmp_path):
    ended = first_hour(tmp_path, "--only", "values", "layer")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "first_hour.json").read_text())
    assert found["values"]["verdict"] == "good" and found["layer"]["verdict"] == "left out"
    assert max(found["values"]["figures"]["float32"].values()) < 1e-6 and found["values"]["rehearsed"]

    found["layer"] |= {"verdict": "bad"}
    (tmp_path / "first_hour.json").write_text(json.dumps(found))
    again = first_hour(tmp_path, "--only", "values", "layer").stdout
    assert "values: done before (good)" in again and "layer: Kernels" in again
    page = (tmp_path / "first_hour.html").read_text()
    assert "a rehearsal with a small network" in page and page.count("<tr>") == 3 and "Content-Security-Policy" in page


def test_a_check_that_crashes_or_hangs_is_bad_and_says_how(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import first_hour as command

    monkeypatch.setitem(command.CHECKS, "none", (lambda place: None, 60))
    crashed = command.one("none", tmp_path, rehearse=True)
    assert (
        crashed["verdict"] == "bad"
        and crashed["says"].startswith("ended with 2: ")
        and "invalid choice" in crashed["says"]
    )
    monkeypatch.setitem(command.CHECKS, "values", (command.CHECKS["values"][0], 0.2))
    assert command.one("values", tmp_path, rehearse=True)["says"].startswith("took more than 0 s")
