"""A rehearsal's parts that run nothing: what is computed for the full size, its miniature, its hashes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chinese_pages import untranslated

from bessemer.addons.distributed import schedules
from bessemer.addons.distributed.table import Action
from bessemer.addons.plan import memory, stage_memory
from bessemer.addons.plan.hardware import GIB, device, parse_cluster
from bessemer.addons.plan.rehearsal import certificate, computed, miniature, page, processes, unproved
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

ROOT = Path(__file__).parents[2]
V3, NODE, PAPER = (ROOT / "recipes" / name for name in ("v3.toml", "node.toml", "r1-paper.toml"))
SMALL = """
name = "small"
[layout]
pp = 2
ep = 2
dp = 2
schedule = "1f1b"
[[stage]]
kind = "corpus"
parts = { text = "text" }
row_length = 128
[[stage]]
kind = "pretrain"
tokens = "1M"
lr = 1e-3
batch_rows = 64
micro_rows = 2
mixture = { text = 1.0 }
"""
RL = """
[[stage]]
kind = "rl"
tasks = ["countdown"]
rollouts = 1
prompts_per_rollout = 1
updates_per_rollout = 1
lr = 1e-5
"""


def small(tmp_path, *overrides):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return Recipe.load(path, overrides)


def of_v3(until="pretrain", cluster="2048xH800", *overrides):
    return computed.compute(certificate.part_of(Recipe.load(V3, overrides), until), parse_cluster(cluster))


def test_v3_fits_and_its_extension_does_not():
    """The published run, and what its recipe's header says of the extension on the same layout."""
    facts = of_v3()
    (stage,) = facts["stages"]
    rows = stage["memory"]["by_rank"]
    assert not facts["faults"] and len(rows) == 16
    assert rows[0]["ranks"] == [0, 127] and rows[-1]["ranks"] == [1920, 2047]
    assert max(row["gib"] for row in rows) < stage["memory"]["room_gib"] < 80
    assert {(one["schedule"], one["micro_batches"]) for one in stage["tables"]} == {("1f1b", 24), ("dualpipe", 120)}
    faults = of_v3(None)["faults"]
    assert len(faults) == 2 and all(word in faults[0] for word in ("extend-32k", "ranks", "GiB", "cp = 2"))


def test_memory_by_rank_is_that_of_the_planner():
    """The fullest rank is the one that every other command speaks of, and every rank has its own stages' bytes."""
    recipe, card = certificate.part_of(Recipe.load(V3), "pretrain"), device("H800")
    stage = recipe.stage("pretrain")
    needs = stage_memory.by_rank(recipe, stage, 2048, card)
    assert max(need.total for need in needs) == stage_memory.of_stages(recipe, 2048, card)["pretrain"].total
    layout = miniature.Layout(16, 2, 64)
    name, micro = schedules.of_step("auto", 16, 32)
    numbers = memory.NumberFormats(2, 2, True, True, False, False)
    expected = memory.per_rank(
        preset("v3"), layout, schedules.schedule(name, 16, micro), 1, 4096, numbers, room=card.room
    )
    for need, kinds in zip(needs, expected, strict=True):
        assert need.bytes == {kind: size for kind, size in kinds.items() if size}


def test_messages_of_a_table_are_counted():
    """1F1B on 4 ranks: a rank in the middle passes each micro-batch on twice; both lanes of DualPipe do."""
    for name, micro, expected in (("1f1b", 6, 12), ("dualpipe", 8, 16), ("gpipe", 3, 6)):
        table = schedules.schedule(name, 4, micro)
        leaving = [computed._leaves(table, action) for action in computed.actions(table.steps[2])]
        assert sum(leaving) == expected, name


def test_incomplete_and_deadlocked_tables_are_refused():
    table = schedules.schedule("1f1b", 2, 2)
    lost = replace(table, steps=(table.steps[0][:-1], table.steps[1]))
    first, *rest = table.steps[1]
    turned = replace(table, steps=(table.steps[0], (*rest, first)))
    doubled = replace(table, steps=(table.steps[0], (*table.steps[1], Action("F", 1, 0))))
    for one in (lost, turned, doubled):
        with pytest.raises(UserError, match="1f1b on 2 ranks"):
            computed.checked_table(one)


@pytest.mark.parametrize(
    ("overrides", "cluster", "words"),
    [
        ((), "6xH100", ("8 ranks", "6")),
        (("model.n_routed_experts=15", "model.n_expert_groups=1", "model.n_limited_groups=1"), "8xH100",
         ("15 experts", "2 ranks")),
        (("layout.pp=8", "layout.ep=1", "layout.dp=1"), "8xH100", ("8 pipeline ranks", "5 layers")),
        (("pretrain.batch_rows=4", "layout.schedule=dualpipe"), "8xH100", ("4 rows", "micro-batches")),
    ],
)  # fmt: skip
def test_layouts_that_do_not_divide_are_refused(tmp_path, overrides, cluster, words):
    faults = computed.compute(small(tmp_path, *overrides), parse_cluster(cluster))["faults"]
    assert faults and all(word in faults[0] for word in words), faults


def test_updates_of_rl_may_have_fewer_rows_than_pipelines(tmp_path):
    """Two samples for four pipelines, each of which needs four micro-batches; the other way round nothing is said."""
    path = tmp_path / "rl.toml"
    path.write_text(SMALL.replace('"1f1b"', '"dualpipe"') + RL)
    for samples, words in ((2, ["2 of 4 pipelines without any"]), (16, [])):
        recipe = Recipe.load(path, [f"rl.samples={samples}"])
        *_, stage = computed.compute(recipe, parse_cluster("8xH100"))["stages"]
        notes = [note for note in stage["notes"] if "without any" in note]
        assert not stage["faults"] and len(notes) == len(words), stage
        assert all(word in note for word, note in zip(words, notes, strict=True))
        assert [one["micro_batches"] for one in stage["tables"]] == [4]


def test_a_network_too_large_names_ranks_excess_and_what_helps():
    faults = of_v3("pretrain", "256xH800", "layout.ep=16", "layout.dp=1")["faults"]
    assert all(word in faults[0] for word in ("ranks 0 to ", "do not fit", "exceed a card by", "ep = 32 saves")), faults


def test_checkpoint_sizes(tmp_path):
    (stage,) = computed.compute(small(tmp_path, "pretrain.ema_decay=0.9"), parse_cluster("8xH100"))["stages"]
    with torch.device("meta"):
        model = Transformer(preset("tiny"))
    n = sum(tensor.numel() for tensor in model.parameters()) + sum(
        gate.bias_E.numel() for gate in model.gates().values()
    )
    assert stage["checkpoint"] == {"state_bytes": 16 * n, "model_bytes": 2 * n}
    assert stage["memory"]["by_rank"][0]["gib"] * GIB > 0


def test_a_miniature_keeps_the_rules():
    """Attention, gate, groups and MTP are those of the network; every axis and its pairs are there."""
    for name in ("v3", "v2-lite", "moonlight", "tiny"):
        full = preset(name)
        cfg = miniature.shrunk(full)
        for key in ("score_func", "topk_method", "norm_topk_prob", "route_scale", "tie_embeddings", "limited", "yarn"):
            assert getattr(cfg, key) == getattr(full, key), (name, key)
        for key in ("q_lora_rank", "kv_lora_rank", "n_mtp", "n_dense_layers", "n_shared_experts"):
            assert bool(getattr(cfg, key)) == bool(getattr(full, key)), (name, key)
    networks, left_out = miniature.networks(certificate.part_of(Recipe.load(V3), "pretrain"), 2048, 4)
    (network,) = networks
    assert {group.axes for group in network.groups} == {
        ("pp", "ep"), ("pp", "dp"), ("ep", "dp"), ("ep", miniature.NODES)
    } and not left_out  # fmt: skip
    assert set(network.wanted) == {axis for group in network.groups for axis in group.axes}
    (network,), _ = miniature.networks(certificate.part_of(Recipe.load(V3), "pretrain"), 2048, 8)
    assert {group.layout.world for group in network.groups} == {8, 4}
    (network,), _ = miniature.networks(certificate.part_of(Recipe.load(V3), "pretrain"), 2048, 3)
    assert {group.axes for group in network.groups} == {("pp",), ("ep",), ("dp",)}, "two hops need four ranks"
    assert miniature.NODES in network.wanted


def test_both_schedules_of_a_ramp_are_in_the_miniature():
    group = miniature.RankGroup(miniature.Layout(pp=2), "auto", ("pp",))
    assert {schedules.of_step("auto", 2, n)[0] for n in miniature.micro_batches(group)} == {"1f1b", "dualpipe"}


def test_what_remains_follows_from_the_recipe(tmp_path):
    """FP8, node borders and engines appear where the recipe has them and nowhere else."""

    def lines(recipe, cluster):
        spec = parse_cluster(cluster)
        return "\n".join(unproved.remaining(recipe, spec, [], computed.compute(recipe, spec)))

    v3, tiny = lines(certificate.part_of(Recipe.load(V3), "pretrain"), "2048xH800"), lines(small(tmp_path), "8xH100")
    for word in ("FP8", "fabric", "moments in BF16", "pp 16"):
        assert word in v3 and word not in tiny, word
    assert "NCCL" in v3 and "NCCL" in tiny and "vllm" not in v3
    assert "vllm" in lines(Recipe.load(PAPER), "2048xH200")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("v3", "--cluster", "2048xH8"), ("no device", "H800")),
        (("v3", "--cluster", "many"), ("--cluster", "2048xH800")),
        (("v3", "--cluster", "0xH800"), ("at least one",)),
        (("v3",), ("--cluster",)),
        ((), ("recipe",)),
        (("v3", "--cluster", "2048xH800", "--until", "pretain"), ("--until", "pretrain")),
        (("no-such", "--cluster", "8xH100"), ("no-such",)),
        (("v3", "--cluster", "8xH100", "--processes", "9"), ("--processes",)),
        (("--check", "absent.json"), ("absent.json",)),
        (("--check", "absent.json", "--cluster", "8xH100"), ("--cluster",)),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = call("rehearse", *arguments)
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not [*tmp_path.iterdir()]


def test_a_refused_run_starts_no_process_and_writes_why(call, tmp_path, monkeypatch):
    """On cards that cannot hold it nothing is run; reasons come first, on the page too."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("rehearse", V3, "--cluster", "2048xH800")
    assert status == 1 and out.startswith("REFUSED") and "because" in out.splitlines()[1]
    facts = json.loads((tmp_path / "rehearsal-v3-2048xH800.json").read_text())
    html = (tmp_path / "rehearsal-v3-2048xH800.html").read_text()
    assert facts["run"] == [] and facts["reasons"] and "nothing was run" in facts["unproved"][0]
    kept = "pretrain extend-32k extend-128k pp ep dp xH800 cpu bessemer plan"  # and the planner's errors, quoted
    assert (
        untranslated(
            html,
            kept,
            torch.__version__,
            *facts["reasons"],
            facts["recipe"],
            *(str(value)[:12] for value in facts["hashes"].values()),
        )
        == []
    )
    assert html.index("REFUSED") < html.index("GiB") < html.index("remains unproved")
    status, out, _ = call("rehearse", "--check", tmp_path / "rehearsal-v3-2048xH800.json")
    assert status == 1 and "REFUSED" in out


@pytest.mark.parametrize(("changes", "word"), [({}, "shape"), ({"lora": "{ rank = 4 }"}, "objective")], ids=str)
def test_nothing_to_run_is_refused_with_its_reason(tmp_path, changes, word):
    """A model that nobody knows before it is downloaded, and adapters, which no miniature has."""
    known = "hf://Qwen/Qwen2.5-0.5B" if changes else "hf://someone/something"
    path = tmp_path / "foreign.toml"
    path.write_text(
        f'name = "foreign"\n[[stage]]\nkind = "import"\nname = "base"\nmodel = "{known}"\n[[stage]]\nkind = "rl"\n'
        f'name = "grpo"\nfrom = "base"\ntasks = ["arithmetic"]\n' + "".join(f"{k} = {v}\n" for k, v in changes.items())
    )
    facts = certificate.certify(str(path), [], parse_cluster("2xH100"), 4)
    assert facts["verdict"] == certificate.REFUSED and facts["run"] == []
    assert any("nothing was run" in reason and word in reason for reason in facts["reasons"]), facts["reasons"]


def written(tmp_path, **changes):
    """A certificate of `small.toml` as if its runs had passed."""
    recipe = small(tmp_path)
    spec = parse_cluster("8xH100")
    facts = {
        "format": certificate.FORMAT, "recipe": str(tmp_path / "small.toml"), "set": [], "until": None,
        "verdict": certificate.PASSED, "versions": {"torch": torch.__version__}, "name": "small",
        "hashes": {"recipe": certificate.recipe_hash(recipe), "code": certificate.code_hash()},
        "computed": computed.compute(recipe, spec), "cluster": "8xH100",
    } | changes  # fmt: skip
    path = tmp_path / "small.json"
    path.write_text(json.dumps(facts | {"digest": certificate.digest(facts)}))
    return path


def test_a_certificate_holds_until_recipe_or_code_change(call, tmp_path):
    path = written(tmp_path)
    assert certificate.check(path) == []
    status, out, _ = call("rehearse", "--check", path)
    assert status == 0 and out.startswith("yes")
    recipe = tmp_path / "small.toml"
    recipe.write_text("# a comment\n" + recipe.read_text())
    assert certificate.check(path) == [], "comments change nothing"
    moved = tmp_path / "other" / "moved.toml"
    moved.parent.mkdir()
    shutil.copy(recipe, moved)
    assert certificate.check(path, str(moved)) == [], "nor does its folder"
    recipe.write_text(recipe.read_text().replace('"1M"', '"2M"'))
    (why,) = certificate.check(path)
    assert "recipe" in why
    for changes, word in (
        ({"hashes": {"recipe": certificate.recipe_hash(Recipe.load(recipe)), "code": "0"}}, "code"),
        ({"versions": {"torch": "1.0"}, "hashes": {"recipe": certificate.recipe_hash(Recipe.load(recipe)),
                                                    "code": certificate.code_hash()}}, "torch"),
    ):  # fmt: skip
        recipe_text = recipe.read_text()
        path = written(tmp_path, **changes)
        recipe.write_text(recipe_text)
        assert any(word in why for why in certificate.check(path)), word


def test_an_edited_certificate_is_noticed(tmp_path):
    path = written(tmp_path, verdict=certificate.REFUSED)
    path.write_text(path.read_text().replace(certificate.REFUSED, certificate.PASSED))
    (why,) = certificate.check(path)
    assert "edited" in why


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "hashes": {}}', "\x00\xff"])
def test_other_files_are_no_certificates(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no rehearsal certificate"):
        certificate.check(path)


def test_plug_ins_of_a_recipe_are_hashed(tmp_path):
    text = (ROOT / "examples" / "plugins" / "plugins.toml").read_text()
    for file in (ROOT / "examples" / "plugins").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / file.name)
    (tmp_path / "plugins.toml").write_text(text)
    before = certificate.recipe_hash(Recipe.load(tmp_path / "plugins.toml"))
    (tmp_path / "rloo.py").write_text((tmp_path / "rloo.py").read_text() + "\n# changed\n")
    assert certificate.recipe_hash(Recipe.load(tmp_path / "plugins.toml")) != before


def test_too_little_memory_is_said_before_anything_starts():
    processes.check_memory(8, 0)
    processes.check_memory(4, 8 * 2**30)
    with pytest.raises(UserError, match=r"4 processes.*MiB.*--processes"):
        processes.check_memory(4, 2**29)


NO_NETWORK = """
import sys
from bessemer import cli
sys.argv = ["bessemer", "rehearse", "{recipe}", "--cluster", "8xH100", "--out", "{out}"]
cli.main()
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode != 0,
    reason="this system allows no network namespace of its own",
)
def test_no_port_on_the_loopback(tmp_path):
    """In a network namespace whose loopback is down no port can be had."""
    small(tmp_path)
    script = NO_NETWORK.format(recipe=tmp_path / "small.toml", out=tmp_path / "out")
    own = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", script], env=own, capture_output=True, text=True)
    assert done.returncode == 2 and "port" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_page_shows_every_part(tmp_path):
    """Also what a recipe names: its text cannot become markup."""
    facts = json.loads(written(tmp_path).read_text())
    facts |= {"recipe": "<b>.toml", "processes": 4, "reasons": ["a <reason>"], "run": [], "unproved": ["<rest>"],
              "bounds": {"losses": 1e-5, "gradients": 1e-4, "later": 1e-3}}  # fmt: skip
    facts["verdict"] = certificate.REFUSED
    html = page.document(facts)
    first = page.describe(facts | {"until": "sft"}).splitlines()[0]
    assert first.startswith("REFUSED") and "sft" in first
    assert "up to sft" in page.document(facts | {"until": "sft"})
    assert "<b>.toml" not in html and "a &lt;reason&gt;" in html and "&lt;rest&gt;" in html
    shown = re.sub(r'data-zh="[^"]*"', "", html)
    assert shown.index("a &lt;reason&gt;") < shown.index("What was run") < shown.index("What was computed")
