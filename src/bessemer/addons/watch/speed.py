"""How long a stage still takes, from what it was expected to take and from what it has done so far.

Seconds left = what the rest costs, times seconds per unit of cost.

- The cost of a step is 1, or the length of a rollout's answers, which changes while a policy learns. The rest is then
  expected as the recipe's limits on length have it, times how the newest steps compare with that; the comparison fades
  over as many steps as have been seen.
- The seconds per unit begin as planned and go over to a mean over the last minutes (`TRUST`, `MEMORY`). Where the last
  half minute (`RECENT`) differs clearly from that mean, because other work has come to the machine or left it, the last
  half minute decides.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from bessemer.addons.watch.expected import ExpectedTime

TRUST = 10.0
"""Seconds of observation that count as much as the plan; what is seen counts with their square."""
MEMORY = 180.0
"""Seconds after which an observation counts 1/e."""
EARLY, UNSEEN = 0.3, 10.0
"""Standard deviations of the logarithm of how long a stage takes: when it has just begun, and before."""
RECENT, FEWEST, SHORTEST = 30.0, 3, 0.5
"""The newest steps, whose median says how fast the machine is now: their seconds and least number; shorter ones count
together."""
SAME, OTHER = 0.05, 0.2
"""Differences of logarithms: below the first both speeds are the same, from the second on the newest is right."""
NEWEST = 4
"""Steps of cost that the comparison with the plan forgets by 1/e."""


class StageSpeed:
    """One attempt at a stage."""

    def __init__(self, time: ExpectedTime, factor: float, work: float, done: float, now: float) -> None:
        """`factor`: how much longer than planned it will take, by the stages before it. `work` steps, of which an
        earlier attempt has made `done`; times are seconds of one clock."""
        self.time, self.work, self.done = time, work, done
        self._cost_W = [cost + time.beside for cost in time.each] if len(time.each) == work else []
        whole = sum(self._cost_W) or work
        self._planned = time.seconds * factor / whole if whole > 0 else 0.0
        self._recent_seconds = self._recent_cost = self._seconds = self._cost = 0.0
        self._before = sum(self._cost_W[: int(done)]) if self._cost_W else done
        self._newest: deque[tuple[float, float]] = deque()
        self._newest_seconds, self._last = 0.0, now
        self._steps, self._compared, self._weight = 0.0, 0.0, 0.0

    def saw(self, work: float, cost: float, now: float) -> None:
        """`work` more is done, at this `cost`."""
        if not work:  # a sign of life
            return
        seconds, self._last = now - self._last, now
        if self._cost_W:
            expected = self._cost_W[min(int(self.done), len(self._cost_W) - 1)] * work
            cost += self.time.beside * work
            if expected > 0:
                fade = math.exp(-work / NEWEST)
                self._compared = fade * self._compared + (1 - fade) * cost / expected
                self._weight = fade * self._weight + 1 - fade
        self.done, self._steps, self._before = self.done + work, self._steps + work, self._before + cost
        fade = math.exp(-seconds / MEMORY)
        self._recent_seconds = fade * self._recent_seconds + seconds
        self._recent_cost = fade * self._recent_cost + cost
        self._seconds, self._cost = self._seconds + seconds, self._cost + cost
        self._newest_seconds += seconds
        if self._newest and self._newest[-1][0] < SHORTEST:
            before, cost_before = self._newest.pop()
            seconds, cost = seconds + before, cost + cost_before
        self._newest.append((seconds, cost))
        while len(self._newest) > FEWEST and self._newest_seconds - self._newest[0][0] > RECENT:
            self._newest_seconds -= self._newest.popleft()[0]

    def per_cost(self) -> float:
        """Seconds that a unit of cost takes now; 0 if nothing says."""
        if self._recent_cost <= 0:
            return self._planned
        mean = self._recent_seconds / self._recent_cost
        rates = [seconds / cost for seconds, cost in self._newest if cost > 0 and seconds > 0]
        if len(rates) < FEWEST:
            return self._with_plan(mean)
        change = math.log(statistics.median(rates) / mean)
        share = min(1.0, max(0.0, (abs(change) - SAME) / (OTHER - SAME)))
        return self._with_plan(mean * math.exp(share * change))

    def mean_per_cost(self) -> float:
        """The same on average over this attempt."""
        return self._with_plan(self._seconds / self._cost) if self._cost > 0 else self._planned

    def _with_plan(self, seen: float) -> float:
        """Between the plan and what is `seen`, which counts as much after `TRUST` seconds."""
        if self._planned <= 0 or seen <= 0:
            return seen
        share = 1 / (1 + (self._seconds / TRUST) ** 2)
        return math.exp(share * math.log(self._planned) + (1 - share) * math.log(seen))

    def ahead(self) -> float:
        """Cost of the work that is left."""
        if not self._cost_W:
            return max(0.0, self.work - self.done)
        ratio = self._compared / self._weight if self._weight else 1.0
        rest = self._cost_W[int(self.done) :]
        return sum(
            cost * (1 + (ratio - 1) * math.exp(-steps / max(1.0, self._steps))) for steps, cost in enumerate(rest)
        )

    def left(self, now: float) -> float | None:
        """Seconds left; None if nothing says."""
        per_cost = self.per_cost()
        return max(0.0, per_cost * self.ahead() - (now - self._last)) if per_cost > 0 else None

    def factor(self) -> tuple[float, float]:
        """How much longer than planned the whole stage takes at its mean speed, and the standard deviation of the
        logarithm: less is known while less is done."""
        if self._cost <= 0 or self.time.seconds <= 0:
            return 1.0, UNSEEN
        seconds = self.mean_per_cost() * (self._before + self.ahead())
        return seconds / self.time.seconds, EARLY * (1 - self.done / self.work)

    def load(self) -> float:
        """How much slower than on average in this stage the machine is now."""
        mean = self.mean_per_cost()
        return self.per_cost() / mean if mean > 0 else 1.0
