"""FP8 arms: they differ in the number format alone, and a real pair of runs gives the gaps."""

import pytest

from bessemer.pipeline import runner
from bessemer_claims import fp8


def test_formats_differ_in_nothing_else():
    for arm in fp8.FORMATS:
        made = fp8.recipe(arm, 2, "whole")
        base, other = made.stage("bf16"), made.stage(arm)
        changed = {key for key, value in dict(base).items() if value != getattr(other, key)} - {"name"}
        assert changed == ({"precision"} if arm == "float32" else {"fp8"}) and made.seed == 2
        assert base.tokens == 1_000_000 and len(made.stages) == 3
    assert fp8.jobs("quick") == []
    jobs = fp8.jobs("full", seeds=2)
    assert [job.donor for job in jobs[:3]] == [None, "fp8-whole-bf16-1", "fp8-whole-bf16-1"]


@pytest.mark.slow
def test_a_pair_of_runs_gives_two_gaps(tmp_path):
    [job] = [one for one in fp8.jobs("default") if one.arm == "unscaled"]
    made = job.recipe()
    limits = dict.fromkeys(("english", "chinese", "idioms", "code", "logic"), 6_000)
    small = {"corpus": {"limits": limits, "vocab_sample": 50_000}}
    small |= {name: {"tokens": 6_144} for name in ("bf16", "unscaled")}
    stages = [stage.model_copy(update=small[stage.name]) for stage in made.stages]
    runner.run(made.model_copy(update={"stages": stages}), tmp_path)
    found = fp8.measure(job, tmp_path)
    assert found.keys() == {"training", "heldout"} and found["heldout"] != 0 != found["training"]
    metric = fp8.METRICS["F7", "held-out, FP8 / BF16 - 1, %"]
    assert metric.of(found) == found["heldout"] and metric.positive == ("coarse",)
    with pytest.raises(KeyError):
        metric.of({})
