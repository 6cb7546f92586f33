"""The hook "sample-ahead": each rollout is sampled up to `max_off_policy_rollouts` rollouts before its updates.

With k = `max_off_policy_rollouts`, rollout n + k is sampled by the policy before the updates of rollout n, so its
sampling does not depend on those updates and may overlap them; k rollouts are in flight. It is
k * `updates_per_rollout` steps old when its own updates begin (`rl/staleness`). A run depends only on this order, never
on timing. Ray workers sample while the trainer computes. In the trainer's process, sampling and updates take turns,
each on all cores, which is faster there than one core for each (bench/rl_overlap.py).

With `segment`, an answer that is not finished after so many tokens goes on with the weights of the next rollout's
updates, and so forth until its rollout is due (`partial_rollout`).

A checkpoint holds every rollout in flight of an older policy, finished or in part: the policy that drew it is gone.
A rollout of the checkpoint's own policy is not saved: it is sampled again, the same.

    [[stage.hooks]]
    name = "sample-ahead"
    max_off_policy_rollouts = 4
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bessemer import tasks
from bessemer.addons.distributed.partial_rollout import VERSION, PartialRollout
from bessemer.config.rl import RLConfig
from bessemer.engine.answers import Spoken
from bessemer.engine.generation import Completion
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.errors import UserError
from bessemer.rl.component import Component, Metrics
from bessemer.rl.generator import RolloutGenerator
from bessemer.rl.parts import LoopParts
from bessemer.rl.rollout import Group, Rollout, ScoredSample, values_of
from bessemer.tasks.base import Problem, Verdict

KEY = "rollouts"
"""Key of the finished rollouts in the trainer's checkpoint."""


class PendingRollout:
    """A rollout that is being sampled."""

    def __init__(self, generator: RolloutGenerator, number: int, cap: int, step: int) -> None:
        self.step = step
        self.rollout: Rollout | None = None
        """Set once it is finished."""
        self._turns = generator.turns(number, cap, step)
        self._samples = next(self._turns)

    def poll(self) -> bool:
        """Processes the turns that are sampled, without waiting for more; returns whether the rollout is finished."""
        while self.rollout is None and self._samples.ready():
            self._advance()
        return self.rollout is not None

    def finish(self) -> Rollout:
        """The finished rollout; waits for its samples if necessary."""
        while self.rollout is None:
            self._advance()
        return self.rollout

    def _advance(self) -> None:
        try:
            self._samples = self._turns.send(self._samples.take())
        except StopIteration as end:
            self.rollout = end.value


class SampleAhead(Component):
    """`max_off_policy_rollouts`: rollouts in flight beside the one that is trained on. `segment`: tokens that a policy
    writes of an answer that is not due yet; 0: it writes the whole answer."""

    ahead = True

    def __init__(
        self, loop: LoopParts, *, max_off_policy_rollouts: Annotated[int, Field(ge=1, le=8)] = 1,
        segment: Annotated[int, Field(ge=0)] = 0,
    ) -> None:  # fmt: skip
        self.loop, self.trainer, self.most, self.segment = loop, loop.trainer, max_off_policy_rollouts, segment
        self.finished: dict[int, Rollout] = {}
        """Finished and not yet taken, by number."""
        self.pending: dict[int, PendingRollout] = {}
        self.partial: dict[int, PartialRollout] = {}
        """Those written in segments."""

    @staticmethod
    def check(config: RLConfig, **settings: Any) -> None:
        segment = settings.get("segment", 0)
        where = f'stage "{config.name}": hook sample-ahead: segment = {segment}'
        if segment and config.max_resamples > 1:
            raise UserError(f"{where} needs max_resamples = 1: which problems follow depends on finished answers")
        episodic = [name for name in (*config.tasks, *config.general_tasks) if tasks.get(name).episodic]
        if segment and episodic:
            raise UserError(f"{where} cuts single answers, but {episodic[0]} has episodes; leave segment out")

    def take(self, number: int) -> Rollout:
        """Rollout `number`. Also starts those that may be in flight beside it, with the current policy."""
        if self.segment:
            return self._take_partial(number)
        self._start(number)
        taken = self._finish(number)
        # lower numbers are from before the guard went back, which does not move the cursor
        self.finished = {n: rollout for n, rollout in self.finished.items() if n > number}
        return taken

    def _take_partial(self, number: int) -> Rollout:
        """The same in segments: everything in flight goes on with the current policy, and what is due is finished."""
        self.partial = {n: partial for n, partial in self.partial.items() if n >= number}
        step = self.trainer.step
        for n in range(number, min(number + self.most + 1, self.loop.settings.rollouts)):
            if n not in self.partial:
                cap = self.loop.cap()
                self.partial[n] = PartialRollout(self.loop.generator, n, cap, step, self.segment)
            self.partial[n].submit(step)
        return self.partial.pop(number).finish(step)

    def sampled(self, number: int, rollout: Rollout) -> Metrics:
        """How many optimizer steps old the tokens of a sample are in the mean, over the samples; and the oldest."""
        ages = [
            self.trainer.step - torch.tensor(sample.per_token.get(VERSION) or [float(rollout.step)])
            for group in rollout.groups
            for sample in group
        ]
        means = torch.stack([age.mean() for age in ages])
        return {"rl/staleness_mean": float(means.mean()), "rl/staleness_max": float(max(age.max() for age in ages))}

    def after_step(self) -> None:
        """Scores the samples that have arrived."""
        self._poll()

    def before_save(self, number: int) -> None:
        """Waits for the samples of older policies. Later rollouts are started first, so that no worker waits for the
        checkpoint; `take(number)` finds the same policy."""
        for partial in self.partial.values():
            partial.collect()
        if older := [n for n, pending in self.pending.items() if pending.step < self.trainer.step]:
            self._start(number)
            for n in older:
                self._finish(n)
        self._store()  # also what `_poll` finished: a rollout that was ready early is as old as one that was waited for

    def restore(self) -> None:
        self.finished, self.pending, self.partial = {}, {}, {}
        for name, stored in self.trainer.extras.get(KEY, {}).items():
            number, prefix = int(name), f"{KEY}/{name}/"
            tensors = {
                key.removeprefix(prefix): value
                for key, value in self.trainer.extra_tensors.items()
                if key.startswith(prefix)
            }
            problems = self.loop.generator.candidates_by_id(number)
            if unknown := {group["problem"] for group in stored["groups"]} - problems.keys():
                self.trainer.warn(
                    f"rollout {number}, sampled by an earlier version, asks {min(unknown)}, which is not among its "
                    "problems now; it is sampled again"
                )
                continue
            groups, cap, step = unpack(stored["groups"], tensors, problems), stored["cap"], stored["step"]
            if self.segment:
                partial = PartialRollout(self.loop.generator, number, cap, step, self.segment)
                self.partial[number] = partial.restored(groups)
            else:
                self.finished[number] = Rollout(groups, stored["asked"], cap, step)

    def _start(self, number: int) -> None:
        for n in range(number, min(number + self.most + 1, self.loop.settings.rollouts)):
            if n not in self.finished and n not in self.pending:
                self.pending[n] = PendingRollout(self.loop.generator, n, self.loop.cap(), self.trainer.step)
        self._poll()

    def _poll(self) -> None:
        for number, pending in list(self.pending.items()):
            if pending.poll():
                self._finish(number)
        for partial in self.partial.values():
            partial.poll()

    def _finish(self, number: int) -> Rollout:
        if number not in self.finished:
            self.finished[number] = self.pending.pop(number).finish()
        return self.finished[number]

    def _store(self) -> None:
        """Adds the finished rollouts of older policies to what the trainer's checkpoint holds."""
        trainer = self.trainer
        tensors = {key: value for key, value in trainer.extra_tensors.items() if not key.startswith(f"{KEY}/")}
        stored = {}
        parts = {n: Rollout(p.groups, len(p.groups), p.cap, p.step) for n, p in self.partial.items()}
        for number, waiting in (self.finished | parts).items():
            if waiting.step >= trainer.step:
                continue
            groups, packed = pack(waiting.groups)
            stored[str(number)] = {
                "groups": groups,
                "asked": waiting.n_problems,
                "cap": waiting.cap,
                "step": waiting.step,
            }
            tensors |= {f"{KEY}/{number}/{name}": value for name, value in packed.items()}
        trainer.extras, trainer.extra_tensors = trainer.extras | {KEY: stored}, tensors


_PER_TOKEN = ("tokens", "logprobs")
"""Arrays of a completion: a checkpoint holds each as one vector over all samples."""
_PLAIN = {known.name for known in fields(ScoredSample)} - {
    "problem", "prompt_tokens", "completion", "verdict", "reading"
}  # fmt: skip
"""Fields of a sample that are plain JSON."""


def pack(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Groups as a checkpoint stores them: one JSON object per group, and tensors over all samples. A problem is stored
    as its id."""
    completions = [row.completion for group in groups for row in group]
    tensors = {name: torch.cat([values_of(getattr(c, name)) for c in completions]) for name in _PER_TOKEN}
    if routings := [c.routing for c in completions if c.routing is not None]:
        tensors["routing"] = torch.cat(routings)
    if kept := [c.kept for c in completions if c.kept is not None]:
        tensors |= {"kept_ids": torch.cat([k.id_M for k in kept]), "kept_counts": torch.cat([k.count_T for k in kept])}
    packed = [
        {"problem": group[0].problem.id, "prompt": group[0].prompt_tokens, "rows": [_pack_row(row) for row in group]}
        for group in groups
    ]
    return packed, tensors


def unpack(
    packed: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], problems: Mapping[str, Problem]
) -> list[Group]:
    """The exact groups that `pack` was given; `problems` by id."""
    lengths = [row["length"] for group in packed for row in group["rows"]]
    fed = [len(group["prompt"]) + row["length"] - 1 for group in packed for row in group["rows"]]
    per_token = {name: map(_array_of, tensors[name].split(lengths)) for name in _PER_TOKEN}
    routing = iter(tensors["routing"].split(fed)) if "routing" in tensors else None
    kept: Iterator[KeptTokens] | None = None
    if "kept_ids" in tensors:
        counts = tensors["kept_counts"].split(lengths)
        ids = tensors["kept_ids"].split([int(count_T.sum()) for count_T in counts])
        kept = map(KeptTokens, ids, counts)
    groups = []
    for group in packed:
        rows = []
        for row in group["rows"]:
            completion = Completion(
                **{name: next(parts) for name, parts in per_token.items()},
                text=row["text"],
                finish_reason=row["finish_reason"],
                prompt_tokens=len(group["prompt"]),
                routing=None if routing is None else next(routing),
                kept=None if kept is None else next(kept),
            )
            plain = {name: value for name, value in row.items() if name in _PLAIN}
            prompt, verdict = list(group["prompt"]), Verdict(**row["verdict"])
            if plain.get("turns") is not None:
                plain["turns"] = [Spoken(*turn) for turn in plain["turns"]]
            rows.append(ScoredSample(problems[group["problem"]], prompt, completion, verdict, **plain))
        groups.append(rows)
    return groups


def _pack_row(row: ScoredSample) -> dict[str, Any]:
    return {name: getattr(row, name) for name in sorted(_PLAIN)} | {
        "verdict": asdict(row.verdict),
        "text": row.completion.text,
        "length": len(row.completion.tokens),
        "finish_reason": row.completion.finish_reason,
    }


def _array_of(numbers: Tensor) -> array:
    return array("i" if numbers.dtype == torch.int32 else "f", numbers.numpy().tobytes())
