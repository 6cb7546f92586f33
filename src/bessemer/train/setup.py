"""What the stages share about models: the recipe's config, the compute dtype, loading with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bessemer.config.training import Precision
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.hf.causal_lm import CausalLM, is_foreign, load_any
from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.model.config import ModelConfig
from bessemer.model.counts import flops_per_token
from bessemer.model.presets import preset
from bessemer.model.transformer import Transformer
from bessemer.precision import probe
from bessemer.workers import Workers, cores, one_core_each


def model_config(recipe: Any, changes: dict[str, Any] | None = None) -> ModelConfig:
    """The recipe's [model] table as a config, with a stage's own changes to it."""
    values = dict(recipe.model) | (changes or {})
    return preset(values.pop("preset", "tiny"), **values)


def estimate_seconds(recipe: Any, tokens: float, changes: dict[str, Any] | None = None, length: int = 256) -> float:
    """A first guess at how long training on so many tokens, in rows of `length`, takes here, before anything is
    measured: 25 GFLOPS a core (measured with `tiny` and `small` on two Xeons), 100 TFLOPS on a GPU."""
    rate = 1e14 if torch.cuda.is_available() else 25e9 * cores()
    return tokens * flops_per_token(model_config(recipe, changes), length).training / rate


def decode_seconds(recipe: Any, tokens: float) -> float:
    """The same for decoding, which costs about a quarter of training."""
    return estimate_seconds(recipe, tokens / 4)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def workers() -> Workers:
    """A process per core on a CPU; on a GPU one stream of work is enough."""
    return one_core_each() if device().type == "cpu" else Workers(1)


def batch_rows(samples: int) -> int:
    """Rows the engine decodes together: four batches for the cores to share, of a size that pays (512 rows make 1.8x
    the tokens/s of 128). A function of the job alone, so that samples do not depend on how many cores there are."""
    return min(max(-(-samples // 4), 128), 512)


def choose_precision(
    precision: Precision, agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide()
) -> probe.Choice:
    """The compute dtype: as named, or the faster one by measurement; many ranks `agree` on that of the first."""
    if precision != "auto":
        return probe.Choice(getattr(torch, precision), f"{precision} (set by the recipe)")

    def measured() -> list[str]:
        choice = probe.compute_dtype(probe.gemm_rates(device()))
        return [str(choice.dtype).removeprefix("torch."), choice.why]

    dtype, why = agree(measured)
    return probe.Choice(getattr(torch, dtype), why)


def load_model(directory: Path, context: Mapping[str, Any] | None = None) -> tuple[Transformer | CausalLM, Tokenizer]:
    """A model directory, ours or any Hugging Face causal LM, on this machine's device, in float32. `context`, for ours
    alone: as in `hub.open_directory`."""
    if not directory.is_dir():
        raise UserError(f"no model directory at {directory}")
    if context and not is_foreign(directory):
        return hub.load(directory, torch.float32, device(), context=context), load_tokenizer(directory)
    if context:
        raise UserError(f"{directory} is not of the DeepSeek V3 family; its context cannot be changed here")
    return load_any(directory, dtype=torch.float32, device=device()), load_tokenizer(directory)
