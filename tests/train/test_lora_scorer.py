"""Reward models with LoRA on other families: peft's own in a plain torch loop, and what transformers and peft read."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_cases import made, relative, tokens
from safetensors.torch import load_file
from train_config import train_config

from bessemer.addons.families import lora
from bessemer.addons.families.causal_lm import CausalLM, CausalScorer, load
from bessemer.addons.r1 import preference_rows
from bessemer.addons.r1.objectives import pairwise
from bessemer.addons.r1.preference import score_by
from bessemer.config.training import LoRAConfig
from bessemer.errors import UserError
from bessemer.hf.model_directory import load_scorer
from bessemer.train.collective import outputs_of
from bessemer.train.trainer import Trainer

torch.set_num_threads(1)

LORA = LoRAConfig(rank=4, alpha=6)
PAD, STEPS = 2, 3
PAIRS = [tuple(tokens(4 + (n * 3 + side) % 6, seed=2 * n + side).tolist() for side in (0, 1)) for n in range(6)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of tiny language models by kind."""
    folders = {kind: tmp_path_factory.mktemp("bases") / kind for kind in ("llama-tied", "qwen2", "gpt2")}
    for kind, folder in folders.items():
        made(kind).save_pretrained(folder)
    return folders


def adapted(folder, **options):
    """A reward model with adapters as after training, with B non-zero."""
    model = lora.attach(
        CausalScorer.of(load(folder), 3), LoRAConfig(**(LORA.model_dump() | options)), 5, folder, "helpful"
    )
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.adapters().items():
        if "lora_B" in name:
            tensor.normal_(0.0, 0.05, generator=generator)
    return model


def theirs_of(folder, pad=PAD):
    options = {"num_labels": 1, "pad_token_id": pad}
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    units = [[(good, preference_rows.GOOD), (bad, preference_rows.BAD)] for good, bad in PAIRS]
    preference_rows.build(units, 24, PAD, folder)
    return preference_rows.load(folder, preference_rows.PairRows, seed=0)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2"])
def test_training_matches_that_of_peft_in_a_plain_loop(bases, rows, kind):
    """peft gets one padded text per row, our model packed rows. No text begins with a BOS."""
    model = adapted(bases[kind])
    reference = theirs_of(bases[kind])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="SEQ_CLS")
    reference = peft.get_peft_model(reference, config)
    peft.set_peft_model_state_dict(reference, {name: tensor.clone() for name, tensor in model.adapters().items()})
    named = {
        name.replace("modules_to_save.", "").replace(".default", ""): parameter
        for name, parameter in reference.eval().named_parameters()
        if parameter.requires_grad
    }
    assert named.keys() == model.adapters().keys(), "all-linear means the same matrices, and the head is trained"
    texts = [text for pair in PAIRS for text in pair]
    ids = torch.full((len(texts), max(map(len, texts))), PAD)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    plain = torch.optim.AdamW(named.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    gradients = {}
    for _ in range(STEPS):
        score_P2 = reference(input_ids=ids, attention_mask=(ids != PAD).long()).logits.view(-1, 2)
        (-F.logsigmoid(score_P2[:, 0] - score_P2[:, 1])).mean().backward()
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in named.items()}
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        plain.step()
        plain.zero_grad()
    settings = dict(tokens=STEPS * rows.n_rows * 24, lr=1e-2, batch_rows=rows.n_rows, micro_rows=1, weight_decay=0.0)
    ours = Trainer(model, pairwise, rows.batch, *train_config(**settings, clip=0.5, terms={"balance_alpha": 0.0}))
    loss = pairwise(model, rows.batch(0, rows.n_rows), balance_alpha=0.0)
    (loss.total / loss.tokens).backward()
    for group in ours.optimizer.groups:
        for slot in group.slots:
            name = lora.PREFIX + slot.name.removeprefix("inner.").replace(".default", "")
            assert relative(slot.of(group.grad), gradients[name]) < 1e-5, name
    ours.optimizer.zero_grad()
    ours.run()
    for name, tensor in model.adapters().items():
        assert relative(tensor, named[name]) < 1e-4, name


def test_transformers_and_peft_read_what_is_saved_and_it_merges(bases, call, tmp_path):
    base, texts = bases["llama-tied"], [text for pair in PAIRS for text in pair]
    model = adapted(base, targets=["q_proj", "down_proj"])
    model.save(tmp_path / "model")
    expected = score_by(outputs_of(model), texts, PAD)
    read = load_scorer(tmp_path / "model")
    assert type(read) is CausalScorer and score_by(outputs_of(read), texts, PAD) == pytest.approx(expected, abs=1e-5)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    over = peft.PeftModel.from_pretrained(theirs_of(base), tmp_path / "adapter").eval()
    for reference in (merged, over):
        scores = [reference(input_ids=torch.tensor([text])).logits.item() for text in texts]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert json.loads((tmp_path / "adapter" / lora.ADAPTER_CONFIG).read_text())["task_type"] == "SEQ_CLS"
    assert call("convert", tmp_path / "adapter", tmp_path / "again")[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    over.save_pretrained(tmp_path / "theirs")  # as peft itself writes it
    assert load_file(tmp_path / "theirs" / lora.WEIGHTS).keys() == load_file(tmp_path / "adapter" / lora.WEIGHTS).keys()
    lora.merge(tmp_path / "theirs", tmp_path / "merged", base)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights[0]
    further = lora.attach(read, LORA, 5, tmp_path / "model", "helpful-2")  # `previous`: its head is trained on
    further.save(tmp_path / "next" / "model")
    read = load_scorer(tmp_path / "next" / "model")
    assert score_by(outputs_of(read), texts, PAD) == pytest.approx(expected, abs=1e-5)
    assert call("convert", tmp_path / "next" / "adapter", tmp_path / "next" / "again")[0] == 0
    with pytest.raises(UserError, match="holds a reward model"):
        load(tmp_path / "model")
    with pytest.raises(UserError, match="holds a language model"):
        load_scorer(base)


def test_a_model_that_cannot_score_is_refused(bases):
    with pytest.raises(UserError, match=r'lora\.targets names "score", but no matrix in the layers'):
        adapted(bases["qwen2"], targets=["score"])
    sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.BitNetConfig(**sizes, num_key_value_heads=1)
    with pytest.raises(UserError, match="no bitnet model"):
        CausalScorer.of(CausalLM(transformers.BitNetForCausalLM(config)), 0)
