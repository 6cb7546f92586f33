"""Runs a recipe of `bessemer data build` (`config.py`): `load` checks it, `build` makes shards from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.addons.curate import build as building
from bessemer.addons.curate import filters, settings
from bessemer.addons.curate.config import Curation, EngineTable, SourceTable
from bessemer.addons.curate.jobs import Done, InProcess, Job, JobRunner, ProcessPool, perform
from bessemer.addons.distributed import ray_cluster
from bessemer.config.table import nearest
from bessemer.data.corpus import BOUNDARY_SPLIT_RATE
from bessemer.errors import UserError
from bessemer.runs.files import explained
from bessemer.runs.progress import RunProgress, shown
from bessemer.workers import cores

if TYPE_CHECKING:
    from ray import ObjectRef

SECONDS_PER_MB = {"read": 1.0, "sign": 0.15, "match": 0.02, "join": 0.01, "tokenizer": 0.3, "write": 0.6}
"""For the progress bar of the whole build, until it has its own measurements."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Curation:
    """Reads the recipe at `path`; UserError for a rule that the filters do not know."""
    curation = Curation.load(path, overrides)
    for source in curation.sources:
        for rule in source.rules:
            if rule not in filters.RULES:
                near = nearest(rule, list(filters.RULES))
                raise UserError(f'{path}: source "{source.name}": there is no rule {rule!r}; {near}')
    return curation


TOKENIZER_SAMPLE = 20_000_000
"""Characters of each source that a new tokenizer is trained on."""
DEDUP_MEMORY = 512_000_000
"""Bytes of memory that one deduplication job may use."""


def plain(curation: Curation, cache: str | None = None) -> settings.Settings:
    """The recipe as the build's settings."""
    tokenizer = curation.tokenizer
    return settings.Settings(
        curation.name, curation.seed, tuple(map(_plain_source, curation.sources)),
        settings.Dedup(**curation.dedup.model_dump()),
        settings.Decontaminate(
            tuple(curation.decontaminate.tasks), curation.decontaminate.n, curation.decontaminate.problems
        ),
        settings.Tokens(
            tokenizer.source, tokenizer.vocab_size, TOKENIZER_SAMPLE, curation.row_length, curation.heldout,
            curation.fim_rate, tuple(curation.fim_parts), BOUNDARY_SPLIT_RATE,
        ),
        curation.engine.unit_bytes, DEDUP_MEMORY, cache,
    )  # fmt: skip


def _plain_source(table: SourceTable) -> settings.Source:
    rules = filters.preset(table.filters)
    for rule, number in table.rules.items():
        if number is False:
            rules.pop(rule, None)
        else:
            rules[rule] = float(number)
    return settings.Source(
        table.name, table.source, table.domain, table.domain, table.text, tuple(table.languages),
        table.confidence, rules, table.bad, table.longest,
    )  # fmt: skip


def build(curation: Curation, out: Path, progress: RunProgress | None = None) -> dict[str, Any]:
    """Builds into `out` and returns the report."""
    bar = progress or shown(SECONDS_PER_MB)
    try:
        with explained(out):
            return building.Build(plain(curation), out, engine(curation.engine), bar).run()
    finally:
        bar.close()


def engine(table: EngineTable) -> JobRunner:
    """The job runner of an [engine] table."""
    if table.kind == "ray":
        return RayRunner(table.workers)
    workers = table.workers or cores()
    return ProcessPool(workers) if workers > 1 else InProcess()


class RayRunner:
    """Runs jobs as Ray tasks, on the cluster that RAY_ADDRESS names or on one started on this machine.

    Workers read sources and write their folders themselves, so every node must see both under the same paths; only
    settings and counts are sent. Ray retries a job whose node is lost; a job writes its whole folder or nothing.
    """

    def __init__(self, workers: int) -> None:
        """workers: number of parallel jobs; 0: one per CPU of the cluster."""
        if not ray_cluster.is_installed():
            raise UserError("engine.kind = \"ray\" needs Ray: pip install 'bessemer[scale]'")
        self._cluster = ray_cluster.RayCluster(0)
        self._ray = self._cluster.ray
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        self.workers = min(workers or cpus, cpus)
        self._perform = self._ray.remote(num_cpus=1, max_retries=2)(_perform)

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        pending = list(reversed(jobs))
        under_way: dict[ObjectRef, Job] = {}
        while pending or under_way:
            while pending and len(under_way) < self.workers:
                job = pending.pop()
                under_way[self._perform.remote(job, os.getcwd())] = job
            for reference in self._ray.wait(list(under_way), num_returns=1)[0]:
                job = under_way.pop(reference)
                yield job, self._facts(reference, job)

    def _facts(self, reference: ObjectRef, job: Job) -> dict[str, Any]:
        try:
            facts, mistake = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise UserError(
                f"Ray lost {job.step} of {job.title} for good ({type(error).__name__}); check the memory and the disks "
                "of its nodes, then run the same command again to continue"
            ) from error
        if mistake is not None:
            raise UserError(mistake)
        return facts

    def close(self) -> None:
        self._cluster.close()


def _perform(job: Job, folder: str) -> tuple[dict[str, Any], str | None]:
    """In a worker, with paths relative to `folder`. A UserError is returned as its message, since Ray would wrap it."""
    os.chdir(folder)
    try:
        return perform(job), None
    except UserError as error:
        return {}, str(error)
