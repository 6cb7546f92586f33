"""Expert loads from a real engine's records, their moving average and file, and the report on them."""

import json
import re

import numpy as np
import pytest
import torch

from bessemer.addons.distributed import expert_placement as placement
from bessemer.addons.distributed.expert_placement import ExpertLoads, expert_counts
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer

OPTIONS = dict(max_new_tokens=12, seed=4, record_routing=True)


def records(engine, prompts, **more):
    return [c.routing for group in engine.generate(prompts, **OPTIONS, **more) for c in group]


def test_counts_match_the_gates_of_the_plain_model(engine, prompts):
    """The trainer's own counters see the same tokens; only two scores closer than 1e-6 may swap places."""
    model, cfg = engine.model, engine.model.cfg
    groups = engine.generate(prompts, samples=2, **OPTIONS)
    loads = ExpertLoads(cfg.n_layers - cfg.n_dense_layers, cfg.n_routed_experts)
    loads.add(c.routing for group in groups for c in group)
    model.train()
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group:
            model(torch.tensor([[*prompt, *c.tokens[:-1]]]))
    gates = [layer.ffn.gate for layer in model.layers if not layer.dense]
    expected_LE = np.stack([gate.load_E.numpy() for gate in gates])
    assert loads.tokens == sum(
        len(p) + len(c.tokens) - 1 for p, group in zip(prompts, groups, strict=True) for c in group
    )
    assert loads.estimate().sum() == expected_LE.sum() == loads.tokens * len(gates) * cfg.n_activated_experts
    assert np.abs(loads.estimate() - expected_LE).sum() <= 0.002 * expected_LE.sum()
    assert len({tuple(row) for row in expected_LE}) > 1, "the layers differ, so their order is tested"


def test_counts_by_hand():
    record = torch.tensor([[[0, 2], [1, 2]], [[0, 1], [2, 0]], [[2, 0], [2, 1]]], dtype=torch.uint8)
    assert expert_counts(record, 2, 4).tolist() == [[3, 1, 2, 0], [1, 2, 3, 0]]
    assert expert_counts(torch.full((1, 1, 1), 255, dtype=torch.uint8), 1, 256)[0, 255] == 1


@pytest.mark.parametrize("decay", [0, 0.5, 0.9, 1])
def test_the_average_weighs_the_newest_most(decay):
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(5, (n, 2, 3), generator=generator) for n in (4, 9, 2)]
    loads = ExpertLoads(2, 5, decay=decay)
    for window in windows:
        loads.add(window)
        loads.add([])  # no completions, no window
    weights = [decay**2, decay, 1]
    expected_LE = sum(w * expert_counts(window, 2, 5) for w, window in zip(weights, windows, strict=True)) / sum(
        weights
    )
    assert np.allclose(loads.estimate(), expected_LE, rtol=1e-12)
    assert (loads.windows, loads.tokens) == (3, 15)


def test_a_file_continues_as_if_uninterrupted(tmp_path):
    generator = torch.Generator().manual_seed(2)
    one, two, three = (torch.randint(6, (7, 3, 2), generator=generator) for _ in range(3))
    loads = ExpertLoads(3, 6, decay=0.7)
    loads.add(one)
    loads.add([two, two[:3]])
    loads.save(tmp_path / "loads.json")
    loaded = ExpertLoads.load(tmp_path / "loads.json")
    for record in (loads, loaded):
        record.add(three)
    assert np.array_equal(loaded.estimate(), loads.estimate())
    assert (loaded.windows, loaded.tokens, loaded.decay) == (3, 24, 0.7)
    assert [path.name for path in tmp_path.iterdir()] == ["loads.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a file of expert loads"),
        ({"decay": 1.5}, '"decay" is 1.5'),
        ({"decay": None}, '"decay" is None'),
        ({"windows": -1}, '"windows" is -1'),
        ({"tokens": True}, '"tokens" is True'),
        ({"load": [[1.0, 2.0], [1.0]]}, '"load" is not a table'),
        ({"load": [[1.0, float("nan")]]}, '"load" is not a table'),
        ({"load": [[1.0, -1.0]]}, '"load" is not a table'),
        ({"load": [["x"]]}, '"load" is not a table'),
        ({"load": []}, '"load" is not a table'),
    ],
)
def test_a_corrupt_file_is_refused(tmp_path, change, message):
    path = tmp_path / "loads.json"
    ExpertLoads(1, 2).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)):
        ExpertLoads.load(path)


def test_malformed_records_are_refused(tmp_path):
    loads = ExpertLoads(2, 4)
    for wrong in (torch.zeros(3, 1, 2, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, 2, 2)):
        with pytest.raises(UserError, match="an engine with the same model"):
            loads.add(wrong)
    with pytest.raises(UserError, match="experts 0 to 4, but the model has 4"):
        loads.add([torch.zeros(1, 2, 1, dtype=torch.uint8), torch.tensor([[[0], [4]]])])
    with pytest.raises(UserError, match="record_routing=True"):
        loads.add([None])
    with pytest.raises(UserError, match="the loads are unknown"):
        loads.estimate()  # a refused window leaves no trace
    with pytest.raises(UserError, match="decay"):
        ExpertLoads(2, 4, decay=1.1)
    (tmp_path / "no.json").write_text("{")
    for path, message in ((tmp_path / "none", "cannot read"), (tmp_path / "no.json", "is not JSON")):
        with pytest.raises(UserError, match=message):
            ExpertLoads.load(path)
    with pytest.raises(UserError, match="cannot write"):
        loads.save(tmp_path / "none" / "loads.json")


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_report_places_by_the_past_and_judges_on_what_comes_next(folder, engine, prompts, tmp_path):
    """Recomputes every figure from the engine's records, with plain loops."""
    file = tmp_path / "loads.json"
    sizes = dict(replicas=20, gpus=4, nodes=2, windows=2, max_new_tokens=12, seed=4)
    facts = json.loads(json.dumps(placement.report(folder, prompts=prompts, loads_file=file, **sizes)))
    seen, last = (sum(expert_counts(r, 2, 16) for r in records(engine, prompts[first::2])) for first in (0, 1))
    assert (facts["policy"], facts["groups"], facts["windows"]) == ("hierarchical", engine.model.cfg.n_expert_groups, 1)
    assert [layer["layer"] for layer in facts["layers"]] == [1, 2]
    for n, layer in enumerate(facts["layers"]):
        assert layer["load"] == seen[n].tolist()
        for key, load_E in (("placed", last[n]), ("fitted", seen[n])):
            gpu = [sum(load_E[e] / layer["count"][e] for e in experts) for experts in layer["gpus"]]
            assert layer[key] == pytest.approx(max(gpu) / (sum(gpu) / 4))
        assert layer["naive"] == pytest.approx(
            max(last[n][g * 4 : g * 4 + 4].sum() for g in range(4)) * 4 / last[n].sum()
        )
    assert np.mean([layer["fitted"] for layer in facts["layers"]]) < np.mean(
        [layer["naive"] for layer in facts["layers"]]
    )
    assert np.allclose(ExpertLoads.load(file).estimate(), (0.9 * seen + last) / 1.9), "the last window is kept too"

    text = placement.describe(facts)
    first = facts["layers"][0]
    assert f"    1   {first['naive']:18.3f}   {first['placed']:6.3f}   {first['fitted']:6.3f}" in text.splitlines()
    cells = text.splitlines()[-2].removeprefix("layer 1: ").replace("||", "|").split(" | ")
    assert [[int(e) for e in gpu.split()] for gpu in cells] == first["gpus"] and text.count("||") == 1 + 2

    later = placement.report(
        folder, prompts=[prompts[0]], loads_file=file, **sizes | {"windows": 1, "gpus": 5, "nodes": 5}
    )
    assert later["policy"] == "global" and later["windows"] == 2 and ExpertLoads.load(file).windows == 3
    assert "5 nodes do not divide 4 expert groups" in placement.describe(later)


def test_report_asks_tasks_and_says_what_it_cannot_do(folder, cfg, tokenizer, prompts, tmp_path):
    sizes = dict(replicas=16, gpus=2, max_new_tokens=2)
    facts = placement.report(folder, names=["countdown"], problems=2, windows=2, **sizes)
    assert "one node" in placement.describe(facts) and facts["judged_on_tokens"] > 20
    ExpertLoads(7, 16).save(tmp_path / "other.json")
    for change, message in (
        (dict(prompts=prompts[:3], replicas=17), "not a multiple of 2 GPUs"),  # sizes first: checking is free
        (dict(prompts=prompts[:3]), "3 prompts do not fill 4 windows"),
        (dict(prompts=prompts, windows=1), "windows must be at least 2"),
        (dict(names=["countdwon"]), "countdown"),
        (dict(prompts=prompts, loads_file=tmp_path / "other.json"), "loads of 7 layers and 16 experts"),
        (dict(prompts=prompts, loads_file=tmp_path / "none" / "loads.json"), "folder does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            placement.report(folder, **sizes | change)
    Transformer(cfg.model_copy(update={"n_dense_layers": 3, "n_mtp": 0})).initialise(0).save(tmp_path / "dense")
    tokenizer.save(tmp_path / "dense")
    with pytest.raises(UserError, match="no layer of this model has routed experts"):
        placement.report(tmp_path / "dense", prompts=prompts, **sizes)
