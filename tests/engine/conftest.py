"""A small network with every mechanism of V3 and weights large enough that errors show, and a tokenizer of 300 ids."""

from contextlib import suppress

import pytest
import torch

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.decode import TorchSteps
from bessemer.engine.engine import Engine
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

torch.set_num_threads(1)

TEXTS = ["the quick brown fox jumps over the lazy dog", "<think>two and two</think> <answer>4</answer>", "盛钢水"] * 8


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="session")
def cfg(tokenizer):
    """The tokenizer's vocabulary and 5 spare rows, as after padding to a round number."""
    return preset("tiny", vocab_size=tokenizer.vocab_size + 5, dim=64, n_layers=3, max_seq_len=160, init_std=0.12)


@pytest.fixture
def model(cfg):
    """Routing biases of both signs, as after training."""
    model = Transformer(cfg).initialise(3)
    for n, gate in enumerate(model.gates().values()):
        gate.bias_E.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(n))
    return model


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Eight prompts of 1 to 70 ids, the longest beyond one step of the cache."""
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 5, 5, 9, 17, 33, 70)
    return [torch.randint(3, tokenizer.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def torch_steps(monkeypatch):
    """Steps in plain torch, whatever else is installed."""
    monkeypatch.setattr("bessemer.engine.engine.backend_of", lambda model, *_: TorchSteps(model))
    with suppress(ImportError):
        monkeypatch.setattr("bessemer.addons.serve.scheduler.backend_of", lambda model, *_: TorchSteps(model))
