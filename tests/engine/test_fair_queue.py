"""The queue of a server: clients take turns, and what starts finds room until it ends."""

import random
from dataclasses import replace

import pytest
from drain import drain
from test_scheduler import alone, requests, used

from bessemer.addons.serve.fair_queue import FairQueue
from bessemer.addons.serve.requests import Finished
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.random_streams import stream_key
from bessemer.model.transformer import Transformer


def test_a_full_cache_changes_no_answer_and_leaves_nothing_behind(engine, prompts):
    wanted = requests(prompts)
    scheduler = Scheduler(engine, rows=20, cache_tokens=4 * PAGE, prefill_tokens=50, queue=FairQueue())
    results, _ = drain(scheduler, wanted, every=1)
    for request, (tokens, end) in zip(wanted, results, strict=True):
        expected = alone(engine, request)
        assert [event.token for event in tokens] == list(expected.tokens) and end.reason == expected.finish_reason
    assert used(scheduler) == 0 and not scheduler.queue.running and scheduler.stats()["preempted"]


def test_a_client_with_many_requests_does_not_delay_the_others(engine, prompts):
    scheduler = Scheduler(engine, rows=2, queue=FairQueue())
    for k in range(12):
        scheduler.add(Request(tuple(prompts[3]), stream_key(k), 10, client="many"))
    late = scheduler.add(Request(tuple(prompts[4]), stream_key(99), 10, client="one"))
    order = []
    while not scheduler.is_idle:
        order += [event.ticket for event in scheduler.step() if isinstance(event, Finished)]
    assert order.index(late) <= 4 and len(order) == 13


def test_a_client_with_many_names_gets_one_share(engine, prompts):
    """And its users take turns among themselves."""
    scheduler = Scheduler(engine, rows=2, queue=FairQueue())
    made = [("many", f"name {k}") for k in range(9)] + [("proxy", "first")] * 4 + [("proxy", "second"), ("one", "")]
    clients = {
        scheduler.add(Request(tuple(prompts[k % 3]), stream_key(k), 6, stop_ids=(), client=client, user=user)): (
            client,
            user,
        )
        for k, (client, user) in enumerate(made)
    }
    order = []
    while not scheduler.is_idle:
        order += [clients[event.ticket] for event in scheduler.step() if isinstance(event, Finished)]
    assert order.index(("one", "")) <= 3 and order.index(("proxy", "second")) <= 5
    assert [client for client, _ in order[:6]].count("many") <= 3


def test_state_of_gone_clients_is_dropped(engine):
    """One of whose requests ended while another waited, and one whose request waited after a preemption."""
    scheduler = Scheduler(engine, rows=1, queue=FairQueue())
    first = Request((20, 21, 22), 1, 1, stop_ids=(), client="impatient")
    scheduler.add(first)
    second = scheduler.add(replace(first, max_new_tokens=9))
    scheduler.step()
    scheduler.cancel(second)
    third = scheduler.start(replace(first, client="preempted"))
    scheduler.queue.take(scheduler.queue.peek(1))
    scheduler.queue.requeue(third)
    scheduler.cancel(third.number)
    assert scheduler.is_idle and not scheduler.queue._last_turn and not scheduler.queue.running


@pytest.mark.parametrize("lengths", ["equal", "random"])
@pytest.mark.parametrize("pages", [40, 24])
def test_a_full_cache_prefills_little_twice(cfg, tokenizer, lengths, pages):
    """Prompts of one page, whose answers need seven more each, or as many as chance wants."""
    model = Transformer(cfg.model_copy(update={"max_seq_len": 512})).initialise(0)
    scheduler = Scheduler(Engine(model, tokenizer), rows=32, cache_tokens=pages * PAGE, queue=FairQueue())
    tokens, real = [], scheduler.runner.prefill

    def counted(chunks, *rest):
        tokens.append(sum(chunk.end - chunk.prompt.length for chunk in chunks))
        return real(chunks, *rest)

    scheduler.runner.prefill = counted
    draw = random.Random(1)
    count = 48 if pages == 40 else 24
    for n in range(count):
        most = 448 if lengths == "equal" else draw.randint(20, 448)
        prompt = tuple(draw.randrange(3, 290) for _ in range(PAGE))
        scheduler.add(Request(prompt, n, most, stop_ids=()))
    _, actual = drain(scheduler)
    assert len(actual) == count and sum(tokens) <= 1.55 * count * PAGE
