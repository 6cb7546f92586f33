"""Held-out curves and the start gate measure what the stage trains: its form, its reward, its temperature."""

import pytest
import rl_stage
from rl_parts import reward

from bessemer.engine.generation import Completion
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.rl.heldout import heldout_row, start_gate
from bessemer.rl.rollout import verify
from bessemer.tasks import Problem, get

TASK = """
from bessemer.tasks import Problem, Task, Verdict

class Formless(Task):
    def make(self, split, index, seed, language, phrasing):
        return Problem(f"{self.name}/{split}/{seed}/{index}", f"Say {index}.", language)

    def verify(self, problem, completion):
        return Verdict(True, False, "no-think", "x")

class Near(Formless):
    def verify(self, problem, completion):
        return Verdict(False, True, "wrong-value", "x", partial=len(completion) % 5 / 10)

def length(problem, answer, verdict):
    return len(answer) / 100

def nothing(problem, answer, verdict):
    return 0.0
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(TASK)
    return file


def groups_of(*texts):
    problem = Problem("p", "", "en", {"value": 27})
    completions = [Completion([1, 2], text, [-1.0] * 2, [-1.0] * 2, "stop", 1) for text in texts]
    return verify([(get("sums"), problem)], [[1]], [completions], "")


RIGHT, BARE, SUMMARY, WRONG = (
    "<think>t</think><answer>27</answer>", "<answer>27</answer>", "<think>t</think>\n\n\\boxed{27}",
    "<think>t</think><answer>28</answer>",
)  # fmt: skip


@pytest.mark.parametrize(("needs_format", "accuracy"), [(True, 0.25), (False, 0.75)])
def test_a_right_answer_in_another_form_counts_as_in_training(needs_format, accuracy):
    paid, groups = reward("accuracy", ("format", 0.1)), groups_of(RIGHT, BARE, SUMMARY, WRONG)
    row = heldout_row(groups, paid, needs_format, paid.score)
    trained = verify(
        [(get("sums"), groups[0][0].problem)], [[1]], [[one.completion for one in groups[0]]], "", needs_format
    )
    paid.score(trained)
    assert row["accuracy"] == sum(one.verdict.correct for one in trained[0]) / 4 == accuracy
    assert row["reward"] == pytest.approx(sum(one.reward for one in trained[0]) / 4)
    assert (row["pass_at_1"], row["accuracy_k"], row["pass_at_k"], row["graded"]) == (0.75, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(("keys", "expected"), [((), 0.5), (("heldout.temperature=0.25",), 0.25)])
def test_held_out_answers_are_sampled_as_in_training_or_as_the_key_says(base, tmp_path, keys, expected):
    stage = rl_stage.Stage(base, tmp_path / "run", "rollouts=1", "temperature=0.5", *keys)
    loop, asked = stage.loop(), []
    generate = loop.sampler.generate
    loop.sampler.generate = lambda *args, **named: asked.append(named) or generate(*args, **named)
    loop.run()
    assert {one["temperature"] for one in asked if one["samples"] == 4} == {expected}


def test_the_gate_reads_what_training_counts(base, tmp_path, file):
    needs = rl_stage.Stage(
        base, tmp_path / "a", f'tasks=["{file}:Formless"]', "accuracy_needs_format=true", "heldout.minimum_pass=0.02"
    )
    with pytest.raises(UserError, match=r"below minimum_pass.*heldout.minimum_pass = 0"):
        needs.run()
    assert needs.values("rl/heldout_accuracy") == [0.0] and needs.values("rl/heldout_pass_at_1") == [1.0]
    free = rl_stage.Stage(base, tmp_path / "b", f'tasks=["{file}:Formless"]', "heldout.minimum_pass=0.02", "rollouts=1")
    free.run()
    assert free.values("rl/heldout_accuracy") == [1.0, 1.0] == free.values("rl/accuracy") * 2


def test_credit_and_an_own_reward_pass_the_gate_where_answers_differ_in_them(base, tmp_path, file):
    output = []
    for folder, keys in {
        "credit": (f'tasks=["{file}:Near"]',),
        "reward": (f'tasks=["{file}:Near"]', f'reward="{file}:length"'),
    }.items():
        stage = rl_stage.Stage(
            base, tmp_path / folder, *keys, "heldout.minimum_pass=0.02", "rollouts=1", "heldout.problems=4"
        )
        loop = stage.loop()
        advance = loop.ctx.progress.advance

        def noted(n, note, advance=advance, **cost):
            output.append(note)
            advance(n, note, **cost)

        loop.ctx.progress.advance = noted
        loop.run()
        assert stage.values("rl/heldout_accuracy") == [0.0, 0.0] and stage.values("rl/accuracy") == [0.0]
        assert stage.values("rl/score")[0] > 0 and stage.values("rl/heldout_score")[0] > 0
        assert len(stage.values("rl/heldout_reward")) == 2 and stage.values("rl/heldout_reward")[0] > 0
        assert f"reward {stage.values('rl/reward')[0]:.3f}" in output[-1] and "accuracy 0.000" in output[-1]
    stage = rl_stage.Stage(
        base, tmp_path / "none", f'tasks=["{file}:Near"]', f'reward="{file}:nothing"', "heldout.minimum_pass=0.02"
    )
    with pytest.raises(UserError, match=r"0\.0% .*different rewards, below minimum_pass"):
        stage.run()


@pytest.mark.parametrize(("task", "has_score"), [("Formless", False), ("Near", True)])
def test_a_score_is_shown_where_the_task_gives_credit(base, tmp_path, file, task, has_score):
    """An own reward gives no credit: without the task's, a score would only repeat the accuracy."""
    keys = (f'tasks=["{file}:{task}"]', f'reward="{file}:length"', "rollouts=1")
    stage = rl_stage.Stage(base, tmp_path / "run", *keys)
    loop, output = stage.loop(), []
    loop.ctx.progress.say = output.append
    loop.run()
    assert bool(stage.values("rl/heldout_score")) == has_score
    lines = [line for line in output if "held-out" in line]
    assert len(lines) == 2 and all("accuracy" in line and ("score" in line) == has_score for line in lines)


def test_form_and_language_are_no_contrast(tmp_path):
    (tmp_path / "mine.py").write_text("def same(problem, answer, verdict): return 0.1")
    paid = reward(f"{tmp_path}/mine.py:same", ("format", 0.5), "language")
    groups = groups_of(RIGHT, BARE, SUMMARY, WRONG)
    for number, row in enumerate(groups[0]):
        row.language = number / 3
    row = heldout_row(groups, paid, False, paid.score)
    assert len({one.reward for one in groups[0]}) > 1 and (row["graded"], row["contrast"]) == (1.0, 0.0)
    assert not start_gate(row | {"accuracy": 0.0}, 0.02).passed
    assert start_gate(row | {"accuracy": 0.0, "contrast": 0.02}, 0.02).passed
    assert not start_gate(row | {"accuracy": 0.0, "contrast": 1.0, "graded": 0.0}, 0.02).passed


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_an_evaluation_has_the_score_beside_what_is_correct(file):
    def row(task):
        problem = task.problem("test", 0)
        answers = [scoring.Answer("x" * n) for n in range(5)]
        return scoring.judge(task, [problem], [answers], k=1, temperature=1.0, top_p=1.0, max_new_tokens=9)

    near, formless = (row(get(f"{file}:{name}")) for name in ("Near", "Formless"))
    assert (near["pass_at_1"], near["score"]) == (0.0, pytest.approx(0.2)) and "score" not in formless
