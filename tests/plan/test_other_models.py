"""Shapes of other families against transformers: parameters, and what a forward saves for backward."""

from pathlib import Path

import pytest
import torch

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.families.lora import attach
from bessemer.addons.plan.other_models import from_config, known_model, known_models
from bessemer.config.training import LoRAConfig

transformers = pytest.importorskip("transformers")


def hf_config(model, **changes):
    values = {
        "hidden_size": model.dim, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "intermediate_size": model.inner, "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied, "max_position_embeddings": model.context, "head_dim": model.d,
    }  # fmt: skip
    if model.experts:
        values |= {"num_experts": model.experts, "num_experts_per_tok": model.chosen,
                   "moe_intermediate_size": model.expert_inner}  # fmt: skip
    return transformers.AutoConfig.for_model(model.family, **values | changes)


@pytest.mark.parametrize("name", known_models())
def test_parameters_match_transformers_and_the_published_count(name):
    model = known_models()[name]
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(hf_config(model))
    assert model.count() == sum(p.numel() for p in network.parameters()) == model.params
    shapes = sorted(tuple(p.shape) for p in network.parameters())
    assert shapes == sorted(model.tensors())
    assert from_config(network.config.to_dict()).count() == model.count()


def test_variants_of_a_known_model():
    assert known_model("hf://Qwen/Qwen2.5-7B-Instruct@a09a354") is known_model("hf://Qwen/Qwen2.5-7B")
    assert known_model("package:smollm2-135m").params == 134_515_008
    assert known_model("hf://Qwen/Qwen2.5-Math-7B").context == 4096
    assert known_model("hf://someone/else-7b") is None
    assert known_model("hf://Qwen/Qwen3-30B-A3B").active() == pytest.approx(3.35e9, rel=0.01)


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 160, "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip
MOE = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}, "qwen3_moe": MOE}


def saved_bytes(network, rows, length):
    """Bytes of the storages, other than weights, that a forward saves for backward."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, 512, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network.train_outputs(tokens)
    assert outputs.hidden_BTD.requires_grad
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_and_their_activations_match_those_of_peft(family, dtype):
    pytest.importorskip("peft")
    config = transformers.AutoConfig.for_model(family, **SMALL, **CONFIGS[family])
    network = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    network = attach(network, LoRAConfig(rank=8, alpha=16), 7, Path("base"), "tuned").to_compute(dtype)
    model = from_config(config.to_dict())
    assert model.adapters(8) == sum(p.numel() for p in network.parameters() if p.requires_grad)
    counted = saved_bytes(network, 2, 128)
    assert model.activations(2, 128, dtype.itemsize, adapter_rank=8) == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_match_what_transformers_saves(family, recompute, dtype):
    config = transformers.AutoConfig.for_model(family, **SMALL, **CONFIGS[family])
    inner = transformers.AutoModelForCausalLM.from_config(config)
    network = CausalLM(inner).to_compute(dtype)
    if recompute:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.train()
    counted = saved_bytes(network, 2, 128)
    model = from_config(config.to_dict())
    if recompute:  # checkpointing keeps the cosines and sines as arguments of the layers, which no hook sees
        counted += 2 * 128 * model.d * dtype.itemsize
    assert model.activations(2, 128, dtype.itemsize, recompute) == pytest.approx(counted, rel=0.002)
