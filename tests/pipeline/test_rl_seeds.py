"""A user's code that draws from the global generators repeats: killed midway, the stage ends bit for bit the same."""

import random

import numpy as np
import pytest
import rl_stage
import test_rl_queue
import torch
from rl_parts import reward
from test_rl_queue import killed_at

from bessemer.addons.tasks.environment import Invocation, ModelTurn
from bessemer.engine.generation import Completion
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks import Verdict, get

CODE = """
import random
import numpy as np
import torch
from bessemer.tasks import Problem, Task, Verdict
from bessemer.addons.tasks.environment import Environment, LocalTool, Observation

ORDER = random.sample(range(100), 100)

def drawn():
    return random.random() + float(np.random.rand()) + float(torch.rand(()))

class Noisy(Task):
    def make(self, split, index, seed, language, phrasing):
        n = random.randrange(10**6) + ORDER[0]
        return Problem(f"{self.name}/{split}/{seed}/{index}", f"Say {n}.", language, {"value": n})

    def verify(self, problem, completion):
        return Verdict(random.random() < 0.5, True, "correct", None, partial=float(np.random.rand()))

def noisy(problem, answer, verdict):
    return verdict.score + drawn()

class Talk(Environment):
    def make(self, split, index, seed, language, phrasing):
        return Problem(f"{self.name}/{split}/{seed}/{index}", "Go.", language, {"value": 7})
    def reset(self, problem, seed):
        return Episode()

class Episode:
    def __init__(self):
        self.start = [{"role": "user", "content": str(drawn())}]
    def step(self, turn):
        return Observation([{"role": "user", "content": str(drawn())}])
    def verdict(self, text):
        return Verdict(False, True, "", str(drawn()))
    def close(self):
        pass

class Dice(Talk):
    reset = Environment.reset
    tools = (LocalTool("dice", "Throws.", {"type": "object", "properties": {}}, lambda: str(drawn())),)
"""

base = test_rl_queue.base


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "noisy.py"
    file.write_text(CODE)
    return file


def changes(file, seed):
    return (
        f'tasks=["{file}:Noisy"]', f'reward="{file}:noisy"', "rollouts=3", rl_stage.AHEAD, "lr=1e-2",
        f"seed={seed}",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_killed_stage_with_such_a_task_and_reward_ends_bit_for_bit_the_same(base, tmp_path, file):
    whole, other, killed = (
        rl_stage.Stage(base, tmp_path / name, *changes(file, seed)) for name, seed in (("a", 1), ("b", 2), ("c", 1))
    )
    whole.run()
    killed_at(killed, 4)
    random.seed()  # as in a new process
    killed.run()
    assert rl_stage.differences(killed.leaves(), whole.leaves()) == []
    other.run()
    assert other.values("rl/reward") != whole.values("rl/reward")
    assert len({*whole.values("rl/reward")}) == 3 and min(whole.values("rl/dead_groups")) == 0


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_draws_follow_from_the_arguments_and_leave_the_generators_alone(file):
    task, again = (get(f"{file}:Noisy") for _ in range(2))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    problem = task.problem("train", 3)
    assert problem == again.problem("train", 3) != again.problem("train", 4)
    verdicts = [task.verify(problem, text) for text in "abc\ud800abc\ud800"]
    assert verdicts[:4] == verdicts[4:] and len({verdict.score for verdict in verdicts}) == 4
    paid = reward(f"{file}:noisy")

    def scored(seed):
        rows = [
            ScoredSample(
                problem, [0], Completion([5], "same", [-1.0], [-1.0], "stop", 1), Verdict(True, True, "", None)
            )
            for _ in range(6)
        ]
        paid.score([rows[:3], rows[3:]], seed=seed)
        return [row.reward for row in rows]

    assert scored(1) == scored(1) != scored(2)
    assert len({*scored(1)}) == 6, "samples of one text draw numbers of their own"
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert now[:2] == states[:2] and torch.equal(now[2], states[2])


@pytest.mark.filterwarnings("ignore:.*your own code")
@pytest.mark.parametrize("name", ["Talk", "Dice"])
def test_episodes_repeat(file, name):
    task = get(f"{file}:{name}")

    def told(seed, *texts):
        episode = task.reset(task.problem("train", 0), seed)
        turns = [ModelTurn(text, (Invocation("dice", {}),)) for text in texts]
        seen = [message["content"] for turn in turns for message in episode.step(turn).messages]
        return [one["content"] for one in episode.start], seen, episode.verdict("x").answer

    first = told(1, "a", "b")
    assert first == told(1, "a", "b")
    assert first[1][0] == told(1, "a", "c")[1][0] and first[1][1] != told(1, "a", "c")[1][1]
    if name == "Talk":
        assert first[0] != told(2, "a", "b")[0]
    assert get(f"tools:calculator:{file}:Dice").tools[0].name == "dice"
