"""`StepBackend.batch_invariant`: a row's bits in BF16, alone, among others, in pieces, prefilled again, with drafts."""

import pytest
import torch

from bessemer.addons.accelerate import kernel_steps
from bessemer.addons.accelerate.kernels import library
from bessemer.addons.serve.requests import ServedRequest, Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.engine.steps import PrefillChunk, backend_of
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

REAL = dict(
    vocab_size=129_280, dim=96, n_layers=2, n_dense_layers=1, inter_dim=160, n_heads=3, kv_lora_rank=64, q_lora_rank=48,
    n_routed_experts=256, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, moe_inter_dim=32, n_mtp=0,
    max_seq_len=400,
)  # fmt: skip
"""V3's vocabulary and gate on a narrow network."""


def network(**values):
    model = Transformer(preset("tiny", init_std=0.1, **values)).initialise(1).eval().to_compute(torch.bfloat16)
    for n, gate in enumerate(model.gates().values()):
        gate.bias_E.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(n))
    return model


@pytest.fixture(params=["auto", "emulated-amx", "off"])
def steps_of(request, monkeypatch):
    """The batch-invariant steps of a model, by the kernels of an instruction set; "off": in plain torch."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    library.forget()
    if library.status().instructions == "off" and request.param != "off":
        pytest.skip(library.status().why)
    yield lambda model: backend_of(model, batch_invariant=True)
    monkeypatch.undo()
    library.forget()


def texts(*lengths, vocab=2000):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def run(steps, rows, new_BT, cuts=(), passes=1):
    """(logits after every new token, latents of every row) of rows that run together."""
    cache = steps.new_cache()
    prompts = [cache.open(row) for row in rows]
    for cut in (*cuts, max(map(len, rows))):
        chunks = [PrefillChunk(p, end) for p in prompts if (end := min(cut, len(p.ids))) > p.length]
        for chunk in chunks:
            cache.extend(chunk.prompt, chunk.end)
        if chunks:
            steps.prefill(cache, chunks)
    cache.admit([(prompt, 1) for prompt in prompts])
    position_B, logits = torch.tensor([len(row) for row in rows]), []
    for part_BT in new_BT.chunk(passes, 1):
        logits.append(steps.forward(part_BT, position_B, cache).logits_BTV)
        position_B += part_BT.shape[1]
    pools, lengths = torch.stack(cache.layers), position_B.tolist()
    latents = [pools[:, p].flatten(1, 2)[:, :n] for p, n in zip(cache.row_pages, lengths, strict=True)]
    return torch.cat(logits, 1), latents


def differing(run_a, run_b):
    """Rows with a differing bit, in the logits or in the latents."""
    pairs = zip(*run_a, *run_b, strict=True)
    return sum(not (torch.equal(a, c) and torch.equal(b, d)) for a, b, c, d in pairs)


@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_among_others(steps_of):
    narrower = {"vocab_size": 2000} if library.status().instructions == "emulated-amx" else {}  # it is slow
    model = network(**REAL | narrower)
    steps, rows = steps_of(model), texts(*[1 + 7 * n % 40 for n in range(24)])
    new_BT = torch.tensor(texts(*[1] * len(rows)))
    logits, latents = run(steps, rows, new_BT)
    for first, count in ((0, 1), (17, 1), (9, 3), (4, 8)):
        part = slice(first, first + count)
        own = run(steps, rows[part], new_BT[part])
        assert differing(own, (logits[part], latents[part])) == 0, f"{count} rows"


@torch.inference_mode()
def test_a_row_has_the_same_bits_whole_in_pieces_token_by_token_and_prefilled_again(steps_of):
    model = network(max_seq_len=400, vocab_size=2000)
    steps, rows = steps_of(model), texts(150, 3, 64, 97)
    new_BT = torch.tensor(texts(*[4] * len(rows)))
    whole = run(steps, rows, new_BT)
    for cuts, passes in (((1, 40, 64, 129), 1), ((100,), 2), ((), 4)):
        assert differing(run(steps, rows, new_BT, cuts, passes), whole) == 0, (cuts, passes)
    longer = [row + new for row, new in zip(rows, new_BT[:, :2].tolist(), strict=True)]
    again = run(steps, longer, new_BT[:, 2:])
    assert differing(again, (whole[0][:, 2:], whole[1])) == 0, "generated tokens, prefilled"


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_request_gets_the_same_bits_from_a_busy_server(steps_of, drafts):
    """Prompts in pieces, shared pages, preemption: the log-probabilities show every bit."""
    model = network(vocab_size=305, max_seq_len=400)
    steps_of(model)
    engine = Engine(model, Tokenizer.train(["the quick brown fox"] * 8, 280), batch_invariant=True)
    common, *others = texts(130, 5, 70, 1, 90, 3, vocab=280)
    asked = [ServedRequest(tuple(common + own), n, 70, SamplingParams(0.8)) for n, own in enumerate(others)]

    def answers(requests, **options):
        scheduler = Scheduler(engine, drafts=drafts, batch_invariant=True, **options)
        tickets, tokens = [scheduler.add(request) for request in requests], {}
        while not scheduler.is_idle:
            for event in scheduler.step():
                if isinstance(event, Token):
                    tokens.setdefault(event.ticket, []).append((event.token, event.logprob))
        return [tokens[ticket] for ticket in tickets], scheduler

    busy, scheduler = answers([*asked, *asked], rows=7, cache_tokens=640, prefill_tokens=50)
    assert scheduler.preempted and scheduler.cached_tokens, "it took part"
    for request, *got in zip(asked, busy[: len(asked)], busy[len(asked) :], strict=True):
        ((alone,), _) = answers([request], prefix_cache=False)
        assert got == [alone, alone]


@torch.inference_mode()
def test_pages_of_a_long_text_serve_a_longer_one(steps_of, monkeypatch):
    """Without the option, the length of a prompt decides in which form its later tokens attend."""
    monkeypatch.setattr(kernel_steps, "LONG", 64)
    monkeypatch.setattr(kernel_steps, "PASS", 128)
    model = network(max_seq_len=400, vocab_size=2000)
    steps, (longer,) = steps_of(model), texts(390)
    new_BT = torch.tensor(texts(1))

    def latents(n):
        return run(steps, [longer[:n]], new_BT)[1][0][:, :n]

    assert torch.equal(latents(390)[:, :300], latents(300))


def test_what_cannot_be_promised_is_refused(steps_of):
    with pytest.raises(UserError, match="batch_invariant"):
        steps_of(network(n_mtp=2)).new_cache(drafts=2)
    with pytest.raises(UserError, match="batch_invariant"):
        Engine(network().to("meta"), Tokenizer.train(["the quick brown fox"] * 8, 280), batch_invariant=True)
