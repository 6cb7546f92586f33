"""The difficulty filter in the real stage: past rewards alone decide what is asked, across processes and kills."""

import json
import math
import os
import signal
from collections import defaultdict
from dataclasses import replace

import pytest
import rl_stage

from bessemer import tasks
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.eval.contamination import identity
from bessemer.pipeline.stages.rl import RL
from bessemer.rl import loop
from bessemer.rl.difficulty import PassCount, ProblemKey, Selection
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import ScoredSample
from bessemer.runs.metrics import StageMetrics
from bessemer.train import setup
from bessemer.workers import Workers

COIN, FILTER = 'reward="random"', "difficulty_filter=true"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A task of ten problems, which recur in every rollout."""
    folder = tmp_path_factory.mktemp("few")
    for split, first, count in (("train", 10, 10), ("test", 50, 4)):
        lines = (
            json.dumps({"question": f"Compute {n}+{n}.", "answer": str(2 * n)}) for n in range(first, first + count)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}"


def changes(few):
    return (COIN, FILTER, f'tasks=["{few}"]', "rollouts=6", "max_off_policy_rollouts=1", "max_resamples=2",
            "filter_pool=2", "filter_explore=0.3", "lr=1e-2", "reference_every=3")  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, few, tmp_path_factory):
    """A run, with the problems asked and their rewards for every round."""
    stage = rl_stage.Stage(base, tmp_path_factory.mktemp("whole") / "run", *changes(few))
    stage.rounds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "workers", lambda: Workers(1))
        run = stage.loop()
        play, score, names = run.generator.play, run.generator.score, {}

        def watched_play(problems, number, round, cap):
            made = play(problems, number, round, cap)
            names[id(made.prompts)] = (number, round)
            return made

        def watched_score(problems, prompts, *rest):
            groups = score(problems, prompts, *rest)
            rewards = [[row.reward for row in group] for group in groups]
            asked = list(zip([p.prompt for _, p in problems], rewards, strict=True))
            stage.rounds.append((*names.pop(id(prompts)), asked))
            return groups

        run.generator.play, run.generator.score = watched_play, watched_score
        run.run()
    return stage


def rate_of(history, window):
    """The solve rate by definition: groups of two, whose weight decays with every later sample."""
    weights = [math.exp(-(len(history) - 1 - place) * 2 / window) for place in range(len(history))]
    return sum(w * sum(g) for w, g in zip(weights, history, strict=True)) / sum(2 * w for w in weights)


def test_what_a_rollout_asks_follows_from_what_was_paid_two_rollouts_before_it(whole, few):
    """Recomputed here: with G = 2 a problem is left out at a rate of at most 1/4 or at least 3/4; it is then asked only
    if the draw explores or no other is left."""
    task, explored, left_out = tasks.get(few), defaultdict(int), defaultdict(int)
    for number, lot, asked in whole.rounds:
        paid = [group for n, _, groups in sorted(whole.rounds) if n <= number - 2 for group in groups]
        own, every = defaultdict(list), [rewards for _, rewards in paid]
        for prompt, rewards in paid:
            own[prompt].append(rewards)
        general = rate_of(every, 2 * 2.0 * 16) if len(every) >= 4 else None
        first = (number * 2 + lot) * 4 * 2
        candidates = [task.problem("train", index, 7).prompt for index in range(first, first + 8)]
        rates = [rate_of(own[prompt], 2 * 2.0) if prompt in own else general for prompt in candidates]
        good = [rate is None or 0.25 < rate < 0.75 for rate in rates]
        name = (7, "zero", number, lot) if lot else (7, "zero", number)
        seed, wanted = tasks.stable_hash(*name), []
        keep, out = ([place for place, g in enumerate(good) if g is kind] for kind in (True, False))
        left_out[number] += len(out)
        for draw in range(4):
            explores = tasks.stable_hash("explore", seed, draw) < 0.3 * 2**64
            explored[number] += bool(out and (explores or not keep))
            wanted.append((out if out and (explores or not keep) else keep).pop(0))
        assert [prompt for prompt, _ in asked] == [candidates[place] for place in sorted(wanted)]
    rounds = defaultdict(int)
    for number, _, _ in whole.rounds:
        rounds[number] += 1
    assert whole.values("rl/filter_left_out") == pytest.approx([left_out[n] / (8 * rounds[n]) for n in range(6)])
    assert whole.values("rl/filter_explored") == pytest.approx([explored[n] / (4 * rounds[n]) for n in range(6)])
    assert left_out[0] == left_out[1] == 0 < sum(explored.values()) < sum(left_out.values())
    paid = [rewards for _, _, groups in sorted(whole.rounds) for _, rewards in groups]
    assert whole.values(f"rl/pass/{few} 0 en")[-1] == pytest.approx(rate_of(paid, 2 * 2.0 * 16))


def killed_at(stage, step):
    """Run the stage in its own process and SIGKILL it once it has written the metrics of `step`."""
    pid = os.fork()
    if pid == 0:
        try:
            write = StageMetrics.write

            def deadly(self, at, tokens, values):
                write(self, at, tokens, values)
                if at == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            StageMetrics.write = deadly
            stage.run()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_killed_twice_and_gone_on_with_by_two_processes_it_ends_the_same_bit_for_bit(
    whole, base, few, tmp_path, monkeypatch
):
    stage = rl_stage.Stage(base, tmp_path / "run", *changes(few))
    killed_at(stage, 6)
    killed_at(stage, 10)
    monkeypatch.setattr(setup, "workers", lambda: Workers(2))
    stage.run()
    assert rl_stage.differences(stage.leaves(), whole.leaves()) == []
    asked = {prompt for _, _, groups in whole.rounds for prompt, _ in groups}
    assert stage.kept("difficulty") == whole.kept("difficulty")
    assert len(stage.kept("difficulty")["problems"]) == len(asked)
    assert (stage.out / "rollouts.jsonl").read_bytes() == (whole.out / "rollouts.jsonl").read_bytes()


def test_when_the_guard_goes_back_so_do_the_estimates(base, few, tmp_path, monkeypatch):
    """Three bad steps, each computed twice, lead back to step 0, where there were no estimates."""
    calls = iter(range(10_000))

    class Sick(GRPO):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return replace(loss, total=loss.total * (math.nan if 4 <= next(calls) < 10 else 1.0))

    monkeypatch.setattr(setup, "workers", lambda: Workers(1))
    monkeypatch.setattr(loop, "GRPO", Sick)
    run = rl_stage.Stage(base, tmp_path / "run", *changes(few), "save_seconds=99", "micro_tokens=9000",
                         "updates_per_rollout=4", "rollouts=3").loop()  # fmt: skip
    seen, update = [], run.difficulty.update
    run.difficulty.update = lambda selection: seen.append(len(run.difficulty.estimates.problems)) or update(selection)
    run.run()
    assert seen[0] == 0 and 0 in seen[1:], "what was known when a rollout was taken: nothing again, after going back"


@pytest.fixture
def generator(base, tmp_path):
    return lambda *changes: rl_stage.Stage(base, tmp_path / "run", *changes).loop().generator


def test_general_prompts_are_all_asked(generator):
    given = ('general_tasks=["general"]', "general_prompts=2", 'tasks=["arithmetic", "countdown"]', "filter_pool=3")
    made = generator(FILTER, *given)
    general, candidates = made.candidates(1, 0)
    assert len(general) == 2 and len(candidates) == 2 * 3
    filter = made.difficulty
    counts = [PassCount(filter.key(*candidates[n]), 0, 2) for n in (1, 3) for _ in range(4)]
    filter.estimates = filter.estimates.updated(counts)
    asked, chosen, _ = made.select(1, 0, filter.estimates)
    asked = asked + chosen
    assert asked[:2] == general and not {candidates[1][1].id, candidates[3][1].id} & {p.id for _, p in asked}
    assert {p.id for _, p in asked} <= set(made.candidates_by_id(1)) and len(made.candidates_by_id(1)) == 8
    assert len(made.start(1, 12, 0).finish().selection.counts) == 2, "only problems of the tasks teach the filter"


def test_what_is_rewarded_while_a_rollout_is_sampled_changes_none_of_its_rounds(generator, few):
    made = generator(FILTER, f'tasks=["{few}"]', "max_resamples=2", "filter_pool=2")
    expected = made.start(1, 12, 0).finish().selection
    pending = made.start(1, 12, 0)
    first = made.tasks[0].problem("train", 0, 7)
    made.difficulty.update(Selection(counts=(PassCount(made.difficulty.key(made.tasks[0], first), 0, 2),) * 4))
    assert pending.finish().selection == expected, "the second round is selected only after the first is scored"
    assert made.start(1, 12, 0).finish().selection.left_out > expected.left_out


def test_a_problem_is_the_same_in_other_words_and_not_in_another_language(generator):
    key = generator(FILTER).difficulty.key
    task = tasks.get("countdown")
    size = task.size("train")
    problem = task.problem("train", 0, 7, "en")
    again = next(
        p for i in range(size, 2 * size) if identity(p := task.problem("train", i, 7, "en")) == identity(problem)
    )
    assert again.id != problem.id and key(task, again) == key(task, problem)
    other = key(task, task.problem("train", 0, 7, "zh"))
    assert other.problem not in (None, key(task, problem).problem) and other.family.endswith(" zh")
    sums = tasks.get("arithmetic")
    endless = sums.problem("train", 0, 7, "en")
    assert key(sums, endless) == ProblemKey(f"arithmetic {endless.meta['difficulty']} en", None)


@pytest.mark.parametrize(
    ("kind", "passed"), [("task", [True, False]), ("format", [True, True]), ("random", [False, True])]
)
def test_passed_is_what_the_way_of_paying_asks_for(generator, kind, passed):
    reward = generator(f'reward="{kind}"').reward
    verdicts = [tasks.Verdict(correct, True, "", None) for correct in (True, False)]
    rows = [ScoredSample(None, [], None, verdict, paid) for verdict, paid in zip(verdicts, (0.0, 1.0), strict=True)]
    assert [reward.passed(row) for row in rows] == passed


@pytest.mark.parametrize("general", [(), ('general_tasks=["general"]', "general_prompts=1", "general_from=1")])
def test_what_the_stage_shows_holds_every_problem_it_may_ask(base, tmp_path, general):
    seen = []
    for first in (0, 1000):
        changes = FILTER, "max_resamples=2", f"first_problem={first}", *general
        stage = rl_stage.Stage(base, tmp_path / f"run{first}", *changes)
        settings, made = stage.recipe.stage("zero"), stage.loop().generator
        shown = {problem.id for problem in RL().training_data(settings, stage.recipe, stage.out, tmp_path)}
        assert shown == {name for number in range(settings.rollouts) for name in made.candidates_by_id(number)}
        seen.append(shown)
    assert not seen[0] & seen[1]


def test_the_recipe_that_a_run_writes_down_can_go_on(base, tmp_path):
    """The written recipe states every default, even of keys without effect, and must still be accepted."""
    stage = rl_stage.Stage(base, tmp_path / "run", "rollouts=4")
    again = Recipe.parse(stage.recipe.to_toml())
    RL().resolve(again.stage("zero"), again)
    assert again.stage("zero") == stage.recipe.stage("zero")


def test_its_keys_are_refused_while_it_is_off(base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", "filter_pool=8")
    with pytest.raises(UserError, match="filter_pool has no effect without difficulty_filter = true"):
        RL().resolve(stage.recipe.stage("zero"), stage.recipe)
