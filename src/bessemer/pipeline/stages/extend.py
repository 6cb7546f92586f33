"""Stage "extend": a model goes on training on longer rows, with YaRN (V3 4.3; Peng et al. 2023).

V3 does it twice, 4K -> 32K and 32K -> 128K, with one set of YaRN's numbers: s = 40, alpha = 1, beta = 32 and
sqrt(t) = 0.1 ln s + 1. All else is pre-training, under the recipe's own keys. Positions are told by the config that the
stage writes: nothing looks at how long a row, a prompt or a cache is.

Output: model/ with `rope_factor`, `original_seq_len` and `max_seq_len` of its own.
"""

from typing import Any

from bessemer.config.training import ExtendConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.dist import distributed
from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.hf.causal_lm import is_foreign
from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.model.config import ModelConfig
from bessemer.pipeline import feed
from bessemer.pipeline.stage import register
from bessemer.pipeline.stages.pretrain import Begins, Pretrain
from bessemer.runs.context import StageContext
from bessemer.train import setup


@register
class Extend(Pretrain):
    kind = "extend"

    config = ExtendConfig

    def resolve(self, settings: ExtendConfig, recipe: Any) -> dict[str, Any]:
        where = f'stage "{settings.name}"'
        corpus = recipe.stage(settings.corpus)
        if corpus.kind != "corpus":
            raise UserError(
                f'{where}: corpus = "{settings.corpus}" is of kind {corpus.kind}; name a stage of kind corpus'
            )
        for earlier in _phases(settings, recipe):
            if earlier.rope_factor != settings.rope_factor:
                raise UserError(
                    f'{where}: rope_factor is {settings.rope_factor:g}, "{earlier.name}" has {earlier.rope_factor:g}; '
                    "all phases of one model keep the same"
                )
            if earlier.length >= settings.length:
                raise UserError(
                    f'{where}: length is {settings.length}, "{earlier.name}" reached {earlier.length} already; raise it'
                )
        original = original_length(settings, recipe)
        if original is not None:
            check_reach(where, settings, original)
        super().resolve(settings, recipe)
        return {"original_length": original}

    def check_feed(self, settings: ExtendConfig, recipe: Any, cfg: ModelConfig) -> None:
        feed.check(settings, settings.corpus, recipe, settings.length)

    def estimate(self, settings: ExtendConfig, recipe: Any) -> float:
        return setup.estimate_seconds(recipe, settings.tokens, length=settings.length)

    def begins(self, settings: ExtendConfig, ctx: StageContext) -> Begins:
        """The model of an earlier stage, with YaRN, trained on longer rows."""
        folder = None if ctx.source is None else ctx.source / "model"
        if folder is None or not folder.is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        if is_foreign(folder):
            raise UserError(
                f'stage "{ctx.name}": {folder} is not of the DeepSeek V3 family; it cannot be extended here'
            )
        corpus, cfg = ctx.inputs[settings.corpus], hub.read_config(folder)
        if Tokenizer.load(corpus / "tokenizer").fingerprint != load_tokenizer(folder).fingerprint:
            raise UserError(
                f'stage "{ctx.name}": the rows of "{settings.corpus}" were made with another tokenizer than the model '
                f'has; give that stage tokenizer = "..." with the name of the corpus that the model was trained on'
            )
        if cfg.yarn and cfg.rope_factor != settings.rope_factor:
            raise UserError(
                f'stage "{ctx.name}": rope_factor is {settings.rope_factor:g}, the model was extended with '
                f"{cfg.rope_factor:g}; all phases of one model keep the same"
            )
        original = original_length(settings, ctx.recipe) or (cfg.original_seq_len if cfg.yarn else cfg.max_seq_len)
        check_reach(f'stage "{ctx.name}"', settings, original)
        context = {
            "max_seq_len": settings.length, "rope_factor": settings.rope_factor, "original_seq_len": original,
        }  # fmt: skip
        ctx.say(f"YaRN: s {settings.rope_factor:g} over {original} tokens, rows of {settings.length}")
        return Begins(
            corpus,
            settings.length,
            cfg.at_length(context),
            lambda: distributed.read(folder, ctx.ranks, ctx.recipe.layout, ctx.say, context)[0],
        )


def original_length(settings: ExtendConfig, recipe: Any) -> int | None:
    """Tokens of the rows that the model was pre-trained on; None where the recipe does not say."""
    first = [settings, *_phases(settings, recipe)][-1]
    for phase in [settings, *_phases(settings, recipe)]:
        if phase.original_length is not None:
            return phase.original_length
    trained = recipe.stage(first.source)
    corpus = recipe.stage(trained.source) if trained.kind == "pretrain" and trained.source else None
    return corpus.row_length if corpus is not None and corpus.kind == "corpus" else None


def check_reach(where: str, settings: ExtendConfig, original: int) -> None:
    """UserError if YaRN does not reach the length, or has nothing to do."""
    if settings.length <= original:
        raise UserError(f"{where}: length is {settings.length}, the model reads {original} already; raise it")
    if settings.length > original * settings.rope_factor:
        raise UserError(
            f"{where}: length is {settings.length}, but rope_factor {settings.rope_factor:g} reaches "
            f"{original * settings.rope_factor:.0f} tokens from {original}; raise it to at least "
            f"{settings.length / original:.3g}"
        )


def _phases(settings: ExtendConfig, recipe: Any) -> list[ExtendConfig]:
    """The extensions before this one, the nearest first."""
    found, source = [], settings.source
    while source is not None and (stage := recipe.stage(source)).kind == "extend":
        found.append(stage)
        source = stage.source
    return found
