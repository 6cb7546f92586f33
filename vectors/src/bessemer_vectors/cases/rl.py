"""Cases of advantages, masks and losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival, integers, marks
from bessemer_vectors.exact import exp, mean
from bessemer_vectors.reference import rl as reference

Array = Any
Outputs = dict[str, Any]
EPS = 1e-6


# ---- group_advantages ----------------------------------------------------------------------------------------------


def blocks(size: int) -> Rival:
    def neighbours(rewards: Array, groups: Array, std: str, eps: float) -> Outputs:
        return reference.group_advantages(rewards, np.arange(len(rewards)) // size, std, eps)

    return Rival(
        "neighbours as a group",
        f"groups are rows 0 to {size - 1}, {size} to {2 * size - 1}, ...",
        "PrimeIntellect-ai/prime-rl#600",
        function=neighbours,
    )


def whole_batch(rewards: Array) -> Rival:
    return Rival(
        "the whole batch as one group",
        "(r - mean(all r)) / std(all r)",
        "THUDM/slime#1918",
        change={"groups": np.zeros(len(rewards), dtype=np.int64)},
    )


def alone(rewards: Array) -> Rival:
    return Rival(
        "each row its own group",
        "A = r",
        "PeterGriffinJin/Search-R1#88",
        function=lambda **inputs: {"advantages": rewards},
    )


def other_std(std: str) -> Rival:
    how = {"population": "n", "sample": "n - 1", "none": "nothing"}
    return Rival(f'std "{std}"', f"the spread divides by {how[std]}", "another convention", change={"std": std})


def normalised_twice(rewards: Array, groups: Array, std: str, eps: float) -> Outputs:
    first = reference.group_advantages(rewards, groups, std, eps)["advantages"]
    again = reference.group_advantages(first, np.zeros(len(first), np.int64), "population", eps)
    return again


TWICE = Rival(
    "normalised twice",
    "(A - mean(A)) / std(A) over the batch, after the groups",
    "axon-rl/gem#113",
    function=normalised_twice,
)


EVERY_SECOND = Rival(
    "every second row as a group",
    "groups are rows 0, 2, 4, ... and 1, 3, 5, ...",
    "PrimeIntellect-ai/prime-rl#600",
    change={"groups": np.arange(8) % 2},
)


def reward_kept(rewards: Array, groups: Array, std: str, eps: float) -> Outputs:
    advantages = reference.group_advantages(rewards, groups, std, eps)["advantages"]
    single = np.array([int((groups == group).sum()) == 1 for group in groups])
    return {"advantages": np.where(single, rewards / (1 + eps), advantages)}


def group_advantages() -> list[Case]:
    two = np.array([1.0, 0, 0, 0, 1, 1, 0, 0])
    two_groups = integers(0, 0, 0, 0, 1, 1, 1, 1)
    fives = np.array([1.0, 2, 3, 4, 5, 5, 5, 1, 2, 3, 4])
    mixed = np.array([1.0, 0.2, 0, 0.2, 0, 0.4, 1, 1.2])
    draws = Draw(1).numbers(0, 1, 16)

    def case(name: str, why: str, rewards: Array, groups: Array, std: str, *rivals: Rival) -> Case:
        return Case(name, why, {"rewards": rewards, "groups": groups, "std": std, "eps": EPS}, rivals)

    return [
        case(
            "binary, population",
            "Rewards of 0 and 1: the two standard deviations differ by 15 % at four samples.",
            two,
            two_groups,
            "population",
            other_std("sample"),
            other_std("none"),
            whole_batch(two),
            alone(two),
        ),
        case(
            "binary, sample",
            "The same with Bessel's correction.",
            two,
            two_groups,
            "sample",
            other_std("population"),
            other_std("none"),
            whole_batch(two),
            alone(two),
        ),
        case(
            "binary, undivided",
            "Dr. GRPO only subtracts the mean.",
            two,
            two_groups,
            "none",
            other_std("population"),
            other_std("sample"),
            whole_batch(two),
            EVERY_SECOND,
        ),
        case(
            "sixteen samples",
            "Rewards that are not 0 or 1; the standard deviations differ by 3 %.",
            draws,
            np.zeros(16, dtype=np.int64),
            "population",
            other_std("sample"),
        ),
        case(
            "dead group",
            "Equal rewards of 0.1, whose sum is not exact: advantages are 0, not rounding noise by eps. "
            "A second normalisation over the batch would raise the other group.",
            np.array([0.1, 0.1, 0.1, 1, 0, 0]),
            integers(0, 0, 0, 1, 1, 1),
            "population",
            whole_batch(np.zeros(6)),
            TWICE,
            other_std("sample"),
        ),
        case(
            "all dead",
            "A batch without signal gives zeros, not NaN.",
            np.ones(4),
            integers(0, 0, 1, 1),
            "sample",
            alone(np.ones(4)),
        ),
        case(
            "uneven groups",
            "Groups of 4, 3 and 4; the middle one is dead.",
            fives,
            integers(0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2),
            "population",
            whole_batch(fives),
            blocks(4),
            other_std("sample"),
        ),
        case(
            "prompts take turns",
            "Rows of prompts 0, 1, 0, 1, ...: groups are not neighbours.",
            mixed,
            integers(0, 1, 0, 1, 0, 1, 0, 1),
            "population",
            blocks(4),
            whole_batch(mixed),
            other_std("sample"),
            alone(mixed),
        ),
        case(
            "prompts take turns, sample",
            "The same with Bessel's correction.",
            mixed,
            integers(0, 1, 0, 1, 0, 1, 0, 1),
            "sample",
            blocks(4),
            whole_batch(mixed),
            other_std("population"),
            alone(mixed),
        ),
        case(
            "uneven groups, sample",
            "Groups of 4, 3 and 4 with Bessel's correction.",
            fives,
            integers(0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2),
            "sample",
            whole_batch(fives),
            blocks(4),
            other_std("population"),
        ),
        case(
            "dead group, sample",
            "A dead group beside a live one with Bessel's correction; normalised once.",
            np.array([0.1, 0.1, 0.1, 1, 0, 0]),
            integers(0, 0, 0, 1, 1, 1),
            "sample",
            whole_batch(np.zeros(6)),
            TWICE,
            alone(np.array([0.1, 0.1, 0.1, 1, 0, 0])),
        ),
        case(
            "group of one",
            "A completion without others to compare teaches nothing.",
            np.array([0.7, 1, 0]),
            integers(0, 1, 1),
            "sample",
            whole_batch(np.zeros(3)),
            Rival(
                "a group of one keeps its reward",
                "A = r / (1 + eps) where nothing is compared",
                "another convention (verl)",
                function=reward_kept,
            ),
        ),
    ]


# ---- loss_mask -----------------------------------------------------------------------------------------------------


def tools_forgotten(completion_mask: Array, tool_mask: Array, truncated: Array) -> Outputs:
    return reference.loss_mask(completion_mask, np.ones_like(tool_mask), truncated)


def truncated_counted(completion_mask: Array, tool_mask: Array, truncated: Array) -> Outputs:
    """The numerator leaves truncated completions out, the denominator does not."""
    return {"tokens": reference.loss_mask(completion_mask, tool_mask, np.zeros_like(truncated))["tokens"]}


NO_TOOLS = Rival(
    "tool mask dropped",
    "mask = completion_mask and not truncated",
    "huggingface/trl#6439 (replay buffer)",
    function=tools_forgotten,
)
COUNTED = Rival(
    "truncated completions in the denominator",
    "tokens = sum(completion_mask and tool_mask)",
    "huggingface/trl#6369, huggingface/trl#6439",
    function=truncated_counted,
)


def loss_mask() -> list[Case]:
    padded = marks("111110", "111000", "111111")
    tools = marks("110011", "111111", "101101")

    def case(name: str, why: str, tool_mask: Array, truncated: list[bool], *rivals: Rival) -> Case:
        inputs = {"completion_mask": padded, "tool_mask": tool_mask, "truncated": np.array(truncated)}
        return Case(name, why, inputs, rivals)

    kept = Rival(
        "truncated completions train",
        "mask = completion_mask and tool_mask",
        "another convention",
        change={"truncated": np.zeros(3, dtype=bool)},
    )
    return [
        case("padding", "Only padding is left out.", np.ones_like(padded), [False] * 3),
        case("tool results", "Tokens that a tool wrote do not train, nor count.", tools, [False] * 3, NO_TOOLS),
        case(
            "truncated",
            "A completion that hit the limit is left out of both sums.",
            np.ones_like(padded),
            [False, False, True],
            COUNTED,
            kept,
        ),
        case("tools and truncated", "Both at once.", tools, [True, False, False], NO_TOOLS, COUNTED, kept),
        case("all truncated", "No token trains: the denominator is 0.", tools, [True] * 3, COUNTED, kept),
    ]


# ---- loss_weights --------------------------------------------------------------------------------------------------


def mean_of_means(mask: Array, micro_batch: Array, level: str, length: int) -> Outputs:
    weights = np.zeros(mask.shape)
    numbers = sorted(set(micro_batch.tolist()))
    for number in numbers:
        rows = [i for i in range(len(mask)) if micro_batch[i] == number]
        own = reference.loss_weights(mask[rows], np.zeros(len(rows), np.int64), level, length)["weights"]
        weights[rows] = own / len(numbers)
    return {"weights": weights}


MEAN_OF_MEANS = Rival(
    "mean of micro-batch means",
    "each micro-batch divides by its own tokens or rows, then by their number",
    "allenai/open-instruct#1137, huggingface/trl#3231",
    function=mean_of_means,
)


def other_level(level: str, length: int = 0) -> Rival:
    what = {"token": "mean over tokens", "sequence": "mean over rows of means", "constant": f"divided by {length}"}
    return Rival(f'level "{level}"', what[level], "another convention", change={"level": level, "length": length})


def loss_weights() -> list[Case]:
    uneven = marks("11111111", "11000000", "11110000", "10000000")
    holes = marks("11001110", "00000000", "11111111", "10100000")

    def case(name: str, why: str, mask: Array, micro: Array, level: str, length: int, *rivals: Rival) -> Case:
        return Case(name, why, {"mask": mask, "micro_batch": micro, "level": level, "length": length}, rivals)

    pairs = integers(0, 0, 1, 1)
    return [
        case(
            "tokens, one micro-batch",
            "The plain mean over tokens.",
            uneven,
            integers(0, 0, 0, 0),
            "token",
            0,
            other_level("sequence"),
        ),
        case(
            "tokens, two micro-batches",
            "10 and 5 tokens: a token weighs the same in both.",
            uneven,
            pairs,
            "token",
            0,
            MEAN_OF_MEANS,
            other_level("sequence"),
        ),
        case(
            "tokens, a row each",
            "Four micro-batches of one row, the usual case in accumulation.",
            uneven,
            integers(0, 1, 2, 3),
            "token",
            0,
            MEAN_OF_MEANS,
        ),
        case(
            "tokens, an empty row",
            "A completion that is left out adds nothing to either sum.",
            holes,
            pairs,
            "token",
            0,
            MEAN_OF_MEANS,
        ),
        case(
            "sequences, uneven micro-batches",
            "Three rows and one row: a row weighs the same in both.",
            uneven,
            integers(0, 0, 0, 1),
            "sequence",
            0,
            MEAN_OF_MEANS,
            other_level("token"),
        ),
        case(
            "constant",
            "Dr. GRPO: a token weighs the same whatever the length of its completion.",
            uneven,
            pairs,
            "constant",
            8,
            other_level("token"),
            other_level("sequence"),
        ),
    ]


# ---- policy_loss and sequence_ratio --------------------------------------------------------------------------------


def of_terms(term: Any) -> Any:
    """A token-level loss from the term of one token and its derivative, for rivals."""

    def loss(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, level: str, **rest: Any) -> Outputs:
        weights = reference.loss_weights(mask, np.zeros(len(mask), np.int64), level, 0)["weights"]
        total, gradient = 0.0, np.zeros(mask.shape)
        for i, t in np.ndindex(mask.shape):
            if mask[i, t]:
                rho = exp(float(logprobs[i, t] - old_logprobs[i, t]))
                value, slope = term(rho, float(advantages[i]), float(logprobs[i, t]), **rest)
                total -= weights[i, t] * value
                gradient[i, t] = -weights[i, t] * slope
        return {"loss": float(total), "gradient": gradient}

    return loss


def bounded(rho: float, clip_low: float, clip_high: float) -> float:
    return min(max(rho, 1 - clip_low), 1 + clip_high)


def unclipped_term(rho: float, A: float, logprob: float, **rest: Any) -> tuple[float, float]:
    return rho * A, rho * A


def optimistic_term(rho: float, A: float, logprob: float, *, clip_low: float, clip_high: float, **rest: Any) -> Any:
    clipped = bounded(rho, clip_low, clip_high) * A
    return max(rho * A, clipped), rho * A if rho * A >= clipped else 0.0


def only_clipped_term(rho: float, A: float, logprob: float, *, clip_low: float, clip_high: float, **rest: Any) -> Any:
    inside = 1 - clip_low < rho < 1 + clip_high
    return bounded(rho, clip_low, clip_high) * A, rho * A if inside else 0.0


def detached_weight_term(
    rho: float, A: float, logprob: float, *, clip_low: float, clip_high: float, **rest: Any
) -> tuple[float, float]:
    weight = bounded(rho, clip_low, clip_high)
    return weight * A * logprob, weight * A


def inert(loss: Any) -> Any:
    return lambda **inputs: {"gradient": np.zeros_like(loss(**inputs)["gradient"])}


def ascends(loss: Any) -> Any:
    def flipped(**inputs: Any) -> Outputs:
        outputs = loss(**inputs)
        return {"loss": -outputs["loss"], "gradient": -outputs["gradient"]}

    return flipped


UNCLIPPED = Rival("no clip", "rho A", "another convention", function=of_terms(unclipped_term))
OPTIMISTIC = Rival("max in place of min", "max(rho A, clip(rho) A)", "a sign slip", function=of_terms(optimistic_term))
ONLY_CLIPPED = Rival("clip alone", "clip(rho) A", "PPO without its min", function=of_terms(only_clipped_term))
CISPO = Rival(
    "CISPO",
    "stop_gradient(clip(rho)) A log pi",
    "MiniMax-M1 (arXiv 2506.13585)",
    function=of_terms(detached_weight_term),
)
ASCENDS = Rival("sign flipped", "+ sum(w term)", "a sign slip", function=ascends(reference.policy_loss))
INERT = Rival(
    "no gradient", "the ratio is detached", "a loss that trains nothing", function=inert(reference.policy_loss)
)


def summed_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Outputs:
    ratio = [
        exp(math.fsum(float(logprobs[i, t] - old_logprobs[i, t]) for t in range(mask.shape[1]) if mask[i, t]))
        for i in range(len(mask))
    ]
    return {"ratio": np.array(ratio)}


def padded_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Outputs:
    return reference.sequence_ratio(
        np.where(mask, logprobs, 0.0), np.where(mask, old_logprobs, 0.0), np.ones_like(mask)
    )


def summed_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: float,
    clip_high: float,
    **rest: Any,
) -> Outputs:
    """GSPO with the product of the ratios."""
    terms, gradient = [], np.zeros(mask.shape)
    for i, rho in enumerate(summed_ratio(logprobs, old_logprobs, mask)["ratio"].tolist()):
        A = float(advantages[i])
        clipped = bounded(rho, clip_low, clip_high) * A
        terms.append(min(rho * A, clipped))
        if rho * A <= clipped:
            gradient[i] = np.where(mask[i], -rho * A / len(mask), 0.0)
    return {"loss": -mean(terms), "gradient": gradient}


def logprob_rows(seed: int, rows: int, tokens: int, gap: float) -> tuple[Array, Array]:
    draw = Draw(seed)
    old = -draw.numbers(0.1, 3, rows, tokens)
    return np.minimum(np.round(old + draw.numbers(-gap, gap, rows, tokens), 2), -0.01), old


def policy_loss() -> list[Case]:
    new, old = logprob_rows(2, 3, 5, 0.6)
    mask, holes = marks("11111", "11100", "11110"), marks("11001", "11100", "01110")
    advantages = np.array([1.0, -1.0, 0.5])

    def case(name: str, why: str, *rivals: Rival, **changed: Any) -> Case:
        plain = {
            "logprobs": new,
            "old_logprobs": old,
            "advantages": advantages,
            "mask": mask,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": 0.0,
            "ratio": "token",
            "level": "token",
        }
        return Case(name, why, plain | changed, rivals)

    def level(name: str) -> Rival:
        return Rival(f'level "{name}"', other_level(name).formula, "another convention", change={"level": name})

    far, near = np.array([[-3.0, -1.0, -0.2]] * 2), np.array([[-1.0, -1.1, -2.2]] * 2)
    close, start = logprob_rows(3, 2, 6, 0.02)
    close = np.round(close + Draw(4).numbers(-0.002, 0.002, 2, 6, digits=4), 4)
    return [
        case(
            "clipped, tokens",
            "Ratios on both sides of the clip, advantages of both signs.",
            UNCLIPPED,
            OPTIMISTIC,
            ONLY_CLIPPED,
            CISPO,
            ASCENDS,
            INERT,
            level("sequence"),
        ),
        case(
            "clipped, sequences",
            "The paper's mean over outputs of means over tokens.",
            level("token"),
            UNCLIPPED,
            level="sequence",
        ),
        case(
            "clip higher",
            "DAPO's 0.2 below and 0.28 above, with ratios between 1.2 and 1.28.",
            Rival("symmetric clip", "clip(rho, 0.8, 1.2)", "another convention", change={"clip_high": 0.2}),
            Rival("bounds exchanged", "clip(rho, 0.72, 1.2)", "a slip", change={"clip_low": 0.28, "clip_high": 0.2}),
            logprobs=np.array([[-0.76, -1.0, -0.5]]),
            old_logprobs=np.array([[-1.0, -0.71, -0.5]]),
            advantages=np.array([1.0]),
            mask=marks("111"),
            clip_high=0.28,
        ),
        case(
            "dual clip",
            "A ratio of 7.4 with a negative advantage is bounded by 3 A; with a positive one the usual clip binds.",
            Rival("no dual clip", "min(rho A, clip(rho) A)", "another convention", change={"dual_clip": 0.0}),
            logprobs=near,
            old_logprobs=far,
            advantages=np.array([-2.0, 0.5]),
            mask=marks("111", "111"),
            dual_clip=3.0,
        ),
        case(
            "tool tokens",
            "Masked tokens inside a row change neither the sum nor the denominator.",
            Rival("mask ignored", "every token trains", "a dropped mask", change={"mask": np.ones_like(holes)}),
            Rival("padding alone masked", "tool tokens train", "huggingface/trl#6439", change={"mask": mask}),
            mask=holes,
        ),
        case(
            "first update",
            "pi = pi_old: every ratio is 1, and yet there is a gradient.",
            INERT,
            ASCENDS,
            logprobs=old,
        ),
        case(
            "GSPO",
            "One ratio per row, with GSPO's narrow clip.",
            Rival("token ratios", "rho per token", "GRPO in place of GSPO", change={"ratio": "token"}),
            Rival("summed log-ratio", "s = exp(sum of log-ratios)", "huggingface/trl#5815", function=summed_loss),
            logprobs=close,
            old_logprobs=start,
            advantages=np.array([1.0, -1.0]),
            mask=marks("111111", "111000"),
            clip_low=3e-4,
            clip_high=4e-4,
            ratio="sequence",
            level="sequence",
        ),
        case(
            "GSPO unclipped",
            "The gradient of the row's ratio reaches each of its tokens with 1/|o|.",
            Rival("summed log-ratio", "s = exp(sum of log-ratios)", "huggingface/trl#5815", function=summed_loss),
            Rival("token ratios", "rho per token", "GRPO in place of GSPO", change={"ratio": "token"}),
            clip_low=0.5,
            clip_high=0.5,
            ratio="sequence",
            level="sequence",
        ),
    ]


def sequence_ratio() -> list[Case]:
    new, old = logprob_rows(5, 3, 8, 0.4)
    summed = Rival(
        "summed", "exp(sum of log-ratios)", "huggingface/trl#5814, huggingface/trl#5815", function=summed_ratio
    )
    padded = Rival("mean over the padded row", "sum / T in place of sum / |o|", "a padded mean", function=padded_ratio)
    inputs = {"logprobs": new, "old_logprobs": old, "mask": marks("11111111", "11100000", "10110100")}
    drift = old - 0.05  # every token 5 % less likely
    return [
        Case("rows of several lengths", "Padding and holes do not count.", inputs, (summed, padded)),
        Case(
            "long row",
            "A steady gap of 0.05 per token gives 0.951, whatever the length.",
            {
                "logprobs": np.repeat(drift[:1], 4, 1),
                "old_logprobs": np.repeat(old[:1], 4, 1),
                "mask": np.ones((1, 32), dtype=bool),
            },
            (summed,),
        ),
    ]


# ---- divergences ---------------------------------------------------------------------------------------------------


def kl_terms() -> list[Case]:
    draw = Draw(6)
    own, ref, old = (-draw.numbers(0.2, 2.5, 6) for _ in range(3))

    def exchanged(logprobs: Array, ref_logprobs: Array, old_logprobs: Array, form: str) -> Outputs:
        other = reference.kl_terms(ref_logprobs, logprobs, old_logprobs, form)["kl"]
        slope = {"k1": -np.ones(6), "k2": logprobs - ref_logprobs}.get(form)
        if slope is None:
            slope = np.array([exp(float(d)) - 1 for d in logprobs - ref_logprobs])
        return {"kl": other, "gradient": slope}

    def straight(logprobs: Array, ref_logprobs: Array, **rest: Any) -> Outputs:
        return {"gradient": logprobs - ref_logprobs}

    def absolute(logprobs: Array, ref_logprobs: Array, **rest: Any) -> Outputs:
        gap = logprobs - ref_logprobs
        return {"kl": np.abs(gap), "gradient": np.sign(gap)}

    swap = Rival("pi and pi_ref exchanged", "d = log pi_ref - log pi", "RAGEN#58 (verl's sign)", function=exchanged)
    plus = Rival(
        "k3 with k2's gradient", "value of k3, gradient d (verl's k3+)", "another convention", function=straight
    )

    def still(**inputs: Any) -> Outputs:
        """k3-unbiased whose ratio is detached."""
        terms = reference.kl_terms(**(inputs | {"form": "k3"}))
        rho = np.array([exp(float(d)) for d in inputs["logprobs"] - inputs["old_logprobs"]])
        return {"gradient": rho * terms["gradient"]}

    def case(form: str, why: str, *rivals: Rival) -> Case:
        return Case(form, why, {"logprobs": own, "ref_logprobs": ref, "old_logprobs": old, "form": form}, rivals)

    return [
        case(
            "k1",
            "Unbiased, of either sign; its gradient says nothing about pi_ref.",
            swap,
            Rival("absolute", "|d|", "a form that some libraries call abs", function=absolute),
        ),
        case(
            "k2",
            "Half the square; its gradient is that of KL(pi | pi_ref) for samples of pi.",
            Rival(
                "undivided",
                "d^2",
                "a missing half",
                function=lambda **inputs: {name: 2 * value for name, value in reference.kl_terms(**inputs).items()},
            ),
        ),
        case("k3", "Never negative; its gradient is not that of KL(pi | pi_ref).", swap, plus),
        case(
            "k3-unbiased",
            "DeepSeek-V3.2: k3 times the ratio to the sampler, gradient through both.",
            Rival("k3 without the ratio", "k3", "DeepSeekMath eq. 4", change={"form": "k3"}),
            Rival("ratio detached", "stop_gradient(rho) k3", "another convention", function=still),
        ),
    ]


def kl_loss() -> list[Case]:
    own, ref = logprob_rows(7, 2, 4, 0.8)
    mask = marks("1111", "1000")
    minus = Rival(
        "sign flipped",
        "- beta sum(w kl): pushes pi away from pi_ref",
        "RAGEN#58",
        function=ascends(reference.kl_loss),
    )
    dead = Rival(
        "inert",
        "the term is in the loss, but its gradient is 0",
        "a loss that trains nothing",
        function=inert(reference.kl_loss),
    )

    def with_score(logprobs: Array, ref_logprobs: Array, mask: Array, beta: float, form: str, level: str) -> Outputs:
        """The same loss; its gradient is that of the expectation, whose samples depend on pi, too."""
        outputs = reference.kl_loss(logprobs, ref_logprobs, mask, beta, form, level)
        weights = reference.loss_weights(mask, np.zeros(len(mask), np.int64), level, 0)["weights"]
        kl = [reference.kl_terms(logprobs[b], ref_logprobs[b], logprobs[b], form)["kl"] for b in range(len(mask))]
        return {"gradient": outputs["gradient"] + beta * weights * np.stack(kl)}

    score = Rival(
        "score-function term too",
        "exp(log pi - stop_gradient(log pi)) kl",
        "arXiv 2506.09477; NVIDIA-NeMo/RL",
        function=with_score,
    )

    def case(form: str, level: str, why: str, *rivals: Rival) -> Case:
        other = "sequence" if level == "token" else "token"
        rivals = (*rivals, score)
        inputs = {"logprobs": own, "ref_logprobs": ref, "mask": mask, "beta": 0.04, "form": form, "level": level}
        rivals = (
            *rivals,
            Rival(f'level "{other}"', other_level(other).formula, "another convention", {"level": other}),
        )
        return Case(f"{form}, {level}s", why, inputs, rivals)

    return [
        case("k3", "token", "GRPO's term in a mean over tokens.", minus, dead),
        case("k3", "sequence", "GRPO's term in a mean over outputs.", minus, dead),
        case("k2", "token", "Its gradient has the sign of d.", minus, dead),
        case("k1", "token", "In a loss, k1's gradient is beta times the weight, whatever pi_ref is.", minus),
    ]


def kl_reward() -> list[Case]:
    own, ref = logprob_rows(8, 3, 5, 0.5)
    inputs = {
        "rewards": np.array([1.0, 0.0, 0.5]),
        "logprobs": own,
        "ref_logprobs": ref,
        "mask": marks("11111", "11100", "11000"),
        "beta": 0.1,
    }

    def at_the_end(rewards: Array, logprobs: Array, ref_logprobs: Array, mask: Array, beta: float) -> Outputs:
        only_kl = reference.kl_reward(np.zeros(3), logprobs, ref_logprobs, mask, beta)["token_rewards"]
        only_kl[:, -1] += rewards
        return {"token_rewards": only_kl}

    def everywhere(rewards: Array, logprobs: Array, ref_logprobs: Array, mask: Array, beta: float) -> Outputs:
        only_kl = reference.kl_reward(np.zeros(3), logprobs, ref_logprobs, mask, beta)["token_rewards"]
        return {"token_rewards": only_kl + np.where(mask, rewards[:, None], 0.0)}

    return [
        Case(
            "padded rows",
            "The reward stands at the last token, not in the padding; the penalty is negative.",
            inputs,
            (
                Rival("penalty as a bonus", "+ beta d", "RAGEN#58 (verl's sign)", change={"beta": -0.1}),
                Rival("reward in the padding", "at position T - 1", "a padded row", function=at_the_end),
                Rival(
                    "reward at every token", "r + penalty for every token", "another convention", function=everywhere
                ),
            ),
        ),
    ]


def positive_nll() -> list[Case]:
    own, _ = logprob_rows(12, 4, 5, 0.5)
    mask = marks("11111", "11000", "11110", "11100")

    def by_micro_batch(logprobs: Array, mask: Array, rewards: Array, micro_batch: Array, weight: float) -> Outputs:
        """Each micro-batch divides by its own tokens; the results add up."""
        loss, gradient = 0.0, np.zeros(mask.shape)
        for number in sorted(set(micro_batch.tolist())):
            rows = micro_batch == number
            part = reference.positive_nll(logprobs[rows], mask[rows], rewards[rows], micro_batch[rows], weight)
            loss += part["loss"]
            gradient[rows] = part["gradient"]
        return {"loss": loss, "gradient": gradient}

    def over_all_tokens(logprobs: Array, mask: Array, rewards: Array, micro_batch: Array, weight: float) -> Outputs:
        share = float(mask[rewards > 0].sum() / mask.sum())
        outputs = reference.positive_nll(logprobs, mask, rewards, micro_batch, weight)
        return {name: share * value for name, value in outputs.items()}

    absent = Rival(
        "inert",
        "the term is switched on, and adds nothing",
        "NVIDIA-NeMo/RL#3792",
        function=lambda **inputs: {"loss": 0.0, "gradient": np.zeros((4, 5))},
    )
    parts = Rival(
        "denominator of each micro-batch",
        "grows with the number of micro-batches",
        "NVIDIA-NeMo/RL#3791",
        function=by_micro_batch,
    )
    wide = Rival(
        "mean over all tokens",
        "rows without reward count in the denominator",
        "another convention",
        function=over_all_tokens,
    )

    def case(name: str, why: str, rewards: Array, micro_batch: Array, *rivals: Rival) -> Case:
        inputs = {"logprobs": own, "mask": mask, "rewards": rewards, "micro_batch": micro_batch, "weight": 0.1}
        return Case(name, why, inputs, rivals)

    return [
        case(
            "one micro-batch",
            "Two of four rows are correct.",
            np.array([1.0, 0, 1, 0]),
            integers(0, 0, 0, 0),
            absent,
            wide,
        ),
        case(
            "two micro-batches",
            "A correct row in each; the division does not change the sum.",
            np.array([1.0, 0, 1, 0]),
            integers(0, 0, 1, 1),
            absent,
            parts,
            wide,
        ),
        case(
            "a row each",
            "Four micro-batches, one of them without a correct row.",
            np.array([1.0, 1, 1, 0]),
            integers(0, 1, 2, 3),
            absent,
            parts,
            wide,
        ),
        case("none correct", "The term is 0, not 0 / 0.", np.zeros(4), integers(0, 0, 1, 1)),
    ]


def rewards_after_evaluation() -> list[Case]:
    texts = [["12", "7", "12"], ["5", "30", "30"], ["8", "8", "9"]]
    gold = ["12", "30", "8"]

    def leaked(texts: list[list[str]], gold: list[str], evaluation_gold: list[str]) -> Outputs:
        """Scored against the evaluation's answers as far as they reach, 0 beyond."""
        rewards = np.zeros((3, 3))
        for p, right in enumerate(evaluation_gold[:3]):
            rewards[p] = [float(text == right) for text in texts[p]]
        return {"rewards": rewards}

    rival = Rival(
        "the evaluation's answers",
        "r[p, g] = 1[texts[p][g] = evaluation_gold[p]]",
        "AgileRL/AgileRL#590",
        function=leaked,
    )

    def case(name: str, why: str, evaluation_gold: list[str], *rivals: Rival) -> Case:
        return Case(name, why, {"texts": texts, "gold": gold, "evaluation_gold": evaluation_gold}, rivals)

    return [
        case("as many problems", "An evaluation batch of the same size.", ["7", "5", "100"], rival),
        case("fewer problems", "A smaller evaluation batch.", ["12", "5"], rival),
        case("no evaluation", "Nothing ran in between.", []),
    ]


def overlong_penalty() -> list[Case]:
    inputs = {
        "lengths": integers(0, 12000, 16384, 16385, 18432, 20480, 20481, 30000),
        "max_length": 20480,
        "buffer": 4096,
    }

    def hard(lengths: Array, max_length: int, buffer: int) -> Outputs:
        return {"penalty": np.where(lengths > max_length, -1.0, 0.0)}

    def late(lengths: Array, max_length: int, buffer: int) -> Outputs:
        return {"penalty": np.clip((max_length - lengths) / buffer, -1.0, 0.0)}

    rivals = (
        Rival("hard limit", "-1 beyond max, else 0", "another convention", function=hard),
        Rival("slope beyond the limit", "(max - length) / buffer", "the limit without the buffer", function=late),
    )
    return [Case("DAPO's limits", "20,480 tokens, the last 4,096 of them on the slope.", inputs, rivals)]
