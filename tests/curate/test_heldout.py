"""Decontamination: an evaluation's questions and solutions are found, and what merely resembles them is not."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from made_texts import prose

from bessemer import tasks
from bessemer.addons.curate.decontaminate import EvalText, Index, eval_texts, searched_for
from bessemer.addons.curate.words import words
from bessemer.errors import UserError

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
PROGRAM_TESTS = json.dumps({"inputs": [prose(3, 2)], "outputs": ["7"]})
SOLUTION = "In May Natalia sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = 72 clips in these two months.\n#### 72"


def _hits(index: Index, *texts: str) -> dict[int, str]:
    return index.hits(words(texts))


def test_ten_words_of_a_question_or_a_solution_are_a_hit(tmp_path):
    lines = [{"question": QUESTION, "answer": SOLUTION}, {"question": prose(8, 2) + " How many?", "answer": "#### 3"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": prose(9, 2), "answer": "#### 1"}) + "\n")
    index = Index(eval_texts([f"gsm8k:{tmp_path}"], 10), 10)
    ten = "sold clips to 48 of her friends in April and"
    hits = _hits(
        index, f"{prose(1)} {ten} {prose(2)}", f"{prose(1)} sold clips to 48 of her friends in April {prose(2)}",
        "SOLD CLIPS (to 48 of her friends), in April: AND", "she sold 48 + 24 = 72 clips in these", prose(9, 2),
    )  # fmt: skip
    assert set(hits) == {0, 2, 3}  # nine words are no hit, and training questions are not searched for
    whole = Index(eval_texts([f"gsm8k:{tmp_path / 'test.jsonl'}@test"], 10), 10)
    assert set(_hits(whole, "she sold 48 + 24 = 72 clips in these")) == {0}, "the solutions of a whole file too"


FORMS = {
    "jsonl": {"problem": QUESTION, "answer": "72", "solution": SOLUTION},
    "choice": {"question": QUESTION, "choices": ["72", "24"], "answer": "A", "explanation": SOLUTION},
    "code": {"prompt": QUESTION, "tests": [{"input": "48", "output": "72"}], "solution": SOLUTION},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["test.parquet", "all.parquet@test", "all.jsonl@test"])
def test_solutions_are_found_in_every_file_that_a_task_reads(tmp_path, form, name):
    path = tmp_path / name.removesuffix("@test")
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FORMS[form]]), path)
    else:  # JSON may hold U+2028 and U+0085 as they are; neither ends a line
        record = FORMS[form] | {"note": "one\u2028two\x85three"}
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    texts = eval_texts([f"{form}:{tmp_path if name == 'test.parquet' else tmp_path / name}"], 10)
    assert set(_hits(Index(texts, 10), QUESTION, SOLUTION)) == {0, 1}


def test_held_out_lines_count_in_any_language_and_with_tools_but_training_lines_and_tests_do_not(tmp_path):
    held_out = {"prompt": QUESTION, "tests": [{"input": "48", "output": "72"}], "input_output": PROGRAM_TESTS}
    chinese = {"prompt": "小明有多少个苹果？", "tests": [{"input": "1", "output": "2"}], "solution": SOLUTION}
    (tmp_path / "test.jsonl").write_text(json.dumps(held_out) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps(chinese) + "\n")
    for name in (f"code:{tmp_path}", f"tools:calculator:code:{tmp_path}"):
        index = Index(eval_texts([name], 10), 10)
        assert set(_hits(index, QUESTION, SOLUTION, prose(3, 2))) == {0}


def test_numbers_alone_are_not_contamination():
    index = Index(
        [EvalText("q", "48 / 2 = 24 and 48 + 24 = 72 so 72 - 5 = 67 is what we get in the end of it", False)], 10
    )
    assert not _hits(index, "it is 48 / 2 = 24 and 48 + 24 = 72 so there")
    assert _hits(index, "5 = 67 is what we get in the end of it")


RESTATED = {
    "jsonl": FORMS["jsonl"] | {"original_question": QUESTION + " Why?", "solution": f"Asked: {QUESTION} {SOLUTION}"},
    "choice": FORMS["choice"],
    "code": FORMS["code"],
    "puzzle": {"question": QUESTION, "answer": ["72", "24"]},
}


@pytest.mark.parametrize("form", RESTATED)
def test_ten_words_are_a_hit_where_several_texts_of_one_problem_have_them(tmp_path, form):
    for name in ("one", "two"):  # the same problem in two lines of two files is still one
        (tmp_path / f"{name}.jsonl").write_text(2 * (json.dumps(RESTATED[form]) + "\n"))
    index = Index(eval_texts([f"{form}:{tmp_path}/{name}.jsonl@test" for name in ("one", "two")], 10), 10)
    assert set(_hits(index, "sold half as many clips in May. How many clips")) == {0}


def test_problems_too_short_to_be_searched_for_are_not_counted(tmp_path):
    (tmp_path / "short.jsonl").write_text('{"question": "What is 3 times four?", "answer": "12"}\n')
    (tmp_path / "mixed.jsonl").write_text(
        '{"question": "Three?", "answer": "3"}\n{"question": "What is 3 times four?", "answer": "12"}\n'
    )
    assert [searched_for(eval_texts([f"jsonl:{tmp_path}/{name}.jsonl@test"], 10)) for name in ("short", "mixed")] == [
        1,
        1,
    ]
    assert searched_for(eval_texts(["general"], 50)) < 100
    with pytest.raises(UserError, match=r"env:http://127\.0\.0\.1:3 has 5 words"):
        eval_texts(["countdown", "env:http://127.0.0.1:3"], 5)


def test_wording_shared_by_questions_is_not_a_hit():
    shared = "read the following story about the old farmer and then answer this question in one word"
    index = Index(
        [EvalText("a", f"{shared} {prose(1, 1)}", False), EvalText("b", f"{shared} {prose(2, 1)}", False)], 10
    )
    assert not _hits(index, shared)
    assert _hits(index, prose(2, 1)) == {0: "b"}


def test_generated_questions_match_only_as_a_whole():
    index = Index([EvalText("g", "Use the numbers 3 7 25 and 50 each once to make 81 + 3", True)], 10)
    assert _hits(index, "x. Use the numbers 3, 7, 25 and 50 each once, to make 81 + 3. Now go") == {0: "g"}
    assert not _hits(index, "Use the numbers 3 7 25 and 50 each once to make 82 + 3")
    assert not _hits(index, "Use the numbers 3 7 25 and 50 each once to make 81 + 3 * 4")
    assert not _hits(index, "Use the numbers 3 7 25 and 50 each once to make", "81 + 3")


def test_held_out_problems_are_hits_and_training_documents_are_not():
    index = Index(eval_texts(["countdown"], 50), 10)
    task = tasks.get("countdown")
    tests = [task.problem("test", i, 0, language).prompt for i in range(50) for language in task.all_languages]
    assert len(_hits(index, *[f"A page. {text}\nThe answer." for text in tests])) == len(tests)
    assert not _hits(index, *[task.document(i, 5) for i in range(200)])
