"""Large but empty: V3's vocabulary and prompts of 32K tokens on a network of almost no width. Work is counted."""

import json
import string
import tracemalloc

import pytest
from drain import drain

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.scheduler import Scheduler
from bessemer.engine.sequence import Request, SamplingParams
from bessemer.kernels import library, sampling
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

VOCABULARY, CONTEXT = 129_280, 32_768


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory):
    """The tokenizer with V3's number of tokens: the rest are words that no text contains."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer.save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    for n in range(tokenizer.vocab_size, VOCABULARY):
        vocab[f"Ġ{n:x}zq"] = n
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def large(wide):
    cfg = preset(
        "tiny", vocab_size=VOCABULARY, dim=16, n_layers=1, n_dense_layers=1, n_mtp=0, max_seq_len=CONTEXT, init_std=0.1
    )
    return Engine(Transformer(cfg).initialise(0), wide)


def test_stop_strings_cost_nothing_by_the_vocabulary(large, wide, monkeypatch):
    """n = 128 with 64 strings, as one request of a client, and 320 samples with them at once."""
    looked_at = []
    real = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, i: looked_at.append(i) or real(self, i))
    stops = tuple((string.ascii_letters + "äöüßéèêçñø盛钢")[:64])
    scheduler = Scheduler(large, rows=320)
    tracemalloc.start()
    try:
        live = [scheduler.start(Request((5, 6), n, 4, stop_strings=stops)) for n in range(320)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({id(sequence.stop) for sequence in live}) == 1
    assert not looked_at and held < 2e6
    steps = 0
    while not scheduler.idle:
        scheduler.step()
        steps += 1
    assert len(looked_at) == sum(len(sequence.tokens) for sequence in live), "each token once"
    assert "stop" in {sequence.finish for sequence in live}


@pytest.mark.skipif(not library.available(), reason="no kernels here")
def test_a_penalised_row_leaves_the_others_alone(large, monkeypatch):
    """Its neighbours are sampled inside the step, with the same numbers as without it."""
    plain = [Request((5 + n, 6), n, 12, SamplingParams(0.8, top_p=0.9)) for n in range(15)]
    penalised = Request(tuple(range(300)) * 50, 99, 12, SamplingParams(1.0, repetition_penalty=1.3))
    expected, _ = drain(Scheduler(large, rows=16, prefill_tokens=CONTEXT), plain, every=1)
    scheduler, rows, real = Scheduler(large, rows=16, prefill_tokens=CONTEXT), [], sampling.sample
    for request in [*plain, penalised]:
        scheduler.add(request)
    monkeypatch.setattr(
        sampling, "sample", lambda logits_BV, *a, **k: rows.append(len(logits_BV)) or real(logits_BV, *a, **k)
    )
    _, found = drain(scheduler)
    assert rows[0] == 16 or rows[1] == 16, "the first tokens, after prefill"
    assert sorted(rows)[:-1] == [1] * 12, rows
    assert [[t.token for t in tokens] for tokens, _ in list(found.values())[:15]] == [
        [t.token for t in tokens] for tokens, _ in expected
    ]
