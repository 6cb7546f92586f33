"""The MTP modules in RL: what becomes of them while the policy moves (`RLConfig.mtp`), and how well they still draft.

GRPO's objective does not train them. They draft in speculative decoding, in rollouts too (R1-Nature B.1), and draft the
worse the further the policy is from the one that they were trained with. The papers do not say whether R1's RL trains
them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.rl.component import Component
from bessemer.rl.parts import LoopParts
from bessemer.train.loss import predicting

WEIGHT = 0.1
"""Weight of their loss if they are trained: V3's last, and that of SFT."""
PREFIX = "mtp."
"""Beginning of the names of their parameters."""


def prepare(model: LanguageModel, settings: RLConfig, say: Callable[[str], None]) -> float:
    """Gets a network's MTP modules ready for a stage; returns the weight of their loss."""
    depths = model.cfg.n_mtp
    trained = settings.mtp == "trained" and depths > 0
    for module in model.mtp:
        module.apart = trained
    if settings.mtp == "dropped":
        say("MTP modules: left out of the model from here on")
    elif depths:
        say(f"MTP modules: {'trained on the samples' if trained else 'frozen'}; rl/mtp_1 is their loss on the samples")
    elif settings.mtp == "trained":
        say('warning: the model has no MTP modules, so mtp = "trained" has no effect')
    return WEIGHT if trained else 0.0


class Drafts(Component):
    """Measures how well frozen modules predict the samples."""

    def __init__(self, loop: LoopParts) -> None:
        self.collective, self.depths = loop.trainer.collective, loop.trainer.model.cfg.n_mtp

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        if not self.depths:
            return {}
        # not a filler, which weighs nothing
        nats_K2 = self.collective.sums(min(batches, key=attrgetter("filler")), nats_of, 2 * self.depths).view(-1, 2)
        return {f"rl/mtp_{k}": nats / max(weight, 1e-9) for k, (nats, weight) in enumerate(nats_K2.tolist(), start=1)}


def nats_of(out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of each module on the trained tokens of a batch, in nats, and their weight, [2 K]."""
    numbers = []
    for k, hidden_BTD in enumerate(out.mtp_hidden, start=1):
        numbers += [predicting(hidden_BTD, weight_VD, batch, 1 + k), batch.predicted(1 + k)[1].sum()]
    return torch.stack(numbers)
