"""Checks that the inputs of next-token training fit each other: a corpus, its mixture and perhaps a model."""

import math
from collections.abc import Iterable
from pathlib import Path

from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.pipeline.inputs import NEEDLE, SHARDS
from bessemer.runs.context import StageContext


def model_and_corpus(ctx: StageContext, corpus: str) -> tuple[Path, Path]:
    """(model directory to train further, folder of the corpus `corpus`), which must have the same tokenizer."""
    folder = None if ctx.source is None else ctx.source / "model"
    if folder is None or not folder.is_dir():
        raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
    at = ctx.inputs[corpus]
    if load_tokenizer(at / "tokenizer").fingerprint != load_tokenizer(folder).fingerprint:
        raise UserError(
            f'stage "{ctx.name}": the rows of "{corpus}" were made with another tokenizer than the model has; set '
            'tokenizer = "..." in that stage to the stage that the model is from'
        )
    return folder, at


def check_stages(config: PretrainConfig, recipe: Recipe) -> None:
    """UserError, before anything runs, unless this stage's inputs are a corpus and, to train a model further, also a
    stage with a model."""
    where, source = f'stage "{config.name}"', None if config.source is None else recipe.stage(config.source)
    if config.corpus is None:
        if source is None:
            raise UserError(f"{where} needs a corpus stage before it")
        if source.makes_model:
            raise UserError(
                f'{where} has from = "{source.name}" of kind {source.kind}, which is a model; to train it further, '
                f'name the corpus too: corpus = "...", a stage with tokenizer = "{source.name}"'
            )
        return
    corpus = recipe.stage(config.corpus)
    if corpus.kind != "corpus":
        raise UserError(f'{where}: corpus = "{corpus.name}" is of kind {corpus.kind}; name a stage of kind corpus')
    if source is None or not source.makes_model:
        actual = "is missing" if source is None else f'is "{source.name}" of kind {source.kind}'
        raise UserError(f"{where} has a corpus, so from must name a stage with a model, but it {actual}")
    if config.model:
        raise UserError(f'{where} continues from the model of "{source.name}", whose sizes are fixed; leave model out')
    if isinstance(corpus, CorpusConfig):
        read = [corpus.parts[part] for part in config.mixture or corpus.parts if part in corpus.parts]
        check_heldout(where, corpus, read, source.name, recipe)


def check_heldout(where: str, corpus: CorpusConfig, measured: Iterable[str], model: str, recipe: Recipe) -> None:
    """UserError if documents of the sources `measured` that `corpus` holds out were training documents of `model`:
    documents are held out by their hash, so a larger share contains a smaller one."""
    read, name = {source.removeprefix(NEEDLE) for source in measured}, model
    while (stage := recipe.stage(name)).source is not None and stage.imported is None:
        name = stage.source
        if not isinstance(stage, PretrainConfig):
            continue
        earlier = recipe.stage(stage.corpus or stage.source)
        if isinstance(earlier, CorpusConfig) and earlier.heldout < corpus.heldout:
            parts = (earlier.parts[part] for part in stage.mixture or earlier.parts if part in earlier.parts)
            for source in sorted(read.intersection(part.removeprefix(NEEDLE) for part in parts)):
                if not source.startswith(SHARDS):  # held out by their own build
                    raise UserError(
                        f'{where}: "{corpus.name}" holds out {corpus.heldout:g} of {source}, but "{stage.name}" was '
                        f"trained on all but {earlier.heldout:g} of it; give both corpora the same heldout"
                    )
        if stage.corpus is None:
            return


def check_mixture(config: PretrainConfig, corpus_name: str | None, recipe: Recipe, longest: int | None) -> None:
    """UserError for an impossible mixture or impossible lengths, before anything runs. `longest` is the model's
    max_seq_len, None if only the run will tell."""
    where = f'stage "{config.name}"'
    corpora = (stage for stage in recipe.stages if isinstance(stage, CorpusConfig))
    corpus = next((stage for stage in corpora if stage.name == corpus_name), None)
    if not config.mixture and config.temperature is None and (corpus is None or len(corpus.parts) != 1):
        raise UserError(f"{where}: mixture is empty; give every part of the corpus a share, or set temperature = 0.7")
    for name, weight in config.mixture.items():
        values = weight.values if isinstance(weight, Points) else [weight]
        if not (min(values) >= 0 and 0 < max(values) < math.inf):
            given = " to ".join(f"{value:g}" for value in dict.fromkeys(values))
            raise UserError(
                f"{where}: the weight of {name} is {given}; it must never be negative, and must be positive somewhere "
                "(leave the part out to use none of it)"
            )
    if config.mixture and config.temperature is not None:
        raise UserError(
            f"{where}: temperature derives the shares from the parts' sizes; leave mixture out, or temperature"
        )
    if unknown := [name for name in config.epoch_caps if config.mixture and name not in config.mixture]:
        raise UserError(f'{where}: epoch_caps names "{unknown[0]}", the mixture has {", ".join(config.mixture)}')
    if corpus is not None and (unknown := [part for part in config.mixture if part not in corpus.parts]):
        raise UserError(f'{where}: mixture names "{unknown[0]}", the corpus has {", ".join(corpus.parts)}')
    if not config.lengths:
        if (fewest := min(config.batch_rows.values)) < 1:
            raise UserError(f"{where}: batch_rows is {fewest:g} at its lowest; raise it to at least 1")
        return
    if min(config.lengths.values) < 8 or max(config.lengths.values) > (longest or math.inf):
        raise UserError(f"{where}: lengths must lie between 8 and the model's max_seq_len {longest}")
    if corpus is not None:
        row = config.context or corpus.row_length
        if min(config.batch_rows.values) * row < max(config.lengths.values):
            raise UserError(
                f"{where}: a step of {min(config.batch_rows.values):g} rows of {row} tokens is less "
                f"than one row of {max(config.lengths.values):g}; raise batch_rows"
            )
