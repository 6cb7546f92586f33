"""Process supervision: which calculations are right, where steps end, and advantages by hand and by a naive loop."""

import random
import statistics
import time

import pytest
from completions import completion

from bessemer import tasks
from bessemer.data.tokenizer import Tokenizer
from bessemer.rl.process import assign_advantages, calculations, process_advantages
from bessemer.rl.rollout import ScoredSample


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("<think>(3*7)+6=21+6=27:27 yes\n2*3=7:27 low</think>", {"(3*7)+6=21+6=27": 1.0, "2*3=7": 0.0}),
        ("3*7=21,21+6=27", {"3*7=21": 1.0, "21+6=27": 1.0}),
        ("first: 8 * 1 = 8 and so on", {"8 * 1 = 8": 1.0}),
        ("(8-6)*7=3*7=14", {"(8-6)*7=3*7=14": 0.0}),
        ("(8-6)*7=3*7=21", {"(8-6)*7=3*7=21": 0.0}),
        ("3-8=-5; -5+8=3; 1/3=2/6; 1/0=1", {"3-8=-5": 1.0, "-5+8=3": 1.0, "1/3=2/6": 1.0, "1/0=1": 0.0}),
        ("x=3, 5=, ==, =, 3*7+6, so 27", {}),
        ("x=3*4=12= y", {"3*4=12": 1.0}),
        ("10/4=2.5, 1.5*2=3, 0.5+0.5=1, x=(3+4)/2=3.5", {}),
        ("3 × 4 = 12; 3 \\times 4 = 12; 2^3=8; \\frac{1}{2} + 3 = 4", {}),
        ("12,000+5=12,005; 2x + 3 = 7; 2xy + 3 = 7; 3 = 5 - 2x; 3*4=12cm", {}),
        ("5 + 3 = 8 (good) so (3+4)=7 (it is). (3+4=7)", {"5 + 3 = 8": 1.0, "(3+4)=7": 1.0}),
        ("1) 3+4=7\n- 3*4=12\n* 3+4=8 - no -> so", {"3+4=7": 1.0, "3*4=12": 1.0, "3+4=8": 0.0}),
        ("2 x 3 = 6; 5 boxes * 3 = 15; (2 + x) * 3 = 18; 5元*3=15元; a[2] * 3 = 6; sqrt(16) = 4; f(2) = 3*2 = 6", {}),
        ("- 3 + 4 = 1", {"3 + 4 = 1": 1.0}),
        ("**Total** 3 + 4 = 7; x**2 = 4", {"3 + 4 = 7": 1.0}),
        ("3+4=7 and -3+5=2. So 3*4=12.", {"3+4=7": 1.0, "-3+5=2": 1.0, "3*4=12": 1.0}),
        ("7=7, 3+4=3+4, 3+4=4+3", {"7=7": 0.0, "3+4=3+4": 0.0, "3+4=4+3": 1.0}),
    ],
)
def test_a_calculation_is_right_if_all_its_sides_have_one_value(text, steps):
    found = calculations(text)
    assert sorted(reward for _, reward in found) == sorted(steps.values())
    for written, reward in steps.items():
        assert (text.find(written) + len(written) - 1, reward) in found


LONG = ["1" * 400_000, "1=" * 200_000, "(" * 400_000, "(=" * 200_000, "1= \n" * 100_000, "1=1x " * 99_999]


@pytest.mark.parametrize("text", [*LONG, "(=" * 200_000 + "1"])
def test_hostile_text_costs_one_scan(text):
    start = time.process_time()
    calculations(text)
    assert time.process_time() - start < 5


def test_advantages_by_hand():
    """Step rewards 1, 0 | 1, 1 of one group: mean 3/4, std sqrt(3)/4, so r~ is 1/sqrt(3) and -sqrt(3)."""
    got = process_advantages([[(1, 1.0), (3, 0.0)], [(0, 1.0), (2, 1.0)]], [4, 3])
    good, bad = 3**-0.5, -(3**0.5)
    expected = [[good + bad] * 2 + [bad] * 2, [good + good] + [good] * 2]
    assert got == [pytest.approx(row, abs=1e-5) for row in expected]


def test_with_one_step_an_output_it_is_outcome_supervision():
    got = process_advantages([[(4, 1.0)], [(2, 0.0)], [(1, 0.0)], [(0, 0.0)]], [5, 3, 2, 1])
    assert [len(row) for row in got] == [5, 3, 2, 1]
    assert got == [
        pytest.approx([value] * n, abs=1e-4) for value, n in ((1.7321, 5), (-0.5774, 3), (-0.5774, 2), (-0.5774, 1))
    ]


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_against_a_naive_loop(scale):
    draw = random.Random(5)
    for _ in range(20):
        lengths = [draw.randint(1, 12) for _ in range(draw.randint(2, 6))]
        steps = [
            [(end, draw.choice((0.0, 1.0, 1.1))) for end in sorted(draw.choices(range(n), k=draw.randint(0, 4)))]
            + [(n - 1, draw.random())]
            for n in lengths
        ]
        rewards = [reward for own in steps for _, reward in own]
        mean, std = statistics.fmean(rewards), statistics.pstdev(rewards) + 1e-6 if scale else 1.0
        naive = [
            [sum((reward - mean) / std for end, reward in own if end >= t) for t in range(n)]
            for own, n in zip(steps, lengths, strict=True)
        ]
        assert process_advantages(steps, lengths, scale) == [pytest.approx(row, abs=1e-4) for row in naive]


def test_equal_step_rewards_teach_nothing():
    assert process_advantages([[(0, 1.0), (1, 1.0)], [(2, 1.0)]], [2, 3]) == [[0.0] * 2, [0.0] * 3]


def test_samples_get_the_steps_of_their_tokens():
    tokenizer = Tokenizer.train(["<think>3*7=21,21+6=27</think><answer>27</answer>"] * 4, 300)
    task = tasks.get("arithmetic")
    problem = task.problem("train", 0)

    def sample(text, reward):
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        made = completion(tokens, text, prompt_tokens=3)
        return ScoredSample(problem, [1], made, task.verify(problem, text), reward=reward)

    group = [sample("<think>3*7=21,21+6=28对</think>", 0.0), sample("<think>对3*7=21</think>", 1.0)]
    assert assign_advantages([group], tokenizer) == {"rl/steps": 1.5, "rl/steps_right": pytest.approx(2 / 3)}
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    r = [(x - 0.6) / 0.24**0.5 for x in rewards]
    for row, ends, values in zip(group, (["3*7=21", "21+6=28"], ["3*7=21"]), (r[:3], r[3:]), strict=True):
        assert len(row.advantage) == len(row.completion.tokens)
        text, expected = "", []
        for token in row.completion.tokens:
            begun = sum(end in text for end in ends)  # steps that end before this token
            expected.append(sum(values[begun:]))
            text = tokenizer.decode([*tokenizer.encode(text), token])
        assert row.advantage == pytest.approx(expected, abs=1e-4)
