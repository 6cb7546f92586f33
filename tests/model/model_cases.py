"""Small random networks that exercise every mechanism, and the error measure used throughout.

The weights are large enough that routing is decisive and norms matter. Routing biases are negative, so that a wrong
mask value for excluded groups (0 instead of -inf) changes the result.
"""

import torch
from hypothesis import strategies as st

from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

SHAPE = dict(
    vocab_size=96, dim=32, n_layers=3, n_dense_layers=1, inter_dim=48, moe_inter_dim=16,
    n_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=12, n_activated_experts=3, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
    n_mtp=1, max_seq_len=64, original_seq_len=16, init_std=0.2,
)  # fmt: skip
YARN = dict(rope_factor=4.0, max_seq_len=64, original_seq_len=16)
V2 = dict(score_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2, n_mtp=0, q_lora_rank=0,
          n_expert_groups=1, n_limited_groups=1)  # fmt: skip


def tiny(**changes) -> ModelConfig:
    return ModelConfig.make({**SHAPE, **changes})


@torch.no_grad()
def random_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """As if trained: norm gains off 1, routing biases off 0. In eval mode."""
    model = Transformer(cfg).initialise(seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias_E"):
            tensor.uniform_(-1.6, -1.0, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def tokens(cfg: ModelConfig, rows: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@st.composite
def configs(draw) -> ModelConfig:
    """Random V3-style networks of a few thousand parameters."""
    groups = draw(st.sampled_from([1, 2, 3]))
    experts = groups * draw(st.integers(2, 4))
    limit = draw(st.integers(1, groups))
    yarn = draw(st.booleans())
    return ModelConfig.make(
        dict(
            vocab_size=draw(st.integers(10, 60)),
            dim=draw(st.sampled_from([16, 24, 32])),
            n_layers=draw(st.integers(1, 3)),
            n_dense_layers=draw(st.integers(0, 1)),
            inter_dim=draw(st.integers(4, 40)),
            moe_inter_dim=draw(st.integers(3, 20)),
            n_heads=draw(st.integers(1, 3)),
            q_lora_rank=draw(st.sampled_from([0, 12])),
            kv_lora_rank=draw(st.integers(4, 20)),
            qk_nope_head_dim=draw(st.sampled_from([4, 6, 10])),
            qk_rope_head_dim=draw(st.sampled_from([4, 8])),
            v_head_dim=draw(st.sampled_from([4, 6, 10])),
            n_routed_experts=experts,
            n_shared_experts=draw(st.integers(1, 2)),
            n_activated_experts=draw(st.integers(1, limit * (experts // groups))),
            n_expert_groups=groups,
            n_limited_groups=limit,
            norm_topk_prob=draw(st.booleans()),
            route_scale=draw(st.sampled_from([1.0, 2.5])),
            n_mtp=draw(st.integers(0, 2)),
            rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
            max_seq_len=64,
            rope_factor=4.0 if yarn else 1.0,
            original_seq_len=draw(st.sampled_from([16, 32])),
            mscale=draw(st.sampled_from([1.0, 0.707])),
            mscale_all_dim=draw(st.sampled_from([1.0, 0.707])),
            norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
            init_std=draw(st.sampled_from([0.1, 0.3])),
            tie_embeddings=draw(st.booleans()),
        )
    )
