"""A file's split: held out by a hash, or the whole file for training or evaluation. General prompts from a file."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.errors import UserError
from bessemer.tasks import get
from bessemer.tasks.registry import shared_file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "maths.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n}+{n}?", "answer": 2 * n}) + "\n" for n in range(60)))
    return path


def prompts(task, split):
    return {task.problem(split, n).prompt for n in range(task.size(split))}


def test_a_whole_file_is_all_training_or_all_evaluation(file):
    hashed, train, test = (get(f"jsonl:{file}{mark}") for mark in ("", "@train", "@test"))
    assert 0 < hashed.size("test") < 20 and hashed.size("train") + hashed.size("test") == 60
    assert (train.size("train"), train.size("test")) == (60, 0)
    assert (test.size("train"), test.size("test")) == (0, 60)
    assert prompts(train, "train") == prompts(test, "test") == prompts(hashed, "train") | prompts(hashed, "test")
    with pytest.raises(UserError, match="has no test problem"):
        train.problem("test", 0)
    with pytest.raises(UserError, match=r"directory.*leave out @test"):
        (file.parent / "train.jsonl").write_text(file.read_text())
        get(f"jsonl:{file.parent}@test")


def test_choices_may_be_shuffled_too(tmp_path):
    path = tmp_path / "stem.jsonl"
    path.write_text(json.dumps({"question": "Which is a gas?", "choices": ["Fe", "Ne", "Cu"], "answer": "B"}) + "\n")
    for name in (f"choice:{path}@test@shuffle", f"choice:{path}@shuffle@test"):
        task = get(name)
        assert (task.size("train"), task.size("test"), task.shuffle) == (0, 1, True)
        assert shared_file(name, f"choice:{path}@train") == str(path)


def test_a_file_that_two_tasks_share(file):
    name = f"jsonl:{file}"
    assert shared_file(f"{name}@train", f"{name}@test") == str(file)
    assert shared_file(name, f"{name}@test") == shared_file(f"{name}@train", name) == str(file)
    assert shared_file(name, name) is None, "a hash splits it"
    assert shared_file(f"{name}@train", "jsonl:other.jsonl@test") is None
    assert shared_file("gym:chain_sum@1", "gym:chain_sum@1") is None and shared_file("logic", "logic") is None


def test_general_prompts_of_a_file(tmp_path):
    path = tmp_path / "general.jsonl"
    lines = [{"prompt": "Name a colour.", "aim": "helpful", "reference": "Blue."}, {"prompt": "你好", "aim": "helpful"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = get(f"general:{path}@train")
    assert task.judged_by == {"helpful"} and task.languages == ("en", "zh")
    by_prompt = {(problem := task.problem("train", n)).prompt: problem for n in range(2)}
    first, chinese = by_prompt["Name a colour."], by_prompt["你好"]
    assert first.meta["reference"] == "Blue." and "reference" not in chinese.meta and chinese.language == "zh"
    verdict = task.verify(first, "<think>sky</think>\n\nBlue.")
    assert (verdict.correct, verdict.formatted, verdict.reason, verdict.answer) == (False, True, "unjudged", "Blue.")
    assert task.verify(first, "<think>sky").reason == "no-answer"
    path.write_text(path.read_text() + json.dumps({"prompt": "Insult me.", "aim": "harmless"}) + "\n")
    assert get(f"general:{path}").judged_by == {"helpful", "harmless"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"prompt": "hi", "aim": "kind"}, "line 2: the aim is 'kind', not helpful or harmless. Its fields are"),
        ({"question": "1+1?", "answer": "2"}, 'line 2: the aim is None, .* a line of general:PATH is {"prompt"'),
        ({"prompt": "hi", "aim": "helpful", "reference": 3}, "line 2: no text under 'reference'"),
    ],
)
def test_a_line_that_is_not_a_general_prompt_is_an_error(tmp_path, line, fault):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ({"prompt": "hi", "aim": "helpful"}, line)))
    with pytest.raises(UserError, match=fault):
        get(f"general:{path}")


def test_prompt_only_data_sets(tmp_path):
    """TRL's form, as text or message, in JSONL or parquet, gives the same problems. Their aim is "helpful"."""
    prompts = [f"Name colour {n}." for n in range(5)]
    rows = [{"prompt": [{"role": "user", "content": text}] if n % 2 else text} for n, text in enumerate(prompts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [
        {"prompt": [{"role": "user", "content": text}], "id": n, "reference": None} for n, text in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train.parquet", row_group_size=2)
    for path in (tmp_path / "a.jsonl", tmp_path):
        task = get(f"general:{path}" + ("@train" if path.is_file() else ""))
        problems = [task.problem("train", n) for n in range(5)]
        assert sorted(row.prompt for row in problems) == prompts
        assert {row.meta["aim"] for row in problems} == {"helpful"} and task.judged_by == {"helpful"}
    assert {row.id for row in problems} == {f"general:{tmp_path}/train/{n}" for n in range(5)}
    for fault, prompt in (
        ("line 1: a task asks one question, so its list must hold one user message", records[0]["prompt"] * 2),
        ("line 1: a task asks one question", [{"role": "assistant", "content": "x"}]),
        ("line 1: no text under 'question' or", [{"role": "user", "content": ["x"]}]),
    ):
        (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        with pytest.raises(UserError, match=fault):
            get(f"general:{tmp_path / 'b.jsonl'}")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.parquet .*not a readable"):
        get(f"general:{tmp_path / 'c.parquet'}")
