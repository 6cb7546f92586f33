"""What each trainer calls the metrics that the rules read, with units and conventions: one table.

A pattern is a metric's name in a log; `*` stands for any part of it, `|` separates ways to say the same. The first
pattern of a row that occurs in a run is used. A row says what else is true of it:

- `not`: the values are 1 minus what the rule reads (a share of groups *with* contrast).
- `share`: values outside [0, 1], or that vary more than values inside can, are no share: the metric is not used.
- `with NAME`: only in records that also have NAME; verl 0.7 writes a KL of 0 where none is computed.
- `moves`: only from the first value that is not 0; OpenRLHF writes a KL of 0 where there is no reference.

A reward is not an accuracy. `accuracy` is read only where a name says that answers are judged right or wrong, and the
values are shares; otherwise the rules that need it are listed as not judged, or judge the reward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MEANING = {
    "accuracy": "share of right answers",
    "format": "share of well-formed answers",
    "reward": "mean reward, as the trainer sums it",
    "reward_std": "standard deviation of the reward over samples",
    "dead_groups": "share of groups whose samples all have the same reward",
    "length": "tokens of an answer",
    "truncated": "share of answers cut at the cap",
    "entropy": "nats per token",
    "kl": "KL from the reference, nats per token",
    "kl_weight": "weight of that KL in the loss",
    "loss": "the optimizer's loss",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
    "clip_share": "share of tokens whose ratio is clipped",
    "sampler_gap": "mean |difference| of log-probabilities, trainer and sampler, nats per token",
    "sampler_kl": "KL between sampler and trainer, nats per token",
    "sampler_far": "share of tokens whose probability differs by more than a factor of 2",
    "staleness": "steps between sampling and updating",
    "heldout_accuracy": "share of right answers to held-out problems",
    "tries": "tries of an answer",
    "turns": "turns of an answer",
    "think_share": "share of answers that think",
    "language": "share of words in the problem's language",
    "preference": "score of a reward model",
}


@dataclass(frozen=True)
class TrainerNames:
    """`marks`: patterns that only this trainer writes. `settings`: what it calls the settings that advice names."""

    title: str
    seen: str
    """The versions whose form was read."""
    marks: tuple[str, ...]
    names: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    """Metrics that look like one of the rules' and are not, with the reason."""


OWN = (
    "accuracy", "format", "reward", "dead_groups", "length", "truncated", "entropy", "kl", "grad_norm", "lr",
    "clip_share", "sampler_gap", "sampler_kl", "sampler_far", "staleness", "heldout_accuracy", "tries", "turns",
    "think_share", "language", "preference",
)  # fmt: skip

TRAINERS = {
    "bessemer": TrainerNames(
        title="Bessemer",
        seen="metrics.jsonl of this version",
        marks=("rl/dead_groups", "rl/think_share", "rl/truncated"),
        names={name: f"rl/{name}" for name in OWN},
    ),
    "trl": TrainerNames(
        title="TRL (GRPOTrainer)",
        seen="source of 0.14 to 1.16, files of 1.16",
        marks=("completions/mean_length", "completion_length", "frac_reward_zero_std", "rewards/*/mean", "reward_std"),
        names={
            "reward": "reward",  # the weighted sum of all reward functions
            "reward_std": "reward_std",  # until 0.23 the mean over groups, then over the batch
            "accuracy": "rewards/*accuracy*/mean|rewards/*correct*/mean|rewards/*accuracy*|rewards/*correct*; share",
            "format": "rewards/*format*/mean|rewards/*format*; share",
            "dead_groups": "frac_reward_zero_std",  # from 0.18
            "length": "completions/mean_length|completion_length",  # the second until 0.16
            "truncated": "completions/clipped_ratio",  # from 0.17; no end token within max_completion_length
            "entropy": "entropy",  # from 0.21
            "kl": "kl",  # k3; written only if beta is not 0
            "kl_weight": "beta",
            "loss": "loss",
            "grad_norm": "grad_norm",
            "lr": "learning_rate",
            "clip_share": "clip_ratio/region_mean|clip_ratio",  # the second until 0.16
            "sampler_gap": "sampling/sampling_logp_difference/mean",  # from 0.22, with vLLM
        },
        settings={
            "lr": "learning_rate",
            "cap": "max_completion_length",
            "clip_high": "epsilon_high",
            "kl": "beta",
            "updates": "num_iterations",
            "prompts": "gradient_accumulation_steps",
            "samples": "num_generations",
            "reference": "sync_ref_model, ref_model_sync_steps and ref_model_mixup_alpha",
            "normalise": 'loss_type = "dapo"',
            "clip_norm": "max_grad_norm",
        },
    ),
    "verl": TrainerNames(
        title="verl",
        seen="source of 0.8.0.dev (2026-01)",
        marks=("actor/pg_loss", "critic/score/mean", "critic/rewards/mean", "actor/entropy", "response_length/mean"),
        names={
            "reward": "critic/score/mean|critic/rewards/mean",  # the second has KL in it if use_kl_in_reward
            "heldout_accuracy": "val-core/*/acc/mean@*|val/*/acc; share",
            "length": "response_length/mean",
            "truncated": "response_length/clip_ratio",  # as long as max_response_length
            "entropy": "actor/entropy|actor/entropy_loss",  # the second until 0.3: the same value
            "kl": "actor/kl_loss; with actor/kl_coef|actor/reward_kl_penalty",
            "kl_weight": "actor/kl_coef|actor/reward_kl_penalty_coeff",
            "grad_norm": "actor/grad_norm",
            "lr": "actor/lr",
            "clip_share": "actor/pg_clipfrac",
            "sampler_kl": "rollout_corr/kl",
        },
        settings={
            "lr": "actor_rollout_ref.actor.optim.lr",
            "cap": "data.max_response_length",
            "clip_high": "actor_rollout_ref.actor.clip_ratio_high",
            "kl": "actor_rollout_ref.actor.kl_loss_coef",
            "updates": "actor_rollout_ref.actor.ppo_epochs",
            "prompts": "data.train_batch_size",
            "samples": "actor_rollout_ref.rollout.n",
            "reference": "the worker of the reference policy",
            "normalise": 'actor_rollout_ref.actor.loss_agg_mode = "token-mean"',
            "clip_norm": "actor_rollout_ref.actor.grad_clip",
        },
        known={
            "actor/ppo_kl": "the policy against its state before the updates, not against the reference",
            "actor/pg_loss": "the policy's part alone, without KL, so it says nothing of KL's sign",
            "training/rollout_probs_diff_mean": "a difference of probabilities, not of their logarithms",
        },
    ),
    "prime-rl": TrainerNames(
        title="prime-rl",
        seen="source of 0.8.1.dev (2026-08) and of the console of 0.2",
        marks=(
            "mismatch_kl/all/mean",
            "train/*/reward/mean",
            "optim/grad_norm",
            "console/Reward",
            "console/Mismatch KL",
            "console/Grad. Norm",
        ),
        names={
            "reward": "train/*/effective/*/reward/mean|train/*/reward/mean|reward/mean|console/Reward",
            "dead_groups": "train/*/all/*/solved_some; not|console/Trainable; not",  # binary rewards
            "length": "train/*/num_output_tokens/mean|console/Seq. Length",
            "truncated": "train/*/effective/*/is_truncated/mean|train/*/is_truncated/mean|console/Truncation",
            "entropy": "entropy/all/mean|console/Entropy",
            "kl": "ref_kl/all/mean|ref_kl/mean",
            "loss": "loss/mean|console/Loss",
            "grad_norm": "optim/grad_norm|console/Grad. Norm",
            "lr": "optim/lr|console/LR",
            "sampler_kl": "mismatch_kl/all/mean|console/Mismatch KL",  # staleness included
        },
        settings={
            "lr": "optim.lr",
            "cap": "the sampling limit max_tokens",
            "clip_high": "the loss's upper bound",
            "updates": "the steps off-policy",
            "prompts": "batch_size",
            "samples": "group_size",
            "kl": "the weight of the reference KL",
            "reference": "the reference model",
            "clip_norm": "optim.max_norm",
            "normalise": "the loss's normalisation",
        },
        known={"is_masked/all/mean": "masked for being far off-policy, not clipped"},
    ),
    "openrlhf": TrainerNames(
        title="OpenRLHF",
        seen="source of 0.11.0 (2026-08)",
        marks=("actor_lr", "actor_grad_norm", "response_clip_ratio", "ppo_clip_ratio", "group_reward_std"),
        names={
            "reward": "reward|score",
            "reward_std": "group_reward_std",
            "length": "response_length|gen_len",
            "truncated": "truncated|response_clip_ratio",
            "entropy": "entropy_loss|ent_loss",  # the entropy itself, written if entropy_coef is set
            "kl": "kl; moves",
            "grad_norm": "actor_grad_norm|grad_norm",
            "lr": "actor_lr|act_lr",
            "clip_share": "ppo_clip_ratio",
            "sampler_kl": "vllm_kl",
        },
        settings={
            "lr": "actor.learning_rate",
            "cap": "the rollout's max_new_tokens",
            "clip_high": "actor.eps_clip_high",
            "kl": "algo.kl.init_coef",
            "updates": "train.max_epochs",
            "prompts": "rollout.batch_size",
            "samples": "rollout.n_samples_per_prompt",
            "reference": "the reference model",
            "clip_norm": "max_norm",
            "normalise": "token-level loss",
        },
        known={
            "ppo_kl": "the policy against its state before the updates, not against the reference",
            "policy_loss": "the policy's part alone, without KL, so it says nothing of KL's sign",
        },
    ),
}

PREFIX = "train/"
"""W&B and trackio put this before the names of TRL and OpenRLHF."""


@dataclass(frozen=True)
class Pattern:
    """One way to find a metric."""

    metric: str
    regex: re.Pattern[str]
    rank: int
    inverted: bool = False
    share: bool = False
    beside: str = ""
    moves: bool = False


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(f"(?:{PREFIX})?" + ".*".join(map(re.escape, pattern.split("*"))))


def patterns(trainer: TrainerNames, own: dict[str, str] | None = None) -> list[Pattern]:
    """The patterns of a trainer; `own`: names that the user gave, metric to name, which come first."""
    made = []
    for metric, row in trainer.names.items():
        flags = row.partition(";")[2]
        for rank, way in enumerate(row.split("|")):
            name, _, says = (part.strip() for part in way.partition(";"))
            made.append(Pattern(
                metric, _regex(name), rank + 1, inverted="not" in says.split(), share="share" in flags.split(),
                beside=says.removeprefix("with ") if says.startswith("with ") else "", moves="moves" in says.split(),
            ))  # fmt: skip
    return [Pattern(metric, re.compile(re.escape(name)), 0) for metric, name in (own or {}).items()] + made


def every_name(own: dict[str, str]) -> list[re.Pattern[str]]:
    """All names that some trainer's table mentions."""
    made: dict[str, re.Pattern[str]] = {}
    for trainer in TRAINERS.values():
        listed = patterns(trainer, own)
        beside = [_regex(pattern.beside) for pattern in listed if pattern.beside]
        spreads = [
            re.compile(pattern.regex.pattern.removesuffix("/mean") + "/std")
            for pattern in listed
            if pattern.share and pattern.regex.pattern.endswith("/mean")
        ]
        known = [_regex(name) for name in trainer.known]
        for regex in [pattern.regex for pattern in listed] + beside + spreads + known:
            made[regex.pattern] = regex
    return [*made.values()]


def recognise(names: set[str]) -> str | None:
    """The trainer with the most marks among a run's names; None if none has any."""
    counts = {
        key: sum(any(_regex(mark).fullmatch(name) for name in names) for mark in trainer.marks)
        for key, trainer in TRAINERS.items()
    }
    best = max(counts, key=lambda key: counts[key])
    return best if counts[best] else None


PLAIN = {
    "lr": "the learning rate",
    "cap": "the cap on an answer's tokens",
    "clip_high": "the upper clip",
    "kl": "KL's weight",
    "updates": "the number of updates on one rollout",
    "prompts": "the prompts of a step",
    "samples": "the samples of a group",
    "reference": "how the reference is made and updated",
    "normalise": "the loss's normalisation",
    "clip_norm": "the bound on the gradient's norm",
}
"""The settings in words, where the trainer's own names are not known."""

ADVICE = {
    "learning-rate-zero": "look at {lr}, its warm-up, and the number of steps the schedule is planned for",
    "frozen-reference": "look at {reference}; compare the reference's weights with those of the first checkpoint",
    "wrong-kl-sign": "look at the sign of {kl}, and at which of policy and reference is subtracted from which",
    "negative-kl": "look at which of policy and reference is subtracted from which, and at the sampler's temperature",
    "not-finite": "find the first such step; continue from a checkpoint before it with a lower {lr} or in bfloat16",
    "steps-too-large": "lower {lr}, lower {updates}, and look at {clip_norm}",
    "kl-runaway": "lower {lr}, raise {kl}, and read some answers",
    "collapse": "continue from an earlier checkpoint with a lower {lr}, fewer {updates} or more {prompts}",
    "entropy-explosion": "continue from an earlier checkpoint with a lower {lr}, and read some answers",
    "entropy-collapse": "raise {clip_high}, lower {lr}, or refresh the problems; look at a bonus on entropy, if any",
    "no-contrast": "read the rewards of one group; choose problems that are solved now and then, or raise {samples}",
    "groups-too-hard": "choose easier problems, raise {samples}, or start from a better base",
    "groups-too-easy": "choose harder problems, or stop here",
    "never-ending": "read some answers that were cut: raise {cap} if they still make progress there, or lower {lr}",
    "format-hacking": "lower the weight of the format's reward, choose easier problems, or start from a better base",
    "length-collapse": "look at what in the reward or in the loss pays for short answers ({normalise}), and read some",
    "sampler-mismatch": "compare the precision, weights, temperature and routing of sampler and trainer",
}
"""What to look at in other trainers' runs, by alarm; `{...}` is a key of `TrainerNames.settings`."""
