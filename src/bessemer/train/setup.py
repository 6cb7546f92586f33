"""What stages share: the recipe's model config, a model with its tokenizer, and how this machine computes fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bessemer import plugins, probe
from bessemer.config.table import Precision
from bessemer.config.training import OptimizerConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf import deepseek, model_directory
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import is_own, load
from bessemer.model import ops
from bessemer.model.config import ModelConfig, preset
from bessemer.model.protocol import LanguageModel, train_in_fp8
from bessemer.model.transformer import RECOMPUTES_ITSELF
from bessemer.workers import Workers, cores, side_by_side

if TYPE_CHECKING:
    from bessemer.config.recipe import LayoutConfig, Recipe
    from bessemer.config.training import FineTuningConfig


def model_config(recipe: Recipe, changes: dict[str, Any] | None = None) -> ModelConfig:
    """The recipe's [model] table as a config, with a stage's own changes to it."""
    values = dict(recipe.model) | (changes or {})
    return preset(values.pop("preset", "tiny"), recipe.of_model, **values)


def device() -> torch.device:
    """What this process computes on (`probe.device`)."""
    return probe.device()


def workers() -> Workers:
    """One process per core on a CPU, each computing on one core; one process on a GPU."""
    helpers = side_by_side(cores()) if device().type == "cpu" else Workers()
    if helpers.n > 1:
        torch.set_num_threads(1)
    return helpers


def batch_rows(samples: int) -> int:
    """Rows the engine decodes together: 64 to 512, in a number of batches that two and four cores share evenly. It
    depends only on the job, so that samples do not depend on the number of cores."""
    batches = 4 * -(-samples // 2048) if samples >= 512 else 2
    return max(64, -(-samples // batches))


def choose_precision(
    precision: Precision, agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
    state: Path | None = None,
) -> probe.Choice:  # fmt: skip
    """The compute dtype of a stage: as named, by the device, or the one that an add-on measured to be faster when the
    stage of `state` began; many ranks `agree` on rank 0's."""

    def decided() -> list[str]:
        measure = plugins.hook("measured-dtype") if precision == "auto" else None
        choice = (measure and measure(device(), state)) or precision_on(precision, device())
        return [str(choice.dtype).removeprefix("torch."), choice.why]

    dtype, why = agree(decided)
    return probe.Choice(getattr(torch, dtype), why)


def precision_on(precision: Precision, where: torch.device) -> probe.Choice:
    """The compute dtype on this device, without a measurement."""
    if where.type == "cuda":
        return probe.on_gpu(precision, torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where))
    if precision in ("device", "auto"):
        return probe.Choice(torch.float32, "float32")
    return probe.Choice(getattr(torch, precision), f"{precision} (set by the recipe)")


def set_precision(
    model: LanguageModel, config: OptimizerConfig, say: Callable[[str], None], state: Path,
    agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(), compiled: bool = False,
) -> torch.dtype:  # fmt: skip
    """The compute dtype that a stage's `precision` chooses, as in `choose_precision`; applies `fp8` to `model`."""
    choice = choose_precision(config.precision, agree, state)
    if choice.dtype != torch.float32 and "masters" not in choice.why:
        choice = choice._replace(why=f"{choice.why} with float32 masters")
    announce(model, choice, say, compiled)
    if config.fp8 != "off":
        if not model.layers:
            raise UserError(f'stage "{config.name}": fp8 is for models of the DeepSeek V3 family; set fp8 = "off"')
        if probe.float64_home(device()) != device():
            raise UserError(f'stage "{config.name}": MPS has no FP8; set fp8 = "off", or {probe.VARIABLE}=cpu')
        served = train_in_fp8(model, config.fp8)
        say(f"matrices of attention, FFN and experts in FP8 ({config.fp8}), {served}")
    return choice.dtype


def announce(model: LanguageModel, choice: probe.Choice, say: Callable[[str], None], compiled: bool = False) -> None:
    """Says in one line what a stage computes with; an add-on prepares the device (the hook `prepare-device`)."""
    prepare = plugins.hook("prepare-device")
    where, facts = ("", []) if prepare is None else prepare(choice.dtype, compiled)
    say("; ".join([f"compute in {choice.why}{where}", *ops.facts(model, device(), choice.dtype), *facts]))


def load_model(
    directory: Path, context: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32, mtp: bool = True
) -> tuple[LanguageModel, Tokenizer]:
    """Loads a model directory, ours or any Hugging Face causal LM, onto this machine's device; float32 is for training.
    `context`, only for ours, is as in `deepseek.open_directory`; `mtp` false leaves out the MTP modules."""
    if not directory.is_dir():
        raise UserError(f"no model directory at {directory}")
    if context and is_own(directory):
        return deepseek.load(directory, dtype, device(), mtp, context=context), load_tokenizer(directory)
    if context:
        raise UserError(f"{directory} is not of the DeepSeek V3 family; its context cannot be changed here")
    return load(directory, dtype=dtype, device=device(), mtp=mtp), load_tokenizer(directory)


def load_to_sample(
    directory: Path,
    say: Callable[[str], None],
    context: Mapping[str, Any] | None = None,
    precision: Precision = "device",
    state: Path | None = None,
) -> tuple[LanguageModel, Tokenizer]:  # fmt: skip
    """`load_model` for a model that is not trained; by default in BF16 on a GPU that has it, in float32 on a CPU.
    `state`: as in `choose_precision`."""
    choice = choose_precision(precision, state=state)
    model, tokenizer = load_model(directory, context, choice.dtype)
    announce(model, choice, say)
    return model, tokenizer


def load_frozen(directory: Path) -> LanguageModel:
    """A model that is read and never trained, without MTP modules; in BF16 on a GPU."""
    model = load(directory, choose_precision("device").dtype, device(), mtp=False)
    return model.eval().requires_grad_(False)


def adapted(
    model: LanguageModel, config: FineTuningConfig, folder: Path, seed: int, layout: LayoutConfig,
    say: Callable[[str], None],
) -> LanguageModel:  # fmt: skip
    """The model of `folder` as the stage trains it: with adapters if its table has [lora], recomputing in backward what
    `layout` says."""
    if config.lora is not None:
        model, line = model_directory.adapted(model, config.lora, seed, folder, config.name)
        say(line)
    recompute(model, layout, say)
    return model


def recompute(model: LanguageModel, layout: LayoutConfig, say: Callable[[str], None]) -> None:
    """Makes training recompute in backward what `layout` says; of a model without such phases, whole layers."""
    model.set_recompute(layout.recompute)
    if layout.recompute and not model.layers:
        say("[layout] recompute: backward computes whole layers of this model again")


def check_recompute(recipe: Recipe, stage: str) -> None:
    """UserError if a stage that trains in FP8 should also recompute what the recipe's layout says."""
    if recipe.layout.recompute and getattr(recipe.stage(stage), "fp8", "off") != "off":
        raise UserError(f'stage "{stage}": {RECOMPUTES_ITSELF}')


def check_layout(
    recipe: Recipe, stage: str, rows: Iterable[float], cfg: ModelConfig | None = None, split_rows: bool = True
) -> None:
    """UserError, before anything runs, if the recipe's layout does not fit the stage, its network or a step of that
    many rows. `split_rows`: as in `Runtime.read`."""
    check_recompute(recipe, stage)
    check = plugins.hook("check-layout")
    if check is not None:
        check(recipe, stage, rows, cfg, split_rows=split_rows)


def keep_memory() -> None:
    """Lets this process keep memory that it frees, if an add-on knows how: every step allocates the same tensors."""
    keep = plugins.hook("keep-memory")
    if keep is not None:
        keep()
