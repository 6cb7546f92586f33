"""Readers: every form is read, and faults in a file are named while the rest of it is read."""

import dataclasses
import gzip
import io
import json
import os
import resource
import threading
from collections import Counter
from pathlib import Path

import brotli
import hub_server
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_texts import jsonl, prose
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from bessemer.addons.curate import origins, steps, web
from bessemer.addons.curate.decode import RawText, ReadError, decode
from bessemer.addons.curate.reading import SourceGone, texts
from bessemer.addons.curate.settings import Source
from bessemer.config import places
from bessemer.errors import UserError

PAGE = (
    "<html><head><title>A tale</title></head><body><nav><a href='/'>Home</a> <a href='/b'>Menu</a></nav><article>"
    "<h1>A tale</h1>{}</article><footer>All rights reserved</footer></body></html>"
)


def _page(text: str) -> str:
    return PAGE.format("".join(f"<p>{line}.</p>" for line in text.split(". ")))


def _source(spec: Path, **more) -> Source:
    return Source("s", str(spec), "english", "english", **{"bad": "skip", "pause": 0.01, **more})


def _read(spec: Path, unit: int = 1 << 20, **more) -> tuple[list[str], Counter]:
    """(texts, faults by reason) of all units."""
    source = _source(spec, **more)
    documents = [
        document
        for u in origins.units(source, unit, None)[0]
        for piece in u.pieces
        for document in texts(piece, source, None)
    ]
    return [document.text for document in documents if isinstance(document, RawText)], Counter(
        document.reason for document in documents if isinstance(document, ReadError)
    )


def _warc(path: Path, pages: list[bytes], gzipped: bool, **headers_more: str) -> Path:
    more = [(name.replace("_", "-"), value) for name, value in headers_more.items()]
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=gzipped)
        for number, body in enumerate(pages):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html"), *more], protocol="HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(
                    f"http://example.org/{number}", "response", payload=io.BytesIO(body), http_headers=headers
                )
            )
    return path


def test_every_form_gives_the_same_texts(tmp_path):
    expected = [prose(i, 3) for i in range(5)]
    plain = jsonl(tmp_path / "a.jsonl", expected)
    txt = tmp_path / "b.txt"
    txt.write_text("\n\n\n".join(expected) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": expected}), tmp_path / "c.parquet", row_group_size=2)
    for path in (plain, txt):
        path.with_suffix(path.suffix + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        with pyarrow.output_stream(str(path) + ".zst", compression="zstd") as file:
            file.write(path.read_bytes())
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "b.txt", "b.txt.gz", "b.txt.zst", "c.parquet"):
        assert _read(tmp_path / name) == (expected, Counter()), name
    assert _read(tmp_path / "*.jsonl*") == (expected * 3, Counter())
    listed, ignored = origins.units(_source(tmp_path), 1 << 20, None)
    assert (len(listed), ignored) == (1, 0)
    assert len(listed[0].pieces) == 7


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL"])
def test_large_files_are_cut_into_pieces_whatever_the_case_of_their_suffix(tmp_path, name):
    (tmp_path / name).write_text("".join(json.dumps({"text": f"Document {n}."}) + "\n" for n in range(100)))
    assert sum(len(unit.pieces) for unit in origins.units(_source(tmp_path / name), 1000, None)[0]) > 2


def test_another_key_and_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    path.write_text(json.dumps({"body": "One."}) + "\n" + json.dumps(chat) + "\n")
    texts_read, faults = _read(path, text_key="body")
    assert texts_read[0] == "One."
    assert "Hello?" in texts_read[1]
    assert not faults


@given(
    st.lists(st.text(alphabet="ab é你\n", min_size=1, max_size=12).filter(str.strip), max_size=12), st.integers(1, 40)
)
@settings(deadline=None, max_examples=60)
def test_cut_anywhere_files_give_the_same_texts(tmp_path_factory, contents, unit):
    folder = tmp_path_factory.mktemp("cut")
    path = jsonl(folder / "a.jsonl", contents)
    txt = folder / "b.txt"
    txt.write_text("\n \n".join(contents), "utf-8")
    if path.stat().st_size:
        assert _read(path, unit) == (contents, Counter())
    if txt.stat().st_size:
        assert _read(txt, unit) == _read(txt, 1 << 20)


def test_row_groups_of_a_parquet_file_are_units(tmp_path):
    expected = [prose(i, 3) for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.table({"text": expected}), tmp_path / "c.parquet", row_group_size=2)
    assert len(origins.units(_source(tmp_path / "c.parquet"), 1000, None)[0]) > 2
    assert _read(tmp_path / "c.parquet", 1000) == (expected, Counter())


def test_names_and_patterns_start_at_the_recipe(tmp_path, monkeypatch):
    beside, current = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside / "raw", current / "raw"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(folder.parent.name)
    (current / "only.txt").write_text("here")
    monkeypatch.chdir(current)
    for spec, expected in (("raw/a.txt", "recipes"), ("raw/*.txt", "recipes"), ("raw", "recipes"), ("only.txt", "here"),
                         ("on*.txt", "here")):  # fmt: skip
        with places.of_recipe(beside):
            ((unit,), _) = origins.units(_source(Path(spec)), 1000, None)
        assert Path(unit.pieces[0].path).read_text() == expected
    with places.of_recipe(current):
        assert origins.units(_source(Path("raw/*.txt")), 1000, None)[0][0].pieces[0].path == "raw/a.txt"


def test_a_data_set_is_read_file_by_file(tmp_path, monkeypatch):
    """The library takes a folder owner/name under the working directory to be the data set of that name."""
    pytest.importorskip("datasets")
    expected = [prose(i, 2) for i in range(6)]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for number in range(3):
        some = expected[2 * number : 2 * number + 2]
        pyarrow.parquet.write_table(pyarrow.table({"text": some}), tmp_path / f"owner/name/train-{number}.parquet")
    monkeypatch.chdir(tmp_path)
    source = _source(Path("x"), retries=0)
    source = dataclasses.replace(source, spec="hf://owner/name")
    units = origins.units(source, 1 << 20, None)[0]
    assert len(units) == 3
    actual = [document.text for unit in units for document in texts(unit.pieces[0], source, None)]
    assert sorted(actual) == sorted(expected)
    (tmp_path / "owner" / "name" / "train-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceGone, match="cannot be read"):
        list(texts(units[1].pieces[0], source, None))


def test_a_build_keeps_the_commit_of_a_data_set_and_tells_its_workers(tmp_path, monkeypatch):
    datasets, requests = pytest.importorskip("datasets"), []

    class Rows(list):
        num_shards = 2

        def shard(self, num_shards, index):
            return self

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *name, revision=None, **_: requests.append((name, revision)) or Rows()
    )
    source = dataclasses.replace(_source(Path("x"), retries=0), spec="hf://own/name/en#test")
    with hub_server.serving(monkeypatch) as server:
        first = server.commit({"a": b"1"})
        for _ in range(2):
            with places.of_recipe(None, tmp_path / "revisions.json"):
                listed = origins.units(source, 1 << 20, None)[0]
            assert [unit.pieces[0].path for unit in listed] == [f"hf://own/name@{first}/en#test"] * 2
            list(texts(listed[0].pieces[0], source, None))  # as in another process
            server.commit({"a": b"2"})
    assert requests == [(("own/name", "en"), first)] * 4


def test_bad_records_are_named(tmp_path):
    good = json.dumps({"text": "Good."}).encode()
    lines = [good, b"", b"{broken", b"[1]", b'{"other": 1}', b'{"text": "  "}', b'{"text": null}', b'{"text": 3}',
             b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": "' + b"x" * 300 + b'"}', good]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, faults = _read(path, longest=200)
    assert documents == ["Good.", "Good."]
    assert faults == {"empty": 3, "broken-record": 5, "too-long": 2}


def test_gigabyte_line_is_skipped_in_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:  # mostly a hole, so that it takes little disk space
        file.write(b'{"text": "before"}\n')
        file.seek(1 << 30)
        file.write(b'\n{"text": "behind"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _read(path, 1 << 40) == (["before", "behind"], {"too-long": 1})
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # KB; the longest line that a source allows is 10,000


def test_encodings_are_detected_and_counted(tmp_path):
    chinese = "老鼠向狮子挑战，狮子断然拒绝了。“怎么，你害怕了？”老鼠问。“非常害怕，”狮子说。"
    russian = "Лиса и ворон жили в одном лесу и часто спорили о том, кто из них умнее."
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\n\n".join([chinese.encode(), chinese.encode("gb18030"), russian.encode("cp1251"), bytes(range(1, 250))])
    )
    source = _source(path)
    unit = origins.units(source, 1 << 20, None)[0][0]
    out = tmp_path / "out"
    out.mkdir()
    facts = steps.read(out, unit, None)
    assert facts["decoded"] == {"cp1251": 1, "gb18030": 1}
    assert facts["dropped"]["encoding"]["documents"] >= 1
    assert facts["found"]["documents"] == facts["kept"]["documents"] + facts["dropped"]["encoding"]["documents"]
    assert facts["languages"] == {"ru": 1, "zh": 2}
    utf16 = tmp_path / "b.txt"
    utf16.write_text(f"{chinese}\n\n{russian}\n", "utf-16")
    assert _read(utf16, 8) == ([chinese, russian], Counter())
    marked = tmp_path / "c.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "Marked."}).encode())
    assert _read(marked) == (["Marked."], Counter())
    assert decode(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xff") is None


@pytest.mark.parametrize("harm", ["cut", "lone surrogate"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_broken_utf16_file_keeps_what_was_read_before(tmp_path, suffix, harm):
    expected = [prose(number, 40) for number in range(200)]
    whole = "\n\n".join(expected) if suffix == ".txt" else "\n".join(json.dumps({"text": text}) for text in expected)
    data = f"{whole}\n".encode("utf-16")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data[:-1] if harm == "cut" else data + b"\x00\xd8\n\x00")
    found, faults = _read(path)
    assert found == expected[: len(found)] and faults == {"broken-file": 1}
    assert len(found) >= 150, "the decoder reads some thousand characters at a time"


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_text('{"text": "One."}')
    with pytest.raises(UserError, match=r"caf\\xe9.*rename"):
        _read(tmp_path)


@pytest.mark.parametrize("text", [
    "Die Straße führt über die Brücke, und die Bäume blühen schön. ", "Le café près de la forêt est fermé à Noël. ",
    "El niño pequeño corrió detrás de la cigüeña. ", "狮子断然拒绝了。", "Лиса и ворон жили в одном лесу. ",
])  # fmt: skip
def test_utf8_with_a_broken_byte_is_not_guessed_to_be_another_encoding(text):
    """Katakana and Polish letters came out of French and German pages."""
    data = (text * 20).encode()
    cut = next(place for place, byte in enumerate(data) if byte >= 0xC0)
    assert decode(data[: cut + 1] + b"..." + data) is None
    assert decode(b'<meta charset="utf-8">' + data[: cut + 1] + b"..." + data, declared=True) is None


def test_wrong_charset_declaration_is_ignored():
    page = b'<meta charset="undefined">caf\xe9'  # that codec refuses everything, even bytes of ASCII
    assert decode(page, declared=True) == decode(page)
    assert web._declared(b"\xe9", "undefined") is None and web._declared(b"\xe9", "latin-1") == ("é", "latin-1")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.warc", "a.warc.gz"])
def test_truncated_or_altered_files_keep_earlier_documents(tmp_path, name):
    expected = [prose(i, 40) for i in range(60)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": expected}), path)
    elif ".warc" in name:
        _warc(path, [_page(text).encode() for text in expected[:6]], name.endswith(".gz"))
    else:
        data = jsonl(tmp_path / "whole.jsonl", expected).read_bytes()
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(data))
        else:
            with pyarrow.output_stream(str(path), compression="zstd") as file:
                file.write(data)
    complete, faults = _read(path)
    assert not faults
    assert len(complete) == (6 if ".warc" in name else 60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    actual, faults = _read(path)
    assert faults["broken-file"] == 1
    assert len(actual) < len(complete)
    assert actual[:-1] == complete[: max(0, len(actual) - 1)]
    if name.endswith((".warc", ".warc.gz")):
        assert actual
    path.write_bytes(data[:30] + bytes(200) + data[230:])
    actual, faults = _read(path)
    assert sum(faults.values()) or len(actual) < len(complete) or actual != complete


def test_a_parquet_file_of_an_unknown_type_is_a_broken_file(tmp_path):
    """One damaged byte can make a type that nobody has, which pyarrow does not implement."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."], "n": pyarrow.array([7], pyarrow.int8())}), path)
    data, reasons = path.read_bytes(), Counter()
    for place in range(4, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 3]) + data[place + 1 :])
        reasons += _read(path)[1]
    assert reasons["broken-file"] > 10


def test_pages_give_their_main_text(tmp_path):
    text = prose(4, 12)
    _warc(tmp_path / "a.warc.gz", [_page(text).encode(), b"", b"<html></html>", b"x" * 40_000], True)
    documents, faults = _read(tmp_path / "a.warc.gz", longest=30_000)
    assert faults == {"empty": 1, "no-text": 1, "too-long": 1}
    assert text[:60] in documents[0]
    assert "Menu" not in documents[0]
    assert "rights" not in documents[0]
    declared = _page("Le café est fermé à cause de la grève. " * 8).replace("<head>", '<head><meta charset="latin-1">')
    (tmp_path / "b.html").write_bytes(declared.encode("latin-1"))
    assert "Le café est fermé" in _read(tmp_path / "b.html")[0][0]


def test_pages_are_read_in_the_encoding_of_their_transfer(tmp_path):
    body = _page(prose(4, 12)).encode()
    (plain,), _ = _read(_warc(tmp_path / "plain.warc.gz", [body], True))
    for name, compress in (("gzip", gzip.compress), ("br", brotli.compress)):
        path = _warc(tmp_path / f"{name}.warc.gz", [compress(body)], True, Content_Encoding=name)
        assert _read(path) == ([plain], Counter()), name
    bomb = brotli.compress(bytes(1 << 30), quality=1)
    path = _warc(tmp_path / "bomb.warc.gz", [bomb, brotli.compress(body)], True, Content_Encoding="br")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _read(path) == ([plain], {"encoding": 1})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize("gzipped", [False, True])
def test_an_archive_cut_at_any_byte_keeps_the_pages_before(tmp_path, gzipped):
    """Also in the middle of a header, which then has no address."""
    whole = _warc(tmp_path / "whole.warc", [_page(prose(number, 1)).encode() for number in range(2)], gzipped)
    complete, _ = _read(whole)
    data = whole.read_bytes()
    for end in range(len(data) * 2 // 5, len(data), 3):
        path = tmp_path / "cut.warc"
        path.write_bytes(data[:end])
        found, faults = _read(path)
        assert found == complete[: len(found)] and faults in ({}, {"broken-file": 1}), end


def test_plain_texts_of_an_archive_are_complete_or_dropped(tmp_path):
    path = tmp_path / "a.warc.wet.gz"
    with path.open("wb") as file:
        writer = WARCWriter(file)
        for body in (b"Short.", b"x" * 1001, b" \n", b"y" * 1000):
            writer.write_record(writer.create_warc_record("http://example.org", "conversion", payload=io.BytesIO(body)))
    assert _read(path, longest=1000) == (["Short.", "y" * 1000], {"too-long": 1, "empty": 1})


def test_an_empty_folder_and_a_wrong_path_are_refused(tmp_path):
    (tmp_path / "x.doc").write_text("x")
    with pytest.raises(UserError, match="contains no file"):
        origins.units(_source(tmp_path), 1, None)
    with pytest.raises(UserError, match="contains no file"):
        origins.units(_source(tmp_path / "*.jsonl"), 1, None)
    with pytest.raises(UserError, match="no file or directory"):
        origins.units(_source(tmp_path / "none.jsonl"), 1, None)


def _planned(path: Path, **more):
    source = _source(path, **more)
    return origins.units(source, 1 << 20, None)[0][0]


def test_vanished_source_is_retried(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["One.", "Two."])
    data, facts = path.read_bytes(), path.stat()
    unit = _planned(path, bad="refuse", retries=8, pause=0.02)
    path.unlink()
    out = tmp_path / "out"
    out.mkdir()

    def back() -> None:
        hidden = tmp_path / "b"
        hidden.write_bytes(data)
        os.utime(hidden, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        hidden.rename(path)

    timer = threading.Timer(0.3, back)
    timer.start()
    assert steps.read(out, unit, None)["kept"]["documents"] == 2
    timer.join()


def test_lost_source_is_refused_or_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["One.", "Two."])
    refused, skipped = _planned(path, bad="refuse", retries=1), _planned(path, retries=1)
    path.unlink()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl can no longer be read.*2 attempts"):
        steps.read(out, refused, None)
    facts = steps.read(out, skipped, None)
    assert facts["dropped"]["gone"]["documents"] == 1
    assert not facts["complete"]


def test_file_changed_during_reading_is_noticed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["One.", "Two."])
    unit = _planned(path)
    reading = texts(unit.pieces[0], unit.source, None)
    next(reading)
    with path.open("a") as file:
        file.write('{"text": "Three."}\n')
    with pytest.raises(SourceGone, match="changed while it was read"):
        list(reading)


def test_bad_records_are_refused_where_the_recipe_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Good."}\n{"text": \n')
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r'a\.jsonl at byte 18: not JSON.*bad = "skip"'):
        steps.read(out, _planned(path, bad="refuse"), None)
