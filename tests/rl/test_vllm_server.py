"""`vllm_server` against servers that are none, or that answer wrongly. A real one answers in test_vllm_runs.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from bessemer.addons.distributed import json_server
from bessemer.addons.distributed.json_server import LostServer, checked_url
from bessemer.addons.distributed.vllm_server import VLLMServer, body_of, check_version
from bessemer.engine.sequence import Request, SamplingParams
from bessemer.errors import UserError

REQUEST = Request((0, 5, 6), 2**64 - 1, 4, SamplingParams(1.0), (2,))
CHOICE = {"token_ids": [7, 8], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}
MODELS = {"data": [{"id": "adapter", "parent": "base"}, {"id": "base", "parent": None, "max_model_len": 64}]}


@pytest.fixture
def replies():
    """Status and body by path, which a test may change."""
    return {
        "/version": (200, {"version": "0.32.0"}),
        "/v1/models": (200, MODELS),
        "/v1/completions": (200, {"choices": [CHOICE]}),
        "/server_info": (200, {"vllm_config": {"model_config": {"dtype": "torch.float32"}, "device_config": {}}}),
        "seen": [],
    }


@pytest.fixture
def server(replies, tmp_path, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            replies["seen"].append((self.path, self.rfile.read(length), self.headers.get("Authorization")))
            status, body = replies.get(self.path.partition("?")[0], (404, {"detail": "Not Found"}))
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(json_server, "PAUSE", 0.01)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    yield VLLMServer(f"http://127.0.0.1:{listening.server_port}/v1", tmp_path, tokenizer)
    listening.shutdown()
    listening.server_close()


def test_the_base_model_is_asked_for_numbers_with_the_seed_of_the_sample(server, replies, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "key of a test")
    assert server.open() is None
    assert (server.model, server.max_model_len, server.dtype) == ("base", 64, "float32")
    completion = server.sample(REQUEST)
    assert completion.tokens.tolist() == [7, 8] and completion.logprobs.tolist() == [-1.0, -2.0]
    assert (completion.text, completion.finish_reason, completion.prompt_tokens) == ("7 8", "stop", 3)
    path, body, key = replies["seen"][-1]
    body = json.loads(body)
    assert path == "/v1/completions" and key == "Bearer key of a test"
    assert body["prompt"] == [0, 5, 6] and body["model"] == "base" and 0 <= body["seed"] < 2**63
    assert body["return_token_ids"] and body["stop_token_ids"] == [2] and body["ignore_eos"]


def test_a_stop_string_is_cut_from_the_text(server, replies):
    request = Request((0, 5), 1, 4, SamplingParams(1.0), (), ("8",))
    assert body_of(request)["stop"] == ["8"] and server.sample(request).text == "7 "


@pytest.mark.parametrize(("path", "reply", "complaint"), [
    ("/version", {"version": "0.20.1"}, "version 0.20.1"),
    ("/version", {"vrsion": "0.32"}, "no vLLM server"),
    ("/version", [], "no vLLM server"),
    ("/v1/models", {"data": []}, "lists no model"),
    ("/v1/models", {"data": "x"}, "lists no model"),
])  # fmt: skip
def test_other_servers_are_refused_before_the_first_sample(server, replies, path, reply, complaint):
    replies[path] = (200, reply)
    with pytest.raises(UserError, match=complaint):
        server.open()


def test_a_newer_version_is_a_warning():
    assert check_version("0.33.1", "x") is None and "0.34.0" in check_version("0.34.0", "x")


def test_updates_need_the_development_endpoints_and_no_cpu(server, replies):
    replies["/server_info"] = (200, {"vllm_config": {"device_config": {"device": "cpu"}}})
    assert server.open() is None
    with pytest.raises(UserError, match=r'on a CPU.*engine = "vllm"'):
        server.open(trains=True)
    del replies["/server_info"]
    assert server.open() is None
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        server.open(trains=True)


@pytest.mark.parametrize(("reply", "complaint"), [
    ({"choices": [CHOICE | {"token_ids": None}]}, "token_ids"),
    ({"choices": [CHOICE | {"token_ids": [7, "8"]}]}, "token_ids"),
    ({"choices": [CHOICE | {"logprobs": None}]}, "no logprobs"),
    ({"choices": [CHOICE | {"logprobs": {"token_logprobs": [-1.0]}}]}, "no logprobs"),
    ({"choices": [CHOICE | {"logprobs": {"token_logprobs": [-1.0, None]}}]}, "no logprobs"),
    ({"choices": []}, "not a completion"),
    ([], "not a completion"),
    (b"<html>", "JSON"),
    (b"[" * 100_000, "JSON"),
])  # fmt: skip
def test_replies_without_the_numbers_are_refused(server, replies, reply, complaint):
    replies["/v1/completions"] = (200, reply)
    with pytest.raises(UserError, match=complaint):
        server.sample(REQUEST)


def test_scores_are_those_of_the_prompt(server, replies):
    steps = [None, {"5": {"logprob": -0.5}}, {"9": {"logprob": -1.0}, "6": {"logprob": -0.25}}]
    replies["/v1/completions"] = (200, {"choices": [CHOICE | {"prompt_logprobs": steps}]})
    assert server.score([0, 5, 6]) == [-0.5, -0.25]
    for bad in (None, steps[:2], [None, {"5": {}}, {}]):
        replies["/v1/completions"] = (200, {"choices": [CHOICE | {"prompt_logprobs": bad}]})
        with pytest.raises(UserError, match="prompt_logprobs"):
            server.score([0, 5, 6])


def test_a_refusal_is_shown_and_names_the_key(server, replies):
    replies["/v1/completions"] = (400, {"error": "too long\x1b[2J"})
    with pytest.raises(UserError, match=r"status 400, .*too long") as caught:
        server.sample(REQUEST)
    assert "\x1b" not in str(caught.value)
    replies["/v1/completions"] = (401, {})
    with pytest.raises(UserError, match="VLLM_API_KEY"):
        server.sample(REQUEST)


def test_a_lost_server_is_tried_again_and_then_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(json_server, "PAUSE", 0.01)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LostServer, match=r"127.0.0.1:9 does not answer .*refused.*same command"):
        VLLMServer("http://127.0.0.1:9", tmp_path, None).open()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://x/?a=b"])
def test_only_addresses_of_servers_are_taken(url):
    with pytest.raises(UserError, match=r"rollout\.url"):
        checked_url(url, "rollout.url")
    assert checked_url("http://127.0.0.1:8000/v1/", "") == "http://127.0.0.1:8000"
