"""Tables of the stages that produce data or import models: corpora, conversations, imported models."""

from typing import ClassVar

from pydantic import Field

from bessemer.config.table import SourceName, StageConfig, StageRef
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
