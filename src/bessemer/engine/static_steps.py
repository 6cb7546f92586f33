"""Decoding steps over buffers that never move, for GPUs: a step feeds a token of every row, samples the next one, and
leaves everything that the next step reads on the device. The host never waits, and a CUDA graph replays a step as one
launch.

There is one graph for each number of rows and each form of sampling (`row_sampling`), and, if attention gathers pages
instead of reading each row's own (`kernels.paged`), for each number of pages. Both numbers are padded to one of a few.
Padding rows read and write a page of the pool that no other row has. Graphs are captured when first needed, share their
memory, and read the weights in place: an update in place needs no new capture, and `current` says whether any weight
has moved.

If a step cannot be captured (an operation waits for the device, as grouped products do before Hopper, or memory is
short), one line says so, and steps are launched one operation at a time.

Shapes: R rows of a step, P pages of a row, S = P * PAGE slots, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.engine import row_sampling
from bessemer.engine.decode import Model, RoutingTrace, layer_step
from bessemer.engine.kept_tokens import words
from bessemer.engine.kv_cache import PAGE, LatentCache, own_pages, pages_for
from bessemer.engine.row_sampling import Form
from bessemer.engine.static_drafts import Rows, StaticDrafts, width_with
from bessemer.kernels import paged
from bessemer.model.transformer import Transformer
from bessemer.precision.probe import float64_home

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None], tuple[Tensor, ...]], Replay]
"""(step, the tensors that it advances) -> a function that runs the same step again."""


def serves(model: Model) -> bool:
    """Whether sequences of this model decode in static steps: off the CPU, and not on MPS, which has no float64."""
    device = model.embed.weight.device
    return device.type != "cpu" and float64_home(device) == device


class StaticCache(LatentCache):
    """A cache of fixed size: `pages` pages, one more for padding, and a table of `rows` rows that is updated in
    place."""

    def __init__(self, steps: StaticSteps, prefix_cache: bool) -> None:
        weight = steps.model.embed.weight
        super().__init__(steps.model.cfg, weight.dtype, weight.device, steps.pages * PAGE, prefix_cache, layers=0)
        self.layers, self._table_RP, self._empty = steps.pools, steps.table_RP, steps.pages
        self.pages.grow(steps.pages)
        self._table_RP.fill_(self._empty)


class StepRows(NamedTuple):
    """What a step needs to know about every row."""

    token_B: Tensor
    """The token to feed next, which is at `position_B`."""
    position_B: Tensor
    key_B: Tensor
    rules_B4: Tensor


class Steps:
    """Buffers and graphs for the steps of one model; subclasses define the step for a kind of model."""

    expert_RLK: Tensor | None = None
    """The experts of the fed tokens, after a step that records them."""
    drafts: StaticDrafts | None = None
    kept_RW: Tensor | None = None
    """Bits of the tokens that the next token of every row was drawn from, after a step with `Form.kept`."""

    def __init__(
        self, model: Model, vocab: int, rows: int, row_tokens: int, capture: Capture | None, columns: int = 3
    ) -> None:
        device = model.embed.weight.device
        self.model, self.vocab, self.rows, self.row_tokens = model, vocab, rows, row_tokens
        self.sizes = padded_counts(rows)
        self.depth, self.asked = 0, rows
        """Drafts per step; rows that were asked for, of which memory may hold fewer."""
        self.capture = capture
        self._graphs: dict[tuple[int, int, Form, bool], Replay] = {}
        self._addresses = addresses(model)
        self.token_R, self.position_R, self.key_R, self._live_R = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.rules_R4 = torch.zeros(rows, 4, dtype=torch.float64, device=device)
        self.sampled_R3 = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        """The next token of every row, as `row_sampling.sample` returns it, and the outcome of its drafts
        (`StaticDrafts.step`)."""
        self.logits_RV = torch.zeros(rows, model.cfg.vocab_size, device=device)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        raise NotImplementedError

    def new_cache(self, prefix_cache: bool) -> LatentCache:
        """An empty cache in the buffers; the previous one must not be used any more."""
        raise NotImplementedError

    def _width(self) -> int:
        """How far the next step reads every row."""
        raise NotImplementedError

    def _step(self, size: int, width: int, form: Form, record: bool) -> None:
        """Runs a step of the first `size` rows; see `run`."""
        raise NotImplementedError

    @property
    def current(self) -> bool:
        """Whether every weight is where it was when these steps were made."""
        return self._addresses == addresses(self.model)

    def load(self, rows: StepRows) -> None:
        """Loads rows other than those of the last step; with drafts, call `StaticDrafts.load` as well."""
        n = len(rows.token_B)
        buffers = (self.token_R, self.position_R, self.key_R, self.rules_R4)
        for buffer, values in zip(buffers, rows, strict=True):
            buffer[:n] = values
            buffer[n:] = 0
        self._live_R[:n], self._live_R[n:] = 1, 0

    def run(self, n: int, form: Form, record: bool) -> None:
        """Runs a step of the n rows. Afterwards `token_R`, `position_R`, `sampled_R3`, `logits_RV` (and with `record`
        `expert_RLK`) are those of the next tokens."""
        size, width = next(size for size in self.sizes if size >= n), self._width()
        if form.kept and self.kept_RW is None:
            self._record_kept()
        if self.capture is None:
            return self._step(size, width, form, record)
        if (key := (size, width, form, record)) not in self._graphs:
            try:
                advanced = (self.token_R, self.position_R, *(() if self.drafts is None else self.drafts.advanced))
                self._graphs[key] = self.capture(lambda: self._step(*key), advanced)
            except (RuntimeError, NotImplementedError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"decoding without CUDA graphs, which is slower: {reason}", file=sys.stderr, flush=True)
                self.capture, self._graphs = None, {}
                return self.run(n, form, record)
        self._graphs[key]()
        return None

    @torch.inference_mode(False)
    def _record_kept(self) -> None:
        self.kept_RW = self.token_R.new_zeros(self.rows, words(self.vocab))

    def _sample(self, logits_RV: Tensor, form: Form) -> Tensor:
        """The next tokens of the first rows, from their logits."""
        rows = slice(len(logits_RV))
        return row_sampling.sample(
            logits_RV, self.vocab, self.rules_R4[rows], self.key_R[rows], self.position_R[rows], form,
            kept_BW=None if self.kept_RW is None else self.kept_RW[rows],
        )  # fmt: skip


class StaticSteps(Steps):
    """The pools of a model of this family, and its steps over them."""

    model: Transformer

    @torch.inference_mode(False)  # the buffers are written to in any mode
    def __init__(
        self, model: Transformer, vocab: int, rows: int, pages: int, row_tokens: int, capture: Capture | None = None,
        drafts: int = 0,
    ) -> None:  # fmt: skip
        """At most `rows` rows of `row_tokens` tokens, in a cache of `pages` pages. capture None: no graphs. With
        drafts, a row has slots beyond its tokens (`ahead`)."""
        super().__init__(model, vocab, rows, row_tokens, capture, width_with(drafts))
        cfg, weight = model.cfg, model.embed.weight
        device = weight.device
        self.pages, self.depth = pages, drafts
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.pools = [
            torch.zeros(pages + 1, PAGE, width, dtype=weight.dtype, device=device)
            for _ in range(cfg.n_layers + min(drafts, len(model.mtp)))
        ]
        slots = row_tokens + ahead(drafts)
        self.table_RP = torch.full((rows, pages_for(slots)), pages, dtype=torch.int64, device=device)
        self._rope = model.rope_table(slots)
        if drafts:
            self.drafts = StaticDrafts(model, drafts, rows, vocab, self._rope)
        if sparse := sum(not layer.dense for layer in model.layers):
            dtype = RoutingTrace(cfg).dtype
            self.expert_RLK = torch.zeros(rows, sparse, cfg.n_activated_experts, dtype=dtype, device=device)
            if self.drafts is not None:
                self.drafts.expert_RTLK = self.expert_RLK[:, None].repeat(1, drafts + 1, 1, 1)
        self.any_length = self._reads_own_pages()
        """Whether attention reads each row's own pages, so that a step is the same for every length."""
        self._cache: StaticCache

    @property
    def cache_tokens(self) -> int:
        return self.pages * PAGE

    def _reads_own_pages(self) -> bool:
        """Whether the kernel works here; if not, its first call says why."""
        if self.table_RP.device.type != "cuda":
            return False
        cfg, pool = self.model.cfg, self.pools[0]
        q_1HX = pool.new_zeros(1, cfg.n_heads, pool.shape[-1])
        paged.attend(q_1HX, pool, self.table_RP[:1, :1], self.position_R[:1], cfg.kv_lora_rank, cfg.softmax_scale)
        return paged.attend.works

    @torch.inference_mode(False)
    def new_cache(self, prefix_cache: bool) -> StaticCache:
        for pool in self.pools:
            pool.zero_()  # what failed sequences left
        self._cache = StaticCache(self, prefix_cache)
        return self._cache

    def _width(self) -> int:
        pages, most = max(map(len, self._cache.row_pages)), self.table_RP.shape[1]
        if self.any_length:
            return most
        return pages if self.capture is None else next(count for count in padded_counts(most) if count >= pages)

    def _step(self, size: int, width: int, form: Form, record: bool) -> None:
        token_R, position_R, table_RP = self.token_R[:size], self.position_R[:size], self.table_RP[:size, :width]
        key_R, rules_R4, live_R = self.key_R[:size], self.rules_R4[:size], self._live_R[:size]
        feed = partial(self._feed, record)
        if self.drafts is not None:
            rows = Rows(token_R, position_R, key_R, rules_R4, live_R, table_RP)
            sampled_R3, logits_RV, expert_RLK = self.drafts.step(rows, self._cache, feed, form)
        else:
            state_RD, expert_RLK = feed(token_R[:, None], position_R[:, None], table_RP)
            logits_RV = self.model.head(state_RD).float()
            position_R.add_(live_R)
            sampled_R3 = self._sample(logits_RV, form)
        token_R.copy_(sampled_R3[:, 0])
        self.sampled_R3[:size] = sampled_R3
        self.logits_RV[:size] = logits_RV
        if expert_RLK is not None and self.expert_RLK is not None:
            self.expert_RLK[:size] = expert_RLK

    def _feed(
        self, record: bool, token_RT: Tensor, position_RT: Tensor, table_RP: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`static_drafts.Feed`."""
        model, trace = self.model, RoutingTrace(self.model.cfg) if record and self.expert_RLK is not None else None
        own, slot_N = own_pages(table_RP, position_RT)
        x_N1D, rope = model.embed(token_RT.view(-1, 1)), self._rope[own.position_B][:, None]
        for i, layer in enumerate(model.layers):
            x_N1D = layer_step(layer, i, x_N1D, rope, self._cache, own, slot_N, trace)
        return model.norm(x_N1D.squeeze(1)), None if trace is None else trace.take()


def ahead(drafts: int) -> int:
    """Slots after a row's last token that steps write to: the drafts of a step, after those of the step before it,
    which the host has not seen yet."""
    return 2 * drafts


def padded_counts(most: int) -> tuple[int, ...]:
    """The numbers of rows and pages that steps are padded to: 1, 2, 3, 4, 6, 8, 12, ..., `most`; less than a third of
    them is idle."""
    powers = [1 << k for k in range(most.bit_length())]
    return (*sorted(size for size in {*powers, *(3 * power for power in powers)} if size < most), most)


def addresses(model: Model) -> list[int]:
    """The addresses of the weights."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


class CudaGraphs:
    """`Capture` on the current GPU. All graphs share one memory pool: none keeps a result outside the buffers."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None], advanced: tuple[Tensor, ...]) -> Replay:
        before, saved = torch.cuda.current_stream(), [tensor.clone() for tensor in advanced]

        def warm_up() -> None:
            step()
            for tensor, value in zip(advanced, saved, strict=True):
                tensor.copy_(value)

        try:
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                warm_up()  # compiles, tunes and makes workspaces
                with _no_waits():  # finds operations that wait: in a capture they would leave much to clean up
                    warm_up()
            before.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except BaseException:
            torch.cuda.set_stream(before)  # a failed capture leaves its own stream set
            torch.cuda.synchronize()
            for tensor, value in zip(advanced, saved, strict=True):
                tensor.copy_(value)
            raise
        return graph.replay


@contextmanager
def _no_waits() -> Iterator[None]:
    """Raises RuntimeError at the end if an operation of this thread waited for the device. torch reports waits of the
    whole process, as warnings; those of other threads, which may be saving a checkpoint, do not count."""
    mode, thread, waits = torch.cuda.get_sync_debug_mode(), threading.get_ident(), []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if threading.get_ident() == thread and "synchroniz" in str(message):
            waits.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise RuntimeError(f"an operation waits for the GPU ({waits[0].splitlines()[0]})")


def plain(step: Callable[[], None], advanced: tuple[Tensor, ...]) -> Replay:
    """A `Capture` that captures nothing: runs the same steps as with graphs, on any device."""
    return step
