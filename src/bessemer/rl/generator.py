"""How a rollout comes about: its problems are chosen, answered by the sampler, verified and rewarded (R1 2.2).

A rollout is determined by its number and the policy, so a resumed run samples what the uninterrupted one would have
sampled.

Dynamic sampling (DAPO 3.2): groups whose samples all have the same reward teach nothing, so up to `max_resamples`
rounds of problems are sampled until enough groups are alive. A pool that is too hard or too easy costs those rounds but
never stops the run. General prompts are asked in the first round alone and all taken: scores of a reward model always
differ, so in a search for differing rewards they would crowd out the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import chain

from bessemer import tasks
from bessemer.config.rl import RLConfig
from bessemer.engine.answers import Outcome, TurnPrompts, Turns, play_of
from bessemer.rl import rollout
from bessemer.rl.component import Component, Select, hooks_of
from bessemer.rl.reward import PreferenceScorer, Reward
from bessemer.rl.rollout import Group, Once, Rollout
from bessemer.rl.sampler import Completions, PendingSamples, Sampler, Submit
from bessemer.rl.task_mix import mixture
from bessemer.train.runtime import ALONE, SampleCarrier, Share

Problems = list[tuple[tasks.Task, tasks.Problem]]


def candidates(
    settings: RLConfig,
    general: Sequence[tasks.Task],
    families: Sequence[tasks.Task],
    seed: int,
    number: int,
    round: int,
    pool: int = 1,
) -> tuple[Problems, Problems]:
    """What a round of rollout `number` may ask: (prompts of `general`, in the first round from its first rollout on;
    `pool` candidates for every problem of `families`). No two rounds of a run share any."""
    total, index = settings.prompts_per_rollout, number * settings.max_resamples + round
    of_general = settings.general.prompts if settings.general and number >= settings.general.start else 0
    first = settings.first_problem
    return (
        rollout.problems_of(general, "train", first + number * of_general, 0 if round else of_general, seed),
        rollout.problems_of(families, "train", first + index * total * pool, (total - of_general) * pool, seed),
    )


def pool_of(settings: RLConfig) -> int:
    """Candidates per problem of the tasks, of which a hook may select."""
    return max((kind.pool(**own) for kind, own in hooks_of(settings)), default=1)


class RolloutGenerator:
    """Chooses the problems of a rollout, submits them to the sampler, and scores the samples.

    `components`: those of the loop, one of which may select the problems. `context`: the policy's context length in
    tokens, for episodes. `once(make)`: one rank makes the value for all.
    `share`: this rank's of the verdicts. `carrier`: given if the ranks have their own samples alone.
    """

    def __init__(
        self,
        settings: RLConfig,
        sampler: Sampler,
        encode: Callable[[tasks.Problem], list[int]],
        seed: int,
        reward_models: Mapping[str, PreferenceScorer],
        components: Sequence[Component],
        once: Once,
        context: int,
        share: Share = ALONE,
        carrier: SampleCarrier | None = None,
    ) -> None:
        self.share, self.carrier = share, carrier
        self.settings, self.sampler, self.encode, self.seed, self.context = settings, sampler, encode, seed, context
        self.reward_models, self.components, self.once = reward_models, components, once
        general = settings.general_tasks
        self.tasks, self.general = mixture(settings, settings.tasks), mixture(settings, general)
        self.pool = pool_of(settings)
        self.options = {name: value for component in components for name, value in component.options.items()}
        self.reward = Reward.of_config(settings)

    def rollout(self, number: int, cap: int, step: int) -> Rollout:
        """Rollout `number` of the current policy, which has made `step` optimizer steps."""
        turns = self.turns(number, cap, step)
        pending = next(turns)
        while True:
            try:
                pending = turns.send(pending.take())
            except StopIteration as end:
                finished: Rollout = end.value
                return finished

    def turns(self, number: int, cap: int, step: int) -> Generator[PendingSamples, Completions, Rollout]:
        """The same, for a caller that does not wait: yields what is being sampled, and is sent the samples. All rounds,
        and all turns of their episodes, use the policy of the start."""
        settings, policy, select = self.settings, self.sampler.policy(), self.selector()
        n_problems = 0
        general: list[Group] = []
        alive: list[Group] = []
        dead: list[Group] = []
        for round in range(settings.max_resamples):
            seed = self.round_seed(number, round)
            of_general, problems = self.candidates(number, round)
            if select is not None:
                problems = select(problems, len(problems) // self.pool, seed)
            problems = of_general + problems
            play = self.play(problems, seed, cap)
            while (turn := play.turn()) is not None:
                play.add((yield self.submit(policy, turn)))
            groups = self.score(problems, play.prompts, play.outcomes(), step, seed)
            n_problems += len(groups)
            if settings.max_resamples == 1:  # every group is trained on, in the order of the problems
                return Rollout(groups, n_problems, cap, step)
            general += groups[: len(of_general)]
            for group in groups[len(of_general) :]:
                (dead if _equal_rewards(group) else alive).append(group)
            needed = settings.prompts_per_rollout - len(general)
            if len(alive) >= needed:
                break
        return Rollout(general + (alive + dead)[:needed], n_problems, cap, step)

    def candidates(self, number: int, round: int) -> tuple[Problems, Problems]:
        return candidates(self.settings, self.general, self.tasks, self.seed, number, round, self.pool)

    def candidates_by_id(self, number: int) -> dict[str, tasks.Problem]:
        """Every problem that rollout `number` may sample."""
        rounds = [self.candidates(number, round) for round in range(self.settings.max_resamples)]
        return {problem.id: problem for general, plain in rounds for _, problem in general + plain}

    def selector(self) -> Select | None:
        """What chooses the problems of a rollout that starts now."""
        return next((chosen for component in self.components if (chosen := component.selector()) is not None), None)

    def play(self, problems: Problems, seed: int, cap: int) -> Turns:
        """The completions or episodes of a round, before anything is generated."""
        seeds = rollout.prompt_seeds(seed, len(problems))
        return play_of(
            problems, self.encode, self.sampler.tokenizer, samples=self.settings.samples, seeds=seeds, cap=cap,
            context=self.context, once=self.once,
        )  # fmt: skip

    def submit(self, policy: Submit, turn: TurnPrompts) -> PendingSamples:
        settings = self.settings
        return policy(
            turn.prompts,
            **turn.options(),
            temperature=settings.temperature,
            top_p=settings.top_p,
            record_kept=settings.keeps_mask,
            **self.options,
        )

    def score(
        self,
        problems: Problems,
        prompts: Sequence[list[int]],
        outcomes: Sequence[Sequence[Outcome]],
        step: int,
        seed: int = 0,
    ) -> list[Group]:
        """Verifies the samples and sets their rewards: verdicts are each rank's own, reward models are divided over all
        ranks, rewards are rank 0's. `step` and `seed` as in `Reward.score`."""
        opening, needs_format = self.sampler.tokenizer.opening, self.settings.accuracy_needs_format
        holders = None if self.carrier is None else self.carrier.holders([*chain.from_iterable(outcomes)])
        groups = rollout.verify(problems, prompts, outcomes, opening, needs_format, self.share, holders)
        rows = [row for group in groups for row in group]
        self.reward.set_preferences(groups, self.reward_models)

        def scored() -> list[tuple[float, str]]:
            self.reward.score(groups, step, seed)
            return [(row.reward, row.failure) for row in rows]

        for row, (reward, failure) in zip(rows, self.once(scored), strict=True):
            row.reward, row.failure = reward, failure
        return groups

    def round_seed(self, number: int, round: int) -> int:
        """The seed of a round's random streams."""
        return tasks.stable_hash(self.seed, self.settings.name, number, *([round] if round else []))


def _equal_rewards(group: Group) -> bool:
    return len({row.reward for row in group if not row.failure}) <= 1
