"""The whole network put together from the shards of all ranks, to sample from."""

from __future__ import annotations

from bessemer.addons.distributed.collective import RankCollective, of_ranks
from bessemer.addons.distributed.model_shard import gather_into
from bessemer.model.transformer import Transformer
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer


def gather(trainer: Trainer) -> Transformer | None:
    """The whole network on rank 0, to sample from; None on the other ranks. Collective."""
    among = of_ranks(trainer)
    trainer.optimizer.settle()
    if _is_whole(among):
        return among.shard.model if among.me == 0 else None
    into = _empty_model(trainer) if among.me == 0 else None
    gather_into(among.shard, into)
    return into


class GatheredModel(Whole):
    """The whole network on every rank, next to the shard that the rank trains."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, among = trainer, of_ranks(trainer)
        self._into = None if _is_whole(among) else _empty_model(trainer).requires_grad_(False)
        self._copied_at = -1
        super().__init__(self._into or among.shard.model)

    def refresh(self) -> None:
        """Copies the current weights. Collective."""
        if self._into is not None and self._copied_at != self._trainer.rows:  # every update counts its rows
            self._trainer.optimizer.settle()
            gather_into(of_ranks(self._trainer).shard, self._into)
            self._copied_at = self._trainer.rows


def _is_whole(among: RankCollective) -> bool:
    """Whether every rank trains the whole network."""
    return among.mesh.layout.pp == among.mesh.layout.ep == 1


def _empty_model(trainer: Trainer) -> Transformer:
    cfg = of_ranks(trainer).mesh.cfg
    return Transformer(cfg).to(trainer.device).to_compute(trainer.plan.compute_dtype)
