"""The reference policy of the divergence (R1 2.2.1)."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.rl.component import Component
from bessemer.rl.losses import logprobs_of
from bessemer.train import checkpoint
from bessemer.train.checkpoint_files import Damaged, verify
from bessemer.train.runtime import Runtime
from bessemer.train.trainer import Trainer

KEY = "reference"
"""Its name among the trainer's `extras`, and the beginning of those of folders and of tensors in checkpoints."""


class Reference(Component):
    """A frozen copy of the policy, replaced by the current policy every `every` optimizer steps (R1-Nature B). On many
    ranks it is divided as the policy is.

    A checkpoint does not hold it but names the model directory that does: `base`, from which the policy started, or one
    in the stage's state that is written once, when the reference changes. With LoRA it shares the base weights with the
    policy, and the checkpoint holds its adapters, which start at B = 0: the base.
    """

    def __init__(self, trainer: Trainer, runtime: Runtime, base: Path, every: int, temperature: float) -> None:
        self.trainer, self.runtime, self.base, self.every = trainer, runtime, base, every
        self.copy = runtime.frozen_copy(trainer, partial(logprobs_of, temperature=temperature))
        self._holds: dict[str, Any] | None = None
        """The facts of the folder that it was read from; {} stands for the base."""
        self.restore()

    def before_step(self, batches: list[Batch]) -> None:
        """Adds ref_logp_BT to every batch whose loss is computed here."""
        for batch, logp_BT in zip(batches, self.copy.outputs(batches), strict=True):
            if logp_BT is not None:
                batch.extras["ref_logp_BT"] = logp_BT

    def after_step(self) -> None:
        """Copies the policy if it is time."""
        if self.trainer.step % self.every == 0:
            self.copy.follow()
            self._store()

    def restore(self) -> None:
        """Takes the reference that the trainer's checkpoint names; at the very start, the policy is the base."""
        trainer, facts = self.trainer, self.trainer.extras.get(KEY, {})
        if self.copy.shared:
            prefix = f"{KEY}/"
            stored = {k.removeprefix(prefix): v for k, v in trainer.extra_tensors.items() if k.startswith(prefix)}
            if stored:
                self.copy.set(stored)
            else:
                self.copy.follow()
                self._store()
        elif trainer.step == 0:
            self.copy.follow()
            self._holds = {}
        elif self._holds != facts:
            self.copy.load(self._folder(facts))
            self._holds = facts

    def _store(self) -> None:
        """Puts the new reference where checkpoints find it."""
        trainer = self.trainer
        if self.copy.shared:
            others = {k: v for k, v in trainer.extra_tensors.items() if not k.startswith(f"{KEY}/")}
            own = {f"{KEY}/{name}": value.clone() for name, value in self.copy.state().items()}
            trainer.extra_tensors = others | own
        elif trainer.state_dir is not None:
            folder = trainer.state_dir / f"{KEY}-{trainer.step:08d}"
            self.copy.save(folder)
            self._holds = self.runtime.agree(lambda: {"folder": folder.name, "sha256": _sums(folder)})
            if self.runtime.me == 0:
                _drop_unnamed(trainer.state_dir, {folder.name, trainer.extras.get(KEY, {}).get("folder")})
            trainer.extras = trainer.extras | {KEY: self._holds}

    def _folder(self, facts: dict[str, Any]) -> Path:
        """The folder of these facts; UserError in all processes if it is not what was written there."""
        if not facts:
            return self.base
        assert self.trainer.state_dir is not None, "it has written the facts"
        folder = self.trainer.state_dir / facts["folder"]
        if fault := self.runtime.agree(lambda: _fault(folder, facts["sha256"])):
            raise UserError(
                f"{folder}: {fault}; the checkpoint of step {self.trainer.step} needs this reference policy. Bring the "
                f"folder back, or delete {self.trainer.state_dir} to begin the stage again"
            )
        return folder


def bring_along(start: Path, state: Path) -> None:
    """Copies the references that a checkpoint may name to another state folder."""
    for folder in {*start.parent.glob(f"{KEY}-*"), *start.parent.parent.glob(f"{KEY}-*")}:
        checkpoint.copy(folder, state / folder.name)


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file with weights."""
    sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _fault(folder: Path, sums: dict[str, str]) -> str:
    try:
        for name, expected in sums.items():
            verify(folder / name, expected)
    except Damaged as damage:
        return str(damage)
    return ""


def _drop_unnamed(state: Path, needed: set[str | None]) -> None:
    """Deletes references that no checkpoint names; one may just be written that names the last one."""
    for path in (*checkpoint.steps(state), *checkpoint.steps(state / checkpoint.KEPT)):
        try:
            counters = json.loads((path / "counters.json").read_text())
        except (OSError, ValueError):  # damaged: what it named is not known
            return
        needed.add(counters.get("extras", {}).get(KEY, {}).get("folder"))
    for folder in state.glob(f"{KEY}-*"):
        if folder.name not in needed:
            shutil.rmtree(folder)
