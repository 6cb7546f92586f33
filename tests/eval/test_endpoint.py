"""A server as the model of a suite: ours in a process of its own, and others that answer badly."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from judge_server import JudgeServer
from made_data import write_data

from bessemer.addons.distributed import json_server
from bessemer.addons.evals import endpoint, suite_run
from bessemer.addons.evals.endpoint import Endpoint
from bessemer.cli import main
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("suites") / "data")


def serving(reply, models=("small",)):
    return JudgeServer(reply, models=[{"id": name} for name in models])


def evaluated(server, data, out, **options):
    model = Endpoint(server.url, **{k: options.pop(k) for k in ("served_model", "key_in") if k in options})
    call = {"suite": "r1", "only": ["aime-2024"], "data": [str(data)], "samples": 3, "max_new_tokens": 50}
    return suite_run.evaluate_suite(model, **call, out=out, **options)


def test_answers_are_scored_and_never_asked_for_twice(data, tmp_path):
    with serving(lambda question: "It is \\boxed{200}." if "20" in question else "\\boxed{3}") as server:
        result = evaluated(server, data, tmp_path)
        (row,) = result["rows"]
        assert (row["n"], row["k"], row["pass_at_1"]) == (2, 3, 0.5) and result["model"].endswith(" small")
        bodies = [body for body in server.requests]
        assert len(bodies) == 6 and len({body["seed"] for body in bodies}) == 6
        assert {(body["model"], body["temperature"], body["top_p"], body["max_tokens"]) for body in bodies} == {
            ("small", 0.6, 0.95, 50)
        }
        assert "put your final answer within" in bodies[0]["messages"][0]["content"]
        file = tmp_path / "aime-2024.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # killed in the middle of a line
        assert evaluated(server, data, tmp_path)["rows"] == [row] and len(server.requests) == 9
        with pytest.raises(UserError, match="different sampling"):
            evaluated(server, data, tmp_path, seed=1)


def test_thoughts_stand_before_the_answer(data, tmp_path):
    def message(question, **more):
        return 200, json.dumps({"choices": [{"message": {"content": "\\boxed{200}", **more}, "finish_reason": "stop"}],
                                "usage": {"completion_tokens": 7}}), {}  # fmt: skip

    for key in ("reasoning", "reasoning_content"):
        with serving(lambda question, key=key: message(question, **{key: "\\boxed{1}"})) as server:
            answer = Endpoint(server.url).answer("q", 1, temperature=1.0, top_p=1.0, max_new_tokens=9)
        assert answer.text == "<think>\n\\boxed{1}\n</think>\n\n\\boxed{200}"
        assert (answer.tokens, answer.finish_reason) == (7, "stop")


def test_half_a_surrogate_pair_is_an_answer_like_any_other(data, tmp_path):
    """As where an emoji was cut at the last token. JSON can hold it, and a file cannot."""
    reply = json.dumps({"choices": [{"message": {"content": "\\boxed{200} \ud83d"}, "finish_reason": "length"}]})
    with serving(lambda question: (200, reply, {})) as server:
        assert evaluated(server, data, tmp_path)["rows"][0]["pass_at_1"] == 0.5
    assert len((tmp_path / "aime-2024.jsonl").read_text("utf-8").splitlines()) == 7


NO_COMPLETION = ("[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 5}}]}', "x")


@pytest.mark.parametrize("reply", [*NO_COMPLETION, '{"choices": [{"message": null}]}'])
def test_a_reply_that_is_no_completion_is_refused(data, tmp_path, reply):
    with serving(lambda question: (200, reply, {})) as server, pytest.raises(UserError, match="the endpoint at"):
        evaluated(server, data, tmp_path)


def test_what_was_answered_before_a_failure_is_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_run, "ROWS", 3)
    monkeypatch.setattr(json_server, "PAUSE", 0.01)
    with serving(lambda question: (500, "busy", {}) if "20" in question else "\\boxed{2}") as server:
        with pytest.raises(UserError, match="status 500, busy"):
            evaluated(server, data, tmp_path)
        server.reply = lambda question: "\\boxed{2}"
        asked = len(server.requests)
        assert evaluated(server, data, tmp_path)["rows"][0]["pass_at_1"] == 0.5
        assert len(server.requests) == asked + 3


def test_a_refused_question_loses_no_answer_beside_it(data, tmp_path):
    """Such as one that is too long, or that a filter of the provider refuses."""
    with serving(lambda question: (400, "too long", {}) if "20" in question else "\\boxed{2}") as server:
        with pytest.raises(UserError, match="status 400, too long"):
            evaluated(server, data, tmp_path)
        assert len((tmp_path / "aime-2024.jsonl").read_text().splitlines()) == 1 + 3
        assert len(server.requests) == 6, "a refused request is not sent again"


def test_a_server_that_is_busy_is_asked_again(data, tmp_path, monkeypatch):
    """It answers two requests at a time, and six are sent."""
    monkeypatch.setattr(json_server, "PAUSE", 0.01)
    under_way, lock = [0], threading.Lock()

    def reply(question):
        with lock:
            under_way[0] += 1
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1
            return "\\boxed{2}" if under_way[0] < 2 else (429, "slow down", {"Retry-After": "0"})

    with serving(reply) as server:
        assert evaluated(server, data, tmp_path)["rows"][0]["n"] == 2
        assert len(server.asked) == 6 < len(server.requests)


def test_the_server_and_its_model_are_found_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr(json_server, "PAUSE", 0.01)
    with serving(str, models=("one", "two")) as server:
        with pytest.raises(UserError, match="one, two; choose one with --served-model"):
            Endpoint(server.url)
        with pytest.raises(UserError, match="does not serve three; it serves one, two"):
            Endpoint(server.url, "three")
        assert Endpoint(server.url, "two").model == "two" and server.requests == []
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer"):
        Endpoint("http://127.0.0.1:9/v1")


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SUITE_KEY", "s3cret")
    with serving(lambda question: (401, "bad key s3cret", {})) as server:
        asked = Endpoint(server.url, key_in="SUITE_KEY")
        with pytest.raises(UserError, match=r"status 401, bad key \*\*\*.*SUITE_KEY"):
            asked.answer("q", 1, temperature=1.0, top_p=1.0, max_new_tokens=9)
        assert server.headers[0][1]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["http://127.0.0.1:9", "--task", "countdown"], "--suite"),
    (["runs/none", "--suite", "r1", "--served-model", "x"], "--served-model has no effect"),
])  # fmt: skip
def test_options_without_effect_are_refused(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bessemer", "eval", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert complaint in capsys.readouterr().err


def test_our_own_server_answers_a_suite(data, tmp_path):
    tokenizer = Tokenizer.train(["Find the sum of two numbers. \\boxed{2} <think>"] * 8, 300, chat_style="r1")
    cfg = preset("tiny", vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, max_seq_len=400, init_std=0.12)
    tokenizer.save(tmp_path / "tokenizer")
    Transformer(cfg).initialise(3).save(tmp_path / "small", tokenizer_dir=tmp_path / "tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "bessemer", "serve", str(tmp_path / "small"), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            assert server.poll() is None
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                break
            time.sleep(0.1)
        command = [sys.executable, "-m", "bessemer", "eval", f"http://127.0.0.1:{port}/v1", "--suite", "r1", "--json"]
        options = ["--data", str(data), "--only", "aime-2024", "--samples", "2", "--max-tokens", "6", "--top-p", "1"]
        call = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
        assert call.returncode == 0, call.stderr
        (row,) = json.loads(call.stdout)["rows"]
        assert (row["n"], row["k"]) == (2, 2) and row["mean_length"] <= 6
        assert list((tmp_path / "evals" / "r1").glob("*/aime-2024.jsonl"))
    finally:
        server.kill()
        server.wait()


def test_requests_are_bounded(monkeypatch):
    monkeypatch.setattr(endpoint, "AT_ONCE", 3)
    with serving(lambda question: "x") as server:
        server.delay = 0.02
        asked = [(f"q{n}", n) for n in range(20)]
        answers = Endpoint(server.url).answers(asked, temperature=1.0, top_p=1.0, max_new_tokens=9)
        assert sorted(place for place, _ in answers) == list(range(20))
        assert 1 < server.most <= 3 and len(server.requests) == 20
