"""The GRPO objective (DeepSeekMath 4.1, R1 2.2.1), per token, its variants, and its reference policy:

    J = sum_t w_t { min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) - beta (pi_ref/pi - log(pi_ref/pi) - 1) }

rho_t = pi(o_t) / pi_old(o_t). The weights w are in the batch: 1/|o| gives the paper's mean over outputs of means over
tokens ("sequence"), 1 the mean over all tokens of the step ("token"). The trainer divides by their sum, or by a
constant per output ("constant", Dr. GRPO). The KL term is the k3 estimator, in the loss and not in the reward. The
first term is one of these surrogates:

    grpo        min(rho A, clip(rho, 1 - low, 1 + high) A)              PPO's clip
    gspo        the same with s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|)   one ratio per output (GSPO eq. 5-7)
    cispo       sg(clip(rho, 1 - low, 1 + high)) A log pi(o_t)          clips the weight; every token keeps its gradient
    reinforce   A log pi(o_t)                                           no ratio: for one update per rollout

Dr. GRPO and DAPO are `grpo` with other settings: Dr. GRPO divides by a constant instead of the length and does not
scale advantages; DAPO weights every token equally, clips higher above 1 than below, resamples dead groups and penalises
overlong outputs.

Two options are from DeepSeek-V3.2 (3.1). `unbiased_kl`: the KL term is rho_t k3, whose gradient at samples of pi_old is
that of KL(pi | pi_ref), unlike k3's own. `off_policy_mask` delta: an output loses its first term if its advantage is
negative and its mean of log(pi_sampler / pi) over tokens exceeds delta. Pushing down what the policy has already left
only does harm.

A third option, keeping the sampling mask, is in the batch: under top-p, pi_old chose among the tokens that truncation
left, so pi and pi_ref are renormalised over the same tokens. Otherwise the ratio would compare policies on different
sets of actions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.train import setup
from bessemer.train.loss import Kept, predicting, token_logprobs
from bessemer.train.objective import Loss
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped here to keep ratio and divergence finite; more only says that the policies parted."""
REFERENCE = "reference/"
"""Prefix of the reference policy in the trainer's checkpoint."""


class Surrogate(NamedTuple):
    """Per token."""

    value: Tensor
    """The summand of the objective; its gradient is the update."""
    clipped: Tensor
    """1 where the clip binds: no gradient (grpo, gspo) or a cut weight (cispo)."""
    ratio: Tensor
    """rho, or s for gspo."""


@dataclass(frozen=True)
class GRPO:
    """The objective with its settings; the trainer calls `GRPO(...)(model, batch)`.

    Batch extras, aligned with the tokens they belong to: `advantage_BT`, `old_logp_BT` and, if `kl` > 0, `ref_logp_BT`.
    If the sampler is not pi_old: `sampler_logp_BT`, and `importance_BT` from `importance` as another factor of the
    first term. `choice_BTLK`: the sampler's experts, replayed (`importance`). `kept_id_BM` and `kept_at_BM`: the ids of
    the tokens that the sampler chose among, and the row position each is for; position 0 is padding.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.001
    temperature: float = 1.0
    surrogate: str = "grpo"
    """One of `SURROGATES`."""
    constant: int = 0
    """0: the trainer divides by the sum of the weights. L > 0: by L per output, whatever its length (Dr. GRPO)."""
    unbiased_kl: bool = False
    off_policy_mask: float = 0.0
    """delta; 0: no output is masked."""
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
        masked = ("off_policy_masked",) if self.off_policy_mask else ()
        kl = ("kl",) if self.kl > 0 else ()
        mtp = [f"mtp_{k}" for k in range(1, depths + 1)] if self.with_mtp() else []
        return (*kl, "entropy", "clip_share", "ratio", "logp_gap", "sampler_kl", *masked, *mtp), ("logp_gap_max",)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Loss:
        """The loss, given outputs that were computed elsewhere (`Divided`)."""
        tokens_BT, weight_BT = batch.tokens_BT[:, 1:], batch.loss_BT[:, 1:]
        # Only trained positions go through the head: prompts and padding cost nothing there.
        keep = batch.trained_N
        hidden_ND = out.hidden_BTD[:, :-1].flatten(0, 1)[keep]
        logp, entropy = token_logprobs(
            hidden_ND, weight_VD, tokens_BT.flatten()[keep], self.temperature, entropy=True, kept=kept_of(batch)
        )

        def extra(name: str) -> Tensor:
            return batch.extras[name][:, 1:].flatten()[keep]

        old, advantage, output = extra("old_logp_BT"), extra("advantage_BT"), keep // weight_BT.shape[1]
        terms = SURROGATES[self.surrogate](logp, old, advantage, output, self.clip_low, self.clip_high)
        assert entropy is not None
        weight = weight_BT.flatten()[keep]
        value = terms.value * extra("importance_BT") if "importance_BT" in batch.extras else terms.value
        sampler = extra("sampler_logp_BT") if "sampler_logp_BT" in batch.extras else old
        masked = torch.zeros_like(logp)
        if self.off_policy_mask:
            masked = self._off_policy(sampler - logp.detach(), advantage, output, weight_BT.shape[0])
            value = value * (1.0 - masked)
        metrics = {}
        if self.kl > 0:
            kl = k3(logp, extra("ref_logp_BT"))
            if self.unbiased_kl:
                kl = _exp(logp - old) * kl
            value, metrics["kl"] = value - self.kl * kl, (weight * kl).sum()
        gap = (logp - sampler).detach().abs()
        metrics |= {
            "entropy": (weight * entropy).sum(),
            "clip_share": (weight * terms.clipped).sum(),
            "ratio": (weight * terms.ratio).sum(),
            # in the first update after a rollout these are the gap between sampler and trainer
            "logp_gap": (weight * gap).sum(),
            "sampler_kl": (weight * k3(sampler, logp)).sum(),
        }
        if self.off_policy_mask:
            metrics["off_policy_masked"] = (weight * masked).sum()
        peaks = {"logp_gap_max": torch.cat((gap, gap.new_zeros(1))).max()}  # a micro-batch may train on no token
        means = {name: value.detach() for name, value in metrics.items()}
        total, tokens = -(weight * value).sum(), weight.sum()
        for k, hidden_BTD in enumerate(out.mtp_hidden, start=1):
            depth = predicting(hidden_BTD, weight_VD.detach(), batch, 1 + k)
            means[f"mtp_{k}"] = depth.detach()
            total = total + self.mtp_lambda / len(out.mtp_hidden) * depth
        divisor = weight.new_tensor(float(self.constant * batch.counted[0])) if self.constant else tokens
        return Loss(total, divisor, means, peaks, weight=tokens if self.constant else None)

    def _off_policy(self, left_N: Tensor, advantage_N: Tensor, output_N: Tensor, outputs: int) -> Tensor:
        """1 for the tokens that are masked. `left_N`: log(pi_sampler / pi)."""
        zeros_B = left_N.new_zeros(outputs)
        count_B = zeros_B.index_add(0, output_N, torch.ones_like(left_N)).clamp(min=1)
        mean_B = zeros_B.index_add(0, output_N, left_N) / count_B
        return ((advantage_N < 0) & (mean_B[output_N] > self.off_policy_mask)).to(left_N.dtype)


# The surrogates: one number per token, N tokens; `output_N` is the index of each token's output.


def grpo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    return _pessimistic(_exp(logp_N - old_logp_N), advantage_N, low, high)


def gspo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    """With weights 1/|o| per token this is the paper's mean over outputs. Its clips are small: 3e-4, 4e-4."""
    # One slot per token, the last ones unused: counting the outputs would make the CPU wait for the GPU.
    sorted_N, order_N = output_N.sort(stable=True)
    new_N = torch.zeros_like(output_N)
    new_N[1:] = sorted_N[1:] != sorted_N[:-1]
    index_N = torch.empty_like(output_N).scatter_(0, order_N, new_N.cumsum(0))
    total = torch.zeros_like(logp_N).index_add(0, index_N, logp_N - old_logp_N)
    length = torch.zeros_like(logp_N).index_add(0, index_N, torch.ones_like(logp_N)).clamp(min=1)
    return _pessimistic(_exp(total / length)[index_N], advantage_N, low, high)


def cispo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    ratio = _exp(logp_N - old_logp_N)
    weight = ratio.detach().clamp(1.0 - low, 1.0 + high)
    return Surrogate(weight * advantage_N * logp_N, (weight != ratio.detach()).float(), ratio)


def reinforce(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    return Surrogate(advantage_N * logp_N, torch.zeros_like(advantage_N), _exp(logp_N - old_logp_N))


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Surrogate]] = {
    "grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
}


def k3(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """The k3 estimator of KL(pi | pi_ref): pi_ref/pi - log(pi_ref/pi) - 1, never negative."""
    gap = (ref_logp_N - logp_N).clamp(max=LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1.0


def _pessimistic(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Surrogate:
    """PPO's min: moves that went too far are cut, moves back are not."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    clipped = (ratio * advantage > bounded * advantage).float()
    return Surrogate(torch.minimum(ratio * advantage, bounded * advantage), clipped, ratio)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


@torch.no_grad()
def policy_logprobs(model: LanguageModel, batch: Batch, temperature: float) -> Tensor:
    """log pi of every trained token, [B, T], 0 elsewhere."""
    weight = batch.loss_BT[:, 1:].flatten()
    keep = batch.trained_N
    out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=False, **batch.routed)
    hidden = out.hidden_BTD[:, :-1].flatten(0, 1)[keep]
    target = batch.tokens_BT[:, 1:].flatten()[keep]
    logp = token_logprobs(hidden, model.head_weight, target, temperature, kept=kept_of(batch)).logp
    flat = torch.zeros_like(weight)
    flat[keep] = logp
    return torch.nn.functional.pad(flat.view(batch.tokens_BT.shape[0], -1), (1, 0))


def reference_logprobs(model: LanguageModel, batch: Batch, temperature: float) -> Tensor:
    """log pi_ref of every trained token, [B, T], 0 elsewhere. The reference chooses its experts itself."""
    extras = {name: tensor for name, tensor in batch.extras.items() if name != "choice_BTLK"}
    return policy_logprobs(model, replace(batch, extras=extras), temperature)


def kept_of(batch: Batch) -> Kept | None:
    """The tokens that each trained token was drawn from; None: the whole vocabulary."""
    if "kept_id_BM" not in batch.extras:
        return None
    id_BM, at_BM = batch.extras["kept_id_BM"], batch.extras["kept_at_BM"].long()
    B, T = batch.tokens_BT.shape
    keep = batch.trained_N
    row_BT = torch.full((B, T), -1, dtype=torch.int64, device=keep.device)
    place_N = keep + keep // (T - 1) + 1  # [B, T - 1] -> [B, T]
    row_BT.view(-1)[place_N] = torch.arange(len(keep), device=keep.device)
    return Kept(id_BM.long().flatten(), row_BT.gather(1, at_BM).flatten())


class Reference:
    """The reference policy: a frozen copy of the policy, refreshed every `every` optimizer steps (R1-Nature B).

    It is saved in the trainer's checkpoint (`extra_tensors`), so a resumed run has the same reference. With LoRA it
    shares the base weights with the policy and has its own adapters, which start at B = 0: the base.
    """

    def __init__(self, trainer: Trainer, policy: Whole, workers: Workers, every: int, temperature: float) -> None:
        self.trainer, self.policy, self.workers = trainer, policy, workers
        self.every, self.temperature = every, temperature
        policy.refresh()
        self.frozen = policy.model.frozen()
        shared = {id(parameter): parameter for parameter in self.frozen.values()}
        self.model = copy.deepcopy(policy.model, dict(shared))
        self.model.eval().requires_grad_(False)
        own = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if id(tensor) not in shared]
        workers.share(own)
        self.restore()

    def add_logprobs(self, batches: list[Batch]) -> None:
        """Adds ref_logp_BT to every batch."""
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            batch.extras["ref_logp_BT"] = logp_BT

    def after_step(self) -> None:
        """Copies the policy if it is time."""
        if self.trainer.step % self.every == 0:
            self.policy.refresh()
            self._copy(self._state(self.policy.model))
            self._store()

    def restore(self) -> None:
        """Restores the reference from the trainer's checkpoint; at the very start, copies the base."""
        stored = {
            name.removeprefix(REFERENCE): value
            for name, value in self.trainer.extra_tensors.items()
            if name.startswith(REFERENCE)
        }
        self.policy.refresh()
        self._copy(stored or self._state(self.policy.model))
        self._store()

    def _state(self, model: LanguageModel) -> dict[str, Tensor]:
        """What distinguishes the reference from the policy."""
        return {name: value for name, value in model.state_dict().items() if name not in self.frozen}

    def _copy(self, state: dict[str, Tensor]) -> None:
        missing, unknown = self.model.load_state_dict(state, strict=not self.frozen)
        assert not unknown and self.frozen.keys() >= {*missing}, (missing, unknown)

    def _store(self) -> None:
        others = {k: v for k, v in self.trainer.extra_tensors.items() if not k.startswith(REFERENCE)}
        own = {REFERENCE + name: value.clone() for name, value in self._state(self.model).items()}
        self.trainer.extra_tensors = others | own

    def _logprobs(self, batch: Batch) -> Tensor:
        return reference_logprobs(self.model, batch.to(setup.device()), self.temperature)
