"""A small bilingual corpus generated here and a tokenizer trained on it once; no test here uses the network."""

import os
import random

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read when the tokenizer library first starts its threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer

torch.set_num_threads(1)


def synthetic_texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    nouns = ["fox", "crow", "river", "smith", "furnace", "number", "teacher", "lantern"]
    texts = []
    for _ in range(n):
        a, b = draw.randint(1, 999), draw.randint(1, 99)
        x, y = draw.choice(nouns), draw.choice(nouns)
        sentences = [
            f"The {x} met the {y}, and they counted {a} stones.\n",
            f"User: {a} + {b}?\nAssistant:<think>{a} + {b} = {a + b}</think> <answer>{a + b}</answer>\n",
            f"有一天，狐狸遇见了乌鸦，他们一共数了{a}块石头。\n\n",
            f"def add_{x}(a, b):\n    return a + b  # {b}\n",
        ]
        texts.append("".join(draw.choices(sentences, k=draw.randint(1, 6))))
    return texts


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return synthetic_texts(1500)


@pytest.fixture(scope="session")
def documents(texts: list[str]) -> list[Document]:
    return [Document(text, "english" if i % 2 else "chinese") for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 1024)
