"""The bytes of weights and of what belongs to them that a live RL stage holds in this process, by kind.

Counted from the storages of its tensors, each once: what shares memory counts under the first kind that has it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from bessemer.rl.loop import Loop
from bessemer.rl.reference import Reference
from bessemer.train.checkpointed import Checkpointed


def held_bytes(loop: Loop) -> dict[str, int]:
    """Kind -> bytes at this moment: "gathered" networks, for example, come and go within a rollout."""
    seen: set[int] = set()
    critics = [_trained(critic).values() for critic in loop.trainer.companions.values()]
    references = [component for component in loop.components if isinstance(component, Reference)]
    kinds: dict[str, Iterable[Tensor]] = {
        **_trained(loop.trainer),
        "reference": (tensor for one in references for tensor in one.copy.model.state_dict().values()),
        "gathered": loop.policy.model.state_dict().values(),
        "rounded": loop.sampler_model.model.state_dict().values(),
        "critic": (tensor for kinds in critics for tensors in kinds for tensor in tensors),
        "checkpoint": loop.trainer.extra_tensors.values(),
    }
    return {kind: _bytes(tensors, seen) for kind, tensors in kinds.items()}


def _trained(trainer: Checkpointed) -> dict[str, list[Tensor]]:
    groups = trainer.optimizer.groups
    return {
        "weights": [*trainer.model.state_dict().values()],
        "gradients": [group.grad for group in groups],
        "masters": [group.master for group in groups],
        "moments": [tensor for group in groups for tensor in group.moments.values()],
    }


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for storage in (tensor.untyped_storage() for tensor in tensors):
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
