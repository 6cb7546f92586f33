"""The hook "correction": importance weights for the mismatch between sampler and trainer.

Both run the same network here, so for fresh samples the gap is only rounding. It is larger if samples are older than
the policy (the queue), or come from another sampler or number format. With a correction, the objective's pi_old is the
trainer's policy before the updates, so the clip bounds only the updates, and importance weights correct the rest of the
way to the sampler:

    rho_t = pi(o_t) / pi_sampler(o_t)          of a token, pi the trainer's policy before the rollout's first update
    rho_i = prod_t rho_t                       of an output

    token-truncate       min(rho_t, C)                     truncated importance sampling (TIS)
    token-mask           rho_t if rho_t <= C else 0        leaves out tokens far likelier under pi than pi_sampler
    sequence-truncate    min(rho_i, C)
    sequence-mask        rho_i if rho_i <= C else 0

The weight multiplies a token's contribution to the objective, except for the KL term. Without a cut, only the sequence
weight is unbiased: a token's own weight ignores how likely the tokens before it were. It has less variance, and for
small gaps its bias is small. In both cases a cut trades variance for bias.

    [[stage.hooks]]
    name = "correction"
    form = "token-truncate"
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.rl.algorithms.base import LOG_RATIO_LIMIT
from bessemer.rl.component import Component
from bessemer.rl.losses import logprobs_of
from bessemer.rl.parts import LoopParts

Form = Literal["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


class Correction(NamedTuple):
    """Per token; no gradient."""

    weight: Tensor
    cut: Tensor
    """1 where the cap binds."""


def importance_weights(kind: Form, log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    """Weights of a `kind` named above; `log_ratio_N` is log rho_t, `output_N` the index of each token's output."""
    level, rule = kind.split("-")
    if level == "sequence":
        outputs, index_N = output_N.unique(return_inverse=True)
        log_ratio_N = log_ratio_N.new_zeros(outputs.numel()).index_add(0, index_N, log_ratio_N)[index_N]
    ratio_N = log_ratio_N.detach().clamp(max=LOG_RATIO_LIMIT).exp()
    cut_N = ratio_N > cap
    weight_N = ratio_N.clamp(max=cap) if rule == "truncate" else torch.where(cut_N, 0.0, ratio_N)
    return Correction(weight_N, cut_N.float())


class ImportanceCorrection(Component):
    """Adds the importance weights to all batches of a rollout. `form`: per token or per output, truncated at `cap` or
    masked above it."""

    reads = 1
    everywhere = False

    def __init__(self, loop: LoopParts, *, form: Form, cap: Annotated[float, Field(ge=1)] = 2.0) -> None:
        self.collective, self.form, self.cap = loop.trainer.collective, form, cap
        self._read = partial(logprobs_of, temperature=loop.settings.temperature)

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        corrections = []
        for batch, logp_BT in zip(batches, self.collective.own_outputs(batches, self._read), strict=True):
            sampler_BT, target_N = batch.extras["old_logp_BT"], batch.target_N
            log_ratio_N = (logp_BT - sampler_BT).flatten()[target_N]
            corrections.append(importance_weights(self.form, log_ratio_N, batch.sample_N, self.cap))
            weight_BT = torch.zeros_like(logp_BT)
            weight_BT.view(-1)[target_N] = corrections[-1].weight
            batch.extras |= {"sampler_logp_BT": sampler_BT, "old_logp_BT": logp_BT, "importance_BT": weight_BT}
        values = {name: torch.cat([getattr(c, name) for c in corrections]) for name in Correction._fields}
        # a rank that has only fillers corrects no token
        return {f"rl/correction_{name}": x.mean().item() if len(x) else 0.0 for name, x in values.items()}
