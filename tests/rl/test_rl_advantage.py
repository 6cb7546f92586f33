"""Group-relative advantages: worked examples (DeepSeekMath 4.1), dead groups, broken rewards, Dr. GRPO's form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_parts import assign

from bessemer.errors import UserError
from bessemer.rl.algorithms.grpo import compared as group_advantages
from bessemer.rl.reward import dead_groups
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict


def test_the_published_vector_with_the_population_std():
    """Z.1: rewards (1, 0, 0, 0); the sample std would give (1.5, -0.5, -0.5, -0.5)."""
    actual = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert actual.tolist()[0] == pytest.approx([1.7321, -0.5774, -0.5774, -0.5774], abs=1e-4)
    assert actual.dtype == torch.float32


def test_all_samples_of_a_rollout_together():
    """All samples of an easy problem are above the common mean, those of a hard one below it; groups of one work."""
    easy, mixed, hard = (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)
    groups = [
        [ScoredSample(Problem("p", "", "en"), [], None, Verdict(True, True, "", None), reward) for reward in rewards]
        for rewards in (easy, mixed, hard)
    ]
    assign(groups, "batch")
    assert [row.advantage for group in groups for row in group] == pytest.approx([1, 1, 1, -1, -1, -1], abs=1e-5)
    assign(groups, {"name": "group", "scale_by_std": False})
    assert [row.advantage for group in groups for row in group] == [0, 0, 0.5, -0.5, 0, 0]
    assign([group[:1] for group in groups], {"name": "batch", "scale_by_std": False})
    assert [group[0].advantage for group in groups] == pytest.approx([1 / 3, 1 / 3, -2 / 3])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scale", [True, False])
def test_failed_episodes_count_for_nobody(scale, together):
    """The sound samples get the advantages that they would have without the failed ones; these get none."""
    problem, verdict = Problem("p", "", "en"), Verdict(True, True, "", None)

    def advantages(groups):
        made = [
            [ScoredSample(problem, [], None, verdict, reward, failure=failure) for reward, failure in group]
            for group in groups
        ]
        assign(made, {"name": "batch" if together else "group", "scale_by_std": scale})
        return [[row.advantage for row in group] for group in made]

    sound, worse = [(1.0, ""), (1.0, ""), (0.0, ""), (0.4, "")], [(0.0, ""), (0.0, ""), (0.0, ""), (0.0, "")]
    wanted, failed = advantages([sound, worse]), [(0.6, "down")] * 3
    for found, expected in zip(advantages([sound + failed, worse + failed]), wanted, strict=True):
        assert found == pytest.approx(expected + [0.0] * 3, abs=1e-7)
    assert advantages([failed, failed]) == [[0.0] * 3] * 2


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_teach_exactly_nothing(scale):
    """0.1 has no exact binary form: dividing by a tiny std must not turn the mean's rounding error into a signal."""
    rewards = torch.tensor([[1.0] * 7, [0.0] * 7, [0.1] * 7, [1.1] * 7])
    assert group_advantages(rewards, scale).abs().max() < 1e-7
    assert not group_advantages(rewards, True).any()
    assert dead_groups(rewards) == 1.0


def test_dead_groups_are_counted():
    assert dead_groups(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.1, 0.1]])) == 0.75
    assert dead_groups(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])) == 0.0


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=16))
def test_mean_zero_and_variance_one_or_nothing(rewards):
    actual = group_advantages(torch.tensor([rewards])).double()[0]
    assert actual.mean().abs() < 1e-6
    variance = actual.square().mean()
    assert variance == 0 if len(set(rewards)) == 1 else abs(variance - 1) < 1e-4


@pytest.mark.parametrize("shape", [(4, 1), (4,), (1, 2, 2)])
def test_a_group_needs_two(shape):
    with pytest.raises(UserError, match="at least 2 samples"):
        group_advantages(torch.zeros(shape))
