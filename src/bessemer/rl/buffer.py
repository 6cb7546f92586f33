"""A rollout that waits for its updates, as JSON and tensors: what a checkpoint can hold, and back without a bit lost.

What is not stored follows by arithmetic: a problem from its id, an advantage from the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from bessemer.engine.engine import Completion
from bessemer.rl.rollout import Sampled
from bessemer.tasks.base import Problem, Verdict

_FLAT = {"tokens": torch.int32, "logprobs": torch.float32, "raw_logprobs": torch.float32}
"""Fields of a completion with one number per token: stored as one vector over all samples."""
_APART = {"problem", "prompt_tokens", "completion", "verdict"}


def pack(groups: Sequence[Sequence[Sampled]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(one JSON object per group, tensors over all samples)."""
    completions = [row.completion for group in groups for row in group]
    tensors = {
        name: torch.tensor([value for c in completions for value in getattr(c, name)], dtype=dtype)
        for name, dtype in _FLAT.items()
    }
    if completions[0].routing is not None:
        tensors["routing"] = torch.cat([c.routing for c in completions])
    told = [
        {"problem": group[0].problem.id, "prompt": group[0].prompt_tokens, "rows": [_told(row) for row in group]}
        for group in groups
    ]
    return told, tensors


def unpack(
    told: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], problems: Mapping[str, Problem]
) -> list[list[Sampled]]:
    """The groups that `pack` was given; `problems` by their ids."""
    lengths = [row["length"] for group in told for row in group["rows"]]
    fed = [len(group["prompt"]) + row["length"] - 1 for group in told for row in group["rows"]]
    flat = {name: iter([part.tolist() for part in tensors[name].split(lengths)]) for name in _FLAT}
    routing = iter(tensors["routing"].split(fed)) if "routing" in tensors else None
    groups = []
    for group in told:
        rows = []
        for row in group["rows"]:
            completion = Completion(
                **{name: next(parts) for name, parts in flat.items()},
                text=row["text"],
                finish_reason=row["finish_reason"],
                prompt_tokens=len(group["prompt"]),
                routing=None if routing is None else next(routing),
            )
            rest = {name: value for name, value in row.items() if name in _REST}
            prompt, verdict = list(group["prompt"]), Verdict(**row["verdict"])
            rows.append(Sampled(problems[group["problem"]], prompt, completion, verdict, **rest))
        groups.append(rows)
    return groups


_REST = {field.name for field in fields(Sampled)} - _APART


def _told(row: Sampled) -> dict[str, Any]:
    return {name: getattr(row, name) for name in sorted(_REST)} | {
        "verdict": asdict(row.verdict), "text": row.completion.text, "length": len(row.completion.tokens),
        "finish_reason": row.completion.finish_reason,
    }  # fmt: skip
