"""Batch: shapes are checked, micro-batches cover every row once."""

import pytest
import torch

from bessemer.data.batch import Batch


def make(rows: int, length: int = 4) -> Batch:
    tokens = torch.arange(rows * length).reshape(rows, length)
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    return Batch(tokens, loss, segments_BT=tokens // 2, extras={"advantage_BT": tokens.float()})


def test_micro_batches_cover_every_row_once_with_their_extras():
    batch = make(7)
    parts = list(batch.micro(3))
    assert [part.n_rows for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert torch.equal(torch.cat([part.extras["advantage_BT"] for part in parts]), batch.extras["advantage_BT"])
    assert torch.equal(torch.cat([part.segments_BT for part in parts]), batch.segments_BT)
    assert sum(part.n_loss_tokens for part in parts) == batch.n_loss_tokens == 7 * 3


def test_weights_other_than_one_count_as_tokens():
    batch = make(1)
    batch.loss_BT[0, 1] = 0.25
    batch.loss_BT[0, 2] = -1.0
    assert batch.n_loss_tokens == 3


@pytest.mark.parametrize(
    "broken",
    [
        dict(tokens_BT=torch.zeros(2, 3, dtype=torch.int32)),
        dict(loss_BT=torch.zeros(2, 3, dtype=torch.float64)),
        dict(loss_BT=torch.zeros(2, 4)),
        dict(loss_BT=torch.ones(2, 3)),  # nothing predicts the first token of a row
        dict(segments_BT=torch.zeros(3, 2, dtype=torch.int64)),
        dict(extras={"advantage_BT": torch.zeros(2, 2)}),
    ],
)
def test_a_batch_that_breaks_the_contract_is_not_made(broken):
    good = dict(tokens_BT=torch.zeros(2, 3, dtype=torch.int64), loss_BT=torch.zeros(2, 3))
    Batch(**good)
    with pytest.raises(AssertionError):
        Batch(**good | broken)


def test_to_moves_every_tensor():
    moved = make(2).to("meta")
    tensors = [moved.tokens_BT, moved.loss_BT, moved.segments_BT, *moved.extras.values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
