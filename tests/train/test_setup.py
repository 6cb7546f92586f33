"""When layers are compiled."""

import pytest
import torch

from bessemer.train import setup


@pytest.mark.parametrize(
    ("setting", "gpu", "compiler", "kernels", "flops", "wanted"),
    [
        ("on", False, None, True, 0.0, True),
        ("off", True, "g++", False, 1e20, False),
        ("auto", True, None, True, 0.0, True),
        ("auto", False, "g++", False, 1e15, True),
        ("auto", False, "g++", True, 1e15, False),
        ("auto", False, "g++", False, 2e13, False),  # the tiny recipe: compiling would cost more than it gives
        ("auto", False, None, False, 1e20, False),
    ],
)
def test_auto_compiles_where_it_pays(monkeypatch, setting, gpu, compiler, kernels, flops, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(setup, "cpp_compiler", lambda: compiler)
    monkeypatch.setattr(setup.library, "available", lambda: kernels)
    assert setup.want_compile(setting, flops) is wanted
