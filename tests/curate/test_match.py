"""Copies: everything that comparing all pairs would find, however the work is split."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.curate import output, steps
from bessemer.addons.curate.duplicates import EXACT, SignedUnit, bins, clusters, match
from bessemer.addons.curate.settings import Dedup

DEDUP = Dedup()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
@settings(deadline=None, max_examples=200)
def test_clusters_match_those_of_union_find(pairs):
    pairs = [sorted(pair) for pair in pairs if pair[0] != pair[1]]
    parent = list(range(41))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in pairs:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    for first in (0, (1 << 32) - 20, 1 << 40):  # numbers of 32 bits, of more, and both
        array = np.array(pairs, np.uint64).reshape(-1, 2) + np.uint64(first)
        members, leaders = clusters(iter([array[::2], array[1::2], array[:3]]))
        assert members.tolist() == sorted({x + first for pair in pairs for x in pair})
        assert leaders.tolist() == [root(int(x) - first) + first for x in members]


def _sorted_entries(monkeypatch, n_bins: int) -> int:
    """Entries that numpy sorts to join this many bins of 2,000 pairs each, without overlap."""
    entries = 0

    def counting(function):
        def wrapper(array, *args, **kwargs):
            nonlocal entries
            entries += len(array[0]) if isinstance(array, tuple) else array.size
            return function(array, *args, **kwargs)

        return wrapper

    draw = np.random.default_rng(0)
    pairs = [np.sort(draw.integers(0, 1 << 31, (2_000, 2)).astype(np.uint64), 1) for _ in range(n_bins)]
    with monkeypatch.context() as patch:
        for name in ("unique", "sort", "argsort", "lexsort"):
            patch.setattr(np, name, counting(getattr(np, name)))
        clusters(iter(pairs))
    return entries


def test_work_of_joining_grows_in_proportion_to_the_pairs(monkeypatch):
    assert _sorted_entries(monkeypatch, 42) < 5 * _sorted_entries(monkeypatch, 11)
    assert _sorted_entries(monkeypatch, 420) < 12 * _sorted_entries(monkeypatch, 42)


@pytest.fixture
def signed(tmp_path):
    """Three units with exact and near copies within and across them, and their texts."""
    draw = random.Random(4)
    vocabulary = [f"w{n}" for n in range(3000)]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(60, 200))) for _ in range(60)]
    for number in range(60):
        if number % 3 == 0:
            texts.append(texts[number].upper() + "  ")
        if number % 3 == 1:
            words = texts[number].split()
            words[draw.randrange(len(words))] = "other"
            texts.append(" ".join(words))
    texts += ["", "alone", "alone"]
    draw.shuffle(texts)
    units, first = [], 0
    for number, some in enumerate((texts[:30], texts[30:31], texts[31:])):
        read, sign = tmp_path / f"read{number}", tmp_path / f"sign{number}"
        read.mkdir()
        sign.mkdir()
        with output.create(read) as file:
            for text in some:
                output.dump(file, {"text": text})
        steps.sign(sign, read, DEDUP, None, 10)
        units.append(SignedUnit(sign, first, len(some)))
        first += len(some)
    return units, texts


def _pairs(units, memory: int, bands: list[int]) -> set:
    total = sum(unit.documents for unit in units)
    matches = [match(units, which, DEDUP.threshold) for which in bins(total, bands, memory)]
    return {tuple(pair) for pair in np.concatenate(matches).tolist()}


def test_matches_do_not_depend_on_memory(signed):
    units, _ = signed
    bands = [EXACT, *range(DEDUP.bands)]
    assert len(bins(103, bands, 200)) > 30 * len(bands)
    assert _pairs(units, 200, bands) == _pairs(units, 1 << 30, bands)


def test_copies_match_those_of_comparing_everything(signed):
    units, texts = signed
    normal = [" ".join(text.lower().split()) for text in texts]
    signatures = np.concatenate([np.load(unit.folder / "signatures.npy") for unit in units])
    alike = [
        (a, b)
        for b in range(len(texts))
        for a in range(b)
        if texts[a] and texts[b] and (signatures[a] == signatures[b]).mean() >= DEDUP.threshold
    ]
    _, expected = clusters(iter([np.array(alike, np.uint64)]))
    _, leaders = clusters(iter([np.array(sorted(_pairs(units, 1 << 20, list(range(DEDUP.bands)))), np.uint64)]))
    assert leaders.tolist() == expected.tolist()
    assert len(set(expected.tolist())) < len(expected)
    exact = _pairs(units, 1 << 20, [EXACT])
    assert exact == {(normal.index(text), i) for i, text in enumerate(normal) if normal.index(text) != i}
