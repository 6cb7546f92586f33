"""The runs behind the trained claims: what is planned, how results are kept and merged, what the rules make of them."""

import json
import random
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.cli import app
from bessemer.errors import UserError
from bessemer.model import accounting
from bessemer.model.config import ModelConfig
from bessemer.pipeline.stage import find_kind
from bessemer.train.setup import model_config
from bessemer_claims import PARTS, card_page, cards, pretrain, registry, results, runner, runs
from bessemer_claims.pretrain_metrics import SHARES, worst_part
from bessemer_claims.runs import ArmJob, ArmResult, Runs
from bessemer_claims.verdict import Doubt, Measured, Outcome, Seen, run


def network(arm: str, shape: str = "claims") -> ModelConfig:
    built = pretrain.recipe(arm, 1, shape)
    return model_config(built, built.stage("pretrain").model)


def test_every_metric_is_one_of_a_rule_and_its_arms_exist():
    rules = registry.rules().claim
    arms = {job.arm for job in pretrain.jobs("full")}
    for name in PARTS:
        for (claim, metric), how in runs.part(name).METRICS.items():
            [part] = [rule_part for rule_part in rules[claim].parts if rule_part.metric == metric]
            assert part.kind == "R"
            if name == "pretrain":
                assert how.needs <= arms, (claim, how.needs - arms)
                assert bool(part.positive) == bool(how.positive), claim
                assert bool(part.negative) == bool(how.negative), claim


@pytest.mark.parametrize("part", PARTS)
def test_a_control_that_compares_equals_shows_no_effect(part):
    """All numbers of all arms are 1. M2, P3 and F7 compare nothing with them, and M3 divides by a difference."""
    rules = registry.rules()
    for (claim, metric), how in runs.part(part).METRICS.items():
        if claim in ("F7", "M2", "M3", "P3"):
            continue
        ones = defaultdict[str, float](lambda: 1.0)
        same = Runs(ArmResult(part, arm, seed, "", "", "", ones) for arm in how.needs for seed in (1, 2, 3))
        [rule] = [rule_part for rule_part in rules.claim[claim].parts if rule_part.metric == metric]
        assert Doubt.ANYHOW not in run(rule, how.measured(same), rules).doubts, claim


def test_text_beside_a_rule_counts_as_part_of_it():
    """Every comparison beside a rule has its arms and its texts, and none takes the name of a rule's metric."""
    rules, words = registry.rules().claim, registry.metrics()
    named: dict[str, set[str]] = {}
    for name in PARTS:
        there = {(job.shape, job.arm) for job in runs.part(name).jobs("full")}
        for side in runs.part(name).BESIDE:
            shape = side.shape or runs.part(name).SHAPE["full"]
            assert {(shape, arm) for arm in side.metric.needs} <= there, side.name
            assert side.name not in {part.metric for part in rules[side.claim].parts}
            [like] = [part for part in rules[side.claim].parts if part.metric == side.like]
            assert bool(like.positive) >= bool(side.metric.positive) and bool(like.negative) >= bool(
                side.metric.negative
            )
            named.setdefault(f"beside {side.claim}", set()).add(side.name)
    for claim, figures in registry.r1_small().figures.items():
        named.setdefault(f"beside {claim}", set()).update(figure.name[0] for figure in figures)
    assert {key: set(table) for key, table in words.items() if key.startswith("beside ")} == named


def test_arms_are_alike_where_they_should_be():
    ref = network("ref")
    stored, flops = accounting.main_params(ref), accounting.flops_per_token(ref, 256).training
    for arm in ("DTOT", "NS", "CO", "MQA"):
        assert accounting.main_params(network(arm)) == pytest.approx(stored, rel=0.003), arm
    for arm in ("DACT", "NL", "NS", "LIM1", "CO", "AUX", "NONE", "HASH"):
        assert accounting.flops_per_token(network(arm), 256).training == pytest.approx(flops, rel=0.02), arm
    width = {arm: network(arm).kv_width for arm in ("ref", "MHA", "GQA", "MQA", "MLA-24")}
    assert width == {"ref": 48, "MHA": 528, "GQA": 144, "MQA": 80, "MLA-24": 24}
    heads = network("ONE")
    assert heads.n_heads * heads.v_head_dim == ref.n_heads * ref.v_head_dim
    wide, dense = (network(arm, "wide") for arm in ("ref", "DACT"))
    training_flops = accounting.flops_per_token(dense, 256).training
    assert (
        accounting.flops_per_token(wide, 256).training == pytest.approx(training_flops, rel=0.02)
        and wide.kv_width == 80
    )
    mtp = accounting.flops_per_token(network("MTP"), 256, mtp=True).training
    assert mtp / flops == pytest.approx(pretrain.arms()["LONG"].tokens, rel=0.02)


@pytest.mark.parametrize("shape", ["nano", "short", "claims"])
def test_every_arm_is_a_recipe(shape):
    for arm in (name for name, spec in pretrain.arms().items() if spec.quick or shape != "nano"):
        built = pretrain.recipe(arm, 2, shape)
        config = built.stage("pretrain")
        find_kind("pretrain")().resolve(config, built)  # raises before anything runs
        rate = pretrain.shapes()[shape].lr * pretrain.arms()[arm].rate
        assert config.lr(config.tokens) == pytest.approx(rate / 10)
        network(arm, shape)
    for arm in ("LATE", "REV") if shape != "nano" else ():  # every domain's total share is unchanged
        config = pretrain.recipe(arm, 1, shape).stage("pretrain")
        half = config.tokens / 2
        for part, share in SHARES.items():
            assert (config.mixture[part](half / 2) + config.mixture[part](1.5 * half)) / 2 == pytest.approx(share)
    again, ref = (pretrain.recipe(arm, 2, shape).stage("pretrain") for arm in ("ref'", "ref"))
    assert again.weights_seed != 2 and again.model_copy(update={"weights_seed": None}) == ref


def test_planned_runs():
    needed = runs.planned("full", ["pretrain"], ["L6"])
    ordinary = {job.arm for job in needed if job.shape != "wide"}
    assert ordinary == {"corpus", "ref", "ref'", "MHA", "MLA-24", "MHA-norm"} and needed[0].arm == "corpus"
    names = [job.name for job in runs.planned("full", ["pretrain"])]
    assert len(set(names)) == len(names)
    assert names.index("pretrain-claims-MULTI-DTOT-3") < names.index("pretrain-claims-ref-4")
    assert {job.seed for job in runs.planned("default", ["pretrain"], seeds=2)} == {0, 1, 2}
    assert not runs.planned("quick", ["pretrain"], ["K1"])
    # a run that reuses one that itself reuses another needs all three
    chain = [job.arm for job in runs.planned("full", ["zero"], ["R5"], seeds=1)]
    assert chain == ["base", "right", "cold", "dev2", "dev3", "r1"]
    wide = [job for job in runs.planned("full", ["pretrain"], ["M5"], seeds=1) if job.shape == "wide"]
    assert [job.arm for job in wide] == ["ref", "ref'", "DACT"]
    assert not [job for job in runs.planned("full", ["pretrain"], ["M17"]) if job.shape == "wide"]
    counted = {job.donor for job in runs.planned("default", ["pretrain"], ["M20"]) if job.arm.startswith("spikes-")}
    assert counted == {f"pretrain-short-{arm}-1" for arm in ("ref", "ref-again", "DACT", "NONE", "TEN")}


def test_dry_run_and_wrong_options(tmp_path):
    done = CliRunner().invoke(app, ["claims", "--only", "L6", "--dry-run", "--runs", str(tmp_path), "--json"])
    facts = json.loads(done.stdout)
    assert facts["jobs"][0]["name"] == "pretrain-all-corpus-0" and facts["minutes"] > 0
    assert not any(tmp_path.iterdir())
    lines = CliRunner().invoke(app, ["claims", "--only", "L6", "--dry-run", "--runs", str(tmp_path), "--seeds", "2"])
    [mha] = [line for line in lines.stdout.splitlines() if line.split()[2] == "MHA"]
    assert "2 of 2" in mha and "keys and values of every head" in mha and "0 of them finished" in lines.stdout
    save = ["--save", str(tmp_path / "new")]
    for options, message in (
        (["--quick", "--full"], "two tiers"),
        (save, "--save has no effect with --dry-run"), (["--list", *save], "--save has no effect with --list"),
        (["--part", "none", "--seeds", "3"], "--seeds has no effect with --part none"),
    ):  # fmt: skip
        wrong = CliRunner().invoke(app, ["claims", *options, "--dry-run"])
        assert isinstance(wrong.exception, UserError) and message in str(wrong.exception)


# --- results ---------------------------------------------------------------------------------------------------------


NUMBERS = (
    "bpb_unread", "overfit", "copy", "needle_240", "cloze", "maxvio", "information", "information_untrained", "damage",
    "damage_shuffled", "rise_best_2", "rise_best_4", "rise_random_2", "ref/DACT", "MHA/ref", "ref/ref",
)  # fmt: skip


def result(arm: str, seed: int, shape: str = "short", **numbers: float) -> ArmResult:
    jobs = pretrain.jobs(tier(shape), seed)
    [job] = [job for job in jobs if (job.arm, job.seed, job.shape) == (arm, seed, shape)]
    others = dict.fromkeys(NUMBERS, 0.5) | {f"bpb_{part}": numbers.get("bpb", 2.0) for part in SHARES}
    return ArmResult("pretrain", arm, seed, shape, job.digest, registry.rules_hash(), others | numbers)


def tier(shape: str) -> runs.Tier:
    return next(name for name, candidate in pretrain.SHAPE.items() if candidate == shape)


def latent_as_good(shape: str = "short", seeds: int = 3, change: float = -0.004) -> list[ArmResult]:
    """Results in which MLA is slightly better than MHA, and a narrower latent much worse."""
    noise = random.Random(0)
    means = {"ref": 2.0 * (1 + change), "ref'": 2.0 * (1 + change), "MHA": 2.0, "MLA-24": 2.05}
    return [
        result(arm, seed, shape, bpb=mean + noise.gauss(0, 0.001))
        for arm, mean in means.items() for seed in range(1, seeds + 1)
    ]  # fmt: skip


def seen(arm_results: list[ArmResult], name: str = "L6") -> Seen:
    results = runs.best(arm_results)
    [card] = cards.make([name], {name: results[name]} if name in results else {})
    return card.seen


def test_verdicts_need_seeds_and_controls():
    assert seen(latent_as_good()) is Seen.YES
    assert seen(latent_as_good(seeds=1)) is Seen.CANNOT_TELL
    assert seen(latent_as_good(change=0.03)) is Seen.NO
    blind = [
        arm_result for arm_result in latent_as_good() if arm_result.arm != "MLA-24"
    ]  # no control shows that harm would be noticed
    assert seen(blind) is Seen.CANNOT_TELL
    assert runs.missing(blind, registry.claims())["MLA-24"] == ["L12", "L6"]
    assert runs.missing(blind, ["L12"]) == {"MLA-24": ["L12"]}
    assert seen([arm_result for arm_result in blind if arm_result.arm != "MHA"]) is Seen.NOT_ASKED


def test_the_largest_runs_with_enough_seeds_judge():
    small, large = latent_as_good("short"), latent_as_good("claims", seeds=2, change=0.03)
    assert seen(small + large) is Seen.YES
    assert seen(small + latent_as_good("claims", change=0.03)) is Seen.NO
    unfinished = [arm_result for arm_result in latent_as_good("claims", change=0.03) if arm_result.arm != "MLA-24"]
    assert seen(small + unfinished) is Seen.YES  # the larger runs lack a control, so they wait for it
    [card] = cards.make(["L6"], runs.best(small))
    *_, part = card.facts()["parts"]
    assert (part["seeds"], part["size"]) == (3, "network 128 wide, 4 layers, 500K tokens read")


def test_one_seed_beside_the_committed_ones():
    committed = latent_as_good()
    for change, agrees in ((-0.004, True), (0.02, False)):
        own = latent_as_good(seeds=1, change=change)
        judged, again, wrong = results.evidence("default", committed, own)
        [card] = cards.make(["L6"], judged, again)
        assert card.seen is Seen.YES and not wrong  # the committed seeds decide
        assert card.facts()["parts"][-1]["this_run"]["agrees"] is agrees
        message = "as expected" if agrees else "outside the prediction interval"
        assert (
            message in cards.describe([card]) and message in card_page.full(card) and "3 runs" in card_page.full(card)
        )
    smaller = [result(arm, 1, "nano", bpb=2.0) for arm in ("ref", "MHA")]
    judged, again, _ = results.evidence("quick", committed, smaller)
    [card] = cards.make(["L6"], judged, again)  # another size is no reason to expect the same value
    assert card.facts()["parts"][-1]["this_run"].keys() == {"value", "size"}
    message = cards.describe([card]) + card_page.full(card)
    assert message.count("network 64 wide, 2 layers, 250K tokens read") == 2
    assert "as expected" not in message and "prediction interval" not in message


def test_of_two_sources_the_one_with_more_seeds_judges():
    committed = latent_as_good(seeds=1)
    judged, again, _ = results.evidence("default", committed, latent_as_good(seeds=3, change=0.03))
    [card] = cards.make(["L6"], judged, again)
    assert card.seen is Seen.NO and card.facts()["parts"][-1]["seeds"] == 3
    assert not any(again.values())  # seeds that decide are not compared with themselves
    judged, _, _ = results.evidence("default", committed, latent_as_good(seeds=1, change=0.03))
    assert cards.make(["L6"], judged)[0].seen is Seen.CANNOT_TELL  # on a tie the committed seeds decide
    for tier in ("default", "full"):
        judged, _, _ = results.evidence(tier, latent_as_good(), latent_as_good(change=0.03))
        assert cards.make(["L6"], judged)[0].seen is Seen.YES


def test_the_arms_of_a_seed_come_from_one_source():
    """Times are compared within a machine, and a control shares the arm that it is compared with."""
    committed, other = latent_as_good(), latent_as_good(seeds=4, change=0.03)
    [measured] = results.evidence("default", committed, [])[0]["L6"].values()

    def found(own: list[ArmResult], committed: list[ArmResult] = committed) -> Measured | None:
        return results.evidence("full", committed, own)[0].get("L6", {}).get("bpb(ref) / bpb(MHA) - 1")

    mha = [arm_result for arm_result in other if arm_result.arm == "MHA"]
    died = [ArmResult(**vars(arm_result) | {"metrics": {}, "diverged": "it did not recover"}) for arm_result in mha]
    for own in (mha, died):
        assert found(own) == measured and [*results.evidence("default", committed, own)[0]["L6"].values()] == [measured]
    bare = found(
        [arm_result for arm_result in other if arm_result.arm in ("ref", "MHA")]
    )  # without controls: only its fourth seed is new
    assert bare.values[:3] == measured.values and bare.values[3] > 0.02 and bare.positive == measured.positive
    assert min(found(other).values) > 0.02
    assert found(mha, [arm_result for arm_result in committed if arm_result.arm != "MHA"]) is None


@pytest.mark.parametrize(
    ("held", "own", "saved"),
    [
        ({1: "ref MHA"}, {2: "ref MHA", 3: "ref MHA"}, {1: "", 2: "ref MHA", 3: "ref MHA"}),  # new seeds
        ({1: "ref MHA"}, {1: "ref", 2: "ref"}, {1: "", 2: "ref"}),  # a part of a seed replaces nothing
        ({1: "ref MHA"}, {1: "ref MHA", 2: "ref MHA"}, {1: "ref MHA", 2: "ref MHA"}),  # more seeds
        ({1: "ref"}, {1: "ref MHA"}, {1: "ref MHA"}),  # the whole seed of which there was a part
        ({1: "ref"}, {1: "MHA"}, {1: "MHA"}),  # its other part
        ({1: "ref MHA"}, {1: "ref DACT DTOT", 2: "ref"}, {1: "DACT DTOT", 2: "ref"}),  # neither has all arms
    ],
)
def test_saved_seeds_are_complete(held, own, saved):
    """`saved`: the arms that come from `own`."""

    def made(seeds: dict[int, str], bpb: float) -> list[ArmResult]:
        return [result(arm, seed, bpb=bpb) for seed, arms in seeds.items() for arm in arms.split()]

    joined = runs.joined(made(held, 2.0), made(own, 3.0))
    own_arms = {
        seed: " ".join(
            arm_result.arm for arm_result in joined if arm_result.seed == seed and arm_result.metrics["bpb"] == 3
        )
        for seed in saved
    }
    assert own_arms == saved and {arm_result.seed for arm_result in joined} == {*held, *own}


def test_text_beside_a_rule_changes_no_verdict():
    arm_results = latent_as_good()
    worse = [result("MHA-norm", seed, bpb=1.9 + 0.001 * seed) for seed in (1, 2, 3)]  # MLA is 5 % worse than this arm
    [card] = cards.make(["L6"], runs.best(arm_results + worse))
    [side] = card.beside
    assert card.seen is Seen.YES and sum(bool(finding.seeds) for finding in card.findings) == 1
    assert side.outcome is Outcome.FAILS and side.interval.low > 0.03 and side.seeds == 3
    assert "whose keys and values are normalised" in card_page.full(card) and "beside the rule: " in cards.describe(
        [card]
    )
    assert card.facts()["beside"][0]["outcome"] == "fails"
    [alone] = cards.make(["L6"], runs.best([side for side in arm_results + worse if side.arm != "MHA"]))
    assert alone.seen is Seen.NOT_ASKED and alone.beside  # the rule's own part has not been run
    [beside] = cards.make(["Z3"], {"Z3": {"pass@1, right - form, points": Measured([50.0])}})
    assert beside.open and beside.beside[0].value == 50.0


def test_noise_and_spikes_are_differences_of_differences():
    bits = {"ref": 2.0, "NOISE": 2.1, "DACT": 2.1, "NOISE-DACT": 2.3, "HALF": 2.9, "ref'": 2.01, "NOISE'": 2.11}
    noise = [result(arm, seed, bpb=value + 0.001 * seed) for arm, value in bits.items() for seed in (1, 2, 3)]
    how = pretrain.METRICS["M15", "loss by noise: ref - DACT"].measured(Runs(noise))
    assert how.values == pytest.approx([-0.1] * 3) and how.positive == pytest.approx([-0.8] * 3)
    assert how.negative == pytest.approx([0.0] * 3, abs=1e-9) and seen(noise, "M15") is Seen.YES
    jumps = {"spikes-ref": 3, "spikes-DACT": 0, "spikes-TEN": 9, "spikes-ref'": 3}
    with_spikes = [result(arm, seed, spikes=n + seed % 2) for arm, n in jumps.items() for seed in (1, 2, 3)]
    assert seen(with_spikes, "M20") is Seen.YES
    calm = [value for value in with_spikes if value.arm != "spikes-TEN"] + [
        result("spikes-TEN", n, spikes=3) for n in (1, 2, 3)
    ]
    assert seen(calm, "M20") is Seen.CANNOT_TELL  # the control has no more spikes: they would go unnoticed
    heads = {"MULTI-MHA": 0.3, "MULTI-ONE": 0.5, "MULTI": 0.4, "MULTI'": 0.4}
    overfitted = [result(arm, seed, overfit=value + 0.001 * seed) for arm, value in heads.items() for seed in (1, 2, 3)]
    assert seen(overfitted, "L2") is Seen.CANNOT_TELL  # its other half, speed, has not been run


def test_spikes_are_counted_in_the_run_beside_even_if_it_diverged(tmp_path):
    [job] = [job for job in pretrain.jobs("default") if job.arm == "spikes-TEN"]
    folder = tmp_path / job.donor / runner.RUN
    folder.mkdir(parents=True)
    lines = [{"stage": "pretrain", "values": {"train/loss": 5.0 + 0.1 * (step % 2)}} for step in range(40)]
    lines += [
        {"stage": "pretrain", "values": {"train/loss": 9.0}},
        {"stage": "pretrain", "values": {"train/skipped": 1}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runner.run_job(job, tmp_path).metrics == {"spikes": 2}


def test_a_diverged_arm_is_a_result():
    committed = [arm_result for arm_result in latent_as_good() if (arm_result.arm, arm_result.seed) != ("MHA", 2)]
    committed.append(ArmResult("pretrain", "MHA", 2, "short", "", "", {}, diverged="training does not recover"))
    assert Runs(committed).diverged == {"MHA": [2]} and Runs(committed).seeds("ref", "MHA") == [1, 3]
    assert seen(committed) is Seen.CANNOT_TELL  # two seeds are left


def test_an_a_a_test_with_a_visible_difference_fails():
    assert runs.different(latent_as_good()) == []
    apart = [
        result(arm, seed, bpb=2 + shift + 0.0001 * seed)
        for arm, shift in (("ref", 0), ("ref'", 0.1))
        for seed in range(1, 6)
    ]
    assert "A/A test: bpb of ref and ref' differ" in runs.different(apart)[0]
    few = [arm_result for arm_result in apart if arm_result.seed < 5]
    [test] = runs.self_tests(few)
    assert runs.different(few) == [] and test.agrees is None and test.interval.low > 0, "four seeds are no test"


def test_the_worst_part_is_chosen_by_other_seeds():
    """With no real difference its mean is then 0; choosing each seed's own worst part would be biased."""
    noise, chosen, own = random.Random(1), [], []
    for _ in range(300):
        seeds = [tuple({f"bpb_{part}": noise.gauss(0, 1) for part in SHARES} for _ in range(2)) for _ in range(3)]
        chosen += worst_part(seeds)
        own += [worst_part([seed])[0] for seed in seeds]
    assert abs(sum(chosen) / len(chosen)) < 0.2 and sum(own) / len(own) > 1.5


def test_results_of_other_rules_and_settings_are_excluded_by_name(tmp_path):
    good = result("ref", 1, bpb=2.0)
    first_rules = ArmResult(**{**vars(good), "seed": 4, "rules": registry.rules().before[0]})
    other_rules = ArmResult(**{**vars(good), "seed": 2, "rules": "0" * 64})
    other_arm = ArmResult(**{**vars(good), "seed": 3, "settings": "0" * 16})
    gone = ArmResult(**{**vars(good), "arm": "GONE"})
    for index, arm_result in enumerate((good, other_rules, other_arm, gone, first_rules)):
        (tmp_path / str(index)).mkdir()
        results.write(tmp_path / str(index), arm_result)
    read = results.finished(tmp_path)
    assert read.results == [good, first_rules]  # rules do not change what a run gave
    message = " ".join(read.left_out)
    assert "ref seed 2 ran under other rules" in message and "ref seed 3 ran with other settings" in message
    assert "GONE seed 1 no longer exist" in message
    [path] = results.save(read.results, tmp_path / "kept")
    assert [ArmResult(**entry) for entry in json.loads(path.read_text())] == [good, first_rules]
    later = result("ref", 2, bpb=2.1)
    results.save([later], tmp_path / "kept")
    assert results.committed(tmp_path / "kept").results == [good, later, first_rules]
    path.write_text("{")
    with pytest.raises(UserError, match="is no file of results"):
        results.save([later], tmp_path / "kept")
    (tmp_path / "0" / results.FILE).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        results.finished(tmp_path)


def test_committed_results_are_of_todays_rules_and_arms():
    read = results.committed()
    assert read.left_out == [], "did a key only change its name? claims/tools/renamed.py"
    assert all(arm_result.metrics or arm_result.diverged for arm_result in read.results)
    assert len(runs.joined(read.results, [])) == len(read.results), "one result per arm and seed"


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_runs_in_its_own_process_and_once(tmp_path):
    jobs = [job for job in pretrain.jobs("quick") if job.arm == "speed"]
    messages: list[str] = []
    assert runner.run(jobs, "quick", tmp_path, 2, messages.append) == []
    arm_result = results.of_job(jobs[0], tmp_path / jobs[0].name)
    assert arm_result is not None and set(arm_result.metrics) == {"ref/DACT", "MHA/ref", "ref/ref"}
    assert arm_result.facts["torch"] and arm_result.metrics["ref/ref"] > 0
    messages.clear()
    runner.run(jobs, "quick", tmp_path, 2, messages.append)
    assert messages == [] and runner.done(jobs[0], tmp_path)


class _Part:
    METRICS, SHAPE, SIZES, SAME = {}, {"quick": "s"}, {"s": ""}, None

    def __init__(self, fails: str):
        self.fails = fails

    def measure(self, job, folder):
        raise UserError(self.fails)


def test_only_divergence_counts_as_a_result(tmp_path, monkeypatch):
    job = ArmJob("pretrain", "x", 1, "s", {}, 1.0)
    monkeypatch.setattr(runner, "part", lambda name: _Part("training does not recover: 3 non-finite steps"))
    assert runner.run_job(job, tmp_path).diverged.startswith("training does not recover")
    assert results.read(tmp_path / job.name).metrics == {}
    monkeypatch.setattr(runner, "part", lambda name: _Part("disk full"))
    (tmp_path / job.name / results.FILE).unlink()
    with pytest.raises(UserError, match="disk full"):
        runner.run_job(job, tmp_path)
    assert results.read(tmp_path / job.name) is None


@pytest.mark.slow
def test_a_failed_job_fails_the_jobs_that_depend_on_it(tmp_path):
    broken = ArmJob("pretrain", "nobody", 1, "nano", {}, 1.0)
    dependent = ArmJob("pretrain", "later", 1, "nano", {}, 1.0, donor=broken.name)
    failed = runner.run([broken, dependent], "quick", tmp_path, 2, lambda line: None)
    assert [failure.job.arm for failure in failed] == ["nobody", "later"] and f"{broken.name} failed" in failed[1].why


def test_a_renamed_key_keeps_the_results(tmp_path, monkeypatch):
    """The digests in the results follow the arms that the file names, and no others."""
    files = {path.name: path.read_text() for path in results.COMMITTED.glob("*.json")}
    digests_now = {"/".join(key): digest for key, digest in results.digests().items()}
    old = digests_now["fp8/coarse/short"]
    (tmp_path / "before.json").write_text(json.dumps(digests_now | {"fp8/coarse/short": "0123456789abcdef"}))
    (tmp_path / "results").mkdir()
    for name, text in files.items():
        (tmp_path / "results" / name).write_text(text.replace(old, "0123456789abcdef"))
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["renamed.py", "--after", str(tmp_path / "before.json")])
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "renamed.py"), run_name="__main__")
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == files
