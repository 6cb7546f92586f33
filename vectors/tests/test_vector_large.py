"""The cases of real size: their formulas are those of the references, and float32 can agree with them."""

import numpy as np
import pytest

from bessemer_vectors import check, load
from bessemer_vectors.compare import difference
from bessemer_vectors.large import DRAWN, topics_of

STORED = load()


def cases():
    for name in DRAWN:
        for case in STORED[name].cases:
            if name == "fp8_tiles" and case.inputs["scales"] != "exact":
                continue
            if name == "pipeline_table" and case.inputs["schedule"] != "dualpipe":
                continue
            yield pytest.param(name, case, id=f"{name}, {case.name}")


@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_both_writings_of_a_formula_agree(name, case):
    outputs = DRAWN[name][1](**case.inputs)
    for own, value in case.expected.items():
        gap = difference(outputs[own], value)
        assert gap.relative < 1e-12, (own, gap.text)


def single(values):
    return np.asarray(values, dtype=np.float32)


class Float32:
    """Whole-array formulas in float32, as most code computes."""

    @staticmethod
    def gate(logits, bias, **rest):
        return DRAWN["gate"][1](single(logits), single(bias), **rest)

    @staticmethod
    def policy_loss(logprobs, old_logprobs, advantages, mask, **rest):
        return DRAWN["policy_loss"][1](single(logprobs), single(old_logprobs), single(advantages), mask, **rest)


def test_float32_agrees_at_real_sizes():
    report = check(Float32, ["gate", "policy_loss"], topics_of(["gate", "policy_loss"]))
    assert report.count("agrees") == 2
    assert report.topics[0].topic.cases[0].inputs["logits"].shape == (4096, 256)


def test_a_slip_is_seen_at_real_size():
    class Slips:
        @staticmethod
        def gate(bias, **rest):
            return DRAWN["gate"][1](bias=0 * bias, **rest)

    assert check(Slips, ["gate"], topics_of(["gate"])).count("differs") == 1


def test_another_seed_draws_other_numbers():
    first, second = (topics_of(["balance_update"], seed)["balance_update"].cases[0] for seed in (0, 1))
    assert (first.inputs["counts"] != second.inputs["counts"]).any()
