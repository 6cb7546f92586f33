"""The curves of a run: which metrics are drawn together, and what they are called.

TRAINING lists the panels of every stage that trains, LEARNING those of reinforcement learning. To add a panel, add a
line to one of them. The report card and the live page draw them.
"""

import re
from dataclasses import dataclass

BALANCE, LOADS = "moe/max_vio/", "moe/load/"  # MaxVio and load of each layer's gate


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share an axis. A name that ends in "/" stands for every metric with that prefix."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    ordered: bool = False
    """The lines have an order (layers): shades of one hue instead of several hues."""
    most: int = 0
    """Draw at most this many lines, those with the highest maximum, and none that stays at 0; 0: no limit."""


TRAINING = (
    Panel("Training loss", "nats per token", ("train/loss", "train/mtp_1", "train/mtp_2", "train/mtp_3")),
    Panel("Validation", "bits per byte", ("val/bpb/",)),
    Panel("Expert imbalance", "MaxVio: fullest expert over the mean, minus 1", (BALANCE,), 0.0, ordered=True),
    Panel("Balance loss", "", ("train/balance",)),
    Panel("Gradient norm", "before clipping", ("train/grad_norm",), log=True),
    Panel("Learning rate", "", ("train/lr",), 0.0),
    Panel("Speed", "tokens per second", ("train/tokens_per_second",), 0.0),
    Panel("GPU", "share of the peak in BF16 (MFU)", ("gpu/mfu",), 0.0),
)
LEARNING = (
    Panel("Accuracy", "share of rollouts", ("rl/accuracy", "rl/score", "rl/format"), 0.0, 1.0),
    Panel("Held-out problems", "share solved",
          ("rl/heldout_accuracy", "rl/heldout_score", "rl/heldout_pass_at_1", "rl/heldout_pass_at_4",
           "rl/heldout_maj_at_4"), 0.0, 1.0),
    Panel("Held-out, task by task", "correct as in training", ("rl/heldout/",), 0.0, 1.0),
    Panel("Length", "tokens per answer", ("rl/length",), 0.0),
    Panel("Reflection", "the paper's ten words, such as wait, per answer", ("rl/reflective_words",), 0.0),
    Panel("Word by word", "per answer, those used most", ("rl/words/",), 0.0, most=6),
    Panel("Tries", "lines of thought per answer, whatever their words", ("rl/tries",), 0.0),
    Panel("Thinking", "share of rollouts that think", ("rl/think_share",), 0.0, 1.0),
    Panel("Language", "share of words in the problem's language", ("rl/language", "rl/heldout_language"), None, 1.0),
    Panel("Inside the trace", "share of cases", ("rl/trace/",), 0.0, 1.0),
    Panel("Reward", "mean", ("rl/reward", "rl/heldout_reward")),
    Panel("Reward model", "mean score of general answers", ("rl/preference",)),
    Panel("Entropy", "nats per token", ("rl/entropy",), 0.0),
    Panel("Lost signal", "share", ("rl/dead_groups", "rl/truncated", "rl/clip_share"), 0.0),
    Panel("Pass rates", "moving estimate by task, difficulty and language", ("rl/pass/",), 0.0, 1.0),
    Panel("Sampler gap", "trainer against sampler, nats per token", ("rl/sampler_gap", "rl/sampler_kl"), 0.0),
    Panel("Sampler mismatch", "share of tokens whose probability differs by more than a factor of 2",
          ("rl/sampler_far",), 0.0),
    Panel("Importance weights", "of tokens, trainer over sampler",
          ("rl/correction_weight", "rl/correction_cut"), 0.0),
    Panel("Staleness", "steps between sampling and updating",
          ("rl/staleness", "rl/staleness_mean", "rl/staleness_max"), 0.0, most=3),
    Panel("Routing", "share of tokens routed differently by the trainer", ("rl/routing_disagreement",), 0.0),
    Panel("Drafts", "loss of the MTP modules, nats per token", ("rl/mtp_1", "rl/mtp_2", "rl/mtp_3"), 0.0),
    Panel("Expert imbalance", "MaxVio: fullest expert over the mean, minus 1", (BALANCE,), 0.0, ordered=True),
    Panel("Sampling mask", "tokens that top-p leaves, mean", ("rl/kept_tokens",), 0.0),
    Panel("KL to the reference", "nats per token", ("rl/kl",), 0.0),
    Panel("Gradient norm", "before clipping", ("rl/grad_norm",), log=True),
    Panel("Learning rate", "", ("rl/lr",), 0.0),
)  # fmt: skip
NAMES = {
    "train/loss": "next token",
    "train/mtp_1": "token after (MTP 1)",
    "train/mtp_2": "two after (MTP 2)",
    "train/mtp_3": "three after (MTP 3)",
    "rl/mtp_1": "token after (MTP 1)",
    "rl/mtp_2": "two after (MTP 2)",
    "rl/mtp_3": "three after (MTP 3)",
    "rl/accuracy": "correct",
    "rl/score": "credit earned",
    "rl/format": "well-formed",
    "rl/reward": "in training",
    "rl/heldout_reward": "held-out problems",
    "rl/heldout_accuracy": "correct as in training",
    "rl/heldout_score": "credit earned",
    "rl/heldout_pass_at_1": "pass@1 in any form",
    "rl/language": "in training",
    "rl/heldout_language": "held-out problems",
    "rl/dead_groups": "groups without contrast",
    "rl/truncated": "answers cut off",
    "rl/clip_share": "tokens clipped",
    "rl/sampler_gap": "distance of log-probabilities",
    "rl/sampler_kl": "KL",
    "rl/correction_weight": "mean weight",
    "rl/correction_cut": "share cut",
    "rl/trace/step_right": "steps computed right",
    "rl/trace/right_numbers": "tries with the given numbers",
    "rl/trace/yes_given_hit": "hits recognised as hits",
    "rl/trace/yes_given_miss": "misses taken for hits",
    "rl/trace/repeated": "repeated tries",
    "rl/trace/returned": "returns to an earlier try",
    "rl/trace/gave_up": "answers that gave up",
}


def label(name: str) -> str:
    """A metric's label: "moe/max_vio/3" is layer 3, "moe/max_vio/mtp0" MTP 1, "val/bpb/code" is code."""
    if name in NAMES:
        return NAMES[name]
    last = name.rsplit("/", 1)[-1]
    if name.startswith((BALANCE, LOADS)):
        mtp, number = layer_of(last)
        return last if number < 0 else f"MTP {number + 1}" if mtp else f"layer {number}"
    return last.removeprefix("heldout_").replace("pass_at_", "pass@").replace("maj_at_", "maj@").replace("_", " ")


def layer_of(name: str) -> tuple[bool, int]:
    """(in an MTP module, number or -1): (False, 3) for "3" and "model.layers.3.mlp.gate", (True, 0) for "mtp0"."""
    match = re.search(r"\d+", name)
    return name.startswith("mtp"), int(match[0]) if match else -1


def order(name: str) -> tuple[bool, int, str]:
    """Sort key for the metrics of one family: layers by their numbers, MTP modules after them."""
    last = name.rsplit("/", 1)[-1]
    return (*layer_of(last), last)
