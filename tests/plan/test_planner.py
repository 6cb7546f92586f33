"""The planner's kernels, layers, steps, runs and search, with its figures checked against independent sums."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chinese_pages import untranslated

from bessemer import cli
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.table import Pair
from bessemer.addons.distributed.timeline import Costs, simulate
from bessemer.addons.plan import dry_run, layer_time, plan_config, training_setup
from bessemer.addons.plan import layer_kernels as kernels
from bessemer.addons.plan.cost import amount, ideas, plan_run, setup_memory
from bessemer.addons.plan.hardware import (
    Kernels,
    attention_rates,
    device,
    devices,
    efficiency,
    fit_gemm,
    gemm,
    memory_op,
    parse_cluster,
    read_toml,
    wave_fill,
)
from bessemer.addons.plan.inference import ACCEPTED, MEAN, TOGETHER, Deployment, decode, rollout_time
from bessemer.addons.plan.layer_time import LayerTimes, cuts, layer_times
from bessemer.addons.plan.search import search
from bessemer.addons.plan.stage_costs import stage_costs
from bessemer.addons.plan.step_time import step_time
from bessemer.addons.plan.training_setup import ModelShape, Setup
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.hf.deepseek import write_config
from bessemer.model import accounting
from bessemer.model.accounting import flops_per_token
from bessemer.model.config import preset
from bessemer.pipeline.stage import find_kind

V3 = preset("v3")
SHAPE = ModelShape.of(V3)
OWN = Setup(SHAPE, Layout(16, 2, 64), device("H800"), "dualpipe", 120)
ROOT = Path(__file__).parents[2]


def test_shapes_count_as_the_model_does():
    """Except for norms and biases, which no kernel multiplies with."""
    wide = preset("v3", shared_inter_dim=8192)
    for cfg in (V3, preset("moonlight"), preset("v2-lite"), preset("tiny"), wide):
        shape = ModelShape.of(cfg)
        assert shape.params == pytest.approx(accounting.main_params(cfg), rel=1e-3)
        assert shape.kv_bytes() == accounting.kv_cache_bytes(cfg)
        assert shape.flops(4096) == pytest.approx(accounting.flops_per_token(cfg, 4096).training, rel=1e-6)
    assert step_time(replace(OWN, shape=ModelShape.of(wide))).seconds > 1.02 * step_time(OWN).seconds
    llama = ModelShape(128256, 4096, 32, 32, 14336, heads=32, kv_heads=8)
    assert llama.params / 1e9 == pytest.approx(8.03, abs=0.005)
    assert SHAPE.without_mla().kv_bytes() / SHAPE.kv_bytes() == pytest.approx(32768 / 576)  # V3 2.1.1


def test_kernels_do_the_flops_of_the_model():
    """All phases of all layers, head included; in FP8 plus the recomputed up-projections."""
    tokens, length = 4096, 4096
    for fp8 in (False, True):
        layers = [kernels.attend(SHAPE, tokens, length, fp8, gated=False) + kernels.dense(SHAPE, tokens, fp8)] * 3
        sparse = kernels.experts(SHAPE, tokens, 4, 7.5, fp8) + kernels.finish(SHAPE, tokens, fp8)
        layers += [kernels.attend(SHAPE, tokens, length, fp8) + sparse] * 58
        total = sum(phase.flops for phase in layers) + kernels.head(SHAPE, tokens).flops
        core = sum(op.flops for op in layers[0].input if op.length) / 5  # FlashAttention recomputes scores: 5 for 4
        recomputed = sum(2 * n * k for name, n, k in SHAPE.linears() if "up" in name) * 61 * tokens if fp8 else 0
        expected_flops = accounting.flops_per_token(V3, length).training * tokens + 61 * core + recomputed
        assert total == pytest.approx(expected_flops, rel=1e-5)


def test_fits_go_through_their_points():
    for format, bound in (("fp8", 0.04), ("bf16", 0.20)):
        table, (rate, k0) = efficiency()["gemm"][format], fit_gemm(format)
        for groups, m, n, k, tflops in table["points"]:
            q = wave_fill((groups, m, n, k), device(table["device"]).units)
            assert rate * q * k / (k + k0) == pytest.approx(tflops, rel=bound)
    forward, backward, l0 = attention_rates()
    assert forward / (1 + l0 / 16384) == pytest.approx(616)
    together = 3.5 / ((1 / forward + 2.5 / backward) * (1 + l0 / 8192))
    assert together == pytest.approx(447 * 3.5 / 3)


def test_a_kernel_is_bound_by_what_is_slower():
    on = Kernels.of(device("H800"))
    thin, square = (gemm("x", m, 7168, 7168, "fp8") for m in (16, 8192))
    bytes_ = 7168 * 7168 + 16 * 7168 * 3
    assert on.seconds(thin) == pytest.approx(bytes_ / (3.35e12 * 0.896) + 5e-6)
    assert on.seconds(square) < 1.1 * square.flops / (1300e12)
    assert Kernels.of(device("H800"), 20).seconds(square) > 1.1 * on.seconds(square)
    memory = memory_op("x", 1e9)
    assert Kernels.of(device("H800"), 20).seconds(memory) == on.seconds(memory)
    assert on.collective(1e9, 1, 8) == 0 and on.collective(1e9, 16, 8) > on.collective(1e9, 8, 8)


def test_destinations_follow_the_gate_s_node_limit():
    limited, free = (
        training_setup.destinations(SHAPE, 64, 8),
        training_setup.destinations(replace(SHAPE, limited=8), 64, 8),
    )
    assert limited.nodes <= 4 < free.nodes
    assert free.nodes == pytest.approx(8 * (1 - (7 / 8) ** 8), rel=0.02)  # 8 draws among 8 nodes
    assert 7 < limited.ranks < 8
    alone = training_setup.destinations(replace(SHAPE, limited=8), 1, 8)
    assert alone == training_setup.Destinations(1.0, 1.0)


def test_a_load_trace(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"3": [4, 0, 2, 2], "4": [1, 1, 1, 1]}))
    assert training_setup.imbalance(path, 4, 4) == pytest.approx((2 + 1) / 2)
    assert training_setup.imbalance(path, 2, 4) == 1.0
    with pytest.raises(UserError, match="8 loads per layer"):
        training_setup.imbalance(path, 2, 8)  # of another network
    for text in ("{}", "[[1, 2, 3]]", "nonsense", "[[0, 0]]", '[{"0": 1}]', '[["a"]]'):
        path.write_text(text)
        with pytest.raises(UserError, match="load trace"):
            training_setup.imbalance(path, 2, 2)


def test_overlapped_pair_takes_the_longer_of_compute_and_communication():
    short = LayerTimes((1, 2, 1), (1, 1, 1), 0.5, 0.5, 0.5, 0.5)
    assert layer_time.pair([short] * 4, [short] * 4) == pytest.approx(4 * short.compute)
    long = LayerTimes((1, 1, 1), (1, 1, 1), 5, 5, 5, 5)
    assert layer_time.pair([long] * 4, [long] * 4) >= 4 * long.communication
    assert layer_time.pair([long], [long]) <= long.forward + long.input + long.weight
    assert layer_time.pair([short], []) == pytest.approx(short.forward)
    assert layer_time.pair([short], [], sends=3.0) == pytest.approx(short.forward + 3.0)


def test_messages_between_ranks_take_time():
    assert simulate(schedule("gpipe", 3, 1), Costs(), 0.25).makespan == 9 + 4 * 0.25
    assert simulate(schedule("zbv", 1, 2), Costs(), 0.25).makespan == simulate(schedule("zbv", 1, 2)).makespan


def test_stages_of_equal_time():
    assert [len(layers) for layers in cuts(OWN, 16)] == [4] * 15 + [1]
    assert [len(layers) for layers in cuts(replace(OWN, even=True), 16)][:4] == [3, 4, 4, 4]
    brute = Setup(ModelShape.of(preset("tiny")), Layout(2, 1, 1), device("H100"), "1f1b", 4, length=256)
    parts = cuts(brute, 2)

    def slowest(split):
        times = [layer_times(brute, i < 1, 0) for i in range(4)]
        sums = [t.compute + t.communication for t in times]
        tail = kernels.head(brute.shape, 256) + kernels.join(brute.shape, 256) + kernels.head(brute.shape, 256)
        on = Kernels.of(brute.device)
        last = brute.in_step * sum(on.seconds(op) for ops in (tail.forward, tail.input, tail.weight) for op in ops)
        last += sums[-1]
        return max(sum(sums[:split]), sum(sums[split:]) + last)

    assert slowest(len(parts[0])) == pytest.approx(min(slowest(split) for split in (1, 2, 3)))


def test_a_step_is_its_parts():
    step = step_time(OWN)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    pairs = sum(isinstance(action, Pair) for steps in step.table.steps for action in steps)
    layer = layer_times(OWN, False, efficiency()["exchange"]["units"])
    assert step.parts["pairs"] * 16 / pairs == pytest.approx(layer_time.pair([layer] * 4, [layer] * 4), rel=0.05)
    slower = step_time(replace(OWN, imbalance=1.2))
    assert slower.seconds > 1.03 * step.seconds
    assert step_time(replace(OWN, schedule="1f1b")).seconds > 1.15 * step.seconds


def test_the_published_run():
    """Within what the validation page says, although no file that the planner reads contains that number."""
    run, cluster = plan_config.published("v3"), parse_cluster("2048xH800")
    plan = plan_run(V3, plan_config.setup(run, V3, cluster), plan_config.tokens_of(run, "v3"), run.rows)
    assert plan.hours_per_trillion / 1e3 == pytest.approx(180, rel=0.12)
    assert plan.fits and plan.highest > 0.8 * plan.setup.device.room
    assert plan.mfu(989.4) == pytest.approx(plan.rate * 250.457e9 / 989.4e12, rel=1e-3)
    without = ideas(plan)
    assert all(idea["factor"] > 1 for name, idea in without.items() if not name.startswith("MTP"))
    assert without["node limit of the routing"]["factor"] < without["FP8"]["factor"]
    read = [read_toml(name) for name in ("hardware.toml", "efficiency.toml", "published.toml")]
    assert not any(number in json.dumps(read) for number in ("2664", "2788", "19.926", "13.95"))


def test_search_finds_layouts_that_fit_and_explains_rejections():
    options = plan_config.parse(["batch=15360 seq=4096 tokens=1T"])
    result = search(V3, options, parse_cluster("2048xH800"))
    assert all(candidate.bytes <= candidate.setup.device.room for candidate in result.candidates)
    assert result.candidates == sorted(result.candidates, key=lambda candidate: -candidate.rate)
    published_rate = OWN.step_tokens / step_time(OWN).seconds / 2048
    assert result.candidates[0].rate >= 0.999 * published_rate, "it finds the published layout or a better one"
    assert result.considered > 1000 and "needs more memory than a H800 has" in result.rejected
    with pytest.raises(UserError, match=r"8 H100.*smallest needs \d+ GiB"):
        search(V3, options, parse_cluster("8xH100"))


def test_settings_by_hand():
    options = plan_config.parse(
        ["layout.pp=8 layout.ep=32", "precision=bf16", "batch=8192 tokens=2.5T recompute=attend"]
    )
    by_hand = plan_config.setup(options.over(plan_config.published("v3")), V3, parse_cluster("2048xH800"))
    assert (by_hand.layout, by_hand.fp8, by_hand.recompute) == (Layout(8, 8, 32), False, ("attend",))
    assert by_hand.micro == 8192 // 256 and options.tokens == 2.5e12
    small = replace(options, batch=((0.0, 400.0),), micro_rows=4)
    few = plan_config.setup(small, V3, parse_cluster("2048xH800"))
    assert (few.rows, few.micro, few.step_tokens) == (2, 1, 400 * 4096), "cut as the trainer cuts it, not down to 256"
    assert plan_config.parse(["model.n_mtp=0"]).model == {"n_mtp": 0}
    for wrong in (
        "pp=0",
        "layout.pp=x",
        "pq=3",
        "precision=int4",
        "tokens=-1",
        "mtp=2",
        "packed=2",
        "recompute=all",
        "batch",
        "in_step=inf",
        "tokens=inf",
        "usd=1e999",
        "model.dim=inf",
    ):
        with pytest.raises(UserError, match="--set"):
            plan_config.parse([wrong])
    with pytest.raises(UserError, match="expected a finite number"):
        plan_config.parse(["tokens=inf"])
    with pytest.raises(UserError, match=r"4096 tokens.*6 equal chunks"):
        plan_config.setup(replace(small, cp=3, pp=1, ep=1, seq=4096), V3, parse_cluster("2046xH800"))


def test_values_are_padded_for_packed_rows_and_without_cudnn():
    """Heads of values and outputs are as wide as those of keys, and one output is kept without its padding."""
    cfg = preset("v2-lite")

    def kept(cluster, *options):
        config = plan_config.parse([f"precision=bf16 layout.ep=1 layout.pp=1 seq={cfg.max_seq_len}", *options])
        planned = plan_config.setup(config, cfg, parse_cluster(cluster))
        assert planned.rows * planned.length == cfg.max_seq_len
        return setup_memory(cfg, planned, schedule("1f1b", 1, 1))[0]["activations"]

    plain = kept("1xH200")
    more = cfg.max_seq_len * cfg.n_layers * cfg.n_heads * (2 * (192 - 128) + 128) * 2
    assert kept("1xH200", "packed=1") == kept("1xA100") == kept("1xA100", "packed=1") == plain + more
    assert kept("1xH200", "packed=1 precision=fp8") == kept("1xH200", "precision=fp8")
    masked = Recipe.load("tiny", ["pretrain.document_mask=true"])
    for recipe, packed in ((Recipe.load("tiny"), 0), (masked, 1)):
        settings, _, length = plan_config.pretraining(recipe)
        assert plan_config.of_recipe(recipe, settings, length).packed == packed
        assert [dry_run.of_recipe(recipe, device_name=name).numbers.padded for name in ("H100", "RTX4090", None)] == [
            packed == 1, True, False,
        ]  # fmt: skip
    assert plan_config.resolve(str(ROOT / "recipes/node.toml"), plan_config.parse(["model.preset=v2-lite"]))[2].packed


def test_devices_and_clusters():
    assert parse_cluster("2,048 x h800").size == 2048 and parse_cluster("8xB200").device.fp8 == 4500
    assert all(card.sources and card.memory > 0 for card in devices().values())
    for wrong in ("H800", "0xH800", "8xH8000", "-3xH100", "x"):
        with pytest.raises(UserError):
            parse_cluster(wrong)
    with pytest.raises(UserError, match="A100 has no FP8"):
        step_time(replace(OWN, device=device("A100")))


def test_decoding_is_bound_by_the_cache_of_long_contexts():
    def seconds(**changes):
        return decode(Deployment(SHAPE, device("H800"), 144, 96, 4989, 32, **changes)).seconds

    short, long = seconds(), decode(Deployment(SHAPE, device("H800"), 144, 96, 65536, 32))
    assert long.seconds > 2 * short and long.cache_gib > 10 * 96 * 4989 * 70272 / 2**30
    alone = decode(Deployment(SHAPE.without_mla(), device("H800"), 144, 96, 4989, 32))
    assert alone.seconds > 3 * short


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bessemer", "plan", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as done:
            assert done.code in (0, 2, None)
        return capsys.readouterr()

    return call


KEYS = ("params_total", "params_active", "tokens", "gpu_hours", "gpu_hours_per_trillion_tokens", "days", "usd",
        "step_seconds", "tokens_per_second_per_gpu", "mfu_bf16", "memory_gib_per_rank")  # fmt: skip


def test_plan_on_the_command_line(call, tmp_path):
    page = tmp_path / "v3.html"
    facts = json.loads(call("v3", "--cluster", "2048xH800", "--json", "--html", page).out)
    assert all(key in facts for key in KEYS) and facts["params_total"] == 671_026_419_200
    assert facts["usd"] == pytest.approx(2 * facts["gpu_hours"]) and len(facts["memory_gib_per_rank"]) == 16
    html = page.read_text()
    assert untranslated(html, "pp dp ep") == []
    assert "<svg" in html and "Content-Security-Policy" in html and "script-src" in html
    output = call("v3", "--cluster", "2048xH800", "--set", "precision=bf16", "seq=4096").out
    assert "BF16" in output and "do not fit" not in output.split("without one of its ideas")[0]
    small = call("v3", "--cluster", "512xH800").out
    assert "layouts considered" in small, "the published layout is of another cluster"


def test_a_recipe_on_a_cluster(call, tmp_path):
    facts = json.loads(call(ROOT / "recipes/tiny.toml", "--cluster", "2xH100", "--json").out)
    output = call(ROOT / "recipes/tiny.toml", "--cluster", "1xH100", "--set", "precision=bf16").out
    assert (
        "24 rollouts of 256 answers" in output
        and "served from units of" in output
        and "1,024" not in output.splitlines()[0]
    )
    stages = {stage["stage"]: stage for stage in facts["stages"]}
    assert facts["tokens"] == 6_000_000 and facts["considered"] > 10 and list(stages) == ["pretrain", "zero", "eval"]
    assert stages["pretrain"]["gpu_hours"] == facts["gpu_hours"] and min(s["gpu_hours"] for s in stages.values()) > 0


def test_every_stage_of_the_recipes_for_gpus_has_its_hours(call):
    """Including stages without pre-training, of a student of another size, and of files that are missing here."""
    evening = json.loads(call(ROOT / "recipes/one-gpu.toml", "--cluster", "1xH100", "--json").out)
    assert evening["fits"] and 3 < sum(stage["gpu_hours"] for stage in evening["stages"]) < 8
    assert 0.9e9 < evening["params_total"] < 1.1e9 and 0.25e9 < evening["params_active"] < 0.35e9
    node = json.loads(call(ROOT / "recipes/node.toml", "--cluster", "8xH200", "--json").out)
    assert node["fits"] and node["precision"] == "bf16" and node["sequence_length"] == 4096
    assert not json.loads(call(ROOT / "recipes/node.toml", "--cluster", "8xRTX4090", "--json").out)["fits"]
    paper = call(ROOT / "recipes/r1-paper.toml", "--cluster", "2048xH200").out
    assert "not counted: there is no file or directory data/aime_2024.jsonl" in paper and "as if its model" in paper
    student = json.loads(call(ROOT / "recipes/r1-tiny.toml", "--cluster", "1xH100", "--json").out)["stages"]
    hours = {stage["stage"]: stage["gpu_hours"] / 1e6 for stage in student}
    assert hours["student"] / 2 < 0.8 * hours["base"] / 5.6, "a smaller network trains faster"
    assert hours["student-rl"] < 0.8 * hours["dev2"]


def test_a_model_is_planned_on_the_rows_of_its_pre_training(call):
    """V2-Lite's published context is that of its extension, which no eight devices hold at once."""
    facts = json.loads(call("v2-lite", "--cluster", "8xH100", "--set", "tokens=1T", "--json").out)
    assert facts["sequence_length"] == 4096 and facts["fits"]


def test_long_rows_cost_what_their_flops_are_to_those_of_the_plan(call):
    facts = json.loads(call(ROOT / "recipes/v3.toml", "--cluster", "2048xH800", "--json").out)
    hours = {stage["stage"]: stage["gpu_hours"] for stage in facts["stages"]}
    recipe = Recipe.load(ROOT / "recipes/v3.toml")
    for name, length in (("extend-32k", 32_768), ("extend-128k", 131_072)):
        trained = sum(work.trained for work in find_kind(recipe.stage(name).kind)().work(recipe.stage(name), recipe))
        ratio = flops_per_token(preset("v3"), length).training / flops_per_token(preset("v3"), 4096).training
        tokens = hours[name] * 3600 * facts["tokens_per_second_per_gpu"]
        assert tokens == pytest.approx(trained * ratio, rel=0.02), name


def test_devices_that_only_sample_are_named(call):
    assert "4 more devices sample" in call("qwen3-30b-a3b-grpo", "--cluster", "4xH200").out


def test_an_imported_network_has_its_own_size(call, tmp_path):
    """If its config is not here, or of another family, [model] stands in and the plan says so."""
    path, base = tmp_path / "mine.toml", preset("v2-lite", n_layers=9)
    (tmp_path / "base").mkdir()
    write_config(base, tmp_path / "base")
    stages = """
        [[stage]]\nkind = "import"\nmodel = "MODEL"
        [[stage]]\nkind = "rl"\nfrom = "import"\ntasks = ["arithmetic"]\nrollouts = 2
        [[stage]]\nkind = "reject"\nfrom = "rl"\ntasks = ["arithmetic"]\nproblems = 8
        [[stage]]\nkind = "sft"\nfrom = "import"\nsamples = ["reject"]\nlr = 1e-4\nlr_final = 1e-5\nrow_length = 512
        [[stage]]\nkind = "eval"\nmodels = ["import"]\ntasks = ["arithmetic"]\nproblems = 8
    """

    def plan(model, table="", *more):
        path.write_text('name = "mine"\n' + table + stages.replace("MODEL", model))
        return call(path, "--cluster", "1xH200", *more)

    own = plan("base")
    assert f"mine: {amount(accounting.main_params(base))} parameters" in own.out and "as if" not in own.out
    assert " tokens\n" not in own.out.splitlines()[0] + "\n", "it pre-trains on none"
    fewer = json.loads(plan("base", "", "--set", "model.n_layers=4", "--json").out)
    assert fewer["params_total"] < accounting.main_params(base) and not fewer["as_if_model"]
    own = json.loads(plan("base", "", "--json").out)
    alike = json.loads(plan("hf://own/name", '[model]\npreset = "v2-lite"\nn_layers = 9\n', "--json").out)
    assert alike["as_if_model"] and all("as if its model were [model]" in row["work"] for row in alike["stages"])
    assert [row["gpu_hours"] for row in alike["stages"]] == pytest.approx([row["gpu_hours"] for row in own["stages"]])
    assert "mine, as if its model were [model]: " in plan("hf://own/name", '[model]\npreset = "v2-lite"\n').out
    refused = plan("hf://own/name").err
    assert 'stage "import"' in refused and "--set model.preset=v2-lite" in refused and refused.count("\n") == 1
    assert "mine, as if" in plan("package:smollm2-135m", "", "--set", "model.preset=v2-lite").out


def test_rollouts_are_priced_without_drafts_that_rl_never_makes():
    """R1's own sampler used drafts, so only the audit of its published cost counts drafts."""
    plan, recipe = plan_run(V3, OWN, 1e12, lambda tokens: 15360), Recipe.load(ROOT / "recipes/tiny.toml")
    zero = recipe.stage("zero")
    arguments = (SHAPE, OWN.device, plan.gpus, zero.prompts_per_rollout * zero.samples, 300, plan.rate, 64)
    (cost,) = (cost for cost in stage_costs(plan, recipe) if cost.rollout)
    plain, drafted = rollout_time(*arguments, fp8=False), rollout_time(*arguments, ACCEPTED, fp8=False)
    assert cost.rollout.sampling == plain.sampling > 1.3 * drafted.sampling
    assert plain.sampling > 1.1 * rollout_time(*arguments).sampling, "the engine samples in BF16, V3's in FP8"


def test_sampling_time_grows_with_batches_of_answers():
    once, hundredfold = (rollout_time(SHAPE, OWN.device, 8, n * 8 * TOGETHER, 8192, 1e4, 8).sampling for n in (1, 101))
    step = decode(Deployment(SHAPE, OWN.device, 8, TOGETHER, MEAN * 8192)).seconds
    assert hundredfold - once == pytest.approx(100 * step * MEAN * 8192)


def test_critic_adds_updates_and_a_value_pass():
    """3 passes of each network's update, two of log-probabilities, one of values: 9 instead of 5."""
    plan = plan_run(V3, OWN, 1e12, lambda tokens: 15360)
    costs = [
        next(
            cost.rollout for cost in stage_costs(plan, Recipe.load(ROOT / "recipes/tiny.toml", changes)) if cost.rollout
        )
        for changes in ([], ["zero.advantage=critic"])
    ]
    assert costs[1].updating == pytest.approx(costs[0].updating * 9 / 5)
    assert costs[1].sampling == costs[0].sampling


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("v4", "--cluster", "8xH100"), 'no model or recipe "v4"'),
        (("v3", "--cluster", "8xH900"), "did you mean"),
        (("v3", "--cluster", "0xH800"), "at least one device"),
        (("moonlight", "--cluster", "8xH100"), "no budget"),
        (("tiny", "--cluster", "8xH100"), "name the recipe, builtin:tiny"),
        (("v3", "--cluster", "2048xH800", "--set", "layout.pp=7"), "these fit"),
        (("v3",), "--cluster"),
        ((), "nothing to plan"),
        (("v3", "tiny"), "one model or recipe at a time"),
        (("--schedule", "zbv", "--cluster", "8xH100"), "--cluster has no effect on --schedule"),
        (("recipes/tiny.toml", "--here", "--search"), "--search has no effect on --here"),
        (("--schedule", "zbv", "--set", "tokens=1T"), "--set has no effect on --schedule"),
        (("v3", "--cluster", "8xH100", "--svg", "x.svg"), "--svg has no effect"),
        (("v3", "--schedule", "zbv"), "both"),
        (("v3", "--cluster", "8xH100", "--pp", "4"), "use --set layout.pp=4"),
        (("v3", "--cluster", "8xH100", "--costs", "1,1,1"), "--costs has no effect on a model or recipe"),
        (("v3", "--cluster", "2048xH800", "--set", "batch=64"), "raise batch to at least 128"),
        (("v3", "--cluster", "2048xH800", "--set", "batch=128"), "raise batch to at least 4,096"),
        (("r1-paper", "--cluster", "512xH800"), "no layout of 512 H800 can hold this run"),
        (("recipes/none.toml", "--cluster", "8xH100"), "no recipe"),
    ],
)
def test_impossible_plans_are_refused(call, arguments, words):
    assert words in call(*arguments).err
