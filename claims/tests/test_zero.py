"""R1-Zero's arms: what each runs and reuses, and its numbers from a real run and from planted rows."""

import json

import pytest

from bessemer.config.rl import HeldoutTable
from bessemer.config.table import stage_refs
from bessemer.pipeline import preflight, runner
from bessemer_claims import machine, registry, runs, zero
from bessemer_claims.runs import ArmResult


@pytest.mark.parametrize("shape", ["countdown", "sums"])
def test_an_arm_shares_corpus_and_base_with_its_donor(shape):
    tier = {"countdown": "full", "sums": "quick"}[shape]
    jobs = {job.name: job for job in zero.jobs(tier)}
    assert next(iter(jobs)) == f"zero-{shape}-base-1" and {job.shape for job in jobs.values()} == {shape}
    for n, job in enumerate(jobs.values()):
        built = job.recipe()
        stages = {stage.name: stage for stage in built.stages}
        judged = zero.arms()[job.arm].stages[-1:] or ["base"]
        assert stages["eval"].models == judged and list(stages)[:2] == ["corpus", "base"]
        if job.donor is None:
            assert "right" not in stages
            continue
        donor = jobs[job.donor]
        assert list(jobs).index(job.donor) < n and donor.seed == job.seed
        donor_stages = {stage.name: stage for stage in donor.recipe().stages}
        shared = donor_stages.keys() & stages.keys() - set(zero.arms()["base"].asked)
        assert shared >= {"corpus", "base"} and all(stages[name] == donor_stages[name] for name in shared)


def test_the_stages_of_an_arm_find_what_they_need(tmp_path):
    for arm in zero.arms():
        built = zero.recipe(arm, 1, "countdown")
        preflight.check(built, tmp_path, built.names())
        for index, stage in enumerate(built.stages):
            earlier = {previous.name for previous in built.stages[:index]}
            assert {name for _, name in stage_refs(stage)} <= earlier


def test_controls_differ_from_r1_zero_in_one_thing():
    def changed(arm):
        reference, control = (
            zero.recipe(name, 1, "countdown").stage(stage) for name, stage in (("right", "right"), arm)
        )
        return {key for key, value in dict(reference).items() if value != getattr(control, key)} - {"name"}

    assert changed(("coin", "coin")) == {"reward"} and changed(("mixed-language", "language")) == {"reward"}
    assert changed(("right-again", "right-again")) == {"seed"}
    assert changed(("ppo", "ppo")) == {"advantage", "prompts_per_rollout", "samples"}
    rounds = zero.recipe("rounds", 1, "countdown")
    right = zero.recipe("right", 1, "countdown").stage("right")
    sampled = [stage for stage in rounds.stages if stage.kind == "reject"]
    ranges = [range(stage.first_problem, stage.first_problem + stage.problems) for stage in sampled]
    assert (
        sum(len(asked_range) for asked_range in ranges) * 16
        == right.rollouts * right.prompts_per_rollout * right.samples
    )
    assert [i for asked_range in ranges for i in asked_range] == list(range(384))  # no problem is asked twice
    assert [stage.source for stage in sampled] == ["base", "tuned-1", "tuned-2", "tuned-3"]
    doses = [zero.recipe(arm, 1, "countdown").stages[0].mix["countdown"] for arm in ("dose-0", "dose-3")]
    for mix in doses:
        assert sum(mix[kind] for kind in ("systematic", "sloppy", "average", "careful")) == pytest.approx(1)


def test_settings_of_unused_stages_do_not_change_an_arm():
    jobs = {job.arm: job for job in zero.jobs("full")}
    assert set(jobs["coin"].settings["recipe"]) == {"model", "corpus", "base", "coin", "right", "eval"}
    assert "student" in jobs["distilled"].settings["recipe"] and "student" not in jobs["right"].settings["recipe"]
    assert len({job.digest for job in jobs.values()}) == len(jobs)


@pytest.mark.parametrize("part", [zero, machine])
def test_metrics_and_controls_match_the_rules(part):
    known_arms = set(zero.arms()) if part is zero else set(machine.MEASURED)
    for (claim, metric), how in part.METRICS.items():
        rule = next(rule_part for rule_part in registry.rules().claim[claim].parts if rule_part.metric == metric)
        assert rule.kind == "R" and how.needs <= known_arms
        assert bool(rule.positive) >= bool(how.positive) and bool(rule.negative) >= bool(how.negative)


ROW = {
    "task": "countdown", "temperature": 1.0, "k": 16, "samples": 16, "n": 10, "pass_at_1": 0.25, "pass_at_k": 0.5,
    "readable": 0.9, "language_consistency": 0.8, "unreadable": {"repetitive": 4}, "truncated": 0.125,
    "formatted": 0.75, "mean_length": 60.0,
}  # fmt: skip


def test_numbers_are_means_over_languages_per_task():
    other = ROW | {"pass_at_1": 0.75, "unreadable": {}, "readable": 0.7}
    result = zero.numbers(
        [ROW, other, ROW | {"temperature": 0.6}, ROW | {"shots": 3, "shot_kind": "direct"}], "countdown"
    )
    assert result["pass@1"] == 0.5 and result["pass@16"] == 0.5 and result["readable"] == pytest.approx(0.8)
    assert result["repeat"] == pytest.approx(4 / 160 / 2) and result["language"] == 0.8 and result["truncated"] == 0.125
    assert result["pass@1 T0.6"] == 0.25 and result["pass@1 3 direct"] == 0.25
    assert zero.numbers([ROW], "arithmetic") == {"pass@1 countdown": 0.25}
    assert zero.numbers([ROW], "countdown", again=True)["again pass@1"] == 0.25
    wide = zero.numbers([ROW | {"samples": 64, "k": 64}], "countdown")
    assert wide == {"pass@64": 0.5}  # pass@1 comes from the row over all problems


def planted(numbers):
    results = [
        ArmResult("zero", arm, seed, "countdown", "", "", values) for arm, values in numbers.items() for seed in (1, 2)
    ]
    return {key: how.measured(runs.Runs(results)) for key, how in zero.METRICS.items()}


def test_metrics_take_the_arms_that_the_rules_name():
    base = {"pass@1": 0.2, "best": 0.3, "again pass@1": 0.21, "readable": 0.9, "again readable": 0.9, "language": 0.95,
            "again language": 0.95, "repeat": 0.1, "again repeat": 0.1, "pass@1 arithmetic": 0.4, "pass@1 general": 0.3,
            "pass@1 3 worked": 0.25, "pass@1 3 direct": 0.2, "pass@1 3 fables": 0.2}  # fmt: skip
    right = base | {"pass@1": 0.7, "readable": 0.8, "repeat": 0.4, "pass@1 arithmetic": 0.5, "pass@1 3 worked": 0.5,
                    "cpu_s": 10.0}  # fmt: skip
    arms = {"base": base, "right": right, "coin": base | {"pass@1": 0.15}, "rounds": base | {"pass@1": 0.5}}
    measured = planted(arms | {"cold": base | {"pass@1 general": 0.1}, "r1": right | {"repeat": 0.15}})
    points = measured["Z2", "pass@1 after - before, points"]
    assert points.values == pytest.approx([50, 50]) and points.negative == pytest.approx([-5, -5])
    assert measured["Z3", "pass@1, right - coin, points"].values == pytest.approx([55, 55])
    assert points.positive == pytest.approx([30, 30])  # fine-tuning, not R1-Zero itself
    assert measured["Z3", "pass@1, right - coin, points"].positive == pytest.approx(
        [20, 20]
    )  # over the best temperature
    everyday = measured["Z10", "everyday requests, R1-Zero - base, points"]
    assert everyday.values == pytest.approx([0, 0]) and everyday.positive == pytest.approx([-20, -20])
    assert measured["R5", "answers that repeat, R1 - R1-Zero"].values == pytest.approx([-0.25, -0.25])
    back = measured["R5", "readable share, R1 - base"]
    assert back.values == back.positive == pytest.approx([-0.1, -0.1])
    assert measured["Z4", "readable share after - before"].values == pytest.approx([-0.1, -0.1])
    few = measured["Z7", "(few - zero shots) of R1-Zero - of the base, points"]
    assert few.values == pytest.approx([-20 - 5] * 2) and few.positive == pytest.approx([-50, -50])
    assert measured["Z8", "change on unpaid tasks, points"].values == pytest.approx([5, 5])
    assert measured["R2", "pass@1, with - without, points"] is None  # there is no arm with the mixed corpus


class Asked(dict):
    def __missing__(self, key):
        return self.setdefault(key, 1.0)


def test_controls_ask_the_question_of_their_part():
    """No control that asks models again compares other numbers than its part does."""
    for (claim, metric), how in zero.METRICS.items():
        part, control = Asked(), Asked()
        how.of(*[part] * len(how.arms))
        (how.of_negative or how.of)(*[control] * len(how.negative)) if how.negative else None
        again = {name.removeprefix("again ") for name in control if name.startswith("again ")}
        assert not again or again == set(part), (claim, metric)


def test_a_small_run_gives_the_numbers(tmp_path):
    """The jobs of the base and of R1-Zero at a size that learns nothing; the second reuses the first one's stages."""
    small = {"corpus": {"limits": {"sums": 30_000}, "vocab_sample": 20_000}, "base": {"tokens": 4096},
             "right": {"rollouts": 1, "prompts_per_rollout": 4, "samples": 4,
                       "heldout": HeldoutTable(problems=2, minimum_pass=0.0)},
             "eval": {"problems": 3, "samples": 2, "temperatures": [1.0]},
             "again": {"problems": 3, "samples": 2}}  # fmt: skip
    numbers, folder = {}, None
    for job in (arm_job for arm_job in zero.jobs("quick") if arm_job.arm in ("base", "right")):
        built = job.recipe()
        stages = [stage.model_copy(update=small[stage.name]) for stage in built.stages]
        recipe = built.model_copy(update={"stages": stages})
        reuse, folder = folder, tmp_path / job.name
        results = runner.run(recipe, folder, reuse=reuse)
        assert reuse is None or {arm_job.name for arm_job in results if arm_job.status != "done"} == {"corpus", "base"}
        numbers[job.arm] = zero.measure(job, folder)
    assert numbers["base"].keys() >= {"pass@1", "best", "readable", "again language"} and "cpu_s" not in numbers["base"]
    assert numbers["right"]["cpu_s"] > 0 and all(
        isinstance(arm_job, float | int) for arm_job in numbers["right"].values()
    )
    json.dumps(numbers)
