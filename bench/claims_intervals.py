"""Every interval on the claims page, computed again from the committed results by a program of its own.

    bessemer claims --part none --json > claims.json
    python bench/claims_intervals.py claims.json [--results FOLDER]

Numpy alone, and nothing of this project: Student's quantile by bisection on an integral, Newcombe's interval for
published scores, the definitions of all metrics once more. Compares mean, ends, positive control and p value of every
part, those beside the rules included, with the JSON to one part in a billion; exits with 1 if one differs or has no
definition here. Figures of the recipe r1-small, printed in docs/results.md and without runs, are only counted.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

COMMITTED = Path(__file__).parents[1] / "claims" / "src" / "bessemer_claims" / "committed"

SHAPES = {  # how the page names a size -> the shape in the results
    "network 64 wide, 2 layers, 250K tokens read": "nano", "network 128 wide, 4 layers, 500K tokens read": "short",
    "network 128 wide, 4 layers, 1.5M tokens read": "claims", "network 256 wide, 4 layers, 1.5M tokens read": "wide",
    "network 256 wide, 2 layers, 280K tokens read": "short", "network 256 wide, 2 layers, 1M tokens read": "whole",
    "an ordinary processor, no GPU": "whole", "an ordinary processor, no GPU; smallest sizes": "small",
}  # fmt: skip
PARTS = {"M": "pretrain", "L": "pretrain", "T": "pretrain", "D": "pretrain", "F": "machine", "P": "machine"}
PARTS |= {"Z": "zero", "R": "zero", "G": "zero", "F7": "fp8", "D2": "long"}
PARTS |= dict.fromkeys(("L7", "L9", "L10", "T5"), "machine")
SHARES = {
    "fables": 0.16, "web": 0.14, "fables-zh": 0.15, "idioms": 0.05, "code": 0.13, "countdown": 0.19,
    "arithmetic": 0.05, "needles": 0.13,
}  # fmt: skip
Seed = dict[str, dict[str, float]]
"""Arm -> its numbers, of one seed."""
Value = Callable[[Seed], float]


def gap(number: str, one: str, other: str, times: float = 1.0) -> Value:
    return lambda s: times * (s[one][number] - s[other][number])


def relative(number: str, one: str, other: str) -> Value:
    return lambda s: s[one][number] / s[other][number] - 1


def own(arm: str, number: str, over: str = "") -> Value:
    return lambda s: s[arm][number] / (s[arm][over] if over else 1)


def points(one: str, other: str) -> Value:
    return gap("pass@1", one, other, 100)


def weighted(one: str, other: str) -> Value:
    return lambda s: sum(share * (s[one][f"bpb_{p}"] - s[other][f"bpb_{p}"]) for p, share in SHARES.items())


def noise(noisy: str, clean: str, other_noisy: str, other: str) -> Value:
    def cost(s: Seed, worse: str, better: str) -> float:
        return s[worse]["bpb"] - s[better]["bpb"]

    return lambda s: cost(s, noisy, clean) - cost(s, other_noisy, other)


def unpaid(one: str, other: str) -> Value:
    names = ("pass@1 arithmetic", "pass@1 general")
    return lambda s: 100 * sum(s[one][name] - s[other][name] for name in names) / 2


def shots(kind: str) -> Value:
    def gain(numbers: dict[str, float]) -> float:
        return 100 * (numbers[f"pass@1 3 {kind}"] - numbers["pass@1"])

    return lambda s: gain(s["right"]) - gain(s["base"])


def above_the_better(one: str) -> Value:
    def value(s: Seed) -> float:
        better = max(s["ref"]["copy"], s["ref" if one == "LONG" else "MTPx"]["copy"])
        return s[one]["copy"] - better

    return value


def grouped(s: Seed) -> float:
    caches, at = s["caches"], "2048 x 16"
    fewer = caches["bytes groups"] < caches["bytes keys"]
    return float(fewer and caches[f"us groups {at}"] < caches[f"us keys {at}"])


MORE_MASKED = gap("rise_best_4", "NL", "NS")
METRICS: dict[str, tuple[Value, Value | None]] = {
    # (what is measured, its positive control), of the runs of a seed
    "M5 bpb(ref) - bpb(DACT)": (gap("bpb", "ref", "DACT"), gap("bpb", "DTOT", "DACT")),
    "M17 bpb(ref) / bpb(DTOT) - 1": (relative("bpb", "ref", "DTOT"), relative("bpb", "DACT", "DTOT")),
    "M3 share of the way from DACT to DTOT": (
        lambda s: (s["DACT"]["bpb"] - s["ref"]["bpb"]) / (s["DACT"]["bpb"] - s["DTOT"]["bpb"]),
        lambda s: float(s["DTOT"]["bpb"] < s["DACT"]["bpb"]),
    ),
    "M16 held-out - train bpb: ref - DACT": (
        gap("overfit", "MULTI", "MULTI-DACT"), gap("overfit", "MULTI-DACT", "MULTI-DTOT"),
    ),
    "M15 loss by noise: ref - DACT": (
        noise("NOISE", "ref", "NOISE-DACT", "DACT"), noise("NOISE", "ref", "HALF", "ref"),
    ),
    "M15 loss by noise: ref - DTOT": (
        noise("NOISE", "ref", "NOISE-DTOT", "DTOT"), noise("NOISE", "ref", "HALF", "ref"),
    ),
    "M20 spikes a run: ref - DACT": (
        gap("spikes", "spikes-ref", "spikes-DACT"), gap("spikes", "spikes-TEN", "spikes-ref"),
    ),
    "M20 spikes a run: NONE - DACT": (
        gap("spikes", "spikes-NONE", "spikes-DACT"), gap("spikes", "spikes-TEN", "spikes-ref"),
    ),
    "M20 spikes a run, three times the rate: ref - DACT": (gap("spikes", "spikes-THREE", "spikes-THREE-DACT"), None),
    "M20 spikes a run, ten times the rate: ref - DACT": (gap("spikes", "spikes-TEN", "spikes-TEN-DACT"), None),
    "M4 tokens/s(ref) / tokens/s(DACT)": (own("speed", "ref/DACT"), None),
    "M19 tokens/s(ref) / tokens/s(DACT)": (own("speed", "ref/DACT"), None),
    "M6 bpb(NL) - bpb(CO)": (gap("bpb", "NL", "CO"), gap("bpb", "DTOT", "CO")),
    "M7 rise of bpb, best experts masked: NL - NS": (gap("rise_best_2", "NL", "NS"), MORE_MASKED),
    "M7 bpb(NL) - bpb(NS)": (gap("bpb", "NL", "NS"), gap("bpb", "DTOT", "NS")),
    "M8 damage to the own domain - to others: NL - NS": (gap("damage", "NL", "NS"), gap("damage", "HASH", "NS")),
    "M9 bpb on unread domains: NL - NS": (gap("bpb_unread", "NL", "NS"), gap("bpb_unread", "DTOT", "NS")),
    "M10 bpb(ref) / bpb(NL) - 1": (relative("bpb", "ref", "NL"), relative("bpb", "LIM1", "NL")),
    "M11 MaxVio(ref) - MaxVio(NONE)": (gap("maxvio", "ref", "NONE"), lambda s: 0.1 - s["NONE"]["maxvio"]),
    "M11 bpb(ref) / bpb(AUX) - 1": (relative("bpb", "ref", "AUX"), relative("bpb", "HASH", "AUX")),
    "M2 damage to the own domain - to others": (own("ref", "damage"), own("HASH", "damage")),
    "M14 information on domains: experts - dense neurons": (
        gap("information", "ref", "DACT"), gap("information", "HASH", "DACT"),
    ),
    "L1 bpb(MHA) - bpb(ONE)": (gap("bpb", "MHA", "ONE"), None),
    "L2 held-out - train bpb: MHA - ONE": (gap("overfit", "MULTI-MHA", "MULTI-ONE"), None),
    "L6 bpb(ref) / bpb(MHA) - 1": (relative("bpb", "ref", "MHA"), relative("bpb", "MLA-24", "MHA")),
    "L6 bpb(ref) / bpb(MHA-norm) - 1": (relative("bpb", "ref", "MHA-norm"), relative("bpb", "MLA-24", "MHA-norm")),
    "L6 bpb(ref) / bpb(MHA) - 1, twice as wide": (relative("bpb", "ref", "MHA"), None),
    "M5 bpb(ref) - bpb(DACT), twice as wide": (gap("bpb", "ref", "DACT"), None),
    "L2 s a step: ONE / MHA": (own("speed-heads", "ONE/MHA"), None),
    "L8 s a step: MHA / ref": (own("speed", "MHA/ref"), None),
    "L12 copy(ref) - copy(MHA)": (gap("copy", "ref", "MHA"), gap("copy", "MLA-24", "MHA")),
    "T4 copy(MTP) - the better of ref and MTPx": (above_the_better("MTP"), above_the_better("LONG")),
    "T4 copy(PAR) - the better of ref and MTPx": (above_the_better("PAR"), above_the_better("LONG")),
    "T4 copy(MTP) - copy(PAR)": (gap("copy", "MTP", "PAR"), gap("copy", "LONG", "ref")),
    "T6 needle at the longest distance: MTP - ref": (gap("needle_240", "MTP", "ref"), gap("needle_240", "LONG", "ref")),
    "T7 bpb of code: MTP - ref": (gap("bpb_code", "MTP", "ref"), gap("bpb_code", "LONG", "ref")),
    "T7 bpb of code: PAR - ref": (gap("bpb_code", "PAR", "ref"), gap("bpb_code", "LONG", "ref")),
    "T10 cloze of four: MTP - ref": (gap("cloze", "MTP", "ref"), lambda s: 0.25 - s["ref"]["cloze"]),
    "T12 copy(MTP) - copy(LONG)": (gap("copy", "MTP", "LONG"), None),
    "D1 bpb(GROW) - bpb(ref)": (gap("bpb", "GROW", "ref"), None),
    "D3 weighted bpb(ref) - bpb(PROP)": (weighted("ref", "PROP"), None),
    "D4 weighted bpb(LATE) - bpb(ref)": (weighted("LATE", "ref"), None),
    "D2 needle at 2,048, after - before": (lambda s: s["long"]["after"] - s["long"]["before"], None),
    "D2 needle at 2,048, new positions without training - before": (
        lambda s: s["long"]["switched"] - s["long"]["before"], None,
    ),
    "P2 idle share: DualPipe / 1F1B": (
        own("pipelines", "idle dualpipe", "idle 1f1b"), own("pipelines", "idle zb1p", "idle 1f1b"),
    ),
    "P3 share of the exchange hidden": (own("pipelines", "hidden"), None),
    "P6 optimizer bytes, two replicas / one": (own("optimizer", "share"), None),
    "F3 bytes kept, FP8 / BF16": (own("bytes", "share"), None),
    "F6 error, not promoted / promoted": (own("sums", "ratio"), None),
    "F7 training loss, FP8 / BF16 - 1, %": (own("fp8", "training"), own("coarse", "training")),
    "F7 held-out, FP8 / BF16 - 1, %": (own("fp8", "heldout"), own("coarse", "heldout")),
    "F7 training loss, powers of two / BF16 - 1, %": (own("coarsest", "training"), None),
    "F7 held-out, powers of two / BF16 - 1, %": (own("coarsest", "heldout"), None),
    "L7 s a token, keys and values / latents, longest": (
        own("caches", "us keys 2048 x 16", "us latents 2048 x 16"), own("caches", "us none 2048", "us keys 2048"),
    ),
    "L9 s a token without cache, 2,048 / 128 tokens": (own("caches", "us none 2048", "us none 128"), None),
    "L10 dominated ways, measured": (own("caches", "dominated"), None),
    "L10 dominated ways, with grouped heads, measured": (grouped, None),
    "T5 wall ratio, best number of guesses": (own("drafts", "unseen"), own("drafts", "memorised")),
    "Z2 pass@1 after - before, points": (points("right", "base"), points("rounds", "base")),
    "Z3 pass@1, right - coin, points": (
        points("right", "coin"), lambda s: 100 * (s["rounds"]["pass@1"] - s["base"]["best"]),
    ),
    "Z3 pass@1, right - fine-tuned on the same answers, points": (points("right", "same-tokens"), None),
    "Z3 pass@1, right - four rounds of fine-tuning, points": (points("right", "rounds"), None),
    "Z3 pass@1, right - form, points": (points("right", "form"), None),
    "Z3 pass@1 after - before, no systematic pages, points": (
        points("dose-0-right", "dose-0"), points("rounds", "base"),
    ),
    "Z3 pass@1 after - before, few systematic pages, points": (
        points("dose-3-right", "dose-3"), points("rounds", "base"),
    ),
    "Z3 pass@1 after - pass@64 before, points": (
        lambda s: 100 * (s["right"]["pass@1"] - s["base"]["pass@64"]), None,
    ),
    "Z4 readable share after - before": (gap("readable", "right", "base"), None),
    "Z5 language consistency after - before, clean corpus": (
        gap("language", "right", "base"), gap("language", "mixed-right", "mixed"),
    ),
    "Z6 answers that repeat, after - before": (gap("repeat", "right", "base"), None),
    "Z7 (few - zero shots) of R1-Zero - of the base, points": (shots("worked"), shots("direct")),
    "Z8 change on unpaid tasks, points": (unpaid("right", "base"), points("right", "base")),
    "Z10 everyday requests, R1-Zero - base, points": (
        gap("pass@1 general", "right", "base", 100), gap("pass@1 general", "cold", "base", 100),
    ),
    "R1 readable share, cold start - base": (gap("readable", "cold", "base"), None),
    "R1 pass@1, second stage - cold start, points": (points("dev2", "cold"), None),
    "R1 pass@1 on other tasks, third stage - second, points": (unpaid("dev3", "dev2"), None),
    "R1 everyday requests, last stage - third, points": (gap("pass@1 general", "r1", "dev3", 100), None),
    "R2 language consistency, with - without the reward": (gap("language", "mixed-language", "mixed-right"), None),
    "R2 language consistency, with a third of the reward - without": (
        gap("language", "mixed-little", "mixed-right"), None,
    ),
    "R2 pass@1, with - without, points": (points("mixed-language", "mixed-right"), None),
    "R3 readable share, cold start - base": (gap("readable", "cold", "base"), None),
    "R3 pass@1, cold start - base, points": (points("cold", "base"), None),
    "R4 pass@1, checked - unchecked, points": (points("checked", "unchecked"), points("checked", "wrong")),
    "R5 readable share, R1 - R1-Zero": (gap("readable", "r1", "right"), None),
    "R5 readable share, R1 - base": (gap("readable", "r1", "base"), gap("readable", "right", "base")),
    "R5 language consistency, R1 - R1-Zero": (gap("language", "r1", "right"), None),
    "R5 answers that repeat, R1 - R1-Zero": (gap("repeat", "r1", "right"), None),
    "R6 pass@1, distilled - own RL, points": (points("distilled", "student-rl"), points("right", "student-rl")),
    "G3 CPU s a rollout, PPO / GRPO": (lambda s: s["ppo"]["cpu_s"] / s["right"]["cpu_s"], None),
    "G3 CPU s a rollout, PPO on groups / GRPO": (lambda s: s["ppo-groups"]["cpu_s"] / s["right"]["cpu_s"], None),
    "G4 pass@1 at equal rollouts, GRPO - PPO, points": (points("right", "ppo"), points("right", "coin")),
    "G4 pass@1, GRPO - PPO on groups, points": (points("right", "ppo-groups"), points("right", "coin")),
    "G4 pass@1, GRPO - PPO with lambda 0.95, points": (points("right", "ppo-short"), points("right", "coin")),
    "G4 pass@1, GRPO - the mean of all answers, points": (points("right", "batch-mean"), points("right", "coin")),
    "G4 pass@1, groups of 16 - groups of 4, points": (points("right", "small-groups"), points("right", "coin")),
}  # fmt: skip
WORST = "M22 worst part: bpb(ref) - bpb(DACT)"


def worst_part(seeds: list[Seed], one: str, other: str) -> list[float]:
    """Every seed's gap in the part that is worst in the mean of the other seeds."""
    gaps = np.array([[s[one][f"bpb_{part}"] - s[other][f"bpb_{part}"] for part in SHARES] for s in seeds])
    worst = [np.delete(gaps, i, 0).mean(0).argmax() for i in range(len(gaps))]
    return [float(gaps[i, part]) for i, part in enumerate(worst)]


# --- Student, Wilson, Newcombe ---------------------------------------------------------------------------------------


@cache
def rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre's rule."""
    return np.polynomial.legendre.leggauss(400)


def tail(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t: with t = sqrt(n) tan(angle) the density is cos(angle)^(n - 1), so the share of
    the integral from the angle to a right one; Gauss and Legendre's rule with 400 nodes."""
    nodes, weights = rule()

    def beyond(angle: float) -> float:
        half = (math.pi / 2 - angle) / 2
        return float(half * (weights * np.cos(angle + half * (nodes + 1)) ** (degrees - 1)).sum())

    return beyond(math.atan(abs(t) / math.sqrt(degrees))) / beyond(0.0)


@cache
def quantile(degrees: int, outside: float = 0.05) -> float:
    """The t that leaves this much outside, on both sides together, by bisection."""
    low, high = 0.0, 1.0
    while tail(high, degrees) > outside:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > outside else (low, middle)
    return (low + high) / 2


def alike(values: list[float]) -> bool:
    return max(values) - min(values) <= 1e-12 * max(1.0, *map(abs, values))


def interval(values: list[float]) -> list[float]:
    """Mean and ends of the 95 % interval over seeds; the mean three times, if there is no spread."""
    array = np.array(values)
    middle, n = float(array.mean()), len(values)
    if n < 2 or alike(values):
        return [middle] * 3
    reach = quantile(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return [middle, middle - reach, middle + reach]


def p_value(values: list[float], rule: dict[str, Any]) -> float:
    """Two-sided, at threshold and margin; for "equal" two one-sided tests inside the margin."""
    array, threshold, margin = np.array(values), rule.get("threshold") or 0.0, rule.get("margin") or 0.0
    middle, error, degrees = float(array.mean()), float(array.std(ddof=1)) / math.sqrt(len(array)), len(array) - 1
    if rule["side"] == "equal" and abs(middle - threshold) < margin:
        return tail((margin - abs(middle - threshold)) / error, degrees) / 2
    away = {"above": margin, "below": -margin}.get(rule["side"], math.copysign(margin, middle - threshold))
    return tail((middle - threshold - away) / error, degrees)


Z = 1.96


def wilson(share: float, n: int) -> tuple[float, float]:
    middle, half = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def newcombe(one: float, other: float, n: int) -> list[float]:
    """Difference of two scores of n problems in percent, with Newcombe's interval, method 10."""
    (low, high), (other_low, other_high) = wilson(one / 100, n), wilson(other / 100, n)
    one, other = one / 100, other / 100
    down, up = math.hypot(one - low, other_high - other), math.hypot(high - one, other - other_low)
    return [100 * (one - other), 100 * (one - other - down), 100 * (one - other + up)]


# --- the page's JSON against the results -----------------------------------------------------------------------------


def seeds_of(folder: Path) -> dict[tuple[str, str], dict[int, Seed]]:
    """(part, shape) -> seed -> arm -> numbers."""
    found: dict[tuple[str, str], dict[int, Seed]] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()):
            if not row["diverged"]:
                of_seed = found.setdefault((row["part"], row["shape"]), {}).setdefault(row["seed"], {})
                of_seed[row["arm"]] = row["metrics"]
    return found


def over(seeds: dict[int, Seed], value: Value) -> list[float]:
    values = []
    for seed in sorted(seeds):
        try:
            values.append(value(seeds[seed]))
        except KeyError:  # an arm that this seed lacks
            continue
    return values


def measured(claim: str, metric: str, seeds: dict[int, Seed]) -> tuple[list[float], list[float]]:
    """Values by seed, and those of the positive control."""
    key = f"{claim} {metric}"
    if key == WORST:
        sides = [("ref", "DACT"), ("DACT", "DTOT")]
        both = [worst_part([s for _, s in sorted(seeds.items()) if {a, b} <= s.keys()], a, b) for a, b in sides]
        return both[0], both[1]
    value, control = METRICS[key]
    return over(seeds, value), [] if control is None else over(seeds, control)


def same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-9, atol=1e-12)


def check(cards: list[dict[str, Any]], folder: Path) -> tuple[int, int, list[str]]:
    """(intervals and values that agree, figures of which no run is left, a sentence for every one that does not)."""
    results, right, left, wrong = seeds_of(folder), 0, 0, []
    for card in cards:
        for finding in [*card["parts"], *card["beside"]]:
            rule, where = finding["rule"], f"{card['id']} {finding['what']}"
            if rule.get("kind") == "B":
                scores = finding["what"].rsplit(": ", 1)[1].replace("(", "/").replace(")", "").replace(",", "")
                one, other, n = scores.split("/")
                compared = [("interval", finding["interval"], newcombe(float(one), float(other), int(n)))]
            elif rule.get("kind") != "R" or not finding.get("seeds"):
                continue
            elif "r1-small" in finding.get("size", ""):
                left += 1
                continue
            else:
                part = PARTS.get(card["id"], PARTS[card["id"][0]])
                shape = SHAPES.get(finding["size"], {"zero": "countdown", "long": "tiny"}.get(part, ""))
                values, control = measured(card["id"], rule["metric"], results[part, shape])
                middle = interval(values)
                compared = [("seeds", [finding["seeds"]], [len(values)]), ("value", [finding["value"]], middle[:1])]
                if "interval" in finding:
                    compared.append(("interval", finding["interval"], middle))
                if "p" in finding:
                    compared.append(("p", [finding["p"]], [p_value(values, rule)]))
                if "positive_control" in finding:
                    few = finding["seeds"] < 3
                    compared.append(("control", finding["positive_control"], [float(np.mean(control))] * 3 if few
                                     else interval(control)))  # fmt: skip
            for name, printed, ours in compared:
                if same(printed, ours):
                    right += 1
                else:
                    wrong.append(f"{where}: {name} {printed} on the page, {ours} here")
    return right, left, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="what bessemer claims --part none --json printed")
    parser.add_argument("--results", type=Path, default=COMMITTED)
    args = parser.parse_args()
    right, left, wrong = check(json.loads(args.page.read_text())["claims"], args.results)
    for sentence in wrong:
        print(sentence)
    print(f"{right} figures agree, {len(wrong)} differ, {left} are of runs that left only their printed figures")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
