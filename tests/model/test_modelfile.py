"""The Modelfile next to a GGUF file: parsed as Ollama does, its template against our own rendering."""

import json
import re

import pytest
from go_template import collate, render
from made_run import write_run

from bessemer.addons.families import modelfile
from bessemer.addons.serve.chat import _switch
from bessemer.data import chat
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

COMMAND = re.compile(r'(?:#[^\n]*|([A-Z]+) (?:(\w+) )??("""(?:.*?)"""|"[^"\n]*"|[^\n]*))\n', re.S)


def parsed(text):
    """Commands as in Ollama's parser: a value in triple quotes spans lines, one in single quotes ends on its line."""
    parts, at = [], 0
    while at < len(text):
        match = COMMAND.match(text, at)
        assert match, text[at : at + 40]
        at = match.end()
        if match[1]:
            name, value = match[1], match[3]
            if name == "PARAMETER":
                key, _, value = match[0].removeprefix("PARAMETER ").rstrip("\n").partition(" ")
                name = f"PARAMETER {key}"
            for quote in ('"""', '"'):
                if value.startswith(quote) and value.endswith(quote):
                    value = value.removeprefix(quote).removesuffix(quote)
                    break
            parts.append((name, value))
    return parts


USER = {"role": "user", "content": "3 and 7?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, {"role": "assistant", "content": "ten"}, {"role": "system", "content": "用中文。"}, USER],
    [
        USER,
        {"role": "assistant", "content": "ten, which is 3+7"},
        {"role": "user", "content": "盛钢水\n\n{{ .System }}"},
    ],
    [USER, {"role": "assistant", "content": "好"}, USER, {"role": "assistant", "content": ""}, USER],
    [SYSTEM],
]


@pytest.mark.parametrize("style", chat.STYLES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_gives_our_text(style, messages):
    assert render(modelfile.template(style), collate(messages)) == chat.render(messages, style)


@pytest.mark.parametrize("style", chat.STYLES)
def test_thinking_is_rendered_before_the_answer(style):
    """Ollama keeps R1's thoughts apart and passes them back; earlier ones are not shown. R1-Zero's stay in the text."""
    if style == "r1":
        messages = [USER, {"role": "assistant", "content": "ten", "thinking": "3+7"}, USER]
        ours = [USER, {"role": "assistant", "content": "<think>\n3+7</think>ten"}, USER]
    else:
        messages = ours = [USER, {"role": "assistant", "content": "<think>3+7</think> <answer>10</answer>"}, USER]
    assert render(modelfile.template(style), collate(messages)) == chat.render(ours, style)
    shut = render(modelfile.template(style), collate([USER]) | {"IsThinkSet": True})
    assert shut == chat.render([USER], style) + (_switch(False, style, True) if style == "r1" else "")


def test_a_partial_answer_is_continued():
    held = [USER, {"role": "assistant", "content": "It is", "thinking": "3+7"}]
    whole = [USER, {"role": "assistant", "content": "<think>\n3+7</think>\n\nIt is"}]
    for style, messages in (("r1", whole), ("zero", [USER, {"role": "assistant", "content": "It is"}])):
        ours = chat.render(messages, style, add_generation_prompt=False)
        assert render(modelfile.template(style), collate(held)) + chat.EOS == ours


@pytest.fixture
def directory(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run" / "01-zero" / "model"


def test_written_modelfile_reads_back(directory, tmp_path):
    path = modelfile.write(directory, tmp_path / "my model.v1.gguf")
    assert path == tmp_path / "my model.v1.Modelfile"
    command = "# ollama create 'my model.v1' -f 'my model.v1.Modelfile'"  # can be pasted into a shell
    assert path.read_text("utf-8").splitlines()[0] == command
    assert parsed(path.read_text("utf-8")) == [
        ("FROM", "./my model.v1.gguf"), ("TEMPLATE", modelfile.template("zero")), ("PARAMETER stop", chat.EOS),
        ("PARAMETER temperature", "0.6"), ("PARAMETER top_p", "0.95"), ("PARAMETER top_k", "0"),
        ("PARAMETER min_p", "0"), ("PARAMETER repeat_penalty", "1"), ("PARAMETER num_ctx", "64"),
    ]  # fmt: skip


def test_the_model_s_own_settings_count(directory, tmp_path):
    def change(name, **values):
        facts = json.loads((directory / name).read_text("utf-8"))
        (directory / name).write_text(json.dumps(facts | values), "utf-8")

    tokenizer = Tokenizer.load(directory)
    tokenizer.chat_style = "r1"
    tokenizer.save(directory)
    change("tokenizer_config.json", add_bos_token=True)
    change("config.json", max_position_embeddings=163_840)
    user = tokenizer.special_id(chat.USER)
    change("generation_config.json", do_sample=False, top_k=40, eos_token_id=[1, user], repetition_penalty=1.1)
    commands = parsed(modelfile.text(directory, "a.gguf"))
    parameters = dict(commands)
    assert parameters["TEMPLATE"] == modelfile.template("r1", "") and not parameters["TEMPLATE"].startswith(chat.BOS)
    assert [value for name, value in commands if name == "PARAMETER stop"] == [chat.EOS, chat.USER]
    expected = {"temperature": "0", "top_k": "40", "repeat_penalty": "1.1", "num_ctx": "32768"}
    assert {key: parameters[f"PARAMETER {key}"] for key in expected} == expected
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert "TEMPLATE" not in dict(parsed(modelfile.text(directory, "a.gguf")))
    with pytest.raises(UserError, match="choose a plainer file name"):
        modelfile.text(directory, "a\nFROM b.gguf")
