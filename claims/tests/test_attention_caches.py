"""Ways of caching what attention needs: the same output, and the number of bytes that the shapes imply."""

import pytest
import torch

from bessemer.model.config import preset
from bessemer_claims.attention_caches import GROUPS, Remembered, _dominates, seconds

CFG = preset("claims", dim=32, n_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
             v_head_dim=8, vocab_size=64)  # fmt: skip
WAYS = ("none", "inputs", "keys", "expanded", "latents")


@torch.inference_mode()
def test_all_caches_give_the_same_attention():
    cache = Remembered(CFG, 3, 20)
    cache.keys[:, :, -1] = cache.values[:, :, -1] = cache.latents[:, -1] = (
        0  # each step fills in the new token's entries
    )
    expected = cache.step_none()
    for name in WAYS:
        assert torch.allclose(getattr(cache, f"step_{name}")(), expected, atol=1e-5), name
    assert cache.step_groups().shape == expected.shape and not torch.allclose(cache.step_groups(), expected, atol=1e-3)


def test_bytes_match_those_of_the_shapes():
    actual = Remembered(CFG, 3, 20).bytes()
    numbers = {
        "none": 0,
        "inputs": 32,
        "keys": 4 * (12 + 8),
        "groups": GROUPS * (12 + 8),
        "expanded": 12,
        "latents": 12,
    }
    assert actual == {name: 3 * 20 * 4 * n for name, n in numbers.items()}


def test_a_cache_is_dominated_by_one_no_worse_in_bytes_and_time():
    assert _dominates((1, 2), (1, 3)) and not _dominates((1, 2), (1, 2)) and not _dominates((1, 2), (2, 1))
    assert set(seconds(Remembered(CFG, 1, 8), WAYS)) == set(WAYS)
    with pytest.raises(AttributeError):
        seconds(Remembered(CFG, 1, 8), ("hashes",))
