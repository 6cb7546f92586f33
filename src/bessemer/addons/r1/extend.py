"""Stage "extend": continued training of a model on longer rows, with YaRN (V3 4.3; Peng et al. 2023).

V3 does it twice, 4K -> 32K and 32K -> 128K, with the same YaRN settings: s = 40, alpha = 1, beta = 32 and sqrt(t) = 0.1
ln s + 1. Everything else is as in pre-training, under the same keys. Positions depend only on the config that the stage
writes, never on the length of a row, a prompt or a cache.

Output: model/ with `rope_factor`, `original_seq_len` and `max_seq_len` of its own.
"""

from typing import Any

from bessemer.addons.r1.tables import ExtendConfig
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.config.training import PretrainConfig
from bessemer.errors import UserError
from bessemer.hf.model_directory import own_config
from bessemer.pipeline.stages.pretrain import Pretrain, Start
from bessemer.pipeline.training_inputs import model_and_corpus
from bessemer.runs.context import StageContext
from bessemer.train import lineage


class Extend(Pretrain[ExtendConfig]):
    def resolve(self, config: ExtendConfig, recipe: Recipe) -> dict[str, Any]:
        where = f'stage "{config.name}"'
        for earlier in _phases(config, recipe):
            if earlier.rope_factor != config.rope_factor:
                raise UserError(
                    f'{where}: rope_factor is {config.rope_factor:g}, "{earlier.name}" has {earlier.rope_factor:g}; '
                    "all phases of one model keep the same"
                )
            if earlier.length >= config.length:
                raise UserError(
                    f'{where}: length is {config.length}, "{earlier.name}" reached {earlier.length} already; raise it'
                )
        original = original_length(config, recipe)
        if original is not None:
            check_reach(where, config, original)
        super().resolve(config, recipe)
        return {"original_length": original}

    def row_length(self, config: ExtendConfig, corpus: StageConfig) -> int:
        return config.length

    def start(self, config: ExtendConfig, ctx: StageContext) -> Start:
        """The model of an earlier stage, with YaRN, trained on longer rows."""
        folder, corpus = model_and_corpus(ctx, config.corpus)
        if (cfg := own_config(folder)) is None:
            raise UserError(
                f'stage "{ctx.name}": {folder} is not of the DeepSeek V3 family; it cannot be extended here'
            )
        if cfg.yarn and cfg.rope_factor != config.rope_factor:
            raise UserError(
                f'stage "{ctx.name}": rope_factor is {config.rope_factor:g}, the model was extended with '
                f"{cfg.rope_factor:g}; all phases of one model keep the same"
            )
        original = original_length(config, ctx.recipe) or (cfg.original_seq_len if cfg.yarn else cfg.max_seq_len)
        check_reach(f'stage "{ctx.name}"', config, original)
        context = {
            "max_seq_len": config.length, "rope_factor": config.rope_factor, "original_seq_len": original,
        }  # fmt: skip
        ctx.say(f"YaRN: s {config.rope_factor:g} over {original} tokens, rows of {config.length}")

        return Start(
            corpus, config.length, cfg.at_length(context), lambda: ctx.runtime.read(folder, context)[0], folder
        )


def original_length(config: ExtendConfig, recipe: Recipe) -> int | None:
    """Tokens of the rows that the model was pre-trained on; None if the recipe does not say."""
    first = lineage.origin(recipe, config.name)
    between = _trained(config, recipe)  # a stage of another kind in between hides what it was trained on
    if not between or between[-1] is not first or first.source is None:
        return None
    corpus = recipe.stage(first.source)
    return corpus.row_length if isinstance(corpus, CorpusConfig) else None


def check_reach(where: str, config: ExtendConfig, original: int) -> None:
    """UserError if YaRN does not reach the length, or has nothing to do."""
    if config.length <= original:
        raise UserError(f"{where}: length is {config.length}, the model reads {original} already; raise it")
    if config.length > original * config.rope_factor:
        raise UserError(
            f"{where}: length is {config.length}, but rope_factor {config.rope_factor:g} reaches "
            f"{original * config.rope_factor:.0f} tokens from {original}; raise it to at least "
            f"{config.length / original:.3g}"
        )


def _phases(config: ExtendConfig, recipe: Recipe) -> list[ExtendConfig]:
    """The extensions before this one, the nearest first."""
    return [stage for stage in _trained(config, recipe) if isinstance(stage, ExtendConfig)]


def _trained(config: ExtendConfig, recipe: Recipe) -> list[PretrainConfig]:
    """The next-token stages before this one, the nearest first, back to random weights or another kind of stage."""
    stages: list[PretrainConfig] = []
    source = config.source
    while source is not None and isinstance(stage := recipe.stage(source), PretrainConfig):
        stages.append(stage)
        source = None if stage.corpus is None else stage.source
    return stages
