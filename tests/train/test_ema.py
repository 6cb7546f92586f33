"""The moving average of the weights: its value, that checkpoints keep it, and that reading it changes nothing."""

import pytest
import torch
from test_trainer import assert_same_bits, everything
from tiny_run import trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_mean_of_the_masters_and_leaves_them_alone(dtype):
    """Against a float64 sum over the steps. Inside `averaged` forward uses the average, afterwards the weights."""
    decay, expected = 0.8, {}

    def follow(run):
        for name, value in run.optimizer.masters().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()

    run = trainer(steps=6, ema_decay=decay, compute_dtype=dtype, on_step=[follow])
    expected |= {name: value.double() for name, value in run.optimizer.masters().items()}
    plain = trainer(steps=6, compute_dtype=dtype)
    run.run(), plain.run()
    state = run.optimizer.state_dict()
    for name, value in expected.items():
        assert torch.allclose(state[f"ema/{name}"].double(), value, atol=1e-6), name
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with run.optimizer.averaged():
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter, state[f"ema/{name}"].to(parameter.dtype)), name
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(value, plain.model.state_dict()[name]), name


def test_it_travels_with_checkpoints(tmp_path):
    straight = trainer(steps=8, ema_decay=0.9)
    straight.run()
    cut = trainer(steps=8, ema_decay=0.9, state_dir=tmp_path, stop=lambda: cut.step == 5)
    assert not cut.run()
    again = trainer(steps=8, ema_decay=0.9, state_dir=tmp_path)
    assert again.run()
    assert_same_bits(everything(straight), everything(again))
