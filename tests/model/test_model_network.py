"""The whole network: phases, causality, segment isolation, initial weights, dtypes, and what it may import."""

import subprocess
import sys

import pytest
import torch
from model_cases import V2, random_model, relative, tiny, tokens

from bessemer.errors import UserError
from bessemer.model.config import PRESETS, ModelConfig, preset
from bessemer.model.transformer import Transformer

SEGMENTS = torch.tensor([[0] * 7 + [1] * 8 + [2] * 5, [0] * 20])


@pytest.mark.parametrize("changes", [{}, V2, dict(n_shared_experts=0)], ids=["v3", "v2", "no-shared"])
def test_five_phases_are_the_forward_pass(changes):
    cfg = tiny(**changes)
    model = random_model(cfg)
    table = model.rope_table(20)
    x = model.embed(tokens(cfg))
    for layer in model.layers:
        attended = layer.attend(x, table)
        sent = layer.dispatch(attended)
        out = layer.experts(sent)
        y = layer.finish(attended, layer.combine(out, sent))
        assert torch.equal(y, layer(x, table)[0])
        assert (attended.routing is None) == layer.dense
        x = y
    assert torch.equal(model.head(model.norm(x)), model(tokens(cfg)))
    assert torch.equal(x, model.hidden(tokens(cfg)))


def test_phases_in_float64_equal_the_written_block():
    """h = x + attn(norm x); y = h + shared(norm h) + sum of weighted experts, expert by expert."""
    cfg = tiny()
    layer = random_model(cfg).layers[2]
    table = random_model(cfg).rope_table(6)
    x = torch.randn(1, 6, cfg.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = x + layer.attn(layer.attn_norm(x), table)
        u = layer.ffn_norm(h)[0]
        routing = layer.ffn.gate(u, 1)
        out = layer.ffn.shared(u)
        for n in range(6):
            for e, weight in zip(routing.expert_NK[n], routing.weight_NK[n], strict=True):
                gate, up = (layer.ffn.experts.w13[e] @ u[n]).chunk(2)
                out[n] += weight * (layer.ffn.experts.w2[e] @ (torch.nn.functional.silu(gate) * up))
        assert relative(layer(x, table)[0][0], h[0] + out) < 1e-6


def test_causality():
    """A later token changes nothing before it, and something after it, in the main model and at every MTP depth."""
    cfg = tiny(n_mtp=2)
    model, ids = random_model(cfg), tokens(cfg)
    changed = ids.clone()
    changed[:, 11] = (changed[:, 11] + 1) % cfg.vocab_size
    with torch.no_grad():
        a, b = model.train_outputs(ids), model.train_outputs(changed)
        # routed rows are multiplied in groups whose size may change, so equality is up to rounding, not bitwise
        assert relative(b.hidden_BTD[:, :11], a.hidden_BTD[:, :11]) < 1e-6
        assert relative(b.hidden_BTD[:, 11:], a.hidden_BTD[:, 11:]) > 1e-3
        for k, (x, y) in enumerate(zip(a.mtp_hidden, b.mtp_hidden, strict=True), start=1):
            assert x.shape[1] == 20 - k
            assert relative(y[:, : 11 - k], x[:, : 11 - k]) < 1e-6  # position t holds tokens up to t + k
            assert relative(y[:, 11 - k], x[:, 11 - k]) > 1e-3


def test_segments_are_isolated():
    cfg = tiny()
    model, ids = random_model(cfg), tokens(cfg)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % cfg.vocab_size
    with torch.no_grad():
        a, b = model(ids, SEGMENTS), model(changed, SEGMENTS)
        assert relative(b[0, 7:], a[0, 7:]) < 1e-6 and relative(b[1], a[1]) < 1e-6
        assert relative(b[0, 3:7], a[0, 3:7]) > 1e-3
        assert relative(model(changed)[0, 7:], model(ids)[0, 7:]) > 1e-3  # without segments they do see it


def test_a_segment_is_what_it_would_be_alone():
    """Scores depend only on distance, so packing moves a document without changing it."""
    cfg = tiny()
    model, ids = random_model(cfg), tokens(cfg)
    with torch.no_grad():
        packed = model.train_outputs(ids, SEGMENTS)
        for start, end in ((0, 7), (7, 15), (15, 20)):
            alone = model.train_outputs(ids[:1, start:end])
            assert relative(packed.hidden_BTD[:1, start:end], alone.hidden_BTD) < 1e-5
            # the last MTP position of a segment looks at the next one's first token; it carries no loss
            actual = packed.mtp_hidden[0][:1, start : end - 1]
            assert relative(actual, alone.mtp_hidden[0]) < 1e-5


def test_train_outputs_without_mtp_and_head():
    cfg = tiny()
    model, ids = random_model(cfg), tokens(cfg)
    with torch.no_grad():
        outputs = model.train_outputs(ids, mtp=False)
        assert outputs.mtp_hidden == [] and torch.equal(model.head(outputs.hidden_BTD), model(ids))


def test_balance_sums_all_moe_layers_mtp_included():
    cfg = tiny(n_mtp=2)
    model, ids = random_model(cfg).train(), tokens(cfg)
    total = model.train_outputs(ids).balance
    losses = []
    handles = [gate.register_forward_hook(lambda *a: losses.append(a[2].balance)) for gate in model.gates().values()]
    model.train_outputs(ids)
    for handle in handles:
        handle.remove()
    assert len(losses) == 4 == len(model.gates())
    torch.testing.assert_close(total, torch.stack(losses).sum())
    assert all(gate.load_E.sum() > 0 for gate in model.gates().values())


def test_every_parameter_gets_a_gradient():
    """Embedding and head through MTP included; nothing in the network is dead."""
    cfg = tiny(n_mtp=2)
    model = random_model(cfg).train()
    outputs = model.train_outputs(tokens(cfg, rows=4))
    loss = sum(model.head(h).pow(2).sum() for h in (outputs.hidden_BTD, *outputs.mtp_hidden))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights():
    """Deterministic: N(0, init_std) for every matrix, ones for gains, zero biases; another seed gives other weights."""
    cfg = preset("tiny")
    model = Transformer(cfg).initialise(3)
    torch.manual_seed(99)
    again, other = Transformer(cfg).initialise(3), Transformer(cfg).initialise(4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(model.embed.weight, other.embed.weight)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias_E"):
            assert not tensor.any()
        elif tensor.dim() == 1:
            assert (tensor == 1).all()
        else:
            # standard error of a std is std / sqrt(2 n); the bound is five of them
            slack = 5 / (2 * tensor.numel()) ** 0.5
            assert tensor.std().item() == pytest.approx(cfg.init_std, rel=slack), name
            assert abs(tensor.mean().item()) < 5 * cfg.init_std / tensor.numel() ** 0.5, name


def test_tied_tables_are_one_parameter():
    cfg = tiny(tie_embeddings=True)
    model = Transformer(cfg).initialise(0)
    assert model.head.weight is model.embed.weight
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in Transformer(tiny()).parameters()) - 1


def test_compute_dtype_leaves_gates_and_gains_in_float32():
    model = random_model(tiny()).to_compute(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        wide = name.endswith(("norm.weight", "gate.weight", "bias_E"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    exact, ids = random_model(tiny()), tokens(tiny())
    with torch.no_grad():
        actual, expected = model(ids), exact(ids)
    assert actual.dtype == torch.bfloat16
    # most tokens: a few flip to another expert if two scores are closer than BF16 resolves
    error = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 3e-2


def test_rope_table_grows():
    model = random_model(tiny())
    short = model.rope_table(5).clone()
    assert model.rope_table(5000).shape[0] == 5000
    assert torch.equal(model.rope_table(5), short)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_routed_experts=13), "n_routed_experts 13 is not a multiple of n_expert_groups 4"),
        (dict(n_limited_groups=5), "n_limited_groups 5 is not between 1 and n_expert_groups 4"),
        (
            dict(n_activated_experts=7),
            "not between 1 and the 6 experts of 2 groups; lower it or raise n_limited_groups",
        ),
        (dict(n_dense_layers=4), "n_dense_layers 4 is not between 0 and n_layers 3"),
        (dict(qk_rope_head_dim=7), "qk_rope_head_dim must be even"),
        (dict(dim=0), "dim must be positive"),
        (dict(rope_factor=0.5), "rope_factor must be at least 1"),
        (dict(n_head=4), "unknown key 'n_head'; did you mean 'n_heads'"),
        (dict(dim="wide"), "dim: .*'wide'"),
        (dict(score_func="tanh"), "score_func: .*'tanh'"),
    ],
)
def test_config_errors_name_the_fix(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="model: key 'dim' is missing"):
        ModelConfig.make({"vocab_size": 10})


def test_presets():
    for name in PRESETS:
        assert preset(name).vocab_size > 0
    assert preset("tiny", dim=64).dim == 64
    with pytest.raises(UserError, match="'smal'; did you mean 'small'"):
        preset("smal")
    with pytest.raises(UserError, match=r"'tiny'.*'n_layer'; did you mean 'n_layers'"):
        preset("tiny", n_layer=3)


def test_the_model_never_imports_torch_distributed():
    """Model code is pure math. torch itself loads torch.distributed, so the test reads the sources, not sys.modules."""
    code = (
        "import ast, pathlib, bessemer.model as m\n"
        "for path in pathlib.Path(m.__path__[0]).glob('*.py'):\n"
        "    for node in ast.walk(ast.parse(path.read_text())):\n"
        "        names = [a.name for a in getattr(node, 'names', [])] + [getattr(node, 'module', None) or '']\n"
        "        if isinstance(node, (ast.Import, ast.ImportFrom)):\n"
        "            assert not any('distributed' in name for name in names), path\n"
        "        if isinstance(node, ast.Attribute):\n"
        "            assert node.attr != 'distributed', path\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
