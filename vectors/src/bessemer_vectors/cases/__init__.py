"""The cases of every topic, built in Python; `write` turns them into files."""

from __future__ import annotations

from bessemer_vectors.case import Case
from bessemer_vectors.cases import evaluation, experts, pipelines, positions, precision, rl, rows, sampling, texts
from bessemer_vectors.topics import TOPICS

MODULES = (rl, sampling, evaluation, experts, rows, positions, precision, pipelines, texts)


def of(topic: str) -> list[Case]:
    module = next(module for module in MODULES if hasattr(module, topic))
    cases: list[Case] = getattr(module, topic)()
    return cases


def all_cases() -> dict[str, list[Case]]:
    return {topic: of(topic) for topic in TOPICS}
