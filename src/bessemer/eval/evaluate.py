"""`bessemer eval`: any model directory on any tasks, ours and lm-eval's, as rows of `results`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.train import setup, speed


def evaluate(
    model_dir: Path,
    *,
    names: Sequence[str],
    samples: int = 8,
    problems: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    k: int | None = None,
    max_new_tokens: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each of our tasks, over all its languages; a task with fewer held-out problems gives all it has."""
    chosen = [tasks.get(name) for name in names]  # before loading: a misspelt name should not cost a minute
    engine = _engine(model_dir)

    def encode(problem: tasks.Problem) -> list[int]:
        return question_ids(engine.tokenizer, problem.prompt)

    return [
        {"model": str(model_dir)}
        | scoring.evaluate(
            engine, encode, task, problems=min(problems, task.size("test") or problems), samples=samples, k=k,
            temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
        )
        for task in chosen
    ]  # fmt: skip


def evaluate_lm_eval(
    model_dir: Path, *, names: Sequence[str], include: Path | None = None, limit: int | None = None, chat: bool = False
) -> list[dict[str, Any]]:
    """A row for each lm-eval task; see `harness.evaluate`."""
    try:
        from bessemer.eval import lm_eval_model
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError("--lm-eval needs the lm-eval library: pip install 'bessemer[eval]'") from None
    return [
        {"model": str(model_dir)} | row
        for row in lm_eval_model.evaluate(lambda: _engine(model_dir), names, include=include, limit=limit, chat=chat)
    ]


def _engine(model_dir: Path) -> Engine:
    speed.keep_memory()
    return Engine(*setup.load_model(model_dir), setup.workers())
