"""Alarms: what the metrics of a run say is going wrong, the likely cause, and what to do about it.

They read the records that the stage writes to metrics.jsonl, one per rollout and one per held-out evaluation. An
`AlarmTracker` takes the records one by one and raises each alarm once. Its state depends only on the records, so a
resumed run restores it by replaying the old ones.

Rules compare the run's first, latest and best window. A window is the mean of WINDOW values, which halves the noise of
a single rollout. Trends are judged only after LEARNT values, so that what a policy learns first (the format) is not
taken for all it learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from . import faults
from .history import LEARNT, WINDOW, Alarm, MetricHistory, MetricTrack, Values

FORM_RISE, ACCURACY_RISE = 0.08, 0.02
"""Format hacking: well-formed answers rose by the first, accuracy (at most half) by less than the second."""
SHORTER = 0.6
"""Length collapse: length below this share of its longest window. One real collapse went from 57 to 27 tokens."""
THINKS_LESS = 0.5
"""Thinking stops: the share of answers that think is below this fraction of its best window."""
CALLS = 0.1
"""Thinking stops: no alarm if answers gained more turns than this (tool calls) and accuracy rose as well."""
FALLEN = 0.5
"""Collapse: accuracy below this share of its best window, which was at least 0.1."""
ENTROPY_LOW, ENTROPY_SHARE = 0.02, 0.1
"""Entropy collapse: below both this many nats per token and this share of the start. Search traces are nearly
deterministic token by token, so a low value alone means nothing."""
ENTROPY_RISE, ENTROPY_TIMES = 0.5, 2.0
"""Entropy explosion: both this many nats per token above the start and this multiple of the start."""
DEAD = 0.8
"""Dead groups: share of groups whose samples all have the same reward."""
CUT, CUT_FALLING, ACCURACY_FALL = 0.5, 0.25, 0.15
"""Never-ending: half of the answers are truncated, or a quarter while accuracy is this far below its best window. The
tiny recipe keeps learning with a third truncated."""
GAP, STALE_GAP = 0.05, 0.2
"""Sampler mismatch, nats per token; the second applies to samples older than the policy. If both sides run the same
implementation, the gap is 1e-6 in float32 and .004 to .012 in bfloat16."""
FAR, STALE_FAR = 0.01, 0.1
"""Sampler mismatch: share of tokens whose probability differs by more than a factor of 2; the second as above. Rounding
to bfloat16 moves none of a dense network's, and few where experts are chosen again."""
KL = 1.0
"""KL runaway, nats per token, window median since k3 has rare huge values. A drift into private language gave .79."""
PREFERENCE_RISE, TRUE_FALL = 0.05, 0.05
"""Reward-model hacking: the score (about 0 to 1) rose by this much and true accuracy fell by this much."""
GREW = 0.1
"""No growth: length rose by less than this share of its start, and accuracy by less than ACCURACY_RISE."""
ZERO_LONG = {"tries": 2.5, "dead_groups": 0.5, "format": 0.9, "entropy": 0.28}
"""No growth: the first rollouts of recipes/zero-long.toml (seed 7), whose answers grow."""
FEW_TRIES, MANY_DEAD, UNFORMED, CERTAIN = 1.5, 0.6, 0.5, 0.05
"""No growth: first rollouts beyond one of these bounds differ from those of zero-long by more than the noise."""
MIXED, MIXED_FALL = 0.8, 0.05
"""Language mixing: share of words in the problem's language among answers that think, and its fall since the start."""
MIXED_ALWAYS = 0.6
"""Below this share the alarm needs no fall."""


def _format_hacking(history: MetricHistory) -> Alarm | None:
    if not history.has("format", "accuracy", values=LEARNT):
        return None
    form, right = history["format"], history["accuracy"]
    if form.rise < FORM_RISE or right.rise >= ACCURACY_RISE or right.now > 0.5:
        return None
    return Alarm(
        "format-hacking",
        f"well-formed answers went from {form.start:.0%} to {form.now:.0%}, correct ones from {right.start:.1%} to "
        f"{right.now:.1%}",
        "the form is rewarded and the problems are out of reach, so the form is all there is to learn",
        "lower the weight of the term format, choose easier problems, or start from a better base",
    )


def _length_collapse(history: MetricHistory) -> Alarm | None:
    if not history.has("length", "accuracy", values=LEARNT):
        return None
    length, right = history["length"], history["accuracy"]
    if length.now >= SHORTER * length.peak or right.rise >= ACCURACY_RISE:
        return None
    return Alarm(
        "length-collapse",
        f"answers shrank from {length.peak:.0f} to {length.now:.0f} tokens and accuracy did not rise "
        f"({right.start:.1%} to {right.now:.1%})",
        "thinking is not worth it: it goes wrong too often, or the normalisation favours short answers",
        'pre-train longer on worked problems, lower the weight of the term format, or use normalise = "token"',
    )


def _no_growth(history: MetricHistory) -> Alarm | None:
    if not history.has("length", "accuracy", "tries", values=LEARNT):
        return None
    length, right = history["length"], history["accuracy"]
    grew = length.rise >= GREW * length.start or right.rise >= ACCURACY_RISE or right.now >= 0.5
    return None if grew else _stuck(history, length, right)


def _stuck(history: MetricHistory, length: MetricTrack, right: MetricTrack) -> Alarm:
    """The alarm `no-growth`, with the likeliest of the differences from zero-long as its cause."""
    starts = (history[name].start if history.has(name) else usual for name, usual in ZERO_LONG.items())
    tries, dead, form, entropy = starts
    is_like = tries >= FEW_TRIES and dead <= MANY_DEAD and form >= UNFORMED and entropy >= CERTAIN
    cause = (
        "the first rollouts are like those of the recipe zero-long, whose answers grow: steps are too small"
        if is_like
        else f"an answer has {tries:.1f} tries at first (recipe zero-long: 2.5): the prompt draws out no search"
        if tries < FEW_TRIES
        else f"{dead:.0%} of the groups have no contrast at first (recipe zero-long: 50%), and teach nothing"
        if dead > MANY_DEAD
        else f"{form:.0%} of the answers are well-formed at first (recipe zero-long: 90%)"
        if form < UNFORMED
        else f"entropy is {entropy:.2g} nats per token at first (recipe zero-long: 0.28), so samples are alike"
    )
    return Alarm(
        "no-growth",
        f"answers have {length.now:.0f} tokens ({length.start:.0f} at first), {right.now:.1%} are right "
        f"({right.start:.1%})",
        cause,
        "raise lr or rollouts"
        if is_like
        else "pre-train on pages with several tries and on dialogues in the prompt's manner, or choose easier problems",
    )


def _thinking_stops(history: MetricHistory) -> Alarm | None:
    if not history.has("think_share", values=LEARNT):
        return None
    share = history["think_share"]
    if share.peak < 0.2 or share.now >= THINKS_LESS * share.peak:
        return None
    if history.has("turns", "accuracy") and history["turns"].rise > CALLS and history["accuracy"].rise >= ACCURACY_RISE:
        return None
    return Alarm(
        "thinking-stops", f"{share.now:.0%} of the answers think, {share.peak:.0%} did",
        "answering at once is as good, since the thoughts do not lead to right answers",
        "pre-train longer on worked problems, or choose problems that cannot be guessed",
    )  # fmt: skip


def _collapse(history: MetricHistory) -> Alarm | None:
    if not history.has("accuracy", values=2 * WINDOW):
        return None
    right = history["accuracy"]
    if right.peak < 0.1 or right.now >= FALLEN * right.peak:
        return None
    return Alarm(
        "collapse",
        f"accuracy fell from {right.peak:.1%} to {right.now:.1%}",
        "steps too large (a learning rate too high for so few samples, too many updates on one rollout), or a reward "
        "for something other than right answers",
        "continue from an earlier checkpoint with a lower lr, fewer updates_per_rollout or more prompts_per_rollout",
    )


def _entropy_collapse(history: MetricHistory) -> Alarm | None:
    if not history.has("entropy", values=2 * WINDOW):
        return None
    entropy = history["entropy"]
    if entropy.now >= ENTROPY_LOW or entropy.now >= ENTROPY_SHARE * entropy.start:
        return None
    return Alarm(
        "entropy-collapse",
        f"entropy fell from {entropy.start:.2g} to {entropy.now:.2g} nats per token",
        "the policy has become certain, so the samples of a group are alike and nothing new is tried",
        "raise loss.clip_high, lower lr, or refresh the problems",
    )


def _entropy_explosion(history: MetricHistory) -> Alarm | None:
    if not history.has("entropy", values=2 * WINDOW):
        return None
    entropy = history["entropy"]
    if entropy.rise < ENTROPY_RISE or entropy.now < ENTROPY_TIMES * entropy.start:
        return None
    return Alarm(
        "entropy-explosion",
        f"entropy rose from {entropy.start:.2g} to {entropy.now:.2g} nats per token",
        "the policy dissolves into noise: steps too large, or a reward that does not depend on the answer",
        "continue from an earlier checkpoint with a lower lr or a higher kl.weight, and look at the rollouts",
    )


def _dead_groups(history: MetricHistory) -> Alarm | None:
    if not history.has("dead_groups", "accuracy"):
        return None
    dead, right = history["dead_groups"], history["accuracy"]
    if dead.now < DEAD:
        return None
    message = f"{dead.now:.0%} of the groups have no contrast, {right.now:.1%} of the answers are right"
    if right.now < 0.5:
        return Alarm(
            "groups-too-hard", message, "the problems are too hard: nearly every group is all wrong",
            "choose easier problems, take more samples, or start from a better base",
        )  # fmt: skip
    return Alarm(
        "groups-too-easy", message, "the problems are too easy: nearly every group is all right",
        "choose harder problems, or stop here",
    )  # fmt: skip


def _never_ending(history: MetricHistory) -> Alarm | None:
    if not history.has("truncated"):
        return None
    cut = history["truncated"]
    falling = history.has("accuracy") and history["accuracy"].peak - history["accuracy"].now >= ACCURACY_FALL
    if cut.now < (CUT_FALLING if falling else CUT):
        return None
    return Alarm(
        "never-ending",
        f"{cut.now:.0%} of the answers are cut off at the cap" + (", and accuracy falls" if falling else ""),
        "the cap is too low for what the policy has learnt to write, or it no longer ends its answers",
        "raise max_new_tokens if the rollouts still make progress at the cap; otherwise lower lr, or penalise answers "
        "near it by a term such as overlong of examples/plugins",
    )


def _sampler_mismatch(history: MetricHistory) -> Alarm | None:
    if not history.has("sampler_gap"):
        return None
    gap = history["sampler_gap"]
    stale = history.has("staleness", values=1) and history["staleness"].now > 0
    far = 0.0
    if history.has("sampler_far"):
        far = history["sampler_far"].now
    if gap.now < (STALE_GAP if stale else GAP) and far < (STALE_FAR if stale else FAR):
        return None
    return Alarm(
        "sampler-mismatch",
        f"trainer and sampler disagree by {gap.now:.2g} nats per token, and about {far:.1%} of the tokens by more than "
        "a factor of 2",
        "the sampler's model is not the trainer's: stale weights, another precision, routing that differs, or "
        "another temperature",
        "sample with the trainer's precision and weights, replay the sampler's routing, or correct with truncated "
        "importance weights",
    )


def _kl_runaway(history: MetricHistory) -> Alarm | None:
    if not history.has("kl"):
        return None
    kl = median(history["kl"].recent)
    if kl < KL:
        return None
    return Alarm(
        "kl-runaway", f"the policy is {kl:.2g} nats per token from its reference",
        "steps too large, or drift into a language of its own that the reward does not see",
        "lower lr, raise kl.weight, or reward readability (the terms format and language)",
    )  # fmt: skip


def _reward_model_hacking(history: MetricHistory) -> Alarm | None:
    score = history.judged.get("preference")
    if score is None or score.count < 2 * WINDOW or score.rise < PREFERENCE_RISE:
        return None
    true = _true_accuracy(history)
    if true is None or true[1] - true[2] < TRUE_FALL:
        return None
    what, before, now = true
    return Alarm(
        "reward-model-hacking",
        f"the reward model's score rose from {score.start:.2f} to {score.now:.2f} while {what} fell from {before:.1%} "
        f"to {now:.1%}",
        "the policy pleases the reward model instead of solving problems",
        "raise general.start (R1: only the last 400 of 1,700 steps have such prompts), or lower general.prompts",
    )


def _true_accuracy(history: MetricHistory) -> tuple[str, float, float] | None:
    """(metric, when the reward model joined, now): held-out if measured twice since, else training accuracy."""
    heldout = "held-out accuracy"  # under its earlier name, too
    for name, what, few in (
        ("heldout_accuracy", heldout, 2), ("heldout_pass_at_1", heldout, 2), ("accuracy", "accuracy", WINDOW)
    ):  # fmt: skip
        track, before = history.judged.get(name), history.before.get(name, [])
        if track is not None and track.count >= few:
            first = before[-few:] or track.first[:few]
            return what, fmean(first), fmean(list(track.recent)[-few:])
    return None


def _language_mixing(history: MetricHistory) -> Alarm | None:
    if not history.has("language", "think_share"):
        return None
    # An answer without thoughts has language share 0, so judge only the answers that think.
    language, think = history["language"], history["think_share"]
    if think.now < 0.2 or think.start < 0.2:
        return None
    before, now = language.start / think.start, language.now / think.now
    if now >= MIXED or (now >= MIXED_ALWAYS and before - now < MIXED_FALL):
        return None
    return Alarm(
        "language-mixing",
        f"{now:.0%} of the words of a thought are in the problem's language, {before:.0%} at the start",
        "only the answer is rewarded, and mixing costs nothing",
        "add the term language to reward (R1's first RL stage: weight 1)",
    )


@dataclass(frozen=True)
class AlarmRule:
    """`needs`: the metrics without which it cannot judge, or of which it needs one (`either`); `codes`: the alarms it
    can raise."""

    judge: Callable[[MetricHistory], Alarm | None]
    needs: tuple[str, ...]
    codes: tuple[str, ...]
    either: bool = False

    def lacks(self, history: MetricHistory) -> list[str]:
        """The metrics that are missing; [] if it can judge."""
        missing = [name for name in self.needs if not history.has(name)]
        return [] if self.either and len(missing) < len(self.needs) else missing


RULES = (
    AlarmRule(_format_hacking, ("format", "accuracy"), ("format-hacking",)),
    AlarmRule(_length_collapse, ("length", "accuracy"), ("length-collapse",)),
    AlarmRule(_no_growth, ("length", "accuracy", "tries"), ("no-growth",)),
    AlarmRule(_thinking_stops, ("think_share",), ("thinking-stops",)),
    AlarmRule(_collapse, ("accuracy",), ("collapse",)),
    AlarmRule(_entropy_collapse, ("entropy",), ("entropy-collapse",)),
    AlarmRule(_entropy_explosion, ("entropy",), ("entropy-explosion",)),
    AlarmRule(_dead_groups, ("dead_groups", "accuracy"), ("groups-too-hard", "groups-too-easy")),
    AlarmRule(_never_ending, ("truncated",), ("never-ending",)),
    AlarmRule(_sampler_mismatch, ("sampler_gap",), ("sampler-mismatch",)),
    AlarmRule(_kl_runaway, ("kl",), ("kl-runaway",)),
    AlarmRule(_reward_model_hacking, ("preference", "accuracy"), ("reward-model-hacking",)),
    AlarmRule(_language_mixing, ("language", "think_share"), ("language-mixing",)),
    AlarmRule(faults.rate_zero, ("lr",), ("learning-rate-zero",)),
    AlarmRule(faults.frozen_reference, ("kl", "grad_norm"), ("frozen-reference",)),
    AlarmRule(faults.negative_weight, ("kl_weight",), ("wrong-kl-sign",)),
    AlarmRule(faults.loss_falls_with_kl, ("kl", "loss"), ("wrong-kl-sign",)),
    AlarmRule(faults.negative_kl, ("kl",), ("negative-kl",)),
    AlarmRule(faults.not_finite, ("loss", "grad_norm"), ("not-finite",), either=True),
    AlarmRule(faults.steps_too_large, ("clip_share", "grad_norm"), ("steps-too-large",), either=True),
    AlarmRule(faults.sampler_divergence, ("sampler_kl",), ("sampler-mismatch",)),
    AlarmRule(faults.no_contrast, ("dead_groups", "reward_std"), ("no-contrast",), either=True),
    AlarmRule(faults.reward_length_collapse, ("length", "reward", "reward_std"), ("length-collapse",)),
    AlarmRule(faults.reward_collapse, ("reward", "reward_std"), ("collapse",)),
)


class AlarmTracker:
    """Raises each alarm once, when it first holds. `history`: (step, record) pairs of earlier attempts."""

    def __init__(self, history: Iterable[tuple[int, Values]] = ()) -> None:
        self.history = MetricHistory()
        self.raised: dict[str, tuple[int, Alarm]] = {}
        """Step and alarm, by code."""
        for step, values in history:
            self.add(step, values)

    def add(self, step: int, values: Values) -> list[Alarm]:
        """Takes one record of metrics.jsonl; returns the alarms that are new."""
        self.history.add(values)
        new = [alarm for alarm in self.active if alarm.code not in self.raised]
        self.raised |= {alarm.code: (step, alarm) for alarm in new}
        return new

    @property
    def active(self) -> list[Alarm]:
        """All alarms that hold now, whether raised before or not."""
        return [alarm for rule in RULES if (alarm := rule.judge(self.history)) is not None]
