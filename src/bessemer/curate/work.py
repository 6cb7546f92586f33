"""Jobs: functions of files that write a folder, whole or not at all, and remember what they made it of.

A folder is done when its facts.json holds the job's identity. A build that was killed does the others; one whose inputs
or settings changed does again what depends on them, since the identity of a job names those of the jobs before it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

FACTS = "facts.json"
STEPS = "bessemer.curate.steps"


class Job(NamedTuple):
    """`steps.STEP(folder, **arguments)` returns the facts of what it wrote to `folder`."""

    step: str
    title: str
    """What it works on, for people."""
    folder: Path
    identity: str
    arguments: dict[str, Any]
    weight: int = 1
    """Share of the work, in whatever unit the step's jobs have."""


def facts_of(job: Job) -> dict[str, Any] | None:
    """The facts of a job that is done; None otherwise, or where it wants to be tried again."""
    try:
        found = json.loads((job.folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("identity") == job.identity and found.get("complete", True) else None


def perform(job: Job) -> dict[str, Any]:
    """Does a job, in whatever process this is."""
    began, worked = time.monotonic(), time.process_time()
    scratch = job.folder.with_name(f".{job.folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a worker that was killed
    scratch.mkdir(parents=True)
    facts = getattr(importlib.import_module(STEPS), job.step)(scratch, **job.arguments)
    facts |= {
        "identity": job.identity,
        "seconds": round(time.monotonic() - began, 3),
        "cpu_seconds": round(time.process_time() - worked, 3),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    with (scratch / FACTS).open("w", encoding="utf-8") as file:
        json.dump(facts, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(job.folder, ignore_errors=True)
    os.replace(scratch, job.folder)
    return facts
