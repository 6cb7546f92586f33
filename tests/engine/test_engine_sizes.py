"""Large but empty: V3's vocabulary and prompts of 32K tokens on a network of almost no width. Work is counted."""

import hashlib
import json
import string
import tracemalloc

import pytest
import torch
from drain import drain
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE, LatentCache
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
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({id(sequence.stop) for sequence in live}) == 1
    assert not looked_at and allocated < 2e6
    steps = 0
    while not scheduler.is_idle:
        scheduler.step()
        steps += 1
    assert len(looked_at) == sum(len(sequence.tokens) for sequence in live), "each token once"
    assert "stop" in {sequence.finish for sequence in live}


def test_a_text_is_hashed_once(large, monkeypatch):
    """A prompt of 32K tokens that waits, runs as two samples and ends."""
    hashed, real = [], hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda *args, **options: hashed.append(0) or real(*args, **options))
    prompt = tuple(n % 200 for n in range(CONTEXT - 600))
    pages = len(prompt) // PAGE
    scheduler = Scheduler(large, rows=4, cache_tokens=(pages + 1) * PAGE, prefill_tokens=CONTEXT)
    drain(scheduler, [Request(prompt, 0, 2)])
    assert len(hashed) == pages
    scheduler.add(Request((7, 8, 9), 1, 40, stop_ids=()))  # leaves too few pages for the prompt
    scheduler.step()
    hashed.clear()
    again = tuple(prompt)
    for n in range(2):  # together they do not fit either
        scheduler.add(Request(again, 2 + n, 20, stop_ids=()))
    waited = 0
    while scheduler.stats()["waiting"] == 2:
        scheduler.step()
        waited += 1
    _, actual = drain(scheduler)
    assert waited > 20 and sum(end.reason == "length" for _, end in actual.values()) >= 1
    assert scheduler.stats()["prompt_tokens_found"] == 2 * pages * PAGE
    assert len(hashed) <= pages + 2


class Writes(TorchDispatchMode):
    """Counts the numbers that `index_copy_` writes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_copy_.default:
            self.count += args[2].numel()
        return function(*args, **(kwargs or {}))


def test_the_page_table_is_extended_not_rebuilt():
    """64 rows of 32K tokens, each of which gets a page in turn; then half of them leave."""
    cfg = preset("tiny", dim=16, n_layers=1, n_dense_layers=1, kv_lora_rank=2, qk_rope_head_dim=2)
    cache = LatentCache(cfg, torch.bfloat16, torch.device("cpu"))
    prompts = [cache.open((1,) * CONTEXT) for _ in range(64)]
    for prompt in prompts:
        cache.extend(prompt, CONTEXT)
    cache.admit([(prompt, 1) for prompt in prompts])
    with Writes() as written:
        for b in range(64):
            cache.reserve([CONTEXT + (b >= other) for other in range(64)])
    assert written.count == 64
    cache.keep([True, False] * 32)
    with Writes() as written:
        cache.reserve([CONTEXT + PAGE + 1] * 32)
    assert written.count == 32
    pages = CONTEXT // PAGE + 2
    assert [row[:pages] for row in cache.table_BP.tolist()] == cache.row_pages
    assert len({page for row in cache.row_pages for page in row}) == 32 * pages


@pytest.mark.parametrize(("prompt", "most"), [(PAGE - 1, 1), (28, 100), (5, 59)])
def test_rows_that_have_pages_for_their_longest_all_start(engine, prompt, most):
    """As in rollouts on a GPU, whose cache has exactly that size."""
    pages = -(-(prompt + most) // PAGE)
    scheduler = Scheduler(engine, rows=8, cache_tokens=8 * pages * PAGE)
    for n in range(8):
        scheduler.add(Request(tuple(range(3 + n, 3 + n + prompt)), n, most, stop_ids=()))
    scheduler.step()
    assert scheduler.stats()["waiting"] == 0
