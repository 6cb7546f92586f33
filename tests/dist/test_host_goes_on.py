"""Messages as a GPU has them: a wait returns at once and holds later work of the device, not the host.

Real gloo processes whose `dist` is `Late`. What is received is NaN until work that was queued after the wait reads it, so
what reads too early, or without a wait, shows in the results. What is sent leaves late, each direction after a delay of its
own, so whatever is changed before it has left shows, too.
"""

import os
import queue
import random
import threading
import time

import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across, update
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bessemer.dist import executor
from bessemer.dist.mesh import Layout
from bessemer.dist.watchdog import RankStatus
from bessemer.kernels import library


class Late:
    """torch.distributed, but for its messages."""

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
    """The device comes to what was queued after a wait when the message is there."""

    def __init__(self, late):
        super().__init__()
        self.late = late

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and self.late.arriving:
                found = self.late.arriving.pop(x.untyped_storage().data_ptr(), None)
                if found is not None:
                    found.work.wait()
                    found.x.detach().copy_(found.hidden)
                    self.late.read += 1
        return function(*args, **(kwargs or {}))


def steps(name, layout, micro):
    training = across(layout, name)
    values = [update(training, step, micro) for step in range(2)]
    for one in values:
        del one["train/tokens_per_second"]
    return values, training.optimizer.masters()


def on_a_rank(rank, name, layout, micro):
    os.environ["BESSEMER_KERNELS"] = "off"  # they read by address, which no dispatch mode sees
    library.forget()
    with Device(Late(rank)):  # with torch's own messages; under any mode some operations are others
        wanted, weights = steps(name, layout, micro)
    executor.dist = late = Late(rank)
    marks = []
    RankStatus.mark = lambda: marks.append(1) or (lambda: not late.arriving)
    with Device(late):
        found, mine = steps(name, layout, micro)
    equal = found == wanted and all(torch.equal(mine[name], weight) for name, weight in weights.items())
    return equal, late.read, late.early, len(marks)


def test_no_message_is_read_early_or_changed_before_it_has_left():
    layout, micro = Layout(2), 4
    for equal, read, early, marks in on_ranks(layout.world, on_a_rank, "dualpipe", layout, micro):
        assert equal, "a message was read before it had arrived, or changed before it had left"
        assert read == 2 * micro and early > 0, "the host waited"
        assert marks > read, "every wait is followed by the watchdog"
