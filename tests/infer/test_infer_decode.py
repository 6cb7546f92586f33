"""The cached, batched, absorbed decoder against the whole model run again for every token."""

import pytest
import torch

from bessemer.infer import reference
from bessemer.infer.cache import LatentCache
from bessemer.infer.decode import prefill, step
from bessemer.infer.experts import expert_ffn
from bessemer.model.counts import kv_cache_bytes
from bessemer.model.experts import expert_ffn_reference
from bessemer.model.presets import preset
from bessemer.model.transformer import Transformer


def padded(rows, pad=0):
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def distance(x, y):
    """Relative norm: float32 sums in another order differ by 1e-6 of it, a wrong position by 0.1 and more."""
    return float((x - y).norm() / y.norm())


VARIANTS = {
    "v3": {},
    "no query compression": {"q_lora_rank": 0},
    "yarn": {"rope_factor": 4.0, "original_seq_len": 64},
    "no shared expert": {"n_shared_experts": 0},
    "dense": {"n_dense_layers": 3, "n_mtp": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_the_plain_decoder(variant, cfg, prompts):
    model = Transformer(cfg.model_copy(update=VARIANTS[variant])).initialise(1).eval()
    rows = [list(p) for p in prompts]
    logits, cache = prefill(model, *padded(rows))
    assert distance(logits, reference.next_logits(model, rows)) < 1e-5
    generator = torch.Generator().manual_seed(9)
    for _ in range(4):
        token = torch.randint(3, cfg.vocab_size, (len(rows),), generator=generator)
        position = torch.tensor([len(row) for row in rows])
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
        logits = step(model, token, position, cache)
        assert distance(logits, reference.next_logits(model, rows)) < 1e-5


@torch.no_grad()
def test_rows_of_equal_length_take_no_mask_and_agree(model, prompts):
    rows = [p[:5] for p in prompts if len(p) >= 5]
    logits, cache = prefill(model, *padded(rows))
    token = logits.argmax(-1)
    logits = step(model, token, torch.full((len(rows),), 5), cache)
    rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
    assert distance(logits, reference.next_logits(model, rows)) < 1e-5


@torch.no_grad()
def test_padding_is_seen_by_nothing(model, prompts):
    """Other padding changes no bit: not the logits, not the real slots, not a later step."""
    outcomes = []
    for pad in (0, 7):
        tokens, length = padded(prompts, pad)
        logits, cache = prefill(model, tokens, length)
        later = step(model, logits.argmax(-1), length, cache)
        real = [layer[b, :n] for layer in cache.layers for b, n in enumerate(length.tolist())]
        outcomes.append([logits, later, *real])
    assert all(torch.equal(x, y) for x, y in zip(*outcomes, strict=True))


@torch.no_grad()
def test_padding_is_not_routed(model, prompts, monkeypatch):
    routed = []
    gate = model.layers[1].ffn.gate
    monkeypatch.setattr(gate, "choose", lambda score, choose=gate.choose: routed.append(len(score)) or choose(score))
    prefill(model, *padded(prompts))
    assert routed == [sum(map(len, prompts))]


@torch.no_grad()
def test_only_last_positions_reach_the_head(model, prompts, monkeypatch):
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    logits, cache = prefill(model, *padded(prompts))
    step(model, logits.argmax(-1), torch.tensor([len(p) for p in prompts]), cache)
    assert seen == [(len(prompts), model.cfg.dim)] * 2


@torch.no_grad()
def test_cache_grows_and_keeps_what_it_held(model):
    rows = [[5, 6, 7], [8] * 60]
    logits, cache = prefill(model, *padded(rows))
    assert cache.slots == 64
    for _ in range(10):
        token = logits.argmax(-1)
        logits = step(model, token, torch.tensor([len(row) for row in rows]), cache)
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
    assert cache.slots == 128
    assert distance(logits, reference.next_logits(model, rows)) < 1e-5


@torch.no_grad()
def test_expanded_and_kept_rows_decode_as_their_prompts(model, prompts):
    rows = prompts[2:6]
    _, cache = prefill(model, *padded(rows))
    source = torch.tensor([3, 0, 0, 2, 1, 3, 2])
    cache = cache.expand(source)
    kept = cache.keep(torch.tensor([True, False, True, False, False, True, True]))
    assert sorted(kept.tolist()) == [0, 2, 5, 6] and cache.rows == 4
    rows = [rows[i] for i in source[kept].tolist()]
    token = torch.tensor([11, 12, 13, 14])
    logits = step(model, token, torch.tensor([len(row) for row in rows]), cache)
    rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
    assert distance(logits, reference.next_logits(model, rows)) < 1e-5


@pytest.mark.parametrize("live", [[], [0], [6], [0, 1, 2], [4, 5, 6], [0, 2, 4, 6], [1, 3, 5], list(range(7))])
def test_keep_moves_exactly_the_live_rows(cfg, live):
    cache = LatentCache(cfg, 7, 3, torch.float32, torch.device("cpu"))
    for i in range(cfg.n_layers):
        cache.layers[i][:] = torch.arange(7.0)[:, None, None]
    mask = torch.zeros(7, dtype=torch.bool)
    mask[live] = True
    source = cache.keep(mask)
    assert sorted(source.tolist()) == live
    assert all(cache.read(i, 3)[:, 1, 0].tolist() == source.tolist() for i in range(cfg.n_layers))


def test_bytes_per_token_follow_the_count():
    cfg = preset("tiny")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = LatentCache(cfg, 2, 10, dtype, torch.device("cpu"))
        assert cache.bytes_per_token == kv_cache_bytes(cfg, size)
        held = sum(layer.untyped_storage().nbytes() for layer in cache.layers)
        assert held == 2 * 64 * kv_cache_bytes(cfg, size)
    v3 = LatentCache(preset("v3"), 1, 1, torch.bfloat16, torch.device("meta"))
    assert v3.bytes_per_token == 70272  # ISCA Table 1


def test_experts_equal_the_loop(cfg):
    generator = torch.Generator().manual_seed(0)
    count = torch.tensor([3, 0, 1, 7, 0])
    rows, weight = torch.randn(11, 8, generator=generator), torch.rand(11, generator=generator)
    w13, w2 = torch.randn(5, 12, 8, generator=generator), torch.randn(5, 8, 6, generator=generator)
    found = expert_ffn(rows, weight, count, w13, w2)
    assert distance(found, expert_ffn_reference(rows, weight, count, w13, w2)) < 1e-6
