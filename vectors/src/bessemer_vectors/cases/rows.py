"""Cases of packed rows and of labels several tokens ahead."""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Rival, integers
from bessemer_vectors.reference import rows as reference

Outputs = dict[str, Any]
TOKENS = integers(11, 12, 13, 14, 21, 22, 31, 32, 33)
SEGMENTS = integers(0, 0, 0, 0, 1, 1, 2, 2, 2)
WHOLE = np.zeros(9, dtype=np.int64)


def mtp_labels() -> list[Case]:
    def one_ahead(tokens: Any, segments: Any, depth: int) -> Outputs:
        """Every module predicts the next token."""
        first = reference.mtp_labels(tokens, segments, 0)["labels"]
        return {"labels": np.repeat(first, depth + 1, 0)}

    def rolled(tokens: Any, segments: Any, depth: int) -> Outputs:
        """By rolling the row: its start comes back at its end."""
        labels = np.stack([np.roll(tokens, -k - 1) for k in range(depth + 1)])
        inputs = np.stack([np.roll(tokens, -k) for k in range(depth + 1)])
        return {"labels": labels, "inputs": inputs}

    def masked_once(tokens: Any, segments: Any, depth: int) -> Outputs:
        """The row's own labels shifted on: the last label of a segment is of the next one."""
        labels = reference.mtp_labels(tokens, segments, 0)["labels"][0]
        rows = []
        for k in range(depth + 1):
            rows.append(np.concatenate([labels[k:], np.full(k, reference.NONE)]))
        return {"labels": np.stack(rows)}

    def case(name: str, why: str, segments: Any, depth: int) -> Case:
        rivals = [
            Rival("one token ahead", "labels[k, i] = tokens[i + 1]", "an offset of 1", function=one_ahead),
            Rival("rolled", "torch.roll without a mask", "a row that wraps around", function=rolled),
        ]
        if len(set(segments.tolist())) > 1:
            rivals += [
                Rival("segments ignored", "labels cross samples", "packing without a mask", {"segments": WHOLE}),
                Rival(
                    "main labels shifted",
                    "labels[k, i] = labels[0, i + k]",
                    "a mask made for one token ahead",
                    function=masked_once,
                ),
            ]
        return Case(name, why, {"tokens": TOKENS, "segments": segments, "depth": depth}, tuple(rivals))

    return [
        case("one document, depth 1", "V3's pre-training.", WHOLE, 1),
        case("packed, depth 1", "Near the end of a sample the module has no label.", SEGMENTS, 1),
        case("packed, depth 3", "A sample of two tokens has no label at depth 1 and beyond.", SEGMENTS, 3),
    ]


def packed_row() -> list[Case]:
    everything = np.ones(9, dtype=bool)
    answers = np.array([False, False, True, True, False, True, False, False, True])

    def unshifted(tokens: Any, segments: Any, trained: Any) -> Outputs:
        """The mask is read at the position of the query."""
        shifted = np.concatenate([[False], trained[:-1]])
        return {"labels": reference.packed_row(tokens, segments, shifted)["labels"]}

    def running_on(tokens: Any, segments: Any, trained: Any) -> Outputs:
        return {"positions": np.arange(len(tokens))}

    def crossing(tokens: Any, segments: Any, trained: Any) -> Outputs:
        return {"attends": np.tril(np.ones((len(tokens), len(tokens)), dtype=bool))}

    def labels_cross(tokens: Any, segments: Any, trained: Any) -> Outputs:
        return {"labels": reference.packed_row(tokens, np.zeros_like(segments), trained)["labels"]}

    rivals = (
        Rival("positions run on", "0 to T - 1", "pre-training's rows", function=running_on),
        Rival("attention crosses samples", "j <= i", "pre-training's rows", function=crossing),
        Rival(
            "labels cross samples",
            "the last token predicts the next sample's first",
            "a missing mask",
            function=labels_cross,
        ),
    )
    late = Rival("mask not shifted", "trained[i] in place of trained[i + 1]", "an offset of 1", function=unshifted)
    names = integers(3, 3, 3, 7, 7, 7, 7, 7, 7)
    return [
        Case(
            "three samples",
            "Every token trains.",
            {"tokens": TOKENS, "segments": SEGMENTS, "trained": everything},
            rivals,
        ),
        Case(
            "answers alone",
            "Prompts do not train; the first answer token is predicted from the prompt.",
            {"tokens": TOKENS, "segments": SEGMENTS, "trained": answers},
            (late, *rivals[:2]),
        ),
        Case(
            "segment numbers are names",
            "They need not count from 0.",
            {"tokens": TOKENS, "segments": names, "trained": everything},
            rivals,
        ),
    ]
