"""A round of decoding in one call: against the torch path that drafts, verifies and samples, and bit-identical in any
batch."""

import pytest
import torch
from test_decode_kernel import network, texts

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.addons.serve.penalties import PenaltyParams
from bessemer.addons.serve.prefix_cache import PrefixCache
from bessemer.addons.serve.requests import Finished, Token
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import ServedSequence as Sequence
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.served_runner import ServedRunner
from bessemer.addons.serve.token_controls import TokenRules
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.engine.steps import PrefillChunk, backend_of

TOKENIZER = Tokenizer.train(["the quick brown fox 盛钢水"] * 8, 280)
SAMPLINGS = [
    SamplingParams(0.0), SamplingParams(), SamplingParams(0.8, top_p=0.9), SamplingParams(1.3, top_k=20, min_p=0.05),
    SamplingParams(0.0),
]  # fmt: skip


def flat(**values):
    """Main model and module almost agree: drafts are accepted and rejected. Some ids are beyond the tokenizer's."""
    return network(vocab_size=285, init_std=0.03, max_seq_len=512, **values)


def started(model, samplings, drafts):
    """A runner with a prefilled sequence for each prompt; the samplings take turns."""
    steps = backend_of(model)
    runner = ServedRunner(steps, TOKENIZER, steps.new_cache(drafts, PrefixCache), drafts)
    penalised = TokenRules(PenaltyParams(repetition_penalty=1.3))
    requests = [
        Request(tuple(ids), 3 + b, 24, samplings[b % len(samplings)], top=b % 2, routing=True,
                control=penalised if b % len(samplings) == 4 else None)
        for b, ids in enumerate(texts(1, 61, 9, 64, 5, 5))
    ]  # fmt: skip
    prompts = [runner.cache.open(request.prompt) for request in requests]
    for prompt in prompts:
        runner.cache.extend(prompt, len(prompt.ids))
    logits_PV = runner.prefill([PrefillChunk(prompt, len(prompt.ids)) for prompt in prompts], routing=True)
    sequences = [Sequence(request, b, control=runner.control_of(request)) for b, request in enumerate(requests)]
    runner.admit([(p, [s]) for p, s in zip(prompts, sequences, strict=True)], logits_PV)
    return runner, sequences


@pytest.mark.parametrize(
    ("drafts", "samplings"), [(0, SAMPLINGS[:4]), (1, SAMPLINGS), (3, SAMPLINGS[:4]), (2, SAMPLINGS[:1])]
)
@torch.inference_mode()
def test_rounds_equal_the_torch_path(instructions, drafts, samplings, monkeypatch):
    """Step by step: tokens, log-probabilities, drafts and acceptances, and the state in which the next step starts."""
    model = flat()
    with monkeypatch.context() as patch:
        patch.setattr("bessemer.addons.accelerate.kernel_steps.PASS", 17)  # prompts are prefilled in pieces
        kernel, sequences = started(model, samplings, drafts)
        patch.setattr(KernelSteps, "of", lambda model: None)
        torch_path, expected = started(model, samplings, drafts)
    for pool, reference in zip(kernel.cache.layers, torch_path.cache.layers, strict=True):
        torch.testing.assert_close(pool, reference, atol=1e-5, rtol=1e-5)
    while kernel.sequences:
        for runner in (kernel, torch_path):
            runner.sample()
            runner.retire()
            if runner.sequences:
                runner.advance()
        for actual, target in zip(sequences, expected, strict=True):
            assert (actual.tokens, actual.finish) == (target.tokens, target.finish)
            assert actual.logp == pytest.approx(target.logp, abs=1e-5)
            assert actual.raw_logp == pytest.approx(target.raw_logp, abs=1e-5)
            assert [[i for i, _ in top] for top in actual.top] == [[i for i, _ in top] for top in target.top]
        live = torch.tensor([sequence.finish is None for sequence in kernel.sequences], dtype=torch.bool)
        assert [sequence.routes for sequence in sequences] == [sequence.routes for sequence in expected]
        torch.testing.assert_close(kernel.logits_BV[live], torch_path.logits_BV[live], atol=1e-4, rtol=1e-4)
        if drafts and len(live):
            same_drafts(kernel, torch_path, live)
    if drafts:
        assert 0 < kernel.drafts.accepted < kernel.drafts.drafted, "both outcomes were met"


def same_drafts(kernel, torch_path, live):
    """Drafters and rejected drafts agree in the rows that continue."""
    own_drafts, reference = kernel.drafts, torch_path.drafts
    assert (own_drafts.drafted, own_drafts.accepted) == (reference.drafted, reference.accepted)
    assert torch.equal(own_drafts.known_B[live], reference.known_B[live])
    assert torch.equal(own_drafts.base_B[live], reference.base_B[live])
    assert torch.equal(own_drafts.token_BT[live, :-1], reference.token_BT[live, :-1]), "the same drafts"
    for b in live.nonzero().flatten().tolist():
        true = slice(int(own_drafts.known_B[b]) + 1)
        torch.testing.assert_close(own_drafts.hidden_BTD[b, true], reference.hidden_BTD[b, true], atol=1e-4, rtol=1e-4)
        if kernel.sequences[b].request.sampling.temperature > 0:
            assert own_drafts.rejected.rejected_B[b] == reference.rejected.rejected_B[b]
            if own_drafts.rejected.rejected_B[b]:
                torch.testing.assert_close(
                    own_drafts.rejected.q_BV[b], reference.rejected.q_BV[b], atol=1e-6, rtol=1e-4
                )


def test_rounds_give_the_same_bits_in_any_company(instructions):
    """Prefill, drafts, acceptance and sampling together; the log-probabilities show every bit."""
    engine, prompts = Engine(flat(), TOKENIZER), texts(1, 63, 9)
    options = dict(samples=2, max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3, drafts=2)
    expected, before = engine.generate(prompts, **options), torch.get_num_threads()
    assert engine.generate(prompts, batch_rows=1, **options) == expected
    try:
        torch.set_num_threads(2)
        assert engine.generate(prompts[::-1], **options) == expected[::-1]
    finally:
        torch.set_num_threads(before)
    greedy = options | {"temperature": 0.0}
    assert engine.generate(prompts, **greedy) == engine.generate(prompts, **(greedy | {"drafts": 0}))


def test_in_bfloat16_as_many_drafts_are_accepted(instructions):
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = Scheduler(Engine(flat().to_compute(dtype), TOKENIZER), drafts=2)
        for key in range(12):
            scheduler.add(Request(tuple(texts(9)[0]), key, 20))
        while not scheduler.is_idle:
            scheduler.step()
        figures = scheduler.stats()
        shares.append(figures["accepted"] / figures["drafted"])
    assert 0.3 < shares[0] < 0.95 and abs(shares[0] - shares[1]) < 0.1, shares


def test_a_draft_that_breaks_the_network_ends_its_row_alone(instructions):
    model, prompts = flat(), texts(4, 5)
    requests = [Request(tuple(prompt), 1, 20, SamplingParams(t)) for prompt in prompts for t in (0.0, 1.0)]

    def answers():
        scheduler, events = Scheduler(Engine(model, TOKENIZER), drafts=3), {}
        tickets = [scheduler.add(request) for request in requests]
        while not scheduler.is_idle:
            for event in scheduler.step():
                events.setdefault(event.ticket, []).append(event)
        return [events[ticket] for ticket in tickets]

    clean = answers()
    words = [[event.token for event in row if isinstance(event, Token)] for row in clean]
    bad = next(token for token in words[0][5:] if token not in {*words[2], *words[3], *prompts[0], *prompts[1]})
    with torch.inference_mode():
        model.embed.weight[bad] = float("nan")
    broken = answers()
    until = words[0].index(bad) + 1
    assert [event.token for event in broken[0][:-1]] == words[0][:until]
    assert isinstance(broken[0][-1], Finished) and broken[0][-1].reason == "error"
    assert [[event[1:] for event in row] for row in broken[2:]] == [[event[1:] for event in row] for row in clean[2:]]
