"""The real RL stage on a multi-turn environment loaded from a file. Killed midway, with a rollout of an older policy in
its checkpoint, it ends bit for bit like an uninterrupted run."""

import json

import pytest
import rl_stage
import test_rl_queue
from test_rl_queue import killed_at, leaves, waiting

from bessemer.addons.curate import export
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.pipeline.stages.rl import RL
from bessemer.train import setup
from bessemer.workers import Workers

CODE = """
from bessemer.tasks.base import Problem, Verdict, stable_hash
from bessemer.addons.tasks.environment import Environment, EnvironmentFailure, Observation

class Talk(Environment):
    domain = "words"
    max_turns = 3

    def make(self, split, index, seed, language, phrasing):
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", f"Say {index}.", language, {"difficulty": 0})

    def reset(self, problem, seed):
        return Episode(problem, seed)

class Episode:
    def __init__(self, problem, seed):
        self.problem, self.seed, self.turns = problem, seed, 0
        self.start = [{"role": "user", "content": problem.prompt}]

    def step(self, action):
        self.turns += 1
        if self.turns == 2 and stable_hash(action.text) % 5 == 0:
            raise EnvironmentFailure("no answer")
        return Observation([{"role": "user", "content": f"{self.seed % 7} and more"}])

    def verdict(self, text):
        return Verdict(stable_hash(text) % 2 == 0, True, "correct", text)

    def close(self):
        pass
"""
ALL = ("rollouts=4", "top_p=0.9", rl_stage.AHEAD_CORRECTED,
       "lr=1e-2", "max_new_tokens=16", "prompts_per_rollout=3", "samples=4")  # fmt: skip

base = test_rl_queue.base


@pytest.fixture(scope="module")
def changes(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "talk.py"
    file.write_text(CODE)
    return (*ALL, f'tasks=["{file}:Talk"]')


@pytest.fixture(autouse=True)
def turns_end(monkeypatch):
    """A random network rarely ends a turn on its own, so here a third of all tokens ends one."""
    monkeypatch.setattr(Tokenizer, "stop_ids", property(lambda self: list(range(3, 110))))
    monkeypatch.setattr(setup, "workers", lambda: Workers())


@pytest.fixture
def whole(base, changes, tmp_path):
    return rl_stage.Stage(base, tmp_path / "whole", *changes)


def test_killed_and_resumed_it_ends_the_same_bit_for_bit(whole, base, changes, tmp_path):
    whole.run()
    assert min(whole.values("rl/turns")) > 1.2 and max(whole.values("rl/episodes_failed")) > 0
    assert whole.values("rl/sampler_gap")[0] < 1e-5 < 1e-3 < whole.values("rl/sampler_gap")[1]
    stage = rl_stage.Stage(base, tmp_path / "run", *changes)
    killed_at(stage, 4)
    numbers, tensors = waiting(stage)
    assert numbers and tensors, "a rollout of an older policy waits in the checkpoint"
    stage.run()
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []
    lines = [json.loads(line) for line in (stage.out / "rollouts.jsonl").read_text().splitlines()]
    roles = [[turn["role"] for turn in line["turns"]] for line in lines]
    assert ["assistant", "user", "assistant"] in [one[:3] for one in roles]
    assert all("\nUser: " in line["completion"] for line, own in zip(lines, roles, strict=True) if len(own) > 1)
    assert "and more" in (stage.out / "samples.md").read_text()
    assert len(list(export._rollouts(stage.out / "rollouts.jsonl"))) == sum(len(own) == 1 for own in roles)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('hooks=["export-samples"]', "export-samples writes questions with one answer"),
    ],
)
def test_what_cannot_play_episodes_is_refused_at_the_start(base, changes, tmp_path, change, complaint):
    stage = rl_stage.Stage(base, tmp_path / "run", *changes, change)
    with pytest.raises(UserError, match=complaint):
        RL().resolve(stage.recipe.stage("zero"), stage.recipe)
