"""Requests as large as the API allows: what one of them costs the server does not grow with its samples."""

import pytest
import torch
from serving import CONTEXT, running

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.serve import worker
from bessemer.addons.serve.fair_queue import FairQueue
from bessemer.addons.serve.protocol import CompletionRequest
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.sampling_params import requests
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.model.accounting import kv_cache_bytes
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


def loaded(server):
    (model,) = server.models.loaded.values()
    return model


class CountedIds(tuple):
    """Prompt ids that count how often all of them are read."""

    reads = 0

    def __iter__(self):
        CountedIds.reads += 1
        return super().__iter__()

    def __hash__(self):
        CountedIds.reads += 1
        return super().__hash__()


def test_a_prompt_is_read_once_for_all_of_its_samples(server):
    ids = CountedIds(range(3, 40))
    body = CompletionRequest(prompt=list(ids), n=128, seed=5)
    CountedIds.reads = 0
    served = requests(body, loaded(server), [ids], client="", max_tokens=2, param="prompt", top=0)
    assert len({request.key for request in served}) == 128 and all(request.prompt is ids for request in served)
    assert CountedIds.reads <= 4
    doubled = requests(body, loaded(server), [ids, ids], client="", max_tokens=2, param="prompt", top=0)
    assert len({request.key for request in doubled}) == 256 and [request.key for request in doubled][:128] == [
        request.key for request in served
    ]


def test_a_cache_takes_at_most_half_of_what_is_free():
    """DeepSeek-V2-Lite's shape without its weights: rows of full length would take 326 GB."""
    with torch.device("meta"):
        model = Transformer(preset("v2-lite"))
    shape = model.embed.weight.shape
    model.embed.weight = torch.nn.Parameter(
        torch.zeros(1, dtype=torch.bfloat16).expand(shape)
    )  # on the CPU, of 2 bytes
    per_token = kv_cache_bytes(model.cfg, 2)
    for free in (8 << 30, 64 << 30):
        tokens = worker.cache_room(model, 64, free)
        assert 0.49 * free < tokens * per_token <= free / 2
    full = 64 * model.cfg.max_seq_len
    assert worker.cache_room(model, 64, 1 << 62) == full and full * per_token > 320e9
    with pytest.raises(UserError, match="no room for a cache"):
        worker.cache_room(model, 64, 1 << 20)


def test_a_server_reports_the_context_that_its_memory_holds(r1, monkeypatch):
    monkeypatch.setattr(worker, "free_bytes", lambda model: 200_000)
    with running(r1) as small:
        facts = loaded(small).facts
        assert PAGE <= facts.context < facts.own_context == CONTEXT
        answer = small.post("/v1/completions", prompt=[5] * (facts.context - 4), max_tokens=20, ignore_eos=True)
        assert answer.json()["usage"]["completion_tokens"] == 4
    monkeypatch.setattr(worker, "free_bytes", lambda model: 1 << 40)
    with running(r1) as large:
        assert loaded(large).facts.context == CONTEXT


def test_rows_of_a_foreign_model_start_as_long_as_memory_holds_them(r1):
    """Their slots are those of the longest row, so a long row takes what many short ones would."""
    transformers, tokenizer = pytest.importorskip("transformers"), load_tokenizer(r1)
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=512)  # fmt: skip
    engine = Engine(CausalLM(transformers.LlamaForCausalLM(config)), tokenizer)
    scheduler, most = Scheduler(engine, rows=16, cache_tokens=1024, queue=FairQueue()), 0
    for n in range(12):
        scheduler.add(Request((5,) * (300 if n == 6 else 20), n, 20, stop_ids=()))
    while not scheduler.is_idle:
        scheduler.step()
        stats = scheduler.stats()
        most = max(most, stats["running"])
        assert stats["cache_tokens_used"] <= 1024
    assert most == 6, "those before the long one, which waits until few are left"
