"""Tiny random models of other architectures, made by transformers itself, in memory or on disk."""

import torch
import transformers
from transformers.utils import logging as hf_logging

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, bos_token_id=0,
            eos_token_id=1)  # fmt: skip
GEMMA3 = {**SHAPE, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": ("Llama", SHAPE),
    "llama-tied": ("Llama", {**SHAPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SHAPE),
    "gpt2": ("GPT2", GPT2),
    "mixtral": ("Mixtral", {**SHAPE, "num_local_experts": 4}),
    "gemma3": ("Gemma3", GEMMA3),
    "olmo2": ("Olmo2", SHAPE),
    "gpt-neox": ("GPTNeoX", {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}),
    "qwen3-moe": ("Qwen3Moe", {**SHAPE, "head_dim": 32, **EXPERTS}),
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}


def made(kind: str, seed: int = 0, **changes):
    """A random model of the given kind, in float32 and evaluation mode."""
    house, shape = KINDS[kind]
    config = getattr(transformers, CONFIGS.get(house, f"{house}Config"))(**(shape | changes))
    torch.manual_seed(seed)
    return getattr(transformers, MODELS.get(house, f"{house}ForCausalLM"))(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())
