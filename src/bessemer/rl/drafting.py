"""The MTP modules in RL: what becomes of them while the policy moves (`RLConfig.mtp`), and how well they still draft.

GRPO's objective does not train them. They draft in speculative decoding, in rollouts too (R1-Nature B.1), and draft the
worse the further the policy is from the one that they were trained with. The papers do not say whether R1's RL trains
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import evaluating
from bessemer.rl.component import Component
from bessemer.train.loss import predicting
from bessemer.train.runtime import Whole

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

    def __init__(self, policy: Whole) -> None:
        self.policy = policy

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        if len(self.policy.model.mtp):
            self.policy.refresh()
        return losses(self.policy.model, batches[0])


@torch.no_grad()
def losses(model: LanguageModel, batch: Batch) -> dict[str, float]:
    """Cross entropy of each module on the trained tokens of a batch, nats per token."""
    if not len(model.mtp):
        return {}
    batch = batch.to(model.embed.weight.device)
    with evaluating(model):
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=True, **batch.routed)
    values = {}
    for k, hidden_BTD in enumerate(out.mtp_hidden, start=1):
        total, weight = predicting(hidden_BTD, model.head_weight, batch, 1 + k), batch.predicted(1 + k)[1].sum()
        values[f"rl/mtp_{k}"] = float(total) / max(float(weight), 1e-9)
    return values
