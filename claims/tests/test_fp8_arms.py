"""FP8 arms: they differ in the number format alone, and a real pair of runs gives the gaps."""

import pytest

from bessemer.pipeline import runner
from bessemer_claims import fp8


def test_formats_differ_in_nothing_else():
    for arm in fp8.FORMATS:
        built = fp8.recipe(arm, 2, "whole")
        base, other = built.stage("bf16"), built.stage(arm)
        changed = {key for key, value in dict(base).items() if value != getattr(other, key)} - {"name"}
        assert changed == ({"precision"} if arm == "float32" else {"fp8"}) and built.seed == 2
        assert base.tokens == 1_000_000 and len(built.stages) == 3
    assert len({fp8.recipe(arm, 2, "whole").stage(arm).fp8 for arm in fp8.FORMATS} - {"off"}) == len(fp8.FORMATS) - 1
    assert fp8.jobs("quick") == []
    jobs = fp8.jobs("full", seeds=2)
    assert [job.donor for job in jobs[:3]] == [None, "fp8-whole-bf16-1", "fp8-whole-bf16-1"]


@pytest.mark.slow
def test_a_pair_of_runs_gives_two_gaps(tmp_path):
    [job] = [arm_job for arm_job in fp8.jobs("default") if arm_job.arm == "unscaled"]
    built = job.recipe()
    limits = dict.fromkeys(("english", "chinese", "idioms", "code", "logic"), 6_000)
    small = {"corpus": {"limits": limits, "vocab_sample": 50_000}}
    small |= {name: {"tokens": 6_144} for name in ("bf16", "unscaled")}
    stages = [stage.model_copy(update=small[stage.name]) for stage in built.stages]
    runner.run(built.model_copy(update={"stages": stages}), tmp_path)
    numbers = fp8.measure(job, tmp_path)
    assert numbers.keys() == {"training", "heldout"} and numbers["heldout"] != 0 != numbers["training"]
    metric = fp8.METRICS["F7", "held-out, FP8 / BF16 - 1, %"]
    assert metric.of(numbers) == numbers["heldout"] and metric.positive == ("coarse",)
    with pytest.raises(KeyError):
        metric.of({})
