"""What the arms are built from: expert masks, experts by token, MTP targets of another row, noise, spike counts."""

import math

import pytest
import torch

from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token
from bessemer_claims import probes
from bessemer_claims.controls import experts_by_token, with_noise, with_parallel_head
from bessemer_claims.pretrain_spikes import WINDOW, spikes

CFG = preset("claims", dim=32, n_layers=3, vocab_size=64)


@pytest.fixture(scope="module")
def model():
    return Transformer(CFG).initialise(0).eval()


@pytest.fixture
def batch():
    tokens = torch.randint(CFG.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = torch.ones(tokens.shape)
    loss[:, 0] = 0
    return Batch(tokens, loss)


def test_the_best_experts_are_masked_and_come_back(model, batch):
    plain = probes.choices(model)(batch)
    for most in (1, 2):
        with probes.without(model, most):
            first = probes.choices(model)(batch)[0][0]
        best = plain[0][0][:, :most]
        assert not (first[:, :, None] == best[:, None, :]).any()
    with probes.without(model, 2, random=True):
        drawn = probes.choices(model)(batch)[0][0]
    share_kept = [
        (row[:, None] == own[None]).any(1).float().mean() for row, own in zip(drawn, plain[0][0], strict=True)
    ]
    assert 0.5 < float(torch.stack(share_kept).mean()) < 1  # two random experts of sixteen are masked, not the best two
    again = probes.choices(model)(batch)
    assert all(torch.equal(actual, other) for (actual, _), (other, _) in zip(plain, again, strict=True))


def test_experts_that_are_off_get_no_token(model, batch):
    off = torch.tensor([[0, 5], [3, 4]])
    with probes.switched_off(model, off):
        load_LE = probes.loads(model, [batch])
    assert all(load_LE[layer, expert] == 0 for layer in range(2) for expert in off[layer])
    assert load_LE.sum() == 2 * 2 * 23 * CFG.n_activated_experts
    table_VLK = experts_by_token(CFG)
    batch.extras["choice_BTLK"] = table_VLK[batch.tokens_BT]
    with probes.switched_off(model, off):
        assert probes.loads(model, [batch])[0, off[0]].sum() == 0


def test_information():
    """It is 1 for domains that share no expert, 0 for identical ones, and as computed by hand in between."""
    assert probes.mutual_information(torch.eye(3)).item() == pytest.approx(1)
    assert probes.mutual_information(torch.ones(2, 4)).item() == pytest.approx(0, abs=1e-12)
    counts = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    by_hand = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / math.log(2)
    assert probes.mutual_information(counts).item() == pytest.approx(by_hand)
    assert probes.mutual_information(100 * counts).item() == pytest.approx(by_hand)


def test_neurons_of_a_dense_network(batch):
    dense = Transformer(preset("claims", dim=32, n_layers=3, vocab_size=64, n_dense_layers=3)).initialise(0).eval()
    active = probes.neurons(dense)(batch)
    assert len(active) == 2 and active[0][0].shape == (48, probes.STRONGEST) and active[0][1] == CFG.inter_dim


def test_experts_by_token(model, batch):
    table_VLK = experts_by_token(CFG)
    assert table_VLK.shape == (64, 2, 4)
    assert all(len(set(row)) == 4 for row in table_VLK.flatten(0, 1).tolist())  # distinct
    batch.extras["choice_BTLK"] = table_VLK[batch.tokens_BT]
    chosen = probes.choices(model)(batch)
    for layer, (expert_NK, _) in enumerate(chosen):
        assert torch.equal(expert_NK, table_VLK[batch.tokens_BT.flatten(), layer])
    model.train()
    routed = next_token(model, batch, mtp_lambda=0.0, balance_alpha=0.0).metrics["loss"]
    batch.extras.clear()
    free = next_token(model, batch, mtp_lambda=0.0, balance_alpha=0.0).metrics["loss"]
    model.eval()
    assert routed != free


def test_targets_of_another_row_change_the_modules_loss_alone(batch):
    model = Transformer(preset("claims", dim=32, n_layers=3, vocab_size=64, n_mtp=1)).initialise(0)
    own = next_token(model, batch, mtp_lambda=0.3, balance_alpha=0.0).metrics
    batch.extras["mtp_tokens_BT"] = batch.tokens_BT.roll(1, 0)
    other = next_token(model, batch, mtp_lambda=0.3, balance_alpha=0.0).metrics
    assert torch.equal(own["loss"], other["loss"]) and own["mtp_1"] != other["mtp_1"]
    swapped = Batch(batch.tokens_BT.roll(1, 0), batch.loss_BT)
    hidden = model.train_outputs(batch.tokens_BT).mtp_hidden[0]
    from bessemer.train.loss import predicting

    assert other["mtp_1"].item() == pytest.approx(predicting(hidden, model.head_weight, swapped, 2).item(), rel=1e-5)


def test_a_parallel_head_does_not_see_the_next_token(batch):
    model = Transformer(preset("claims", dim=32, n_layers=3, vocab_size=64, n_mtp=1)).initialise(0).eval()
    other = batch.tokens_BT.clone()
    other[:, 12] = (other[:, 12] + 1) % 64

    def guessed(tokens_BT):
        return model.train_outputs(tokens_BT).mtp_hidden[0][:, :12]  # the last of them also reads token 12, if it may

    sequential = guessed(batch.tokens_BT)
    assert not torch.equal(guessed(other), sequential)
    with_parallel_head(model)
    parallel = guessed(batch.tokens_BT)
    assert torch.equal(guessed(other), parallel) and not torch.equal(parallel, sequential)
    next_token(model, batch, mtp_lambda=0.3, balance_alpha=0.0).total.backward()
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())


def test_noise_replaces_the_same_tokens_in_any_batch():
    tokens = torch.randint(3, 2048, (6, 400), generator=torch.Generator().manual_seed(0))
    loss = torch.ones(tokens.shape)
    loss[:, 0] = 0
    tokens[:, 200] = 0  # the beginning of another document
    tenth, half = (with_noise(Batch(tokens, loss), share, 5, 10, 2048, 0).tokens_BT for share in (0.1, 0.5))
    changed, more = tenth != tokens, half != tokens
    assert 0.08 < changed.float().mean() < 0.12 and 0.47 < more.float().mean() < 0.53
    assert not (changed & ~more).any() and torch.equal(tenth[changed], half[changed])
    assert not more[:, [0, 200]].any()  # neither tokens without a loss nor BOS
    alone = with_noise(Batch(tokens[4:], loss[4:]), 0.1, 5, 14, 2048, 0)
    assert torch.equal(alone.tokens_BT, tenth[4:])
    assert not torch.equal(with_noise(Batch(tokens, loss), 0.1, 6, 10, 2048, 0).tokens_BT, tenth)


def test_spikes_are_far_above_the_steps_before_them():
    calm = [3.0 + 0.1 * (-1) ** step for step in range(2 * WINDOW)]  # five standard deviations are about 0.5
    lines = [{"values": {"train/loss": loss, "train/skipped": 0}} for loss in (*calm, 3.45, 3.7, 3.0, 3.0)]
    assert spikes(lines) == 1
    lines.insert(50, {"values": {"val/bpb/web": 9.0}})
    skipped = [{"values": {"train/skipped": 2}}, {"values": {"train/skipped": 2, "train/loss": 3.0}}]
    assert spikes([*lines, *skipped]) == 3
    assert spikes([{"values": {"train/loss": loss}} for loss in [1.0] * (WINDOW - 1) + [9.0]]) == 0  # too few steps
