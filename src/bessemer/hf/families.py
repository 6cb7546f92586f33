"""Model families of add-ons, which read the model directories that are not in our own format; and tokenizers, any.

A family registers under its architecture's name in config.json (`model_type`), or under "*" for all architectures that
no other family reads:

    plugins.register("families", "*")(Transformers())        in a module of the entry-point group bessemer.families

`model_directory` reads networks. This module imports no torch, since workers that only tokenize need none.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bessemer import plugins
from bessemer.data import chat
from bessemer.data.chat import BOS
from bessemer.data.model_files import read_object
from bessemer.data.tokenizer import OtherSplit, Tokenizer, template_of, token_text
from bessemer.errors import UserError

if TYPE_CHECKING:
    import torch

    from bessemer.config.training import LoRAConfig
    from bessemer.model.protocol import LanguageModel

REST = "*"
"""The family that reads every architecture without one of its own."""


class Family(Protocol):
    """Reads model directories that are not in our own format. `dtype`: of all parameters; None: as stored."""

    def load(self, directory: Path, dtype: str | torch.dtype | None, device: str | torch.device) -> LanguageModel:
        """The network of a directory."""

    def load_scorer(self, directory: Path, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
        """The reward model of a directory."""

    def load_tokenizer(self, directory: Path, own_template: bool) -> Tokenizer:
        """The tokenizer of a directory; without `own_template` its chat template is not looked at."""

    def check_adapters(self) -> None:
        """UserError if `attach` lacks a library."""

    def attach(
        self, model: LanguageModel, config: LoRAConfig, seed: int, base: Path, stage: str
    ) -> tuple[LanguageModel, str]:
        """(the model of the directory `base` with new adapters, drawn with `seed`; a line that describes them)."""


def family(architecture: str = REST) -> Family:
    """The family of an architecture. UserError if no add-on reads it."""
    table = plugins.table("families")
    match: Family | None = table.get(architecture, table.get(REST))
    if match is None:
        raise UserError(
            f"models and tokenizers of other families ({architecture}) are read by an add-on that is not here; install "
            "bessemer whole, or a package that registers this family"
        )
    return match


def architecture_of(directory: Path) -> str:
    """The architecture's name in config.json."""
    return str(read_object(directory / "config.json").get("model_type"))


def load_tokenizer(directory: str | Path, own_template: bool = True) -> Tokenizer:
    """The tokenizer of a model directory: ours if the directory has our tokens, split and one of our templates. With
    `own_template` false a foreign model's template, which may be one that cannot be used, is not looked at."""
    directory = Path(directory)
    config = read_object(directory / "tokenizer_config.json")
    if token_text(config.get("bos_token")) == BOS and chat.style_of(template_of(directory, config)) is not None:
        with suppress(OtherSplit):
            return Tokenizer.load(directory)
    architecture = architecture_of(directory) if (directory / "config.json").is_file() else REST
    return family(architecture).load_tokenizer(directory, own_template)
