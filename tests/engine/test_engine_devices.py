"""The plain torch path does not depend on the device: every tensor that decoding makes names its device."""

import pytest
import torch
from drain import drain
from test_scheduler import requests

from bessemer.addons.serve.scheduler import Scheduler
from bessemer.engine.engine import Engine
from bessemer.model.ops import Operation
from bessemer.model.transformer import Transformer


@pytest.fixture
def engine(cfg, tokenizer, torch_steps, monkeypatch):
    """A model with an MTP module, on the CPU, without operations of others: theirs may be for one device."""
    monkeypatch.setattr(Operation, "__call__", lambda self, *arguments, **named: self.equation(*arguments, **named))
    return Engine(Transformer(cfg.model_copy(update={"n_mtp": 1})).initialise(3), tokenizer)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_tensor_is_on_the_model_s_device(engine, prompts, drafts):
    """Without a device of its own, a tensor is made on `meta` here, and the first operation on it and on the model's
    numbers fails."""
    options = dict(max_new_tokens=20, seed=3, drafts=drafts)
    expected = engine.generate(prompts, **options)
    wanted = requests(prompts, top=2) if not drafts else requests(prompts)[:6]
    alone = drain(Scheduler(engine, drafts=drafts), wanted, every=1)[0]
    with torch.device("meta"):
        assert engine.generate(prompts, **options) == expected
        actual, _ = drain(Scheduler(engine, drafts=drafts), wanted, every=1)
    assert actual == alone
