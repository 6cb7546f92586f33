"""A Hugging Face model of another architecture behind the same server."""

import sys
import threading
from pathlib import Path

import httpx
import pytest
from serving import error_of, running

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "data"))
from hf_cases import made
from hf_tokenizers import byte_level

from bessemer.addons.families.chat_template import ChatTemplate
from bessemer.data.chat import render_ids
from bessemer.engine.engine import load_engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "tiny-llama"
    made("llama", vocab_size=400).save_pretrained(folder)
    return byte_level(folder)


def test_a_foreign_model_is_served_like_ours(llama):
    engine = load_engine(llama)
    messages = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "the fox"}]
    (sample,) = engine.generate([render_ids(engine.tokenizer, messages)], seed=3, max_new_tokens=12)[0]
    with running(llama) as server:
        (model,) = httpx.get(server.url + "/v1/models").json()["data"]
        facts = model["bessemer"]
        assert (model["id"], facts["architecture"], facts["style"]) == ("tiny-llama", "llama", "own")
        assert facts["context"] == 128 and not facts["thinks"] and facts["sparse_layers"] == 0
        assert facts["parameters"] == sum(p.numel() for p in engine.model.parameters())
        body = {"messages": messages, "seed": 3, "max_tokens": 12, "thinking": True}
        choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
        assert choice["message"]["content"] == sample.text.lstrip() and "reasoning" not in choice["message"]
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["fox", "盛"]}}}
        choice = server.post("/v1/chat/completions", **body, response_format=form).json()["choices"][0]
        assert choice["message"]["content"] in ('"fox"', '"盛"') and choice["finish_reason"] == "stop"
        refused = server.post("/v1/chat/completions", **body, return_routing=True)
        assert error_of(refused)["code"] == "routing_unavailable"
        messages = {"prompt": "the fox", "max_tokens": 0, "echo": True, "logprobs": 1}
        text = server.post("/v1/completions", **messages).json()
        logprobs = text["choices"][0]["logprobs"]
        assert server.events("/v1/completions", **messages)[0]["choices"][0]["logprobs"] == logprobs
        assert logprobs["token_logprobs"][0] is None, "this tokenizer begins no text with a token of its own"
        assert text["choices"][0]["text"] == "the fox" and len(logprobs["tokens"]) > 1


def test_a_models_own_template_does_not_stop_other_streams(llama, monkeypatch):
    """It may take a second of processor time, in which the event loop must go on."""
    threads, render = [], ChatTemplate.__call__

    def noted(template, *args):
        threads.append(threading.get_ident())
        return render(template, *args)

    monkeypatch.setattr(ChatTemplate, "__call__", noted)
    with running(llama) as server:
        assert server.chat(max_tokens=2).status_code == 200
        turns = [{"role": "user", "content": "the fox"}]
        assert server.post("/tokenize", messages=turns).status_code == 200
        assert threads and server.thread.ident not in threads
