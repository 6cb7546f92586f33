"""Stage "corpus": fetch documents, train a tokenizer, pack rows (V3 4.1).

Output: tokenizer/ and one folder of packed rows per part. A part's text comes from a source (registry name, path,
hf://owner/name); as "task:NAME", from the pre-training documents of a task, which exist for its train split only; or,
as "needle:SOURCE", from pages that hide sentences in the training documents of a source. "shards:FOLDER" is a part that
`bessemer data build` made: it stays in place, and its tokenizer serves all parts.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_tokens
from bessemer.data import corpus, shards, sources
from bessemer.data.documents import Document
from bessemer.data.fetch import sha256_of
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.eval.long_context import NEEDLE, needle
from bessemer.pipeline.stage import Stage, register
from bessemer.runs.context import StageContext
from bessemer.tasks.needle import Needle
from bessemer.train.setup import model_config
from bessemer.workers import Workers, cores

TASK, SHARDS = "task:", "shards:"


@register
class Corpus(Stage[CorpusConfig]):
    kind = "corpus"
    format = 2

    def resolve(self, config: CorpusConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.parts:
            raise UserError(f'stage "{config.name}": parts is empty; name at least one source')
        for key in (*config.limits, *config.fim_parts, *config.mix):
            if key not in config.parts:
                known = ", ".join(config.parts)
                raise UserError(f'stage "{config.name}": "{key}" is not one of its parts ({known})')
        for part, spec in config.parts.items():
            if spec.startswith((TASK, NEEDLE)):
                if spec.startswith(TASK):
                    _task(config, part).document(0)  # UserError for a task without documents
                if part not in config.limits:
                    raise UserError(f'stage "{config.name}": part "{part}" is endless; give it a limit in tokens')
            elif spec.startswith(SHARDS) and part in (*config.limits, *config.fim_parts):
                raise UserError(
                    f'stage "{config.name}": "{part}" is tokenised already; limits and fim_parts are for other parts'
                )
            elif part in config.mix:
                raise UserError(f'stage "{config.name}": mix is for documents of tasks, "{part}" is not one')
        for part in config.mix:
            if config.parts[part].startswith(NEEDLE):
                knobs: dict[str, Any] = config.mix[part]
                Needle({}, **knobs)  # checks them
        return {"vocab_size": model_config(recipe).vocab_size} | _built(config)

    def estimate(self, config: CorpusConfig, recipe: Recipe) -> float:
        return 60.0

    def run(self, config: CorpusConfig, ctx: StageContext) -> dict[str, Any]:
        ctx.rewind(-1)
        vocab_size = model_config(ctx.recipe).vocab_size
        ctx.progress.total(2 * len(config.parts), "parts")  # the tokenizer takes about as long as all of them
        if config.tokenizer is not None:
            tokenizer = Tokenizer.load(ctx.inputs[config.tokenizer] / "tokenizer")
        else:
            tokenizer = _tokenizer(config) or Tokenizer.train(self._sample(config, ctx), vocab_size, "zero")
        tokenizer.save(ctx.dir / "tokenizer")
        ctx.progress.advance(len(config.parts), "tokenizer")
        facts: dict[str, Any] = {}

        def build(names: list[str]) -> dict[str, Any]:
            return {name: self._build(config, name, tokenizer, ctx) for name in names}

        workers = Workers(cores())
        for built in workers.map(build, _shares(config, workers.n)):
            for name, part in built.items():
                facts[name] = part
                ctx.say(f"{name}: {show_tokens(part['tokens'])} tokens, {part['bytes_per_token']:.2f} bytes per token")
                ctx.progress.advance(1, name)
        facts = {name: facts[name] for name in config.parts}
        (ctx.dir / "parts.json").write_text(json.dumps(facts, indent=1))
        return {"tokens": sum(part["tokens"] for part in facts.values()), "parts": len(facts)}

    def _build(self, config: CorpusConfig, name: str, tokenizer: Tokenizer, ctx: StageContext) -> dict[str, Any]:
        if ctx.stop:
            ctx.interrupt()
        if config.parts[name].startswith(SHARDS):
            shards.link(ctx.dir / name, _folder(config, name), config.row_length)
            return _counts(corpus.load(ctx.dir / name))
        built = corpus.build(
            self._documents(config, name, ctx),
            tokenizer,
            config.row_length,
            ctx.dir / name,
            heldout=config.heldout,
            limit_tokens=config.limits.get(name),
            fim_rate=config.fim_rate if name in config.fim_parts else 0.0,
            boundary_split_rate=config.boundary_split_rate,
            seed=ctx.seed,
        )
        return _counts(built)

    def training_data(
        self, config: CorpusConfig, recipe: Recipe, folder: Path, cache: Path
    ) -> Iterator[tasks.Problem | str]:
        """The training documents, and the problems behind the pages of tasks."""
        tokenizer = Tokenizer.load(folder / "tokenizer")
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
        return (Document(task.document(i, ctx.seed), task.name) for i in itertools.count())

    def _sample(self, config: CorpusConfig, ctx: StageContext) -> Iterator[str]:
        """The first characters of every part, for the tokenizer."""
        for name in config.parts:  # none is shards: those bring their tokenizer
            left = config.vocab_sample
            for document in self._documents(config, name, ctx):
                yield document.text
                left -= len(document.text)
                if left <= 0:
                    break


def _task(config: CorpusConfig, part: str, cache: Path | None = None) -> tasks.Task:
    """The task whose documents are a part, with the part's knobs."""
    name, mix = config.parts[part].removeprefix(TASK), config.mix.get(part, {})
    if name.startswith(NEEDLE):
        return needle(name.removeprefix(NEEDLE), config.heldout, cache, **mix)
    if taken := {"languages", "phrasing"} & set(mix):
        raise UserError(f'stage "{config.name}": mix sets shares of documents, not {" or ".join(sorted(taken))}')
    return tasks.get(name, **mix)


def _counts(built: corpus.PackedCorpus) -> dict[str, Any]:
    rows = built.train
    return {"tokens": rows.facts["tokens"], "bytes_per_token": round(rows.bytes_per_token, 3), "rows": rows.n_rows,
            "waste": round(rows.waste, 5)}  # fmt: skip


def _folder(config: CorpusConfig, part: str) -> Path:
    return Path(config.parts[part].removeprefix(SHARDS))


def _shards(config: CorpusConfig) -> list[str]:
    """The parts that are shards already."""
    return [part for part, spec in config.parts.items() if spec.startswith(SHARDS)]


def _built(config: CorpusConfig) -> dict[str, Any]:
    """The identity of the parts that are existing shards: the digest of their meta.json, which holds all checksums."""
    digests = {}
    for part in _shards(config):
        folder = _folder(config, part)
        try:
            shards.read_meta(folder)
            digests[part] = sha256_of(folder / "meta.json")
        except UserError as error:
            raise UserError(f'stage "{config.name}": part "{part}": {error} with bessemer data build') from None
    return {"shards": digests} if digests else {}


def _tokenizer(config: CorpusConfig) -> Tokenizer | None:
    """The tokenizer of the parts that are shards; None if there are none."""
    common = None
    for part in _shards(config):
        folder = _folder(config, part)
        tokenizer = Tokenizer.load(folder.parent / "tokenizer")
        if shards.read_meta(folder)["tokenizer"] != tokenizer.fingerprint or (
            common is not None and common.fingerprint != tokenizer.fingerprint
        ):
            raise UserError(
                f'stage "{config.name}": the shards of "{part}" were made with another tokenizer than '
                f"{folder.parent / 'tokenizer'} or the other parts; build all of them with one"
            )
        common = tokenizer
    return common


def _shares(config: CorpusConfig, n: int) -> list[list[str]]:
    """The parts in n lists of about equal work, largest first. A part without a limit counts as the largest limit."""
    unknown = max(config.limits.values(), default=1)
    size = {name: config.limits.get(name, unknown) for name in config.parts}
    shares: list[list[str]] = [[] for _ in range(n)]
    for name in sorted(size, key=lambda name: -size[name]):
        min(shares, key=lambda share: sum(size[part] for part in share)).append(name)
    return [share for share in shares if share]
