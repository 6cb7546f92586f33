"""A server's cache: a limit, and pages that later prompts begin with."""

from functools import partial

import plain_decoder
import pytest
import torch

from bessemer.addons.serve.prefix_cache import CachedPages, CacheFull, PrefixCache, prefix_keys
from bessemer.engine.decode import TorchSteps
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.steps import PrefillChunk


def new_cache(model, **options):
    return TorchSteps(model).new_cache(make=partial(PrefixCache, **options))


def distance(x, y):
    """Relative norm: float32 sums in another order differ by 1e-6 of it, a wrong position by at least 0.1."""
    return float((x - y).norm() / y.norm())


@torch.no_grad()
def test_a_prompt_whose_beginning_is_cached_is_the_prompt(model, prompts):
    """A prompt goes on from the end of a cached prefix, alongside others."""
    long = (prompts[7] * 3)[:150]
    cache = new_cache(model)
    held = cache.open(long)
    cache.extend(held, len(long))
    for end in (40, 150):
        TorchSteps(model).prefill(cache, [PrefillChunk(held, end)])
    cache.admit([(held, 1)])
    for other, actual in ((long[:140], 128), (long[:128], 64), (long[:64], 0), ([9, *long[:140]], 0)):
        held = cache.open(other)
        assert held.cached == actual
        fresh, lengths = cache.open([5, 6]), (len(other), 2)
        for prompt, length in zip((held, fresh), lengths, strict=True):
            cache.extend(prompt, length)
        chunks = [PrefillChunk(prompt, length) for prompt, length in zip((held, fresh), lengths, strict=True)]
        logits = TorchSteps(model).prefill(cache, chunks)
        assert distance(logits, plain_decoder.next_logits(model, [other, [5, 6]])) < 1e-5
        cache.drop(held)
        cache.drop(fresh)
    logits = TorchSteps(model).forward(torch.tensor([[7]]), torch.tensor([150]), cache).logits_BTV[:, 0]
    assert distance(logits, plain_decoder.next_logits(model, [[*long, 7]])) < 1e-5


@torch.no_grad()
def test_a_full_cache_raises_and_stays_unchanged(model):
    cache = new_cache(model, limit=3 * PAGE)
    rows = [cache.open([n] * 64) for n in (5, 6)]
    for row in rows:
        cache.extend(row, 64)
    TorchSteps(model).prefill(cache, [PrefillChunk(row, 64) for row in rows])
    cache.admit([(row, 1) for row in rows])
    held = cache.open([7] * 100)
    with pytest.raises(CacheFull):
        cache.extend(held, 100)
    assert held.pages == [] and cache.free_pages() == 1 and cache.pages_needed([65, 65]) == 2
    cache.keep([True, False])
    cache.extend(held, 100)
    assert cache.free_pages() == 0


def test_pages_are_free_used_or_remembered():
    keys = lambda ids: prefix_keys(ids, len(ids) - 1, 0, [])  # noqa: E731
    pages = CachedPages()
    pages.grow(4)
    first, ids = pages.allocate(3), list(range(3 * PAGE))
    pages.cache(prefix_keys(ids, len(ids), 0, []), first)
    assert pages.match(keys([*ids, 7])) == first and pages.match(keys(ids)) == first[:2]
    assert pages.match(keys([1, *ids])) == []
    pages.release(first)
    assert pages.available == 4
    pages.share(actual := pages.match(keys(ids)))  # in use again: only the third page may be evicted
    allocated = pages.allocate(2)
    assert set(allocated).isdisjoint(actual) and pages.match(keys([*ids, 7])) == actual and pages.available == 0
    pages.release(actual)
    assert pages.match(keys(ids)) == actual and pages.available == 2
    pages.allocate(2)
    assert pages.match(keys(ids)) == [] and pages.available == 0
