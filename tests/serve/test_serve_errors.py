"""Whatever is sent, the answer is an error in OpenAI's form, and the next request is served as usual."""

import json
import shutil
import socket

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import error_of, in_thread, running

from bessemer.addons.serve import ServeConfig
from bessemer.addons.serve import server as serve_module
from bessemer.addons.serve.models import find_models
from bessemer.errors import UserError
from bessemer.hf.model_directory import load

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "the fox"}]

BAD = [  # path, body, param, code
    (CHAT, {"messages": USER, "temperature": -1}, "temperature", "invalid_value"),
    (CHAT, {"messages": USER, "temperature": 1e9}, "temperature", "invalid_value"),
    (CHAT, {"messages": USER, "temperature": "0.5"}, "temperature", "invalid_value"),
    (CHAT, {"messages": USER, "top_p": 1.5}, "top_p", "invalid_value"),
    (CHAT, {"messages": USER, "top_k": -2}, "top_k", "invalid_value"),
    (CHAT, {"messages": USER, "min_p": 7}, "min_p", "invalid_value"),
    (CHAT, {"messages": USER, "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    (CHAT, {"messages": USER, "presence_penalty": 9}, "presence_penalty", "invalid_value"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens", "invalid_value"),
    (CHAT, {"messages": USER, "max_tokens": -5}, "max_tokens", "invalid_value"),
    (CHAT, {"messages": USER, "max_tokens": True}, "max_tokens", "invalid_value"),
    (CHAT, {"messages": USER, "n": 0}, "n", "invalid_value"),
    (CHAT, {"messages": USER, "n": 1000}, "n", "invalid_value"),
    (CHAT, {"messages": USER, "seed": 2**70}, "seed", "invalid_value"),
    (CHAT, {"messages": USER, "stop": [""]}, "stop[0]", "invalid_value"),
    (CHAT, {"messages": USER, "stop": 5}, "stop", "invalid_value"),
    (CHAT, {"messages": USER, "stop": ["a", "b\ufffd"]}, "stop", "invalid_value"),
    (CHAT, {"messages": USER, "functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    (CHAT, {"messages": USER, "function_call": {"name": "f"}}, "function_call", "unsupported_parameter"),
    (CHAT, {"messages": USER, "modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    (CHAT, {"messages": USER, "audio": {"voice": "a"}}, "audio", "unsupported_parameter"),
    ("/v1/responses", {"input": "a", "prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ("/v1/responses", {"input": "a", "top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
    ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"]}, "include", "unsupported_parameter"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 50}, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
    (CHAT, {"messages": USER, "tools": [{}], "tool_choice": "auto"}, "tools[0].type", "invalid_value"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "invalid_value"),
    (CHAT, {"messages": USER, "logit_bias": {"999": 1}}, "logit_bias", "invalid_value"),
    (CHAT, {"messages": USER, "logit_bias": {"fox": 1}}, "logit_bias", "invalid_value"),
    (CHAT, {"messages": USER, "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
     "response_format", "invalid_value"),
    ("/v1/responses", {"input": []}, "input", "invalid_value"),
    ("/v1/responses", {"input": [{"type": "reasoning"}]}, "input", "invalid_value"),
    ("/v1/responses", {"input": "the fox " * 200}, "input", "context_length_exceeded"),
    ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 4096, "instructions": "b"}, "input",
     "invalid_value"),
    ("/v1/responses", {"input": "a", "metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ("/v1/responses", {"input": "a", "previous_response_id": "r"}, "previous_response_id", "unsupported_parameter"),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function"}]}, "tools[0].name", "invalid_value"),
    ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format", "invalid_value"),
    (CHAT, {"messages": USER, "reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    (CHAT, {"messages": USER, "stream": "yes"}, "stream", "invalid_value"),
    (CHAT, {"messages": []}, "messages", "invalid_value"),
    (CHAT, {}, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": "the fox " * 200}]}, "messages", "context_length_exceeded"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300_000}]}, "messages", "context_length_exceeded"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value"),
    ("/v1/completions", {"prompt": []}, "prompt", "invalid_value"),
    ("/v1/completions", {"prompt": [[]]}, "prompt", "invalid_value"),
    ("/v1/completions", {"prompt": [999]}, "prompt", "invalid_value"),
    ("/v1/completions", {"prompt": [-1]}, "prompt[0]", "invalid_value"),
    ("/v1/completions", {"prompt": [1.5]}, "prompt[0]", "invalid_value"),
    ("/v1/completions", {"prompt": [5] * 160}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": [5] * 161, "echo": True, "max_tokens": 0}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ("/v1/completions", {"prompt": "a", "best_of": 4}, "best_of", "unsupported_parameter"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    ("/v1/completions", {"prompt": ["a"] * 100, "n": 100}, None, "too_many_samples"),
    ("/v1/completions", {"prompt": ["a"] * 2048, "n": 128, "echo": True, "max_tokens": 0}, None, "too_many_samples"),
    ("/v1/completions", {"prompt": [[5] * 160] * 200, "echo": True, "max_tokens": 0, "logprobs": 20}, "prompt",
     "invalid_value"),
    ("/v1/completions", {"prompt": ["a"] * 2049}, "prompt", "invalid_value"),
    ("/tokenize", {}, "prompt", "invalid_value"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt", "invalid_value"),
    ("/detokenize", {"tokens": [99999]}, "tokens", "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "code"), BAD)
def test_bad_values_are_named(server, path, body, param, code):
    answer = server.post(path, **body)
    error = error_of(answer)
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code), error


def test_a_schema_that_no_finite_value_fits_is_refused(server):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}
    answer = server.post(CHAT, messages=USER, response_format=form)
    assert answer.status_code == 400 and "cannot be enforced" in error_of(answer)["message"]
    assert server.post(CHAT, messages=USER, max_tokens=2).status_code == 200


def test_unsupported_fields_at_their_defaults_are_no_error(server):
    defaults = {"functions": [], "function_call": "none", "modalities": ["text"], "audio": None}
    assert server.chat(max_tokens=1, **defaults).status_code == 200
    defaults = {"prompt": None, "top_logprobs": 0, "include": ["reasoning.encrypted_content"]}
    assert server.post("/v1/responses", input="a", max_output_tokens=1, **defaults).status_code == 200


def test_many_short_messages_are_counted_as_the_tokens_they_make(server):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(59)]
    answer = server.post(CHAT, messages=turns, max_tokens=1)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] < 160


RAW = [  # body, status, code
    (b"{", 400, "invalid_json"),
    (b"", 400, "invalid_value"),
    (b"[]", 400, "invalid_value"),
    (b"null", 400, "invalid_value"),
    (b'{"messages": "\xff\xfe"}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_body"),
    (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "x"}], "unknown": [1, -Infinity]}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "x"}], "unknown": {"a": 1e999}}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "x"}], "unknown": {"\\ud800": 1}}', 400, "invalid_body"),
    (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", 400, "invalid_body"),
    (b"[" * 50_000, 400, "invalid_body"),
    (b" " * 5_000_000, 413, "body_too_large"),
    (b'{"prompt": [' + b"[]," * 300_000 + b"[]]}", 413, "body_too_large"),
]


@pytest.mark.parametrize(("body", "status", "code"), RAW, ids=range(len(RAW)))
def test_broken_bodies(server, body, status, code):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + CHAT, content=body, headers=headers)
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    chunked = httpx.post(server.url + CHAT, content=pieces, headers=headers)
    for answer in (response, chunked):
        assert answer.status_code == status and error_of(answer)["code"] == code, answer.text[:300]


HEADS = [  # lines of a request's head, status, code
    ([], 400, "invalid_http"),
    (["Host: localhost", "Host: evil.example"], 400, "invalid_http"),
    (["Host: localhost:1@evil.example"], 400, "invalid_host"),
    (["Host: evil.example#localhost"], 400, "invalid_host"),
    (["Host: localhost:port"], 400, "invalid_host"),
    (["Host:"], 400, "invalid_host"),
    (["Host: localhost", *(f"X-{n}: 1" for n in range(100))], 431, "head_too_large"),
    (["Host: localhost", "Cookie: " + "x" * 40_000], 431, "head_too_large"),
    (["Host: localhost", "Content-Length: 1", "Content-Length: 2"], 400, "invalid_http"),
]


@pytest.mark.parametrize(("lines", "status", "code"), HEADS, ids=range(len(HEADS)))
def test_broken_heads(server, lines, status, code):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plug:
        plug.sendall("\r\n".join(["GET /health HTTP/1.1", *lines, "", ""]).encode())
        answer = plug.recv(65536).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ") and json.loads(answer.split("\r\n\r\n")[1])["error"]["code"] == code


def test_a_large_but_honest_head_and_body(server):
    """20 kB of other local services' cookies, and a body with more lines than the parser takes at once."""
    cookie = {"Cookie": "; ".join(f"c{n}={'x' * 200}" for n in range(60))}
    body = json.dumps({"prompt": "the fox", "max_tokens": 1, "unknown": list(range(40_000))}, indent=1)
    answer = httpx.post(
        server.url + "/v1/completions", content=body, headers=cookie | {"Content-Type": "application/json"}
    )
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1


def test_every_route_takes_the_methods_of_its_document(server):
    document = httpx.get(server.url + "/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"):
            answer = httpx.request(method, server.url + path.replace("{model}", "r1"))
            if method.lower() in operations:
                assert answer.status_code in (200, 415), (method, path)
            else:
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].split(", ")) == {name.upper() for name in operations}
    assert len(document["paths"]) >= 9


def test_whole_numbers_may_be_written_with_a_point(server):
    expected = server.chat(max_tokens=2, seed=3).json()["choices"]
    assert server.chat(max_tokens=2.0, seed=3.0).json()["choices"] == expected
    assert error_of(server.chat(max_tokens=2.5))["param"] == "max_tokens"


def test_wrong_paths_and_methods(server):
    assert error_of(server.chat(model="r2"))["code"] == "model_not_found"
    assert "did you mean 'r1'" in error_of(server.chat(model="r2"))["message"]
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"), ("GET", CHAT, 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"), ("GET", "/static/none.js", 404, "not_found"),
        ("GET", "/static/..%2fapp.py", 404, "not_found"), ("DELETE", "/health", 405, "method_not_allowed"),
    ):  # fmt: skip
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    text = httpx.post(server.url + CHAT, content=json.dumps({"messages": USER}), headers={"Content-Type": "text/plain"})
    assert (text.status_code, error_of(text)["code"]) == (415, "unsupported_media_type")
    with socket.create_connection(("127.0.0.1", server.port)) as plug:
        plug.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        answer = plug.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400") and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"]
    assert server.chat(max_tokens=2).status_code == 200 and server.settles()


def test_unusual_values_that_are_no_mistake(server):
    plain = server.chat(max_tokens=4, temperature=0).json()["choices"]
    for body in (
        {"temperature": 1e-8}, {"temperature": 0, "top_k": -1}, {"temperature": 1.0, "top_p": 0},
        {"temperature": 0, "no_such_field": [1], "user": "me", "stop": None, "n": None, "logit_bias": {}},
    ):  # fmt: skip
        assert server.chat(max_tokens=4, **body).json()["choices"] == plain
    endless = server.chat(max_tokens=2**40, temperature=0, ignore_eos=True, return_token_ids=True).json()
    assert endless["usage"]["total_tokens"] == 160 and endless["choices"][0]["finish_reason"] == "length"


def test_the_client_raises_its_own_errors(server):
    api = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="r1", messages=USER, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="none", messages=USER)


def test_every_endpoint_but_the_public_ones_requires_the_api_key(r1):
    with running(r1, config=ServeConfig(api_key="s3cret", origins=("https://page.example",))) as server:
        for path in ("/v1/models", "/metrics", "/tokenizer_info"):
            answer = httpx.get(server.url + path)
            assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
        for header in ("Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret2"):
            assert httpx.get(server.url + "/v1/models", headers={"Authorization": header}).status_code == 401
        assert httpx.get(server.url + "/health").json()["auth"] is True
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="s3cret", max_retries=0)
        assert api.models.list().data
        origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(server.url + CHAT, headers=origin)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origin["Origin"]
        other = httpx.options(server.url + CHAT, headers=origin | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_another_name_is_refused(r1):
    """A web page that points its own name at this address (DNS rebinding) is refused."""
    with running(r1, config=ServeConfig(hosts=("127.0.0.1", "localhost", "[::1]"))) as server:
        assert httpx.get(server.url + "/v1/models", headers={"Host": "localhost:99"}).status_code == 200
        answer = httpx.get(server.url + "/v1/models", headers={"Host": "evil.example"})
        assert (answer.status_code, error_of(answer)["code"]) == (403, "unknown_host")


def test_an_unservable_model_is_an_error_at_start(r1, zero, tmp_path):
    with pytest.raises(UserError, match="no model or run at"):
        serve_module.serve(tmp_path / "none")
    with pytest.raises(UserError, match="anybody could use the model"):
        serve_module.serve(r1, host="0.0.0.0")
    with pytest.raises(UserError, match="not an address of this"):
        serve_module.serve(r1, host="256.1.1.1", force=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match=r"is in use;.*--port"):
            serve_module.serve(r1, port=listener.getsockname()[1])
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in r1.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    config = json.loads((wrong / "config.json").read_text())
    spec = json.loads((wrong / "tokenizer.json").read_text())
    for n in range(config["vocab_size"]):  # another, larger model's tokenizer
        spec["model"]["vocab"].setdefault(f"!{n}", len(spec["model"]["vocab"]))
    (wrong / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="do not match"):
        find_models(wrong, ServeConfig(), launch=in_thread).preload()


GOOD = {
    CHAT: {"messages": USER, "max_tokens": 1},
    "/v1/completions": {"prompt": "the fox", "max_tokens": 1},
    "/v1/responses": {"input": "the fox", "max_output_tokens": 1},
}


@pytest.mark.parametrize(
    ("path", "field", "better"),
    [
        ("/v1/responses", "max_tokens", "max_output_tokens"), ("/v1/responses", "stop", ""), ("/v1/responses", "n", ""),
        (CHAT, "max_output_tokens", "max_tokens"), (CHAT, "temprature", "temperature"), (CHAT, "echo", ""),
        ("/v1/completions", "stops", "stop"), ("/v1/completions", "response_format", ""),
        ("/v1/completions", "max_completion_tokens", "max_tokens"),
    ],
)  # fmt: skip
def test_an_unknown_field_that_means_something_is_refused(server, path, field, better):
    """Ignoring it would answer another question."""
    answer = server.post(path, **GOOD[path], **{field: 3})
    error = error_of(answer)
    assert answer.status_code == 400 and (error["code"], error["param"]) == ("unknown_parameter", field)
    assert repr(better) in error["message"] if better else "did you mean" not in error["message"]


@pytest.mark.parametrize(
    ("path", "extra"),
    [(CHAT, {"echo": False, "suffix": ""}), ("/v1/completions", {"tools": [], "response_format": {}})],
)
def test_a_field_that_asks_for_nothing_is_not_refused(server, path, extra):
    answer = server.post(path, **GOOD[path], **extra)
    assert answer.status_code == 200 and answer.headers["x-bessemer-ignored"] == ", ".join(extra)
    assert server.post(path, **GOOD[path], **dict.fromkeys(extra, 0)).status_code == 400


@pytest.mark.parametrize("path", ["/v1/responses", CHAT, "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_other_unknown_fields_are_named_in_a_header(server, path, stream):
    """What OpenAI adds, other servers' extensions, and names that no header can hold."""
    extra = {"store": True, "safety_identifier": "x", "a\r\nb: 盛": [1], "": 0, "seedling": None}
    answer = server.post(path, **GOOD[path], **extra, stream=stream)
    assert answer.status_code == 200
    assert answer.headers["x-bessemer-ignored"] == 'store, safety_identifier, a%0D%0Ab%3A%20%E7%9B%9B, ""'
    assert "x-bessemer-ignored" not in server.post(path, **GOOD[path]).headers


def with_file(folder, to, name, **values):
    """A copy of a model whose JSON file `name` has these values."""
    shutil.copytree(folder, to)
    written = json.loads((to / name).read_text())
    (to / name).write_text(json.dumps(written | values))
    return to


def test_end_ids_that_end_nothing_are_named(r1, tmp_path, capsys):
    bad = [5, 10**12, -3, True, "x", 4000]
    folder = with_file(r1, tmp_path / "ends", "generation_config.json", eos_token_id=bad)
    with running(folder) as server:
        assert server.chat(max_tokens=2).status_code == 200
        (model,) = server.models.loaded.values()
        assert 5 in model.stop_ids and 4000 not in model.stop_ids
    message = capsys.readouterr().err
    assert "generation_config.json" in message and "eos_token_id 1000000000000, -3, True, x, 4000" in message


def test_an_absurd_context_length_is_refused(r1, tmp_path):
    folder = with_file(r1, tmp_path / "long", "config.json", max_position_embeddings=10**15)
    with pytest.raises(UserError, match="max_position_embeddings"):
        find_models(folder, ServeConfig())


def test_an_unexpected_tensor_is_refused(r1, tmp_path):
    shutil.copytree(r1, tmp_path / "more")
    file = next((tmp_path / "more").glob("*.safetensors"))
    save_file({**load_file(file), "model.layers.0.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"extra\.weight"):
        load(tmp_path / "more")
