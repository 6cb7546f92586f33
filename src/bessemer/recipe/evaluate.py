"""`bessemer eval`: any model directory on any task, as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.data.chat import question_ids
from bessemer.infer.engine import Engine
from bessemer.recipe import modelling, scoring
from bessemer.train import speed


def evaluate(
    model_dir: Path,
    *,
    task: str,
    samples: int,
    problems: int,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of results over both languages of the task; keys as in `scoring.evaluate`."""
    chosen = tasks.get(task)  # before loading: a misspelt name should not cost a minute
    speed.keep_memory()
    model, tokenizer = modelling.load_model(model_dir)

    def encode(problem: tasks.Problem) -> list[int]:
        return question_ids(tokenizer, problem.prompt)

    return scoring.evaluate(
        Engine(model, tokenizer, modelling.workers()), encode, chosen, problems=problems, samples=samples,
        temperature=temperature, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
