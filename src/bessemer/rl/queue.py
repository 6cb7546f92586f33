"""Rollouts in the order of their updates, drawn up to `max_off_policy_rollouts` before them.

With `max_off_policy_rollouts = 1` rollout n + 1 is drawn by the policy as it was before the updates of rollout n, so
that its sampling depends on nothing those updates do and may run at the same time. It is at most `updates_per_rollout`
steps old when its own updates begin (`rl/staleness`). What a run gives depends on this order alone, never on
which of them is faster.

Whether anything does run beside them is the sampler's affair (rl/sampler): rollout workers apart draw while the trainer
computes; in one process sampling and updates take turns, each on all cores, since a core for each takes longer there
(bench/rl_overlap.py).

What an older policy drew and no update has used yet lies in the trainer's checkpoint. What the checkpoint's own policy
is drawing does not: it draws it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bessemer.rl import buffer
from bessemer.rl.difficulty import Choice
from bessemer.rl.generation import Coming, Draw, Paid
from bessemer.train.trainer import Trainer

KEY = "rollouts"


@dataclass(frozen=True)
class Drawn:
    """One rollout as it was drawn."""

    paid: Paid
    cap: int
    """Longest completion allowed."""
    step: int
    """Optimizer steps the policy that drew it had made."""


@dataclass(frozen=True)
class Begun:
    """One rollout that is being drawn."""

    coming: Coming
    cap: int
    step: int


class Ahead:
    """`take(number)` is called once per rollout, in order; `follow()` after each step; `settle()` before a save."""

    def __init__(self, draw: Draw, trainer: Trainer, cap: Callable[[], int], ahead: int, rollouts: int) -> None:
        self.draw, self.trainer, self.cap = draw, trainer, cap
        self.ahead, self.rollouts = ahead, rollouts
        self.waiting: dict[int, Drawn] = {}
        """Drawn and not yet taken, by number."""
        self.begun: dict[int, Begun] = {}

    def take(self, number: int) -> Drawn:
        """Rollout `number`; those up to `ahead` after it are begun now, by the policy of this moment."""
        self._begin(number)
        found = self._finished(number)
        # numbers below: of before the guard went back, which leaves the cursor where it is
        self.waiting = {n: drawn for n, drawn in self.waiting.items() if n > number}
        self._store()
        return found

    def follow(self, before: int) -> None:
        """After a step that began at step `before`."""
        if self.trainer.step <= before:  # the guard went back to a checkpoint
            self.load()
        self._look()

    def settle(self, number: int) -> None:
        """Before a checkpoint that comes before the updates of rollout `number`: waits for what an older policy is
        drawing. What comes after that is begun first, so that nobody who draws waits for the checkpoint; the policy is
        the one that `take(number)` will find."""
        if older := [n for n, begun in self.begun.items() if begun.step < self.trainer.step]:
            self._begin(number)
            for n in older:
                self._finished(n)
            self._store()

    def load(self) -> None:
        """As it was at the checkpoint the trainer came from."""
        self.waiting, self.begun = {}, {}
        for name, kept in self.trainer.extras.get(KEY, {}).items():
            number, prefix = int(name), f"{KEY}/{name}/"
            tensors = {
                key.removeprefix(prefix): value
                for key, value in self.trainer.extra_tensors.items()
                if key.startswith(prefix)
            }
            groups = buffer.unpack(kept["groups"], tensors, self.draw.asked(number))
            paid = Paid(groups, kept["asked"], Choice.read(kept["choice"]) if "choice" in kept else Choice())
            self.waiting[number] = Drawn(paid, kept["cap"], kept["step"])

    def _begin(self, number: int) -> None:
        for n in range(number, min(number + self.ahead + 1, self.rollouts)):
            if n not in self.waiting and n not in self.begun:
                cap = self.cap()
                self.begun[n] = Begun(self.draw.begin(n, cap), cap, self.trainer.step)
        self._look()

    def _look(self) -> None:
        """Takes in what has been drawn meanwhile."""
        for number, begun in list(self.begun.items()):
            begun.coming.advance()
            if begun.coming.done:
                self._finished(number)

    def _finished(self, number: int) -> Drawn:
        if number not in self.waiting:
            begun = self.begun.pop(number)
            self.waiting[number] = Drawn(begun.coming.finish(), begun.cap, begun.step)
        return self.waiting[number]

    def _store(self) -> None:
        trainer = self.trainer
        tensors = {key: value for key, value in trainer.extra_tensors.items() if not key.startswith(f"{KEY}/")}
        kept = {}
        for number, drawn in self.waiting.items():
            paid = drawn.paid
            groups, packed = buffer.pack(paid.groups)
            kept[str(number)] = {"groups": groups, "asked": paid.asked, "cap": drawn.cap, "step": drawn.step}
            if self.draw.pick.on:
                kept[str(number)]["choice"] = paid.choice.told()
            tensors |= {f"{KEY}/{number}/{name}": value for name, value in packed.items()}
        trainer.extras, trainer.extra_tensors = trainer.extras | {KEY: kept}, tensors
