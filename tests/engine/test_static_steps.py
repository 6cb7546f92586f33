"""Decoding as on a GPU: steps over fixed buffers with the host one token behind, on a CPU, and on the meta device,
which has no numbers to give to the host."""

import sys
import warnings
from threading import Thread
from typing import ClassVar

import pytest
import torch
from drain import drain
from test_scheduler import SAMPLINGS, alone, requests, used
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.engine import device_runner, model_runner, room, row_sampling, sampling, static_steps
from bessemer.engine.engine import Engine
from bessemer.engine.kept_tokens import words
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.random_streams import stream_key, uniform
from bessemer.engine.routing_record import RoutingRecord
from bessemer.engine.scheduler import Scheduler
from bessemer.engine.sequence import Request, SamplingParams, Token
from bessemer.engine.static_steps import StaticSteps, plain
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl.ray_worker import load_weights, pack_weights, unpack_weights

CALL = dict(samples=3, max_new_tokens=24, seed=4)


@pytest.fixture
def as_gpu(monkeypatch):
    """A function that makes a CPU take the GPU's path."""

    def take(capture=plain, any_length=False) -> None:
        monkeypatch.setattr(static_steps, "serves", lambda model: True)
        monkeypatch.setattr(room, "graphs", lambda device: capture)
        monkeypatch.setattr(StaticSteps, "_reads_own_pages", lambda steps: any_length)

    return take


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert [c.tokens for c in a] == [c.tokens for c in b]
        assert [c.finish_reason for c in a] == [c.finish_reason for c in b]
        for c, d in zip(a, b, strict=True):
            assert c.logprobs == pytest.approx(d.logprobs, abs=2e-5)


@pytest.fixture(scope="module")
def once():
    """once(key, make): what the first make() of this key returned."""
    made = {}

    def find(key, make):
        return made[key] if key in made else made.setdefault(key, make())

    return find


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("way", [(None,), (plain,), (plain, True)], ids=["eager", "graphs", "graphs of any length"])
def test_samples_are_those_of_fixed_batches(engine, prompts, sampling, way, as_gpu, once):
    """More samples than rows, so that rows are refilled while others decode."""
    expected = once(str(sampling), lambda: engine.generate(prompts, **CALL, **sampling))
    as_gpu(*way)
    engine.rows, engine.keeps_memory = 5, True
    heard, written = [], [0]
    found = engine.generate(
        prompts, **CALL, **sampling, on_tokens=lambda new: written.append(written[-1] + len(new)),
        on_text=lambda *one: heard.append((*one, written[-1])),
    )  # fmt: skip
    same(found, expected)
    assert heard[0][-1] < written[-1] / 2, "the first answer was heard while others were being written"
    heard = [one[:-1] for one in heard]
    assert sorted(heard) == [(p, k, one.text) for p, group in enumerate(found) for k, one in enumerate(group)]
    assert engine._steps.rows == 5
    assert len({key[1] for key in engine._steps._graphs}) == (0 if way == (None,) else 1 if len(way) == 2 else 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 3}, {"prefill_tokens": 16}, {"rows": 20, "cache_tokens": 4 * PAGE, "prefill_tokens": 50}],
    ids=["roomy", "few rows", "prompts in pieces", "cache too small for all"],
)
def test_requests_of_every_sort_get_what_they_would_get_alone(engine, prompts, options, as_gpu, once):
    penalised = SamplingParams(0.9, repetition_penalty=1.2)
    wanted = [*requests(prompts), Request(tuple(prompts[2]), stream_key(5), 20, penalised)]
    expected = once("alone", lambda: [alone(engine, one) for one in wanted])
    as_gpu()
    scheduler = Scheduler(engine, **options)
    assert isinstance(scheduler.runner, device_runner.DeviceRunner)
    results, _ = drain(scheduler, wanted, every=1)
    for (tokens, end), one in zip(results, expected, strict=True):
        assert [event.token for event in tokens] == list(one.tokens)
        assert [event.logprob for event in tokens] == pytest.approx(one.logprobs, abs=2e-5)
        assert end.reason == one.finish_reason
    assert used(scheduler) == 0 and not scheduler.queue.running
    assert (scheduler.stats()["preempted"] > 0) == ("cache_tokens" in options)


def test_experts_are_recorded_as_in_fixed_batches(engine, prompts, as_gpu, monkeypatch):
    """Including samples that are preempted and restart with all their tokens as a prompt."""
    expected = engine.generate(prompts, record_routing=True, **CALL)
    as_gpu()
    engine.rows, engine.keeps_memory = 6, True
    make = room.make_steps
    monkeypatch.setattr(room, "make_steps", lambda *sizes: make(*sizes[:4], 5 * PAGE, sizes[5]))
    found = engine.generate(prompts, record_routing=True, **CALL)
    same(found, expected)
    pairs = [(c.routing, d.routing) for a, b in zip(found, expected, strict=True) for c, d in zip(a, b, strict=True)]
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    equal = torch.cat([(a.sort(-1).values == b.sort(-1).values).all(-1).flatten() for a, b in pairs])
    assert equal.float().mean() > 0.999


@pytest.mark.parametrize("form", [SAMPLINGS[:2], SAMPLINGS], ids=["plain", "every rule"])
def test_rows_are_sampled_by_their_own_rules(form):
    """Against the sampler for equal rows, with spare ids and a vocabulary that is not a multiple of a block."""
    generator = torch.Generator().manual_seed(3)
    B, V, vocab = 64, 300, 290
    logits = 3 * torch.randn(B, V, generator=generator)
    params = [form[b % len(form)] for b in range(B)]
    key, position = torch.arange(B) * 977, torch.arange(B) % 7
    rules = torch.tensor([(p.temperature, p.top_p, p.top_k, p.min_p) for p in params], dtype=torch.float64)
    before = logits.clone()
    found = row_sampling.sample(logits, vocab, rules, key, position, row_sampling.form_of(params))
    assert torch.equal(logits, before)
    for b, p in enumerate(params):
        one = sampling.sample(logits[b : b + 1].clone(), p, uniform(key[b : b + 1], position[b : b + 1]), vocab)
        assert found[b, 0] == one.token_B[0]
        assert found[b, 1:].tolist() == pytest.approx([float(one.logp_B), float(one.raw_logp_B)], abs=1e-5)


def test_a_row_of_nan_ends_alone_and_leaves_a_finite_cache(engine, prompts, as_gpu):
    as_gpu()
    bad, good = Request((77, 5), stream_key(1), 12, stop_ids=()), Request((9, 5), stream_key(2), 12, stop_ids=())
    expected = alone(engine, good)
    with torch.no_grad():
        engine.model.embed.weight[77] = float("nan")
    scheduler = Scheduler(engine)
    results, _ = drain(scheduler, [bad, good], every=1)
    assert results[0][1].reason == "error" and not results[0][0]
    assert [event.token for event in results[1][0]] == list(expected.tokens)
    taken = scheduler.runner.steps.pools
    assert all(pool[:-1].isfinite().all() for pool in taken)


WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive", "equal"}


class Transfers(TorchDispatchMode):
    """Fails if the host would wait for the device, or copies to it other than through pinned memory. (Numbers of a meta
    tensor cannot be read at all.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__.partition(".")[0], kwargs or {}
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim()]  # scalars travel with the launch
        assert name not in WAITS or all(x.device.type == "cpu" for x in tensors), name
        devices = {x.device.type for x in tensors} | ({kwargs["device"].type} if kwargs.get("device") else set())
        if tensors and len(devices) > 1:
            frame, callers = sys._getframe(), set()
            while frame is not None:
                callers.add(frame.f_code.co_name)
                frame = frame.f_back
            assert "to_device" in callers, f"{name} between {devices}"
        return function(*args, **kwargs)


class MadeUp:
    """`Fetch` for a device without numbers."""

    reads: ClassVar[list[int]] = []
    """For each read, how many steps had begun before it."""
    steps = 0

    def __init__(self, tensor):
        assert tensor.device.type == "meta" and tensor.is_contiguous()
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def read(self):
        MadeUp.reads.append(MadeUp.steps)
        return [[5 + len(MadeUp.reads) % 7, -1.0, -1.0]] * self.shape[0]

    def tensor(self):
        """Requested together with the tokens, and available when they are."""
        return torch.ones(self.shape, dtype=self.dtype)


@pytest.fixture
def on_meta(tokenizer, monkeypatch):
    """A BF16 scheduler that records experts, and a function that runs it until idle: (tokens, reads of every step)."""
    for module in (device_runner, model_runner):
        monkeypatch.setattr(module, "Fetch", MadeUp)
    run = StaticSteps.run

    def counted(*arguments):
        MadeUp.steps += 1
        run(*arguments)

    monkeypatch.setattr(StaticSteps, "run", counted)
    monkeypatch.setattr(MadeUp, "reads", [])
    monkeypatch.setattr(MadeUp, "steps", 0)
    cfg = preset("tiny", vocab_size=tokenizer.vocab_size, dim=64, moe_inter_dim=32, n_layers=2, max_seq_len=160)
    model = Transformer(cfg).to("meta").to_compute(torch.bfloat16).eval()
    assert static_steps.serves(model)
    record = RoutingRecord()
    scheduler = Scheduler(Engine(model, tokenizer), rows=3, cache_tokens=480, record=record, prefix_cache=False)
    assert isinstance(scheduler.runner, device_runner.DeviceRunner)

    def drained():
        tokens, reads = 0, []
        with Transfers():
            while not scheduler.idle:
                before = len(MadeUp.reads)
                tokens += sum(isinstance(event, Token) for event in scheduler.step())
                reads.append(len(MadeUp.reads) - before)
        return tokens, reads

    return scheduler, drained


def test_a_step_waits_for_the_device_once_and_prefill_never(on_meta):
    """Requests arrive, decode, grow into new pages and end, with every sampling rule. By the time the host waits for a
    step's tokens, the next step has begun."""
    scheduler, drained = on_meta
    for k in range(4):
        scheduler.add(Request((3, 4, 5) * (1 + 20 * (k % 2)), stream_key(k), 4 + k, SAMPLINGS[k % 4], stop_ids=()))
    tokens, reads = drained()
    assert tokens == sum(4 + k for k in range(4)) and set(reads) == {1}
    assert MadeUp.reads == list(range(1, len(reads) + 1))


def test_kept_tokens_come_with_the_tokens(on_meta):
    scheduler, drained = on_meta
    runner = scheduler.runner
    runner.kept, runner.kept_BW = True, runner.key_B.new_zeros(0, words(runner.vocab))
    sequences = [
        scheduler.start(Request((3, 4, 5), stream_key(k), 4 + k, SamplingParams(0.9, top_p=0.9), stop_ids=()))
        for k in range(4)
    ]
    _, reads = drained()
    assert set(reads) == {1} and MadeUp.reads == list(range(1, len(reads) + 1))
    assert [len(sequence.kept_counts) for sequence in sequences] == [4, 5, 6, 7]


def test_a_step_waits_once_where_the_host_decides_first(on_meta):
    """Penalties count the tokens so far (a bias needs none), so the step begins when they are known."""
    scheduler, drained = on_meta
    penalised = SamplingParams(0.9, top_p=0.9, repetition_penalty=1.2, bias=((5, 1.0), (9, -2.0)))
    scheduler.add(Request((3, 4, 5) * 21, stream_key(1), 4, penalised, stop_ids=()))
    scheduler.add(Request((3, 4), stream_key(2), 5, stop_ids=()))
    tokens, reads = drained()
    assert tokens == 9 and set(reads) == {1} and MadeUp.reads[:4] == [0, 1, 2, 3]


def test_steps_that_cannot_be_captured_run_as_they_are(engine, prompts, as_gpu, monkeypatch, capfd):
    expected = engine.generate(prompts, **CALL)
    as_gpu()

    def refused(step, advanced):
        saved = [tensor.clone() for tensor in advanced]
        step()
        for tensor, value in zip(advanced, saved, strict=True):
            tensor.copy_(value)
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    monkeypatch.setattr(room, "graphs", lambda device: refused)
    same(engine.generate(prompts, **CALL), expected)
    said = capfd.readouterr().err.splitlines()
    assert said == ["decoding without CUDA graphs, which is slower: operation not permitted when stream is capturing"]


def test_weights_change_in_place_and_moved_ones_are_captured_again(engine, prompts, as_gpu, monkeypatch):
    """An optimizer step, a worker's refresh and loading other values keep every address."""
    as_gpu()
    engine.keeps_memory, model = True, engine.model
    engine.generate(prompts, **CALL)
    steps = engine._steps
    captured = set(steps._graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(torch.tensor([prompts[5]])).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    load_weights(model, unpack_weights(pack_weights({k: v * 1.01 for k, v in model.state_dict().items()})))
    found = engine.generate(prompts, **CALL)
    assert engine._steps is steps and set(steps._graphs) >= captured
    monkeypatch.setattr(static_steps, "serves", lambda *_: False)
    same(found, engine.generate(prompts, **CALL))
    as_gpu()
    model.layers[0].attn.wo.weight = torch.nn.Parameter(model.layers[0].attn.wo.weight.detach().clone())
    engine.generate(prompts, **CALL)
    assert engine._steps is not steps
    engine.keeps_memory = False
    engine.generate(prompts[:1], **CALL)
    assert engine._steps is None


def test_rows_are_what_the_memory_holds_beside_the_weights(engine, prompts, as_gpu, monkeypatch):
    as_gpu()
    engine.keeps_memory, model, tokens = True, engine.model, 100
    row = 2 * room.page_bytes(model) + room.LOGITS * 4 * model.cfg.vocab_size
    free = int((7.5 * row + room.prefill_bytes(model, 50)) / (1 - room.SPARE))
    assert room.rows_that_fit(model, tokens, 50, free) == 7
    assert room.rows_that_fit(model, tokens, 50, None) is None
    with pytest.raises(UserError, match=r"no room to generate: an answer of up to 100 tokens, .* lower max_new_tokens"):
        room.rows_that_fit(model, tokens, 50, free // 100)
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    monkeypatch.setattr("bessemer.engine.engine.PREFILL", 50)
    expected = [len(group) for group in engine.generate(prompts, **CALL)]
    assert engine._steps.rows == 7 and expected == [3] * 8
    assert sum(pool.nbytes for pool in engine._steps.pools) < free
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    engine.generate(prompts[:2], max_new_tokens=4)
    assert engine._steps.rows == 7, "large enough"
    engine.release()
    engine.generate(prompts[:2], max_new_tokens=4)
    conversation = engine._steps
    assert conversation.rows == 2 and conversation.row_tokens == model.cfg.max_seq_len
    engine.generate(prompts[6:], max_new_tokens=40)
    assert engine._steps is conversation
    taken = 3 * row + room.prefill_bytes(model, 50)
    assert room.fits(model, 3, tokens, 50, 2 * taken + 1) and not room.fits(model, 3, tokens, 50, 2 * taken)


def test_rows_are_padded_by_less_than_a_third():
    for most in (1, 2, 5, 64, 300):
        sizes = static_steps.padded_counts(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        assert all(next(size for size in sizes if size >= n) <= max(n + 1, n * 1.5) for n in range(1, most + 1))


class Stub:
    """torch.cuda as far as a capture needs it; logs what is asked of it, in order."""

    def __init__(self, monkeypatch, fails=""):
        self.log, self.mode, self.fails = [], 0, fails
        self.streams = ["main"]
        for name in ("Stream", "CUDAGraph", "graph", "stream", "set_stream", "current_stream", "graph_pool_handle",
                     "set_sync_debug_mode", "get_sync_debug_mode", "synchronize"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"do_{name}"))

    def do_Stream(self):
        return self

    def wait_stream(self, other):
        self.log.append("wait")

    def do_CUDAGraph(self):
        return self

    def replay(self):
        self.log.append("replay")

    def do_graph_pool_handle(self):
        return "pool"

    def do_current_stream(self):
        return self

    def do_set_stream(self, stream):
        self.log.append("back")

    def do_get_sync_debug_mode(self):
        return self.mode

    def do_set_sync_debug_mode(self, mode):
        self.mode = mode

    def do_synchronize(self):
        self.log.append("synchronize")

    def do_stream(self, stream):
        return self

    def do_graph(self, graph, *, pool, stream, capture_error_mode):
        assert (graph, pool, stream, capture_error_mode) == (self, "pool", self, "thread_local") and self.mode == 0
        self.log.append("capture")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


def test_a_capture_warms_up_first_and_leaves_the_rows_where_they_were(monkeypatch):
    stub, position = Stub(monkeypatch), torch.tensor([3, 4])

    def step():
        stub.log.append(f"step in mode {stub.mode}")
        if "capture" not in stub.log:  # a captured step is only recorded, not run
            position.add_(1)
            assert position.tolist() == [4, 5]

    replay = static_steps.CudaGraphs()(step, (position,))
    assert stub.log == ["wait", "step in mode 0", "step in mode warn", "wait", "capture", "step in mode 0"]
    assert position.tolist() == [3, 4] and stub.mode == 0
    replay()
    assert stub.log[-1] == "replay"


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    stub, position = Stub(monkeypatch), torch.tensor([3])

    def step():
        position.add_(1)
        if stub.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with pytest.raises(RuntimeError, match=r"an operation waits for the GPU \(called a synchronizing CUDA operation\)"):
        static_steps.CudaGraphs()(step, (position,))
    assert stub.log[-2:] == ["back", "synchronize"] and stub.mode == 0 and position.tolist() == [3]


def test_waits_of_other_threads_do_not_count(monkeypatch):
    stub = Stub(monkeypatch)

    def step():
        if stub.mode == "warn":
            other = Thread(target=warnings.warn, args=("called a synchronizing CUDA operation",))
            other.start()
            other.join()

    static_steps.CudaGraphs()(step, ())
    assert "capture" in stub.log


def test_padding_rows_stand_still_on_a_page_of_their_own(engine, as_gpu, monkeypatch):
    """Five rows in steps of six, then fewer; pages that belong to no row stay as they were."""
    as_gpu()
    scheduler = Scheduler(engine, rows=6, cache_tokens=12 * PAGE)
    steps, runner = scheduler.runner.steps, scheduler.runner
    for k in range(5):
        scheduler.add(Request((5, 9), stream_key(k), 4 + 3 * k, stop_ids=()))
    seen, run = set(), steps.run

    def checked(n, *rest):
        run(n, *rest)
        seen.add(n)
        assert not steps.position_R[n:].any() and (steps.table_RP[n:] == steps.pages).all()
        taken = [page for pages in runner.cache.row_pages for page in pages]
        assert len(set(taken)) == n and steps.pages not in taken

    monkeypatch.setattr(steps, "run", checked)
    while not scheduler.idle:
        scheduler.step()
    assert seen >= {2, 5}
    assert all(not pool[5:-1].any() and pool[-1].any() for pool in steps.pools)


def test_prompts_are_prefilled_together_when_a_part_of_the_rows_is_free(engine, prompts, as_gpu, monkeypatch):
    as_gpu()
    wanted = [Request(tuple(prompts[i % 8]), stream_key(9, i), 2 + 5 * i % 17, stop_ids=()) for i in range(24)]
    found = {}
    for gather in (1, 4):
        scheduler = Scheduler(engine, rows=8, prefix_cache=False, gather=gather)
        calls, prefill = [], scheduler.runner.prefill
        monkeypatch.setattr(
            scheduler.runner, "prefill", lambda chunks, p=prefill, c=calls: c.append(len(chunks)) or p(chunks)
        )
        for request in wanted:
            scheduler.add(request)
        _, done = drain(scheduler)
        found[gather] = (len(calls), {t: [event.token for event in tokens] for t, (tokens, _) in done.items()})
        assert sum(calls) <= 24 and len(done) == 24
    assert found[4][1] == found[1][1]
    assert found[4][0] <= 6 < found[1][0]
