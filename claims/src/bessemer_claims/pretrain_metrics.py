"""How the metrics of the claims' rules follow from the numbers of pre-training arms.

Each entry maps (claim, metric of rules.toml) to a function of the arms' numbers, evaluated for every seed separately,
and the arms that it takes. A control is the same function of other arms: the positive one must show the effect, the
negative one must not. Numbers have the names of `pretrain_measures` and of `pretrain_speed`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from bessemer_claims.runs import Beside, Metric

Numbers = Mapping[str, float]
SPIKES, WIDE = "spikes-", "wide"
"""The prefix for the arm that counts another arm's spikes, and the shape of the arms trained twice as wide."""
BEST = 2
"""How many experts "best experts masked" means; the heavier mask is the positive control."""
LONGEST = "needle_240"
SHARES = {
    "fables": 0.16, "web": 0.14, "fables-zh": 0.15, "idioms": 0.05, "code": 0.13, "countdown": 0.19,
    "arithmetic": 0.05, "needles": 0.13,
}  # fmt: skip
"""The shares of the parts in the reference's mixture: what "weighted" means."""


def own(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: numbers[name]


def gap(name: str) -> Callable[[Numbers, Numbers], float]:
    """The first arm's number minus the second's."""
    return lambda numbers, other: numbers[name] - other[name]


def ratio(name: str) -> Callable[[Numbers, Numbers], float]:
    """The ratio of the first arm's number to the second's, minus 1."""
    return lambda numbers, other: numbers[name] / other[name] - 1


def weighted(numbers: Numbers, other: Numbers) -> float:
    return sum(share * (numbers[f"bpb_{part}"] - other[f"bpb_{part}"]) for part, share in SHARES.items())


def way(between: Numbers, start: Numbers, end: Numbers) -> float:
    """The share of the way from `start` to `end` in bits per byte."""
    return (start["bpb"] - between["bpb"]) / (start["bpb"] - end["bpb"])


def above_the_better(numbers: Numbers, other: Numbers, third: Numbers) -> float:
    return numbers["copy"] - max(other["copy"], third["copy"])


def by_noise(noisy: Numbers, clean: Numbers, other_noisy: Numbers, other_clean: Numbers) -> float:
    """What replaced tokens cost in bits per byte: the first pair's cost minus the second's."""
    return (noisy["bpb"] - clean["bpb"]) - (other_noisy["bpb"] - other_clean["bpb"])


def worst_part(seeds: Sequence[tuple[Numbers, ...]]) -> list[float]:
    """For each seed, the gap in the part that is worst in the mean of the other seeds, since the largest of several
    gaps would be above 0 by chance. With one seed, its own worst."""
    gaps = [{part: numbers[f"bpb_{part}"] - other[f"bpb_{part}"] for part in SHARES} for numbers, other in seeds]
    gaps_of_worst = []
    for index, own_gaps in enumerate(gaps):
        others = gaps[:index] + gaps[index + 1 :] or [own_gaps]
        worst = max(SHARES, key=lambda part: statistics.fmean(numbers[part] for numbers in others))
        gaps_of_worst.append(own_gaps[worst])
    return gaps_of_worst


BPB, COPY, JUMPS = gap("bpb"), gap("copy"), gap("spikes")
RISE = gap(f"rise_best_{BEST}")
AGAIN = ("ref'", "ref")
"""The A/A pair: it must show nothing."""
MASKED = Metric(
    RISE, ("NL", "NS"), ("NL", "NS"), ("NL", "NS"), of_positive=gap("rise_best_4"),
    of_negative=gap(f"rise_random_{BEST}"),
)  # fmt: skip

METRICS: dict[tuple[str, str], Metric] = {
    # experts against dense networks
    ("M5", "bpb(ref) - bpb(DACT)"): Metric(BPB, ("ref", "DACT"), ("DTOT", "DACT"), AGAIN),
    ("M17", "bpb(ref) / bpb(DTOT) - 1"): Metric(ratio("bpb"), ("ref", "DTOT"), ("DACT", "DTOT"), AGAIN),
    ("M3", "share of the way from DACT to DTOT"): Metric(
        way, ("ref", "DACT", "DTOT"), ("DTOT", "DACT"), ("ref'", "ref", "DACT", "DTOT"),
        of_positive=lambda dtot, dact: float(dtot["bpb"] < dact["bpb"]),
        of_negative=lambda again, ref, dact, dtot: (ref["bpb"] - again["bpb"]) / (dact["bpb"] - dtot["bpb"]),
    ),
    ("M22", "worst part: bpb(ref) - bpb(DACT)"): Metric(
        BPB, ("ref", "DACT"), ("DACT", "DTOT"), AGAIN, over=worst_part
    ),
    ("M16", "held-out - train bpb: ref - DACT"): Metric(
        gap("overfit"), ("MULTI", "MULTI-DACT"), ("MULTI-DACT", "MULTI-DTOT"), ("MULTI'", "MULTI")
    ),
    ("M15", "loss by noise: ref - DACT"): Metric(
        by_noise, ("NOISE", "ref", "NOISE-DACT", "DACT"), ("NOISE", "ref", "HALF", "ref"),
        ("NOISE'", "ref'", "NOISE", "ref"),
    ),
    ("M20", "spikes a run: ref - DACT"): Metric(
        JUMPS, ("spikes-ref", "spikes-DACT"), ("spikes-TEN", "spikes-ref"), ("spikes-ref'", "spikes-ref")
    ),
    # no negative control: the reference against itself also lies above M4's threshold of 0.8
    ("M4", "tokens/s(ref) / tokens/s(DACT)"): Metric(own("ref/DACT"), ("speed",)),
    ("M19", "tokens/s(ref) / tokens/s(DACT)"): Metric(
        own("ref/DACT"), ("speed",), (), ("speed",), of_negative=own("ref/ref")
    ),
    # design of the experts
    ("M6", "bpb(NL) - bpb(CO)"): Metric(BPB, ("NL", "CO"), ("DTOT", "CO"), AGAIN),
    ("M7", "rise of bpb, best experts masked: NL - NS"): MASKED,
    ("M7", "bpb(NL) - bpb(NS)"): Metric(BPB, ("NL", "NS"), ("DTOT", "NS"), AGAIN),
    ("M8", "damage to the own domain - to others: NL - NS"): Metric(
        gap("damage"), ("NL", "NS"), ("HASH", "NS"), ("NL", "NS"), of_negative=gap("damage_shuffled")
    ),
    ("M9", "bpb on unread domains: NL - NS"): Metric(gap("bpb_unread"), ("NL", "NS"), ("DTOT", "NS"), AGAIN),
    ("M10", "bpb(ref) / bpb(NL) - 1"): Metric(ratio("bpb"), ("ref", "NL"), ("LIM1", "NL"), AGAIN),
    ("M11", "MaxVio(ref) - MaxVio(NONE)"): Metric(
        gap("maxvio"), ("ref", "NONE"), ("NONE",), AGAIN, of_positive=lambda none: 0.1 - none["maxvio"]
    ),
    ("M11", "bpb(ref) / bpb(AUX) - 1"): Metric(ratio("bpb"), ("ref", "AUX"), ("HASH", "AUX"), AGAIN),
    ("M2", "damage to the own domain - to others"): Metric(
        own("damage"), ("ref",), ("HASH",), ("ref",), of_negative=own("damage_shuffled")
    ),
    ("M14", "information on domains: experts - dense neurons"): Metric(
        gap("information"), ("ref", "DACT"), ("HASH", "DACT"), ("ref", "DACT"),
        of_negative=lambda ref, dact: ref["information_untrained"] - dact["information"],
    ),
    # attention
    ("L1", "bpb(MHA) - bpb(ONE)"): Metric(BPB, ("MHA", "ONE"), (), AGAIN),
    ("L2", "held-out - train bpb: MHA - ONE"): Metric(
        gap("overfit"), ("MULTI-MHA", "MULTI-ONE"), (), ("MULTI'", "MULTI")
    ),
    ("L2", "s a step: ONE / MHA"): Metric(
        own("ONE/MHA"), ("speed-heads",), (), ("speed-heads",), of_negative=own("MHA/MHA")
    ),
    ("L6", "bpb(ref) / bpb(MHA) - 1"): Metric(ratio("bpb"), ("ref", "MHA"), ("MLA-24", "MHA"), AGAIN),
    ("L8", "s a step: MHA / ref"): Metric(own("MHA/ref"), ("speed",), (), ("speed",), of_negative=own("ref/ref")),
    ("L12", "copy(ref) - copy(MHA)"): Metric(COPY, ("ref", "MHA"), ("MLA-24", "MHA"), AGAIN),
    # multi-token prediction
    ("T4", "copy(MTP) - the better of ref and MTPx"): Metric(
        above_the_better, ("MTP", "ref", "MTPx"), ("LONG", "ref", "ref"), ("MTPx", "ref", "ref")
    ),
    ("T6", "needle at the longest distance: MTP - ref"): Metric(
        gap(LONGEST), ("MTP", "ref"), ("LONG", "ref"), ("MTPx", "ref")
    ),
    ("T7", "bpb of code: MTP - ref"): Metric(gap("bpb_code"), ("MTP", "ref"), ("LONG", "ref"), ("MTPx", "ref")),
    ("T10", "cloze of four: MTP - ref"): Metric(
        gap("cloze"), ("MTP", "ref"), ("ref",), AGAIN, of_positive=lambda ref: 0.25 - ref["cloze"]
    ),
    ("T12", "copy(MTP) - copy(LONG)"): Metric(COPY, ("MTP", "LONG"), (), AGAIN),
    # order, mixture and lengths
    ("D1", "bpb(GROW) - bpb(ref)"): Metric(BPB, ("GROW", "ref"), (), ("SHRINK", "ref")),
    ("D3", "weighted bpb(ref) - bpb(PROP)"): Metric(weighted, ("ref", "PROP"), (), AGAIN),
    ("D4", "weighted bpb(LATE) - bpb(ref)"): Metric(weighted, ("LATE", "ref"), (), ("REV", "ref")),
}  # fmt: skip

BESIDE = [
    # twice as wide: 16 heads, a latent of 64
    Beside("M5", "bpb(ref) - bpb(DACT)", "bpb(ref) - bpb(DACT), twice as wide",
           Metric(BPB, ("ref", "DACT"), negative=AGAIN), WIDE),
    Beside("L6", "bpb(ref) / bpb(MHA) - 1", "bpb(ref) / bpb(MHA) - 1, twice as wide",
           Metric(ratio("bpb"), ("ref", "MHA"), negative=AGAIN), WIDE),
    Beside("L6", "bpb(ref) / bpb(MHA) - 1", "bpb(ref) / bpb(MHA-norm) - 1",
           Metric(ratio("bpb"), ("ref", "MHA-norm"), ("MLA-24", "MHA-norm"), AGAIN)),
    # Meta's parallel heads
    Beside("T4", "copy(MTP) - the better of ref and MTPx", "copy(PAR) - the better of ref and MTPx",
           Metric(above_the_better, ("PAR", "ref", "MTPx"), ("LONG", "ref", "ref"), ("MTPx", "ref", "ref"))),
    Beside("T4", "copy(MTP) - the better of ref and MTPx", "copy(MTP) - copy(PAR)",
           Metric(COPY, ("MTP", "PAR"), ("LONG", "ref"), AGAIN)),
    Beside("T7", "bpb of code: MTP - ref", "bpb of code: PAR - ref",
           Metric(gap("bpb_code"), ("PAR", "ref"), ("LONG", "ref"), ("MTPx", "ref"))),
    # whether it is sparsity or size
    Beside("M15", "loss by noise: ref - DACT", "loss by noise: ref - DTOT",
           Metric(by_noise, ("NOISE", "ref", "NOISE-DTOT", "DTOT"), ("NOISE", "ref", "HALF", "ref"),
                  ("NOISE'", "ref'", "NOISE", "ref"))),
    *(
        Beside("M20", "spikes a run: ref - DACT", f"spikes a run, {words} the rate: ref - DACT",
               Metric(JUMPS, (f"{SPIKES}{arm}", f"{SPIKES}{arm}-DACT"), negative=("spikes-ref'", "spikes-ref")))
        for words, arm in (("three times", "THREE"), ("ten times", "TEN"))
    ),
    Beside("M20", "spikes a run: ref - DACT", "spikes a run: NONE - DACT",
           Metric(JUMPS, ("spikes-NONE", "spikes-DACT"), ("spikes-TEN", "spikes-ref"), ("spikes-ref'", "spikes-ref"))),
]  # fmt: skip
