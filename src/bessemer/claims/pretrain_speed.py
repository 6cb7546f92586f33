"""How long a training step of an arm takes against another's: in turn, in one process, so that what else the machine
does meets all of them."""

from __future__ import annotations

import statistics
import time

import torch

from bessemer.claims import pretrain
from bessemer.config.training import PretrainConfig
from bessemer.data.batch import Batch
from bessemer.model.transformer import Transformer
from bessemer.train import setup
from bessemer.train.objective import next_token

ROUNDS, STEPS = 7, 3
ARMS = ("ref", "ref'", "DACT", "MHA")


def ratios(shape: str, seed: int) -> dict[str, float]:
    """`ref/DACT`: tokens a second of the reference over those of DACT; `MHA/ref`: seconds a step of MHA over those of
    the reference; `ref/ref`: of the reference over another's of its kind. Medians over rounds; forward and backward."""
    torch.set_num_threads(1)
    networks = {arm: _network(arm, shape, seed) for arm in ARMS}
    tokens = torch.randint(networks["ref"].cfg.vocab_size, (8, 256), generator=torch.Generator().manual_seed(seed))
    loss = torch.ones(tokens.shape)
    loss[:, 0] = 0
    batch = Batch(tokens, loss)
    for model in networks.values():
        _seconds(model, batch)  # builds and warms up
    rounds = [{arm: _seconds(model, batch) for arm, model in networks.items()} for _ in range(ROUNDS)]

    def over(one: str, other: str) -> float:
        return statistics.median(seconds[one] / seconds[other] for seconds in rounds)

    return {"ref/DACT": over("DACT", "ref"), "MHA/ref": over("MHA", "ref"), "ref/ref": over("ref'", "ref")}


def _network(arm: str, shape: str, seed: int) -> Transformer:
    made = pretrain.recipe(arm, seed, shape)
    config = made.stage("pretrain")
    assert isinstance(config, PretrainConfig)
    return Transformer(setup.model_config(made, config.model)).initialise(seed).to_compute(torch.bfloat16).train()


def _seconds(model: Transformer, batch: Batch) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        next_token(model, batch, mtp_lambda=0.0, balance_alpha=1e-4).total.backward()
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - began
