"""A small network of the real architecture (GRPO runs through the real model and Engine here), 10 ms per forward."""

import pytest
import torch

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

torch.set_num_threads(1)

TEXTS = ["User: Make 27 from 3, 6, 7.\nAssistant:<think>(3*7)+6=21+6=27:27 yes</think><answer>(3*7)+6</answer>"] * 8


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture
def make_model(tokenizer):
    """A function: seed, config overrides -> a network with weights large enough for its predictions to differ."""

    def make(seed: int, **fields: int) -> Transformer:
        shape = dict(
            vocab_size=tokenizer.vocab_size + 5, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2,
            q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
            n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, max_seq_len=96, init_std=0.2,
        )  # fmt: skip
        model = Transformer(preset("tiny", **(shape | fields))).initialise(seed)
        for n, gate in enumerate(model.gates().values()):
            gate.bias_E.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(n))
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model(3)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer)
