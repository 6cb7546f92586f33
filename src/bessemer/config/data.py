"""Tables of the stages that produce data or import models: corpora, conversations, imported models."""

from typing import ClassVar, Literal

from pydantic import Field

from bessemer.config.judge import JudgeConfig
from bessemer.config.table import SamplingConfig, SourceName, StageConfig, StageRef, TaskName
from bessemer.config.units import Tokens


class CorpusConfig(StageConfig):
    starts_from: ClassVar = False

    parts: dict[str, SourceName] = Field(default_factory=dict)
    """Part name = source of its text: a registered source, a path, hf://owner/name, task:NAME, needle:SOURCE, or
    shards:FOLDER."""
    limits: dict[str, Tokens] = Field(default_factory=dict)
    """Part name = maximum number of its tokens. Task parts are endless and need a limit."""
    mix: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Part name = options of its task's documents, such as {countdown = {systematic = 0.2}}."""
    row_length: int = Field(256, ge=8)
    """Tokens per packed row: the sequence length of pre-training."""
    vocab_sample: int = Field(4_000_000, ge=10_000)
    """Characters of each part to train the tokenizer on."""
    heldout: float = Field(0.02, ge=0, lt=0.5)
    """Share of documents held out for validation, chosen by hash."""
    tokenizer: StageRef | None = None
    """Earlier stage whose tokenizer to use: a model to be trained further, or another corpus, such as the one with
    shorter rows that a model was trained on before its extension. Default: a tokenizer of its own."""
    tool_tokens: bool = False
    """Give the stage's own tokenizer V3's nine tool-call marks as tokens. Otherwise these marks tokenise as bytes."""
    fim_rate: float = Field(0.1, ge=0, le=1)
    """Share of training documents of `fim_parts` in prefix-suffix-middle order (V3 4.1: 0.1)."""
    fim_parts: list[str] = Field(default_factory=list)
    """Parts with fill-in-the-middle (V3: all)."""
    boundary_split_rate: float = Field(0.05, ge=0, le=1)
    """Share of "punctuation + line break" tokens split in two (V3 4.1 does not state the share)."""


class ImportConfig(StageConfig):
    makes_model: ClassVar = True
    starts_from: ClassVar = False

    model: SourceName
    """package:NAME of the registry, a local Hugging Face directory, or hf://owner/name, optionally with @REVISION."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored weights; training stages have their own compute dtype."""
    system: str | None = Field(None, min_length=1)
    """System message for conversations without one, written into the model's chat template."""
    style: Literal["zero", "r1-zero"] | None = None
    """Chat template, exported with the model. r1-zero: R1-Zero's (R1 Table 1); zero: the same without its preamble.
    Default: the model's own or, if it has none, r1-zero."""


class ExamplesConfig(StageConfig):
    starts_from: ClassVar = False

    tasks: list[TaskName]
    """Task families with pre-training documents; examples come from each in turn."""
    examples: int = Field(200, ge=1)
    """Number of conversations (R1: thousands)."""


class RejectConfig(SamplingConfig):
    tasks: list[TaskName]
    """Task families; problems come from their train splits in turn."""
    problems: int = Field(1000, ge=1)
    """Number of training problems to answer."""
    first_problem: int = Field(0, ge=0)
    """Index of the first problem, to avoid problems that RL has seen: rollouts times prompts_per_rollout times
    max_resamples of that stage, with its difficulty_filter times filter_pool, and its own first_problem more. This
    holds if both stages have the same `tasks`, since the number counts turns over the stage's own list."""
    samples: int = Field(4, ge=1)
    """Answers per problem."""
    judge: JudgeConfig | None = None
    """A model that judges answers to problems with a reference answer and no rule, such as general prompts (R1 2.3.3).
    Without it, such answers are dropped."""
    answers: Literal["right", "wrong", "all"] = "right"
    """Which answers to keep. right: right ones in the required form; wrong, all: controls, readable ones that are
    wrong, or every readable one."""
    keep: int = Field(1, ge=1)
    """Maximum number of answers kept per problem."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Sampling temperature (cold start: 1)."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Length cap of an answer; answers that reach it are dropped."""
    consistency: float = Field(1.0, ge=0, le=1)
    """Minimum share in the problem's language, of the thoughts' words and of the summary's."""
    repeated: float = Field(0.25, ge=0, le=1)
    """Maximum share of repeated thought lines, and of repeated runs of ten words."""
    paragraph: int = Field(200, ge=1)
    """Maximum words (Chinese: characters) of the thoughts between two line breaks."""
    others: int = Field(0, ge=0)
    """Number of non-reasoning conversations to add (R1: 200K, next to 600K)."""
    others_data: list[SourceName] = Field(default=[])
    """Conversations to add, the first `others` of them: .jsonl or .parquet files with `messages`, directories of them,
    or hf://owner/name. Default: written answers of `general`."""
    form: Literal["as-is", "r1"] = "as-is"
    """as-is: the unchanged answer; r1: thoughts on lines of their own, then a sentence with the answer."""
