"""The command line as a fixture, and the mark `slow` for files whose tests take ten seconds or more in total, so that
`-m "not slow"` skips them."""

import os
import sys

import pytest

from bessemer import cli

# Some containers forbid bytecode; then every program the tests start, and every collection, would compile it all again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("BESSEMER_DEVICE", "cpu")  # matters on a Mac: the tests compare with a CPU's numbers

SLOW = {
    "test_build.py",
    "test_curriculum.py",
    "test_deepseek_fp8_write.py",
    "test_extend.py",
    "test_fp8_kernels.py",
    "test_fp8_stage.py",
    "test_judge.py",
    "test_many.py",
    "test_memory.py",
    "test_planner.py",
    "test_r1.py",
    "test_r1_paper.py",
    "test_reject.py",
    "test_reward_stage.py",
    "test_rl_ray.py",
    "test_runner_killed.py",
    "test_scheduler.py",
    "test_serve_floods.py",
    "test_serve_life.py",
    "test_sft.py",
    "test_speculative.py",
    "test_stages.py",
    "test_trainer.py",
    "test_watch.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW:
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
