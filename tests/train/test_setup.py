"""When layers are compiled."""

import pytest
import torch

from bessemer.train import setup


@pytest.mark.parametrize(
    ("setting", "gpu", "compiler", "flops", "wanted"),
    [
        ("on", False, None, 0.0, True),
        ("off", True, "g++", 1e20, False),
        ("auto", True, None, 0.0, True),
        ("auto", False, "g++", 1e15, True),
        ("auto", False, "g++", 2e13, False),  # the tiny recipe: compiling would cost more than it gives
        ("auto", False, None, 1e20, False),
    ],
)
def test_auto_compiles_where_it_pays(monkeypatch, setting, gpu, compiler, flops, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(setup, "cpp_compiler", lambda: compiler)
    assert setup.want_compile(setting, flops) is wanted
