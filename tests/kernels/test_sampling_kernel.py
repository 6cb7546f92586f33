"""Sampling in one pass against `engine.sampling`, whose own tests compare it with the definition."""

import pytest
import torch

from bessemer.addons.accelerate import kernel_steps  # noqa: F401 (registers the kernel)
from bessemer.addons.accelerate.kernels import sampling as kernel
from bessemer.engine.random_streams import stream_key, uniform
from bessemer.engine.sampling import (
    LiveRows,
    RejectedDrafts,
    inverse_cdf,
    most_likely,
    probabilities,
    residual,
    rules,
    sample_rows,
)
from bessemer.engine.sequence import SamplingParams

PARAMS = [
    SamplingParams(0), SamplingParams(), SamplingParams(0.6), SamplingParams(1e-4), SamplingParams(1e4),
    SamplingParams(top_k=1), SamplingParams(top_k=5), SamplingParams(top_k=10**6), SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.01), SamplingParams(min_p=0.2), SamplingParams(0.7, top_k=20, top_p=0.7),
    SamplingParams(1.7, top_k=9, top_p=0.95, min_p=0.1),
]  # fmt: skip


reference = sample_rows.equation


def rows(params, n, key=None):
    """n rows, row b with params[b % len(params)]."""
    key = torch.arange(n) if key is None else key
    each = rules([params[b % len(params)] for b in range(n)], key.device)
    return LiveRows(key, torch.arange(n) * 7, each, key)


def together(logits_BV, params, vocab, seed):
    """Row b sampled with params[b % len(params)]: in one call, and row by row by the reference."""
    own = rows(params, len(logits_BV), torch.tensor([stream_key(seed, b) for b in range(len(logits_BV))]))
    single = [torch.tensor([b]) for b in range(len(logits_BV))]
    expected = [reference(logits_BV[b], vocab, own.at(b)) for b in single]
    return sample_rows(logits_BV, vocab, own), [
        torch.cat(column) for column in zip(*(row[:3] for row in expected), strict=True)
    ]


@pytest.mark.parametrize(("V", "vocab"), [(1, 1), (7, 7), (64, 60), (130, 130), (300, 290), (4099, 4090)])
def test_rows_with_parameters_of_their_own_equal_the_reference(instructions, V, vocab):
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(6 * len(PARAMS), V, generator=generator) * 3
    logits[::5] = logits[::5].round()  # many equally likely tokens
    logits[3::11, 1::2] = float("-inf")
    before = logits.clone()
    actual, (token, logp, raw) = together(logits, PARAMS, vocab, V)
    assert torch.equal(actual.token_B, token) and torch.equal(logits, before)
    for value, reference in ((actual.logp_B, logp), (actual.raw_logp_B, raw)):
        torch.testing.assert_close(value, reference, atol=2e-6, rtol=1e-6)
    best = most_likely(logits.view(6, -1, V), vocab)
    assert torch.equal(best.token_B.flatten(), logits[:, :vocab].argmax(-1))
    exact = logits.double().log_softmax(-1).gather(1, best.token_B.view(-1, 1))
    torch.testing.assert_close(best.logp_B.double().flatten(), exact.squeeze(1), atol=1e-6, rtol=1e-6)


def test_kept_sets_end_at_the_same_token(instructions):
    """With tokens of nearly equal probability, one token too many or too few shows in many draws."""
    logits = torch.randn(30 * len(PARAMS), 300, generator=torch.Generator().manual_seed(5)) * 0.05
    actual, (token, _, _) = together(logits, PARAMS, 300, 6)
    assert torch.equal(actual.token_B, token)


@pytest.mark.parametrize(("V", "vocab"), [(7, 7), (130, 130), (4099, 4090)])
def test_kept_tokens_and_their_logprobs_equal_the_reference(instructions, V, vocab):
    """Every sampled token is among the kept ones, whose probabilities sum to 1."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(60, V, generator=generator) * 3
    logits[::5] = logits[::5].round()
    for params in PARAMS[5:]:
        actual = sample_rows(logits, vocab, rows([params], 60), kept=True)
        expected = reference(logits, vocab, rows([params], 60), kept=True)
        assert torch.equal(actual.token_B, expected.token_B) and torch.equal(actual.kept_BV, expected.kept_BV)
        assert actual.kept_BV.shape == (60, vocab) and actual.kept_BV.gather(1, actual.token_B[:, None]).all()
        within = (logits[:, :vocab] / params.temperature).masked_fill(~actual.kept_BV, -torch.inf).double()
        exact = within.log_softmax(-1).gather(1, actual.token_B[:, None]).squeeze(1)
        raw = logits.double().log_softmax(-1).gather(1, actual.token_B[:, None]).squeeze(1)
        for sampled in (actual, expected):
            torch.testing.assert_close(sampled.logp_B.double(), exact, atol=3e-6, rtol=1e-6)
            torch.testing.assert_close(sampled.raw_logp_B.double(), raw, atol=3e-6, rtol=1e-6)
        plain = sample_rows(logits, vocab, rows([params], 60))
        assert plain.kept_BV is None and torch.equal(plain.token_B, actual.token_B), "recording changes no token"


@pytest.mark.parametrize("ahead", [0.05, 1.0, 200.0])
def test_spare_rows_count_in_logprobs_but_never_win(instructions, ahead):
    """Every form draws and keeps what it would without the spare rows, also at temperatures that divide their lead to
    more than float32's exponentials hold."""
    logits = torch.randn(40, 70, generator=torch.Generator().manual_seed(3))
    logits[:, 66] = logits[:, :66].amax(-1) + ahead
    for params in PARAMS[1:]:
        own = rows([params], 40)
        for call in (sample_rows, reference):
            alone = call(logits[:, :66].contiguous(), 66, own, kept=True)
            actual, plain = call(logits, 66, own, kept=True), call(logits, 66, own)
            assert torch.equal(actual.token_B, alone.token_B) and torch.equal(plain.token_B, alone.token_B)
            assert torch.equal(actual.kept_BV, alone.kept_BV)
            torch.testing.assert_close(actual.logp_B, alone.logp_B)
            for logp, temperature in ((plain.logp_B, params.temperature), (actual.raw_logp_B, 1.0)):
                exact = (logits.double() / temperature).log_softmax(-1).gather(1, alone.token_B[:, None]).squeeze(1)
                torch.testing.assert_close(logp.double(), exact, atol=3e-6, rtol=1e-5)


def test_after_a_rejected_draft_the_residual_is_sampled(instructions):
    """If q is nowhere below p nothing is left, and p is sampled."""
    generator = torch.Generator().manual_seed(9)
    logits, other = (torch.randn(20 * len(PARAMS), 67, generator=generator) for _ in range(2))
    logits[:, 61:] -= 5.0
    other[::7] = logits[::7]
    own, single_rows = rows(PARAMS, len(logits)), [torch.tensor([b]) for b in range(len(logits))]
    q = torch.cat([probabilities(other[b], own.at(b).rules_B4, 61) for b in single_rows])
    q[::7] *= 1.01
    rejected = RejectedDrafts(torch.rand(len(logits), generator=generator) < 0.7, q)
    tokens = [call(logits, 61, own, rejected).token_B for call in (sample_rows, reference)]
    u = uniform(own.key_B, own.position_B)
    for b in single_rows:
        p = probabilities(logits[b], own.at(b).rules_B4, 61)
        refused = bool(rejected.rejected_B[b]) and bool(own.rules_B4[b, 0] > 0)
        expected = inverse_cdf(residual(p, q[b]) if refused else p, u[b])
        assert tokens[0][b] == expected and tokens[1][b] == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_give_a_logprob_that_is_not_finite(instructions, bad):
    logits = torch.zeros(3 * len(PARAMS), 70)
    logits[1::3, 66] = bad
    for params in PARAMS:
        actual, _ = together(logits, [params], 70, 0)
        assert torch.isfinite(actual.logp_B).view(-1, 3).tolist() == [[True, False, True]] * len(PARAMS)
        assert actual.token_B.min() >= 0 and actual.token_B.max() < 70


def test_extreme_logits_stay_exact(instructions):
    logits = torch.tensor([[1e4, 0.0, -1e4, 9999.0], [-3e38, 3e38, 0.0, 0.0], [float("-inf"), 0.0, 0.0, float("-inf")]])
    for temperature in (1e-4, 1.0, 1e4):
        actual, (token, logp, _) = together(logits, [SamplingParams(temperature)], 4, 2)
        assert torch.equal(actual.token_B, token)
        torch.testing.assert_close(actual.logp_B, logp, atol=1e-6, rtol=1e-6)


def test_what_the_kernel_does_not_take(instructions):
    assert kernel.serves(torch.zeros(2, 3))
    for logits in (torch.zeros(2, 3).double(), torch.zeros(3, 2).T, torch.zeros(0, 3), torch.zeros(2, 3).bfloat16()):
        assert not kernel.serves(logits)
