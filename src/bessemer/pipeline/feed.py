"""What a stage that trains on packed rows is fed with: the mixture of its recipe over the parts of a corpus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points, show_tokens
from bessemer.data.batch import Batch
from bessemer.data.mixture import Curriculum, by_size, sections
from bessemer.data.rows import Rows, open_rows
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.runs.context import StageContext
    from bessemer.train.trainer import Trainer


class Feed:
    """Rows for a trainer, and what they were made of."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, corpus: Path, row_length: int | None, bos_id: int
    ) -> None:
        """`row_length`: of the rows that batch_rows counts and validation reads; None: the corpus' own."""
        self.config, self._bos_id = config, bos_id
        names = _parts(config, corpus)

        def opened(length: int | None, part: str = "train") -> dict[str, Rows]:
            return {name: open_rows(corpus / name, part, length, ctx.state / "rows" / name) for name in names}

        self.heldout = opened(row_length, "heldout")
        self.row_length = next(iter(self.heldout.values())).row_length
        self.scale = scale(config, self.row_length)

        def rows_of_step(tokens: int) -> int:
            return int(config.batch_rows(tokens) * self.scale(tokens))

        plan = sections(config.tokens, lambda tokens: self.row_length / self.scale(tokens), rows_of_step)
        weights = config.mixture or by_size(opened(self.row_length), config.temperature)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("once")
            self._curriculum = Curriculum(plan, opened, weights, ctx.seed, config.epoch_caps)
        for one in told[:1]:
            ctx.say(str(one.message))
        self._say(ctx, weights)
        self._tokens: Callable[[], int] = lambda: 0

    def _say(self, ctx: StageContext, weights: dict[str, Any]) -> None:
        if not self.config.mixture:
            ctx.say("mixture: " + ", ".join(f"{name} {share:.3f}" for name, share in weights.items()))
        for stretch in self._curriculum.plan if self.config.lengths else ():
            ctx.say(f"rows of {stretch.length} tokens from {show_tokens(stretch.first_token)} tokens on")
        for name, tokens in self._curriculum.ended.items():
            cap = self.config.epoch_caps[name]
            what = f"{name} has been read {cap:g} times at {show_tokens(tokens)} tokens, its cap"
            if self.config.on_cap == "refuse":
                raise UserError(
                    f'stage "{self.config.name}": {what}, before the end at {show_tokens(self.config.tokens)}; '
                    'raise its cap, lower its weight, add text, or set on_cap = "redistribute"'
                )
            ctx.say(f"{what}; the other parts take its share from there on")

    def follow(self, trainer: Trainer) -> None:
        """From now on rows are those of the trainer's place in the run."""
        self._tokens = lambda: trainer.tokens

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """As a trainer asks for it."""
        batch = self._curriculum.batch(self._tokens(), first_row, n_rows)
        if not self.config.document_mask:
            return batch
        return replace(batch, segments_BT=(batch.tokens_BT == self._bos_id).cumsum(1))

    def figures(self, trainer: Trainer) -> dict[str, float]:
        """Realised shares and epochs of every part so far."""
        shares = self._curriculum.realised(trainer.tokens, trainer.rows)
        epochs = self._curriculum.epochs(trainer.tokens, trainer.rows)
        return {f"data/share/{name}": share for name, share in shares.items()} | {
            f"data/epochs/{name}": times for name, times in epochs.items()
        }


def check(config: PretrainConfig, corpus_name: str | None, recipe: Recipe, longest: int) -> None:
    """UserError for a mixture or lengths that cannot be, before anything runs. `longest` is the model's max_seq_len."""
    where = f'stage "{config.name}"'
    corpus = next((stage for stage in recipe.stages if stage.name == corpus_name and stage.kind == "corpus"), None)
    if not config.mixture and config.temperature is None:
        raise UserError(f"{where}: mixture is empty; give every part of the corpus a share, or set temperature = 0.7")
    for name, weight in config.mixture.items():
        values = weight.values if isinstance(weight, Points) else [weight]
        if not (min(values) >= 0 and 0 < max(values) < math.inf):
            told = " to ".join(f"{value:g}" for value in dict.fromkeys(values))
            raise UserError(
                f"{where}: the weight of {name} is {told}; it must be positive somewhere and nowhere negative "
                "(leave the part out to use none of it)"
            )
    if config.mixture and config.temperature is not None:
        raise UserError(
            f"{where}: temperature makes the shares from the parts' sizes; leave mixture out, or temperature"
        )
    if unknown := [name for name in config.epoch_caps if config.mixture and name not in config.mixture]:
        raise UserError(f'{where}: epoch_caps names "{unknown[0]}", the mixture has {", ".join(config.mixture)}')
    if corpus is not None and (unknown := [part for part in config.mixture if part not in corpus.parts]):
        raise UserError(f'{where}: mixture names "{unknown[0]}", the corpus has {", ".join(corpus.parts)}')
    if not config.lengths:
        return
    if min(config.lengths.values) < 8 or max(config.lengths.values) > longest:
        raise UserError(f"{where}: lengths must lie between 8 and the model's max_seq_len {longest}")
    if corpus is not None:
        few = min(config.batch_rows.values) * corpus.row_length / max(config.lengths.values)
        if few < 1:
            raise UserError(
                f"{where}: a step of {min(config.batch_rows.values):g} rows of {corpus.row_length} tokens is less "
                f"than one row of {max(config.lengths.values):g}; raise batch_rows"
            )


def scale(config: PretrainConfig, row_length: int) -> Callable[[float], float]:
    """Rows of a step at so many tokens per row that batch_rows asks for: more where rows are shorter."""
    lengths = config.lengths
    return (lambda tokens: row_length / lengths(tokens)) if lengths else (lambda tokens: 1.0)


def _parts(config: PretrainConfig, corpus: Path) -> Sequence[str]:
    if config.mixture:
        return list(config.mixture)
    return sorted(folder.name for folder in corpus.iterdir() if (folder / "meta.json").is_file())
