"""metrics.jsonl survives kills and can be rewound to a step."""

import json

import pytest

from bessemer.errors import UserError
from bessemer.runs.metrics import LineFile, Metrics, Smoothed, StageMetrics, plain, read_lines


def test_lines_are_plain_json_and_on_disk_at_once(tmp_path):
    values = {"rl/reward": 0.5, "bad": float("inf"), "moe/load/1": (1.0, float("nan"))}
    StageMetrics(Metrics(tmp_path / "metrics.jsonl"), "zero").write(3, 300, values)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())  # readable before it is closed
    assert line["stage"] == "zero" and line["step"] == 3 and line["tokens"] == 300 and line["time"] > 1e9
    assert line["values"] == {"rl/reward": 0.5, "bad": None, "moe/load/1": [1.0, None]}


def test_tensors_become_numbers():
    numpy = pytest.importorskip("numpy")
    values = {"a": numpy.float32(0.5), "b": numpy.arange(3), "c": numpy.array(float("nan"))}
    assert plain(values) == {"a": 0.5, "b": [0, 1, 2], "c": None}


@pytest.mark.parametrize("torn", [b'{"a":', b"x" * 200_000, b""])
def test_a_torn_last_line_is_cut_on_opening(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n' + torn)
    assert [line["a"] for line in read_lines(path)] == [1, 2]  # readers of a growing file tolerate it too
    LineFile(path).append({"a": 3})
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n'


def test_only_a_torn_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a"')
    LineFile(path).append({"a": 1})
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a":1}\noops\n{"a":3}\n')
    with pytest.raises(UserError, match=r"lines.jsonl:2"):
        list(read_lines(path))


def test_rewind_forgets_one_stage_after_a_step_and_writing_continues(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for stage in ("one", "two"):
        for step in range(4):
            metrics.write(stage, step, 0, {})
    assert [line["step"] for line in metrics.rewind("two", 1)] == [2, 3]
    metrics.write("two", 2, 0, {})
    kept = [(line["stage"], line["step"]) for line in metrics.lines()]
    assert kept == [("one", 0), ("one", 1), ("one", 2), ("one", 3), ("two", 0), ("two", 1), ("two", 2)]
    metrics.rewind("one", -1)
    assert {line["stage"] for line in metrics.lines()} == {"two"}


def test_model_output_cannot_break_a_line(tmp_path):
    file = LineFile(tmp_path / "rollouts.jsonl")
    hostile = 'a\nb\u2028c\x00"}\ud800\u85cf'
    file.append({"completion": hostile})
    assert next(read_lines(tmp_path / "rollouts.jsonl"))["completion"] == hostile.replace("\ud800", "?")


def test_a_smoothed_value_is_not_biased_to_its_start():
    smooth = Smoothed(decay=0.9)
    assert [smooth(3.0), smooth(3.0)] == [pytest.approx(3.0)] * 2, "without correction it would begin at 0.3"
    weights = [0.9**3, 0.9**2, 0.9, 1.0]
    smooth = Smoothed(decay=0.9)
    last = [smooth(value) for value in (4.0, 1.0, 2.0, 5.0)][-1]
    assert last == pytest.approx(sum(w * v for w, v in zip(weights, (4, 1, 2, 5), strict=True)) / sum(weights))
