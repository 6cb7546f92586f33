"""How many of the English words that a base model writes are words: of its own corpus, in which it read them.

    python bench/real_words.py RUN/STAGE [more] [--prompt "Once upon a time, a fox"] [--samples 40] [--temperature 0.7]

A word counts if the training pages of the run's corpus part `english` have it. Two bounds stand beside the model: the
held-out pages of that part, and their words with the letters of each in another order.
"""

import argparse
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import bessemer
from bessemer.addons.families.named_models import model_dir
from bessemer.data import shards
from bessemer.engine.engine import load_engine
from bessemer.runs.directory import stage_folders


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]{2,}", text.lower())


def page_words(part: Path, split: str, tokenizer: bessemer.Tokenizer) -> list[str]:
    """The words of a corpus part's `split`, "train" or "heldout"."""
    folder, meta = shards.follow(part)
    named = [shards.tokens_file(folder, shard["name"]) for shard in meta["parts"][split]["shards"]]
    return [word for file in named for word in words(tokenizer.decode(np.fromfile(file, shards.dtype_of(tokenizer))))]


def share(words: Iterable[str], vocabulary: set[str]) -> str:
    words = list(words)
    return f"{100 * sum(word in vocabulary for word in words) / len(words):.1f} % of {len(words):,} words"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt", default="Once upon a time, a fox")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    for name in args.models:
        folder = model_dir(name)
        engine = load_engine(folder)
        corpus = next(path for _, _, path in stage_folders(folder.parents[1]) if (path / "parts.json").is_file())
        vocabulary = set(page_words(corpus / "english", "train", engine.tokenizer))
        heldout = page_words(corpus / "english", "heldout", engine.tokenizer)
        rng = random.Random(0)
        shuffled = ["".join(rng.sample(word, len(word))) for word in heldout]
        [answers] = engine.generate(
            [args.prompt], samples=args.samples, temperature=args.temperature, max_new_tokens=200, seed=0
        )
        written = [word for answer in answers for word in words(answer.text)]
        print(f"{name}: {share(written, vocabulary)}; held-out pages {share(heldout, vocabulary)}, letters shuffled "
              f"{share(shuffled, vocabulary)}")  # fmt: skip


if __name__ == "__main__":
    main()
