"""The start gate: what a base solves decides, and how it fails determines the advice."""

import pytest
from rl_parts import reward

from bessemer.rl.heldout import start_gate

GOOD = {
    "accuracy": 0.2, "accuracy_k": 0.5, "k": 4, "formatted": 0.8, "truncated": 0.05, "reasons": {},
}  # fmt: skip


def test_a_base_that_solves_something_may_start():
    decision = start_gate(GOOD, 0.02, format_reward=1.0)
    assert decision.passed and decision.warnings == ()
    assert decision.message == "the model solves 20.0% of held-out problems (pass@4 50.0%)"
    assert start_gate({"accuracy": 0.2, "accuracy_k": 0.5}, 0.02).passed


def test_a_hopeless_base_is_refused_with_advice():
    decision = start_gate(GOOD | {"accuracy": 0.01, "accuracy_k": 0.03}, 0.02)
    assert not decision.passed
    assert "below minimum_pass 2.0%: RL has nothing to amplify. Pre-train longer" in decision.message
    assert "held-out problems" in decision.message


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"truncated": 0.9}, "90% of the answers are cut off at the cap: raise max_new_tokens"),
        ({"formatted": 0.05}, "5% of the answers have the form the verifier reads: begin with SFT"),
    ],
)
def test_the_advice_follows_from_how_it_fails(change, advice):
    hopeless = start_gate(GOOD | {"accuracy": 0.0, "accuracy_k": 0.0} | change, 0.02)
    assert not hopeless.passed and advice in hopeless.message and "pre-train longer" in hopeless.message.lower()
    able = start_gate(GOOD | change, 0.02)
    assert able.passed and len(able.warnings) == 1 and advice in able.warnings[0]


def test_a_base_that_will_learn_little_gets_a_warning():
    few = start_gate(GOOD | {"accuracy": 0.03, "accuracy_k": 0.06, "formatted": 0.25}, 0.02)
    assert few.passed and len(few.warnings) == 1 and "nearly all groups will be all wrong" in few.warnings[0]
    done = start_gate(GOOD | {"accuracy": 0.97, "accuracy_k": 1.0}, 0.02)
    assert done.passed and "choose harder problems" in done.warnings[0]
    form = GOOD | {"accuracy": 0.04, "accuracy_k": 0.2}
    assert "the form alone may be learnt" in start_gate(form, 0.02, format_reward=0.5).warnings[0]
    assert start_gate(form, 0.02, format_reward=0.0).warnings == ()
    forced = start_gate(GOOD | {"accuracy": 0.0, "accuracy_k": 0.0}, 0.0)  # a minimum of 0 admits any base
    assert forced.passed and "0%" in forced.warnings[0]


def test_the_form_is_no_fault_where_nothing_is_paid_for_it():
    """A reward of one's own reads what it likes."""
    unformed = GOOD | {"formatted": 0.0, "accuracy": 0.0, "accuracy_k": 0.0, "graded": 1.0, "contrast": 0.5}
    assert start_gate(unformed, 0.0).warnings and not start_gate(unformed, 0.0, pays_form=False).warnings
    refused = start_gate(unformed | {"contrast": 0.0}, 0.02, pays_form=False)
    assert not refused.passed and "SFT" not in refused.message


def test_accuracy_and_format_pay_for_the_form(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def own(problem, answer, verdict): return 1.0")
    assert reward("accuracy").pays_form and reward(f"{own}:own", ("format", 0.1)).pays_form
    assert not reward(f"{own}:own").pays_form and not reward(f"{own}:own", "language").pays_form
