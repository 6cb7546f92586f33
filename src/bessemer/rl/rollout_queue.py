"""The queue of rollouts: each is generated up to `max_off_policy_rollouts` rollouts before its updates.

With `max_off_policy_rollouts = 1`, rollout n + 1 is sampled by the policy before the updates of rollout n, so its
sampling does not depend on those updates and may overlap them. It is at most `updates_per_rollout` steps old when its
own updates begin (`rl/staleness`). A run depends only on this order, never on timing. Ray workers sample while the
trainer computes. In the trainer's process, sampling and updates take turns, each on all cores, which is faster there
than one core for each (bench/rl_overlap.py).

A rollout is determined by its number and the policy, so a resumed run samples what the uninterrupted one would have
sampled. A finished rollout of an older policy that no update has used yet is saved in the trainer's checkpoint. A
rollout of the checkpoint's own policy is not: it is sampled again.

Dynamic sampling (DAPO 3.2): groups whose samples all have the same reward teach nothing, so up to `max_resamples`
rounds of problems are sampled until enough groups are alive. A pool that is too hard or too easy costs those rounds but
never stops the run. General prompts are asked in the first round alone and all taken: scores of a reward model always
differ, so in a search for differing rewards they would crowd out the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bessemer import tasks
from bessemer.config.rl import RLConfig
from bessemer.engine.answers import Outcome, Turns, play_of
from bessemer.engine.generation import rank_of
from bessemer.rl import rollout
from bessemer.rl.component import Component, Select, hooks_of
from bessemer.rl.reward import PreferenceScorer, Reward
from bessemer.rl.rollout import Group, Once, Rollout
from bessemer.rl.sampler import PendingSamples, Sampler, Submit
from bessemer.rl.task_mix import mixture
from bessemer.train.runtime import ALONE, Share
from bessemer.train.trainer import Trainer

KEY = "rollouts"
"""Key of the finished rollouts in the trainer's checkpoint."""
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
    total, place = settings.prompts_per_rollout, number * settings.max_resamples + round
    of_general = settings.general.prompts if settings.general and number >= settings.general.start else 0
    first = settings.first_problem
    return (
        rollout.problems_of(general, "train", first + number * of_general, 0 if round else of_general, seed),
        rollout.problems_of(families, "train", first + place * total * pool, (total - of_general) * pool, seed),
    )


def pool_of(settings: RLConfig) -> int:
    """Candidates per problem of the tasks, of which a hook may select."""
    return max((kind.pool(**own) for kind, own in hooks_of(settings)), default=1)


class RolloutGenerator:
    """Chooses the problems of a rollout, submits them to the sampler, and scores the samples.

    `components`: those of the loop, one of which may select the problems. `context`: the policy's context length in
    tokens, for episodes. `once(make)`: one rank makes the value for all.
    `share`: this rank's of the verdicts. `apart`: the ranks have their own samples alone.
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
        apart: bool = False,
    ) -> None:
        self.share, self.apart = share, apart
        self.settings, self.sampler, self.encode, self.seed, self.context = settings, sampler, encode, seed, context
        self.reward_models, self.components, self.once = reward_models, components, once
        general = settings.general_tasks
        self.tasks, self.general = mixture(settings, settings.tasks), mixture(settings, general)
        self.pool = pool_of(settings)
        self.options = {name: value for one in components for name, value in one.options.items()}
        self.reward = Reward.of_config(settings)

    def start(self, number: int, cap: int, step: int) -> PendingRollout:
        """Submits rollout `number` to the current policy, which has made `step` optimizer steps."""
        return PendingRollout(self, number, cap, step)

    def candidates(self, number: int, round: int) -> tuple[Problems, Problems]:
        return candidates(self.settings, self.general, self.tasks, self.seed, number, round, self.pool)

    def candidates_by_id(self, number: int) -> dict[str, tasks.Problem]:
        """Every problem that rollout `number` may sample."""
        rounds = [self.candidates(number, round) for round in range(self.settings.max_resamples)]
        return {problem.id: problem for general, others in rounds for _, problem in general + others}

    def selector(self) -> Select | None:
        """What chooses the problems of a rollout that starts now."""
        return next((chosen for one in self.components if (chosen := one.selector()) is not None), None)

    def play(self, problems: Problems, number: int, round: int, cap: int) -> Turns:
        """The completions or episodes of a round, before anything is generated."""
        seeds = rollout.prompt_seeds(self.round_seed(number, round), len(problems))
        return play_of(
            problems, self.encode, self.sampler.tokenizer, samples=self.settings.samples, seeds=seeds, cap=cap,
            context=self.context, once=self.once,
        )  # fmt: skip

    def submit(self, policy: Submit, play: Turns) -> PendingSamples | None:
        """Submits the next turn of a round; None after the last."""
        settings, turn = self.settings, play.turn()
        if turn is None:
            return None
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
        """Verifies the samples and sets their rewards: verdicts are each rank's own, reward models are rank 0's.
        `step` and `seed` as in `Reward.score`."""
        opening, needs_format = self.sampler.tokenizer.opening, self.settings.accuracy_needs_format
        groups = rollout.verify(problems, prompts, outcomes, opening, needs_format, self.share, self.apart)
        rows = [row for group in groups for row in group]
        if self.apart:
            mine = [n for n, row in enumerate(rows) if rank_of(row.completion, self.share.me) == self.share.me]
            for n, reading in self.share.merge({n: rows[n].read() for n in mine}).items():
                rows[n].reading = reading

        def scored() -> list[tuple[float, float | None]]:
            self.reward.score(groups, step, self.reward_models, seed)
            return [(row.reward, row.preference) for row in rows]

        for row, (reward, preference) in zip(rows, self.once(scored), strict=True):
            row.reward, row.preference = reward, preference
        return groups

    def round_seed(self, number: int, round: int) -> int:
        """The seed of a round's random streams."""
        return tasks.stable_hash(self.seed, self.settings.name, number, *([round] if round else []))


class PendingRollout:
    """A rollout that is being sampled. Its rounds run one after another, as do the turns of episodes within a round:
    each is submitted once the previous one is scored, or answered. All use the policy of its start."""

    def __init__(self, generator: RolloutGenerator, number: int, cap: int, step: int) -> None:
        self.generator, self.number, self.cap, self.step = generator, number, cap, step
        self.policy = generator.sampler.policy()
        self.select = generator.selector()
        self.rollout: Rollout | None = None
        """Set once it is finished."""
        self._round, self._n_problems = 0, 0
        self._general: list[Group] = []
        self._alive: list[Group] = []
        self._dead: list[Group] = []
        self._submit_round()

    def poll(self) -> bool:
        """Processes the turns that are sampled, without waiting for more; returns whether the rollout is finished."""
        while self.rollout is None and self._samples is not None and self._samples.ready():
            self._complete_turn()
        return self.rollout is not None

    def finish(self) -> Rollout:
        """The finished rollout; waits for its samples if necessary."""
        while self.rollout is None:
            self._complete_turn()
        return self.rollout

    def _submit_round(self) -> None:
        generator = self.generator
        general, problems = generator.candidates(self.number, self._round)
        if self.select is not None:
            count, seed = len(problems) // generator.pool, generator.round_seed(self.number, self._round)
            problems = self.select(problems, count, seed)
        self._n_general, self._problems = len(general), general + problems
        self._play = generator.play(self._problems, self.number, self._round, self.cap)
        self._samples = generator.submit(self.policy, self._play)

    def _complete_turn(self) -> None:
        assert self._samples is not None
        self._play.add(self._samples.take())
        self._samples = self.generator.submit(self.policy, self._play)
        if self._samples is None:
            self._complete_round()

    def _complete_round(self) -> None:
        generator, settings = self.generator, self.generator.settings
        seed = generator.round_seed(self.number, self._round)
        groups = generator.score(self._problems, self._play.prompts, self._play.outcomes(), self.step, seed)
        self._n_problems += len(groups)
        self._round += 1
        if settings.max_resamples == 1:  # every group is trained on, in the order of the problems
            self.rollout = Rollout(groups, self._n_problems, self.cap, self.step)
            return
        self._general += groups[: self._n_general]
        for group in groups[self._n_general :]:
            (self._dead if _equal_rewards(group) else self._alive).append(group)
        wanted = settings.prompts_per_rollout - len(self._general)
        if len(self._alive) >= wanted or self._round == settings.max_resamples:
            chosen = self._general + (self._alive + self._dead)[:wanted]
            self.rollout = Rollout(chosen, self._n_problems, self.cap, self.step)
        else:
            self._submit_round()


class RolloutQueue:
    """Call `take(number)` once per rollout, in order; `poll()` after each step; `settle(number)` before a save;
    `restore()` once the trainer is back at a checkpoint. `cap()` returns the current longest completion."""

    def __init__(self, generator: RolloutGenerator, trainer: Trainer, cap: Callable[[], int]) -> None:
        self.generator, self.trainer, self.cap = generator, trainer, cap
        self.settings = generator.settings
        self.finished: dict[int, Rollout] = {}
        """Finished and not yet taken, by number."""
        self.pending: dict[int, PendingRollout] = {}

    def take(self, number: int) -> Rollout:
        """Returns rollout `number`. Also starts the next `max_off_policy_rollouts` rollouts with the current policy."""
        self._start(number)
        taken = self._finish(number)
        # lower numbers are from before the guard went back, which does not move the cursor
        self.finished = {n: rollout for n, rollout in self.finished.items() if n > number}
        return taken

    def poll(self) -> None:
        """Scores the samples that have arrived."""
        for number, pending in list(self.pending.items()):
            if pending.poll():
                self._finish(number)

    def settle(self, number: int) -> None:
        """Call before a checkpoint that precedes the updates of rollout `number`: waits for the samples of older
        policies. Later rollouts are started first, so that no worker waits for the checkpoint; `take(number)` finds the
        same policy."""
        if older := [n for n, pending in self.pending.items() if pending.step < self.trainer.step]:
            self._start(number)
            for n in older:
                self._finish(n)
        self._store()  # also what `poll` finished: a rollout that was ready early is as old as one that was waited for

    def restore(self) -> None:
        """Restores the queue from the trainer's checkpoint."""
        self.finished, self.pending = {}, {}
        for name, stored in self.trainer.extras.get(KEY, {}).items():
            number, prefix = int(name), f"{KEY}/{name}/"
            tensors = {
                key.removeprefix(prefix): value
                for key, value in self.trainer.extra_tensors.items()
                if key.startswith(prefix)
            }
            problems = self.generator.candidates_by_id(number)
            if other := {group["problem"] for group in stored["groups"]} - problems.keys():
                self.trainer.warn(
                    f"rollout {number}, sampled by an earlier version, asks {min(other)}, which is not among its "
                    "problems now; it is sampled again"
                )
                continue
            groups = rollout.unpack(stored["groups"], tensors, problems)
            self.finished[number] = Rollout(groups, stored["asked"], stored["cap"], stored["step"])

    def _start(self, number: int) -> None:
        for n in range(number, min(number + self.settings.max_off_policy_rollouts + 1, self.settings.rollouts)):
            if n not in self.finished and n not in self.pending:
                self.pending[n] = self.generator.start(n, self.cap(), self.trainer.step)
        self.poll()

    def _finish(self, number: int) -> Rollout:
        if number not in self.finished:
            self.finished[number] = self.pending.pop(number).finish()
        return self.finished[number]

    def _store(self) -> None:
        """Adds the finished rollouts of older policies to what the trainer's checkpoint holds."""
        trainer = self.trainer
        tensors = {key: value for key, value in trainer.extra_tensors.items() if not key.startswith(f"{KEY}/")}
        stored = {}
        for number, waiting in self.finished.items():
            if waiting.step >= trainer.step:
                continue
            groups, packed = rollout.pack(waiting.groups)
            stored[str(number)] = {
                "groups": groups,
                "asked": waiting.n_problems,
                "cap": waiting.cap,
                "step": waiting.step,
            }
            tensors |= {f"{KEY}/{number}/{name}": value for name, value in packed.items()}
        trainer.extras, trainer.extra_tensors = trainer.extras | {KEY: stored}, tensors


def _equal_rewards(group: Group) -> bool:
    return len({row.reward for row in group if not row.failure}) <= 1
