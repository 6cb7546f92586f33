"""Bessemer is one of the projects under the vectors: it agrees with every case that it offers."""

from pathlib import Path

import pytest

from bessemer.model import gate, mla
from bessemer.model.ops import load as load_operations
from bessemer.train import loss
from bessemer_vectors import check
from bessemer_vectors.large import DRAWN, topics_of
from bessemer_vectors.runner import AGREES, DIFFERS, FAILED, load_adapter

ADAPTER = load_adapter(Path(__file__).parents[1] / "adapters" / "bessemer_adapter.py")


@pytest.mark.parametrize("form", ["fast", "plain"])
def test_every_case_that_is_offered_agrees(form, monkeypatch):
    """By the implementations that add-ons register on this machine, and by the equations of the core."""
    if form == "plain":
        load_operations()  # they would register later
        for operation in (gate.routing, mla.latent_attention, loss.logprobs_of_logits, loss.logprobs_gradient):
            monkeypatch.setattr(operation, "implementations", [])
    report = check(ADAPTER)
    wrong = [
        (entry.topic.name, result.case, result.text)
        for entry in report.topics
        for result in entry.results
        if result.outcome in (DIFFERS, FAILED)
    ]
    assert not wrong
    assert report.count(AGREES) >= 90
    offered = [entry for entry in report.topics if hasattr(ADAPTER, entry.topic.name)]
    assert len(offered) >= 25 and all(entry.count(AGREES) for entry in offered)


@pytest.mark.slow
def test_real_sizes_agree():
    names = [name for name in DRAWN if hasattr(ADAPTER, name)]
    report = check(ADAPTER, names, topics_of(names))
    assert report.count(AGREES) == len(names), [
        (entry.topic.name, result.outcome, result.text) for entry in report.topics for result in entry.results
    ]


def test_a_slip_in_the_package_would_be_seen(monkeypatch):
    """The clip's upper bound, moved."""
    right = ADAPTER.grpo
    monkeypatch.setattr(
        ADAPTER, "grpo", lambda *tokens, clip_low, clip_high: right(*tokens, clip_low=clip_low, clip_high=0.2)
    )
    results = check(ADAPTER, ["policy_loss"]).topics[0].results
    differing = {result.case: [name for name, _, _ in result.rivals] for result in results if result.outcome == DIFFERS}
    assert list(differing) == ["clip higher"] and "symmetric clip" in differing["clip higher"]
