"""Stages that evaluate models."""

from typing import Annotated, Literal

from pydantic import Field

from bessemer.config.table import SamplingConfig, StageRef, TaskName
from bessemer.config.units import Tokens

ShotKind = Literal["worked", "direct", "other-language", "fables"]
"""What the examples before a question are; `addons/evals/shots.py` says more."""


class EvalConfig(SamplingConfig):
    models: list[StageRef]
    """Stages whose models are compared, in the order of the table."""
    tasks: list[TaskName]
    """Task families, from their test split."""
    problems: Annotated[int, Field(ge=1)] | Literal["all"] = 150
    """Problems per task and language; all: every held-out one, such as the 30 of AIME."""
    samples: int = Field(16, ge=1)
    """Samples per problem; pass@1 is their mean (R1: 4 to 64)."""
    k: int | None = Field(None, ge=1)
    """k of pass@k and maj@k (the paper's cons@k). Default: all samples."""
    temperatures: list[Annotated[float, Field(ge=0, le=100)]] = Field(default=[1.0])
    """Sampling temperatures (R1: 0.6); a second one distinguishes a sharper distribution from more ability."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling threshold (R1: 0.95); 1: the model's full distribution."""
    max_new_tokens: Tokens = Field(160, ge=1)
    """Length cap of a completion (R1: 32,768); of an episode, what the model writes in all turns together."""
    shots: list[Annotated[int, Field(ge=0)]] = Field(default=[0])
    """Numbers of examples before the question, each evaluated in turn (R1 5: 0, as few-shot prompts degrade it). They
    are training pages of the task, different ones for every problem."""
    shot_kind: ShotKind = "worked"
    """worked: pages with thoughts and a right answer; direct: their questions with the answers alone; other-language:
    worked, in the task's other language; fables: the same number of tokens of fables, a control."""
    searched_words: Tokens = 50_000_000
    """Maximum words of each earlier stage's training text to search for the problems; 0: no search."""
