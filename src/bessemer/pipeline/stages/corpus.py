"""Stage "corpus": fetch documents, train a tokenizer, pack rows (V3 4.1).

Output: tokenizer/ and one folder of packed rows per source (an entry of `parts`). The text of a source comes from a
registry name, a path or hf://owner/name; from the pre-training documents of a task ("task:NAME"), which exist for its
train split only; or from pages that hide sentences in the training documents of another source ("needle:SOURCE").
"shards:FOLDER" is a source that `bessemer data build` made: it is not copied, and all sources use its tokenizer.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from bessemer import plugins, tasks
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_tokens
from bessemer.data import corpus, sources
from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.pipeline import preflight
from bessemer.pipeline.inputs import NEEDLE, SHARDS, TASK
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import StageWork
from bessemer.runs.context import StageContext
from bessemer.train.setup import model_config
from bessemer.workers import Workers, cores, shares, side_by_side

UNLIMITED, PACKED = 5_000_000, 600_000
"""For the time it takes: tokens assumed of a part without a limit; tokens read, tokenised and packed in a second on two
cores, the training of the tokenizer included."""


class Corpus(Stage[CorpusConfig]):
    format = 2

    def resolve(self, config: CorpusConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.parts:
            raise UserError(f'stage "{config.name}": parts is empty; name at least one source')
        for key in (*config.limits, *config.fim_parts, *config.mix):
            if key not in config.parts:
                known = ", ".join(config.parts)
                raise UserError(f'stage "{config.name}": "{key}" is not one of its parts ({known})')
        for source, spec in config.parts.items():
            if not re.fullmatch(r"\w[\w.-]*", source) or source in ("state", "tokenizer"):
                raise UserError(
                    f'stage "{config.name}": part {source!r} names a folder: use letters, digits, -, _ and ., but '
                    "neither state nor tokenizer, which are the stage's own"
                )
            if spec.startswith((TASK, NEEDLE)):
                if spec.startswith(TASK):
                    _task(config, source).document(0)  # UserError for a task without documents
                if source not in config.limits:
                    raise UserError(f'stage "{config.name}": part "{source}" is endless; give it a limit in tokens')
            elif spec.startswith(SHARDS) and source in (*config.limits, *config.fim_parts):
                raise UserError(
                    f'stage "{config.name}": "{source}" is tokenised already; limits and fim_parts are for other parts'
                )
            elif source in config.mix:
                raise UserError(f'stage "{config.name}": mix is for documents of tasks, which "{source}" is not')
        owner = None if config.tokenizer is None else recipe.stage(config.tokenizer)
        if owner is not None and owner.kind != "corpus" and not owner.makes_model:
            raise UserError(
                f'stage "{config.name}": tokenizer = "{config.tokenizer}" is of kind {owner.kind}, which has none; '
                "name a corpus, or a stage that makes a model"
            )
        for source in config.mix:
            if config.parts[source].startswith(NEEDLE):
                knobs: dict[str, Any] = config.mix[source]
                _needles("needle-task")({}, **knobs)  # checks them
        parts = _shards(config)
        return {"vocab_size": model_config(recipe).vocab_size} | ({} if parts is None else parts.identity(config))

    def probes(self, config: CorpusConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        for part, spec in config.parts.items():
            if not spec.startswith((TASK, SHARDS)):
                limit = None if spec.startswith(NEEDLE) else config.limits.get(part)
                sample = 0 if config.tokenizer else config.vocab_sample
                least = None if limit is None else max(limit // 4, sample)  # a character is four tokens at most
                yield preflight.of_key(f"parts.{part}", partial(sources.check, spec.removeprefix(NEEDLE), least))

    def work(self, config: CorpusConfig, recipe: Recipe) -> list[StageWork]:
        """Tokens of the parts with a limit; of the others the size is not known before they are read."""
        tokens = sum(config.limits.get(part, UNLIMITED) for part in config.parts)
        return [StageWork(seconds=1.5 + 2 * tokens / (PACKED * cores()))]

    def run(self, config: CorpusConfig, ctx: StageContext) -> dict[str, Any]:
        ctx.rewind(-1)
        vocab_size = model_config(ctx.recipe).vocab_size
        ctx.progress.total(2 * len(config.parts), "parts")  # the tokenizer takes about as long as all of them
        workers, parts = side_by_side(cores()), _shards(config)
        of_shards = None if parts is None else parts.tokenizer(config)
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(_tokenizer_folder(ctx.inputs[config.tokenizer]))
            if of_shards is not None and of_shards.fingerprint != tokenizer.fingerprint:
                raise UserError(
                    f'stage "{config.name}": the shards among its parts were made with another tokenizer than that of '
                    f'"{config.tokenizer}"; build them with its tokenizer'
                )
        else:
            tokenizer = of_shards or Tokenizer.train(
                self._sample(config, ctx, workers), vocab_size, "zero", config.tool_tokens
            )
        tokenizer.save(ctx.dir / "tokenizer")
        ctx.progress.advance(len(config.parts), "tokenizer")
        facts: dict[str, Any] = {}

        def build(names: list[str]) -> dict[str, Any]:
            return {name: self._build(config, name, tokenizer, ctx) for name in names}

        for built in workers.map(build, _shares(config, workers.n)):
            for name, info in built.items():
                facts[name] = info
                ctx.say(f"{name}: {show_tokens(info['tokens'])} tokens, {info['bytes_per_token']:.2f} bytes per token")
                ctx.progress.advance(1, name)
        facts = {name: facts[name] for name in config.parts}
        (ctx.dir / "parts.json").write_text(json.dumps(facts, indent=1))
        return {"tokens": sum(info["tokens"] for info in facts.values()), "parts": len(facts)}

    def _build(self, config: CorpusConfig, name: str, tokenizer: Tokenizer, ctx: StageContext) -> dict[str, Any]:
        if ctx.stop:
            ctx.interrupt()
        if config.parts[name].startswith(SHARDS):
            _shards(config).link(config, name, ctx.dir / name)
            return _counts(corpus.load(ctx.dir / name))
        built = corpus.build(
            self._documents(config, name, ctx),
            tokenizer,
            config.row_length,
            ctx.dir / name,
            heldout=config.heldout,
            limit_tokens=config.limits.get(name),
            fim_rate=config.fim_rate if name in config.fim_parts else 0.0,
            boundary_split_rate=corpus.BOUNDARY_SPLIT_RATE,
            seed=ctx.seed,
        )
        return _counts(built)

    def training_data(
        self, config: CorpusConfig, recipe: Recipe, folder: Path, cache: Path
    ) -> Iterator[tasks.Problem | str]:
        """The training documents, and the problems behind the pages of tasks."""
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name, spec in config.parts.items():
            built = corpus.load(folder / name)
            for ids in built.train.documents():
                yield tokenizer.decode(ids.tolist())
            if spec.startswith((TASK, NEEDLE)):
                task = _task(config, name, cache)
                pages = built.train.facts["documents"] + built.heldout.facts["documents"]
                yield from (task.train_problem(i, recipe.seed_of(config), None) for i in range(pages))

    def _documents(self, config: CorpusConfig, name: str, ctx: StageContext) -> Iterator[Document]:
        spec = config.parts[name]
        if not spec.startswith((TASK, NEEDLE)):
            return iter(sources.documents(spec, ctx.cache, domain=name))
        task = _task(config, name, ctx.cache)
        return (_page(task, i, ctx.seed) for i in count())

    def _sample(self, config: CorpusConfig, ctx: StageContext, workers: Workers) -> list[str]:
        """The first characters of every source, for the tokenizer."""

        def first(name: str) -> list[str]:
            texts, budget = [], config.vocab_sample
            for document in self._documents(config, name, ctx):
                texts.append(document.text)
                budget -= len(document.text)
                if budget <= 0:
                    break
            return texts

        return list(chain.from_iterable(workers.map(first, config.parts)))  # none is shards: those have a tokenizer


def _page(task: tasks.Task, index: int, seed: int) -> Document:
    """A page of a task; one with tool calls stays a conversation."""
    page = task.written(index, seed) if task.episodic else None
    if page is None or not page.several_turns:
        return Document(task.document(index, seed), task.name)
    return Document(page.text, task.name, page.messages, spoken=True)


def _task(config: CorpusConfig, source: str, cache: Path | None = None) -> tasks.Task:
    """The task whose documents make up a source, with the source's settings in `mix`."""
    name, mix = config.parts[source].removeprefix(TASK), config.mix.get(source, {})
    if name.startswith(NEEDLE):
        return _needles("needle-pages")(name.removeprefix(NEEDLE), config.heldout, cache, **mix)
    if clash := {"languages", "phrasing"} & set(mix):
        raise UserError(f'stage "{config.name}": mix sets shares of documents, not {" or ".join(sorted(clash))}')
    return tasks.get(name, **mix)


def _needles(hook: str) -> Callable[..., tasks.Task]:
    if (make := plugins.hook(hook)) is None:
        raise UserError(
            f"parts of {NEEDLE} come with the add-on of evaluations, which is not installed; leave them out"
        )
    return make


def _shards(config: CorpusConfig) -> Any:
    """The add-on that reads parts which are shards already; None without such parts."""
    if not any(spec.startswith(SHARDS) for spec in config.parts.values()):
        return None
    if (shards := plugins.hook("shards")) is None:
        raise UserError(f"parts of {SHARDS} come with the add-on of data sets, which is not installed; leave them out")
    return shards


def _counts(built: corpus.PackedCorpus) -> dict[str, Any]:
    rows = built.train
    return {"tokens": rows.facts["tokens"], "bytes_per_token": round(rows.bytes_per_token, 3), "rows": rows.n_rows,
            "waste": round(rows.waste, 5)}  # fmt: skip


def _tokenizer_folder(stage: Path) -> Path:
    """Where a corpus, or a stage that makes a model, has its tokenizer."""
    return folder if (folder := stage / "tokenizer").is_dir() else stage / "model"


def _shares(config: CorpusConfig, n: int) -> list[list[str]]:
    """The sources in n lists of about equal work, largest first. One without a limit counts as the largest limit."""
    unknown = max(config.limits.values(), default=1)
    names = list(config.parts)
    return [[names[i] for i in share] for share in shares([config.limits.get(name, unknown) for name in names], n)]
