"""`bessemer drift`: healthy pairs agree up to rounding, and a planted fault is found at its layer and its part.

Two families: our own, and Qwen2 and Qwen3-MoE made and saved by transformers. Bounds are those of the command.
"""

import json
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from hf_cases import made
from planted_models import as_released, changed, noisy

from bessemer import cli
from bessemer.addons.evals import drift_run
from bessemer.addons.evals.drift_measure import Gaps, LayerPart, Meeting, gaps, row, rows
from bessemer.addons.evals.drift_sides import Decoding
from bessemer.addons.families import gguf_file
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.decode import TorchSteps
from bessemer.errors import UserError
from bessemer.hf import deepseek, model_directory
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

SHAPE = dict(
    vocab_size=96, dim=32, n_layers=4, n_dense_layers=1, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=12, n_activated_experts=3,
    n_expert_groups=4, n_limited_groups=2, n_mtp=1, max_seq_len=128, init_std=0.2,
)  # fmt: skip
IDS = torch.randint(2, 96, (80,), generator=torch.Generator().manual_seed(1)).tolist()
FORMATS = ("float32", "bfloat16")
PAIRS = [("trainer", "engine"), ("trainer", "transformers"), ("engine", "transformers")]


def own(**changes) -> Transformer:
    return as_released(Transformer(ModelConfig.make({**SHAPE, **changes})).initialise(0).eval(), 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories by family."""
    folder = tmp_path_factory.mktemp("models")
    own().save(folder / "v3")
    for kind in ("qwen2", "qwen3-moe"):
        model = made(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        model.save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["v3", "qwen2", "qwen3-moe"])
def test_healthy_pairs_agree(models, kind, dtype):
    for a, b in PAIRS:
        result = drift_run.drift((a, models / kind), (b, models / kind), IDS, dtype)
        assert result.first is None, (a, b, result.sentence())
        assert {line.point.part for line in result.table} >= {"residual stream", "after attention", "log-probs"}


ROPE = {"rope_theta": 10.0, "rope_type": "default"}
FAULTS = {
    "attention": ("v3", {r"layers\.2\.self_attn\.o_proj": noisy}, {}, (2, "attention")),
    "dense": ("v3", {r"layers\.0\.mlp\.down_proj": noisy}, {}, (0, "MLP")),
    "experts": ("v3", {r"layers\.2\.mlp\.experts\.\d+\.down_proj": torch.neg}, {}, (2, "MLP")),
    "bias": ("v3", {r"layers\.2\.mlp\.gate\.e_score": torch.zeros_like}, {}, (2, "router")),
    "embedding": ("v3", {"embed_tokens": noisy}, {}, (-1, "embedding")),
    "norm": ("v3", {r"model\.norm\.weight": noisy}, {}, (4, "final norm")),
    "head": ("v3", {"lm_head": noisy}, {}, (4, "log-probs")),
    "rope": ("v3", {}, {"rope_theta": 10.0, "rope_parameters": ROPE}, (0, "attention")),
    "qwen attention": ("qwen2", {r"layers\.1\.self_attn\.v_proj\.weight": noisy}, {}, (1, "attention")),
    "qwen mlp": ("qwen2", {r"layers\.1\.mlp\.up_proj": noisy}, {}, (1, "MLP")),
    "qwen eps": ("qwen2", {}, {"rms_norm_eps": 0.5}, (0, "attention")),
    "qwen gate": ("qwen3-moe", {r"layers\.1\.mlp\.gate\.": noisy}, {}, (1, "router")),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_where_it_is(models, tmp_path, name, dtype):
    kind, tensors, config, place = FAULTS[name]
    faulty = changed(models / kind, tmp_path / "faulty", tensors, **config)
    for a, b in PAIRS[:2]:
        result = drift_run.drift((a, models / kind), (b, faulty), IDS, dtype)
        assert result.first is not None, (a, b)
        layer, part = result.first.point
        if kind == "v3" and b == "engine":  # whose kernels show the stream after each half
            shown = {"attention": "after attention", "MLP": "residual stream", "embedding": "after attention"}
            assert (layer, part) == (max(0, place[0]), shown.get(place[1], place[1])), (a, b, result.sentence())
        else:
            assert (layer, part) == place, (a, b, result.sentence())


def test_a_cache_in_fewer_bits_is_found_in_the_first_attention(models):
    model = model_directory.load(models / "v3", torch.float32, mtp=False)

    class Coarse(TorchSteps):
        def new_cache(self, drafts=0, **options):
            cache = super().new_cache(drafts, **options)
            write = cache.write
            cache.write = lambda layer, slot_N, latent_NX: write(
                layer, slot_N, latent_NX.to(torch.float8_e4m3fn).to(latent_NX.dtype)
            )
            return cache

    trainer = drift_run.open_trainer(models / "v3", torch.float32)
    for steps, place in ((TorchSteps(model), None), (Coarse(model), LayerPart(0, "attention"))):
        sides = [trainer, Decoding(model, 16, steps)]
        result = drift_run.drift(("trainer", models), ("engine", models), IDS, "float32", sides=sides)
        assert (result.first and result.first.point) == place, [*result.table[:4]]
        assert not result.unseen


def test_kernels_and_torch_s_own_steps_show_the_same(models):
    """What fused kernels are said to have computed, layer by layer, against the engine's reference."""
    model = model_directory.load(models / "v3", torch.float32, mtp=False)
    sides = [Decoding(model, 16), Decoding(model, 16, TorchSteps(model))]
    assert sides[0].fused and not sides[1].fused
    result = drift_run.drift(("engine", models / "v3"), ("engine", models / "v3"), IDS, "float32", sides=sides)
    assert result.first is None and max(line.mean for line in result.table) < 1e-5


def test_a_long_row_with_a_real_vocabulary_keeps_one_point_at_a_time(tmp_path):
    """V3's vocabulary and 2,048 ids: less than three points of all sides are held, of fifteen."""
    n, D = 2048, 32
    own(vocab_size=129280, max_seq_len=n, n_layers=2, n_mtp=0, dim=D).save(tmp_path / "model")
    ids = torch.randint(0, 129280, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    for b in ("transformers", "engine"):
        result = drift_run.drift(("trainer", tmp_path / "model"), (b, tmp_path / "model"), ids, "float32")
        assert result.first is None, result.sentence()
        assert result.most_held < 3 * n * D * (4 + 4 + 8)


def test_the_measure():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.5], [0.0, 2.0]])
    assert gaps("MLP", a, b).tolist() == [0.1, 0.0]
    assert gaps("residual stream", a, 7 * a).abs().max() < 1e-12  # its length does not count
    assert gaps("router", torch.tensor([[1, 2], [1, 2]]), torch.tensor([[2, 1], [1, 3]])).tolist() == [0, 1]
    assert gaps("log-probs", a[:, :1], b[:, 1:]).tolist() == [1.5, 2.0]
    assert gaps("MLP", a, a * float("nan")).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("first", ["faulty", "healthy"])
def test_what_is_not_finite_never_agrees(models, tmp_path, first):
    """Whichever side has it: the floor of a faulty reference is not finite either."""
    faulty = changed(models / "v3", tmp_path / "faulty", {r"layers\.1\.self_attn\.o_proj": one_nan})
    pair = [("trainer", faulty), ("transformers", models / "v3")]
    result = drift_run.drift(*(pair if first == "faulty" else pair[::-1]), IDS, "float32")
    assert result.first is not None and result.first.point == LayerPart(1, "attention")
    assert result.first.not_finite == len(IDS) and "not finite" in result.sentence()
    json.dumps(result.facts(), allow_nan=False)


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


def test_a_token_that_is_not_finite_is_counted_alone(models, tmp_path):
    def broken(tensor):
        tensor = tensor.clone()
        tensor[IDS[40]] = float("nan")
        return tensor

    faulty = changed(models / "v3", tmp_path / "faulty", {"embed_tokens": broken})
    result = drift_run.drift(("trainer", faulty), ("trainer", models / "v3"), IDS, "float32")
    assert result.table[0].not_finite == IDS.count(IDS[40]) and result.table[0].at == IDS.index(IDS[40])
    assert result.table[0].beyond


def other_gains(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + torch.linspace(0, 0.5, len(tensor))


@pytest.mark.parametrize("kind", ["olmo2", "gemma3"])
def test_a_norm_behind_attention_is_part_of_the_residual_stream(tmp_path, kind):
    """OLMo 2 and Gemma 3 normalise what attention gives, and call that norm what Llama calls another."""
    made(kind).save_pretrained(tmp_path / "healthy")
    faulty = changed(tmp_path / "healthy", tmp_path / "faulty", {r"layers\.1\.post_attention_layernorm": other_gains})
    result = drift_run.drift(("trainer", tmp_path / "healthy"), ("trainer", faulty), IDS[:16], "float32")
    assert result.first is not None and result.first.point == LayerPart(1, "after attention")


def test_parallel_layers_have_no_stream_after_attention(tmp_path):
    made("gpt-neox").save_pretrained(tmp_path / "model")
    result = drift_run.drift(("trainer", tmp_path / "model"), ("engine", tmp_path / "model"), IDS, "float32")
    assert result.first is None and "after attention" not in {line.point.part for line in result.table}


def of(*values: float) -> Gaps:
    return Gaps(torch.arange(len(values)), torch.tensor(values, dtype=torch.float64))


def test_what_counts_as_beyond_rounding():
    floor = of(*[1e-6] * 100)
    few, many = of(*[1e-6] * 98, 1.0, 1.0), of(*[1e-6] * 97, 1.0, 1.0, 1.0)
    point = LayerPart(0, "MLP")
    assert not row(point, few, floor, torch.float32).beyond and row(point, many, floor, torch.float32).beyond
    assert not row(point, of(*[3.9e-6] * 100), floor, torch.float32).beyond
    assert row(point, of(*[4.1e-6] * 100), floor, torch.float32).beyond
    assert row(point, many, floor, torch.float32).at == 97
    # once a token has gone to other experts, those that attend to it differ too
    router = LayerPart(0, "router")
    seen = {router: of(*[0.0] * 99, 1.0), point: many}
    table = rows(seen, {router: of(*[0.0] * 100), point: floor}, torch.float32)
    assert not any(line.beyond for line in table)
    assert rows(seen | {point: of(*[1.0] * 100)}, {router: floor, point: floor}, torch.float32)[1].beyond


def test_sides_wait_for_each_other_and_an_error_ends_all():
    points, order = [LayerPart(i, "MLP") for i in range(3)], []
    meeting = Meeting(["a", "b"], [("a", "b")], points, 0)

    def computing(side, delay):
        for point in points:
            time.sleep(delay)
            order.append((point.layer, side))
            meeting.give(side, point, 0, torch.ones(4, 2))

    meeting.run({"a": lambda: computing("a", 0), "b": lambda: computing("b", 0.02)})
    assert [layer for layer, _ in order] == [0, 0, 1, 1, 2, 2]
    assert len(meeting.measured(("a", "b"))) == 3
    broken = Meeting(["a", "b"], [("a", "b")], points, 0)

    def fails():
        raise UserError("no")

    before = threading.active_count()
    with pytest.raises(UserError, match="no"):
        broken.run({"a": lambda: broken.give("a", points[0], 0, torch.ones(1, 1)), "b": fails})
    assert threading.active_count() == before


@pytest.mark.vllm
def test_a_fault_in_vllm_s_model_is_found_where_it_is(tmp_path):
    """In float32 on a CPU, and with a healthy model nothing is found."""
    pytest.importorskip("vllm")
    from bessemer.addons.evals.drift_vllm import VLLM

    made("llama", hidden_size=256, intermediate_size=512, initializer_range=0.06).save_pretrained(tmp_path / "llama")
    faulty = changed(tmp_path / "llama", tmp_path / "faulty", {r"layers\.1\.self_attn\.o_proj": noisy})
    for model, place in ((tmp_path / "llama", None), (faulty, LayerPart(1, "attention"))):
        sides = [drift_run.open_trainer(tmp_path / "llama", torch.float32), VLLM(model, torch.float32, len(IDS))]
        result = drift_run.drift(("trainer", tmp_path), ("vllm", tmp_path), IDS, "float32", sides=sides)
        assert (result.first and result.first.point) == place, result.sentence()
        assert not result.unseen
        sides[1].llm.llm_engine.engine_core.shutdown()


def test_a_fault_in_llama_cpp_s_file_is_found_where_it_is(tmp_path, monkeypatch, capsys):
    """In the file that we export, whose attention llama.cpp computes in the absorbed form."""
    pytest.importorskip("llama_cpp")
    Tokenizer.train([drift_run.TEXT] * 4, 400).save(tmp_path / "words")
    own(vocab_size=420, n_mtp=0).save(tmp_path / "model", tokenizer_dir=tmp_path / "words")
    for name in ("healthy", "attention", "bias", "dense", "rope"):
        _, tensors, config, place = FAULTS.get(name, ("v3", {}, {}, None))
        faulty = changed(tmp_path / "model", tmp_path / name, tensors, **config)
        for dtype in FORMATS:
            result = drift_run.drift(("trainer", tmp_path / "model"), ("llama.cpp", faulty), IDS, dtype)
            assert (result.first and tuple(result.first.point)) == place, (name, dtype, result.sentence())
            assert not result.unseen
    gguf_file.write(tmp_path / "model", tmp_path / "model.gguf", "float32")
    call = ["drift", str(tmp_path / "model"), "--between", "trainer", "llama.cpp", "--second"]
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, *call, str(tmp_path / "model.gguf"))
    assert not end.value.code and "router" in capsys.readouterr().out
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-100])
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, *call, str(tmp_path / "broken.gguf"))
    assert end.value.code == 2 and "llama.cpp does not load it" in capsys.readouterr().err


WRONG = {
    "--between engine engine": "--second",
    "--between trainer vllm --length 4": "bessemer[vllm]",
    "--ids nosuch": "nosuch",
    "--ids words": "words",
    "--ids far": "id 96 at position 1",
    "--length 500": "128",
    "--length 4 --text hi": "one of them",
    "--ids few --second other": "vocabulary",
}
if find_spec("llama_cpp") is None:
    WRONG["--between trainer llama.cpp --length 4"] = "bessemer[llama]"


def called(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["bessemer", *words])
    cli.main()


@pytest.mark.parametrize(("options", "fix"), WRONG.items())
def test_wrong_input_is_one_line(models, monkeypatch, capsys, options, fix):
    (models / "words").write_text("1 two 3")
    (models / "far").write_text("[1, 96]")
    (models / "few").write_text("1 2 3")
    if "other" in options:
        own(vocab_size=90, n_mtp=0).save(models / "other")
    monkeypatch.chdir(models)
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, "drift", "v3", *options.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.strip().splitlines()) == 1 and fix in error


def test_the_command_prints_the_table_and_says_by_its_code_whether_they_agree(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "ids").write_text(" ".join(map(str, IDS[:20])))
    call = ["drift", str(models / "v3"), "--ids", str(tmp_path / "ids"), "--between", "trainer", "transformers"]
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, *call)
    assert not end.value.code and "router" in capsys.readouterr().out
    deepseek.load(models / "v3", mtp=False).save(tmp_path / "plain")
    faulty = changed(tmp_path / "plain", tmp_path / "faulty", {r"layers\.1\.self_attn\.o_proj": noisy})
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, *call, "--second", str(faulty), "--json")
    facts = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and facts["first"] == {"layer": 1, "part": "attention"}
