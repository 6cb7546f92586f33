"""The cached, batched, absorbed decoder against the whole model run again for every token."""

from itertools import chain

import plain_decoder
import pytest
import torch

from bessemer.engine import decode, steps
from bessemer.engine.decode import TorchSteps, expanded_after
from bessemer.engine.kv_cache import PAGE, LatentCache
from bessemer.engine.steps import PrefillChunk
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


def new_cache(model):
    return TorchSteps(model).new_cache()


def prefill_all(model, cache, prompts):
    """The logits after each of these prompts, which are taken in whole."""
    for prompt in prompts:
        cache.extend(prompt, len(prompt.ids))
    return TorchSteps(model).prefill(cache, [PrefillChunk(prompt, len(prompt.ids)) for prompt in prompts])


def step(model, token_B, position_B, cache):
    return TorchSteps(model).forward(token_B[:, None], position_B, cache).logits_BTV[:, 0]


def begun(model, rows, copies=1):
    """(logits after each of these prompts, a cache that holds them as rows)."""
    cache = new_cache(model)
    prompts = [cache.open(row) for row in rows]
    logits = prefill_all(model, cache, prompts)
    cache.admit([(prompt, copies) for prompt in prompts])
    return logits, cache


def positions(rows):
    return torch.tensor([len(row) for row in rows])


def go_on(model, cache, rows, steps, seed=9):
    """Steps with random tokens; compares every row's logits with the plain decoder's."""
    generator = torch.Generator().manual_seed(seed)
    rows = [list(row) for row in rows]
    for _ in range(steps):
        token = torch.randint(3, model.cfg.vocab_size, (len(rows),), generator=generator)
        logits = step(model, token, positions(rows), cache)
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
    assert distance(logits, plain_decoder.next_logits(model, rows)) < 1e-5
    return rows


def distance(x, y):
    """Relative norm: float32 sums in another order differ by 1e-6 of it, a wrong position by at least 0.1."""
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
    logits, cache = begun(model, prompts)
    assert distance(logits, plain_decoder.next_logits(model, prompts)) < 1e-5
    rows = list(prompts)
    for seed in range(4):
        rows = go_on(model, cache, rows, 1, seed)


@torch.no_grad()
def test_rows_of_equal_length_take_no_mask_and_agree(model, prompts):
    rows = [p[:5] for p in prompts if len(p) >= 5]
    _, cache = begun(model, rows)
    assert cache.row_groups(positions(rows))[0].bias is None
    go_on(model, cache, rows, 1)


@torch.no_grad()
def test_rows_are_read_in_blocks_of_like_length(model, monkeypatch):
    """Rows of 1, 2 and 3 pages in any order, blocks of at most two short rows: every row is read once."""
    rows = [[5 + n % 7] * n for n in (130, 3, 70, 10, 64, 127, 90, 20)]
    _, cache = begun(model, rows)
    monkeypatch.setattr("bessemer.engine.kv_cache.GROUP_BYTES", 2 * PAGE * cache.layers[0].shape[-1] * 4)
    blocks = cache.row_groups(positions(rows))
    members = [list(range(8))[b.rows] if isinstance(b.rows, slice) else b.rows.tolist() for b in blocks]
    assert sorted(chain(*members)) == list(range(8)) and [len(m) for m in members] == [1, 1, 1, 1, 1, 2, 1]
    assert [block.page_N.numel() // block.n_rows for block in blocks] == [3, 2, 2, 2, 2, 1, 1]
    go_on(model, cache, rows, 3)


@pytest.mark.parametrize("lengths", [(250, 257, 254, 240), (257, 250), (300, 5, 310, 255, 260)])
@torch.no_grad()
def test_rows_of_unequal_pages_keep_their_own_context(model, lengths):
    """Some share a block although one has a page more; the order in which blocks are read must not matter."""
    rows = [[(3 + 5 * i + n) % 290 + 3 for n in range(length)] for i, length in enumerate(lengths)]
    _, cache = begun(model, rows)
    for seed in range(4):
        rows = go_on(model, cache, rows, 2, seed)


@torch.no_grad()
def test_a_prompt_in_parts_is_the_prompt(model, prompts):
    """A prompt taken in over several steps."""
    long = (prompts[7] * 3)[:150]
    cache = new_cache(model)
    held = cache.open(long)
    cache.extend(held, len(long))
    for end in (1, 40, 64, 129, 150):
        logits = TorchSteps(model).prefill(cache, [PrefillChunk(held, end)])[0]
        assert distance(logits, plain_decoder.next_logits(model, [long[:end]])[0]) < 1e-5
    cache.admit([(held, 1)])
    go_on(model, cache, [long], 5)


@torch.no_grad()
def test_padding_has_no_influence(model, prompts):
    """A short prompt next to a longer one is padded; its latents do not change."""
    short, long = prompts[4], prompts[7]
    _, alone = begun(model, [short, short])
    _, padded = begun(model, [short, long])
    for a, b in zip(alone.layers, padded.layers, strict=True):
        assert distance(b[padded.row_pages[0][0], : len(short)], a[alone.row_pages[0][0], : len(short)]) < 1e-6
        assert not b[padded.row_pages[0][0], len(short) :].any()


@torch.no_grad()
def test_padding_is_not_routed(model, prompts, monkeypatch):
    routed = []
    gate = model.layers[1].ffn.gate
    monkeypatch.setattr(gate, "forward", lambda x, *rest, call=gate.forward: routed.append(len(x)) or call(x, *rest))
    begun(model, prompts)
    assert routed == [sum(map(len, prompts))]


@torch.no_grad()
def test_only_last_positions_reach_the_head(model, prompts, monkeypatch):
    shapes = []
    model.head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    logits, cache = begun(model, prompts)
    step(model, logits.argmax(-1), positions(prompts), cache)
    assert shapes == [(len(prompts), model.cfg.dim), (len(prompts), 1, model.cfg.dim)]


@torch.no_grad()
def test_rows_take_a_page_when_they_need_one(model):
    rows = [[5, 6, 7], [8] * 60]
    _, cache = begun(model, rows)
    assert [len(pages) for pages in cache.row_pages] == [1, 1]
    go_on(model, cache, rows, 10)
    assert [len(pages) for pages in cache.row_pages] == [1, 2]


@torch.no_grad()
def test_copies_share_full_pages_and_go_their_own_ways(model, prompts):
    rows = [prompts[7], prompts[2]]
    _, cache = begun(model, rows, copies=3)
    assert (
        len({pages[0] for pages in cache.row_pages[:3]}) == 1 and len({pages[1] for pages in cache.row_pages[:3]}) == 3
    )
    assert cache.pages.total - cache.pages.available == 1 + 3 + 3
    rows = go_on(model, cache, [rows[0]] * 3 + [rows[1]] * 3, 3)
    rows_kept = cache.keep([False, True, False, True, False, True])
    rows = [rows[b] for b in rows_kept]
    assert len(cache.row_pages) == 3 and cache.pages.total - cache.pages.available == 2 + 1 + 1
    go_on(model, cache, rows, 2)
    cache.keep([False] * 3)
    assert cache.pages.total == cache.pages.available


def test_bytes_per_token_follow_the_count():
    cfg = preset("tiny")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = LatentCache(cfg, dtype, torch.device("cpu"))
        cache.extend(cache.open([3] * 100), 100)
        held = sum(layer.untyped_storage().nbytes() for layer in cache.layers)
        assert held == 2 * PAGE * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * cfg.n_layers * size
    v3 = LatentCache(preset("v3"), torch.bfloat16, torch.device("meta"))
    assert sum(pool.shape[-1] * pool.element_size() for pool in v3.layers) == 70272  # ISCA Table 1


@pytest.mark.parametrize("form", ["kernel", "torch"])
@torch.no_grad()
def test_attention_after_cached_tokens(monkeypatch, cfg, form):
    """The last tokens of a row, given the latents of all, come out as when the whole row runs at once."""
    steps.backend_of(Transformer(cfg))  # loads the kernels
    if form == "torch":
        monkeypatch.setattr(decode.attend_after, "implementations", [])
    model = Transformer(cfg).initialise(1).eval()
    mla, rope = model.layers[0].attn, model.rope_table(70)
    x_BTD = torch.randn(2, 70, cfg.dim, generator=torch.Generator().manual_seed(2))
    expected, latent = mla(x_BTD, rope), mla.latent(x_BTD, rope)
    for T in (1, 5, 40, 70):
        assert distance(expanded_after(mla, x_BTD[:, -T:], latent, rope[-T:]), expected[:, -T:]) < 1e-6
