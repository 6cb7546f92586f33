"""Rejection sampling: what is kept and why the rest is not; then from a base to samples to a fine-tuned model."""

import json
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import stages_run
from completions import completion

from bessemer import tasks
from bessemer.addons.r1 import reject
from bessemer.addons.r1.tables import RejectConfig
from bessemer.addons.tasks import worked
from bessemer.addons.tasks.general import UNJUDGED
from bessemer.errors import UserError
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.countdown_expressions import all_tries
from bessemer.tasks.language import consistency

COUNTDOWN = tasks.get("countdown")
PROBLEM = COUNTDOWN.make("train", 0, 0, "en", "seen")
SETTINGS = RejectConfig(kind="reject", tasks=["countdown"])


def right_answer():
    numbers, target = PROBLEM.meta["numbers"], PROBLEM.meta["target"]
    return next(t.expression for t in all_tries(tuple(sorted(numbers))) if t.value == target)


def sampled(thought, answer=None, end="stop"):
    text = f"<think>{thought}</think><answer>{answer or right_answer()}</answer>"
    verdict = COUNTDOWN.verify(PROBLEM, text)
    made = completion([5] * 9, text, None, end, 3)
    return ScoredSample(PROBLEM, [1, 2], made, verdict, 0.0, language=consistency(text, "en"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (sampled("1+2=3:9 low"), None),
        (sampled("1+2=3:9 low", "1+1"), "wrong"),
        (sampled("1+2=3:9 low", end="length"), "cut"),
        (sampled("1+2=3:9 low\n1*2=2:9小"), "mixed-language"),
        (sampled("1+2=3:9 low\n1+2=3:9 low\n1*2=2:9 low"), "repetitive"),
        (sampled("a\nb\nc\nd\na"), None),
        (sampled("so:\n```\n1+2\n```"), "code"),
        (sampled("and so on, " * 12), "repetitive"),
        (sampled(" ".join(f"{n} is low," for n in range(90))), "long-paragraph"),
        (sampled("1+2=3 <｜User｜> low"), "control-text"),
    ],
)
def test_what_is_not_to_be_learnt_from_is_named(row, why):
    assert reject.fault(row, SETTINGS) == why


def test_each_problem_gives_at_most_so_many_different_answers():
    group = [sampled("a"), sampled("a"), sampled("b", "1+1"), sampled("c"), sampled("d")]
    kept, dropped = reject.select([group], SETTINGS.model_copy(update={"keep": 2}))
    assert [messages[1]["content"] for messages in kept] == [group[0].answer, group[3].answer]
    assert dropped == {"duplicate": 1, "wrong": 1, "surplus": 1}
    assert kept[0][0] == {"role": "user", "content": PROBLEM.prompt}


def test_controls_keep_wrong_answers_or_all():
    group = [sampled("a"), sampled("b", "1+1"), sampled("c")]
    kept = {
        which: [
            m[1]["content"]
            for m in reject.select([group], SETTINGS.model_copy(update={"answers": which, "keep": 9}))[0]
        ]
        for which in ("right", "wrong", "all")
    }
    texts = [row.answer for row in group]
    assert kept == {"right": [texts[0], texts[2]], "wrong": [texts[1]], "all": texts}
    unjudged, mixed = sampled("d"), sampled("1*2=2:9小")
    unjudged.verdict = replace(unjudged.verdict, correct=False, reason=UNJUDGED)
    mixed.verdict = replace(mixed.verdict, correct=True)  # as `judge_answers` leaves it, without asking the judge
    for which, reasons in {"right": [UNJUDGED, "mixed-language"], "wrong": [UNJUDGED, "mixed-language"],
                           "all": [None, "mixed-language"]}.items():  # fmt: skip
        settings = SETTINGS.model_copy(update={"answers": which})
        assert [reject.fault(row, settings) for row in (unjudged, mixed)] == reasons


def test_r1_form_has_its_thoughts_apart_and_still_counts_as_right():
    thoughts, output = reject.written(sampled("  1+2=3:9 low "), "r1").split("\n\n")
    assert thoughts == "<think>\n1+2=3:9 low\n</think>"
    assert output in {sentence.format(right_answer()) for sentence in worked.SUMMARIES["en"]}
    for language, sentences in worked.SUMMARIES.items():
        seen = set()
        for index in range(40):
            row = sampled("1+2=3:9")
            row.problem = COUNTDOWN.make("train", index, 0, language, "seen")
            text = reject.written(row, "r1")
            verdict = COUNTDOWN.verify(PROBLEM, text)
            assert verdict.sound and verdict.formatted and text == reject.written(row, "r1")
            seen.add(text)
        assert len(seen) == len(sentences), "every sentence occurs"


def test_r1_form_keeps_the_summary_that_the_model_wrote():
    own = f"We try 1+2 first.\n\nIt is low, so \\boxed{{{right_answer()}}} it is."
    row = sampled("1+2=3:9 low")
    row.completion = replace(row.completion, text=f"<think>1+2=3:9 low</think>\n\n{own}")
    row.verdict = COUNTDOWN.verify(PROBLEM, row.answer)
    assert reject.fault(row, SETTINGS) is None
    assert reject.written(row, "r1") == f"<think>\n1+2=3:9 low\n</think>\n\n{own}"


def test_a_right_answer_without_thoughts_is_not_learnt_from():
    row = sampled("1+2=3:9 low")
    row.verdict = COUNTDOWN.verify(PROBLEM, f"<answer>{right_answer()}</answer>")
    assert row.verdict.correct and reject.fault(row, SETTINGS) == "malformed"


CHAIN = """
[[stage]]
kind = "reject"
tasks = ["arithmetic"]
problems = 150
samples = 16
keep = 2
max_new_tokens = 40
consistency = 0.5

[[stage]]
kind = "sft"
from = "pretrain"
samples = ["reject"]
epochs = 2
row_length = 96
lr = 3e-3
lr_final = 3e-4
"""


@pytest.fixture(scope="module")
def done(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reject")
    path = folder / "small.toml"
    path.write_text(small_run.recipe.read_text().split('[[stage]]\nkind = "rl"')[0] + CHAIN)
    stages_run.copy_without(small_run.folder / "run", folder / "run", "03-zero", "04-eval")
    return folder, stages_run.run(path, folder / "run")


def test_every_kept_conversation_is_right_and_new(done):
    folder, results = done
    lines = (folder / "run" / "03-reject" / "samples.jsonl").read_text().splitlines()
    summary = results["reject"].summary
    assert len(lines) == summary["kept"] == len(set(lines)) > 5 and summary["wrong"] > 0
    assert sum(summary.values()) == 2400, "every answer is accounted for"
    task = tasks.get("arithmetic")
    problems = [task.problem("train", i, 7) for i in range(150)]
    for line in lines:
        question, answer = json.loads(line)["messages"]
        asked = [problem for problem in problems if problem.prompt == question["content"]]
        assert asked and task.verify(asked[0], answer["content"]).correct
    asked = Counter(json.loads(line)["messages"][0]["content"] for line in lines)
    times = Counter(problem.prompt for problem in problems)
    assert all(count <= 2 * times[prompt] for prompt, count in asked.items())


def test_sft_takes_them_from_the_earlier_stage(done):
    folder, results = done
    assert results["sft"].summary["samples"] == results["reject"].summary["kept"]
    assert (folder / "run" / "04-sft" / "model" / "model.safetensors").exists()


def test_killed_between_lots_it_keeps_the_same(done, tmp_path):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-reject", "04-sft")
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(stages_run.__file__).parent)!r})
import stages_run
from pathlib import Path
from bessemer.addons.r1 import reject
write = reject.write_atomic
def deadly(path, data):
    write(path, data)
    if path.name == "lot-00000064.json":
        os.kill(os.getpid(), signal.SIGKILL)
reject.write_atomic = deadly
stages_run.run(Path({str(folder / "small.toml")!r}), Path({str(out)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stages_run.run(folder / "small.toml", out)
    for name in ("03-reject/samples.jsonl", "04-sft/model/model.safetensors"):
        assert (out / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_nothing_kept_is_an_error_that_says_why(done):
    folder, _ = done
    with pytest.raises(UserError, match=r"none of 32 .*\(cut 32\)"):
        stages_run.run(folder / "small.toml", folder / "run", "reject.max_new_tokens=2", "reject.problems=2")


def test_conversations_of_many_lots_are_distinct_and_never_in_memory_together(tmp_path):
    """R1's 600K conversations are 10 GB as text; here 15 MB with 6 MB. Every conversation is in two lots."""
    paths, text = [tmp_path / f"lot-{n}.json" for n in range(60)], "and so on " * 100
    for n, path in enumerate(paths):
        asked = [{"role": "user", "content": f"What is {k}?"} for k in range(250 * n, 250 * n + 500)]
        kept = [[question, {"role": "assistant", "content": text}] for question in asked]
        path.write_text(json.dumps({"kept": kept, "dropped": {"wrong": 2}}))
    dropped, written, size = Counter(), 0, 0
    tracemalloc.start()
    for line in reject.distinct(paths, dropped):
        written, size = written + 1, size + len(line)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written == 60 * 250 + 250 and dropped == {"wrong": 120, "duplicate": 60 * 500 - written}
    assert peak < 6e6 < 15e6 < size
