"""Rules for faults of the set-up, which show in any trainer's log: a rate of 0, a reference that moves along, a
divergence with the wrong sign, numbers that are not finite, steps far too large, and a reward without contrast.

Logs of other trainers often have no accuracy, only a reward of unknown scale. The last three rules are for those: they
measure the reward in its standard deviation over samples, and speak of the reward.
"""

from __future__ import annotations

from statistics import fmean, median

from .history import LEARNT, WINDOW, Alarm, MetricHistory

SAME_KL = 1e-6
"""Frozen reference: no window of KL above this many nats per token while the policy is trained. A policy moved by a
rate of 1e-6 is at 1e-4 after ten steps."""
SIGN_KL, SIGN_SHARE, SIGN_WEIGHT = 0.5, 0.9, (0.005, 1.0)
"""Wrong sign: KL, nats per token, from which its part of the loss stands out from the policy's, which is about 0; the
share of the last LEARNT losses that are negative; and what the weight may be that explains them."""
NEGATIVE_KL = -0.005
"""Negative KL: a mean below this, with all values of the window below 0. Its expectation is never negative."""
BROKEN = 3
"""Not finite: this many values in a row. One is a skipped step, as float16 has at its start."""
CLIPPED = 0.3
"""Steps too large: share of tokens whose ratio is clipped. GSPO clips .15 of its sequences, others up to .1."""
NORM, NORM_TIMES = 100.0, 10.0
"""Steps too large: median gradient norm above both this and this multiple of its start."""
NO_CONTRAST = 0.8
"""Share of groups whose samples all have the same reward (`alarms.DEAD`)."""
REWARD_RISE, REWARD_FALL = 0.1, 1.0
"""Reward without accuracy: a rise, and a fall, in standard deviations of the reward over samples. A rise of accuracy
from .10 to .12 is .07 of one, a fall from .5 to .05 is .9."""
SHORTER = 0.6
"""Length below this share of its longest window (`alarms.SHORTER`)."""


def rate_zero(history: MetricHistory) -> Alarm | None:
    if not history.has("lr") or history["lr"].peak > 0:
        return None
    return Alarm(
        "learning-rate-zero",
        f"the learning rate was 0 in all {history['lr'].count} records",
        "the schedule never leaves 0, or its number of steps is wrong",
        "set lr, and look at its warm-up and at the number of steps it is planned for",
    )


def frozen_reference(history: MetricHistory) -> Alarm | None:
    if not history.has("kl", "grad_norm", values=LEARNT):
        return None
    if history["kl"].peak > SAME_KL or history["grad_norm"].now <= 0 or min(history["kl"].recent) < -SAME_KL:
        return None
    if history.has("lr") and history["lr"].peak <= 0:
        return None
    return Alarm(
        "frozen-reference",
        f"KL stays at {history['kl'].now:.1g} nats per token while gradients are {history['grad_norm'].now:.2g}",
        "the policy is compared with itself: the reference is the same object, or is updated after every step",
        "compare the reference's weights with those of the first checkpoint, and look at how often it is updated",
    )


def negative_weight(history: MetricHistory) -> Alarm | None:
    if not history.has("kl_weight", values=1) or history["kl_weight"].now >= 0:
        return None
    return Alarm(
        "wrong-kl-sign",
        f"the weight of KL is {history['kl_weight'].now:.2g}",
        "the loss pays for distance from the reference",
        "look at the sign of the weight, and at which of policy and reference is subtracted from which",
    )


def loss_falls_with_kl(history: MetricHistory) -> Alarm | None:
    pairs = history.kl_and_loss
    if len(pairs) < LEARNT or sum(loss < 0 for _, loss in pairs) < SIGN_SHARE * LEARNT:
        return None
    kl, loss = fmean(kl for kl, _ in pairs), fmean(loss for _, loss in pairs)
    if kl < SIGN_KL or loss >= history["loss"].start or not SIGN_WEIGHT[0] <= -loss / kl <= SIGN_WEIGHT[1]:
        return None
    return Alarm(
        "wrong-kl-sign",
        f"the loss is {loss:.2g} where KL is {kl:.2g} nats per token, as with a weight of {loss / kl:.2g}",
        "the loss pays for distance from the reference",
        "look at the sign of the weight, and at which of policy and reference is subtracted from which",
    )


def negative_kl(history: MetricHistory) -> Alarm | None:
    if not history.has("kl") or max(history["kl"].recent) >= 0 or history["kl"].now >= NEGATIVE_KL:
        return None
    return Alarm(
        "negative-kl",
        f"KL is negative, {history['kl'].now:.2g} nats per token",
        "reference and policy are exchanged, or the samples are not the policy's (another temperature, old weights)",
        "look at which of policy and reference is subtracted from which, and at the sampler's temperature",
    )


def not_finite(history: MetricHistory) -> Alarm | None:
    names = [name for name, count in history.broken.items() if count >= BROKEN]
    if not names:
        return None
    return Alarm(
        "not-finite",
        f"not a finite number in the last {max(history.broken.values())} records: {', '.join(names)}",
        "an overflow, a division by a count of 0, or a step after which the weights were not finite",
        "find the first such step, and continue from a checkpoint before it with a lower lr or another precision",
    )


def steps_too_large(history: MetricHistory) -> Alarm | None:
    if history.has("clip_share") and history["clip_share"].now >= CLIPPED:
        return Alarm(
            "steps-too-large",
            f"{history['clip_share'].now:.0%} of the tokens are clipped",
            "the policy has left the one that sampled: a learning rate too high, or too many updates on one rollout",
            "lower lr, or take fewer updates_per_rollout",
        )
    if not history.has("grad_norm"):
        return None
    norm = median(history["grad_norm"].recent)
    if norm < NORM or norm < NORM_TIMES * history["grad_norm"].start:
        return None
    return Alarm(
        "steps-too-large",
        f"the gradient's norm went from {history['grad_norm'].start:.2g} to {norm:.2g}",
        "a learning rate too high, or a term of the loss without a bound",
        "lower lr, or clip the gradient",
    )


def sampler_divergence(history: MetricHistory) -> Alarm | None:
    if history.has("sampler_gap") or not history.has("sampler_kl") or history["sampler_kl"].now < 0.1:
        return None
    return Alarm(
        "sampler-mismatch",
        f"trainer and sampler are {history['sampler_kl'].now:.2g} nats of KL per token apart",
        "the sampler's model is not the trainer's: stale weights, another precision, routing that differs, or "
        "another temperature",
        "sample with the trainer's precision and weights, replay the sampler's routing, or correct with truncated "
        "importance weights",
    )


def no_contrast(history: MetricHistory) -> Alarm | None:
    share = _alike(history)
    if share is None or share < NO_CONTRAST:
        return None
    return Alarm(
        "no-contrast",
        f"in {share:.0%} of the groups all samples have the same reward",
        "the problems are too hard, or too easy, or the reward does not depend on the answer",
        "look at the rewards of one group; choose problems that are solved now and then",
    )


def _alike(history: MetricHistory) -> float | None:
    """The share of groups without contrast, where accuracy is unknown; `_dead_groups` judges it where it is known."""
    if history.has("accuracy", values=1):
        return None
    if history.has("dead_groups"):
        return history["dead_groups"].now
    return float(max(history["reward_std"].recent) < 1e-8) if history.has("reward_std") else None


def _rewards(history: MetricHistory, values: int) -> float | None:
    """The reward's standard deviation, where accuracy is unknown and both are measured."""
    if history.has("accuracy", values=1) or not history.has("reward", "reward_std", values=values):
        return None
    return history["reward_std"].peak or None


def reward_length_collapse(history: MetricHistory) -> Alarm | None:
    scale = _rewards(history, LEARNT)
    if scale is None or not history.has("length", values=LEARNT):
        return None
    length, reward = history["length"], history["reward"]
    if length.now >= SHORTER * length.peak or reward.rise >= REWARD_RISE * scale:
        return None
    return Alarm(
        "length-collapse",
        f"answers shrank from {length.peak:.0f} to {length.now:.0f} tokens and the reward did not rise "
        f"({reward.start:.3g} to {reward.now:.3g})",
        "thinking is not worth it: it goes wrong too often, or the normalisation favours short answers",
        'pre-train longer on worked problems, lower the weight of the term format, or use normalise = "token"',
    )


def reward_collapse(history: MetricHistory) -> Alarm | None:
    scale = _rewards(history, 2 * WINDOW)
    if scale is None or history["reward"].peak - history["reward"].now < REWARD_FALL * scale:
        return None
    return Alarm(
        "collapse",
        f"the reward fell from {history['reward'].peak:.3g} to {history['reward'].now:.3g}, and its standard deviation "
        f"over samples was {scale:.2g}",
        "steps too large (a learning rate too high for so few samples, too many updates on one rollout), or a reward "
        "for something other than right answers",
        "continue from an earlier checkpoint with a lower lr, fewer updates_per_rollout or more prompts_per_rollout",
    )
