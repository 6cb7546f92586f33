"""Cases of what lies between sampler and trainer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival, integers, marks
from bessemer_vectors.cases.rl import logprob_rows
from bessemer_vectors.exact import exp, log_softmax, mean
from bessemer_vectors.reference import rl as reference

Array = Any
Outputs = dict[str, Any]


def off_policy_mask() -> list[Case]:
    # gaps of log pi_old - log pi: 0.1, 0.1, -0.1, 0.01 per token, and one row whose padding would tip it
    gaps = np.array([[0.1] * 4, [0.1] * 4, [-0.1] * 4, [0.01] * 4, [0.01, 0.01, 5.0, 5.0]])
    old = -Draw(9).numbers(0.5, 2, 5, 4)
    inputs = {
        "logprobs": np.round(old - gaps, 6),
        "old_logprobs": old,
        "advantages": np.array([0.5, -1, -1, -1, -1]),
        "mask": marks("1111", "1111", "1111", "1111", "1100"),
        "limit": 0.02,
    }

    def any_sign(advantages: Array, **rest: Any) -> Outputs:
        return reference.off_policy_mask(advantages=-np.ones(5), **rest)

    def by_sum(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, limit: float) -> Outputs:
        total = np.where(mask, old_logprobs - logprobs, 0.0).sum(1)
        return {"keep": ~((advantages < 0) & (total > limit))}

    return [
        Case(
            "five rows",
            "Only the second is left out: it is bad, and the policy has left it already.",
            inputs,
            (
                Rival(
                    "whatever the sign of A",
                    "left out if the mean exceeds the limit",
                    "a forgotten condition",
                    function=any_sign,
                ),
                Rival("sum over tokens", "sum in place of mean", "a missing 1/|o|", function=by_sum),
                Rival(
                    "other direction",
                    "mean of (log pi - log pi_old) > limit",
                    "a sign slip",
                    change={"logprobs": inputs["old_logprobs"], "old_logprobs": inputs["logprobs"]},
                ),
                Rival("padding counts", "mean over T", "a padded mean", change={"mask": np.ones((5, 4), dtype=bool)}),
            ),
        ),
    ]


def importance_weights() -> list[Case]:
    trainer, sampler = logprob_rows(10, 3, 6, 0.9)
    mask = marks("111111", "111000", "110110")

    def geometric(trainer_logprobs: Array, sampler_logprobs: Array, mask: Array, mode: str, cap: float) -> Outputs:
        """exp of the mean log-ratio of the row."""
        rows = reference.sequence_ratio(trainer_logprobs, sampler_logprobs, mask)["ratio"]
        cut = rows > cap
        kept = np.minimum(rows, cap) if mode.endswith("truncate") else np.where(cut, 0.0, rows)
        trained = mask.sum(1)
        return {
            "weights": np.where(mask, kept[:, None], 0.0),
            "cut_share": float((cut * trained).sum() / trained.sum()),
            "mean_ratio": float((rows * trained).sum() / trained.sum()),
        }

    def logged_late(**inputs: Any) -> Outputs:
        weights = reference.importance_weights(**inputs)["weights"]
        return {"mean_ratio": mean(weights[inputs["mask"]].tolist()), "cut_share": 0.0}

    late = Rival("logged after the cut", "means of the cut weights", "huggingface/trl#5231", function=logged_late)
    inverse = Rival(
        "inverse ratio",
        "exp(log pi_sampler - log pi_trainer)",
        "a sign slip",
        change={"trainer_logprobs": sampler, "sampler_logprobs": trainer},
    )
    mean_rule = Rival(
        "geometric mean of the row", "exp(mean of log-ratios)", "NVIDIA-NeMo/RL#2269 compares both", function=geometric
    )

    def case(mode: str, why: str, *rivals: Rival, cap: float = 1.5) -> Case:
        inputs = {
            "trainer_logprobs": trainer,
            "sampler_logprobs": sampler,
            "mask": mask,
            "mode": mode,
            "cap": cap,
        }
        return Case(mode, why, inputs, rivals)

    def instead(mode: str) -> Rival:
        return Rival(f'mode "{mode}"', "the other rule for a ratio above the cap", "another convention", {"mode": mode})

    return [
        case("token-truncate", "Truncated importance sampling: min(rho, cap).", instead("token-mask"), inverse, late),
        case(
            "token-mask", "Tokens far likelier in the trainer are left out.", instead("token-truncate"), inverse, late
        ),
        case(
            "sequence-truncate", "One weight per row, the product of its ratios.", mean_rule, instead("sequence-mask")
        ),
        case("sequence-mask", "Rows above the cap are left out.", mean_rule, instead("sequence-truncate")),
    ]


def token_logprobs() -> list[Case]:
    logits = Draw(11).bell(2.0, 4, 8)
    tokens = integers(0, 3, 7, 5)

    def unscaled(logits: Array, tokens: Array, temperature: float) -> Outputs:
        return reference.token_logprobs(logits, tokens, 1.0)

    def afterwards(logits: Array, tokens: Array, temperature: float) -> Outputs:
        """Divided after the softmax: no distribution."""
        plain = reference.token_logprobs(logits, tokens, 1.0)
        return {"logprobs": plain["logprobs"] / temperature}

    hot = (
        Rival("temperature ignored", "log softmax(logits)", "a forgotten temperature", function=unscaled),
        Rival("divided too late", "log softmax(logits) / temperature", "a slip", function=afterwards),
    )
    return [
        Case("plain", "Temperature 1.", {"logits": logits, "tokens": tokens, "temperature": 1.0}),
        Case(
            "temperature 0.6",
            "Logits are divided before the softmax.",
            {"logits": logits, "tokens": tokens, "temperature": 0.6},
            hot,
        ),
        Case(
            "large logits",
            "Around 100: exp overflows in float32 unless the largest is taken away first.",
            {"logits": np.round((logits + 100.0) * 1024) / 1024, "tokens": tokens, "temperature": 1.0},
        ),
        Case(
            "a certain token",
            "Probability 1: log-probability and entropy are 0.",
            {"logits": np.array([[400.0, -400.0, -400.0]]), "tokens": integers(0), "temperature": 1.0},
        ),
    ]


def kept_logprobs() -> list[Case]:
    logits = np.array([[3.0, 2.5, 1.0, 0.5, -1.0, -2.0], [0.1, 0.0, -0.1, -0.2, -0.3, -0.4], [9.0, 1, 0, -1, -2, -3]])

    def whole(logits: Array, temperature: float, **rest: Any) -> Outputs:
        kept = reference.kept_logprobs(logits, temperature, **rest)["kept"]
        plain = np.array([log_softmax(float(value) / temperature for value in row) for row in logits])
        return {"logprobs": np.where(kept, plain, -math.inf)}

    def without_crossing(logits: Array, temperature: float, top_k: int, top_p: float) -> Outputs:
        kept, logprobs = np.zeros(logits.shape, dtype=bool), np.full(logits.shape, -math.inf)
        for n, row in enumerate(logits):
            logs = log_softmax(float(value) / temperature for value in row)
            order = sorted(range(len(logs)), key=lambda v: -logs[v])[: top_k or len(logs)]
            mass = 0.0
            some: list[int] = []
            for v in order:
                mass += exp(logs[v])
                if mass > top_p and some:
                    break
                some.append(v)
            kept[n, some] = True
            logprobs[n, some] = log_softmax(logs[v] for v in some)
        return {"kept": kept, "logprobs": logprobs}

    raw = Rival(
        "not renormalised",
        "log softmax over the whole vocabulary",
        "huggingface/trl#6789, huggingface/trl#7269",
        function=whole,
    )
    crossing = Rival(
        "crossing token left out", "largest set of mass <= p", "another convention", function=without_crossing
    )

    def case(name: str, why: str, temperature: float, top_k: int, top_p: float, *rivals: Rival) -> Case:
        inputs = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return Case(name, why, inputs, rivals)

    def colder(**inputs: Any) -> Outputs:
        """The set is chosen at temperature 1."""
        kept = reference.kept_logprobs(**(inputs | {"temperature": 1.0}))["kept"]
        scaled = np.where(kept, inputs["logits"] / inputs["temperature"], -math.inf)
        return {"kept": kept, "logprobs": np.array([log_softmax(row.tolist()) for row in scaled])}

    return [
        case("everything", "No cut: log softmax.", 1.0, 0, 1.0),
        case("top-p 0.9", "A peaked, a flat and a certain row.", 1.0, 0, 0.9, raw, crossing),
        case("top-k 3", "Three of six.", 1.0, 3, 1.0, raw),
        case("top-k 4 and top-p 0.8", "top-p works on what top-k left, renormalised.", 1.0, 4, 0.8, raw, crossing),
        case(
            "temperature 0.6 and top-p 0.95",
            "R1's sampling: temperature first.",
            0.6,
            0,
            0.95,
            raw,
            Rival("top-p before temperature", "the set at temperature 1", "another order", function=colder),
        ),
    ]
