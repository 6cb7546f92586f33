"""`ModelRunner` in static steps (`static_steps`), with the host one token behind the device.

The device samples the next token of every row right after it fed the last, and goes on with it. `sample` asks for a
copy of those tokens, starts the next step, and only then waits for the copy: while the host appends tokens and looks
for stops, the device computes. A row that has ended has been fed once too often, into a slot of its own; what came out
is dropped with the row.

Where a token depends on more than its logits (a penalty, a grammar, a thinking budget), or the host reports more than
tokens (the most likely ones, routes), it decides first, and a step starts when `ModelRunner.sample` has chosen.

Shapes: B live rows.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine import row_sampling
from bessemer.engine.decode import RoutingTrace
from bessemer.engine.kv_cache import PromptPages
from bessemer.engine.model_runner import ModelRunner
from bessemer.engine.row_sampling import form_of
from bessemer.engine.sequence import Sequence
from bessemer.engine.static_steps import StaticCache, StaticSteps, StepRows
from bessemer.engine.transfer import Fetch


class DeviceRunner(ModelRunner):
    """`token_B` and `sampled_B3` are the next token of every sequence, which the host has not seen yet."""

    def __init__(
        self,
        steps: StaticSteps,
        tokenizer: Tokenizer,
        cache: StaticCache,
        trace: RoutingTrace | None = None,
        trace_all: bool = True,
    ):
        super().__init__(steps.model, tokenizer, cache, trace, trace_all=trace_all)
        self.kernels, self.steps = None, steps
        self.sampled_B3 = steps.sampled_R3[:0]
        self.token_B = steps.token_R[:0]
        self._moved = True
        """The rows are no longer those of the last step."""
        self._started = False
        """`sample` has started the step that `advance` stands for."""

    def _look_at_requests(self) -> None:
        super()._look_at_requests()
        self._form = form_of(sequence.request.sampling for sequence in self.sequences)
        self._host_first = not self._by_logits or self._top or self._routing

    def positions(self) -> list[int]:
        return [len(sequence.request.prompt) + len(sequence.tokens) for sequence in self.sequences]

    def _fed(self) -> list[int]:
        return [position - 1 for position in self.positions()]

    def admit(self, prompts: list[tuple[PromptPages, list[Sequence]]], logits_PV: Tensor) -> None:
        n = len(self.sequences)
        super().admit(prompts, logits_PV)
        assert self.logits_BV is not None and self.token_B is not None
        fresh_B3 = row_sampling.sample(
            self.logits_BV[n:], self.vocab, self.rules_B4[n:], self.key_B[n:], self.position_B[n:], self._form
        )
        self.sampled_B3 = torch.cat((self.sampled_B3, fresh_B3))
        self.token_B = torch.cat((self.token_B, fresh_B3[:, 0].long()))
        self._moved = True

    def sample(self) -> None:
        if self._host_first:
            super().sample()
            self._moved, self._started = True, False
            return
        fetch = Fetch(self.sampled_B3)
        self._start_step(self.positions())
        self._started = True
        for sequence, (token, logp, raw_logp) in zip(self.sequences, fetch.read(), strict=True):
            if not isfinite(logp):
                sequence.finish = "error"
            elif sequence.finish is None:
                sequence.append(int(token), logp, raw_logp)

    def advance(self) -> None:
        if not self._started:
            self._start_step(self._fed())
        self._started = False

    def _select(self, source: Tensor) -> None:
        super()._select(source)
        self.sampled_B3 = self.sampled_B3[source]
        self._moved = True

    def _start_step(self, positions: list[int]) -> None:
        """Feeds `token_B`, which stands at these positions; what the rows hold afterwards are views of the buffers."""
        n, steps = len(self.sequences), self.steps
        self.cache.reserve([position + 1 for position in positions])
        if self._moved:
            assert self.token_B is not None
            steps.load(StepRows(self.token_B, self.position_B, self.key_B, self.rules_B4))
            self._moved = False
        steps.run(n, self._form, self._tracer is not None)
        self.token_B, self.position_B = steps.token_R[:n], steps.position_R[:n]
        self.sampled_B3, self.logits_BV = steps.sampled_R3[:n], steps.logits_RV[:n]
        self.expert_BLK = None if self._tracer is None or steps.expert_RLK is None else steps.expert_RLK[:n]
