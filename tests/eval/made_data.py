"""Invented rows in the format of each public release."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STDIN = [
    {"input": "3 4\n", "output": "7\n", "testtype": "stdin"},
    {"input": "5 6\n", "output": "11\n", "testtype": "stdin"},
]
CALLS = [{"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}]


def packed(tests: list[dict]) -> str:
    """Private tests as LiveCodeBench encodes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def contest(number: int, date: str, tests: list[dict], **more: str) -> dict:
    return {
        "question_title": f"P{number}", "question_content": f"Problem {number}: do as the tests say.",
        "platform": "atcoder", "question_id": f"abc{number}", "contest_date": f"{date}T00:00:00", "starter_code": "",
        "difficulty": "easy", "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed(tests[1:] or tests), "metadata": "{}",
    } | more  # fmt: skip


ROWS = {
    "aime-2024": [
        {"id": 60, "problem": "Find $1+1$.", "solution": "...", "answer": "002", "year": "2024"},
        {"id": 61, "problem": "Find $20 \\cdot 10$.", "solution": "...", "answer": "200", "year": "2024"},
    ],
    "aime-2025": [{"problem": "Find $6 \\cdot 7$.", "answer": "42", "id": "0"}],
    "math-500": [
        {"problem": "Expand $(x+1)^2$.", "solution": "", "answer": "x^2+2x+1", "subject": "Algebra", "level": 2,
         "unique_id": "test/algebra/1.json"},
        {"problem": "Name a conic.", "solution": "", "answer": "\\text{ellipse}", "subject": "Geometry", "level": 1,
         "unique_id": "test/geometry/2.json"},
    ],
    "gpqa-diamond": [
        {"Record ID": f"rec{n}", "Question": f'Which of these, in\n"case" {n}, is heaviest?\n',
         "Correct Answer": f"lead {n}\n", "Incorrect Answer 1": f"cork {n}", "Incorrect Answer 2": f"wood {n}",
         "Incorrect Answer 3": f"air, {n}"}
        for n in range(6)
    ],
    "livecodebench": [
        contest(1, "2024-09-01", STDIN), contest(2, "2023-09-01", STDIN),
        contest(3, "2025-01-31", CALLS, metadata='{"func_name": "scaled"}', starter_code="class Solution:\n"
                "    def scaled(self, values: list[int], by: int) -> list[int]:\n        "),
    ],
    "if-eval": [
        {"key": 1000, "prompt": "Write about rivers in fewer than 12 words and no commas.",
         "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
         "kwargs": [{"num_words": 12, "relation": "less than", "letter": None}, {"num_words": None, "letter": None}]},
    ],
    "mmlu": [{"question": "2 + 2?", "subject": "maths", "choices": ["1", "3", "4", "5"], "answer": 2}],
    "mmlu-pro": [
        {"question_id": 70, "question": "Which is even?", "options": list("135798"), "answer": "F", "answer_index": 5}
    ],
    "c-eval": [{"id": 0, "question": "哪个是水果？", "A": "石头", "B": "苹果", "C": "铁", "D": "木", "answer": "B"}],
}  # fmt: skip
"""CNMO is missing, since a user may lack the data of an evaluation."""


def write_data(folder: Path) -> Path:
    """A folder for --data with files of every format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        if name == "gpqa-diamond":
            write_csv(folder / f"{name}.csv", rows)
        elif name == "c-eval":
            (folder / name).mkdir()
            write_csv(folder / name / "law.csv", rows)
            write_csv(folder / name / "plants.csv", rows)
        elif name in ("mmlu", "if-eval", "aime-2025"):
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
