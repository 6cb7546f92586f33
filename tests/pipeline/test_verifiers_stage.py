"""An RL stage that trains on environments of the package verifiers, where that is installed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import judge_model
import pytest
import rl_stage

PACKAGES = Path(__file__).parents[1] / "tasks" / "verifiers_packages"
pytestmark = pytest.mark.skipif(find_spec("verifiers") is None, reason="needs the extra verifiers")


def test_episodes_of_one_and_of_several_turns_are_trained_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PACKAGES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGES), *sys.path]))
    base = judge_model.write(tmp_path / "base").parent  # it ends its answers
    tasks = 'tasks=["verifiers:sum-once", "verifiers:guess-number@train"]'
    stage = rl_stage.Stage(base, tmp_path / "run", tasks, 'reward=["accuracy"]', "rollouts=2", "max_new_tokens=60")
    stage.run()
    assert len(stage.values("rl/reward")) == 2 and max(stage.values("rl/turns")) > 1
    assert not any(stage.values("rl/episodes_failed"))
    assert max(stage.values("rl/observed")) > 0
