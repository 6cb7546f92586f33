"""What the server reports of a model's training, the problems it offers, and its verdicts on answers."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from serving import error_of

from bessemer import tasks
from bessemer.addons.serve import problems, trained_on
from bessemer.addons.serve.protocol import AnswerToJudge, ApiError


def facts(server):
    models = httpx.get(server.url + "/v1/models").json()["data"]
    return {model["id"]: model["bessemer"]["practice"] for model in models}


def test_a_model_lists_what_it_was_trained_on(run_server):
    """zero practised countdown and read about two tasks; r1 was trained from it. The evaluation at 0.6 counts."""
    practice = facts(run_server)
    assert [(skill["task"], skill["practised"]) for skill in practice["zero"]["skills"]] == [
        ("countdown", True),
        ("arithmetic", False),
    ]
    assert (
        practice["zero"]["skills"][0]["solved"] == {"en": 0.42, "zh": 0.39} and practice["zero"]["temperature"] == 0.6
    )
    assert [skill["task"] for skill in practice["r1"]["skills"]] == ["arithmetic", "countdown"]
    assert practice["zero"]["trained_length"] == practice["r1"]["trained_length"] == 1100
    assert practice["zero"]["multi_turn"] is practice["r1"]["multi_turn"] is False


def test_practice_follows_all_inputs_of_a_stage(tmp_path):
    """All inputs of a stage are followed, not only its `from`. A reward model's tasks are not the policy's. How long an
    imported model's texts were is unknown."""
    (tmp_path / "recipe.toml").write_text(
        "".join(
            f'[[stage]]\nkind = "{kind}"\nname = "{name}"\n{more}\n'
            for kind, name, more in (
                ("import", "base", ""), ("reject", "picked", 'from = "base"\ntasks = ["logic"]\nmax_new_tokens = 100'),
                ("reward-model", "helpful", 'from = "base"\ntasks = ["general"]'),
                ("sft", "dev", 'from = "base"\nrow_length = 64'), ("pretrain", "own", 'row_length = "2K"'),
            )
        )
    )  # fmt: skip
    for number, name in enumerate(("base", "picked", "helpful", "dev", "own"), 1):
        (tmp_path / f"0{number}-{name}" / "model").mkdir(parents=True)
    (tmp_path / "04-dev" / "stage.json").write_text(json.dumps({"inputs": {"base": "", "picked": "", "helpful": ""}}))
    dev = trained_on.of_model(tmp_path / "04-dev" / "model")
    assert [skill.task for skill in dev.skills] == ["logic"] and dev.trained_length is None
    assert trained_on.of_model(tmp_path / "05-own" / "model").trained_length == 2000
    assert trained_on.of_model(tmp_path) == trained_on.Practice()  # not a run
    os.mkfifo(tmp_path / "01-base" / "results.json")
    (tmp_path / "02-picked" / "results.json").write_text('{"rows": [7]}')
    own = '[[stage]]\nname = "own"\n'
    for damaged in ("stage = 7\n", "x = " + "[" * 9000, own + 'row_length = "much"\n', own):
        (tmp_path / "recipe.toml").write_text(damaged)
        assert trained_on.of_model(tmp_path / "05-own" / "model") == trained_on.Practice()


@pytest.mark.parametrize(
    ("summary", "more", "expected"),
    [
        ({"multi_turn": 0}, 'data = ["a.jsonl"]', False),
        ({"multi_turn": 3}, 'data = ["a.jsonl"]', True),
        ({}, 'data = ["a.jsonl"]', None),
        ({}, 'data = ["a.jsonl"]\n[[stage]]\nkind = "rl"\nname = "last"\nfrom = "sft"\ntasks = ["countdown"]', None),
        ({"multi_turn": 0}, '[[stage]]\nkind = "rl"\nname = "last"\nfrom = "sft"\ntasks = ["env:http://h"]', None),
        ({"multi_turn": 3}, '[[stage]]\nkind = "rl"\nname = "last"\nfrom = "sft"\ntasks = ["env:http://h"]', True),
        ({"multi_turn": 3}, '[[stage]]\nkind = "rl"\nname = "last"\nfrom = "base"\ntasks = ["countdown"]', False),
    ],
)
def test_a_model_says_whether_it_was_trained_on_several_turns(tmp_path, summary, more, expected):
    (tmp_path / "recipe.toml").write_text(
        f'[[stage]]\nkind = "pretrain"\nname = "base"\n[[stage]]\nkind = "sft"\nfrom = "base"\n{more}\n'
    )
    for number, name in enumerate(("base", "sft", "last"), 1):
        (tmp_path / f"0{number}-{name}" / "model").mkdir(parents=True)
    (tmp_path / "02-sft" / "done.json").write_text(json.dumps({"summary": summary}))
    assert trained_on.of_model(tmp_path / "01-base" / "model").multi_turn is None
    assert trained_on.of_model(tmp_path / ("03-last" if "last" in more else "02-sft") / "model").multi_turn is expected


def test_a_score_with_examples_is_not_the_model_s_own(tmp_path):
    """Only where nothing else was evaluated does it stand for the model."""
    (tmp_path / "recipe.toml").write_text(
        '[[stage]]\nkind = "rl"\nname = "zero"\ntasks = ["countdown"]\n[[stage]]\nkind = "eval"\n'
    )
    (tmp_path / "01-zero" / "model").mkdir(parents=True)
    (tmp_path / "02-eval").mkdir()
    row = {"model": "zero", "task": "countdown", "language": "en", "temperature": 1.0}
    bare, shown = row | {"pass_at_1": 0.6}, row | {"pass_at_1": 0.1, "shots": 4}
    for rows, score in (([bare, shown], 0.6), ([bare, row | {"pass_at_1": 0.2, "prefix": "So"}], 0.6), ([shown], 0.1)):
        (tmp_path / "02-eval" / "results.json").write_text(json.dumps({"rows": rows}))
        assert trained_on.of_model(tmp_path / "01-zero" / "model").skills[0].solved == {"en": score}


def test_problems_are_held_out_and_judged_by_their_task(run_server):
    """Problems of the tasks that the model practised. zero only read about arithmetic; its answers can be judged."""
    shown = {
        model: httpx.get(run_server.url + "/v1/problems", params={"model": model}).json()["data"]
        for model in ("zero", "r1")
    }
    for model, asked_tasks in (("zero", ["countdown"]), ("r1", ["arithmetic", "countdown"])):
        groups = [(task, language) for task in asked_tasks for language in ("en", "zh")]
        assert [(p["task"], p["language"]) for p in shown[model]] == [group for group in groups for _ in range(4)]
    for problem in shown["r1"]:
        task = tasks.get(problem["task"])
        real = task.problem("test", problem["number"], language=problem["language"])
        assert real.prompt == problem["prompt"]
        if problem["task"] == "arithmetic":
            request = {key: problem[key] for key in ("task", "language", "number")}
            value = eval(re.search(r"[-\d+*]+", problem["prompt"])[0])
            for model, attempt, reason in (("r1", value, "correct"), ("zero", value + 1, "wrong-value")):
                answer = f"<think>so</think> <answer>{attempt}</answer>"
                verdict = run_server.post("/v1/verdict", model=model, **request, answer=answer).json()
                assert (verdict["correct"], verdict["reason"]) == (attempt == value, reason), problem
    assert httpx.get(run_server.url + "/v1/problems?model=nobody").status_code == 404


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task": "jsonl:/etc/passwd"}, "was not trained on"),
        ({"task": "code"}, "was not trained on"),
        ({"language": "de"}, "it has en, zh"),
        ({"number": -1}, "number"),
        ({"answer": None}, "answer"),
    ],
)
def test_a_verdict_is_refused_by_name(run_server, changed, words):
    body = {"model": "zero", "task": "countdown", "language": "en", "number": 0, "answer": "x"} | changed
    answer = run_server.post("/v1/verdict", **body)
    assert answer.status_code == 400 and words in error_of(answer)["message"]


def test_a_run_from_elsewhere_names_no_file_of_ours(tmp_path):
    """Its recipe may name code and files; none of them is touched."""
    evil, marker = tmp_path / "evil.py", tmp_path / "seen"
    evil.write_text(f"open({str(marker)!r}, 'w')\nclass Task: pass\n")
    (tmp_path / "q.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    names = [
        f"{evil}:Task",
        f"jsonl:{tmp_path}/q.jsonl@test",
        f"jsonl:{tmp_path}/evil.py",
        "jsonl:PATH",
        "gym:../x",
        "no",
    ]
    run = tmp_path / "01-zero" / "model"
    run.mkdir(parents=True)
    (tmp_path / "recipe.toml").write_text(f'[[stage]]\nkind = "rl"\nname = "zero"\ntasks = {json.dumps(names)}\n')
    facts = SimpleNamespace(practice=trained_on.of_model(run))
    assert [skill.task for skill in facts.practice.skills] == names
    assert problems.offered(facts) == [] and not marker.exists()
    for name in names:
        with pytest.raises(ApiError, match="cannot be judged here"):
            problems._judge(AnswerToJudge(task=name, language="en", number=0, answer="4"))
    assert not marker.exists()


def test_hostile_answers_are_judged_in_time(run_server):
    """At most two at a time: none is executed, none is right, and the server keeps answering."""
    body = {"model": "zero", "task": "countdown", "language": "en", "number": 0}
    hostile = [
        "<answer>" + "9**" * 60_000 + "9</answer>",
        "<answer>__import__('os')</answer>",
        "(" * 190_000,
        "\0" * 999,
    ]
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(run_server.post, "/v1/verdict", **body, answer=answer) for answer in hostile * 2]
        assert httpx.get(run_server.url + "/health", timeout=5).status_code == 200
        assert all(future.result().json()["correct"] is False for future in sent)


def test_the_default_answer_length_is_the_trained_length(run_server):
    """1,100 positions of 4,096. A request that names a length gets it; a longer prompt has the rest of the context."""
    for words, total in ((510, 1100), (2015, 4096)):
        chat = [{"role": "user", "content": "a " * words}]
        size = run_server.post("/tokenize", messages=chat, model="zero").json()["count"]
        assert total - 80 < size < total
        reply = run_server.chat(chat[0]["content"], model="zero", ignore_eos=True).json()
        assert reply["usage"]["total_tokens"] == total and reply["choices"][0]["finish_reason"] == "length"
    reply = run_server.chat("a " * 510, model="zero", ignore_eos=True, max_tokens=77).json()
    assert reply["usage"]["completion_tokens"] == 77 and reply["usage"]["total_tokens"] > 1100
