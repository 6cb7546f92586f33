"""Texts and recipes that several tests of this room use."""

import json
import random
import re
from pathlib import Path

import pytest

NOUNS = re.findall(
    r"\w+",
    "lion fox river stone market baker winter garden letter bridge soldier window farmer kitchen teacher island forest "
    "doctor village painter ship captain horse machine library song king shepherd mountain candle",
)
VERBS = re.findall(
    r"\w+",
    "carried watched followed answered painted counted forgot opened trusted repaired crossed measured visited hid "
    "borrowed praised sold found lost cleaned",
)
LINKS = ["because", "while", "although", "until", "before", "after", "since", "when", "unless", "though", "as"]


def prose(seed: int, sentences: int = 12) -> str:
    """English that the language model knows for English, and no two of which are alike."""
    draw = random.Random(seed)
    said = [
        f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.choice(('the', 'a', 'that'))} {draw.choice(NOUNS)} "
        f"{draw.choice(LINKS)} {draw.choice(NOUNS)} and {draw.choice(NOUNS)} {draw.choice(VERBS)} "
        f"{draw.choice(('with', 'without', 'for', 'to'))} {draw.randint(2, 9999)} of the {draw.choice(NOUNS)}."
        for _ in range(sentences)
    ]
    return " ".join(said)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a small data recipe: recipe(sources..., more lines) -> its path."""

    def write(*sources: str, more: str = "", unit: int = 20_000) -> Path:
        tables = "\n".join(f"[[source]]\n{source}" for source in sources)
        text = (
            'name = "small"\nseed = 3\nrow_length = 64\nheldout = 0.1\n'
            f"{more}\n[tokenizer]\nvocab_size = 600\n{tables}\n[engine]\nunit_bytes = {unit}\nworkers = 1\n"
        )
        path = tmp_path / "data.toml"
        path.write_text(text, "utf-8")
        return path

    return write
