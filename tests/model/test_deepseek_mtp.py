"""Multi-token prediction against two independent implementations: naive float64 equations, and transformers' MTP model.

The naive network reads the files we wrote, so names, concatenation order and shapes on disk are part of the test.
transformers hands the NORMALISED state of depth k to depth k+1, while the paper's h^k is the state before that norm:
the two agree for D = 1, which is all that is released.
"""

import pytest
import torch
from model_cases import YARN, random_model, relative, tiny, tokens
from naive_network import Naive
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from bessemer.hf import deepseek


@torch.no_grad()
def mtp_logits(model, tokens_BT):
    return [model.head(h) for h in model.train_outputs(tokens_BT).mtp_hidden]


@pytest.mark.parametrize("changes", [dict(n_mtp=2), dict(n_mtp=1, q_lora_rank=0, **YARN)], ids=["two", "yarn"])
def test_network_and_mtp_equal_the_naive_equations(changes, tmp_path):
    cfg = tiny(**changes)
    random_model(cfg).save(tmp_path)
    model = deepseek.load(tmp_path).eval()
    ids = tokens(cfg, rows=1, length=10)
    naive = Naive(tmp_path, cfg)
    _, expected = naive.main(ids[0])
    with torch.no_grad():
        error = relative(model(ids)[0], expected)
    errors = [error] + [relative(a[0], b) for a, b in zip(mtp_logits(model, ids), naive.mtp(ids[0]), strict=True)]
    assert len(errors) == 1 + cfg.n_mtp
    assert max(errors) < 1e-5, errors  # float32 against float64


def test_mtp_equals_transformers(tmp_path):
    cfg = tiny(n_mtp=1)
    random_model(cfg).save(tmp_path)
    own = deepseek.load(tmp_path).eval()
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    reference._keys_to_ignore_on_load_unexpected = [
        r"model\.layers\.3.*"
    ]  # its list has only DeepSeek-V3's own index, 61
    module = MtpModel.from_pretrained(reference).eval()
    ids = tokens(cfg, rows=1, length=16)
    with torch.no_grad():
        hidden = reference.model(ids).last_hidden_state
        positions = torch.arange(15)[None]
        cache = MtpCache(config=reference.config.get_mtp_config())
        after = module.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=ids[:, 1:])
        expected = module.shared_head(after)
    error = relative(mtp_logits(own, ids)[0], expected)
    assert error < 1e-5


def test_dropping_mtp_leaves_the_main_model_alone(tmp_path):
    cfg = tiny(n_mtp=2)
    model = random_model(cfg)
    model.save(tmp_path / "with")
    model.save(tmp_path / "without", mtp=False)
    ids = tokens(cfg)
    for loaded in (deepseek.load(tmp_path / "with", mtp=False), deepseek.load(tmp_path / "without")):
        assert loaded.cfg == cfg.model_copy(update={"n_mtp": 0}) and len(loaded.mtp) == 0
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids), model(ids))


def test_announced_but_absent_mtp_is_stated(tmp_path):
    """transformers itself writes num_nextn_predict_layers 1 without such a layer."""
    cfg = tiny()
    random_model(cfg).save(tmp_path, mtp=False)
    deepseek.write_config(cfg, tmp_path)
    with pytest.warns(UserWarning, match="1 MTP layers"):
        assert deepseek.load(tmp_path).cfg.n_mtp == 0
