"""Measurements of training steps: traces of chosen steps, model FLOPs utilisation (MFU), GPU memory."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bessemer.model.layer import Layer
from bessemer.model.protocol import LanguageModel

if TYPE_CHECKING:
    from bessemer.config.training import OptimizerConfig

GIB = 1 << 30
PHASES = ("attend", "dispatch", "experts", "combine", "finish")


@cache
def peak_flops(name: str) -> float | None:
    """Dense BF16 FLOP/s of a card by the name that its driver gives it; None for an unknown one. PCIe and NVL variants
    count as unknown, being slower than the card in `hardware.toml`, except A100's PCIe."""
    text = resources.files("bessemer.addons.plan").joinpath("hardware.toml").read_text(encoding="utf-8")
    plain = re.sub(r"\b(NVIDIA|AMD|GeForce|Instinct) ", "", name).replace("RTX ", "RTX")
    card, *suffixes = re.split(r"[ -]", plain)
    form = r"\d+GB|HBM\w+|SXM\d*|OAM" + (r"|PCIE|PCIe" if card == "A100" else "")
    if card not in (table := tomllib.loads(text)) or not all(re.fullmatch(form, word) for word in suffixes):
        return None
    return table[card]["bf16"] * 1e12


class Instruments:
    """One trainer's instruments. `devices`: how many compute a step together; `rank`: which of them this process is."""

    def __init__(
        self, config: OptimizerConfig, model: LanguageModel, device: torch.device, dtype: torch.dtype,
        folder: Path | None, say: Callable[[str], None], devices: int = 1, rank: int = 0,
    ):  # fmt: skip
        self.steps = frozenset(config.profile_steps) if folder is not None else frozenset()
        self.model, self.device, self.folder, self.say = model, device, folder, say
        self.devices, self.rank = devices, rank
        self._peak = None
        if device.type == "cuda" and dtype == torch.bfloat16:
            self._peak = peak_flops(torch.cuda.get_device_name(device))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces the step if it is one of `profile_steps`. Peaks of memory count from here: rollouts fill a card."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if number not in self.steps:
            yield
            return
        assert self.folder is not None, "without a folder no step is traced"
        on_gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with ExitStack() as stack:
            stack.enter_context(named_phases(self.model, on_gpu))
            trace = stack.enter_context(torch.profiler.profile(activities=kinds, record_shapes=True))
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{number:08d}" + (f"-rank-{self.rank:05d}" if self.devices > 1 else "") + ".json.gz"
        part = self.folder / f".tmp-{name}"
        trace.export_chrome_trace(str(part))
        part.rename(self.folder / name)
        if self.rank == 0:
            self.say(f"step {number} traced: {self.folder / name} (open it in https://ui.perfetto.dev)")

    def values(self, tokens: int, rows: int, mtp: bool, seconds: float) -> dict[str, float]:
        """Metrics of a step on a GPU; none on a CPU. MFU counts the FLOPs that the model needs, without
        recomputation."""
        if self.device.type != "cuda":
            return {}
        values = {
            "gpu/memory_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "gpu/allocator_retries": float(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)),
        }
        flops = self.model.training_flops(tokens // rows, mtp) if self._peak is not None and rows else None
        if self._peak is not None and flops is not None:
            values["gpu/mfu"] = flops * tokens / seconds / (self._peak * self.devices)
        return values


@contextmanager
def named_phases(model: nn.Module, nvtx: bool) -> Iterator[None]:
    """Inside, the five phases of every layer are ranges of a trace, named like `layers.3.experts`; with `nvtx`, of
    NVIDIA's tools too. Compiled layers have none: they are one function."""
    named: list[tuple[Any, str]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, Layer) and layer._compiled_call_impl is None:
            for phase in PHASES:
                setattr(layer, phase, _in_range(getattr(layer, phase), f"{name}.{phase}", nvtx))
                named.append((layer, phase))
    try:
        yield
    finally:
        for layer, phase in named:
            delattr(layer, phase)


def _in_range(function: Callable[..., Any], name: str, nvtx: bool) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.profiler.record_function(name))
            if nvtx:
                stack.enter_context(torch.cuda.nvtx.range(name))
            return function(*arguments, **options)

    return call
