"""LoRA against peft's own model in a plain torch loop; what is stored, shared, merged and refused."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_cases import KINDS, made, relative, tokens
from rl_parts import reference_logprobs
from safetensors.torch import load_file, save_file
from train_config import train_config

from bessemer.addons.families import lora
from bessemer.addons.families.causal_lm import load
from bessemer.config.recipe import Recipe
from bessemer.config.table import validate
from bessemer.config.training import LoRAConfig, SFTConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.rl.losses import GRPO
from bessemer.rl.reference import Reference
from bessemer.train import lineage, objective
from bessemer.train.runtime import Runtime
from bessemer.train.trainer import Trainer
from bessemer.workers import side_by_side

torch.set_num_threads(1)

LORA = LoRAConfig(rank=4, alpha=6)
STEPS = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of tiny models by kind."""
    folders = {kind: tmp_path_factory.mktemp("bases") / kind for kind in ("llama-tied", "qwen2", "gpt2")}
    for kind, folder in folders.items():
        made(kind).save_pretrained(folder)
    return folders


def adapted(folder, drawn=True, **options):
    """A model with adapters; `drawn` makes B non-zero, as after training."""
    model = lora.attach(load(folder), LoRAConfig(**(LORA.model_dump() | options)), 5, folder, "sft")
    if drawn:
        generator = torch.Generator().manual_seed(1)
        for name, tensor in model.adapters().items():
            if "lora_B" in name:
                tensor.normal_(0.0, 0.05, generator=generator)
    return model


def rows(first, count):
    ids = torch.stack([tokens(24, seed=n) for n in range(first, first + count)])
    loss = torch.ones(count, 24)
    loss[:, :3] = 0.0
    return Batch(ids, loss)


def trainer(model, folder=None, goal=objective.next_token, **options):
    settings = dict(tokens=STEPS * 2 * 24, lr=1e-2, batch_rows=2, micro_rows=1, weight_decay=0.0, clip=0.5)
    terms = {"mtp_lambda": 0.0, "balance_alpha": 0.0} if goal is objective.next_token else {}
    stop = options.pop("stop", lambda: False)
    return Trainer(model, goal, rows, *train_config(**(settings | {"terms": terms} | options)), folder, stop=stop)


def pefts_own(folder, weights, kind):
    """peft's model with the same base and adapters."""
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(made(kind), config)
    peft.set_peft_model_state_dict(reference, {name: tensor.clone() for name, tensor in weights.items()})
    return reference.eval()


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2"])
def test_training_matches_that_of_peft_in_a_plain_loop(bases, kind):
    """Compared: the first step's gradients, and the adapters after three AdamW steps with clipped gradients."""
    model = adapted(bases[kind])
    reference = pefts_own(bases[kind], model.adapters(), kind)
    named = {name.replace(".default", ""): p for name, p in reference.named_parameters() if p.requires_grad}
    assert named.keys() == model.adapters().keys(), "all-linear means the same matrices"
    ours, plain = trainer(model), torch.optim.AdamW(named.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    gradients = {}
    for step in range(STEPS):
        batch = rows(2 * step, 2)
        logits = reference(input_ids=batch.tokens_BT).logits[:, :-1]
        loss_BT = F.cross_entropy(logits.transpose(1, 2), batch.tokens_BT[:, 1:], reduction="none")
        ((loss_BT * batch.loss_BT[:, 1:]).sum() / batch.loss_BT[:, 1:].sum()).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in named.items()}
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        plain.step()
        plain.zero_grad()
    loss = objective.next_token(model, rows(0, 2), mtp_lambda=0.0, balance_alpha=0.0)
    (loss.total / loss.tokens).backward()
    for group in ours.optimizer.groups:
        for slot in group.slots:
            name = lora.PREFIX + slot.name.removeprefix("inner.").replace(".default", "")
            assert relative(slot.of(group.grad), gradients[name]) < 1e-5, name
    ours.optimizer.zero_grad()
    ours.run()
    for name, tensor in model.adapters().items():
        assert relative(tensor, named[name]) < 1e-4, name


def grpo_batch(model, change=0.1):
    batch = Batch(tokens(4, 12), torch.cat((torch.zeros(4, 4), torch.ones(4, 8)), 1))
    old = reference_logprobs(model, batch, 1.0)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, 12).contiguous()
    batch.extras |= {"old_logp_BT": old, "advantage_BT": advantage, "ref_logp_BT": old - change}
    return batch


def test_grpo_with_lora_is_grpo_on_merged_weights_with_projected_gradients(bases):
    """W + s B A has dL/dA = s B' dL/dW and dL/dB = s dL/dW A'."""
    model, goal = adapted(bases["qwen2"]), GRPO(kl=0.1)
    merged = copy.deepcopy(model.merged()).requires_grad_(True)
    batch = grpo_batch(model)
    assert relative(reference_logprobs(merged, batch, 1.0), reference_logprobs(model, batch, 1.0)) < 1e-5
    losses = [goal(network, batch).total for network in (model, merged)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), abs=1e-5)  # its terms are about 1
    full, scale, compared = dict(merged.inner.named_parameters()), LORA.alpha / LORA.rank, 0
    for name, layer in model.inner.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            grad = full[f"{name}.weight"].grad
            assert relative(A.grad, scale * B.T @ grad) < 1e-4 > relative(B.grad, scale * grad @ A.T), name
            compared += 1
    assert compared == 14


def test_the_reference_is_the_base_and_shares_its_weights(bases):
    """This holds after policy steps too, until the reference takes a copy of the adapters at its interval."""
    base, model = load(bases["llama-tied"]), adapted(bases["llama-tied"], drawn=False)
    run = trainer(model, goal=GRPO(kl=0.1))
    reference = Reference(run, Runtime(), bases["llama-tied"], 2, 1.0)
    batch = grpo_batch(base)
    reference_batch = copy.deepcopy(batch)
    for _ in range(2):
        run.update([batch])
        reference.before_step([reference_batch])
        assert torch.equal(reference_batch.extras["ref_logp_BT"], reference_logprobs(base, batch, 1.0))
        assert not torch.equal(reference_batch.extras["ref_logp_BT"], reference_logprobs(model, batch, 1.0))
    reference.after_step()
    reference.before_step([reference_batch])
    assert torch.equal(reference_batch.extras["ref_logp_BT"], reference_logprobs(model, batch, 1.0))
    assert all(".lora_" in name for name in run.extra_tensors) and run.extra_tensors
    ours, frozen = (dict(network.named_parameters()) for network in (model, reference.copy.model))
    assert all((ours[name] is frozen[name]) == (".lora_" not in name) for name in ours)


def test_stopped_and_resumed_it_is_the_same_run_and_checkpoints_hold_adapters_alone(bases, tmp_path):
    whole = adapted(bases["llama-tied"])
    trainer(whole).run()
    first = trainer(adapted(bases["llama-tied"]), tmp_path, stop=lambda: first.step == 1)
    assert first.run() is False
    resumed = adapted(bases["llama-tied"])
    trainer(resumed, tmp_path).run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for file in ("model", "optimizer"):
        stored = load_file(sorted(tmp_path.glob("step-*"))[-1] / f"{file}.safetensors")
        assert stored and all(".lora_" in name or name == "steps" for name in stored)


def test_helpers_change_nothing_and_bfloat16_keeps_float32_masters_of_adapters(bases, tmp_path):
    alone, helped, rounded = (adapted(bases["llama-tied"]) for _ in range(3))
    trainer(alone).run()
    workers = side_by_side(2)
    try:
        trainer(helped, workers=workers).run()
    finally:
        workers.stop()
    assert all(torch.equal(helped.adapters()[name], tensor) for name, tensor in alone.adapters().items())
    run = trainer(rounded, compute_dtype=torch.bfloat16)
    run.run()
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for name, master in run.optimizer.masters().items():
        exact = alone.state_dict()[name]
        assert master.dtype == torch.float32 and relative(master, exact) < 0.1, name
    rounded.save(tmp_path / "model")
    assert load(tmp_path / "model").embed.weight.dtype == torch.bfloat16


def test_adapted_and_merged_models_agree(bases):
    """They agree up to rounding, in float32 and in BF16, where the merged weights are rounded once more."""
    model = adapted(bases["qwen2"])
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        adapted_model, other = (copy.deepcopy(network).to_compute(dtype) for network in (model, model.merged()))
        assert relative(adapted_model(tokens(2, 12)).float(), other(tokens(2, 12)).float()) < bound


def test_a_saved_adapter_loads_in_peft_and_merges_into_its_base(bases, call, tmp_path):
    model = adapted(bases["qwen2"], targets=["q_proj", "down_proj"])
    model.save(tmp_path / "model")
    reference = peft.PeftModel.from_pretrained(made("qwen2"), tmp_path / "adapter").eval()
    assert torch.equal(reference(input_ids=tokens(2, 9)).logits, model.inner(input_ids=tokens(2, 9)).logits)
    plain = load(tmp_path / "model")
    again = reference.merge_and_unload().state_dict()
    for name, tensor in plain.inner.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-6, atol=1e-7)
    for more in ([], ["--like", str(bases["qwen2"])]):
        target = tmp_path / f"merged{len(more)}"
        assert call("convert", tmp_path / "adapter", target, *more)[0] == 0
        assert (target / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    values = json.loads((tmp_path / "adapter" / lora.ADAPTER_CONFIG).read_text())
    values |= {"target_modules": ".*(q|down)_proj", "lora_alpha": 6.0}  # as peft stores a pattern
    (tmp_path / "adapter" / lora.ADAPTER_CONFIG).write_text(json.dumps(values))
    lora.merge(tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    part = [r".*layers\.0\..*(q|down)_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]]
    for number, targets in enumerate(part):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        reference = peft.get_peft_model(made("qwen2"), config)
        reference.save_pretrained(tmp_path / f"part{number}")
        lora.merge(tmp_path / f"part{number}", tmp_path / f"whole{number}", bases["qwen2"])
        again = reference.merge_and_unload().state_dict()
        for name, tensor in load(tmp_path / f"whole{number}").inner.state_dict().items():
            torch.testing.assert_close(tensor, again[name], rtol=1e-6, atol=1e-7)
    model.save(tmp_path / "model")
    before = content(tmp_path / "adapter")
    model.save(tmp_path / "model")  # a stage killed after saving saves again
    assert content(tmp_path / "adapter") == before and set(before) == {lora.ADAPTER_CONFIG, lora.WEIGHTS, lora.BASE}


def test_what_all_linear_leaves_frozen_is_named(bases, tmp_path):
    made("mixtral").save_pretrained(tmp_path / "mixtral")
    description = lora.describe(adapted(tmp_path / "mixtral"))
    assert description.startswith("LoRA of rank 4, alpha 6, on 8 matrices: 1,792 of ")
    assert description.endswith("; frozen, since stacked: experts.down_proj, experts.gate_up_proj")
    for plain in (adapted(bases["qwen2"]), adapted(tmp_path / "mixtral", targets=["q_proj"])):
        assert lora.describe(plain).endswith("%)")


DENSE_FIRST = {"Qwen3Moe": {"mlp_only_layers": [0]}, "Glm4Moe": {"n_routed_experts": 8, "n_shared_experts": 1}}


@pytest.mark.parametrize("house", DENSE_FIRST)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj"], ["down_proj"]])
def test_dense_layers_and_shared_experts_get_the_adapters_and_not_the_stacked_experts(tmp_path, house, targets):
    """peft by itself moves gate_proj, up_proj and down_proj to the stacked experts of these models, or refuses."""
    shape = {key: value for key, value in KINDS["qwen3-moe"][1].items() if key != "num_experts" or house == "Qwen3Moe"}
    config = getattr(transformers, f"{house}Config")(**shape, **DENSE_FIRST[house])
    torch.manual_seed(0)
    getattr(transformers, f"{house}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", targets=targets)
    linear = {
        name for name, module in load(tmp_path / "base").inner.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }  # fmt: skip
    named = linear if targets == "all-linear" else {name for name in linear if name.split(".")[-1] in targets}
    assert {name.removeprefix(lora.PREFIX).split(".lora_")[0] for name in model.adapters()} == named
    assert any("mlp" in name for name in named)
    trainer(model).run()
    model.save(tmp_path / "model")
    assert relative(load(tmp_path / "model")(tokens(2, 12)), model(tokens(2, 12))) < 1e-5
    assert "merged model alone" in lora.describe(model)
    assert not (tmp_path / "adapter").exists(), "peft would read it as adapters of the experts"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_cannot_be_served_is_refused(bases, tmp_path, monkeypatch):
    folder = bases["qwen2"]
    with pytest.raises(UserError, match=r'lora.targets names "q_prj".*did you mean "q_proj"'):
        adapted(folder, targets=["q_prj"])
    with pytest.raises(UserError, match='names "lm_head"'):
        adapted(folder, targets=["lm_head"])
    for wrong, words in (
        ({"rank": 0}, "lora.rank.* greater than or equal to 1"),
        ({"targets": []}, 'or write "all-linear"'),
        ({"rank": 2, "alfa": 3}, 'unknown key "lora.alfa"; did you mean "alpha"'),
    ):
        with pytest.raises(UserError, match=words):
            table(lora=wrong)
    for settings, words in (
        ({"fp8": "paper"}, 'lora does not go with fp8 = "paper"; set fp8 = "off"'),
        ({"optimizer": "muon"}, 'lora does not go with optimizer = "muon"; set optimizer = "adamw"'),
    ):
        with pytest.raises(UserError, match=words):
            lineage.check_lora(table(lora={}, **settings), RECIPE)
    lineage.check_lora(table(lora={}), RECIPE)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bessemer\[lora\]'"):
        lineage.check_lora(table(lora={}), RECIPE)
    lineage.check_lora(table(), RECIPE)


RECIPE = Recipe.parse(
    'name = "r"\n[[stage]]\nkind = "import"\nmodel = "hf://a/b"\n'
    '[[stage]]\nkind = "corpus"\nparts = { a = "task:sums" }\n[[stage]]\nkind = "pretrain"\nlr = 1e-3\n'
)


def table(**values):
    keys = {"kind": "sft", "name": "sft", "from": "import", "lr": 1e-3, "lr_final": 1e-4}
    return validate(SFTConfig, keys | values, "r.toml")


def test_an_adapter_of_another_base_or_kind_is_refused(bases, tmp_path):
    model = adapted(bases["qwen2"])
    model.save_adapter(tmp_path / "adapter")
    made("qwen2", seed=1).save_pretrained(tmp_path / "other")
    made("qwen2", hidden_size=16).save_pretrained(tmp_path / "narrow")

    def refused(words, base=bases["qwen2"], **changes):
        path = tmp_path / "adapter" / lora.ADAPTER_CONFIG
        path.write_text(json.dumps(values | changes))
        with pytest.raises(UserError, match=words):
            lora.merge(tmp_path / "adapter", tmp_path / "merged", base)
        assert not (tmp_path / "merged").exists()

    values = json.loads((tmp_path / "adapter" / lora.ADAPTER_CONFIG).read_text())
    refused("was not trained on .*other: the SHA-256", tmp_path / "other")
    refused("sets use_dora; only peft can merge it", use_dora=True)
    refused("sets megatron_config", megatron_config={"a": 1}, megatron_core="os")
    refused(r"began by changing its base \(pissa\)", init_lora_weights="pissa")
    refused("of type IA3", peft_type="IA3")
    refused("must be whole numbers", r="8")
    refused("must be whole numbers", lora_alpha=6.5)
    refused("must be whole numbers", lora_alpha=True)
    refused("must be whole numbers", r=True)
    refused("no model at owner/name, the base of .*--like", None, base_model_name_or_path="owner/name")
    for rank in (8, 10**9):  # the second would be more memory than there is
        refused(rf"declares rank {rank}, but the stored matrices have 4", r=rank)
    (tmp_path / "adapter" / lora.BASE).unlink()  # as peft itself would write it
    refused(r"is \[32, 4\], but should be \[16, 4\]", tmp_path / "narrow")
    refused(r"has no matrix model\.layers\.0\.mlp\.down_proj", bases["gpt2"])
    stored = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    for target, key in (
        ("lm_head", "lm_head.lora_A.weight"),
        ("model.embed_tokens", "model.embed_tokens.lora_embedding_A"),
    ):
        save_file({f"{lora.PREFIX}{key}": torch.zeros(4, 32)}, tmp_path / "adapter" / lora.WEIGHTS)
        refused(rf"changes {target}, which is not in the layers of .*qwen2; only peft can merge it")
    name = next(iter(stored))
    save_file(stored | {name: stored[name] * float("nan")}, tmp_path / "adapter" / lora.WEIGHTS)
    refused(f"adapter: {name} has values that are not finite")
    (tmp_path / "adapter" / lora.WEIGHTS).rename(tmp_path / "adapter" / "adapter_model.bin")
    refused("adapter has no adapter_model.safetensors; save it again with peft as safetensors")
