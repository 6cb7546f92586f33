"""The page shows what the command prints, and a stranger with numpy alone can run it."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from bessemer_vectors import load
from bessemer_vectors.cli import main

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT.parent / "docs" / "vectors.md").read_text(encoding="utf-8")
EXAMPLE = PROJECT / "adapters" / "example_adapter.py"


def test_the_page_begins_with_what_the_command_prints(capsys):
    shown = re.search(r"```console\n\$ bessemer-vectors (.+?)\n(.*?)```", PAGE, re.S)
    assert "".join(PAGE.splitlines()[2:3]) == "```console"
    arguments = shown[1].replace(EXAMPLE.name, str(EXAMPLE)).split()
    assert main(arguments) == 1
    assert capsys.readouterr().out == shown[2]


def test_the_page_shows_the_adapter():
    assert f"```python\n{EXAMPLE.read_text(encoding='utf-8')}```" in PAGE


def test_the_page_counts():
    topics = load()
    assert f"{sum(len(topic.cases) for topic in topics.values())} small cases in {len(topics)} topics" in PAGE


@pytest.mark.slow
def test_a_stranger_with_numpy_alone_runs_it(tmp_path):
    """The wheel in an environment that has numpy and nothing else."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.egg-info", "build", "__pycache__", "tests")
    shutil.copytree(PROJECT, source, ignore=ignored)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}

    def call(*command, status=0):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    call(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    [wheel] = tmp_path.glob("bessemer_vectors-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    call(*pip, "--python", python, "install", "--no-index", "--no-deps", str(wheel))
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for path in Path(np.__file__).parents[1].glob("numpy*"):
        (site / path.name).symlink_to(path)
    for name in ("torch", "bessemer", "pydantic"):
        assert "ModuleNotFoundError" in call(python, "-c", f"import {name}", status=1)
    out = call(str(binaries / "bessemer-vectors"), "run", str(EXAMPLE), "--json", "out.json", status=1)
    assert "mean of micro-batch means" in out and (tmp_path / "out.json").is_file()
    assert len(call(str(binaries / "bessemer-vectors"), "hash").strip()) == 64
    assert "Traceback" not in call(str(binaries / "bessemer-vectors"), "run", "nowhere.py", status=2)
