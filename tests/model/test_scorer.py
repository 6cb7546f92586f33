"""The reward model's network: on disk a plain DeepseekV3ForSequenceClassification, with transformers' scores.

Bound 1e-5 as in test_deepseek_parity: float32 in a network of three layers.
"""

import json

import pytest
import torch
from model_cases import V2, random_model, relative, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2ForSequenceClassification, DeepseekV3ForSequenceClassification
from transformers.utils import logging as hf_logging

from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.model.transformer import Scorer

hf_logging.disable_progress_bar()
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
CFG = tiny()


def scorer(cfg=CFG):
    return Scorer.of(random_model(cfg), seed=1).eval()


@torch.no_grad()
def last(model, tokens_BT, lengths):
    scores_BT = model(tokens_BT)
    return torch.stack([scores_BT[b, n - 1] for b, n in enumerate(lengths)])


def test_the_body_is_copied_and_the_head_is_new():
    base = random_model(CFG)
    network = Scorer.of(base, seed=1)
    scorer_state, base_state = network.state_dict(), base.state_dict()
    assert scorer_state.keys() - base_state.keys() == {"score.weight"}
    assert all(name.startswith(("head.", "mtp.")) for name in base_state.keys() - scorer_state.keys())
    assert all(torch.equal(scorer_state[name], base_state[name]) for name in scorer_state if name != "score.weight")
    base.embed.weight.data.zero_()
    assert network.embed.weight.any(), "a copy, not a view"
    assert torch.equal(Scorer.of(base, 1).score.weight, network.score.weight)
    assert not torch.equal(Scorer.of(base, 2).score.weight, network.score.weight)
    assert not hasattr(network, "head") and not network.mtp


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), V2], ids=["v3", "tied", "v2"])
def test_transformers_reads_the_same_scores(changes, tmp_path):
    """Right padding, since their model looks for the last token that is not padding."""
    network = scorer(tiny(**changes))
    network.save(tmp_path)
    kind = DeepseekV2ForSequenceClassification if changes is V2 else DeepseekV3ForSequenceClassification
    reference, info = kind.from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    assert reference.config.num_labels == 1 and reference.config.pad_token_id == 2
    ids, lengths = tokens(CFG, rows=3).clamp(min=3), (20, 7, 13)
    for row, length in enumerate(lengths):
        ids[row, length:] = 2
    with torch.no_grad():
        actual = reference.eval()(ids, attention_mask=(ids != 2).long()).logits.squeeze(1)
    assert relative(actual, last(network, ids, lengths)) < 1e-5


def test_what_transformers_writes_is_read(tmp_path):
    network = scorer()
    network.save(tmp_path / "ours")
    DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "ours", **EAGER).save_pretrained(tmp_path / "theirs")
    reloaded = deepseek.load(tmp_path / "theirs", kind=Scorer).eval()
    ids = tokens(CFG)
    assert relative(last(reloaded, ids, (20, 20)), last(network, ids, (20, 20))) < 1e-6


def test_it_comes_back_bit_by_bit_with_strict_keys(tmp_path):
    network = scorer()
    network.save(tmp_path)
    reloaded = deepseek.load(tmp_path, kind=Scorer).state_dict()
    assert reloaded.keys() == network.state_dict().keys()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in network.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "DeepseekV3ForSequenceClassification"
    ]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != "score.weight"}, file)
    with pytest.raises(UserError, match=r"score\.weight is missing"):
        deepseek.load(tmp_path, kind=Scorer)
    save_file(tensors | {"lm_head.weight": torch.zeros(96, 32)}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight has no place"):
        deepseek.load(tmp_path, kind=Scorer)


def test_neither_kind_is_taken_for_the_other(tmp_path):
    scorer().save(tmp_path / "reward")
    random_model(CFG).save(tmp_path / "language")
    with pytest.raises(UserError, match="reward model, but a language model"):
        deepseek.load(tmp_path / "reward")
    with pytest.raises(UserError, match="language model, but a reward model"):
        deepseek.load(tmp_path / "language", kind=Scorer)
