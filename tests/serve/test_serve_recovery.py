"""A step that fails on a GPU. The GPU is simulated: its free memory is what the pools that are alive leave."""

import gc
import threading
import weakref
from multiprocessing import Pipe

import pytest

from bessemer.addons.serve import ServeConfig, worker
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.worker import ModelWorker
from bessemer.engine.engine import Engine
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

ROWS = 8


class Gpu:
    """`memory`: bytes that the device has for caches. `fail`: the next step raises, and the device then has this much.
    `beside`: schedulers that were alive when others were made."""

    def __init__(self, monkeypatch):
        self.memory, self.fail = 8 << 20, None
        self.alive, self.beside = weakref.WeakSet(), []
        init, step = Scheduler.__init__, Scheduler.step

        def noted(scheduler, *args, **options):
            self.beside.append(len(self.alive))
            init(scheduler, *args, **options)
            self.alive.add(scheduler)

        def broken(scheduler):
            if self.fail is None:
                return step(scheduler)
            self.memory, self.fail = self.fail, None
            # this frame holds the scheduler, as those of a real failure do
            raise RuntimeError("CUDA out of memory")

        monkeypatch.setattr(Scheduler, "__init__", noted)
        monkeypatch.setattr(Scheduler, "step", broken)
        monkeypatch.setattr(worker, "free_bytes", lambda model: self.memory)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.fixture
def model(engine):
    cfg = preset("tiny", vocab_size=engine.tokenizer.vocab_size, max_seq_len=32768, n_mtp=0, dim=32, n_layers=2)
    return Engine(Transformer(cfg).initialise(0), engine.tokenizer)


def played(gpu, model, requests, memory):
    """Runs a worker whose first step fails and leaves this much memory: (its scheduler's sizes and the advertised
    context, tokens of each sample, how each ended, whether the worker has ended by itself)."""
    parent_end, child_end = Pipe()
    served = ModelWorker(child_end, model, ServeConfig(rows=ROWS))
    context, gpu.fail = served.context, memory
    thread = threading.Thread(target=served.run, daemon=True)
    parent_end.send((worker.ADD, 1, list(enumerate(requests))))
    thread.start()
    tokens, ends, sizes = [0] * len(requests), {}, set()
    while len(ends) < len(requests):
        assert parent_end.poll(60)
        kind, *arguments = parent_end.recv()
        if kind == worker.EVENTS:
            records, figures = arguments
            sizes |= {figures["cache_tokens"]} if figures else set()
            for number, *fields in records:
                if isinstance(fields[0], str):
                    ends[number] = fields[:2]
                else:
                    tokens[number] += 1
    thread.join(0.5)
    ended = not thread.is_alive()
    parent_end.close()
    thread.join(30)
    gc.unfreeze()
    assert not thread.is_alive()
    return sizes, context, tokens, ends, ended


def whole(context, n=0):
    """A request that fills the context."""
    return Request((3,) * (context - 3), n, 3, stop_ids=())


def context_of(gpu, model):
    tokens = worker.cache_room(model.model, ROWS, gpu.memory)
    context = Scheduler(model, rows=ROWS, cache_tokens=tokens).longest
    gpu.beside.clear()
    return context


def test_the_new_scheduler_is_as_large_as_the_old_one(gpu, model):
    context = context_of(gpu, model)
    sizes, advertised, tokens, ends, ended = played(gpu, model, [whole(context), Request((5,), 1, 4)], gpu.memory)
    assert advertised == context < 32768 and len(sizes) == 1 and sizes.pop() >= context
    assert tokens == [3, 4] and ends[0][0] == ends[1][0] == "length" and not ended
    assert gpu.beside == [0, 0], "the old cache was gone before the new one came"


def test_recovery_drops_only_requests_that_no_longer_fit(gpu, model):
    context = context_of(gpu, model)
    requests = [whole(context), Request((5,), 1, 4, stop_ids=())]
    _, _, tokens, ends, ended = played(gpu, model, requests, gpu.memory // 2)
    assert ends[0][0] == "error" and "cache holds" in ends[0][1]
    assert tokens[1] == 4 and ends[1][0] == "length" and not ended


def test_out_of_memory_ends_the_answers_and_the_process(gpu, model):
    _, _, tokens, ends, ended = played(gpu, model, [Request((5,), 0, 4), Request((5,), 1, 4)], 1000)
    assert {reason for reason, _ in ends.values()} == {"error"} and tokens == [0, 0] and ended
