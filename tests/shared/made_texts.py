"""Generated texts for tests: English prose, and files of it."""

import json
import random
import re
from pathlib import Path

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
    """Text that the language detector takes for English; no two are alike."""
    draw = random.Random(seed)
    lines = [
        f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.choice(('the', 'a', 'that'))} {draw.choice(NOUNS)} "
        f"{draw.choice(LINKS)} {draw.choice(NOUNS)} and {draw.choice(NOUNS)} {draw.choice(VERBS)} "
        f"{draw.choice(('with', 'without', 'for', 'to'))} {draw.randint(2, 9999)} of the {draw.choice(NOUNS)}."
        for _ in range(sentences)
    ]
    return " ".join(lines)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path
