"""The command on good adapters and bad ones: a table, one line per fault, never a traceback."""

import json

import pytest

from bessemer_vectors import check, load
from bessemer_vectors.cli import main
from bessemer_vectors.reference import FUNCTIONS
from bessemer_vectors.runner import AGREES, DIFFERS, FAILED, NOT_OFFERED


@pytest.fixture
def adapter(tmp_path):
    """adapter(source) -> the path of a file with it."""

    def made(source):
        path = tmp_path / "adapter.py"
        path.write_text(source)
        return path

    return made


def outcomes(report):
    return {result.outcome for entry in report.topics for result in entry.results}


def test_the_references_agree_everywhere():
    report = check(type("References", (), {name: staticmethod(function) for name, function in FUNCTIONS.items()}))
    assert outcomes(report) == {AGREES}
    assert all(entry.largest() == 0.0 for entry in report.topics)


def test_a_table_names_the_rival(adapter, capsys, tmp_path):
    path = adapter(
        "NAME = 'mean of means 1.0'\n"
        "from bessemer_vectors.cases.rl import mean_of_means as loss_weights\n"
        "from bessemer_vectors.reference.rl import loss_mask\n"
    )
    assert main(["run", str(path), "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("mean of means 1.0")
    assert "gives the value of: mean of micro-batch means" in out and "allenai/open-instruct#1137" in out
    found = json.loads((tmp_path / "out.json").read_text())["topics"]
    assert {case["outcome"] for case in found["loss_mask"]["cases"].values()} == {AGREES}
    weights = found["loss_weights"]["cases"]
    assert weights["tokens, two micro-batches"]["outcome"] == DIFFERS
    assert weights["tokens, one micro-batch"]["outcome"] == AGREES
    assert {case["outcome"] for case in found["gate"]["cases"].values()} == {NOT_OFFERED}


def test_a_difference_that_no_rival_explains(adapter, capsys):
    path = adapter("def overlong_penalty(lengths, **rest):\n    return [0.5] * len(lengths)\n")
    assert main(["run", str(path), "--only", "overlong_penalty"]) == 1
    assert "no rival" in capsys.readouterr().out


FAULTS = {
    "raises": ("raise RuntimeError('a\\nb')", "RuntimeError: a b"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "shape": ("return {'loss': 0.0, 'gradient': [0.0]}", "shape"),
    "nan": ("return {'loss': float('nan')}", "NaN"),
    "none": ("return None", "None"),
    "text": ("return {'loss': 'much'}", "'much'"),
    "other output": ("return {'loss': 0.0, 'value': 1.0}", "'value'"),
    "bare value": ("return 0.5", "dict"),
    "ragged": ("return {'gradient': [[1.0], [1.0, 2.0], [3.0]]}", "shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(adapter, capsys, fault):
    body, word = FAULTS[fault]
    path = adapter(f"def policy_loss(**inputs):\n    {body}\n")
    assert main(["run", str(path), "--only", "policy_loss"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("policy_loss, ")]
    assert len(lines) == 1 and word in lines[0] and "failed" in lines[0]
    assert "Traceback" not in captured.out + captured.err


def test_an_object_that_cannot_be_read_is_a_fault(adapter, capsys):
    source = "class Odd:\n    def tolist(self):\n        raise OSError('gone')\ndef sequence_ratio(**inputs):\n"
    assert main(["run", str(adapter(source + "    return Odd()\n")), "--only", "sequence_ratio"]) == 1
    assert "OSError: gone" in capsys.readouterr().out


def test_a_convention_that_is_not_offered_says_why(adapter, capsys):
    path = adapter(
        "from bessemer_vectors.reference import rl\n"
        "def group_advantages(std, **inputs):\n"
        "    if std == 'sample':\n"
        "        raise NotImplementedError('only the population std')\n"
        "    return rl.group_advantages(std=std, **inputs)\n"
    )
    assert main(["run", str(path), "--only", "group_advantages"]) == 0
    assert "not offered: only the population std" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "nowhere.py"], "nowhere.py"),
        (["run", "{}", "--only", "gates"], "gates"),
        (["run", "{}", "--large", "--only", "mla2"], "mla2"),
        (["run", "{}", "--json", "/nonexistent/out.json"], "/nonexistent/out.json"),
        (["list", "gates"], "gates"),
    ],
)
def test_wrong_arguments_are_one_line(adapter, capsys, arguments, word):
    path = adapter("")
    assert main([str(path) if argument == "{}" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("source", ["import torch_is_not_here", "def broken(:", "raise SystemExit('bye')", "1 / 0"])
def test_an_adapter_that_cannot_be_loaded_is_one_line(adapter, capsys, source):
    assert main(["run", str(adapter(source))]) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded" in error and len(error.splitlines()) == 1


def test_an_adapter_may_change_its_inputs(adapter):
    path = adapter(
        "from bessemer_vectors.reference import rl\n"
        "def sequence_ratio(**inputs):\n"
        "    result = rl.sequence_ratio(**inputs)\n"
        "    inputs['logprobs'][:] = 0\n"
        "    return result\n"
    )
    topics = load()
    for _ in range(2):
        assert outcomes(check(path, ["sequence_ratio"], topics)) == {AGREES}


def test_a_neighbour_of_the_adapter_can_be_imported(adapter, tmp_path):
    (tmp_path / "vector_neighbour.py").write_text("from bessemer_vectors.reference.rl import loss_mask\n")
    assert outcomes(check(adapter("from vector_neighbour import loss_mask\n"), ["loss_mask"])) == {AGREES}


def test_part_of_the_outputs_is_compared(adapter):
    path = adapter(
        "from bessemer_vectors.reference import rl\n"
        "def policy_loss(**inputs):\n"
        "    return {'loss': rl.policy_loss(**inputs)['loss']}\n"
    )
    report = check(path, ["policy_loss"])
    assert {result.compared for result in report.topics[0].results} == {("loss",)}


@pytest.mark.parametrize(
    ("actions", "outcome"),
    [
        ("[[[['F', 0, 0, 0]]], 7]", FAILED),
        ("[]", FAILED),
        ("[[] for _ in range(inputs['ranks'])]", DIFFERS),
    ],
)
def test_a_table_that_is_none_or_incomplete(adapter, actions, outcome):
    report = check(adapter(f"def pipeline_table(**inputs):\n    return {{'actions': {actions}}}\n"), ["pipeline_table"])
    assert outcomes(report) == {outcome}


def test_a_deadlock_is_seen(adapter):
    """Two ranks whose first steps wait for each other."""
    path = adapter(
        "from bessemer_vectors.reference.pipelines import pipeline_table as right\n"
        "def pipeline_table(**inputs):\n"
        "    actions = right(**inputs).get('actions')\n"
        "    if actions is None:\n"
        "        raise NotImplementedError('no zbv')\n"
        "    return {'actions': [list(reversed(rank)) for rank in actions]}\n"
    )
    report = check(path, ["pipeline_table"])
    assert report.count(DIFFERS) == len(report.topics[0].results) - 1 and all(
        "deadlock_free" in result.text for result in report.topics[0].results if result.outcome == DIFFERS
    )


def test_list_and_hash(capsys):
    assert main(["list"]) == 0 and main(["list", "gate"]) == 0 and main(["hash"]) == 0
    out = capsys.readouterr().out
    assert "kept_groups" in out and "rival" in out
    assert len(out.splitlines()[-1]) == 64
