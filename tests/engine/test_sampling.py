"""Random streams, truncation and log-probabilities."""

import math

import pytest
import torch

from bessemer.engine.random_streams import stream_key, uniform
from bessemer.engine.sampling import LiveRows, inverse_cdf, rules, sample_rows, truncate
from bessemer.engine.sequence import SamplingParams
from bessemer.errors import UserError


def rows(sampling, n, seed=1):
    """n rows with these parameters, each with a stream of its own."""
    none = torch.zeros(n, dtype=torch.int64)
    keys = torch.tensor([stream_key(seed, b) for b in range(n)])
    return LiveRows(none, none, rules([sampling] * n, none.device), keys)


def test_streams_are_splitmix64():
    """First outputs for states 0 and 1234567, as published with the generator; the top 53 bits become the number."""
    known = {0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], 1234567: [6457827717110365317, 3203168211198807973]}
    for key, outputs in known.items():
        actual = uniform(torch.tensor([key, key]), torch.tensor([0, 1]))
        assert actual.tolist() == [(x >> 11) * 2.0**-53 for x in outputs]


def test_uniform_is_uniform_over_rows_and_positions():
    """16 bins of 40,000 numbers: chi-square with 15 degrees of freedom exceeds 44 once in 10,000 times."""
    keys = torch.tensor([stream_key(1, k) for k in range(200)])
    u = uniform(keys.repeat_interleave(200), torch.arange(200).repeat(200))
    for part in (u, (u[1:] - u[:-1]) % 1.0, (u[200:] - u[:-200]) % 1.0):
        count = torch.histc(part, 16, 0.0, 1.0)
        expected = len(part) / 16
        assert float(((count - expected) ** 2 / expected).sum()) < 44


@pytest.mark.parametrize("V", [7, 64, 300])
def test_inverse_cdf_equals_the_definition(V):
    generator = torch.Generator().manual_seed(V)
    p = torch.rand(50, V, generator=generator) ** 4
    p[:, ::3] = 0
    u = torch.rand(50, generator=generator, dtype=torch.float64)
    share = p.double().cumsum(-1) / p.double().sum(-1, keepdim=True)
    assert inverse_cdf(p, u).tolist() == [int((row <= x).sum()) for row, x in zip(share, u, strict=True)]


def test_inverse_cdf_never_takes_a_token_without_probability():
    p = torch.zeros(6, 200)
    p[:3, 70], p[3:, 130] = 0.3, 1e-30
    edge = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53] * 2, dtype=torch.float64)
    assert inverse_cdf(p, edge).tolist() == [70] * 3 + [130] * 3


def nucleus(p, sampling):
    """The kept set of one row, from the definition."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: sampling.top_k or len(p)]
    mass, total, nearest = 0.0, sum(p[i] for i in kept), []
    for i in kept:
        nearest.append(i)
        mass += p[i]
        if mass >= sampling.top_p * total:
            break
    return {i for i in nearest if p[i] >= sampling.min_p * max(p)}


CUTS = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.01),
    SamplingParams(min_p=0.2),
    SamplingParams(top_k=20, top_p=0.7),
    SamplingParams(top_k=9, top_p=0.95, min_p=0.1),
    SamplingParams(top_k=500),
    SamplingParams(),
]


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_cuts_equal_the_definition(sampling):
    logits = torch.randn(20, 130, generator=torch.Generator().manual_seed(1)) * 2
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    for row, before in zip(truncate(p, rules([sampling] * 20, p.device)), p, strict=True):
        assert set(row.nonzero().flatten().tolist()) == nucleus(before.tolist(), sampling)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(0.6), SamplingParams(1.7, top_p=0.5, top_k=40), SamplingParams(0)]
)
def test_logprobs_are_of_the_uncut_distribution(sampling):
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(2)) * 3
    drawn = sample_rows(logits, 300, rows(sampling, 40))
    for actual, temperature in ((drawn.logp_B, sampling.temperature or 1.0), (drawn.raw_logp_B, 1.0)):
        expected = (logits / temperature).log_softmax(-1).gather(-1, drawn.token_B[:, None]).squeeze(-1)
        assert torch.allclose(actual, expected, atol=1e-5, rtol=0)  # float32 logarithms of sums over 300 terms
    if sampling.temperature == 0:
        assert torch.equal(drawn.token_B, logits.argmax(-1))


def test_extreme_logits_stay_exact():
    logits = torch.tensor([[1e4, 0.0, -1e4, 9999.0], [-3e38, 3e38, 0.0, 0.0], [float("-inf"), 0.0, 0.0, float("-inf")]])
    for temperature in (1e-4, 1.0, 1e4):
        drawn = sample_rows(logits, 4, rows(SamplingParams(temperature), 3))
        assert torch.isfinite(drawn.logp_B).all() and torch.isfinite(drawn.raw_logp_B).all()
        assert drawn.token_B[1] == 1 and drawn.token_B[2] in (1, 2)


def test_spare_rows_of_the_model_are_never_drawn_but_count():
    logits = torch.zeros(500, 100)
    logits[:, 90:] = 3.0
    for sampling in (SamplingParams(), SamplingParams(0), SamplingParams(top_p=0.5), SamplingParams(min_p=0.9)):
        drawn = sample_rows(logits, 90, rows(sampling, 500))
        assert drawn.token_B.max() < 90
        assert torch.allclose(drawn.logp_B, torch.tensor(-math.log(90 + 10 * math.e**3)), atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
def test_bad_logits_give_a_logprob_that_is_not_finite(bad, temperature):
    logits = torch.zeros(3, 70)
    logits[1, 66] = bad
    finite = torch.isfinite(sample_rows(logits, 70, rows(SamplingParams(temperature), 3)).logp_B)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 1e-9),
        ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")), ("top_k", -1),
        ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.5),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})
