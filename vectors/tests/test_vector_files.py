"""The files say what the references compute, whole and in few bytes, and every case tells its rivals apart."""

import ast
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bessemer_vectors import files, load
from bessemer_vectors.compare import difference
from bessemer_vectors.topics import TOPICS
from bessemer_vectors.write import contents

PACKAGE = Path(files.__file__).parent


def test_the_files_are_written_again_byte_for_byte():
    for name, content in contents().items():
        assert (files.DATA / name).read_bytes() == content, f"{name}: run python -m bessemer_vectors.write"
    assert {path.name for path in files.DATA.iterdir()} == set(contents())


def test_log_probabilities_are_those_of_a_model():
    for topic in load().values():
        for case in topic.cases:
            for name, value in case.inputs.items():
                assert "logprobs" not in name or value.max() <= -0.01, (topic.name, case.name)


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in files.DATA.iterdir()) < 1_500_000


def test_arrays_have_the_stated_types_and_shapes():
    kinds = {"float": "f", "int": "i", "bool": "b"}
    for name, topic in load().items():
        stated = {value.name: value for value in (*TOPICS[name].inputs, *TOPICS[name].outputs)}
        for case in topic.cases:
            assert case.inputs.keys() == {value.name for value in TOPICS[name].inputs}
            assert case.expected.keys() <= {value.name for value in TOPICS[name].outputs}
            for own, value in (case.inputs | case.expected).items():
                if stated[own].shape:
                    assert isinstance(value, np.ndarray), (name, own)
                    assert value.dtype.kind == kinds[stated[own].type], (name, own)
                    assert value.ndim == len(stated[own].shape.split(",")) or "or" in stated[own].meaning
                elif stated[own].type in kinds:
                    assert isinstance(value, {"float": float, "int": int, "bool": bool}[stated[own].type]), (name, own)


def test_every_rival_differs_far_beyond_the_tolerance():
    for topic in load().values():
        for case in topic.cases:
            for rival in case.rivals:
                gaps = [difference(value, case.expected[own]).relative for own, value in rival.expected.items()]
                assert max(gaps) > 20 * topic.tolerance, (topic.name, case.name, rival.name)


def test_every_topic_with_a_known_bug_names_it():
    """The silent bugs of RL and MoE code that were found late."""
    sources = " ".join(rival.source for topic in load().values() for case in topic.cases for rival in case.rivals)
    for thread in (
        "trl#6439", "trl#5815", "open-instruct#1137", "prime-rl#600", "Search-R1#88", "slime#1918", "RAGEN#58",
        "RL#3792", "RL#3791", "gem#113", "AgileRL#590", "lm-evaluation-harness#3353", "lighteval#771",
    ):  # fmt: skip
        assert thread in sources, thread


@pytest.mark.parametrize("damage", ["a digit", "a missing file", "another hash", "another format", "no JSON"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    shutil.copytree(files.DATA, tmp_path, dirs_exist_ok=True)
    gate, index = tmp_path / "gate.json", tmp_path / files.INDEX
    if damage == "a digit":
        gate.write_text(gate.read_text().replace("2.5", "2.4", 1))
    elif damage == "a missing file":
        gate.unlink()
    elif damage == "another hash":
        index.write_text(index.read_text().replace(json.loads(index.read_text())["sha256"], "0" * 64))
    elif damage == "another format":
        index.write_text(index.read_text().replace(files.FORMAT, "bessemer-vectors/0"))
    else:
        gate.write_text("{")
    with pytest.raises(ValueError, match=r"(gate|index)\.json"):
        load(tmp_path)


def test_floats_and_infinities_survive():
    values = np.array([0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf])
    again = files.decode(json.loads(files.text(files.encode(values))))
    assert again.tobytes() == values.tobytes()


def test_the_package_imports_numpy_and_itself_alone():
    allowed = {"numpy", "bessemer_vectors", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path
