"""Problems from files: what all families share, multiple choice, puzzles, and quantities."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.addons.tasks import checked
from bessemer.addons.tasks.files import LineIndex
from bessemer.addons.tasks.maths import Maths
from bessemer.addons.tasks.maths_questions import parse_quantity
from bessemer.errors import UserError
from bessemer.tasks import get

LINES = {
    "jsonl": {"problem": "Compute it.", "answer": "2"},
    "gsm8k": {"question": "What is 2+2?", "answer": "2+2=4\n#### 4"},
    "choice": {"question": "Which?", "choices": ["O", "Ne", "N", "H"], "answer": "B"},
    "puzzle": {"question": "Who?", "answer": {"oldest": "Ann"}},
    "code": {"prompt": "Add.", "tests": [{"input": "3 4\n", "output": "7\n"}]},
}
FAMILIES = list(LINES)


@pytest.fixture
def file(tmp_path):
    def write(*lines, name="some.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return path

    return write


def first(task):
    return task.problem("train" if task.size("train") else "test", 0)


# ---- shared by all families


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ([b"\xff\xfe{}"], "line 2 is not UTF-8 text.*not compressed"),
        ([b'{"question": '], "line 2: not JSON"),
        ([b"[1]"], "line 2: a list; a line of {family}:PATH is {{"),
        ([{"chosen": "a", "rejected": "b"}], r"line 2: no text under .*Its fields are 'chosen', 'rejected'; a line of"),
        ([{"language": "fr"}], "line 2: the language 'fr' is not known"),
        ([{"id": 7}, {}, {"id": "7"}], "line 4: the id '7' is also that of line 2"),
    ],
)
def test_every_family_names_a_broken_line(file, family, lines, hint):
    good = LINES[family]
    rows = [good | line if isinstance(line, dict) and "chosen" not in line else line for line in lines]
    with pytest.raises(UserError, match=hint.format(family=family)):
        get(f"{family}:{file(good, *rows)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_names_the_family_of_a_file(file, family):
    for other, line in LINES.items():
        if other in ("code", "choice") and other != family:
            with pytest.raises(UserError, match=f"line 1: the field '.*' belongs to {other}:PATH"):
                get(f"{family}:{file(line)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_is_missing_or_holds_nothing(file, tmp_path, family):
    with pytest.raises(UserError, match=f"there is no file .*write {family}:PATH"):
        get(f"{family}:{tmp_path}/absent")
    with pytest.raises(UserError, match=r"neither train\.jsonl nor test\.jsonl"):
        get(f"{family}:{tmp_path}")
    with pytest.raises(UserError, match=f"contains no problem; a line of {family}:PATH is"):
        get(f"{family}:{file(b'', b'  ')}")


def test_a_file_with_a_mark_and_blank_lines_is_read_in_place(file):
    path = file(b"\xef\xbb\xbf" + json.dumps(LINES["jsonl"]).encode(), b"", {"problem": "Größe?", "answer": "3"}, b"")
    task = get(f"jsonl:{path}")
    problems = [task.problem(split, i) for split in ("train", "test") for i in range(task.size(split))]
    assert {(p.prompt, p.meta["line"], p.meta["gold"]) for p in problems} == {
        ("Compute it.", 1, "2"),
        ("Größe?", 3, "3"),
    }


@pytest.mark.parametrize("name", ["a.JSONL@test", "a.PARQUET@test", "TEST.JSONL", "test.Parquet"])
def test_a_suffix_may_have_capitals(file, tmp_path, name):
    path, _, split = name.partition("@")
    line = {"question": "What is one plus one?", "answer": "2"}
    if path.lower().endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([line]), tmp_path / path)
    else:
        file(line, name=path)
    task = get(f"jsonl:{tmp_path}" + (f"/{name}" if split else ""))
    assert (task.size("train"), task.size("test")) == (0, 1) and first(task).prompt == line["question"]


def test_a_file_that_changes_while_it_is_used(file):
    lines = [{"question": f"Q{n}?", "answer": str(n)} for n in range(9)]
    task = get(f"jsonl:{file(*lines)}")
    file(*lines[::-1])
    with pytest.raises(UserError, match="has changed"):
        [task.problem("train", n) for n in range(task.size("train"))]


def test_little_of_a_file_stays_in_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as out:
        for n in range(3000):
            tests = [{"input": "1 2 3 4\n" * 100, "output": str(n)}]
            out.write(json.dumps({"prompt": f"Statement {n}. " * 20, "tests": tests, "id": n}) + "\n")
    assert path.stat().st_size > 3_000_000
    tracemalloc.start()
    task = get(f"code:{path}")
    bytes_kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes_kept < 200_000 and task.size("train") + task.size("test") == 3000
    assert isinstance(task.files["train"], LineIndex) and task.files["train"] is task.files["test"]


# ---- multiple choice


@pytest.mark.parametrize(
    ("line", "gold"),
    [
        ({"answer": "C"}, "N"),
        ({"answer": 2}, "N"),
        ({"answer": "N"}, "N"),
        ({"choices": ["B", "A"], "answer": "A"}, "B"),
        ({"choices": {"A": "O", "B": "Ne"}, "answer": "B"}, "Ne"),
        ({"choices": {"label": ["1", "2"], "text": ["O", "Ne"]}, "answer": None, "answerKey": "2"}, "Ne"),
        ({"choices": None, "options": ["O", "Ne"], "answer": "A"}, "O"),
    ],
)
def test_the_right_choice_is_read_in_every_form(file, line, gold):
    line = {k: v for k, v in (LINES["choice"] | line).items() if v is not None}
    meta = first(get(f"choice:{file(line)}")).meta
    assert meta["choices"]["ABCD".index(meta["gold"])] == gold


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ({"answer": "E"}, "the answer 'E' names no choice"),
        ({"answer": 4}, "the answer 4 names no choice"),
        ({"answer": True}, "the answer True names no choice"),
        ({"choices": ["O"]}, "no list of 2 to 26 choices"),
        ({"choices": ["O", " "]}, "a choice is empty"),
        ({"choices": ["O", "O "], "answer": "O"}, "names more than one choice"),
        ({"choices": "O, Ne"}, "no list of 2 to 26 choices"),
        ({"choices": {"label": 5, "text": ["O", "Ne"]}, "answer": "C"}, "names no choice"),
    ],
)
def test_a_choice_that_cannot_be_read(file, line, hint):
    with pytest.raises(UserError, match="line 1: .*" + hint):
        get(f"choice:{file(LINES['choice'] | line)}")


@pytest.mark.parametrize(
    ("answer", "reason", "letter"),
    [
        ("B", "correct", "B"),
        ("(B)", "correct", "B"),
        ("b.", "correct", "B"),
        ("\\boxed{B}", "correct", "B"),
        ("\\boxed{\\text{B}}", "correct", "B"),
        ("B) Ne", "correct", "B"),
        ("\\boxed{\\mathrm{B}}", "correct", "B"),
        ("**B**", "correct", "B"),
        ("`B`", "correct", "B"),
        ("（B）", "correct", "B"),
        ("答案：B。", "correct", "B"),
        ("B is the noble gas", "correct", "B"),
        ("答案：A。", "wrong-value", "A"),
        ("A", "wrong-value", "A"),
        ("B) O", "unparsable", None),
        ("E", "unparsable", None),
        ("A or B", "unparsable", None),
        ("B\nA", "unparsable", None),
        ("AB", "unparsable", None),
        ("Ne", "unparsable", None),
        ("B is incorrect", "unparsable", None),
        ("B is clearly wrong", "unparsable", None),
        ("B isn't right", "unparsable", None),
        ("Ｂ", "unparsable", None),
        ("B " * 9999, "unparsable", None),
    ],
)
def test_letters(file, answer, reason, letter):
    task = get(f"choice:{file(LINES['choice'])}")
    assert task.grade(first(task), answer) == (reason, letter)


def test_choices_are_shuffled_by_the_question_alone(file):
    lines = [LINES["choice"] | {"question": f"Which, in case {n}?"} for n in range(200)]
    path = file(*lines)
    plain, shuffled = get(f"choice:{path}"), get(f"choice:{path}@shuffle")
    assert "A) O\nB) Ne\nC) N\nD) H\n" in first(plain).prompt and first(plain).meta["gold"] == "B"
    problems = [shuffled.problem("train", n, seed=1) for n in range(shuffled.size("train"))]
    golds = [p.meta["gold"] for p in problems]
    assert min(map(golds.count, "ABCD")) > 25
    assert all(f"{p.meta['gold']}) Ne\n" in p.prompt for p in problems)
    other = {p.prompt for p in (shuffled.problem("train", n, seed=2) for n in range(shuffled.size("train")))}
    assert {p.prompt for p in problems} == other  # the same in every epoch and under every seed
    assert plain.size("train") == shuffled.size("train")


def test_lines_of_gpqa_are_always_shuffled(file):
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    line = dict(zip(names, ("Ne", "O", "N", "H"), strict=True))
    task = get(f"choice:{file(*(line | {'Question': f'Which, {n}?', 'Record ID': f'rec{n}'} for n in range(60)))}")
    problems = [task.problem("train", n) for n in range(task.size("train"))]
    assert {p.meta["gold"] for p in problems} == set("ABCD") and problems[0].id.rpartition("/")[2].startswith("rec")
    with pytest.raises(UserError, match="no text under 'Incorrect Answer 3'"):
        get(f"choice:{file({k: v for k, v in line.items() if k != names[3]} | {'Question': 'Q'})}")


# ---- puzzles


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("Ann, Bo", "Ann,  Bo\n", "correct"),
        ("Ann", "\\boxed{Ann}", "correct"),
        ("Ann", "ann", "wrong-value"),
        ("Ann", "Ann or Bo", "wrong-value"),
        (24, "24", "correct"),
        (24, "24.0", "correct"),
        (24, "25", "wrong-value"),
        (24, "twenty-four", "unparsable"),
        (1.5, "9" * 400, "wrong-value"),
        (True, "true", "correct"),
        (True, "True", "correct"),
        (True, "1", "wrong-value"),
        (1024, "1,024", "correct"),
        (1024, "10,24", "unparsable"),
        ({"a": 1}, "```json" + "\n" * 20_000 + "{}", "unparsable"),  # a cubic pattern would take hours
        ({"a": 1}, '```\n{"a": 1}\n\n```', "correct"),
        ([1, "b"], '```json\n[1, "b"]\n```', "correct"),
        ([1, "b"], '["b", 1]', "wrong-value"),
        ({"a": 1, "b": [2]}, '{"b": [2], "a": 1}', "correct"),
        ({"a": 1}, '{"a": 1, "b": 2}', "wrong-value"),
        ({"a": 1}, '{"a": 1', "unparsable"),
        ({"a": 1}, "[" * 3000, "unparsable"),
        ({"a": 1}, "9" * 5000, "unparsable"),
    ],
)
def test_puzzles(file, gold, answer, reason):
    task = get(f"puzzle:{file({'question': 'Q', 'answer': gold})}")
    problem = first(task)
    assert task.grade(problem, answer)[0] == reason
    assert problem.prompt.endswith("as JSON.") == isinstance(gold, list | dict)


@pytest.mark.parametrize("gold", [None, "", "  ", [], {}])
def test_a_puzzle_without_an_answer(file, gold):
    with pytest.raises(UserError, match="line 1: no answer under 'answer'"):
        get(f"puzzle:{file({'question': 'Q', 'answer': gold})}")


# ---- quantities


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("9.8", "m/s^2", 9.8),
        ("9.8 m/s^2", "m/s^2", 9.8),
        ("9.8\\ \\text{m/s}^2", "m/s^2", 9.8),
        ("9.8\\,\\mathrm{m}/\\mathrm{s}^{2}", "m/s^2", 9.8),
        ("1.6\\times 10^{-19}", "", 1.6e-19),
        ("-1.6e-19 C", "C", -1.6e-19),
        ("25 °C", "°C", 25),
        ("25^\\circ\\text{C}", "°C", 25),
        ("5%", "%", 5),
        ("3/4 m", "m", 0.75),
        ("6/8 m", "m", None),
        ("9.8 kg", "m", None),
        ("9.8 m", "", None),
        ("m", "m", None),
        ("9.8 ms", "m s", None),
        ("9.8 m·s", "m s", 9.8),
        ("9.8%", "m", None),
        ("$9.8", "m", None),
        ("$9.8$ m", "m", 9.8),
        ("1e999", "", None),
        ("9.8 m 9.9 m", "m", None),
    ],
)
def test_quantities_are_read(text, unit, value):
    read = parse_quantity(text, unit)
    assert (None if read is None else float(read)) == value


def test_a_quantity_has_its_unit_and_tolerance(file):
    line = {"question": "g?", "answer": "9.81 m/s^2", "unit": "m/s^2", "tolerance": 0.01}
    task = get(f"jsonl:{file(line)}")
    verdicts = [task.grade(first(task), text)[0] for text in ("9.8", "$9.75 \\text{ m/s}^2$", "9.6", "-9.81", "9.81 N")]
    assert verdicts == ["correct", "correct", "wrong-value", "wrong-value", "unparsable"]
    for change, hint in (
        ({"tolerance": 1}, "at most 0.1"),
        ({"unit": 3}, "'unit' must be text"),
        ({"unit": "N"}, "not a number"),
    ):
        with pytest.raises(UserError, match="line 1: .*" + hint):
            get(f"jsonl:{file(line | change)}")


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """How many gold answers are read as algebra."""
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    seen, check = [], Maths.check.__func__
    monkeypatch.setattr(Maths, "check", classmethod(lambda cls, lines: seen.extend(lines) or check(cls, lines)))
    return seen


def test_gold_answers_are_checked_once_for_a_file_and_a_version(counted, tmp_path, monkeypatch):
    """26,000 LaTeX answers took 2.5 minutes in every process at every start."""
    rows = [{"question": f"What is {n}?", "answer": f"\\frac{{x}}{{{n}}}"} for n in range(2, 72)]

    def opened(name="a", lines=rows):
        """As another process does: it has not seen the file."""
        counted.clear()
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        task = get(f"jsonl:{tmp_path / name}")
        return task.size("train"), len(counted)

    assert opened() == (70, 70)
    assert opened() == (70, 0)
    assert opened("b") == (70, 0), "the bytes are the same"
    assert opened("b", [*rows, {"question": "And 1?", "answer": "x"}]) == (71, 71)
    assert opened("b", rows[:7]) == (7, 7)
    monkeypatch.setattr("bessemer.addons.tasks.checked.metadata.version", lambda name: "another")
    checked.code_version.cache_clear()
    assert opened() == (70, 70)
    checked.code_version.cache_clear()


def test_rejected_files_are_not_cached_and_the_cache_may_be_missing(counted, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "\\\\frac{1}{0}"}\n')
    for _ in range(2):
        counted.clear()
        with pytest.raises(UserError, match="is not a number, word or LaTeX expression"):
            get(f"jsonl:{tmp_path}")
        assert len(counted) == 1
    monkeypatch.setenv("BESSEMER_CACHE", "/proc/absent")
    for _ in range(2):
        (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "\\\\frac{1}{x}"}\n')
        assert get(f"jsonl:{tmp_path}").size("train") == 1
    assert len(counted) == 3
