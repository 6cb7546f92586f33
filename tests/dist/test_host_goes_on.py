"""Messages and sums as on a GPU: a wait returns at once and holds up later work of the device, not the host.

Real gloo processes whose `dist` is `Late`, and whose ZeRO-1 sums and gathers are those of `LateSums`. What is received
is NaN until work that was queued after the wait reads it, so a read that is too early, or without a wait, shows in the
results. What is sent leaves late, with a different delay for each direction, so a change before it has left shows too.
"""

import os
import queue
import random
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across, update
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bessemer.addons.accelerate.kernels import library
from bessemer.addons.distributed import completion, executor, zero1
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_slice import Slice
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.watchdog import RankStatus


class Late:
    """torch.distributed, except for its messages."""

    def __init__(self, seed):
        self.draw, self.directions = random.Random(seed), {}
        self.arriving, self.read, self.early = {}, 0, 0

    def __getattr__(self, name):
        return getattr(dist, name)

    def irecv(self, x, peer, group):
        hidden = torch.empty_like(x)
        work = dist.irecv(hidden, peer, group)
        return Received(self, x.fill_(torch.nan), hidden, work)

    def isend(self, x, peer, group):
        if group not in self.directions:
            self.directions[group] = Direction(self.draw.random() * 0.004)
        sent = Sent()
        self.directions[group].waiting.put((x, peer, group, sent))
        return sent


class Received:
    def __init__(self, late, x, hidden, work):
        self.late, self.x, self.hidden, self.work = late, x, hidden, work

    def wait(self):
        self.late.early += not self.work.is_completed()
        self.late.arriving[self.x.untyped_storage().data_ptr()] = self


class Sent:
    gone = False

    def wait(self):
        pass

    def is_completed(self):
        return self.gone


class Direction(threading.Thread):
    def __init__(self, delay):
        super().__init__(daemon=True)
        self.delay, self.waiting = delay, queue.Queue()
        self.start()

    def run(self):
        while True:
            x, peer, group, sent = self.waiting.get()
            time.sleep(self.delay)
            dist.send(x, peer, group)
            sent.gone = True


class Device(TorchDispatchMode):
    """A device that reaches what was queued after a wait once the message has arrived."""

    def __init__(self, late):
        super().__init__()
        self.late = late

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and self.late.arriving:
                actual = self.late.arriving.pop(x.untyped_storage().data_ptr(), None)
                if actual is not None:
                    actual.work.wait()
                    actual.x.detach().copy_(actual.hidden)
                    self.late.read += 1
        return function(*args, **(kwargs or {}))


def steps(name, layout, micro):
    training = across(layout, name)
    values = [update(training, step, micro) for step in range(2)]
    for data in values:
        del data["train/tokens_per_second"]
    return values, training.optimizer.masters()


def on_a_rank(rank, name, layout, micro):
    os.environ["BESSEMER_KERNELS"] = "off"  # they read by address, which no dispatch mode sees
    library.forget()
    with Device(Late(rank)):  # with torch's own messages; some operations differ under any mode
        expected, weights = steps(name, layout, micro)
    executor.dist = late = Late(rank)
    marks = []
    RankStatus.mark = lambda: marks.append(1) or (lambda: not late.arriving)
    with Device(late):
        actual, own = steps(name, layout, micro)
    equal = actual == expected and all(torch.equal(own[name], weight) for name, weight in weights.items())
    return equal, late.read, late.early, len(marks)


def test_messages_are_neither_read_early_nor_changed_in_flight():
    layout, micro = Layout(2), 4
    for equal, read, early, marks in on_ranks(layout.world, on_a_rank, "dualpipe", layout, micro):
        assert equal, "a message was read before it had arrived, or changed before it had left"
        assert read == 2 * micro and early > 0, "the host waited"
        assert marks > read, "every wait is followed by the watchdog"


class LateSums(Late):
    """ZeRO-1's reduce-scatter and all-gather."""

    changed = 0

    def reduce_scatter(self, out, parts, group, async_op):
        return Summed(self, dist.reduce_scatter_tensor, out, parts, group, slice(0))

    def all_gather(self, out, part, group, async_op=False):
        if not async_op:
            return dist.all_gather_into_tensor(out, part, group=group)
        start = dist.get_rank(group) * part.numel()
        return Summed(self, dist.all_gather_into_tensor, out, part, group, slice(start, start + part.numel()))


class Summed(Received):
    def __init__(self, late, operation, out, arguments, group, own):
        hidden, self.given, self.kept = torch.empty_like(out), arguments, arguments.clone()
        super().__init__(late, out, hidden, operation(hidden, self.kept, group=group, async_op=True))
        mine = out[own].clone()
        out.fill_(torch.nan if out.is_floating_point() else 255)  # bytes of NaN
        out[own] = mine

    def wait(self):
        self.late.changed += not torch.equal(self.given, self.kept)
        super().wait()


def noted(order, group, begin):
    if group._summing is None:
        order.append(group)
    begin()


def in_buckets(micro=1, **options):
    """Two steps on 2 data-parallel ranks, in which weights are gathered while the next forward begins; also the order
    of gradients and sums in the second step."""
    training, order = across(Layout(1, 2), "gpipe", **options), []
    training.update = partial(training.update, settle=False)
    training.model.embed.weight.register_post_accumulate_grad_hook(lambda _: order.append("last gradient"))
    for group in training.optimizer.groups:
        group.begin_sum = partial(noted, order, group, group.begin_sum)
    for step in range(2):
        order.clear()
        values = update(training, step, micro)
    training.optimizer.settle()
    values.pop("train/tokens_per_second", 0.0)
    masters = training.optimizer.masters()
    return values, masters, [one if isinstance(one, str) else training.optimizer.groups.index(one) for one in order]


def equal(first, second):
    return all(torch.equal(first[name], weight) for name, weight in second.items())


def sums_on_a_rank(rank):
    expected, weights, _ = in_buckets(micro=2, bucket=1 << 30, clip=1e9)
    values, own, order = in_buckets(micro=2, clip=1e9)
    actual = {"the bits of one bucket": equal(own, weights), "order": order}
    actual["norm"] = abs(values["train/grad_norm"] / expected["train/grad_norm"] - 1)
    os.environ["BESSEMER_KERNELS"] = "off"
    library.forget()
    with Device(Late(rank)):
        values, weights, _ = in_buckets()

    def late():
        sums = LateSums(rank)
        zero1.reduce_scatter, zero1.all_gather = sums.reduce_scatter, sums.all_gather
        with Device(sums):
            is_equal, own, _ = in_buckets()
        return is_equal == values and equal(own, weights), sums.changed, sums.read

    actual["late"] = late()
    leave, wait, needed = Slice._leave, Summed.wait, zero1.Zero1.needed
    Slice._leave = lambda part, number: leave(part, 0)
    actual["told too early"] = late()
    Slice._leave = leave
    zero1.Zero1.needed = lambda optimizer, parameters: None
    actual["weights not waited for"] = late()
    zero1.Zero1.needed = needed
    Summed.wait = lambda work: work.given.dtype == torch.uint8 and wait(work)
    actual["sums not waited for"] = late()
    return actual


def test_buckets_reduce_in_backward_and_gather_in_forward():
    """The bits are those of one bucket whose sum starts at the end. No sum is read early, no gradient changes after its
    sum began, and no weight is read before it has arrived. Deliberate faults show."""
    for actual in on_ranks(2, sums_on_a_rank):
        assert actual["the bits of one bucket"] and actual["norm"] < 1e-6
        order = actual["order"]
        first, last = order.index("last gradient"), len(order) - 1 - order[::-1].index("last gradient")
        n = len(order) - 2
        assert first == 0 and last > n / 2, (
            "most sums start before the last gradient is made, but in the last micro-batch"
        )
        assert sorted(order[1:last] + order[last + 1 :]) == list(range(n))
        right, changed, read = actual["late"]
        assert right and changed == 0 and read == 4 * n, actual["late"]
        assert actual["told too early"][1] > 0 and not actual["told too early"][0]
        assert not actual["weights not waited for"][0] and not actual["sums not waited for"][0]


class LateShared:
    """The sums over DualPipe's two copies, NaN until they are waited for."""

    waits = True

    def __init__(self):
        self.begin_sum, self.changed, self.read = executor.Channels.begin_sum, 0, 0

    def begin(self, channels, others, x):
        copy, hidden = x.clone(), x.clone()
        wait = self.begin_sum(channels, others, hidden)
        x.fill_(torch.nan)

        def read():
            self.changed += not x.isnan().all()
            wait()
            self.read += 1
            if self.waits:
                x.copy_(hidden)

        assert copy.isfinite().all()
        return read


def of_two_copies(early=True):
    """Two steps of DualPipe on 2 x 2 ranks, and how many actions before the end of the second each sum began."""
    training, begun = across(Layout(2, 2), "dualpipe"), {}
    optimizer, ran = training.optimizer, []
    ahead = training.collective.executor_for(4)
    do = ahead._do
    ahead._do = lambda step: (ran.append(step), do(step))
    for number, group in enumerate(optimizer.groups):

        def begin(how, number=number, group=group, begin=group.begin_shared):
            begun.setdefault(number, len(ran))
            begin(how)

        group.begin_shared = begin
    if not early:
        optimizer.completed = lambda parameters: None
        optimizer.sum_shared = lambda begin: ahead.sum_shared()  # one parameter after the other
    for step in range(2):
        ran.clear(), begun.clear()
        values = update(training, step, 4)
    values.pop("train/tokens_per_second", 0.0)
    return values, optimizer.masters(), [len(ran) - begun[number] for number in sorted(begun)]


def copies_on_a_rank(rank):
    values, weights, none = of_two_copies(early=False)
    actual, own, early = of_two_copies()
    good = {"bits": actual == values and equal(own, weights), "early": early, "at the end": none}
    begin_sum = executor.Channels.begin_sum

    def late():
        sums = LateShared()
        executor.Channels.begin_sum = lambda *arguments: sums.begin(*arguments)
        actual, own, _ = of_two_copies()
        executor.Channels.begin_sum = begin_sum
        return actual == values and equal(own, weights), sums.changed, sums.read

    good["late"] = late()
    LateShared.waits = False
    good["not waited for"] = late()
    LateShared.waits, last_steps = True, completion.last_steps
    completion.last_steps = lambda steps: last_steps(steps[: max(last_steps(steps).values())])
    good["told too early"] = late()
    completion.last_steps = last_steps
    return good


def test_dualpipe_copies_are_summed_during_backward():
    """The bits are those of sums at the end, one parameter after another. One of a rank's two stages is complete two
    steps before the other. Deliberate faults show."""
    for actual in on_ranks(4, copies_on_a_rank):
        early = actual["early"]
        assert actual["bits"] and not actual["at the end"]
        assert set(early) == {0, 2} and early.count(2) >= len(early) / 4, early
        right, changed, read = actual["late"]
        assert right and changed == 0 and read > 2 * len(early), "the loads of experts are summed, too"
        assert not actual["not waited for"][0] and not actual["told too early"][0]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_dualpipe_ends_complete_stages_in_the_same_steps(ranks):
    steps = schedule("dualpipe", ranks, 4 * ranks).steps
    assert all(completion.alike(steps[rank], steps[ranks - 1 - rank]) for rank in range(ranks))
    between = [second - first for first, second in (sorted(completion.last_steps(one).values()) for one in steps)]
    assert between[0] == between[-1] == ranks and min(between) > 0, "rank 0 has sent one stage's before the other's"
    steps = schedule("1f1b", ranks, 4 * ranks).steps
    assert not completion.alike(steps[0], steps[-1])
