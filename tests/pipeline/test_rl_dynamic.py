"""DAPO's dynamic sampling in the real stage: problems asked, groups kept, and the cost in samples."""

import pytest
import rl_stage
from rl_parts import reward

from bessemer import tasks
from bessemer.rl import rollout
from bessemer.train import setup

COIN = rl_stage.COIN


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def generator(base, tmp_path):
    """A function: changes -> the rollout generator of a stage with these changes."""
    return lambda *changes: rl_stage.Stage(base, tmp_path / "run", *changes).loop().generator


def alive(group):
    return len({row.reward for row in group}) > 1


def ids(groups):
    return [group[0].problem.id for group in groups]


def facts(groups):
    return [[(row.problem.id, row.completion.tokens, row.completion.logprobs, row.reward) for row in g] for g in groups]


def problems(generator, number, round=0):
    general, chosen = generator.candidates(number, round)
    return general + chosen


def rounds(generator, number):
    """All groups of rollout `number`, round by round, by the rule that round r takes window n * max_resamples + r."""
    found, task, size = [], tasks.get("arithmetic"), generator.settings.prompts_per_rollout
    for round in range(generator.settings.max_resamples):
        first = (number * generator.settings.max_resamples + round) * size
        chosen = rollout.problems_of([task], "train", first, size, 7)
        name = (7, "zero", number, round) if round else (7, "zero", number)
        groups = rollout.sample(
            generator.sampler, chosen, generator.encode, samples=2, seed=tasks.stable_hash(*name), max_new_tokens=12,
            batch_rows=setup.batch_rows(2 * len(chosen)),
        )  # fmt: skip
        reward(rl_stage.COIN_TERM).score(groups)
        found.append(groups)
    return found


@pytest.mark.parametrize("number", [0, 3])
def test_one_round_takes_every_group_in_the_order_of_its_problems(generator, number):
    """Exactly a rollout without dynamic sampling: one window, its seed, dead groups kept."""
    source = generator(COIN)
    taken = source.rollout(number, 12, 0)
    groups, asked = taken.groups, taken.n_problems
    (expected,) = rounds(source, number)
    assert facts(groups) == facts(expected) and asked == 4
    task = tasks.get("arithmetic")
    assert ids(groups) == [task.problem("train", 4 * number + n, 7).id for n in range(4)]


def test_groups_with_differing_rewards_come_first_and_no_extra_round_is_sampled(generator):
    source = generator(COIN, "max_resamples=6", "prompts_per_rollout=2")
    needed = set()
    for number in range(8):
        taken = source.rollout(number, 12, 0)
        groups, asked = taken.groups, taken.n_problems
        every = rounds(source, number)
        expected, count = [], 0
        while len(expected) < 2 and count < 6:
            expected += [group for group in every[count] if alive(group)]
            count += 1
        assert facts(groups) == facts(expected[:2]), "the living, in the order they were asked"
        assert asked == 2 * count
        needed.add(count)
    assert len(needed) > 1 and max(needed) < 6, "some rollouts need more rounds than others"


def test_too_few_living_are_filled_up_with_dead_ones(generator):
    source = generator(COIN, "max_resamples=2", "prompts_per_rollout=6")
    for number in range(10):
        taken = source.rollout(number, 12, 0)
        groups, asked = taken.groups, taken.n_problems
        found = [alive(group) for group in groups]
        assert len(groups) == 6 and found == sorted(found, reverse=True)
        if not all(found):
            assert asked == 12
            return
    pytest.fail("ten rollouts, and none with fewer than 6 living groups of 12")


def test_general_prompts_have_their_share_of_a_rollout_and_no_more(generator):
    """Later rounds look only for problems of the tasks, as many as the first; general groups count even if dead."""
    given = ('general.tasks=["general"]', "general.prompts=2", "general.start=1", "prompts_per_rollout=5")
    source = generator(COIN, "max_resamples=4", *given)
    assert not source.candidates(0, 0)[0]
    asked = []
    for number in range(1, 8):
        general, first = source.candidates(number, 0)
        assert len(general) == 2 and len(first) == 3 and not source.candidates(number, 1)[0]
        taken = source.rollout(number, 12, 0)
        assert ids(taken.groups)[:2] == [problem.id for _, problem in general]
        assert len(taken.groups) == 5 and all(name.startswith("arithmetic") for name in ids(taken.groups)[2:])
        asked.append((taken.n_problems - 2) // 3)
        assert taken.n_problems == 2 + 3 * asked[-1] and (asked[-1] == 4 or all(map(alive, taken.groups[2:])))
        assert {group[0].problem.id for group in taken.groups} <= source.candidates_by_id(number).keys()
    assert len(set(asked)) > 1


def test_no_problem_is_asked_twice_in_a_run(generator):
    source = generator(COIN, "max_resamples=3")
    asked = [problem.id for number in range(5) for round in range(3) for _, problem in problems(source, number, round)]
    assert len(set(asked)) == len(asked) == 5 * 3 * 4


def test_samples_of_a_later_round_are_new(generator):
    """The seed names the round: the same problem in two rounds gets other samples."""
    source = generator(COIN, "max_resamples=2")
    chosen = problems(source, 0)
    policy = source.sampler.policy()

    def scored(round):
        play = source.play(chosen, source.round_seed(0, round), 12)
        play.add(source.submit(policy, play.turn()).take())
        return source.score(chosen, play.prompts, play.outcomes(), 12)

    one, two = scored(0), scored(1)
    assert ids(one) == ids(two)
    assert all(a[0].completion.tokens != b[0].completion.tokens for a, b in zip(one, two, strict=True))


def test_a_pool_of_dead_groups_costs_its_rounds_and_the_run_continues(base, tmp_path):
    """No group is ever alive: every rollout uses all its rounds, trains on dead groups without effect, and ends."""
    stage = rl_stage.Stage(base, tmp_path / "run", "max_resamples=3", "kl.weight=0", "rollouts=2")
    loop = stage.run()
    assert loop.summary["steps"] == 4
    assert stage.values("rl/problems_asked") == [12, 12] and stage.values("rl/dead_groups") == [1.0, 1.0]
    assert stage.values("rl/grad_norm") == [0.0, 0.0] and stage.values("rl/reward") == [0.0, 0.0]
    before, after = (
        (folder / "model" / "model.safetensors").read_bytes() for folder in (base, stage.out)
    )  # fmt: skip
    assert before == after


def test_the_stage_trains_on_the_living_and_says_what_it_asked(base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "dynamic", COIN, "max_resamples=6")
    stage.run()
    assert stage.values("rl/dead_groups") == [0.0, 0.0, 0.0]
    assert all(asked % 4 == 0 and 4 <= asked <= 24 for asked in stage.values("rl/problems_asked"))
    plain = rl_stage.Stage(base, tmp_path / "plain", COIN)
    plain.run()
    assert plain.values("rl/problems_asked") == [] and max(plain.values("rl/dead_groups")) > 0
