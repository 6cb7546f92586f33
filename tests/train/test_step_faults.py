"""What is said of a step that is not finite: the module or the parameter where it began."""

import pytest
import torch
from test_guard import poisoned
from tiny_run import model, trainer

from bessemer.addons.accelerate import step_faults


@pytest.mark.parametrize(
    ("name", "backward", "words"),
    [
        ("layers.1.ffn.shared.w2", False, "first in the output of layers.1.ffn.shared.w2"),
        ("mtp.0.eh_proj", False, "first in the output of mtp.0.eh_proj"),
        ("layers.1.attn_norm", True, "beginning at layers.1.attn_norm.weight"),
    ],
)
def test_a_bad_step_is_explained(name, backward, words):
    run, messages = poisoned(name, backward, bad_steps={2}, steps=5)
    run.run()
    assert len(messages) == 1 and words in messages[0]


def test_poisoned_weight_is_blamed():
    network, messages = model(), []
    run = trainer(network, steps=1, warn=messages.append)
    with torch.no_grad():
        network.layers[0].attn_norm.weight[3] = float("inf")
    run.run()
    assert "first in the output of layers.0.attn_norm (its own weights are not finite)" in messages[0]


def test_a_gradient_that_overflows_alone_is_named_by_no_parameter():
    assert "norm overflows" in step_faults.bad_gradients([])
