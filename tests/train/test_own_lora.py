"""LoRA on our own network against low-rank updates made by hand in float64; what is exported, shared and refused."""

import pytest
import torch
from hf_cases import relative
from ranks import on_ranks
from rl_parts import reference_logprobs
from test_lora import grpo_batch, rows, trainer

from bessemer.addons.distributed import distributed
from bessemer.addons.families import own_lora
from bessemer.addons.plan import stage_memory
from bessemer.addons.plan.hardware import device
from bessemer.config.recipe import Recipe
from bessemer.config.table import validate
from bessemer.config.training import LoRAConfig, SFTConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.hf.deepseek import load
from bessemer.model.config import preset
from bessemer.model.transformer import Scorer, Transformer
from bessemer.rl.losses import GRPO
from bessemer.rl.reference import Reference
from bessemer.train import lineage, objective
from bessemer.train.runtime import Runtime

torch.set_num_threads(1)

LORA = LoRAConfig(rank=4, alpha=6)
SHAPE = dict(
    vocab_size=99, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_activated_experts=4, n_expert_groups=4,
    n_limited_groups=2, max_seq_len=640, init_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    Transformer(preset("tiny", **SHAPE)).initialise(3).save(folder)
    return folder


def adapted(base, drawn=True, dtype=torch.float32, **options):
    """A model with adapters; `drawn` makes B non-zero, as after training."""
    network = load(base, torch.float32)
    network = network.double() if dtype == torch.float64 else network.to_compute(dtype)
    model = own_lora.attach(network, LoRAConfig(**(LORA.model_dump() | options)), 5, base, "sft")
    if drawn:
        generator = torch.Generator().manual_seed(1)
        for module in model.adapted().values():
            module.b.data.copy_(torch.empty(module.b.shape).normal_(0.0, 0.05, generator=generator))
    return model


def by_hand(base, model):
    """A plain network in float64 whose weights are W + alpha / rank * B A."""
    plain = load(base, torch.float32).double()
    for name, module in model.adapted().items():
        weight = plain.get_submodule(name).weight
        weight.data += LORA.alpha / LORA.rank * module.b.detach().double() @ module.a.detach().double()
    return plain


def gradients(model, plain):
    """Of every adapter: (found, that of W' = W + s B A by the chain rule), dA = s B' dW' and dB = s dW' A'."""
    scale = LORA.alpha / LORA.rank
    for name, module in model.adapted().items():
        grad = plain.get_submodule(name).weight.grad
        yield module.a.grad, scale * module.b.detach().T.double() @ grad
        yield module.b.grad, scale * grad @ module.a.detach().T.double()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["float64", "kernels"]
)
def test_loss_and_gradients_are_those_of_a_low_rank_update_by_hand(base, dtype, bound):
    """Through SFT's loss, MTP and balance terms included; in float32 the kernels compute."""
    model = adapted(base, dtype=dtype)
    plain, batch, terms = by_hand(base, model), rows(0, 2), dict(mtp_lambda=0.1, balance_alpha=1e-2)
    losses = [objective.next_token(network, batch, **terms).total for network in (model, plain)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=bound)
    pairs = [*gradients(model, plain)]
    assert len(pairs) == 2 * 14, "five of attention and two of the MLP in each layer, a dense and a shared one"
    assert max(relative(found.double(), expected) for found, expected in pairs) < bound
    others = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert others == {name for name, _ in model.named_parameters() if name.endswith((".a", ".b"))}


def test_grpo_trains_adapters_as_the_update_by_hand(base):
    model, goal = adapted(base, dtype=torch.float64), GRPO(kl=0.1)
    plain, batch = by_hand(base, model), grpo_batch(model)
    for network in (model, plain):
        goal(network, batch).total.backward()
    assert max(relative(found, expected) for found, expected in gradients(model, plain)) < 1e-12


def test_trained_adapters_are_sampled_saved_and_merged(base, tmp_path):
    """Engines read the sum after every update, in the trainer's bits; the exported model differs from the base in what
    has adapters alone."""
    model = adapted(base, drawn=False)
    before = {name: tensor.clone() for name, tensor in load(base, torch.float32).state_dict().items()}
    run = trainer(model)
    whole, batch = Runtime().whole(run), rows(8, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())
    run.run()
    whole.refresh()
    now = whole.model.state_dict()
    changed = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in model.adapted()}
    assert torch.equal(reference_logprobs(whole.model, batch, 1.0), reference_logprobs(model, batch, 1.0))
    shared = {id(parameter) for parameter in model.frozen().values()}
    assert sum(id(own) not in shared for own in whole.model.parameters()) == len(changed)
    model.save(tmp_path / "model")
    assert all(torch.equal(tensor, now[name]) for name, tensor in load(tmp_path / "model").state_dict().items())
    for name, module in model.adapted().items():
        expected = before[f"{name}.weight"] + LORA.alpha / LORA.rank * module.b @ module.a
        torch.testing.assert_close(now[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)


def test_in_bf16_the_sampler_has_the_trainers_bits(base):
    model = adapted(base, drawn=False)
    run = trainer(model, compute_dtype=torch.bfloat16)
    whole, batch = Runtime().whole(run), rows(8, 2)
    run.run()
    whole.refresh()
    assert {module.weight.dtype for module in model.adapted().values()} == {torch.bfloat16}
    assert torch.equal(reference_logprobs(whole.model, batch, 1.0), reference_logprobs(model, batch, 1.0))
    assert all(group.master.dtype == torch.float32 for group in run.optimizer.groups)


def test_the_reference_is_the_base_and_shares_its_weights(base):
    model = adapted(base, drawn=False)
    run = trainer(model, goal=GRPO(kl=0.1))
    reference = Reference(run, Runtime(), base, 2, 1.0)
    expected = reference_logprobs(load(base, torch.float32), grpo_batch(model), 1.0)
    shared = {id(parameter) for parameter in model.frozen().values()}
    own = [parameter for parameter in reference.copy.model.parameters() if id(parameter) not in shared]
    assert len(own) == 2 * len(model.adapted())
    for step in range(1, 4):
        batch = grpo_batch(model)
        run.update([batch])
        reference.after_step()
        one = Batch(batch.tokens_BT, batch.loss_BT)
        reference.before_step([one])
        found = one.extras["ref_logp_BT"]
        if step == 1:
            assert relative(found, expected) < 1e-6
        if step == 2:
            assert relative(found, expected) > 1e-5, "it follows every two steps"


def test_a_reward_model_trains_its_head_too(base, tmp_path):
    network = Scorer.of(load(base, torch.float32), 1)
    model = own_lora.attach(network, LORA, 5, base, "helpful")
    first = network.score.weight.detach().clone()
    run, batch = trainer(model), rows(0, 2)
    out = model.train_outputs(batch.tokens_BT)
    (out.hidden_BTD @ model.head_weight[0]).sum().backward()
    run.optimizer.step(1e-2, 1.0, 1.0, 1e9)
    plain = model.sampled()
    assert isinstance(plain, Scorer) and not torch.equal(plain.score.weight, first)
    assert torch.equal(plain(batch.tokens_BT), network(batch.tokens_BT))
    model.save(tmp_path / "model")
    again = load(tmp_path / "model", torch.float32, kind=Scorer)
    assert torch.equal(again(batch.tokens_BT), plain(batch.tokens_BT))


def test_targets_by_their_published_names(base):
    some = adapted(base, targets=["q_a_proj", "o_proj"])
    assert {name.split(".")[-1] for name in some.adapted()} == {"wq_a", "wo"} and len(some.adapted()) == 4
    both = adapted(base, targets=["gate_proj", "up_proj"])
    assert {*both.adapted()} == {"layers.0.ffn.w13", "layers.1.ffn.shared.w13"}
    with pytest.raises(UserError, match='names "gate_proj", which is one matrix with "up_proj" here; name both'):
        adapted(base, targets=["gate_proj"])
    with pytest.raises(UserError, match=r'names "q_proj".*did you mean'):
        adapted(base, targets=["q_proj"])
    line = own_lora.describe(adapted(base))
    assert line.startswith("LoRA of rank 4, alpha 6, on 14 matrices: ")
    assert line.endswith("; frozen: routed experts, MTP modules")


RECIPE = (
    'name = "r"\n[[stage]]\nkind = "corpus"\nparts = { a = "task:sums" }\n[[stage]]\nkind = "pretrain"\nlr = 1e-3\n'
)
RL = """
[[stage]]
kind = "rl"
from = "pretrain"
tasks = ["countdown"]
rollouts = 1
lr = 1e-3
precision = "bfloat16"
lora = { rank = 16 }
"""


def test_a_stage_that_cannot_have_adapters_is_refused_before_anything_runs():
    table = {"kind": "sft", "name": "sft", "from": "pretrain", "lr": 1e-3, "lr_final": 1e-4, "lora": {}}
    sft = validate(SFTConfig, table, "r.toml")
    lineage.check_lora(sft, Recipe.parse(RECIPE))
    with pytest.raises(UserError, match=r'stage "sft": lora .* in one process; leave \[layout\] out'):
        lineage.check_lora(sft, Recipe.parse(RECIPE + "[layout]\ndp = 2\n"))
    started = Recipe.parse(RECIPE + RL)  # by torchrun, so the recipe does not say how many
    distributed.check(started, "rl", [], n=1)
    with pytest.raises(UserError, match=r'stage "rl": lora .* in one process; run it with --processes 1'):
        distributed.check(started, "rl", [], n=2)
    recipe = Recipe.parse(RECIPE + RL + 'rollout = { engine = "vllm" }\n')
    with pytest.raises(UserError, match=r'set rollout\.engine = "local"'):
        lineage.check_lora(recipe.stage("rl"), recipe)


def refusal(rank, base):
    with pytest.raises(UserError) as refused:
        adapted(base)
    return str(refused.value)


def test_many_ranks_are_refused_in_one_line(base):
    for line in on_ranks(2, refusal, base):
        assert line.startswith('stage "sft": ') and line.endswith("run it with --processes 1") and "\n" not in line


def test_the_planner_counts_what_adapters_need():
    """Weights, gradients, masters and moments of a trainer, and the copies that engines and backward read."""
    recipe = Recipe.parse(RECIPE + RL)
    cfg = preset("tiny")
    network = Transformer(cfg).initialise(1).to_compute(torch.bfloat16)
    model = own_lora.attach(network, recipe.stage("rl").lora, 5, None, "rl")
    run = trainer(model, compute_dtype=torch.bfloat16)
    groups, adapted = run.optimizer.groups, sum(module.base.numel() for module in model.adapted().values())
    held = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()) + 2 * adapted,
        "gradients": sum(group.grad.nbytes for group in groups),
        "masters": sum(group.master.nbytes for group in groups),
        "moments": sum(moment.nbytes for group in groups for moment in group.moments.values()),
    }
    planned = stage_memory.of_stages(recipe, 1, device("H100"))["rl"].bytes
    assert {kind: planned[kind] for kind in held} == pytest.approx(held, rel=0.05)
    full = stage_memory.of_stages(Recipe.parse(RECIPE + RL.replace("lora", "#")), 1, device("H100"))["rl"].bytes
    assert planned["activations"] == full["activations"] + 2 * adapted
