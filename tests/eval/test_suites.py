"""Published evaluation suites: invented rows in each release's format, answers from a small model and from files."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from forks import Fork
from made_data import ROWS, write_csv, write_data, write_jsonl

from bessemer.addons.evals import suite_run, suites
from bessemer.cli import main
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

R1 = suites.load_suite("r1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("suites") / "data")


def loaded(name, data):
    (evaluation,) = suites.choose(R1, [name])
    return suites.load(evaluation, suites.find(evaluation, [str(data)]))


def r1(answer, thoughts="Let me see. It could be \\boxed{1}, but no."):
    """An answer in the released R1's form: it starts after the opening tag, which the prompt contains."""
    return f"{thoughts}\n</think>\n\nFirst we look at it.\n\n**Answer:** {answer}\n"


def test_the_protocol_matches_the_published_one():
    assert (R1.temperature, R1.top_p, R1.max_new_tokens) == (0.6, 0.95, 32768)
    assert {entry.name: entry.samples for entry in R1.evaluations} == {
        "aime-2024": 64, "aime-2025": 64, "math-500": 16, "cnmo-2024": 64, "gpqa-diamond": 64, "livecodebench": 8,
        "if-eval": 1, "mmlu": 1, "mmlu-pro": 1, "c-eval": 1,
    }  # fmt: skip
    assert {entry.name: entry.published["R1"] for entry in R1.evaluations} == {
        "aime-2024": 79.8, "aime-2025": 70.0, "math-500": 97.3, "cnmo-2024": 78.8, "gpqa-diamond": 71.5,
        "livecodebench": 65.9, "if-eval": 83.3, "mmlu": 90.8, "mmlu-pro": 84.0, "c-eval": 91.8,
    }  # fmt: skip


ANSWERS = {
    "aime-2024": ("60", "\\boxed{2}", "\\boxed{3}"),
    "aime-2025": ("0", "\\boxed{42}", "42 or so"),
    "math-500": ("test/algebra/1.json", "\\boxed{1+x^2+2x}", "\\boxed{x^2+1}"),
    "mmlu": ("1", "\\boxed{C}", "\\boxed{B}"),
    "mmlu-pro": ("70", "\\boxed{F}", "\\boxed{A}"),
    "c-eval": ("2", "\\boxed{B}", "\\boxed{D}"),
    "if-eval": ("1000", "Rivers flow.", "Rivers, they flow."),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_rows_of_a_release_are_read_and_judged(data, name):
    task, problems = loaded(name, data)
    key, right, wrong = ANSWERS[name]
    problem = next(problem for problem in problems if problem.id == key)
    assert task.verify(problem, "<think>\n" + r1(right)).correct
    assert not task.verify(problem, "<think>\n" + r1(wrong)).correct
    assert not task.verify(problem, "").correct


@pytest.mark.parametrize(("question", "gold", "answer"), [
    ("What percent of the students like it?", "10", "10\\%"),
    ("A triangle has sides of 3 cm, 4 cm and 5 cm. What is its area, in square centimeters?", "6", "6 \\text{ cm}^2"),
    ("How many hours does the train need?", "3", "3\\text{ hours}"),
    ("What is the sum?", "11,\\! 111,\\! 100", "11111100"),
    ("一共需要多少小时？", "3", "3\\text{小时}"),
])  # fmt: skip
def test_the_unit_that_the_question_asks_for_may_be_written(tmp_path, question, gold, answer):
    """The words of R1 after the question are no part of it."""
    write_jsonl(tmp_path / "math-500.jsonl", [{"problem": question, "answer": gold}])
    task, [problem] = loaded("math-500", tmp_path)
    assert task.verify(problem, "<think>\n" + r1(f"\\boxed{{{answer}}}")).correct
    assert not task.verify(problem, "<think>\n" + r1(f"\\boxed{{9{answer}}}")).correct


def test_prompts_are_the_question_and_the_words_of_r1(data):
    prompt = loaded("aime-2024", data)[1][0].prompt
    assert prompt == "Find $1+1$.\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert loaded("if-eval", data)[1][0].prompt == ROWS["if-eval"][0]["prompt"]
    chinese = loaded("c-eval", data)[1]
    assert "B) 苹果" in chinese[0].prompt and "\\boxed{}" in chinese[0].prompt and chinese[0].language == "zh"
    assert [problem.id for problem in chinese] == ["1", "2"], "the ids of the two subjects are the same"


def test_gpqa_choices_are_shuffled_with_their_answer(data):
    task, problems = loaded("gpqa-diamond", data)
    letters = [problem.meta["gold"] for problem in problems]
    assert len(set(letters)) > 1 and [problem.id for problem in problems] == [f"rec{n}" for n in range(6)]
    for n, (problem, letter) in enumerate(zip(problems, letters, strict=True)):
        assert f"{letter}) lead {n}\n" in problem.prompt and f'in\n"case" {n}, is' in problem.prompt
        assert [task.verify(problem, "<think>\n" + r1(f"\\boxed{{{entry}}}")).correct for entry in "ABCD"] == [
            entry == letter for entry in "ABCD"
        ]


def test_a_choice_keeps_its_gold_over_calls(data):
    task, problems = loaded("gpqa-diamond", data)
    assert [task.problem("test", n).meta["gold"] for n in range(len(problems))] == [p.meta["gold"] for p in problems]


PROGRAM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
METHOD = (
    "```python\nclass Solution:\n    def scaled(self, values, by):\n        return [by * one for one in values]\n```"
)


def test_livecodebench_runs_the_programs_of_its_dates(data):
    task, problems = loaded("livecodebench", data)
    assert [problem.id for problem in problems] == ["abc1", "abc3"], "abc2 is older than the tests of R1"
    assert "class Solution" in problems[1].prompt and "standard input" in problems[0].prompt
    assert task.verify(problems[0], "<think>\n" + r1(PROGRAM)).correct
    assert task.verify(problems[1], "<think>\n" + r1(METHOD)).correct
    only_public = PROGRAM.replace("a + b", "7")
    assert task.verify(problems[0], "<think>\n" + r1(only_public)).reason == "wrong-output"
    assert not task.verify(problems[1], "<think>\n" + r1(METHOD.replace("by *", "2 *"))).correct


def two_hundred(folder):
    """200 answers in R1's form to two AIME problems, 100 each; the comments give the correct ones."""
    wrong = ["\\boxed{3}", "\\boxed{3}", "no box, but 2", "\\boxed{2} or \\boxed{4}"]
    lines = [{"problem": 60, "text": r1("\\boxed{2}")} for _ in range(60)]  # correct: 60 of 100
    lines += [{"problem": 60, "text": r1(wrong[n % 4])} for n in range(40)]
    lines += [
        {"problem": "61", "reasoning": "Twenty tens.", "text": "So\n\n\\boxed{200}."} for _ in range(25)
    ]  # correct: 25 of 100
    lines += [{"problem": "61", "text": r1("\\boxed{30}")} for _ in range(45)]  # the majority answer, and wrong
    cut = {"text": "I think and think, \\boxed{200}, and never end", "finish_reason": "length"}
    lines += [{"problem": "61", **cut} for _ in range(30)]
    return write_jsonl(folder / "aime-2024.jsonl", lines)


def test_two_hundred_answers_in_the_form_of_r1_give_the_score_computed_by_hand(data, tmp_path):
    result = suite_run.evaluate_suite(
        None, suite="r1", only=["aime-2024"], data=[str(data)], answers=two_hundred(tmp_path)
    )
    (row,) = result["rows"]
    assert row["pass_at_1"] == pytest.approx((0.60 + 0.25) / 2)
    assert row["maj_at_k"] == 0.5, "60 votes for 2 win; 45 votes for 30 beat 25 for 200"
    assert (row["n"], row["k"], row["samples"], row["max_new_tokens"]) == (2, 100, 100, None)
    assert row["published"] == {"R1-Zero": 0.779, "R1": 0.798} and row["mean_length"] is None


def test_our_own_answers_are_scored_as_they_were_written(data, tmp_path):
    """A file of ours, which begins with the settings, holds the opening tag if there was one."""
    cut = {"problem": "61", "text": "So \\boxed{200}. So \\boxed{200}. So", "finish_reason": "length"}
    call = {"suite": "r1", "only": ["aime-2024"], "data": [str(data)]}
    for settings, score in ([], 0.0), ([{"evaluation": "aime-2024", "model": {}, "sampling": {}}], 1.0):
        file = write_jsonl(tmp_path / "aime-2024.jsonl", [*settings, cut])
        assert suite_run.evaluate_suite(None, **call, answers=file)["rows"][0]["pass_at_1"] == score


def test_answers_to_other_problems_are_not_scored(data, tmp_path, capsys):
    file = write_jsonl(tmp_path / "aime-2024.jsonl", [{"problem": "61", "text": r1("\\boxed{200}")}])
    call = {"suite": "r1", "only": ["aime-2024"], "data": [str(data)], "answers": file}
    (row,) = suite_run.evaluate_suite(None, **call)["rows"]
    assert (row["n"], row["pass_at_1"]) == (1, 1.0) and "answers to 1 of 2 problems" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing was evaluated"):
        suite_run.evaluate_suite(None, **call, problems=1)  # 60
    assert f"aime-2024: {file} has no answers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["Find the sum of two numbers. \\boxed{2} <think>", "盛钢水"] * 8, 300, chat_style="r1")
    cfg = preset("tiny", vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, max_seq_len=400, init_std=0.12)
    tokenizer.save(folder / "tokenizer")
    Transformer(cfg).initialise(3).save(folder / "small", tokenizer_dir=folder / "tokenizer")
    return folder / "small"


def cli(*arguments, cwd):
    def work():
        os.chdir(cwd)
        sys.argv = ["bessemer", "eval", *map(str, arguments)]
        main()

    with Fork(work) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_one_command_runs_what_has_data_and_continues_after_a_kill(model, data, tmp_path):
    call = (model, "--suite", "r1", "--data", data, "--only", "aime-2024,cnmo-2024,if-eval,mmlu", "--max-tokens", 6)
    first = cli(*call, "--samples", 3, "--out", "whole", "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)
    assert [(row["task"], row["n"], row["k"], row["temperature"]) for row in facts["rows"]] == [
        ("aime-2024", 2, 3, 0.6), ("if-eval", 1, 3, 0.6), ("mmlu", 1, 3, 0.6)
    ]  # fmt: skip
    assert [entry["evaluation"] for entry in facts["skipped"]] == ["cnmo-2024"]
    assert f"cnmo-2024: put {data}/cnmo-2024.jsonl" in first.stderr and "question, answer" in first.stderr
    assert "opencompass/LiveMathBench" in first.stderr and facts == json.loads(
        (tmp_path / "whole/results.json").read_text()
    )
    uninterrupted = (tmp_path / "whole" / "aime-2024.jsonl").read_text()
    assert len(uninterrupted.splitlines()) == 1 + 2 * 3

    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "aime-2024.jsonl").write_text(uninterrupted[: len(uninterrupted) * 2 // 3])  # cut in the middle of a line
    resumed = cli(*call, "--samples", 3, "--out", "killed", cwd=tmp_path)
    assert resumed.returncode == 0 and "R1-Zero" in resumed.stdout and "77.9 %" in resumed.stdout, resumed.stderr
    assert sorted((killed / "aime-2024.jsonl").read_text().splitlines()) == sorted(uninterrupted.splitlines())
    assert cli(*call, "--samples", 3, "--out", "killed", "--seed", 1, cwd=tmp_path).returncode == 2
    refused = cli(*call, "--out", "killed/results.json", cwd=tmp_path)
    assert refused.returncode == 2 and "error: killed/results.json: a file is in the way" in refused.stderr

    scored = cli("--suite", "r1", "--data", data, "--answers", "whole", "--json", cwd=tmp_path)
    rows = json.loads(scored.stdout)["rows"]
    assert [(row["task"], row["pass_at_1"], row["mean_length"]) for row in rows] == [
        (row["task"], row["pass_at_1"], row["mean_length"]) for row in facts["rows"]
    ]


def test_only_files_of_answers_are_continued(model, data, tmp_path):
    """Answers were once appended to the data file itself, and its last line was lost."""
    for name, content in (("aime-2024.jsonl", '{"problem": "1 + 1", "answer": 2}'), ("results.json", '{"rows": []}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match="another folder with --out"):
            suite_run.evaluate_suite(model, suite="r1", only=["aime-2024"], data=[str(data)], out=folder)
        assert {path.name: path.read_text() for path in folder.glob("*.json*")} == {name: content}


def test_more_samples_are_added_to_those_that_are_there(model, data, tmp_path):
    def run(out, samples):
        suite_run.evaluate_suite(
            model,
            suite="r1",
            only=["aime-2024"],
            data=[str(data)],
            out=tmp_path / out,
            samples=samples,
            max_new_tokens=5,
        )
        return sorted((tmp_path / out / "aime-2024.jsonl").read_text().splitlines())

    run("grown", 1)
    for file in Path(model).glob("*.safetensors"):
        os.utime(file)  # a new date, the same weights
    assert run("grown", 3) == run("at-once", 3)


def test_concurrent_calls_on_one_folder(model, data, tmp_path, monkeypatch):
    """Two processes once appended the same numbers, and no later call could read the file. The second now refuses, and
    of the answers that such a pair left the first ones count."""
    call = {"suite": "r1", "only": ["aime-2024"], "data": [str(data)], "out": tmp_path, "max_new_tokens": 5}
    (uninterrupted,) = suite_run.evaluate_suite(model, **call, samples=2)["rows"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "fcntl.lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
        )  # some network disks
        assert suite_run.evaluate_suite(model, **call, samples=2)["rows"] == [uninterrupted]
        (tmp_path / ".lock").write_text(str(os.getppid()))
        with pytest.raises(UserError, match=r"another evaluation is writing to .*; wait"):
            suite_run.evaluate_suite(model, **call, samples=2)
    file = tmp_path / "aime-2024.jsonl"
    header, first, *others = file.read_text().splitlines()
    file.write_text("\n".join([header, first, *others, json.dumps(json.loads(first) | {"text": "later"})]) + "\n")
    assert suite_run.evaluate_suite(model, **call, samples=2)["rows"] == [uninterrupted]
    assert suite_run.evaluate_suite(None, suite="r1", data=[str(data)], answers=file)["rows"][0]["mean_length"]


def test_results_accumulate_over_calls(model, data, tmp_path):
    def call(name, **more):
        suite_run.evaluate_suite(
            model, suite="r1", only=[name], data=[str(data)], out=tmp_path, samples=1, **{"max_new_tokens": 5} | more
        )
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        return {row["task"]: row["max_new_tokens"] for row in rows}

    call("aime-2024")
    assert call("mmlu") == call("aime-2024") == {"aime-2024": 5, "mmlu": 5}
    assert call("if-eval", seed=1) == {"if-eval": 5}, "other samples are another evaluation"
    (tmp_path / "results.json").write_text('{"rows": []}')
    answers = {"answers": tmp_path, "out": tmp_path, "suite": "r1", "data": [str(data)], "only": ["mmlu"]}
    with pytest.raises(UserError, match="does not belong to a suite"):
        suite_run.evaluate_suite(None, **answers)


def test_rows_of_answers_that_have_changed_are_dropped(data, tmp_path):
    def score(name):
        call = {"only": [name], "data": [str(data)], "answers": tmp_path, "out": tmp_path / "out"}
        suite_run.evaluate_suite(None, suite="r1", **call)
        return [row["task"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]]

    first, second = "aime-2024", "aime-2025"
    for name, problem in ((first, 60), (second, 0)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"problem": problem, "text": r1("2")}])
    assert score(first) == [first] and score(second) == score(second) == [first, second]
    write_jsonl(tmp_path / f"{first}.jsonl", [{"problem": 60, "text": r1("3")}])
    assert score(second) == [second]


def test_without_any_data_the_status_says_so(model, tmp_path):
    done = cli(model, "--suite", "r1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("skipped ") == 10 and "nothing was evaluated" in done.stderr
    assert "put data/evals/gpqa-diamond.jsonl (or .csv, .parquet, or a folder gpqa-diamond/)" in done.stderr
    assert "Incorrect Answer 3" in done.stderr and "Idavidrein/gpqa" in done.stderr and not done.stdout


CONTEST = ROWS["livecodebench"][0]
BAD_DATA = {
    "a row without its answer": ("aime-2024", {"problem": "1+1?"}, "no text or number under 'answer'"),
    "a gold that is no answer": ("aime-2024", {"problem": "x?", "answer": "\\frac{"}, "the answer '\\\\frac{' is no"),
    "no such letter": ("mmlu", {"question": "2?", "choices": ["1", "2"], "answer": 7}, "the answer 7 names no choice"),
    "an unknown instruction": (
        "if-eval", {"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}, "'a:b' in instruction_id_list"
    ),
    "arguments of another number": (
        "if-eval", {"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": []}, "no instruction_id_list and kwargs"
    ),
    "no date": ("livecodebench", {"question_content": "p"}, "no contest_date"),
    "tests that are none": ("livecodebench", CONTEST | {"private_test_cases": "no!"}, "tests that are neither"),
    "a list": ("aime-2025", [1], "must be a JSON object, not list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_is_named_with_its_line_before_any_model_is_loaded(tmp_path, fault):
    name, row, complaint = BAD_DATA[fault]
    good = [ROWS[name][0]] if name in ROWS else []
    file = write_jsonl(tmp_path / f"{name}.jsonl", [*good, row])
    with pytest.raises(UserError) as error:
        suite_run.evaluate_suite(tmp_path / "no-model", suite="r1", data=[str(tmp_path)])
    assert str(error.value).startswith(f"{file}:2: {complaint}")


def test_an_empty_file_is_an_error(tmp_path):
    write_jsonl(tmp_path / "aime-2025.jsonl", [])
    with pytest.raises(UserError, match=r"aime-2025.jsonl contains no problem of AIME 2025"):
        suite_run.evaluate_suite(tmp_path, suite="r1", data=[str(tmp_path)])


def test_csv_with_too_few_cells_and_two_files_of_one_evaluation(tmp_path):
    write_csv(tmp_path / "gpqa-diamond.csv", ROWS["gpqa-diamond"])
    with (tmp_path / "gpqa-diamond.csv").open("a") as file:
        file.write("rec9,Why?\n")
    with pytest.raises(UserError, match=r"gpqa-diamond.csv:\d+: the row and the header"):
        suite_run.evaluate_suite(tmp_path, suite="r1", data=[str(tmp_path)])
    write_jsonl(tmp_path / "gpqa-diamond.jsonl", ROWS["gpqa-diamond"])
    with pytest.raises(UserError, match="both exist; keep one"):
        suite_run.evaluate_suite(tmp_path, suite="r1", data=[str(tmp_path)])


BAD_ANSWERS = {
    "no text": ({"problem": 60}, "needs problem .* and text"),
    "no such problem": ({"problem": 7, "text": "x"}, "aime-2024 has no problem 7; its problems are 60, 61"),
    "two of one number": ({"problem": 60, "text": "x", "sample": 0}, "sample is 0; give every answer"),
    "another question": ({"problem": 60, "text": "x", "question": "ab"}, "problem 60 had another question"),
    "another evaluation": ({"problem": 60, "text": "x", "evaluation": "gsm8k"}, "evaluation is 'gsm8k'"),
    "a name that is none": ({"problem": 60, "text": "x", "evaluation": ["a"]}, r"evaluation is \['a'\]"),
    "a number that is none": ({"problem": 60, "text": "x", "sample": [1]}, r"sample is \[1\]; give every answer"),
    "thoughts that are no text": ({"problem": 60, "text": "x", "reasoning": [1]}, r"reasoning is \[1\]; .* text"),
    "a length that is text": ({"problem": 60, "text": "x", "tokens": "12"}, "tokens is '12'; .* a whole number"),
    "a length without end": ({"problem": 60, "text": "x", "tokens": 1e999}, "tokens is inf; .* a whole number"),
    "an end that is no word": ({"problem": 60, "text": "x", "finish_reason": ["x"]}, r"finish_reason is \['x'\]"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_bad_answers_are_named_with_their_line(data, tmp_path, fault):
    line, complaint = BAD_ANSWERS[fault]
    file = write_jsonl(tmp_path / "answers.jsonl", [{"problem": 60, "text": "x"}, line])
    with pytest.raises(UserError, match=f"answers.jsonl:2: .*{complaint}"):
        suite_run.evaluate_suite(None, suite="r1", only=["aime-2024"], data=[str(data)], answers=file)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("aime=x.jsonl", "'aime'; did you mean 'aime-20"),
        ("aime-2024=x.jsonl", "no file or folder x.jsonl"),
        ("nowhere", "no folder"),
    ],
)
def test_a_missing_path_is_an_error(path, complaint):
    with pytest.raises(UserError, match=complaint):
        suite_run.evaluate_suite(None, suite="r1", data=[path])


def test_an_evaluation_may_be_a_data_set_of_the_hub(monkeypatch, data):
    rows = ROWS["math-500"]
    specs = []

    def hub_records(spec):
        specs.append(spec)
        if "LiveMath" in spec:
            raise UserError(f"{spec} cannot be read (ConnectionError)")
        return ((f"{spec}: row {n}", dict(row)) for n, row in enumerate(rows, 1))

    monkeypatch.setattr("bessemer.addons.families.data_sets.hub_records", hub_records)
    evaluations = suites.choose(R1, ["math-500", "cnmo-2024", "livecodebench"])
    ready, skipped = suite_run.prepare(evaluations, ["hf://"], None)
    assert [entry.name for entry in ready] == ["math-500"] and specs[0] == "hf://HuggingFaceH4/MATH-500#test"
    assert [entry["evaluation"] for entry in skipped] == ["cnmo-2024", "livecodebench"]
    with pytest.raises(UserError, match="cannot be read"):
        suite_run.prepare(evaluations[1:2], ["cnmo-2024=hf://opencompass/LiveMathBench"], None)


def test_some_problems_are_spread_over_the_data(data):
    (evaluation,) = suites.choose(R1, ["gpqa-diamond"])
    _, problems = suites.load(evaluation, str(data / "gpqa-diamond.csv"), 3)
    assert [problem.id for problem in problems] == ["rec0", "rec2", "rec4"]
