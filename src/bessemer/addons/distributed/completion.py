"""Reports which gradients of a step are complete on this rank, while its last backwards run.

If the last step of a slice that adds gradients is a B, the slice's parts are completed one after the other; if it is a
W or a pair, at its end. A parameter of two slices (the embedding, with MTP) is complete when both are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from bessemer.addons.distributed.model_slice import Slice, unheard
from bessemer.addons.distributed.table import Action, Step, actions

Completed = Callable[[list[nn.Parameter]], object]


def last_steps(steps: Sequence[Step]) -> dict[tuple[int, int], int]:
    """(lane, stage) -> the number of the last step that adds its gradients."""
    return {
        (action.lane, action.stage): number
        for number, step in enumerate(steps)
        for action in actions((step,))
        if action.kind in "BIW"
    }


def alike(first: Sequence[Step], second: Sequence[Step]) -> bool:
    """Whether two ranks complete copies of the same stages in the same steps, as the two ends of DualPipe do."""
    first_backwards, second_backwards = (
        {stage: (number, type(steps[number]), getattr(steps[number], "kind", None))
         for (_, stage), number in last_steps(steps).items()}
        for steps in (first, second)
    )  # fmt: skip
    return first_backwards == second_backwards


class CompleteGradients:
    """Passes parameters to `tell` once their gradients are complete. `slices[lane, stage]` and `steps`: this rank's."""

    def __init__(self, slices: Mapping[tuple[int, int], Slice], steps: Sequence[Step], tell: Completed):
        self._steps, self._tell = steps, tell
        self._ending: dict[int, list[Slice]] = {}
        for key, number in last_steps(steps).items():
            self._ending.setdefault(number, []).append(slices[key])
        self._left = {part: part.parts() for parts in self._ending.values() for part in parts}
        """The parts of every slice that are not yet complete."""
        self._holders = Counter(p for parts in self._left.values() for one in parts for p in one)

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """To be entered around the step of this number."""
        ending, step = self._ending.get(number, []), self._steps[number]
        for part in ending if isinstance(step, Action) and step.kind == "B" else ():
            part.reached = partial(self._reached, part)
        try:
            yield
        finally:
            for part in ending:
                part.reached = unheard
        for part in ending:
            self._reached(part, 0)

    def _reached(self, part: Slice, number: int) -> None:
        left = self._left[part]
        found = [parameter for one in left[number:][::-1] for parameter in one]
        del left[number:]
        self._holders.subtract(found)
        self._tell([parameter for parameter in found if self._holders[parameter] == 0])
