"""When layers are compiled, and what a compiler that fails is reported as."""

import pytest
import torch

from bessemer.addons.accelerate import compiling
from bessemer.model import ops


@pytest.mark.parametrize(
    ("setting", "gpu", "compiler", "kernels", "flops", "expected"),
    [
        ("on", False, None, True, 0.0, True),
        ("off", True, "g++", False, 1e20, False),
        ("auto", True, None, True, 0.0, True),
        ("on", True, None, True, 0.0, True),
        ("auto", False, "g++", False, 1e15, True),
        ("auto", False, "g++", True, 1e15, False),
        ("auto", False, "g++", False, 2e13, False),  # the tiny recipe: compiling would cost more than it saves
        ("auto", False, None, False, 1e20, False),
    ],
)
def test_auto_compiles_where_it_pays(monkeypatch, setting, gpu, compiler, kernels, flops, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(compiling, "cpp_compiler", lambda: compiler)
    facts = [(lambda: True, lambda: "avx2" if kernels else "off")]
    monkeypatch.setattr(ops.instructions, "implementations", facts)
    monkeypatch.setattr(compiling, "gpu_compiler_trouble", lambda: None)
    assert compiling.want_compile(setting, flops) is expected


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_gpu_without_compiler_runs_uncompiled_with_a_reason(monkeypatch, setting):
    """Without CUDA the trial fails like any other failure; the warning names the cause and the fix."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiling.gpu_compiler_trouble.cache_clear()
    messages = []
    assert compiling.want_compile(setting, 1e20, messages.append) is False
    assert (
        len(messages) == 1
        and ("CUDA" in messages[0] or "NVIDIA" in messages[0])
        and "layers run uncompiled" in messages[0]
        and "\n" not in messages[0]
    )
    assert not compiling.want_compile("off", 1e20, messages.append) and len(messages) == 1, "off asks nothing"
    compiling.gpu_compiler_trouble.cache_clear()


@pytest.mark.parametrize(
    ("error", "cause", "fix"),
    [
        ("backend='inductor' raised:\nRuntimeError: Failed to find C compiler. Please specify via CC",
         "Failed to find C compiler", "apt install gcc python3-dev"),
        ("backend='inductor' raised:\nCalledProcessError: Command '['/usr/bin/gcc', '/tmp/main.c']' returned 1",
         "/usr/bin/gcc", "apt install gcc python3-dev"),
        ("Cannot find a working triton installation. Either the package is not installed or it is too old.",
         "Cannot find a working triton", "pip install triton"),
        ("something else\nand more", "something else", "apt install gcc"),
    ],
)  # fmt: skip
def test_what_a_compiler_raised_becomes_one_line(error, cause, fix):
    line = compiling.uncompiled(error)
    assert cause in line and fix in line and "\n" not in line
