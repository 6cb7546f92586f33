"""Cases of pipeline schedules."""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Rival

Outputs = dict[str, Any]


def all_forwards_first(schedule: str, ranks: int, micro_batches: int) -> Outputs:
    """GPipe holds every micro-batch at once."""
    return {"peak": np.full(ranks, micro_batches), "makespan": 3.0 * (micro_batches + ranks - 1)}


def unsplit(schedule: str, ranks: int, micro_batches: int) -> Outputs:
    """1F1B in place of zero bubble: the backward pass stays whole."""
    return {"makespan": 3.0 * (micro_batches + ranks - 1)}


def pipeline_table() -> list[Case]:
    gpipe = Rival("all forwards first", "F ... F B ... B", "GPipe", function=all_forwards_first)
    whole = Rival("backward not split", "3 (M + P - 1)", "1F1B in place of zero bubble", function=unsplit)

    def case(schedule: str, ranks: int, micro_batches: int, why: str, *rivals: Rival) -> Case:
        inputs = {"schedule": schedule, "ranks": ranks, "micro_batches": micro_batches}
        return Case(f"{schedule}, {ranks} ranks, {micro_batches}", why, inputs, rivals)

    return [
        case("1f1b", 4, 8, "Length 3 (M + P - 1); rank r holds P - r micro-batches.", gpipe),
        case("1f1b", 3, 2, "Fewer micro-batches than ranks."),
        case("zb1p", 4, 8, "Length 3 M + P - 1.", whole),
        case("zb1p", 4, 2, "Fewer micro-batches than ranks."),
        case("zb1p", 8, 20, "67, against 81 of 1F1B.", whole),
        case("zbv", 4, 8, "Complete and free of deadlock; the search behind the table decides the rest."),
        case("dualpipe", 4, 8, "Length 26, at most P + 1 micro-batches.", gpipe),
        case("dualpipe", 8, 20, "V3's figure 5: 8 ranks, 20 micro-batches; length 66, at most 9.", whole),
        case("dualpipev", 4, 10, "One copy of the model, folded: as DualPipe on 8 ranks.", gpipe),
    ]
