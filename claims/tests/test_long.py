"""The extensions of the recipe `long` as an experiment: its jobs, and its numbers from the committed evaluation."""

import shutil
from pathlib import Path

import pytest

from bessemer.pipeline import preflight
from bessemer_claims import cards, long
from bessemer_claims.runs import ArmResult, Runs
from bessemer_claims.verdict import Seen

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "long.json"


def test_every_seed_is_the_recipe(tmp_path):
    assert long.jobs("quick") == long.jobs("default") == []
    jobs = long.jobs("full")
    assert [job.seed for job in jobs] == [1, 2, 3] and len({job.digest for job in jobs}) == 1
    built = jobs[1].recipe()
    preflight.check(built, tmp_path, built.names())
    evaluated = built.stage("longeval")
    assert built.seed == 2 and max(evaluated.lengths) == long.LENGTH and evaluated.switched == ["pretrain"]


def test_numbers_of_a_finished_evaluation(tmp_path):
    (tmp_path / "07-longeval").mkdir()
    shutil.copy(COMMITTED, tmp_path / "07-longeval" / "long.json")
    numbers = long.measure(long.jobs("full")[0], tmp_path)
    assert numbers["before"] == pytest.approx(0.005, abs=1e-3) and numbers["after"] == pytest.approx(0.936, abs=1e-3)
    assert numbers["switched"] == pytest.approx(0.843, abs=1e-3) and 0.005 < numbers["chance"] < 0.1


def test_a_model_that_finds_needles_before_training_fires_the_control():
    def verdict(before):
        numbers = {"after": 0.9, "switched": 0.8, "chance": 0.03}
        results = [
            ArmResult("long", "long", seed, "tiny", "", "", numbers | {"before": before + 0.001 * seed})
            for seed in (1, 2, 3)
        ]
        measured = {name: how.measured(Runs(results)) for (_, name), how in long.METRICS.items()}
        return cards.make(["D2"], {"D2": measured})[0].seen

    assert verdict(0.0) is Seen.YES
    assert verdict(0.2) is Seen.CANNOT_TELL
