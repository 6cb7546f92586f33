"""How the metrics of the claims' rules follow from the numbers of pre-training arms.

Each entry is (claim, metric of rules.toml): a function of the arms' numbers, evaluated inside every seed, and the arms
that it takes. A control is the same function of other arms: the positive one must show the effect, the negative one
must not. "m" below is the numbers of one arm and seed, by the names of `pretrain_measures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bessemer.claims.runs import Metric

Numbers = Mapping[str, float]


def gap(name: str) -> Callable[[Numbers, Numbers], float]:
    """The first arm's number less the second's."""
    return lambda one, other: one[name] - other[name]


def ratio(name: str) -> Callable[[Numbers, Numbers], float]:
    """The first arm's number over the second's, less 1."""
    return lambda one, other: one[name] / other[name] - 1


BPB, COPY = gap("bpb"), gap("copy")
AGAIN = ("ref'", "ref")
"""The A/A pair: it must show nothing."""

METRICS: dict[tuple[str, str], Metric] = {
    ("M5", "bpb(ref) - bpb(DACT)"): Metric(BPB, ("ref", "DACT"), ("DTOT", "DACT"), AGAIN),
    ("M10", "bpb(ref) / bpb(NL) - 1"): Metric(ratio("bpb"), ("ref", "NL"), ("LIM1", "NL"), AGAIN),
    ("M17", "bpb(ref) / bpb(DTOT) - 1"): Metric(ratio("bpb"), ("ref", "DTOT"), ("DACT", "DTOT"), AGAIN),
    ("M6", "bpb(NL) - bpb(CO)"): Metric(BPB, ("NL", "CO"), ("DTOT", "CO"), AGAIN),
    ("M7", "bpb(NL) - bpb(NS)"): Metric(BPB, ("NL", "NS"), ("DTOT", "NS"), AGAIN),
    ("L6", "bpb(ref) / bpb(MHA) - 1"): Metric(ratio("bpb"), ("ref", "MHA"), ("MLA-24", "MHA"), AGAIN),
}
