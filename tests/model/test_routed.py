"""Routing replay in mixtures of experts of other families: against a naive forward pass with forced experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_cases import SHAPE, relative
from ranks import on_ranks

from bessemer.addons.distributed.vllm_engine import routed_sizes, routing_of
from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.r1.routing_replay import routing_disagreement
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError

EXPERTS, K, LAYERS = 8, 2, 2
MOE = {**SHAPE, "moe_intermediate_size": 24, "num_experts_per_tok": K}
KINDS = {
    "qwen3": ("Qwen3Moe", {**MOE, "num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3, not normalised": ("Qwen3Moe", {**MOE, "num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": False}),
    "mixtral": ("Mixtral", {**SHAPE, "num_local_experts": EXPERTS, "num_experts_per_tok": K}),
}
B, T = 3, 10


def made(kind="qwen3", **changes):
    house, shape = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{house}Config")(**(shape | changes))
    return getattr(transformers, f"{house}ForCausalLM")(config).eval()


def ids(seed=1, rows=B, length=T):
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def forced(seed=2, rows=B, length=T):
    """Random experts, different ones for a token of a layer; the last tokens choose for themselves."""
    draws = torch.rand(rows, length, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    choice = draws.argsort(-1)[..., :K].short()
    choice[:, -2:] = -1
    return choice


def naive(inner, choice_BTLK, normalised):
    """The model with a loop over tokens and experts in place of its sparse layers, sent to `choice_BTLK`."""
    model = copy.deepcopy(inner)
    for number, layer in enumerate(model.model.layers):
        choice_NK, block = choice_BTLK[:, :, number].flatten(0, 1).long(), layer.mlp

        def forward(hidden_BTD, block=block, choice_NK=choice_NK):
            outputs = []
            for x_D, chosen in zip(hidden_BTD.flatten(0, 1), choice_NK, strict=True):
                p_E = F.softmax(block.gate.weight @ x_D, -1)
                experts = chosen.tolist() if chosen[0] >= 0 else p_E.topk(K).indices.tolist()
                total = sum(p_E[e] for e in experts) if normalised else 1.0
                y_D = 0
                for e in experts:
                    gate, up = (block.experts.gate_up_proj[e] @ x_D).chunk(2)
                    y_D = y_D + p_E[e] / total * (block.experts.down_proj[e] @ (F.silu(gate) * up))
                outputs.append(y_D)
            return torch.stack(outputs).view_as(hidden_BTD)

        block.forward = forward
    return model


def loss_and_gradients(hidden_BTD, parameters):
    loss = (hidden_BTD * torch.linspace(-1, 1, hidden_BTD.numel()).view_as(hidden_BTD)).sum()
    return loss, torch.autograd.grad(loss, [*parameters], allow_unused=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
def test_replayed_experts_give_the_states_and_gradients_of_a_naive_pass(kind, recomputed):
    inner, choice = made(kind), forced()
    reference = naive(inner, choice, "not" not in kind)
    model = CausalLM(inner)
    if recomputed:
        model.set_recompute(["attend"])
    model.train()
    names, parameters = zip(*inner.model.named_parameters(), strict=True)
    out = model.train_outputs(ids(), choice_BTLK=choice)
    loss, gradients = loss_and_gradients(out.hidden_BTD, parameters)
    expected, of_naive = loss_and_gradients(reference.model(ids()).last_hidden_state, reference.model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, actual, gradient in zip(names, gradients, of_naive, strict=True):
        assert relative(actual, gradient) < 1e-4, name
    own = model.train_outputs(ids()).hidden_BTD
    assert relative(own, out.hidden_BTD) > 0.01, "without replay its own experts again"
    assert any("gate.weight" in name for name in names), "the router is trained"


def test_its_own_choice_replayed_changes_no_bit():
    model = CausalLM(made())
    chosen = model.chosen_experts(ids())
    assert chosen.shape == (B, T, LAYERS, K) and model.routes and model.cfg.n_routed_experts == EXPERTS
    free, replayed = (model.train_outputs(ids(), choice_BTLK=c).hidden_BTD for c in (None, chosen))
    assert torch.equal(free, replayed)
    other = copy.deepcopy(model)
    other.train_outputs(ids(), choice_BTLK=forced())
    assert torch.equal(model.train_outputs(ids()).hidden_BTD, free), "a copy replays for itself"


def test_the_engine_records_what_every_fed_token_chose():
    words = Tokenizer.train(["1 + 1 = 2, and so on"] * 8, 270)
    model = CausalLM(made(vocab_size=words.vocab_size))
    prompts = [[0, 9, 8], [0, 40], [0, *range(5, 30)]]
    options = {"samples": 4, "max_new_tokens": 20, "seed": 3, "temperature": 1.0}
    groups = Engine(model, words).generate(prompts, record_routing=True, **options)
    plain = Engine(model, words).generate(prompts, **options)
    for prompt, group, without in zip(prompts, groups, plain, strict=True):
        for completion, same in zip(group, without, strict=True):
            assert completion.tokens == same.tokens and same.routing is None
            fed = torch.tensor([[*prompt, *completion.tokens][:-1]])
            chosen = model.chosen_experts(fed)[0].sort(-1).values
            assert torch.equal(completion.routing.sort(-1).values.long(), chosen)


def test_disagreement_counts_tokens_that_would_go_elsewhere():
    model, tokens = CausalLM(made()), ids()
    chosen = model.chosen_experts(tokens)
    chosen[:, -1] = -1

    def disagreement():
        return routing_disagreement(model.chosen_experts(tokens), chosen.flip(-1).short())

    assert disagreement() == 0.0
    chosen[0, 0, 1] = (chosen[0, 0, 1] + 1) % EXPERTS
    assert disagreement() == pytest.approx(1 / (B * (T - 1) * LAYERS))


def test_a_dense_model_has_nothing_to_record(tmp_path):
    words = Tokenizer.train(["1 + 1 = 2, and so on"] * 8, 270)
    model = CausalLM(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"vocab_size": 270})).eval())
    assert not model.routes
    with pytest.raises(UserError, match="routed experts"):
        Engine(model, words).generate([[0, 9]], record_routing=True)


def gradients_on_a_rank(rank, folder, choice):
    import torch.distributed as dist

    from bessemer.addons.distributed.fsdp import ShardedModel, local
    from bessemer.addons.families import causal_lm

    dtype = torch.float32
    model = causal_lm.load(folder, dtype)
    sharded = ShardedModel(model, torch.device("cpu"), dtype)
    model.set_recompute(["attend"])
    model.train()
    out = model.train_outputs(ids(), choice_BTLK=choice)
    (out.hidden_BTD * torch.linspace(-1, 1, out.hidden_BTD.numel()).view_as(out.hidden_BTD)).sum().backward()
    assert dist.get_world_size() == 2
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    sharded.reshard()
    return {name: gradient for name, gradient in found.items() if local(gradient) is not None}


def test_sharded_and_recomputed_layers_replay_too(tmp_path):
    """FSDP2 on two ranks, which sum their gradients: twice those of one process."""
    made().save_pretrained(tmp_path)
    model, choice = CausalLM(made()), forced()
    _, expected = loss_and_gradients(
        model.train_outputs(ids(), choice_BTLK=choice).hidden_BTD, dict(model.named_parameters()).values()
    )
    expected = dict(zip(dict(model.named_parameters()), expected, strict=True))
    for own in on_ranks(2, gradients_on_a_rank, tmp_path, choice):
        assert "inner.model.layers.1.mlp.gate.weight" in own
        for name, gradient in own.items():
            assert relative(gradient, 2 * expected[name]) < 1e-5, name


def test_vllm_s_experts_have_the_layers_of_its_config():
    from types import SimpleNamespace

    sizes = routed_sizes(made().config.to_dict())
    assert sizes == (LAYERS, 0, EXPERTS, K)
    chosen = forced(rows=1, length=7)[0].abs().numpy()
    output = SimpleNamespace(token_ids=[4, 5, 6], routed_experts=chosen)
    assert torch.equal(routing_of(output, sizes, 5).short(), torch.from_numpy(chosen))
    assert routed_sizes(made(decoder_sparse_step=2).config.to_dict()) is None
    assert routed_sizes(transformers.LlamaConfig(**SHAPE).to_dict()) is None
