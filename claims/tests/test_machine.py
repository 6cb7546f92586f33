"""Measurements on this machine: bytes and errors against formulas, replicas against one process, drafts."""

import pytest

from bessemer.addons.accelerate.precision.activations import activation_bytes
from bessemer.model.config import preset
from bessemer_claims import machine, mtp_drafts, numerics, zero1


def test_short_sums_err_where_they_are_not_promoted():
    never, promoted, full = (numerics.errors(1024, *how, seed=0)[1] for how in ((14, None), (14, 128), (None, 128)))
    assert never > 5 * promoted > 100 * full


@pytest.mark.parametrize("recipe", [None, "paper"])
def test_bytes_of_the_allocator_match_those_of_the_formula(recipe):
    cfg = preset("tiny", n_layers=2)
    expected = activation_bytes(cfg, 2, 64, fp8=recipe is not None, number_bytes=2)
    assert numerics.kept_bytes(cfg, 2, 64, recipe, 0) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_rank_of_two_holds_half_of_the_optimizer(monkeypatch):
    result = zero1.numbers(1)
    assert result["share"] == pytest.approx(0.5, abs=0.01) and result["losses apart"] < 1e-6


def test_drafts_change_no_token_and_are_counted(monkeypatch):
    for name, value in {"PAGES": 60, "STEPS": 2, "QUESTIONS": 1, "NEW": 12, "ROUNDS": 1, "BY_HEART": 64}.items():
        monkeypatch.setattr(mtp_drafts, name, value)
    result = mtp_drafts.numbers(2, 0)  # asserts that all answers are the same
    assert result["unseen"] > 0 and result["memorised"] > 0 and result["guesses"] in mtp_drafts.DRAFTS
    assert 0 <= result["accepted 1"] <= 1


def test_jobs_measure_in_rounds():
    assert [job.seed for job in machine.jobs("default") if job.arm == "sums"] == [1, 2, 3]
    [job] = machine.jobs("quick")[1:2]
    numbers = machine.measure(job, None)
    how = machine.METRICS["F6", "error, not promoted / promoted"]
    assert how.of(numbers) > 5 and how.of_negative(numbers) < 5
