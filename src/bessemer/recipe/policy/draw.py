"""The samples of one rollout: which problems, how many, and what they are paid.

Everything follows from the rollout's number and the policy, so a resumed run draws what the uninterrupted one would
have drawn. Dynamic sampling (DAPO 3.2): groups whose samples were all paid alike teach nothing, so up to `draws` lots
of problems are asked until enough groups are alive; a pool that is too hard or too easy costs those lots and never
stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from bessemer import tasks
from bessemer.recipe import modelling
from bessemer.rl import rollout
from bessemer.rl.reward import Judge, Reward
from bessemer.rl.rollout import Sampled
from bessemer.rl.sampler.sampler import Answer, Policy, Sampler

if TYPE_CHECKING:
    from bessemer.recipe.stages.rl import RL

Group = list[Sampled]
Paid = tuple[list[Group], int]
"""P groups of G paid samples, and how many problems were asked."""


class Draw:
    """`begin(number, cap)` has a rollout drawn by the policy of this moment."""

    def __init__(
        self, sampler: Sampler, encode: Callable[[tasks.Problem], list[int]], settings: RL.Settings, seed: int,
        judges: dict[str, Judge], once: Callable[[Callable[[], list[Group]]], list[Group]] = lambda make: make(),
    ) -> None:  # fmt: skip
        """`once`: of many ranks that draw together one verifies and pays, for a verdict may depend on the clock."""
        self.once = once
        self.sampler, self.encode, self.settings, self.seed, self.judges = sampler, encode, settings, seed, judges
        self.tasks = [tasks.get(name) for name in settings.tasks]
        self.general = [tasks.get(name) for name in settings.general_tasks]
        self.reward = Reward(
            settings.format_reward, settings.language_reward, settings.preference_reward, settings.overlong,
            settings.reward,
        )  # fmt: skip

    def begin(self, number: int, cap: int) -> Coming:
        return Coming(self._rollout(self.sampler.policy(), number, cap))

    def _rollout(self, policy: Policy, number: int, cap: int) -> Generator[Answer, None, Paid]:
        """With one lot every group is taken, in the order of the problems."""
        if self.settings.draws == 1:
            chosen = self.problems(number)
            return (yield from self._sample(policy, chosen, number, 0, cap)), len(chosen)
        wanted, alive, dead = self.settings.prompts_per_rollout, [], []
        for lot in range(self.settings.draws):
            for group in (yield from self._sample(policy, self.problems(number, lot), number, lot, cap)):
                (dead if _paid_alike(group) else alive).append(group)
            if len(alive) >= wanted:
                break
        return (alive + dead)[:wanted], len(alive) + len(dead)

    def problems(self, number: int, lot: int = 0) -> list[tuple[tasks.Task, tasks.Problem]]:
        """Lot `lot` of rollout `number`: general prompts first, once the run has come to them."""
        settings = self.settings
        total, place = settings.prompts_per_rollout, number * settings.draws + lot
        general = settings.general_prompts if number >= settings.general_from else 0
        chosen = rollout.problems_of(self.general, "train", place * general, general, self.seed)
        return chosen + rollout.problems_of(self.tasks, "train", place * total, total - general, self.seed)

    def asked(self, number: int) -> dict[str, tasks.Problem]:
        """Every problem that rollout `number` may ask, by its id."""
        lots = (self.problems(number, lot) for lot in range(self.settings.draws))
        return {problem.id: problem for lot in lots for _, problem in lot}

    def _sample(
        self, policy: Policy, chosen: list[tuple[tasks.Task, tasks.Problem]], number: int, lot: int, cap: int
    ) -> Generator[Answer, None, list[Group]]:
        settings = self.settings
        name = (self.seed, settings.name, number, lot) if lot else (self.seed, settings.name, number)
        prompts = [self.encode(problem) for _, problem in chosen]
        answer = policy.submit(
            prompts, samples=settings.samples, seeds=rollout.seeds_of(tasks.stable_hash(*name), len(prompts)),
            temperature=settings.temperature, max_new_tokens=cap,
            batch_rows=settings.rollout.rows or modelling.batch_rows(len(chosen) * settings.samples),
            record_routing=settings.routing_replay,
        )  # fmt: skip
        yield answer
        drawn = answer.take()

        def paid() -> list[Group]:
            groups = rollout.verified(chosen, prompts, drawn, self.sampler.tokenizer.opening)
            self.reward.pay(groups, cap, self.judges)
            return groups

        return self.once(paid)


class Coming:
    """A rollout on its way: lots are asked one after another, each once the one before it is paid."""

    def __init__(self, steps: Generator[Answer, None, Paid]) -> None:
        self._steps, self._paid = steps, None
        self._answer = next(steps)

    @property
    def done(self) -> bool:
        return self._paid is not None

    def advance(self) -> None:
        """Takes in what has been drawn, without waiting for more."""
        while self._paid is None and self._answer.ready():
            self._step()

    def finish(self) -> Paid:
        """All of it, waiting if need be."""
        while self._paid is None:
            self._step()
        return self._paid

    def _step(self) -> None:
        try:
            self._answer = next(self._steps)
        except StopIteration as end:
            self._paid = end.value


def _paid_alike(group: Group) -> bool:
    return all(row.reward == group[0].reward for row in group)
