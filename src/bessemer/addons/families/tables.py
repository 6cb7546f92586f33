"""Table of the stage that imports a model."""

from typing import ClassVar, Literal

from pydantic import Field

from bessemer.config.table import SourceName, StageConfig


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

    @property
    def imported(self) -> str:
        return self.model
