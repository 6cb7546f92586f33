"""Damages every kind of file in a run, one bit or one cut at a time, and records what its readers do with it.

    python bench/corruption.py               all kinds; results go to bench/results/corruption.json
    python bench/corruption.py done.json 20  one kind, that many damages a file, to the screen only

A flipped bit or a cut must end in a one-line error, in a rerun of the stage, or in the same result. A traceback is
never right. Where nothing can detect the damage, as with a weight in a directory from elsewhere or a lost line of
metrics, a different result is allowed and counted as `unnoticed`. GGUF files are not covered: they are read only from
packages, whose SHA-256 is pinned.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("pipeline", "shared")]

import stages_run  # noqa: E402
import torch  # noqa: E402

from bessemer.addons.families.conversion import convert  # noqa: E402
from bessemer.addons.watch import card  # noqa: E402
from bessemer.config.recipe import Recipe  # noqa: E402
from bessemer.errors import UserError  # noqa: E402
from bessemer.hf.families import load_tokenizer  # noqa: E402
from bessemer.hf.model_directory import load  # noqa: E402
from bessemer.pipeline import runner  # noqa: E402
from bessemer.runs.metrics import Metrics  # noqa: E402
from bessemer.train import checkpoint  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "corruption.json"
SHORT = (
    "pretrain.tokens=4K", "pretrain.validate_every=2K", "pretrain.sample_every=2K", "pretrain.lr=1e-2",
    "corpus.limits.arithmetic=10K", "pretrain.save_seconds=0", "zero.rollouts=2", "eval.problems=2",
)  # fmt: skip


class Again(Exception):
    """Raised when the runner would run a stage again."""


def again(item: Any, *_: Any) -> None:
    raise Again(item.name)


def tensors_of(named: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(named):
        digest.update(name.encode())
        digest.update(named[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_model(directory: Path) -> Any:
    model, tokenizer = load(directory), load_tokenizer(directory)
    ids = tokenizer.encode("User: what is 3+4?")
    return tensors_of(model.state_dict()), model.cfg.model_dump(), tokenizer.fingerprint, tokenizer.chat_template, ids


def read_state(state: Path) -> Any:
    """The newest whole checkpoint; an older one counts as noticed."""
    warnings: list[str] = []
    state_found = checkpoint.latest(state, warn=warnings.append)
    if warnings:
        raise Again("the checkpoint before it")
    assert state_found is not None
    return (
        state_found[0].name,
        {stem: tensors_of(t) for stem, t in state_found[1].tensors.items()},
        state_found[1].counters,
    )


def run_again(out: Path) -> Any:
    results = runner.run(Recipe.load(out.parent / "small.toml", SHORT), out)
    return [(result.name, result.status, result.summary) for result in results]


def recipe_again(out: Path) -> Any:
    """As `bessemer run RUN/recipe.toml`."""
    results = runner.run(Recipe.load(out / "recipe.toml"), out)
    return [(result.name, result.status, result.summary) for result in results]


def read_report(out: Path) -> Any:
    return card.render(card.read(out)) and None


def rewind_metrics(out: Path) -> Any:
    metrics = Metrics(out / "metrics.jsonl")
    try:
        return len(metrics.rewind("zero", 0))
    finally:
        metrics.close()


class Kind(NamedTuple):
    folder: str
    """The folder copied for each damage."""
    files: str
    """Pattern of the files to damage."""
    read: Callable[[Path], Any]
    strict: bool = True
    """Whether a different result is wrong."""
    share: float = 1.0
    """Share of the damages to try: slow readers get fewer."""


KINDS = {
    "model of a run": Kind("run", "02-pretrain/model/*", lambda out: read_model(out / "02-pretrain" / "model")),
    "model from elsewhere": Kind("model", "*", read_model, strict=False),
    "model in shards, from elsewhere": Kind("shards", "*.index.json", read_model),
    "training state": Kind("state", "step-*/*", read_state),
    "done.json": Kind("run", "*/done.json", run_again),
    "stage.json": Kind("run", "*/stage.json", run_again),
    "wall.json": Kind("run", "*/wall.json", run_again),
    "corpus": Kind("run", "01-corpus/*/*", run_again, share=0.5),
    "rollouts.jsonl, samples.md, results.json": Kind("run", "0[34]-*/[rs]*[sl].[jm]*", run_again, share=0.5),
    "recipe.toml": Kind("run", "recipe.toml", recipe_again),
    "metrics.jsonl": Kind("run", "metrics.jsonl", rewind_metrics, strict=False),
    "report": Kind("run", "[mc]*.json*", read_report, strict=False, share=0.5),
    "report, stages": Kind("run", "*/*.json*", read_report, strict=False, share=0.1),
}


def write_inputs(folder: Path) -> None:
    stages_run.run(stages_run.write_recipe(folder), folder / "run", *SHORT)
    trained = folder / "run" / "02-pretrain"
    shutil.copytree(trained / "model", folder / "model")
    shutil.copytree(trained / "state", folder / "state", ignore=shutil.ignore_patterns("rows", "tokenizer"))
    convert(folder / "model", folder / "shards", max_shard_bytes=60_000)


def damages(data: bytes, n: int, draw: random.Random) -> list[tuple[str, bytes]]:
    """`n` bit flips, half of them in the first and last 200 bytes, and a third as many cuts."""
    ends = [*range(min(200, len(data))), *range(max(0, len(data) - 200), len(data))]
    cases = []
    for turn in range(n):
        at = draw.choice(ends) if turn % 2 else draw.randrange(len(data))
        bit = 1 << draw.randrange(8)
        cases.append((f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]))
    cuts = {0, *(draw.randrange(len(data)) for _ in range(n // 3))}
    return cases + [(f"cut to {at} bytes", data[:at]) for at in sorted(cuts)]


def outcome(kind: Kind, folder: Path, good: Any) -> tuple[str, str]:
    try:
        result = kind.read(folder)
    except UserError as error:
        return "error", str(error)
    except Again as error:
        return "again", str(error)
    except Exception:
        return "TRACEBACK", traceback.format_exc()
    if result == good:
        return "same", ""
    return ("DIFFERENT" if kind.strict else "unnoticed"), ""


def try_kind(name: str, inputs: Path, work: Path, n: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes by name, and a line for each that is wrong."""
    kind, draw = KINDS[name], random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    copy = work / "copy"

    def fresh() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(inputs / kind.folder, copy)
        for extra in inputs.glob("*.[tj]*"):  # the recipe and its text
            shutil.copy2(extra, work / extra.name)
        return copy

    good = kind.read(fresh())
    files = sorted(path.relative_to(copy) for path in copy.glob(kind.files) if path.is_file())
    assert files, name
    for file in files:
        data = (inputs / kind.folder / file).read_bytes()
        for what, damaged in damages(data, max(2, round(n * kind.share / len(files) ** 0.5)), draw) if data else ():
            (fresh() / file).write_bytes(damaged)
            result, words = outcome(kind, copy, good)
            counts[result] += 1
            if result.isupper():
                wrong.append(f"{file}, {what}: {result} {words}")
    return counts, wrong


def quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runner.RunProgress.say = lambda self, what: None  # type: ignore[method-assign]
    runner._run_one = again


def main(words: list[str]) -> None:
    names = [name for name in KINDS if not words or words[0] in name]
    n = int(words[1]) if len(words) > 1 else 20
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        quiet()
        results, faults = {}, 0
        for name in names:
            counts, wrong = try_kind(name, inputs, Path(temporary) / "work", n)
            results[name] = dict(sorted(counts.items()))
            faults += len(wrong)
            print(f"{name}: {counts.total()} damages: {results[name]}", *wrong[:5], sep="\n  ", flush=True)
            if not words:
                total = sum(sum(counts.values()) for counts in results.values())
                facts = {"damages": total, "wrong": faults, "kinds": results}
                RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
