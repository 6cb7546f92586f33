"""Samples that stay on the rank that generated them, until the ranks that train them need them.

After a rollout every rank has a row for every sample, and knows its length, verdict and reward; only the rank that
generated it holds its tokens, log-probabilities and text (`Elsewhere`). Before the updates each
row goes once to the ranks of the pipeline that trains it, without its text.

Some options read more than that: those of `stays` say so, and with them all ranks get all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from bessemer import tasks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.engine.generation import Completion
from bessemer.eval.judging import ours
from bessemer.rl.component import hooks_of
from bessemer.rl.rollout import Row, ScoredSample
from bessemer.train.collective import Collective

Part = Sequence[Row]
"""The rows of a micro-batch."""


class Elsewhere:
    """In place of an array of a sample that another rank holds."""

    def __init__(self, count: int, rank: int) -> None:
        self.count, self.rank = count, rank

    def __len__(self) -> int:
        return self.count


def rank_of(completion: Completion, me: int) -> int:
    """The rank that holds a sample; `me` is this one."""
    return completion.tokens.rank if isinstance(completion.tokens, Elsewhere) else me


def held_by(rank: int, length: int, finish_reason: Literal["stop", "length"], prompt_tokens: int) -> Completion:
    """What all other ranks know of a sample of `rank`."""
    away: Any = Elsewhere(length, rank)
    return Completion(away, "", away, finish_reason, prompt_tokens)


def stays(settings: RLConfig, families: Sequence[tasks.Task]) -> bool:
    """Whether nothing but the trainer reads samples on other ranks than their own."""
    plain = all(ours(task) and not task.episodic for task in families)
    terms = {(term.name, term.settings.get("scope", "thoughts")) for term in settings.reward}
    return (
        plain and terms <= {("accuracy", "thoughts"), ("format", "thoughts"), ("language", "thoughts")}
        and settings.rollout.engine == "local" and settings.advantage.name in ("group", "batch")
        and not any(kind.everywhere for kind, _ in hooks_of(settings))
        and not settings.reward_models
    )  # fmt: skip


class Carrier:
    """Brings rows to the ranks that train them. Collective, and so are its methods."""

    def __init__(self, among: Collective, ranks: Ranks) -> None:
        self.among, self.ranks = among, ranks
        self.pipelines = ranks.all_gather(among.pipeline, "pipelines")
        """The pipeline of each rank."""

    def holders(self, completions: Sequence[Completion]) -> list[int]:
        return [rank_of(completion, self.ranks.me) for completion in completions]

    def batches(
        self, samples: Sequence[ScoredSample], parts: Sequence[Part], make: Callable[[Part, Part], Batch]
    ) -> list[Batch]:
        """This rank's micro-batches of a mini-batch of `samples` in `parts` (`Packing.parts`), which `make` makes. The
        samples that they need are filled."""
        index_of = {id(sample): number for number, sample in enumerate(samples)}
        own = {id(sample) for sample in samples if rank_of(sample.completion, self.ranks.me) == self.ranks.me}
        of_pipeline = [self._needed(parts, pipeline) for pipeline in range(self.among.n_pipelines)]
        for rank, pipeline in enumerate(self.pipelines):
            to_send: dict[int, Completion] = {}
            if rank != self.ranks.me:
                needed = [sample for sample in of_pipeline[pipeline] if id(sample) in own]
                to_send = {index_of[id(sample)]: replace(sample.completion, text="") for sample in needed}
            for sent in self.ranks.gather(to_send, rank, "samples of the mini-batch"):
                for index, completion in sent.items():
                    samples[index].completion = completion
        batches = []
        for number in self.among.numbers_by_pipeline(len(parts))[self.among.pipeline]:
            batch = make(parts[0][:1], parts[0]) if number is None else make(parts[number], parts[number])
            batches.append(batch.as_filler() if number is None else batch)
        return batches

    def _needed(self, parts: Sequence[Part], pipeline: int) -> list[ScoredSample]:
        """The samples that a pipeline trains; a filler has the shape of the first row."""
        numbers = self.among.numbers_by_pipeline(len(parts))[pipeline]
        rows = [row for number in numbers if number is not None for row in parts[number]]
        first = parts[0][0]
        filled = None not in numbers or any(row is first for row in rows)
        return [sample for row in (rows if filled else [*rows, first]) for sample in row]
