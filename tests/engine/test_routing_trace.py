"""What the engine records of its routing: every token fed, in every sparse layer, whatever the batching."""

import pytest
import torch

from bessemer.engine import decode
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer
from bessemer.workers import side_by_side

OPTIONS = dict(samples=3, max_new_tokens=20, seed=4, stop_ids=list(range(3, 20)))


@torch.no_grad()
def whole(model, ids):
    """The experts that the network chooses when it reads everything at once, [T, L, K]."""
    x, actual = model.embed(torch.tensor([ids])), []
    for layer in model.layers:
        attended = layer.attend(x, model.rope_table(len(ids)))
        if attended.routing is not None:
            actual.append(attended.routing.expert_NK)
        x = layer.feed_forward(attended)
    return torch.stack(actual, 1)


def records(groups):
    return [c.routing for group in groups for c in group]


def test_every_fed_token_has_its_experts(engine, prompts):
    """Against one full pass, whose sums have another order: only scores closer than 1e-6 may swap places."""
    model, cfg = engine.model.eval(), engine.model.cfg
    same = total = 0
    lengths = set()
    for prompt, group in zip(prompts, engine.generate(prompts, record_routing=True, **OPTIONS), strict=True):
        for c in group:
            fed = [*prompt, *c.tokens[:-1]]
            assert c.routing.dtype == torch.uint8 and c.routing.is_contiguous()
            assert c.routing.shape == (len(fed), cfg.n_layers - cfg.n_dense_layers, cfg.n_activated_experts)
            equal = c.routing.sort(-1).values == whole(model, fed).sort(-1).values
            same, total = same + int(equal.all(-1).sum()), total + equal[..., 0].numel()
            lengths.add(len(c.tokens))
    assert same / total > 0.999 and {1, 20} <= lengths, "rows of one token, which feed none, and of all"


def test_recording_changes_nothing(engine, prompts):
    assert engine.generate(prompts, record_routing=True, **OPTIONS) == engine.generate(prompts, **OPTIONS)
    assert all(c.routing is None for group in engine.generate(prompts, **OPTIONS) for c in group)


def test_records_do_not_depend_on_batches_or_processes(engine, prompts, monkeypatch):
    expected = records(engine.generate(prompts, record_routing=True, **OPTIONS))
    apart = records(Engine(engine.model, engine.tokenizer, side_by_side(2)).generate(
        prompts, record_routing=True, batch_rows=4, **OPTIONS))  # fmt: skip
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 20)
    alone = records(engine.generate(prompts, record_routing=True, **OPTIONS))
    for actual in (apart, alone):
        assert [record.shape for record in actual] == [record.shape for record in expected]
        equal = torch.cat([(a == b).all(-1).flatten() for a, b in zip(actual, expected, strict=True)])
        assert equal.float().mean() > 0.999


def test_many_experts_take_two_bytes(cfg, tokenizer):
    cfg_300 = cfg.model_copy(update={"n_routed_experts": 300, "moe_inter_dim": 4, "n_expert_groups": 1,
                                  "n_limited_groups": 1})  # fmt: skip
    model = Transformer(cfg_300).initialise(0)
    (((c,),)) = Engine(model, tokenizer).generate([[3, 4, 5]], max_new_tokens=30, stop_ids=[], record_routing=True)
    assert c.routing.dtype == torch.int16 and 255 < c.routing.max() < 300


def test_dense_models_refuse_routing_records(cfg, tokenizer):
    model = Transformer(cfg.model_copy(update={"n_dense_layers": 3, "n_mtp": 0})).initialise(0)
    with pytest.raises(UserError, match="no layer of this model has routed experts"):
        Engine(model, tokenizer).generate([[3]], record_routing=True)
