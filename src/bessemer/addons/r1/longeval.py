"""Stage "longeval": a comparison of models on long contexts (V3 4.3, Figure 8).

It measures needles found by length and depth, loss by position in held-out rows and, to show what the extension costs
on short rows, their held-out bits per byte. Output: long.json with "needle", "positions" and "short".

Finished rows survive a kill: the stage resumes with the next.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.addons.evals import long_context, tables
from bessemer.addons.r1.tables import LongEvalConfig
from bessemer.addons.tasks.needle import SPEAKERS
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.data import sources
from bessemer.data.rows import Rows, open_rows
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.training_inputs import check_heldout
from bessemer.pipeline.work import LOADED, StageWork
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.train import loss, setup

OWN, SWITCHED = "", " + YaRN"
"""Suffixes of a model's name: its own positions, or the last model's positions without training on them."""


class LongEval(Stage[LongEvalConfig]):
    def resolve(self, config: LongEvalConfig, recipe: Recipe) -> dict[str, Any]:
        where = f'stage "{config.name}"'
        for key in ("models", "lengths", "depths"):
            if not getattr(config, key):
                raise UserError(f"{where}: {key} is empty")
        if not set(config.switched) <= set(config.models):
            raise UserError(f"{where}: switched names a stage that is not among models; add it there")
        if not all(0 <= depth <= 1 for depth in config.depths):
            raise UserError(f"{where}: depths are shares of the text; set them between 0 and 1")
        least = long_context.ANSWER + 6 * config.needles  # a needle's sentence has five words and a full stop
        if config.haystack and (shortest := min(config.lengths)) <= least:
            raise UserError(
                f"{where}: lengths has {shortest}, too short for {config.needles} needles and an answer; raise it "
                f"above {least}, or lower needles"
            )
        if config.haystack and config.needles > len(SPEAKERS):
            raise UserError(f"{where}: needles is {config.needles}; set it to at most {len(SPEAKERS)}")
        corpus = _corpus(where, config.corpus, recipe)
        short = _corpus(where, config.short, recipe) if config.short else None
        for key, names in (("parts", corpus.parts), ("short_parts", short.parts if short else {})):
            for part in getattr(config, key):
                if part not in names:
                    raise UserError(f'{where}: {key} names "{part}", the corpus has {", ".join(names) or "none"}')
        for model in config.models:
            measured = [config.haystack, *(corpus.parts[part] for part in config.parts)]
            check_heldout(where, corpus, measured, model, recipe)
            if short:
                measured = [short.parts[part] for part in config.short_parts or short.parts]
                check_heldout(where, short, measured, model, recipe)
        return {}

    def probes(self, config: LongEvalConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        if config.haystack:
            yield preflight.of_key("haystack", partial(sources.check, config.haystack, None))

    def work(self, config: LongEvalConfig, recipe: Recipe) -> list[StageWork]:
        prompts, longest = len(config.depths) * config.problems * sum(config.lengths), max(config.lengths)
        rows = len(config.parts) * config.rows * longest
        return [
            StageWork(name, read=prompts + rows, length=longest, bytes=LOADED)
            for name in [*config.models, *config.switched]
        ]

    def run(self, config: LongEvalConfig, ctx: StageContext) -> dict[str, Any]:
        setup.keep_memory()
        path = ctx.state / "rows.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        ctx.rewind(len(results) if results else -1)
        work = list(self._work(config, ctx))
        ctx.progress.total(len(work), "rows", done=len(results))
        engines: dict[str, Engine] = {}
        for number, (key, model, added, measure) in enumerate(work, start=1):
            if key in results:
                continue
            named = model + added
            if named not in engines:
                engines.clear()  # memory may not hold two models
                engines[named] = self._engine(config, ctx, model, added)
            results[key] = measure(engines[named])
            ctx.metrics.write(number, 0, {f"long/{key}": _figure(results[key])})  # first, as in `eval`
            write_atomic(path, json.dumps(results))
            ctx.progress.advance(1, f"{key}: {_figure(results[key]):.3f}")
            if ctx.stop:
                ctx.interrupt()
        table = tables.long_table(results, config.short_bound)
        write_atomic(ctx.dir / tables.LONG_FILE, json.dumps(table, indent=1))
        _say(config, ctx, table)
        last = config.models[-1]
        return {f"found at {row['length']}": round(row["share"], 3) for row in table["needle"] if row["model"] == last}

    def _engine(self, config: LongEvalConfig, ctx: StageContext, model: str, added: str) -> Engine:
        """The engine of a model; with `added` SWITCHED, with the positions of the last model. All read up to the
        longest length."""
        context: dict[str, Any] = {}
        if added == SWITCHED:
            last = deepseek.read_config(ctx.inputs[config.models[-1]] / "model")
            context = {key: getattr(last, key) for key in ("rope_factor", "original_seq_len")}
        context["max_seq_len"] = max(*config.lengths, _corpus("", config.corpus, ctx.recipe).row_length)
        return Engine(*setup.load_to_sample(ctx.inputs[model] / "model", ctx.say_once, context), setup.workers())

    def _work(
        self, config: LongEvalConfig, ctx: StageContext
    ) -> Iterator[tuple[str, str, str, Callable[[Engine], Any]]]:
        """(key, model, suffix of its name, measurement), model by model."""
        task = None
        if config.haystack:
            share = _corpus("", config.corpus, ctx.recipe).heldout
            task = long_context.needle(config.haystack, share, ctx.cache)
        grid = long_context.NeedleGrid(config.lengths, config.depths, config.problems, config.needles)
        entries = [(model, added) for model in config.models
                   for added in ((OWN, SWITCHED) if model in config.switched else (OWN,))]  # fmt: skip
        for model, added in entries:
            if task is not None:
                for length in config.lengths:
                    measure = partial(long_context.find_needles, task=task, grid=grid, length=length)
                    yield f"needle/{model}{added}/{length}", model, added, measure
            for source in config.parts:
                rows = open_rows(ctx.inputs[config.corpus] / source, "heldout")
                yield f"positions/{model}{added}/{source}", model, added, partial(_positions, rows, config.rows)
            if config.short is None:
                continue
            for source in config.short_parts or _corpus("", config.short, ctx.recipe).parts:
                folder = ctx.inputs[config.short] / source
                yield f"short/{model}{added}/{source}", model, added, partial(_short, folder, 4 * config.rows)


def _corpus(where: str, name: str, recipe: Recipe) -> CorpusConfig:
    """The table of the corpus stage `name`; a UserError that starts with `where` if it is of another kind."""
    config = recipe.stage(name)
    if not isinstance(config, CorpusConfig):
        raise UserError(f'{where}: "{name}" is of kind {config.kind}; name a stage of kind corpus')
    return config


def _positions(rows: Rows, n_rows: int, engine: Engine) -> list[dict[str, Any]]:
    """Loss by position of the first `n_rows` rows."""
    _check_rows(rows)
    return long_context.loss_by_position(engine.model, rows, n_rows)


def _check_rows(rows: Rows) -> None:
    if not rows.n_rows:
        raise UserError(f"{rows.path} has no held-out documents to measure on; raise the corpus' heldout")


def _short(folder: Path, n_rows: int, engine: Engine) -> float:
    """Held-out bits per byte of a source of short rows."""
    rows = open_rows(folder, "heldout")
    _check_rows(rows)
    n_rows = min(n_rows, rows.n_rows)
    batches = [rows.batch(range(first, min(first + 16, n_rows))) for first in range(0, n_rows, 16)]
    nats, tokens = loss.heldout_nats(engine.model, batches)
    return nats / tokens / math.log(2) / rows.bytes_per_token


def _figure(result: float | list[dict[str, Any]]) -> float:
    """One number of what was measured: the share found, or bits per byte of the last bucket."""
    if isinstance(result, float):
        return result
    return tables.needles_found(result)["share"] if "correct" in result[0] else result[-1]["bits_per_byte"]


def _say(config: LongEvalConfig, ctx: StageContext, table: dict[str, Any]) -> None:
    for row in table["needle"]:
        ctx.say(
            f"{row['model']}: {100 * row['share']:.1f} % of {row['n']:.0f} needles in {row['length']} tokens "
            f"({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        )
    for model, value in tables.short_loss(table).items():
        if model in config.models[1:]:
            over = f", beyond the bound of {config.short_bound:g}" if value > config.short_bound else ""
            ctx.say(f"{model}: {value:+.4f} bits per byte on short rows{over}")
