"""What stages share: the recipe's model config, a model with its tokenizer, and how this machine computes fastest."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from bessemer.probe import cpp_compiler
from bessemer.workers import Workers, cores

if TYPE_CHECKING:
    from bessemer.config.recipe import LayoutConfig, Recipe
    from bessemer.config.training import FineTuningConfig

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt."""


PRECISION = "precision.txt"
"""File in a stage's state: the dtype that measured faster when it began."""


def model_config(recipe: Recipe, changes: dict[str, Any] | None = None) -> ModelConfig:
    """The recipe's [model] table as a config, with a stage's own changes to it."""
    values = dict(recipe.model) | (changes or {})
    return preset(values.pop("preset", "tiny"), recipe.of_model, **values)


def device() -> torch.device:
    """What this process computes on (`probe.device`)."""
    return probe.device()


def describe_device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if device().type == "mps":
        return "the GPU of a Mac (MPS)"
    return f"{cores()} CPU core" + ("s" if cores() > 1 else "")


def workers() -> Workers:
    """One process per core on a CPU, each computing on one core; one process on a GPU."""
    found = side_by_side(cores()) if device().type == "cpu" else Workers()
    if found.n > 1:
        torch.set_num_threads(1)
    return found


def side_by_side(n: int) -> Workers:
    """This process and n - 1 helpers; this one alone if no add-on brings them."""
    helpers = plugins.hook("workers")
    return Workers() if helpers is None else helpers(n)


def batch_rows(samples: int) -> int:
    """Rows the engine decodes together: 64 to 512, in a number of batches that two and four cores share evenly. It
    depends only on the job, so that samples do not depend on the number of cores."""
    batches = 4 * -(-samples // 2048) if samples >= 512 else 2
    return max(64, -(-samples // batches))


def choose_precision(
    precision: Precision, agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
    state: Path | None = None,
) -> probe.Choice:  # fmt: skip
    """The compute dtype of a stage: as named, by the device, or the one measured to be faster when the stage of `state`
    began, since a later measurement may turn out otherwise; many ranks `agree` on rank 0's."""

    def decided() -> list[str]:
        measured = state if precision == "auto" and device().type == "cpu" else None
        choice = (measured and kept_precision(measured)) or precision_on(precision, device())
        if measured:
            keep_precision(measured, choice)
        return [str(choice.dtype).removeprefix("torch."), choice.why]

    dtype, why = agree(decided)
    return probe.Choice(getattr(torch, dtype), why)


def keep_precision(state: Path, choice: probe.Choice) -> None:
    """Every later choice of the stage of `state` is this dtype."""
    state.mkdir(parents=True, exist_ok=True)
    (state / PRECISION).write_text(str(choice.dtype).removeprefix("torch."))


def kept_precision(state: Path) -> probe.Choice | None:
    """What the stage of `state` computes in on a CPU; None before it has been chosen."""
    path = state / PRECISION
    dtype = path.read_text() if path.is_file() else ""
    known = dtype in ("float32", "bfloat16")  # a kill may have cut it, and then nothing has been computed
    return probe.Choice(getattr(torch, dtype), f"{dtype} (as when the stage began)") if known else None


def precision_on(precision: Precision, where: torch.device) -> probe.Choice:
    """The compute dtype on this device."""
    if where.type == "cuda":
        return probe.on_gpu(precision, torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where))
    if precision == "device" or (precision == "auto" and where.type != "cpu"):
        return probe.Choice(torch.float32, "float32")
    if precision != "auto":
        return probe.Choice(getattr(torch, precision), f"{precision} (set by the recipe)")
    return probe.compute_dtype(probe.gemm_rates(where))


def set_precision(
    model: LanguageModel, config: OptimizerConfig, say: Callable[[str], None], state: Path,
    agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(), compiled: bool = False,
) -> torch.dtype:  # fmt: skip
    """The compute dtype that a stage's `precision` chooses, as in `choose_precision`; applies `fp8` to `model`."""
    choice = choose_precision(config.precision, agree, state)
    if choice.dtype != torch.float32 and device().type == "cuda":
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
    """Says what a stage computes with, in one line, and lets float32 products on a GPU run in TF32."""
    where, full = device(), choice.dtype == torch.float32
    facts = [f"compute in {choice.why}"]
    if where.type == "cuda":
        # In BF16 only what must be exact is left in float32, the gate's scores above all (V3 3.3.1).
        torch.set_float32_matmul_precision("high" if full else "highest")
        facts[0] += f"{', products in TF32' if full else ''}, on {describe_device()}"
    elif where.type != "cpu":
        facts.append(f"on {describe_device()}")
    facts += ops.facts(model, where, choice.dtype)
    if where.type == "cuda":
        facts.append("layers compiled" if compiled else "layers not compiled")
    say("; ".join(facts))


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
    """Makes training recompute in backward what `layout` says. A model of another family has no such phases: the
    recipe's other stages may need them, so it goes on without."""
    if model.layers:
        model.set_recompute(layout.recompute)
    elif layout.recompute:
        say("[layout] recompute is for models of the DeepSeek V3 family; this one stores its activations")


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


def keep_memory() -> bool:
    """Makes glibc keep freed memory. A training step allocates the same large tensors again and again; by default each
    is a fresh mapping whose pages the kernel must clear first. Returns whether it took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(M_MMAP_MAX, 0)
            and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            and libc.mallopt(M_TOP_PAD, 256 << 20)
        )
    except (OSError, AttributeError):  # another C library
        return False


COMPILE_FLOPS = 5e13
"""Training FLOPs from which compiling for a CPU without kernels is worth it: it takes one to two minutes and saves a
seventh of half an hour of one core at 25 GFLOPS. With kernels it gains nothing (docs/log.md)."""


def want_compile(
    setting: Literal["auto", "on", "off"], flops: float, say: Callable[[str], None] = lambda text: None
) -> bool:
    """Whether to compile. auto: on a GPU; on a CPU without kernels, with a C++ compiler and more than `COMPILE_FLOPS`
    of training. Never on a GPU where a trial fails, which is reported."""
    if setting != "off" and torch.cuda.is_available():
        if trouble := probe.gpu_compiler_trouble():
            say(trouble)
        return trouble is None
    if setting != "auto":
        return setting == "on"
    without = device().type == "cpu" and ops.instructions() == "off"
    return without and flops > COMPILE_FLOPS and cpp_compiler() is not None


def compile_layers(layers: Iterable[torch.nn.Module]) -> None:
    """Compiles layers in place; names and parameters stay, results change by rounding."""
    # All layers share one limit on graphs: kinds of layers, training or not, row lengths, sizes of `Packed`. Beyond it
    # torch would go on without compiling. (torch._dynamo is imported only here, which keeps start-up fast.)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers:
        ops.before_tracing(getattr(layer, "layer", layer))  # an MTP module holds one
    for layer in layers:
        layer.compile(dynamic=False)
