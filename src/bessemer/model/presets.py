"""Named model shapes. One dial per scale; every field can still be set in the recipe's [model] table.

`tiny` and `small` keep every mechanism of V3 alive at laptop size: query compression, latent wider than a head,
several groups with K_r / M = 2, a dense layer as wide as the active experts, one MTP module.
"""

from __future__ import annotations

import difflib
from typing import Any

from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

TINY = dict(
    vocab_size=2048, dim=128, n_layers=4, n_dense_layers=1, inter_dim=320, moe_inter_dim=64,
    n_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=16, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
    n_mtp=1, max_seq_len=512, init_std=0.04,
)  # fmt: skip

SMALL = dict(
    vocab_size=4096, dim=256, n_layers=6, n_dense_layers=1, inter_dim=320, moe_inter_dim=64,
    n_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=36, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
    n_mtp=1, max_seq_len=1024, init_std=0.03,
)  # fmt: skip

# The smallest shape whose latent cache (512 + 64) the MLA kernels of vLLM, TensorRT-LLM and llama.cpp accept.
SERVABLE = dict(
    vocab_size=8192, dim=512, n_layers=8, n_dense_layers=1, inter_dim=1152, moe_inter_dim=128,
    n_heads=16, q_lora_rank=192, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=32, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
    n_mtp=1, max_seq_len=4096, init_std=0.02,
)  # fmt: skip

V2_LITE = dict(
    vocab_size=102400, dim=2048, n_layers=27, n_dense_layers=1, inter_dim=10944, moe_inter_dim=1408,
    n_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, score_func="softmax", topk_method="greedy",
    norm_topk_prob=False, route_scale=1.0, max_seq_len=163840, rope_factor=40.0, mscale=0.707, mscale_all_dim=0.707,
    init_std=0.006,
)  # fmt: skip

MOONLIGHT = dict(
    vocab_size=163840, dim=2048, n_layers=27, n_dense_layers=1, inter_dim=11264, moe_inter_dim=1408,
    n_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, route_scale=2.446, rope_theta=50000.0,
    max_seq_len=8192, norm_eps=1e-5, init_std=0.006,
)  # fmt: skip

# V3 4.2 for the short-context stage: plain RoPE at 4096. The extension stages set rope_factor = 40.
V3 = dict(
    vocab_size=129280, dim=7168, n_layers=61, n_dense_layers=3, inter_dim=18432, moe_inter_dim=2048,
    n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=256, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, route_scale=2.5,
    n_mtp=1, max_seq_len=4096, init_std=0.006,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "small": SMALL,
    "servable": SERVABLE,
    "v2-lite": V2_LITE,
    "moonlight": MOONLIGHT,
    "v3": V3,
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named shape with some fields replaced; unknown names and keys are UserErrors with the nearest valid one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"model: unknown preset '{name}'{hint} Presets: {', '.join(PRESETS)}")
    return ModelConfig.make({**PRESETS[name], **overrides}, where=f"model (preset '{name}')")
