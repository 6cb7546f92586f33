"""next_token against the formulas written out over all logits (V3 2.2, A.9, A.10)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_run import T, batches, model

from bessemer.train.objective import next_token


def naive(network, batch, mtp_lambda, alpha):
    """Sums by loops over positions; the balance term is alpha * mean over sequences * tokens."""
    out = network.train_outputs(batch.tokens_BT, batch.segments_BT)
    tokens, weights, B = batch.tokens_BT, batch.loss_BT, batch.tokens_BT.shape[0]

    def depth(hidden, k):
        logp = F.log_softmax(hidden @ network.head_weight.T, -1)
        total = torch.zeros(())
        for b in range(B):
            for t in range(1 + k, tokens.shape[1]):  # token t, predicted from t-1-k
                inside = (
                    batch.segments_BT is None or k == 0 or batch.segments_BT[b, t] == batch.segments_BT[b, t - 1 - k]
                )
                if inside:
                    total = total - weights[b, t] * logp[b, t - 1 - k, tokens[b, t]]
        return total

    D = len(out.mtp_hidden)
    mtp = sum(depth(hidden, k) for k, hidden in enumerate(out.mtp_hidden, start=1))
    balance = alpha * out.balance / B * weights.sum()
    return depth(out.hidden_BTD, 0) + (mtp_lambda / D) * mtp + balance


@pytest.mark.parametrize(("n_mtp", "length"), [(1, T), (2, T), (2, 3), (2, 2), (4, 2)])
@pytest.mark.parametrize("segmented", [False, True])
def test_equals_the_formulas(n_mtp, length, segmented):
    """Also in rows so short that no token is left for the last depths: they add nothing."""
    network, batch = model(n_mtp=n_mtp), batches(3, 3)
    batch = replace(batch, tokens_BT=batch.tokens_BT[:, :length], loss_BT=batch.loss_BT[:, :length])
    if segmented:
        segments = torch.arange(length).expand(3, length) // 5
        first = segments != segments.roll(1, 1)
        batch = replace(batch, segments_BT=segments, loss_BT=batch.loss_BT * ~first * torch.rand(3, length))
    grads = []
    for function in (next_token, naive):
        network.zero_grad()
        total = function(network, batch, 0.3, 0.01)
        total = getattr(total, "total", total)
        total.backward()
        named = network.named_parameters()
        grads.append((total.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}))
    (ours, our_grads), (reference, their_grads) = grads
    assert torch.allclose(ours, reference, rtol=1e-5)
    for name, grad in our_grads.items():
        assert (grad - their_grads[name]).norm() <= 1e-5 * their_grads[name].norm() + 1e-7, name


def test_metrics_are_sums_and_add_up():
    network, batch = model(), batches(0, 4)
    loss = next_token(network, batch, mtp_lambda=0.3, balance_alpha=0.01)
    m = loss.metrics
    assert loss.tokens == 4 * (T - 1)
    assert m["total"].item() == pytest.approx((m["loss"] + 0.3 * m["mtp_1"] + 0.01 * m["balance"]).item(), rel=1e-6)
    # Untrained: every prediction costs log V; MTP has one token fewer per row but the same divisor.
    assert (m["loss"] / loss.tokens).item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), rel=0.05)
    assert (m["mtp_1"] / m["loss"]).item() == pytest.approx((T - 2) / (T - 1), rel=0.02)


def test_balance_term_is_alpha_times_layers_when_balanced():
    """For a balanced gate sum_i f_i P_i is about 1 per layer and sequence, so the term is about alpha * layers."""
    network, batch = model(), batches(0, 8)
    loss = next_token(network, batch, mtp_lambda=0.3, balance_alpha=0.01)
    layers = len(network.gates())
    value = (loss.metrics["balance"] / loss.tokens).item()
    assert layers == 2 and layers * 0.95 < value < layers * 1.5


def test_mtp_is_skipped_when_lambda_is_zero():
    loss = next_token(model(), batches(0, 2), mtp_lambda=0.0, balance_alpha=0.0)
    assert "mtp_1" not in loss.metrics and torch.equal(loss.total.detach(), loss.metrics["loss"])
