"""Stage "longeval": what models make of a long context, side by side (V3 4.3, Figure 8).

Needles found by length and depth, loss by position in held-out rows, and, so that nobody pays for length with what the
model could before, held-out bits per byte of short rows. Output: long.json with "needle", "positions" and "short".

A finished row survives a kill: the stage goes on with the next.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bessemer.config.evaluation import LongEvalConfig
from bessemer.data.rows import open_rows
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import long_context, tables
from bessemer.hf import hub
from bessemer.pipeline.stage import Stage, register
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.train import loss, setup

OWN, SWITCHED = "", " + YaRN"
"""What is added to a model's name: nothing, or that it was given the last model's positions without training on
them."""


@register
class LongEval(Stage):
    kind = "longeval"

    config = LongEvalConfig

    def resolve(self, settings: LongEvalConfig, recipe: Any) -> dict[str, Any]:
        where = f'stage "{settings.name}"'
        for key in ("models", "lengths", "depths"):
            if not getattr(settings, key):
                raise UserError(f"{where}: {key} is empty")
        if not set(settings.switched) <= set(settings.models):
            raise UserError(f"{where}: switched names a stage that is not among models; add it there")
        if not all(0 <= depth <= 1 for depth in settings.depths):
            raise UserError(f"{where}: depths are shares of the text; set them between 0 and 1")
        for name in filter(None, (settings.corpus, settings.short)):
            if recipe.stage(name).kind != "corpus":
                raise UserError(f'{where}: "{name}" is of kind {recipe.stage(name).kind}; name a stage of kind corpus')
        for key, name in (("parts", settings.corpus), ("short_parts", settings.short)):
            known = recipe.stage(name).parts if name else {}
            for part in getattr(settings, key):
                if part not in known:
                    raise UserError(f'{where}: {key} names "{part}", the corpus has {", ".join(known) or "none"}')
        return {}

    def estimate(self, settings: LongEvalConfig, recipe: Any) -> float:
        asked = len(settings.depths) * settings.problems * sum(settings.lengths)
        models = len(settings.models) + len(settings.switched)
        return setup.estimate_seconds(recipe, models * asked / 3, length=max(settings.lengths))

    def run(self, settings: LongEvalConfig, ctx: StageContext) -> dict[str, Any]:
        setup.keep_memory()
        path = ctx.state / "rows.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        ctx.rewind(len(found) if found else -1)
        work = list(self._work(settings, ctx))
        ctx.progress.total(len(work), "rows", done=len(found))
        engines: dict[str, Engine] = {}
        for number, (key, model, added, measure) in enumerate(work, start=1):
            if key in found:
                continue
            named = model + added
            if named not in engines:
                engines = {named: self._engine(settings, ctx, model, added)}
            found[key] = measure(engines[named])
            write_atomic(path, json.dumps(found))
            ctx.metrics.write(number, 0, {f"long/{key}": _figure(found[key])})
            ctx.progress.advance(1, f"{key}: {_figure(found[key]):.3f}")
            if ctx.stop:
                ctx.interrupt()
        table = tables.long_table(found, settings.short_bound)
        write_atomic(ctx.dir / tables.LONG_FILE, json.dumps(table, indent=1))
        _say(settings, ctx, table)
        last = settings.models[-1]
        return {f"found at {row['length']}": round(row["share"], 3) for row in table["needle"] if row["model"] == last}

    def _engine(self, settings: LongEvalConfig, ctx: StageContext, model: str, added: str) -> Engine:
        """`added` SWITCHED: with the positions of the last model. All may read as far as the longest length."""
        context: dict[str, Any] = {}
        if added == SWITCHED:
            last = hub.read_config(ctx.inputs[settings.models[-1]] / "model")
            context = {key: getattr(last, key) for key in ("rope_factor", "original_seq_len")}
        context["max_seq_len"] = max(*settings.lengths, ctx.recipe.stage(settings.corpus).row_length)
        return Engine(*setup.load_model(ctx.inputs[model] / "model", context), setup.workers())

    def _work(
        self, settings: LongEvalConfig, ctx: StageContext
    ) -> Iterator[tuple[str, str, str, Callable[[Engine], Any]]]:
        """(key, model, what is added, what is measured), model by model."""
        task = None
        if settings.haystack:
            share = ctx.recipe.stage(settings.corpus).heldout
            task = long_context.needle(settings.haystack, share, ctx.cache)
        grid = long_context.NeedleGrid(settings.lengths, settings.depths, settings.problems, settings.needles)
        entries = [(model, added) for model in settings.models
                   for added in ((OWN, SWITCHED) if model in settings.switched else (OWN,))]  # fmt: skip
        for model, added in entries:
            for length in settings.lengths if task is not None else ():
                yield (f"needle/{model}{added}/{length}", model, added,
                       lambda engine, n=length: long_context.find_needles(engine, task, grid, n))  # fmt: skip
            for part in settings.parts:
                rows = open_rows(ctx.inputs[settings.corpus] / part, "heldout")
                yield (f"positions/{model}{added}/{part}", model, added,
                       lambda engine, r=rows: long_context.loss_by_position(engine.model, r, settings.rows),
                       )  # fmt: skip
            known = () if settings.short is None else ctx.recipe.stage(settings.short).parts
            for part in settings.short_parts or known:
                folder = ctx.inputs[settings.short] / part
                yield (f"short/{model}{added}/{part}", model, added,
                       lambda engine, f=folder: _short(engine.model, f, 4 * settings.rows))  # fmt: skip


def _short(model: Any, folder: Path, n_rows: int) -> float:
    """Held-out bits per byte of a part of short rows."""
    rows = open_rows(folder, "heldout")
    if not rows.n_rows:
        raise UserError(f"{folder} holds no document out, so nothing can be measured on it; raise the corpus' heldout")
    n_rows = min(n_rows, rows.n_rows)
    lots = [rows.batch(range(first, min(first + 16, n_rows))) for first in range(0, n_rows, 16)]
    nats, tokens = loss.heldout_nats(model, lots)
    return nats / tokens / math.log(2) / rows.bytes_per_token


def _figure(found: Any) -> float:
    """One number of what was measured: the share found, or bits per byte of the last bucket."""
    if isinstance(found, float):
        return found
    return tables.needles_found(found)["share"] if "correct" in found[0] else found[-1]["bits_per_byte"]


def _say(settings: LongEvalConfig, ctx: StageContext, table: dict[str, Any]) -> None:
    for row in table["needle"]:
        ctx.say(
            f"{row['model']}: {100 * row['share']:.1f} % of {row['n']:.0f} needles in {row['length']} tokens "
            f"({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        )
    for model, value in tables.short_loss(table).items():
        if model in settings.models[1:]:
            over = f", beyond the bound of {settings.short_bound:g}" if value > settings.short_bound else ""
            ctx.say(f"{model}: {value:+.4f} bits per byte on short rows{over}")
