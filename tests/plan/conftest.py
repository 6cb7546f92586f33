"""No test leaves a process group behind."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_world_is_left_behind():
    yield
    assert not torch.distributed.is_initialized()
