"""How long a training step of one arm takes compared with another's. They take turns in one process, so that other load
on the machine affects all alike. Seconds are of processor time: on one thread of an idle machine the same as a
clock's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from bessemer.data.batch import Batch
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token

ROUNDS, STEPS = 7, 3
PAIRS = {
    "speed": {"ref/DACT": ("DACT", "ref"), "MHA/ref": ("MHA", "ref"), "ref/ref": ("ref'", "ref")},
    "speed-heads": {"ONE/MHA": ("ONE", "MHA"), "MHA/MHA": ("MHA'", "MHA")},
}
"""Job -> its numbers: seconds of a step of the first arm over those of the second. ref/DACT is named for tokens per
second. With ' an arm is the same network again."""


def ratios(pairs: Mapping[str, tuple[str, str]], network: Callable[[str], ModelConfig], seed: int) -> dict[str, float]:
    """The numbers of a job, by `PAIRS`: medians over rounds, of forward and backward. `network`: an arm's."""
    torch.set_num_threads(1)
    arms = sorted({arm for pair in pairs.values() for arm in pair})
    networks = {
        arm: Transformer(network(arm.removesuffix("'"))).initialise(seed).to_compute(torch.bfloat16).train()
        for arm in arms
    }
    vocab_size = next(iter(networks.values())).cfg.vocab_size
    tokens = torch.randint(vocab_size, (8, 256), generator=torch.Generator().manual_seed(seed))
    loss = torch.ones(tokens.shape)
    loss[:, 0] = 0
    batch = Batch(tokens, loss)
    for model in networks.values():
        _seconds(model, batch)  # builds and warms up
    rounds = [{arm: _seconds(model, batch) for arm, model in networks.items()} for _ in range(ROUNDS)]
    return {
        name: statistics.median(seconds[one] / seconds[other] for seconds in rounds)
        for name, (one, other) in pairs.items()
    }


def _seconds(model: Transformer, batch: Batch) -> float:
    began = time.process_time()
    for _ in range(STEPS):
        next_token(model, batch, mtp_lambda=0.0, balance_alpha=1e-4).total.backward()
        model.zero_grad(set_to_none=True)
    return time.process_time() - began
