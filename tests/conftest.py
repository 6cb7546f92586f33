"""The command line as a fixture, and the mark `slow` for the tests that slow.txt lists."""

import os
import sys
from pathlib import Path

import pytest

from bessemer import cli

# Some containers forbid bytecode; then every program the tests start, and every collection, would compile it all again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("BESSEMER_DEVICE", "cpu")  # matters on a Mac: the tests compare with a CPU's numbers

HERE = Path(__file__).parent
SLOW = {line for line in (HERE / "slow.txt").read_text().splitlines() if line and not line.startswith("#")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        file = item.path.relative_to(HERE.parent).as_posix()
        name = item.nodeid.rpartition("/")[2].partition("[")[0].partition("::")[2]
        if file in SLOW or f"{file}::{name}" in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def call(monkeypatch, capsys):
    """call("verb", ...) -> (exit status, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bessemer", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as done:
            status = done.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
