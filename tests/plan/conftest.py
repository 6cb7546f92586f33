"""Real ranks are those of tests/parallel."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_world_is_left_behind():
    yield
    assert not torch.distributed.is_initialized()
