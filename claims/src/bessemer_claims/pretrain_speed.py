"""How long a training step of one arm takes compared with another's. They take turns in one process, so that other load
on the machine affects all alike. Seconds are of processor time: on one thread of an idle machine the same as a
clock's."""

from __future__ import annotations

import statistics
import time

import torch

from bessemer.data.batch import Batch
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token

ROUNDS, STEPS = 7, 3
ARMS = ("ref", "ref'", "DACT", "MHA")


def ratios(shapes: dict[str, ModelConfig], seed: int) -> dict[str, float]:
    """`ref/DACT`: tokens per second of the reference over those of DACT; `MHA/ref`: seconds per step of MHA over those
    of the reference; `ref/ref`: the same of two references. Medians over rounds, of forward and backward."""
    torch.set_num_threads(1)
    networks = {
        arm: Transformer(cfg).initialise(seed).to_compute(torch.bfloat16).train() for arm, cfg in shapes.items()
    }
    tokens = torch.randint(networks["ref"].cfg.vocab_size, (8, 256), generator=torch.Generator().manual_seed(seed))
    loss = torch.ones(tokens.shape)
    loss[:, 0] = 0
    batch = Batch(tokens, loss)
    for model in networks.values():
        _seconds(model, batch)  # builds and warms up
    rounds = [{arm: _seconds(model, batch) for arm, model in networks.items()} for _ in range(ROUNDS)]

    def over(numerator: str, denominator: str) -> float:
        return statistics.median(seconds[numerator] / seconds[denominator] for seconds in rounds)

    return {"ref/DACT": over("DACT", "ref"), "MHA/ref": over("MHA", "ref"), "ref/ref": over("ref'", "ref")}


def _seconds(model: Transformer, batch: Batch) -> float:
    began = time.process_time()
    for _ in range(STEPS):
        next_token(model, batch, mtp_lambda=0.0, balance_alpha=1e-4).total.backward()
        model.zero_grad(set_to_none=True)
    return time.process_time() - began
