"""What vLLM is handed, as far as that can be known without it: names and values of weights, the words of a request."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl import vllm_engine
from bessemer.rl.ray_worker import RolloutWorker, pack_weights, unpack_weights


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer.train(["Compute 3*7+6."] * 8, 274)
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, max_seq_len=64,
    )  # fmt: skip
    return Engine(Transformer(preset("tiny", **shape)).initialise(3), tokenizer)


def test_weights_have_the_names_and_values_of_an_export_without_mtp(engine, tmp_path):
    model = engine.model
    assert model.cfg.n_mtp == 1
    model.save(tmp_path / "model", mtp=False)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    weights = unpack_weights(pack_weights(model.state_dict()))
    found = vllm_engine.hub_state(weights, model.cfg)
    assert found.keys() == expected.keys() and any("e_score_correction_bias" in name for name in found)
    assert all(torch.equal(found[name], tensor) and found[name].is_contiguous() for name, tensor in expected.items())


def test_a_request_in_its_words(engine):
    plan = engine.plan([[0, 5, 6]], samples=3, temperature=0.7, top_k=9, max_new_tokens=11, seeds=[4])
    asked = [vllm_engine.sampling_params(sample.request) for sample in plan.batches[0].samples]
    assert len({one["seed"] for one in asked}) == 3 and all(0 <= one["seed"] < 2**63 for one in asked)
    assert asked[0] | {"seed": 0} == dict(
        temperature=0.7, top_p=1.0, top_k=9, min_p=0.0, repetition_penalty=1.0, seed=0, max_tokens=11,
        stop_token_ids=list(engine.tokenizer.stop_ids), ignore_eos=True, logprobs=0, detokenize=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="leave stop strings"):
        vllm_engine.sampling_params(engine.plan([[0, 5]], stop_strings=["x"]).batches[0].samples[0].request)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(engine, tmp_path):
    engine.model.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"pip install 'bessemer\[vllm\]'"):
        RolloutWorker("vllm", str(tmp_path / "model"), 1).open()
