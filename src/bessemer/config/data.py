"""Stages that make or bring in what models are trained on: corpora, conversations, imported models."""

from typing import Literal

from pydantic import Field

from bessemer.config.table import StageConfig, StageRef
from bessemer.config.units import Tokens


class CorpusConfig(StageConfig):
    ignore_at_default = frozenset({"tokenizer"})

    parts: dict[str, str] = Field(default_factory=dict)
    """Part name = where its text comes from: a source, a path, hf://owner/name, task:NAME, needle:SOURCE, or
    shards:FOLDER."""
    limits: dict[str, Tokens] = Field(default_factory=dict)
    """Part name = most tokens to keep of it. Task parts are endless and need one."""
    mix: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Part name = knobs of its task's documents, such as {countdown = {systematic = 0.2}}."""
    row_length: int = Field(256, ge=8)
    """Tokens per packed row: the sequence length of pre-training."""
    vocab_sample: int = Field(4_000_000, ge=10_000)
    """Characters of each part the tokenizer is trained on."""
    heldout: float = Field(0.02, ge=0, lt=0.5)
    """Share of documents, chosen by hash, kept for validation."""
    tokenizer: StageRef | None = None
    """The corpus whose tokenizer these rows are made with, such as one of shorter rows that a model is extended
    from. Default: one of its own."""
    fim_rate: float = Field(0.1, ge=0, le=1)
    """Share of training documents of `fim_parts` in prefix-suffix-middle order (V3 4.1: 0.1)."""
    fim_parts: list[str] = Field(default_factory=list)
    """Parts that FIM applies to; the paper applies it to all."""
    boundary_split_rate: float = Field(0.05, ge=0, le=1)
    """Share of "punctuation + line break" tokens split in two (V3 4.1 leaves the share open)."""


class ImportConfig(StageConfig):
    model: str
    """package:NAME of the registry, a local Hugging Face directory, or hf://owner/name, with @REVISION at will."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the stored weights; training computes in its own."""
    system: str | None = Field(None, min_length=1)
    """A system message for every conversation that has none, written into the model's chat template."""
    style: Literal["zero"] | None = None
    """zero: R1-Zero's plain prompt, for a base model without a chat template. Default: the model's own template."""


class ExamplesConfig(StageConfig):
    tasks: list[str]
    """Task families with pre-training documents; examples are taken from them in turn."""
    examples: int = Field(200, ge=1)
    """Conversations to write (R1: thousands)."""


class RejectConfig(StageConfig):
    tasks: list[str]
    """Task families; problems are taken from them in turn, from their train split."""
    problems: int = Field(1000, ge=1)
    """Training problems to answer."""
    first_problem: int = Field(0, ge=0)
    """Number of the first of them, to keep away from those that RL has seen."""
    samples: int = Field(4, ge=1)
    """Answers per problem."""
    keep: int = Field(1, ge=1)
    """Answers kept per problem, at most."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature (cold start: 1)."""
    max_new_tokens: Tokens = 200
    """Length cap of an answer; what runs into it is dropped."""
    consistency: float = Field(1.0, ge=0, le=1)
    """Smallest share of the thoughts' words in the problem's language."""
    repeated: float = Field(0.25, ge=0, le=1)
    """Largest share of thought lines, and of runs of ten words, that stood there before."""
    paragraph: int = Field(200, ge=1)
    """Most words (Chinese: characters) of the thoughts between two line breaks."""
    others: int = Field(0, ge=0)
    """Conversations added that are not about reasoning (R1: 200K beside 600K): written answers of `general`."""
    form: Literal["as-is", "r1"] = "as-is"
    """as-is: the answer as it was written; r1: thoughts on lines of their own, then a sentence with the answer."""
