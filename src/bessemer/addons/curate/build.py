"""A build, from its settings to its report: its jobs, their order, and which of them are already done.

OUT/
  report.json, report.txt       what was read, what was dropped and why, what remains
  manifest.json                 checksums of all documents (shards have their own); identical for every runner
  documents/SOURCE/00000.jsonl.zst   the documents that remain
  PART/                         their tokens: a training recipe reads them as "shards:OUT/PART"
  tokenizer/
  work/                         output of the steps; if you delete it, the next build starts over
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import filelock

from bessemer.addons.curate import decontaminate, duplicates, origins, output, report
from bessemer.addons.curate.jobs import Job, JobRunner, facts_of
from bessemer.addons.curate.settings import Settings, identity
from bessemer.config.places import located
from bessemer.data import sources
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.system import peak_memory

VERSION = 1
"""Increase it when a step produces different output from the same inputs."""
STEPS = ("read", "sign", "match", "join", "tokenizer", "write")


class StepProgress(Protocol):
    """Progress of one step."""

    def total(self, work: float, units: str, done: float = 0.0) -> None: ...

    def advance(self, work: float = 1.0, note: str = "") -> None: ...


class BuildProgress(Protocol):
    """Progress of a build."""

    def begin(self, name: str) -> StepProgress: ...

    def end(self, name: str, seconds: float) -> None: ...


@dataclass
class Step:
    """The outcome of a step."""

    facts: list[dict[str, Any]]
    """Facts of each job, in order."""
    wall: float
    fresh: int
    """Jobs that ran in this build; the others had finished before."""


@dataclass
class Build:
    """One build."""

    settings: Settings
    out: Path
    engine: JobRunner
    progress: BuildProgress
    steps: dict[str, Step] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Run the build and return its report. Finished jobs stay finished after a UserError."""
        output.check_folder(self.out, [source.part for source in self.settings.sources])
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.out / ".lock", timeout=0):
                return self._run()
        except filelock.Timeout:
            raise UserError(f"another build is writing to {self.out}; wait for it, or choose another --out") from None
        finally:
            self.engine.close()

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        search = self.settings.decontaminate
        searched = {name: decontaminate.eval_texts([name], search.problems) for name in search.tasks}
        units, ignored = self._units()
        reads = [self._read(unit) for unit in units]
        read = self._run_step("read", reads, "bytes")
        firsts = [0]
        for facts in read.facts:
            firsts.append(firsts[-1] + facts["kept"]["documents"])
        signs = self._signs(reads, read.facts, [eval_text for texts in searched.values() for eval_text in texts])
        self._run_step("sign", signs, "bytes")
        join = self._match_and_join(signs, firsts)
        tokenizer = self._tokenizer(units, reads, signs, join, firsts)
        writes = self._writes(units, reads, signs, join, firsts, tokenizer)
        write = self._run_step("write", writes, "bytes")
        output.publish(self.out, units, writes, write.facts, tokenizer, self.settings)
        self._remove_stale([*reads, *signs, *writes])
        facts = report.gather(
            self.settings, {name: decontaminate.searched_for(texts) for name, texts in searched.items()},
            units, ignored, read.facts, write.facts, {name: vars(step) for name, step in self.steps.items()},
            time.monotonic() - began, peak_memory(), self.engine.workers, load_tokenizer(tokenizer).vocab_size,
        )  # fmt: skip
        output.write(self.out / "report.json", json.dumps(facts, indent=1, ensure_ascii=False))
        output.write(self.out / "report.txt", report.text(facts))
        if empty := [name for name, part in facts["parts"].items() if not part["train"]["tokens"]]:
            raise UserError(f'part "{empty[0]}" has no training documents left; {self.out / "report.txt"} says why')
        return facts

    def _units(self) -> tuple[list[origins.Unit], dict[str, int]]:
        listed: list[origins.Unit] = []
        ignored: dict[str, int] = {}
        for source in self.settings.sources:
            units, ignored[source.name] = origins.units(source, self.settings.unit_bytes, self.settings.cache)
            listed += units
        return listed, ignored

    def _read(self, unit: origins.Unit) -> Job:
        matters = asdict(replace(unit.source, part="", retries=0, pause=0.0))
        registered = sources.registered().get(unit.source.spec)
        version = (registered.package.sha256 if registered.package else sys.version) if registered else ""
        return Job(
            "read", unit.name, self._folder("read", unit.name),
            identity(VERSION, "read", matters, unit.facts(), version),
            {"unit": unit, "cache": self.settings.cache}, max(1, unit.bytes),
        )  # fmt: skip

    def _signs(
        self, reads: Sequence[Job], facts: Sequence[dict[str, Any]], texts: Sequence[decontaminate.EvalText]
    ) -> list[Job]:
        dedup, search = self.settings.dedup, self.settings.decontaminate
        eval_texts = str(decontaminate.save(texts, self.out / "work")) if texts else None
        matters = replace(dedup, exact=True, threshold=0.0)
        return [
            Job(
                "sign", job.title, self._folder("sign", job.title),
                identity(VERSION, "sign", of_job["sha256"], matters, eval_texts and Path(eval_texts).name, search.n),
                {"read": job.folder, "dedup": dedup, "eval_texts": eval_texts, "n": search.n}, job.weight,
            )
            for job, of_job in zip(reads, facts, strict=True)
        ]  # fmt: skip

    def _match_and_join(self, signs: Sequence[Job], firsts: Sequence[int]) -> Job:
        dedup = self.settings.dedup
        units = [
            duplicates.SignedUnit(job.folder, first, last - first)
            for job, first, last in zip(signs, firsts[:-1], firsts[1:], strict=True)
        ]
        bands = ([duplicates.EXACT] if dedup.exact else []) + (list(range(dedup.bands)) if dedup.near else [])
        matters = [[job.identity for job in signs], list(firsts)]
        jobs = []
        for which in duplicates.bins(firsts[-1], bands, self.settings.memory):
            title = (
                f"{'exact' if which.band == duplicates.EXACT else f'band{which.band:03d}'}-{which.number}-of-{which.of}"
            )
            threshold = 1.0 if which.band == duplicates.EXACT else dedup.threshold
            jobs.append(
                Job(
                    "match", title, self._folder("match", title),
                    identity(VERSION, "match", matters, list(which), threshold),
                    {"units": units, "which": which, "threshold": threshold},
                )
            )  # fmt: skip
        self._run_step("match", jobs, "bins")
        exact = [job.folder for job in jobs if job.title.startswith("exact")]
        near = [job.folder for job in jobs if not job.title.startswith("exact")]
        join = Job(
            "join", "all", self._folder("join", "all"),
            identity(VERSION, "join", [job.identity for job in jobs], list(firsts)),
            {"exact": exact, "near": near, "firsts": list(firsts[:-1])},
        )  # fmt: skip
        self._run_step("join", [join], "clusters")
        self._remove_stale(jobs)
        return join

    def _tokenizer(
        self,
        units: Sequence[origins.Unit],
        reads: Sequence[Job],
        signs: Sequence[Job],
        join: Job,
        firsts: Sequence[int],
    ) -> Path:
        shards = self.settings.tokens
        if shards.tokenizer is not None:
            return located(shards.tokenizer)
        texts = [
            (read.folder, sign.folder, join.folder, first, unit.source.name)
            for unit, read, sign, first in zip(units, reads, signs, firsts[:-1], strict=True)
        ]
        job = Job(
            "tokenizer", "all sources", self._folder("tokenizer", "trained"),
            identity(VERSION, "tokenizer", [job.identity for job in (*signs, join)], shards.vocab_size, shards.sample),
            {"units": texts, "tokens": shards},
        )  # fmt: skip
        if not firsts[-1]:
            raise UserError("no source has documents left to train a tokenizer on; check filters and languages")
        self._run_step("tokenizer", [job], "tokenizer")
        return job.folder / "tokenizer"

    def _writes(
        self, units: Sequence[origins.Unit], reads: Sequence[Job], signs: Sequence[Job], join: Job,
        firsts: Sequence[int], tokenizer: Path,
    ) -> list[Job]:  # fmt: skip
        digests = self.steps["join"].facts[0]["digests"]
        fingerprint = load_tokenizer(tokenizer).fingerprint
        numbers: dict[str, int] = {}
        jobs = []
        for unit, read, sign, first, digest in zip(units, reads, signs, firsts[:-1], digests, strict=True):
            part = unit.source.part
            number = numbers[part] = numbers.get(part, -1) + 1
            shards = self.settings.tokens
            fim_rate = shards.fim_rate if part in shards.fim_parts else 0.0
            matters = replace(shards, tokenizer=None, vocab_size=0, sample=0, fim_rate=fim_rate, fim_parts=())
            jobs.append(
                Job(
                    "write", unit.name, self._folder("write", unit.name),
                    identity(
                        VERSION, "write", sign.identity, digest, matters, fingerprint, part, number, self.settings.seed
                    ),
                    {"read": read.folder, "sign": sign.folder, "join": join.folder, "first": first, "part": part,
                     "number": number, "tokens": shards, "tokenizer": tokenizer, "seed": self.settings.seed},
                    read.weight,
                )
            )  # fmt: skip
        return jobs

    def _run_step(self, name: str, jobs: Sequence[Job], units: str) -> Step:
        """Run the unfinished jobs of a step, and report progress."""
        began = time.monotonic()
        results = {job.folder: facts_of(job) for job in jobs}
        pending = [job for job in jobs if results[job.folder] is None]
        stage = self.progress.begin(name)
        weight = sum(job.weight for job in jobs)
        stage.total(weight, units, weight - sum(job.weight for job in pending))
        for job, result in self.engine.run(pending):
            results[job.folder] = result
            stage.advance(job.weight, job.title)
        wall = time.monotonic() - began
        self.progress.end(name, wall)
        done = [facts for job in jobs if (facts := results[job.folder]) is not None]
        self.steps[name] = Step(done, wall, len(pending))
        return self.steps[name]

    def _folder(self, step: str, name: str) -> Path:
        folder = self.out / "work" / step / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _remove_stale(self, jobs: Iterable[Job]) -> None:
        """Remove what earlier settings left in the folders of these steps."""
        current = {job.folder for job in jobs}
        for step in {job.step for job in jobs}:
            for facts in list((self.out / "work" / step).rglob("facts.json")):
                if facts.parent not in current:
                    shutil.rmtree(facts.parent)
