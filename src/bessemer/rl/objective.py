"""The GRPO objective (DeepSeekMath 4.1, R1 2.2.1), per token:

    J = sum_t w_t { min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) - beta (pi_ref/pi - log(pi_ref/pi) - 1) }

rho_t = pi(o_t) / pi_old(o_t); `surrogates` holds this first term and its relatives. The weights w live in the batch:
1/|o| per output makes the paper's mean over outputs of means over tokens ("sequence"), 1 per token the mean over all
tokens of the step ("token"); the trainer divides by their sum, or by a constant per output ("constant", Dr. GRPO).
The KL term is the k3 estimator, inside the loss and not in the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bessemer.data.batch import Batch
from bessemer.model.transformer import TrainOutputs
from bessemer.rl import replay
from bessemer.rl.surrogates import SURROGATES, k3
from bessemer.train.loss import token_logprobs
from bessemer.train.objective import Loss


@dataclass(frozen=True)
class GRPO:
    """The objective with its dials; `GRPO(...)(model, batch)` is what the trainer calls.

    Batch extras, aligned with the tokens they belong to: `advantage_BT`, `old_logp_BT` and, if `kl` > 0, `ref_logp_BT`.
    Where the sampler is not pi_old: `sampler_logp_BT`, and `importance_BT` from `correction` as a further factor of the
    first term. `choice_BTLK`: the sampler's experts, replayed (`replay`).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.001
    temperature: float = 1.0
    surrogate: str = "grpo"
    """One of `surrogates.SURROGATES`."""
    constant: int = 0
    """0: the trainer divides by the sum of the weights. L > 0: by L per output whatever its length (Dr. GRPO)."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments_BT, mtp=False, **replay.arguments(batch))
        return self.of(out, model.head_weight, batch)

    def with_mtp(self) -> bool:
        return False

    def balance_alpha(self) -> float:
        return 0.0

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("kl", "entropy", "clip_share", "ratio", "logp_gap", "sampler_kl"), ("logp_gap_max",)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Loss:
        """For who computed the outputs otherwise (`Divided`)."""
        tokens_BT, weight_BT = batch.tokens_BT[:, 1:], batch.loss_BT[:, 1:]
        # Only the positions that are trained on go through the head: prompts and padding cost nothing there.
        keep = weight_BT.flatten().nonzero().squeeze(1)
        hidden_ND = out.hidden_BTD[:, :-1].flatten(0, 1)[keep]
        logp, entropy = token_logprobs(hidden_ND, weight_VD, tokens_BT.flatten()[keep], self.temperature, entropy=True)

        def extra(name: str) -> Tensor:
            return batch.extras[name][:, 1:].flatten()[keep]

        old, advantage, output = extra("old_logp_BT"), extra("advantage_BT"), keep // weight_BT.shape[1]
        terms = SURROGATES[self.surrogate](logp, old, advantage, output, self.clip_low, self.clip_high)
        kl = k3(logp, extra("ref_logp_BT")) if self.kl > 0 else torch.zeros_like(logp)
        weight = weight_BT.flatten()[keep]
        value = terms.value * extra("importance_BT") if "importance_BT" in batch.extras else terms.value
        total = -(weight * (value - self.kl * kl)).sum()
        sampler = extra("sampler_logp_BT") if "sampler_logp_BT" in batch.extras else old
        gap = (logp - sampler).detach().abs()
        metrics = {
            "kl": (weight * kl).sum(),
            "entropy": (weight * entropy).sum(),
            "clip_share": (weight * terms.clipped).sum(),
            "ratio": (weight * terms.ratio).sum(),
            # of the first update after a rollout these are the gap between sampler and trainer
            "logp_gap": (weight * gap).sum(),
            "sampler_kl": (weight * k3(sampler, logp)).sum(),
        }
        peaks = {"logp_gap_max": torch.cat((gap, gap.new_zeros(1))).max()}  # a micro-batch may train on no token
        divisor = weight.new_tensor(float(self.constant * batch.counted[0])) if self.constant else weight.sum()
        return Loss(total, divisor, {name: value.detach() for name, value in metrics.items()}, peaks)


@torch.no_grad()
def policy_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """log pi of every trained token, [B, T], 0 elsewhere."""
    weight = batch.loss_BT[:, 1:].flatten()
    keep = weight.nonzero().squeeze(1)
    out = model.train_outputs(batch.tokens_BT, batch.segments_BT, mtp=False, **replay.arguments(batch))
    hidden = out.hidden_BTD[:, :-1].flatten(0, 1)[keep]
    logp = token_logprobs(hidden, model.head_weight, batch.tokens_BT[:, 1:].flatten()[keep], temperature).logp
    flat = torch.zeros_like(weight)
    flat[keep] = logp
    return torch.nn.functional.pad(flat.view(batch.tokens_BT.shape[0], -1), (1, 0))


def reference_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """log pi_ref of every trained token, [B, T], 0 elsewhere. The reference chooses its experts itself."""
    return policy_logprobs(model, replay.without(batch), temperature)
