"""Samplers outside the trainer, such as Ray's workers: what they read of its policy, and on many ranks, how rank 0
passes the samples on.

No process holds the whole network for them: weights come tensor by tensor, and log-probabilities from the network as
the ranks have divided it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor

from bessemer.addons.distributed.sampler_check import dtype_of
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Prompt
from bessemer.errors import UserError
from bessemer.model.protocol import TrainOutputs
from bessemer.rl.losses import logprobs_of
from bessemer.rl.parts import LoopParts
from bessemer.rl.sampler import Completions, PendingSamples, Sampler, SamplingOptions, Submit
from bessemer.train.collective import Collective, Read
from bessemer.train.runtime import Runtime, Whole

Kept = TypeVar("Kept")
Made = TypeVar("Made")


class TrainedPolicy:
    """The policy that a trainer trains, as a sampler elsewhere reads it. `version` differs after every update. On many
    ranks rank 0 reads it, and the others `follow`."""

    def __init__(self, whole: Whole, collective: Collective, version: Callable[[], int], runtime: Runtime) -> None:
        self.whole, self.collective, self.version, self.runtime = whole, collective, version, runtime
        self._reads: dict[float, Read] = {}

    @property
    def dtype(self) -> str:
        """Of the weights that sample."""
        return dtype_of(self.whole.model)

    @property
    def size(self) -> int:
        """Bytes of the weights that are handed over."""
        frozen = self.whole.model.frozen()
        return sum(tensor.nbytes for name, tensor in self.whole.model.state_dict().items() if name not in frozen)

    def weights(self, keep: Callable[[Tensor], Kept]) -> dict[str, Kept]:
        """What `keep` makes of every trained tensor, by name. A tensor may change when `keep` has returned."""
        self._order({"read": "weights"})
        stream = self.whole.weights([0])
        try:
            return {name: keep(tensor.detach()) for name, tensor in stream}
        finally:
            for _ in stream:  # the other ranks send all of it
                pass

    def logprobs(self, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Of every id after the first, under softmax(logits / temperature)."""
        self._order({"read": "logprobs", "ids": [*ids], "temperature": temperature})
        return self._logprobs(ids, temperature)

    def led(self, work: Callable[[], Made]) -> Made:
        """Runs `work`, which reads the policy, while the other ranks `follow`. They raise its UserError too."""
        error = ""
        try:
            return work()
        except UserError as fault:
            error = str(fault)
            raise
        finally:
            self._order({"read": "", "error": error})

    def follow(self) -> None:
        """Takes part in what rank 0 reads, until its work is done."""
        while (order := self._order({}))["read"]:
            if order["read"] == "weights":
                for _ in self.whole.weights([0]):
                    pass
            else:
                self._logprobs(order["ids"], order["temperature"])
        if order["error"]:
            raise UserError(order["error"])

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's, on all ranks."""
        return self.runtime.agree(lambda: order)

    def _logprobs(self, ids: Sequence[int], temperature: float) -> list[float]:
        multiple = self.collective.row_multiple
        row_BT = torch.zeros(1, -(-len(ids) // multiple) * multiple, dtype=torch.int64)
        row_BT[0, : len(ids)] = torch.tensor(ids)
        loss_BT = torch.zeros(row_BT.shape)
        loss_BT[0, 1 : len(ids)] = 1.0
        read = self._reads.setdefault(temperature, partial(_row_logprobs, temperature=temperature))
        (logp_T,) = self.collective.outputs([Batch(row_BT, loss_BT)], read, [row_BT.shape[1]])
        return logp_T[1 : len(ids)].tolist()


def _row_logprobs(out: TrainOutputs, weight_VD: Tensor, batch: Batch, *, temperature: float) -> Tensor:
    return logprobs_of(out, weight_VD, batch, temperature=temperature).flatten()


def on_rank_0(loop: LoopParts, make: Callable[[TrainedPolicy], Sampler]) -> Sampler:
    """The sampler that `make` makes; on many ranks it is rank 0's."""
    trainer, runtime = loop.trainer, loop.ctx.runtime
    # every update adds to `trainer.rows`, even one after which the guard goes back to an earlier step
    policy = TrainedPolicy(loop.sampler_model, trainer.collective, lambda: trainer.rows, runtime)
    if runtime.n == 1:
        return make(policy)
    return Rank0Sampler(make(policy) if loop.ctx.leads else None, loop.tokenizer, policy)


class Rank0Sampler:
    """`sampler` is rank 0's; None on the others."""

    def __init__(self, sampler: Sampler | None, tokenizer: Tokenizer, trained: TrainedPolicy) -> None:
        self.sampler, self.tokenizer, self.trained = sampler, tokenizer, trained

    def open(self) -> None:
        if self.sampler is not None:
            self.trained.led(self.sampler.open)
        else:
            self.trained.follow()

    def policy(self) -> Submit:
        submit = None
        if self.sampler is not None:
            submit = self.trained.led(self.sampler.policy)
        else:
            self.trained.follow()

        def submit_on_rank0(prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> PendingSamples:
            return _Rank0Samples(None if submit is None else submit(prompts, **options), self.trained.runtime)

        return submit_on_rank0

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        return self.policy()(prompts, **options).take()

    def metrics(self) -> dict[str, float]:
        return {} if self.sampler is None else self.sampler.metrics()

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


class _Rank0Samples:
    """`samples` are rank 0's; None on the others."""

    def __init__(self, samples: PendingSamples | None, runtime: Runtime) -> None:
        self.samples, self.runtime = samples, runtime

    def ready(self) -> bool:
        return self.runtime.agree(lambda: self.samples is not None and self.samples.ready())

    def take(self) -> Completions:
        def take_on_rank0() -> Completions:
            assert self.samples is not None
            return self.samples.take()

        return self.runtime.once(take_on_rank0, "samples")
