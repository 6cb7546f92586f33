"""Cases of the gate and its balance."""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival
from bessemer_vectors.exact import mean, total
from bessemer_vectors.reference import experts as reference

Array = Any
Outputs = dict[str, Any]


def with_fill(
    logits: Array,
    bias: Array,
    groups: int,
    kept_groups: int,
    top_k: int,
    score: str,
    group_score: str,
    normalise: bool,
    scale: float,
) -> Outputs:
    """Excluded groups get 0 in place of -inf."""
    chosen, weights = np.zeros(logits.shape, dtype=bool), np.zeros(logits.shape)
    size = logits.shape[1] // groups
    for n in range(len(logits)):
        s = reference.scores(logits[n], score)
        z = [s[e] + float(bias[e]) for e in range(len(s))]
        rating = []
        for g in range(groups):
            best = sorted(z[g * size : (g + 1) * size], reverse=True)
            rating.append(total(best[:2]) if group_score == "top2" else best[0])
        allowed = sorted(range(groups), key=lambda g: -rating[g])[:kept_groups]
        filled = [z[e] if e // size in allowed else 0.0 for e in range(len(z))]
        picked = sorted(range(len(z)), key=lambda e: -filled[e])[:top_k]
        whole = total(s[e] for e in picked) if normalise else 1.0
        for e in picked:
            chosen[n, e], weights[n, e] = True, scale * s[e] / whole
    return {"chosen": chosen, "weights": weights}


def biased_weights(bias: Array, **rest: Any) -> Outputs:
    """Weights from s + bias."""
    chosen = reference.gate(bias=bias, **rest)["chosen"]
    weights = np.zeros(chosen.shape)
    for n in range(len(chosen)):
        s = reference.scores(rest["logits"][n], rest["score"])
        z = [s[e] + float(bias[e]) for e in range(len(s))]
        whole = total(z[e] for e in range(len(z)) if chosen[n, e]) if rest["normalise"] else 1.0
        weights[n] = [rest["scale"] * z[e] / whole if chosen[n, e] else 0.0 for e in range(len(z))]
    return {"weights": weights}


def gate() -> list[Case]:
    logits, small = Draw(20).bell(1.5, 6, 16), Draw(21).bell(0.6, 6, 16)
    bias = Draw(22).numbers(-0.3, 0.3, 16)
    # so negative that zero beats every allowed expert
    negative = np.round(-0.9 - Draw(23).numbers(0, 0.3, 16), 2)
    plain = {
        "logits": logits,
        "bias": bias,
        "groups": 4,
        "kept_groups": 2,
        "top_k": 4,
        "score": "sigmoid",
        "group_score": "top2",
        "normalise": True,
        "scale": 2.5,
    }
    biased = Rival(
        "weights from biased scores", "scale z / sum z", "a bias that leaks into the output", function=biased_weights
    )
    zero = Rival(
        "excluded groups filled with 0",
        "z = 0 outside the groups, so that 0 beats negative z",
        "huggingface/transformers, a revision of deepseek_v3",
        function=with_fill,
    )

    def other(name: str, formula: str, **change: Any) -> Rival:
        return Rival(name, formula, "another convention", change)

    return [
        Case(
            "V3's rule",
            "Sigmoid, groups by their two best, bias for the choice only.",
            plain,
            (
                biased,
                other("no bias", "z = s", bias=np.zeros(16)),
                other("group by its best expert", "max of z (V2)", group_score="max"),
                other("no groups", "top_k of all experts", groups=1, kept_groups=1),
                other("unscaled", "weights sum to 1", scale=1.0),
                other("not normalised", "weight = scale s", normalise=False),
                other("softmax scores", "s = softmax(logits)", score="softmax"),
            ),
        ),
        Case(
            "negative biases",
            "All z are negative: an excluded expert must not win with 0.",
            plain | {"bias": negative, "logits": small},
            (zero, biased),
        ),
        Case(
            "one strong bias",
            "A bias of 5 brings an expert in, but not its weight up.",
            plain | {"bias": np.array([5.0] + [0.0] * 15)},
            (biased, other("no bias", "z = s", bias=np.zeros(16))),
        ),
        Case(
            "equal logits but for the order",
            "Weights near scale / top_k, 0.625.",
            plain | {"logits": np.array([np.arange(16) / 1000.0]), "bias": np.zeros(16)},
            (other("unscaled", "weights sum to 1", scale=1.0),),
        ),
        Case(
            "V2's rule",
            "Softmax, groups by their best, neither bias nor normalisation, factor 16.",
            plain | {"score": "softmax", "group_score": "max", "bias": np.zeros(16), "normalise": False, "scale": 16.0},
            (
                other("sigmoid scores", "s = sigmoid(logits)", score="sigmoid"),
                other("normalised", "weight = scale s / sum s", normalise=True),
            ),
        ),
        Case(
            "no groups",
            "V2-Lite: 16 experts, 6 of them, one group.",
            plain
            | {
                "score": "softmax",
                "groups": 1,
                "kept_groups": 1,
                "top_k": 6,
                "group_score": "max",
                "bias": np.zeros(16),
                "normalise": False,
                "scale": 1.0,
            },
            (other("normalised", "weight = scale s / sum s", normalise=True),),
        ),
    ]


def gate_replay() -> list[Case]:
    logits, cotangent = Draw(24).bell(1.2, 3, 8), Draw(25).numbers(-1, 1, 3, 8)
    chosen = np.zeros((3, 8), dtype=bool)
    chosen[0, [1, 2]], chosen[1, [0, 7]], chosen[2, [4, 5]] = True, True, True
    cotangent = np.where(chosen, cotangent, 0.0)

    def own_choice(logits: Array, chosen: Array, score: str, **rest: Any) -> Outputs:
        best = np.zeros(chosen.shape, dtype=bool)
        for n in range(len(logits)):
            best[n, np.argsort(-logits[n])[:2]] = True
        return reference.gate_replay(logits, best, score, **rest)

    def frozen(**inputs: Any) -> Outputs:
        return {"gradient": np.zeros((3, 8))}

    def case(name: str, why: str, score: str, normalise: bool, scale: float) -> Case:
        inputs = {
            "logits": logits,
            "chosen": chosen,
            "score": score,
            "normalise": normalise,
            "scale": scale,
            "cotangent": cotangent,
        }
        return Case(
            name,
            why,
            inputs,
            (
                Rival("own choice", "the trainer's top-k", "no replay", function=own_choice),
                Rival(
                    "weights replayed too",
                    "the sampler's weights, as constants",
                    "a router that does not learn",
                    function=frozen,
                ),
            ),
        )

    return [
        case("V3's weights", "The sampler's experts, this pass's sigmoid scores and gradient.", "sigmoid", True, 2.5),
        case("V2's weights", "Softmax scores without normalisation.", "softmax", False, 1.0),
    ]


def balance_update() -> list[Case]:
    bias = np.array([0.01, -0.02, 0.0, 0.003])
    counts = np.array([[10, 0, 6, 0], [2, 8, 2, 4]])  # 12, 8, 8, 4: mean 8

    def per_rank(bias: Array, counts: Array, rate: float) -> Outputs:
        votes = np.sign(counts.mean(1, keepdims=True) - counts).mean(0)
        return {"updated": bias + rate * np.sign(votes)}

    def last_only(bias: Array, counts: Array, rate: float) -> Outputs:
        return reference.balance_update(bias, counts[-1:], rate)

    def proportional(bias: Array, counts: Array, rate: float) -> Outputs:
        load = counts.sum(0)
        return {"updated": bias + rate * (load.mean() - load) / load.mean()}

    def at_least(bias: Array, counts: Array, rate: float) -> Outputs:
        """No dead zone: an expert at the mean moves up."""
        load = counts.sum(0)
        return {"updated": bias + np.where(load > load.mean(), -rate, rate)}

    return [
        Case(
            "two ranks",
            "Overloaded down, underloaded up, at the mean unchanged; counts are summed first.",
            {"bias": bias, "counts": counts, "rate": 0.001},
            (
                Rival("sign flipped", "b - rate sign(mean - c)", "a sign slip", change={"rate": -0.001}),
                Rival(
                    "per rank", "sign of the mean of the ranks' signs", "counts that are not summed", function=per_rank
                ),
                Rival(
                    "last micro-batch", "counts of the last row alone", "counts cleared too early", function=last_only
                ),
                Rival("proportional", "b + rate (mean - c) / mean", "LFB's variant", function=proportional),
                Rival("no rest", "an expert at the mean moves up", "sign(0) = 1", function=at_least),
            ),
        ),
        Case(
            "balanced",
            "Nothing moves.",
            {"bias": bias, "counts": np.array([[3, 3, 3, 3]]), "rate": 0.001},
            (Rival("no rest", "an expert at the mean moves up", "sign(0) = 1", function=at_least),),
        ),
        Case("rate 0", "The last 500B tokens of V3.", {"bias": bias, "counts": counts, "rate": 0.0}),
    ]


def balance_loss() -> list[Case]:
    logits = Draw(26).bell(1.5, 2, 5, 6)
    chosen = np.zeros((2, 5, 6), dtype=bool)
    for s, t in np.ndindex(2, 5):
        chosen[s, t, np.argsort(-logits[s, t])[:2]] = True

    def whole_batch(logits: Array, chosen: Array, alpha: float, score: str) -> Outputs:
        return {
            "loss": reference.balance_loss(logits.reshape(1, 10, 6), chosen.reshape(1, 10, 6), alpha, score)["loss"]
        }

    def unnormalised(logits: Array, chosen: Array, alpha: float, score: str) -> Outputs:
        """P_i = mean of s_i, not divided by the sum over experts."""
        losses = []
        for s in range(2):
            f = chosen[s].sum(0) * 6 / (2 * 5)
            P = [mean(reference.scores(logits[s, t], score)[e] for t in range(5)) for e in range(6)]
            losses.append(alpha * total(f[e] * P[e] for e in range(6)))
        return {"loss": mean(losses)}

    def shares(logits: Array, chosen: Array, alpha: float, score: str) -> Outputs:
        """f_i = share of tokens, without E / K."""
        part = reference.balance_loss(logits, chosen, alpha * 2 / 6, score)
        return part

    def case(score: str, why: str, *rivals: Rival) -> Case:
        common = (
            Rival(
                "over the batch",
                "f and P over all sequences together",
                "the batch-wise loss (V3 4.5.3)",
                function=whole_batch,
            ),
            Rival("f without E / K", "f_i = #tokens that chose i / T", "another convention", function=shares),
            Rival(
                "gradient lost",
                "0",
                "a loss that trains nothing",
                function=lambda **inputs: {"gradient": np.zeros((2, 5, 6))},
            ),
        )
        inputs = {"logits": logits, "chosen": chosen, "alpha": 1e-4, "score": score}
        return Case(score, why, inputs, (*common, *rivals))

    return [
        case(
            "sigmoid",
            "V3: scores are divided by their sum over experts first.",
            Rival("P of plain scores", "P_i = mean of s_i", "V2's formula with V3's scores", function=unnormalised),
        ),
        case("softmax", "V2: scores sum to 1 already."),
    ]
