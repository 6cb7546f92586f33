"""The objective of an RL stage (DeepSeekMath 4.1, R1 2.2.1), per token:

    J = sum_t w_t { loss(rho_t, A) - beta (pi_ref/pi - log(pi_ref/pi) - 1) }

rho_t = pi(o_t) / pi_old(o_t); the first term is that of an algorithm (`algorithms`), by default GRPO's clipped ratio.
The weights w are in the batch: 1/|o| gives the paper's mean over outputs of means over tokens ("sequence"), 1 the mean
over all tokens of the step ("token"). The trainer divides by their sum, or by a constant per output ("constant", Dr.
GRPO). The KL term is the k3 estimator, in the loss and not in the reward.

`unbiased_kl` (DeepSeek-V3.2 3.1): the KL term is rho_t k3, whose gradient at samples of pi_old is that of
KL(pi | pi_ref), unlike k3's own.

Keeping the sampling mask is in the batch: under top-p, pi_old chose among the tokens that truncation left, so pi and
pi_ref are renormalised over the same tokens. Otherwise the ratio would compare policies on different sets of actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.rl.algorithms.base import LOG_RATIO_LIMIT, exp
from bessemer.rl.algorithms.base import Loss as TokenLoss
from bessemer.rl.algorithms.grpo import grpo
from bessemer.train.loss import Kept, predicting, token_logprobs
from bessemer.train.objective import Loss

FAR = math.log(2.0)
"""A token whose two probabilities differ by more than this ratio counts in `sampler_far`."""


@dataclass(frozen=True)
class GRPO:
    """The objective with its settings; the trainer calls `GRPO(...)(model, batch)`.

    Batch extras, aligned with the tokens they belong to: `advantage_BT`, `old_logp_BT` and, if `kl` > 0, `ref_logp_BT`.
    If the sampler is not pi_old: `sampler_logp_BT`, and `importance_BT` from `importance` as another factor of the
    first term. `choice_BTLK`: the sampler's experts, replayed (`importance`). `kept_id_BM` and `kept_at_BM`: the ids of
    the tokens that the sampler chose among, and the row position each is for; position 0 is padding.
    """

    loss: TokenLoss = grpo
    """The first term of the objective, per token (`algorithms`)."""
    kl: float = 0.001
    temperature: float = 1.0
    constant: int = 0
    """0: the trainer divides by the sum of the weights. L > 0: by L per output, whatever its length (Dr. GRPO)."""
    unbiased_kl: bool = False
    mtp_lambda: float = 0.0
    """Weight of the MTP modules' loss on the sampled tokens; 0: they do not run."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=self.with_mtp(), **batch.routed)
        return self.of(out, model.head_weight, batch)

    def with_mtp(self) -> bool:
        return self.mtp_lambda > 0

    def balance_alpha(self) -> float:
        return 0.0

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        kl = ("kl",) if self.kl > 0 else ()
        mtp = [f"mtp_{k}" for k in range(1, depths + 1)] if self.with_mtp() else []
        return (*kl, "entropy", "clip_share", "ratio", "logp_gap", "sampler_kl", "sampler_far", *mtp), ("logp_gap_max",)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Loss:
        """The loss, given outputs that were computed elsewhere (`Divided`)."""
        # Only trained positions go through the head: prompts and padding cost nothing there.
        at_N, own_N = batch.trained_here()
        hidden_ND, target, kept = out.hidden_BTD.flatten(0, 1)[at_N], batch.tokens_BT.flatten()[own_N], kept_of(batch)
        computed = token_logprobs(hidden_ND, weight_VD, target, self.temperature, entropy=True, kept=kept)
        assert computed.entropy is not None
        logp, entropy, target_N = batch.of_all(computed.logp), batch.of_all(computed.entropy), batch.target_N

        def extra(name: str) -> Tensor:
            return batch.extras[name].flatten()[target_N]

        old, advantage = extra("old_logp_BT"), extra("advantage_BT")
        terms = self.loss(logp, old, advantage, batch.sample_N)
        weight = batch.loss_BT.flatten()[target_N]
        value = terms.value * extra("importance_BT") if "importance_BT" in batch.extras else terms.value
        sampler = extra("sampler_logp_BT") if "sampler_logp_BT" in batch.extras else old
        metrics = {}
        if self.kl > 0:
            kl = k3(logp, extra("ref_logp_BT"))
            if self.unbiased_kl:
                kl = exp(logp - old) * kl
            value, metrics["kl"] = value - self.kl * kl, (weight * kl).sum()
        gap = (logp - sampler).detach().abs()
        metrics |= {
            "entropy": (weight * entropy).sum(),
            "clip_share": (weight * terms.clipped).sum(),
            "ratio": (weight * terms.ratio).sum(),
            # in the first update after a rollout these are the gap between sampler and trainer
            "logp_gap": (weight * gap).sum(),
            "sampler_kl": (weight * k3(sampler, logp)).sum(),
            "sampler_far": (weight * (gap > FAR)).sum(),
        }
        peaks = {"logp_gap_max": torch.cat((gap, gap.new_zeros(1))).max()}  # a micro-batch may train on no token
        # With context parallelism every process has the loss of the whole rows, and counts its share of it.
        share, total = batch.share, -(weight * value).sum()
        means = {name: share * value.detach() for name, value in metrics.items()}
        total, tokens = total - (1.0 - share) * total.detach(), share * weight.sum()
        for k, hidden_BTD in enumerate(out.mtp_hidden, start=1):
            depth = predicting(hidden_BTD, weight_VD.detach(), batch, 1 + k)
            means[f"mtp_{k}"] = depth.detach()
            total = total + self.mtp_lambda / len(out.mtp_hidden) * depth
        divisor = weight.new_tensor(share * self.constant * batch.counted[0]) if self.constant else tokens
        return Loss(total, divisor, means, peaks, weight=tokens if self.constant else None)


def k3(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """The k3 estimator of KL(pi | pi_ref): pi_ref/pi - log(pi_ref/pi) - 1, never negative."""
    gap = (ref_logp_N - logp_N).clamp(max=LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1.0


def logprobs_of(out: TrainOutputs, weight_VD: Tensor, batch: Batch, *, temperature: float) -> Tensor:
    """log pi of every trained token, [B, T], 0 elsewhere, from the network's outputs."""
    (at_N, own_N), logp_BT = batch.trained_here(), torch.zeros_like(batch.loss_BT)
    hidden_ND, target = out.hidden_BTD.flatten(0, 1)[at_N], batch.tokens_BT.flatten()[own_N]
    logp = token_logprobs(hidden_ND, weight_VD, target, temperature, kept=kept_of(batch)).logp
    logp_BT.view(-1)[batch.target_N] = batch.of_all(logp)
    return logp_BT


def kept_of(batch: Batch) -> Kept | None:
    """The tokens that each trained token was drawn from; None: the whole vocabulary."""
    if "kept_id_BM" not in batch.extras:
        return None
    id_BM, at_BM = batch.extras["kept_id_BM"], batch.extras["kept_at_BM"].long()
    own_N = batch.trained_here()[1]
    row_BT = torch.full(batch.tokens_BT.shape, -1, dtype=torch.int64, device=own_N.device)
    row_BT.view(-1)[own_N] = torch.arange(len(own_N), device=own_N.device)
    return Kept(id_BM.long().flatten(), row_BT.gather(1, at_BM).flatten())
