"""Deterministic steps: torch is strict inside a step and nowhere else. A stub pretends that there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from bessemer.addons.accelerate import determinism
from bessemer.errors import UserError


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(determinism.VARIABLE, ":4096:8")


@determinism.held
def step(rate=1000.0):
    """A step that reports whether torch was strict."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return {"strict": strict, "train/tokens_per_second": rate}


def test_steps_are_strict_and_the_rest_is_not(gpu):
    messages = []
    assert not step()["strict"]
    with determinism.kept(True, messages.append):
        for number in range(determinism.STEPS + 5):
            assert step(1.0 if number < 5 else 2000.0)["strict"]
            assert not torch.are_deterministic_algorithms_enabled()
    assert not step()["strict"]
    assert len(messages) == 2 and "2,000 tokens/s" in messages[1], "the first steps do not count, and it is told once"


def test_an_error_in_a_step_leaves_torch_as_it_was(gpu):
    @determinism.held
    def broken():
        raise ValueError

    with determinism.kept(True, lambda text: None), pytest.raises(ValueError):
        broken()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_cublas_must_be_configured_before_first_use(gpu, monkeypatch):
    monkeypatch.setenv(determinism.VARIABLE, ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"), determinism.kept(True, print):
        pass


def test_nothing_changes_without_a_gpu_or_the_key(monkeypatch):
    messages = []
    with determinism.kept(False, messages.append):
        assert not step()["strict"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with determinism.kept(True, messages.append):
        assert not step()["strict"]
    assert len(messages) == 1 and "no GPU" in messages[0]


PROBE = """
import os, sys
from bessemer.system import prepare_cuda
prepare_cuda()
assert "torch" not in sys.modules
print(*(os.environ.get(name, "-") for name in sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="expandable segments are for Linux")
def test_cuda_is_configured_before_torch_is_imported_unless_the_user_did_it():
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
    clean = {name: value for name, value in os.environ.items() if name not in names}

    def environment(**chosen):
        command = [sys.executable, "-c", PROBE, *names]
        return subprocess.run(command, env=clean | chosen, capture_output=True, text=True, check=True).stdout

    assert environment() == "expandable_segments:True - :4096:8\n"
    assert (
        environment(PYTORCH_CUDA_ALLOC_CONF="backend:native", CUBLAS_WORKSPACE_CONFIG=":16:8")
        == "- backend:native :16:8\n"
    )
