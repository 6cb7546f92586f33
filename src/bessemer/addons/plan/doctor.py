"""`bessemer doctor`: the measured capabilities of this machine, what will be slow on it, and why.

`examine` gathers facts (plain JSON) with notes. Each note has a level: ok, slow (it works, at a stated cost) or bad (it
does not work until fixed). `describe` is the text for a terminal.
"""

import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bessemer import __version__, probe
from bessemer.addons.accelerate import measured
from bessemer.addons.accelerate.helpers import Helpers
from bessemer.addons.accelerate.kernels import build, library
from bessemer.addons.accelerate.precision import backends
from bessemer.addons.accelerate.shared_memory import shared_free
from bessemer.addons.distributed import mesh
from bessemer.addons.plan import pace, plan_config
from bessemer.addons.tasks import sandbox
from bessemer.config.builtin import find_recipe
from bessemer.config.recipe import Recipe
from bessemer.model.transformer import Transformer
from bessemer.system import granted_cores, sysctl
from bessemer.workers import cores

_GB = 1e9
_NEED_DISK_GB = 2.0  # packages, packed rows and checkpoints of the tiny recipe, with a margin
_NEED_MEMORY_GB = 4.0
_NEED_SHARED_MB = 256  # `small`: the weights, and every worker's gradients
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")  # the last is the name on ARM


def examine(folder: Path) -> dict[str, Any]:
    """Facts about this machine; `folder` is where runs would be stored. Measuring takes a second or two."""
    build.forget_failures()  # the user may have fixed something since
    rates = {name: round(float(rate), 1) for name, rate in measured.gemm_rates().items()}
    choice = measured.compute_dtype(rates)
    total, available = _memory()
    facts: dict[str, Any] = {
        "bessemer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": granted_cores(),
        "threads": torch.get_num_threads(),
        "workers": Helpers(cores()).n,
        "shared_memory_mb": shared_free() >> 20,
        "flags": _flags(),
        "idle_gpu": probe.idle_gpu(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "trained": trained(("cpu", "mps")) if torch.backends.mps.is_available() else {},
        "gemm_gflops": rates,
        "dtype": str(choice.dtype).removeprefix("torch."),
        "dtype_reason": choice.why,
        "fp8": [list(row) for row in backends.table("cuda" if torch.cuda.is_available() else "cpu")],
        "exchange": mesh.exchanges_here(),
        "sandbox": sandbox.level(),
        "sandbox_trials": {name: sandbox.trial(name) for name in sandbox.LEVELS},
        "compiler": next((path for name in _compilers() if (path := shutil.which(name))), None),
        "kernels": list(library.status()),
        "memory_gb": total,
        "memory_available_gb": available,
        "folder": str(folder),
        "disk_free_gb": _disk(folder),
        "writable": os.access(_existing(folder), os.W_OK),
    }
    facts["notes"] = as_notes(_judge(facts))
    return facts


def trained(devices: Iterable[str], seconds: float = 3.0) -> dict[str, float]:
    """Tokens per second at which each device trains the recipe tiny."""
    settings, cfg, length = plan_config.pretraining(Recipe.load(find_recipe("tiny")), needed_for="doctor")
    models = {name: Transformer(cfg).initialise(0).to(name) for name in devices}
    measured = {name: pace.training_rate(model, settings, length, seconds) for name, model in models.items()}
    return {name: of.rate * of.processor / of.wall for name, of in measured.items()}


def as_notes(problems: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    """JSON of (subject, level, text)."""
    return [{"about": about, "level": level, "text": text} for about, level, text in problems]


def describe(facts: dict[str, Any]) -> str:
    """One line per note: level, subject, fact and consequence."""
    marks = {"ok": "ok  ", "slow": "slow", "bad": "BAD "}
    lines = [f"{marks[note['level']]}  {note['about']:<9} {note['text']}" for note in facts["notes"]]
    bad = sum(note["level"] == "bad" for note in facts["notes"])
    lines.append(f"{bad} problem{'s' * (bad != 1)} to fix before a run" if bad else "ready to run")
    return "\n".join(lines)


def _judge(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("torch", "ok", f"bessemer {facts['bessemer']}, torch {facts['torch']}, python {facts['python']}"),
        _about_device(facts),
        _about_threads(facts),
        _about_workers(facts),
        _about_numbers(facts),
        _about_fp8(facts),
        _about_exchange(facts),
        _about_compiler(facts),
        _about_kernels(facts),
        _about_sandbox(facts),
        _about_memory(facts),
        _about_disk(facts),
    ]


def _about_device(facts: dict[str, Any]) -> tuple[str, str, str]:
    if facts["gpus"]:
        return "GPU", "ok", ", ".join(facts["gpus"])
    if facts["idle_gpu"]:
        return "GPU", "bad", facts["idle_gpu"]
    if facts["trained"]:
        cpu, mps = facts["trained"].values()
        text = f"MPS trains the recipe tiny at {mps:,.0f} tokens/s, the CPU at {cpu:,.0f}"
        if mps >= cpu:
            return "GPU", "ok", f"{text}: runs use MPS"
        return "GPU", "slow", f"{text}: set {probe.VARIABLE}=cpu, which MPS beats with larger models only"
    text = "none: models of more than ten million active parameters take days; recipes/tiny.toml is made for a CPU"
    return "GPU", "slow", text


def _about_threads(facts: dict[str, Any]) -> tuple[str, str, str]:
    cores, threads = facts["cores"], facts["threads"]
    text = f"{facts['cpu']}: {cores} cores, torch uses {threads} thread{'s' * (threads != 1)}"
    if threads > cores:
        return "CPU", "slow", f"{text}: more threads than cores, which slows all of them; set OMP_NUM_THREADS={cores}"
    if threads < cores // 2:
        return "CPU", "slow", f"{text}: the other cores are idle; unset OMP_NUM_THREADS"
    return "CPU", "ok", text


def _about_workers(facts: dict[str, Any]) -> tuple[str, str, str]:
    n, shared = facts["workers"], facts["shared_memory_mb"]
    if n == 1:
        return "workers", "ok", "one process does all the work"
    text = f"{n} processes train and sample in parallel; {shared} MiB of shared memory for the weights they share"
    if shared < _NEED_SHARED_MB:
        return "workers", "slow", f"{text}: too little for most models, so one process does the work; raise --shm-size"
    return "workers", "ok", text


def _about_numbers(facts: dict[str, Any]) -> tuple[str, str, str]:
    flags = facts["flags"]
    has = ", ".join(flags or ()) or ("no relevant vector instructions" if flags == [] else "an unknown instruction set")
    text = f"CPU has {has}; training computes in {facts['dtype_reason']}"
    if facts["gpus"] or facts["dtype"] != "float32":
        return "numbers", "ok", text
    has_bf16 = flags is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    lacking = "" if has_bf16 else "; this CPU has no BF16 instructions"
    return "numbers", "slow", text + lacking


def _about_fp8(facts: dict[str, Any]) -> tuple[str, str, str]:
    """Which backend serves FP8 training."""
    emulated = [(call, why) for call, backend, why in facts["fp8"] if backend == "emulation"]
    if not emulated:
        return "FP8", "ok", f"training in FP8: {backends.summary(facts['fp8'])}"
    why = next((part for part in emulated[0][1].split("; ") if part.startswith("not triton: ")), emulated[0][1])
    why = why.removeprefix("not triton: ")
    text = f"training in FP8 is emulated, with block sums in float32, and 2 to 3 times as slow ({why})"
    return "FP8", "slow", text


def _about_exchange(facts: dict[str, Any]) -> tuple[str, str, str]:
    """What can carry tokens between ranks that share experts."""
    missing = facts["exchange"]["deepep"]
    text = f"all-to-all; not DeepEP: {missing}" if missing else "DeepEP"
    return "exchange", "ok", f"experts on several ranks: {text}"


def _about_compiler(facts: dict[str, Any]) -> tuple[str, str, str]:
    if facts["compiler"]:
        return "compiler", "ok", f"{facts['compiler']}: torch.compile works"
    return "compiler", "slow", "no C++ compiler: torch.compile is off, so everything runs eagerly; install g++"


def _about_kernels(facts: dict[str, Any]) -> tuple[str, str, str]:
    instructions, why = facts["kernels"]
    if instructions == "off":
        return "kernels", "slow", f"{why}: torch's own operations do the CPU's work, which is slower"
    return "kernels", "ok", f"{why}: fused operations for the CPU"


def _about_sandbox(facts: dict[str, Any]) -> tuple[str, str, str]:
    level, trials = facts["sandbox"], facts["sandbox_trials"]
    stronger = sandbox.LEVELS[: sandbox.LEVELS.index(level)]
    why = "; ".join(f"{name}: {trials[name]}" for name in stronger)
    if level == "none":
        text = f"none, so answers in code are not run ({why}); {sandbox.advice()}"
        return "sandbox", "slow", text
    text = f"{level}: answers in code run without network, your files or lasting processes"
    return "sandbox", "ok", text + (f"; for a stronger level, install bubblewrap ({why})" if why else "")


def _about_memory(facts: dict[str, Any]) -> tuple[str, str, str]:
    total, available = facts["memory_gb"], facts["memory_available_gb"]
    if total is None:
        return "memory", "ok", "unknown on this system"
    if available is None:
        return "memory", "ok", f"{total:.1f} GB; the system does not say how much is free"
    text = f"{available:.1f} of {total:.1f} GB free"
    if available < _NEED_MEMORY_GB:
        return "memory", "bad", f"{text}: less than the {_NEED_MEMORY_GB:.0f} GB a run needs; close other programs"
    return "memory", "ok", text


def _about_disk(facts: dict[str, Any]) -> tuple[str, str, str]:
    text = f"{facts['disk_free_gb']:.1f} GB free for {facts['folder']}"
    if not facts["writable"]:
        return "disk", "bad", f"{facts['folder']} cannot be written; change its owner or give run --out another folder"
    if facts["disk_free_gb"] < _NEED_DISK_GB:
        return "disk", "bad", f"{text}: less than the {_NEED_DISK_GB:.0f} GB a run needs; free some, or use --out"
    return "disk", "ok", text


def _compilers() -> list[str]:
    preferred = os.environ.get("CXX")  # torch.compile tries this first
    return [*([preferred] if preferred else []), "g++", "clang++", "c++"]


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def _cpu_name() -> str:
    name = _cpuinfo("model name").replace("unknown", "") or sysctl("machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def _flags() -> list[str] | None:
    """The `_FLAGS` that this CPU has; None if the system has no list."""
    present = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in _FLAGS if flag in present] if present else None


def _memory() -> tuple[float | None, float | None]:
    """(total, available) in GB as the kernel reports them; None for a figure that it does not report."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 / _GB for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()) else -1
        return (round(pages * os.sysconf("SC_PAGE_SIZE") / _GB, 1), None) if pages > 0 else (None, None)
    return round(total, 1), round(available, 1)


def _existing(folder: Path) -> Path:
    """The nearest existing parent, in which `folder` would be created."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _disk(folder: Path) -> float:
    return round(shutil.disk_usage(_existing(folder)).free / _GB, 1)
