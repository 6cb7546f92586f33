"""Reads every architecture that the transformers library knows: the family "*" of `families`."""

from __future__ import annotations

from pathlib import Path

import torch

from bessemer import plugins
from bessemer.addons.families import causal_lm, lora, own_lora
from bessemer.addons.families.hf_tokenizer import HFTokenizer
from bessemer.config.training import LoRAConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.hf import families
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Transformer


class Transformers:
    """Networks and reward models that transformers computes, their tokenizers, and peft's adapters on them; adapters on
    networks of our own, too."""

    def load(self, directory: Path, dtype: str | torch.dtype | None, device: str | torch.device) -> LanguageModel:
        return causal_lm.load(directory, dtype, device)

    def load_scorer(self, directory: Path, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
        return causal_lm.load(directory, dtype, device, causal_lm.CausalScorer)

    def load_tokenizer(self, directory: Path, own_template: bool) -> Tokenizer:
        return HFTokenizer.load(directory, own_template)

    def check_adapters(self) -> None:
        lora.check_installed()

    def attach(
        self, model: LanguageModel, config: LoRAConfig, seed: int, base: Path, stage: str
    ) -> tuple[LanguageModel, str]:
        if isinstance(model, Transformer):
            own = own_lora.attach(model, config, seed, base, stage)
            return own, own_lora.describe(own)
        adapted = lora.attach(model, config, seed, base, stage)
        return adapted, lora.describe(adapted)


plugins.register("families", families.REST)(Transformers())
