"""Models of other architectures through our interface, against transformers itself.

Bound 1e-5 on |difference| / |expected|, as in test_deepseek_parity: float32 rounds at 6e-8, a wrong mask
gives over 0.1.
"""

import json
import sys

import pytest
import torch
import transformers
from hf_cases import KINDS, made, relative, tokens
from safetensors.torch import load_file, save_file

from bessemer.addons.families import causal_lm
from bessemer.addons.families.text_limits import longest_text
from bessemer.errors import UserError
from bessemer.hf import model_directory
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

BOUND = 1e-5
torch.set_num_threads(1)


@pytest.fixture(params=sorted(KINDS))
def pair(request):
    """(ours, theirs) with the same weights."""
    return causal_lm.CausalLM(made(request.param)), made(request.param)


@pytest.fixture
def directory(tmp_path):
    made("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_hidden_states_are_ready_for_the_head(pair):
    ours, reference = pair
    ids = tokens(3, 11)
    out = ours.train_outputs(ids, None, mtp=False)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        assert relative(out.hidden_BTD @ ours.head_weight.T, expected) < BOUND
        assert relative(ours(ids), expected) < BOUND
    assert out.mtp_hidden == [] and float(out.balance) == 0.0
    assert ours.cfg.vocab_size == 96 and ours.cfg.n_mtp == 0 and ours.gates() == {}


def test_packed_samples_are_separate_samples(pair):
    """A packed row's hidden states and gradients are those of its samples alone; segment ids need not ascend."""
    ours, reference = pair
    ids = tokens(2, 20, seed=1)
    segments = torch.tensor([[5] * 3 + [2] * 1 + [9] * 10 + [4] * 6, [1] * 8 + [2] * 12])
    packed = ours.train_outputs(ids, segments).hidden_BTD
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    (packed * weight).sum().backward()
    theirs_base, total = reference.base_model, 0.0
    for row in range(2):
        for segment in segments[row].unique():
            in_segment = segments[row] == segment
            alone = theirs_base(input_ids=ids[row, in_segment][None]).last_hidden_state[0]
            assert relative(packed[row, in_segment], alone) < BOUND
            total = total + (alone * weight[row, in_segment]).sum()
    total.backward()
    theirs_grad = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    ours_grad = {name: p.grad for name, p in ours.inner.named_parameters() if p.grad is not None}
    assert theirs_grad.keys() == ours_grad.keys()
    for name, grad in theirs_grad.items():
        assert relative(ours_grad[name], grad) < 1e-4, name


def test_padding_to_the_right_changes_nothing_before_it(pair):
    ours, _ = pair
    ids = tokens(1, 9)
    wider = torch.cat((ids, torch.full((1, 5), 1)), 1)
    assert relative(ours.train_outputs(wider).hidden_BTD[:, :9], ours.train_outputs(ids).hidden_BTD) < BOUND


def test_dropout_stays_off():
    model = causal_lm.CausalLM(made("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    assert torch.equal(model(tokens(1, 8)), model(tokens(1, 8)))


def test_saved_models_load_in_transformers(pair, tmp_path):
    ours, reference = pair
    with torch.no_grad():
        for model in (ours.inner, reference):
            for parameter in model.parameters():
                parameter.add_(0.01)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.txt").write_text("x")
    ours.save(tmp_path / "model", files={"chat_template.jinja": "the template of an older model"})
    ours.save(tmp_path / "model", tokenizer_dir=tmp_path, files={"README.md": "a card"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = tokens(1, 7)
    assert torch.equal(again(input_ids=ids).logits, reference(input_ids=ids).logits)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert names.isdisjoint({"other.txt", "chat_template.jinja"})
    assert torch.equal(causal_lm.load(tmp_path / "model")(ids), ours(ids))


def test_a_directory_says_which_kind_it_is(directory, tmp_path):
    Transformer(preset("tiny", vocab_size=300, dim=64, n_layers=2)).initialise(0).save(tmp_path / "ours")
    assert isinstance(model_directory.load(tmp_path / "ours"), Transformer)
    assert isinstance(model_directory.load(directory, dtype="bfloat16"), causal_lm.CausalLM)
    assert model_directory.load(directory, dtype="bfloat16").embed.weight.dtype == torch.bfloat16


def test_compute_in_bfloat16_keeps_the_rotary_frequencies():
    model = causal_lm.CausalLM(made("llama"))
    before = model(tokens(1, 60))
    model.to_compute(torch.bfloat16)
    assert model.inner.model.rotary_emb.inv_freq.dtype == torch.float32
    assert relative(model(tokens(1, 60)).float(), before) < 0.05


def test_a_window_bounds_the_length():
    assert causal_lm.CausalLM(made("gemma3")).cfg.max_seq_len == 16
    assert causal_lm.CausalLM(made("llama")).cfg.max_seq_len == 128


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_a_second_set_of_rotary_frequencies_bounds_the_length():
    """Longer texts would change the frequencies of all samples in their row, and of what is in the cache already."""
    assert causal_lm.CausalLM(made("llama", rope_parameters=LONGROPE)).cfg.max_seq_len == 32
    plain = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"full_attention": LONGROPE, "sliding_attention": plain}
    assert causal_lm.CausalLM(made("gemma3", rope_parameters=kinds, sliding_window=64)).cfg.max_seq_len == 32
    yarn = plain | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert causal_lm.CausalLM(made("llama", rope_parameters=yarn)).cfg.max_seq_len == 128
    unused = {"max_position_embeddings": 128, "sliding_window": 16, "use_sliding_window": False}
    assert (longest_text(unused), longest_text({"n_positions": 64}), longest_text({})) == (128, 64, None)


def test_sizes_are_not_counts(tmp_path):
    """Qwen1.5-MoE's shared expert is wider than the model has tensors."""
    shape = KINDS["llama"][1] | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 192}
    reference = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**shape)).eval()
    reference.save_pretrained(tmp_path)
    assert relative(causal_lm.load(tmp_path)(tokens(1, 7)), reference(input_ids=tokens(1, 7)).logits) < BOUND
    for key in ("num_experts", "num_hidden_layers", "shared_expert_intermediate_size"):
        configure(tmp_path, **{key: 10**7})
        with pytest.raises(UserError, match=f"{key} = 10000000, but the 55 tensors"):
            causal_lm.load(tmp_path)
        configure(tmp_path, **{key: shape.get(key, 4)})


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def pickle_only(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_only, "pytorch_model.bin is a pickle.*refused"),
        (lambda d: edit(d, lambda t: t.pop("model.norm.weight")), "missing tensor model.norm.weight"),
        (lambda d: edit(d, lambda t: t.update(spare=torch.ones(2))), "unexpected tensor spare"),
        (lambda d: edit(d, lambda t: t.update({"model.norm.weight": torch.ones(7)})), "mismatched tensor model.norm"),
        (lambda d: configure(d, model_type="nosuch", auto_map={"AutoModelForCausalLM": "m.M"}), "never run"),
        (lambda d: configure(d, quantization_config={"quant_method": "bitsandbytes"}), "quantised weights"),
        (lambda d: configure(d, model_type=["llama"]), "cannot read this model"),
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_broken_directories_are_refused_by_name(directory, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message):
        model_directory.load(directory)


def test_code_that_comes_with_a_model_is_not_run(directory, tmp_path):
    (directory / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nclass C: pass\n")
    configure(directory, model_type="nosuch", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})
    with pytest.raises(UserError, match="never run"):
        causal_lm.load(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["owner/kernel@main", "flash_attention_2", {"": "owner/kernel"}])
def test_a_config_chooses_no_code(directory, monkeypatch, key, value):
    """transformers would download such a kernel and run it, even with `local_files_only`."""
    hub_kernels, requested = transformers.integrations.hub_kernels, []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(
        hub_kernels, "get_kernel_hub", lambda *name, **_: requested.append(name) or 1 / 0, raising=False
    )
    before = causal_lm.load(directory)
    configure(directory, **{key: value})
    loaded = causal_lm.load(directory)
    assert not requested and torch.equal(loaded(tokens(1, 7)), before(tokens(1, 7)))


def test_logits_that_are_more_than_a_product_are_refused(tmp_path):
    config = transformers.Gemma2Config(**KINDS["llama"][1], head_dim=8)  # caps its logits
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gemma2.*logits"):
        causal_lm.load(tmp_path)


def test_a_recurrent_state_is_refused():
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UserError, match="mamba is not supported"):
        causal_lm.CausalLM(transformers.MambaForCausalLM(config))


def test_samples_that_see_each_other_are_noticed(directory, monkeypatch):
    monkeypatch.setattr(causal_lm, "_positions", lambda segments_BT: None)
    with pytest.raises(UserError, match="packed samples of llama"):
        causal_lm.load(directory)


def test_without_transformers_the_fix_is_named(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'bessemer\[hf\]'"):
        causal_lm.load(directory)
