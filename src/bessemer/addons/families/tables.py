"""Table of the stage that imports a model."""

from typing import ClassVar, Literal

from pydantic import Field

from bessemer.config.places import located
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

    @property
    def context(self) -> int | None:
        """That of a model which is here already."""
        from bessemer.addons.families.text_limits import longest_text
        from bessemer.data.model_files import read_object

        path = located(self.model) / "config.json"
        return longest_text(read_object(path)) if path.is_file() else None
