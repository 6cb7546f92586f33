"""The samples of one rollout: which problems, how many, and what they are paid.

Everything follows from the rollout's number and the policy, so a resumed run draws what the uninterrupted one would
have drawn. Dynamic sampling (DAPO 3.2): groups whose samples were all paid alike teach nothing, so up to `draws` lots
of problems are asked until enough groups are alive; a pool that is too hard or too easy costs those lots and never
stops the run. Which problems a lot asks of the candidates due, `pick` says before any of them is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from bessemer import tasks
from bessemer.rl import rollout
from bessemer.rl.difficulty import Choice, Estimates
from bessemer.rl.problem_picker import Pick
from bessemer.rl.reward import Judge, Reward
from bessemer.rl.rollout import Sampled
from bessemer.rl.sampler import Answer, Policy, Sampler
from bessemer.train import setup

Group = list[Sampled]
Asked = list[tuple[tasks.Task, tasks.Problem]]


@dataclass(frozen=True)
class Paid:
    """A rollout as it was drawn and paid."""

    groups: list[Group]
    """P groups of G samples."""
    asked: int
    """How many problems were asked."""
    choice: Choice
    """What the difficulty filter did, and what all that was asked tells it."""


class Draw:
    """`begin(number, cap)` has a rollout drawn by the policy of this moment."""

    def __init__(
        self, sampler: Sampler, encode: Callable[[tasks.Problem], list[int]], pick: Pick, seed: int,
        judges: dict[str, Judge], once: Callable[[Callable[[], list[Group]]], list[Group]] = lambda make: make(),
    ) -> None:  # fmt: skip
        """`once`: of many ranks that draw together one verifies and pays, for a verdict may depend on the clock."""
        self.once = once
        self.sampler, self.encode, self.pick, self.seed, self.judges = sampler, encode, pick, seed, judges
        self.settings = settings = pick.settings
        self.tasks = [tasks.get(name) for name in settings.tasks]
        self.general = [tasks.get(name) for name in settings.general_tasks]
        self.reward = Reward(
            settings.format_reward, settings.language_reward, settings.preference_reward, settings.overlong,
            settings.reward,
        )  # fmt: skip

    def begin(self, number: int, cap: int) -> Coming:
        return Coming(self._rollout(self.sampler.policy(), self.pick.estimates, number, cap))

    def _rollout(self, policy: Policy, estimates: Estimates, number: int, cap: int) -> Generator[Answer, None, Paid]:
        """With one lot every group is taken, in the order of the problems."""
        wanted, alive, dead, choice = self.settings.prompts_per_rollout, [], [], Choice()
        for lot in range(self.settings.max_resamples):
            general, chosen, choice_of_lot = self._lot(estimates, number, lot)
            groups = yield from self._sample(policy, general + chosen, number, lot, cap)
            tried = self.pick.tried(chosen, groups[len(general) :], self.reward)
            choice = choice.plus(choice_of_lot).plus(tried)
            if self.settings.max_resamples == 1:
                return Paid(groups, len(groups), choice)
            for group in groups:
                (dead if _paid_alike(group) else alive).append(group)
            if len(alive) >= wanted:
                break
        return Paid((alive + dead)[:wanted], len(alive) + len(dead), choice)

    def problems(self, number: int, lot: int = 0) -> Asked:
        """What lot `lot` of rollout `number` would ask if it began now."""
        general, chosen, _ = self._lot(self.pick.estimates, number, lot)
        return general + chosen

    def asked(self, number: int) -> dict[str, tasks.Problem]:
        """Every problem that rollout `number` may ask, by its id."""
        lots = [self._candidates(number, lot) for lot in range(self.settings.max_resamples)]
        return {problem.id: problem for general, others in lots for _, problem in general + others}

    def _lot(self, estimates: Estimates, number: int, lot: int) -> tuple[Asked, Asked, Choice]:
        """(general prompts, problems of the tasks, how these were chosen)."""
        general, candidates = self._candidates(number, lot)
        wanted = self.settings.prompts_per_rollout - len(general)
        return general, *self.pick.choose(estimates, candidates, wanted, self._seed(number, lot))

    def _candidates(self, number: int, lot: int) -> tuple[Asked, Asked]:
        """(general prompts, once the run has come to them; `pool` problems for every other place). No two lots of a run
        share any."""
        settings, pool = self.settings, self.pick.pool
        total, place = settings.prompts_per_rollout, number * settings.max_resamples + lot
        general = settings.general_prompts if number >= settings.general_from else 0
        return (
            rollout.problems_of(self.general, "train", place * general, general, self.seed),
            rollout.problems_of(self.tasks, "train", place * total * pool, (total - general) * pool, self.seed),
        )

    def _seed(self, number: int, lot: int) -> int:
        """What names the random streams of a lot."""
        return tasks.stable_hash(self.seed, self.settings.name, number, *([lot] if lot else []))

    def _sample(
        self, policy: Policy, chosen: Asked, number: int, lot: int, cap: int
    ) -> Generator[Answer, None, list[Group]]:
        settings = self.settings
        prompts = [self.encode(problem) for _, problem in chosen]
        answer = policy.submit(
            prompts, samples=settings.samples, seeds=rollout.seeds_of(self._seed(number, lot), len(prompts)),
            temperature=settings.temperature, max_new_tokens=cap,
            batch_rows=settings.rollout.rows or setup.batch_rows(len(chosen) * settings.samples),
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
