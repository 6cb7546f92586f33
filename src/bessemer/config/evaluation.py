"""Stages that evaluate models."""

from pydantic import Field

from bessemer.config.table import StageConfig, StageRef
from bessemer.config.units import Tokens


class EvalConfig(StageConfig):
    models: list[StageRef]
    """Stages whose models are compared, in the order of the table."""
    tasks: list[str]
    """Task families, from their test split."""
    problems: int = Field(150, ge=1)
    """Problems per task and language."""
    samples: int = Field(16, ge=1)
    """Samples per problem; pass@1 is their mean (R1: 4 to 64)."""
    k: int | None = Field(None, ge=1)
    """k of pass@k and maj@k (the paper's cons@k). Default: all samples."""
    temperatures: list[float] = Field(default=[1.0])
    """Sampling temperatures (R1: 0.6); a second one tells sharpening from ability."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampling (R1: 0.95); 1 asks the model as it is."""
    max_new_tokens: Tokens = 160
    """Length cap of a completion (R1: 32,768)."""
    searched_words: Tokens = 50_000_000
    """Words of each earlier stage's training text that are searched for the problems, at most; 0: none are."""


class LongEvalConfig(StageConfig):
    models: list[StageRef]
    """Stages whose models are compared, before the extension first and the longest last."""
    switched: list[StageRef] = Field(default_factory=list)
    """Of these also with the positions of the last model, untrained: what YaRN alone gives."""
    haystack: str = ""
    """Source of the text that needles are hidden in; its documents are held out as those of `corpus` are. Empty: no
    needles."""
    corpus: StageRef
    """The corpus whose held-out rows give the loss by position, as long as the longest length."""
    parts: list[str] = Field(default_factory=list)
    """Of `corpus`, those for the loss by position."""
    lengths: list[int] = Field(default=[256, 1024, 4096])
    """Tokens of a prompt with its answer."""
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0])
    """Share of the text that lies before the needle."""
    problems: int = Field(40, ge=1)
    """Of every length and depth."""
    needles: int = Field(8, ge=1)
    """In every text; one of them is asked for, the others are there to be taken for it."""
    rows: int = Field(32, ge=1)
    """Held-out rows of every part, for the loss by position and of short rows."""
    short: StageRef | None = None
    """A corpus of short rows, for what the extension costs there. Default: not measured."""
    short_parts: list[str] = Field(default_factory=list)
    """Of `short`, those that are measured. Default: all. Rows are read without a document mask here, so parts of
    many short documents that were trained with one say little."""
    short_bound: float = Field(0.1, gt=0)
    """Bits per byte, as a mean over those parts, that a model may lose there against the first one; more
    is said aloud."""
