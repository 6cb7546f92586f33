"""A difficulty filter: problems that the policy always or never solves are left out, since their groups teach nothing.

    [[stage.hooks]]
    name = "difficulty.py:DifficultyFilter"
    pool = 4               # candidates per problem that is asked
    explore = 0.1          # share of problems that bypass the filter, to keep the estimates of rejected ones current

The pass rate of a problem is estimated by its family: task, difficulty and language. Every rollout counts `fade` times
as much as the one after it. A family that is unknown is asked.
"""

from typing import Annotated

from pydantic import Field

from bessemer.rl.component import Component
from bessemer.tasks import stable_hash

KEY = "difficulty"
"""The filter's entry in the trainer's checkpoint."""


class DifficultyFilter(Component):
    def __init__(
        self,
        loop,
        *,
        pool: Annotated[int, Field(ge=2)] = 4,
        explore: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        fade: Annotated[float, Field(gt=0, le=1)] = 0.9,
    ):
        self.trainer, self.margin = loop.trainer, 0.5 / loop.settings.samples
        self.explore, self.fade, self.left_out = explore, fade, 0
        self.tallies: dict[str, list[float]] = {}
        """Family -> [samples, right ones], both faded."""

    @staticmethod
    def pool(pool=4, **settings):
        return pool

    def restore(self):
        self.tallies = self.trainer.extras.get(KEY, {})

    def selector(self):
        known = dict(self.tallies)  # a rollout keeps the estimates of its start

        def select(candidates, count, seed):
            kept, left = [], []
            for place, (_, problem) in enumerate(candidates):
                (kept if self.teaches(known.get(family(problem))) else left).append(place)
            chosen = []
            for n in range(count):
                explores = stable_hash("explore", seed, n) < self.explore * 2**64
                chosen.append((left if left and (explores or not kept) else kept or left).pop(0))
            return [candidates[place] for place in sorted(chosen)]

        return select

    def teaches(self, tally):
        """Whether more than half a sample of a group is expected to be right, and more than half to be wrong."""
        return tally is None or self.margin < tally[1] / tally[0] < 1 - self.margin

    def sampled(self, number, rollout):
        self.tallies = {name: [self.fade * n, self.fade * right] for name, (n, right) in self.tallies.items()}
        for group in rollout.groups:
            tried = [row for row in group if not row.failure]
            tally = self.tallies.setdefault(family(group[0].problem), [0.0, 0.0])
            tally[0] += len(tried)
            tally[1] += sum(row.verdict.correct for row in tried)
        self.trainer.extras = self.trainer.extras | {KEY: self.tallies}
        return {f"rl/pass/{name}": right / n for name, (n, right) in sorted(self.tallies.items()) if n}


def family(problem):
    task = problem.id.partition("/")[0]
    return " ".join(map(str, (task, problem.meta.get("difficulty", "-"), problem.language)))
