"""A token, a rollout, a request and a setting can be followed within a reading budget (tools/paths.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

from bessemer.addons.accelerate.kernels import library

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not library.available(), reason="the budgets are counted with the CPU kernels")
def test_the_paths_stay_within_their_reading_budgets():
    done = subprocess.run([sys.executable, ROOT / "tools" / "paths.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| a ") == 4
