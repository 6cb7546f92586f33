"""How much work each expert gets: what an engine records of its routing, summed and averaged over time.

A window is the traffic of some stretch of time, such as one call of `Engine.generate`. The estimate is a moving average
of counts per window, the newest window with the largest weight, so a busy window weighs more than an idle one. The
balancer (`eplb`) places experts by it for the traffic to come.

Shapes: T tokens fed, L sparse layers, K experts per token, E experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.errors import UserError

FORMAT = "bessemer expert loads"


class Loads:
    """A moving average of the tokens that each expert of each layer got per window."""

    def __init__(self, n_layers: int, n_experts: int, decay: float = 0.9):
        """`decay`: a window's weight over that of the next one; 0 knows the last window only, 1 is the plain mean."""
        if not 0 <= decay <= 1:
            raise UserError(f"decay must lie between 0 and 1, is {decay}")
        self.decay = float(decay)
        self.windows = 0
        """Windows seen; those without tokens are not counted."""
        self.tokens = 0
        """Tokens seen."""
        self._mean_LE = np.zeros((n_layers, n_experts))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self._mean_LE.shape

    def add(self, routing: Tensor | Iterable[Tensor]) -> None:
        """One more window: `Completion.routing`, [T, L, K], of one sample or of all its samples.

        A prompt counts once for every sample that continues it, as if each had been a request of its own.
        """
        records = [routing] if routing is None or isinstance(routing, Tensor) else list(routing)
        window_LE = sum((counts(record, *self.shape) for record in records), np.zeros(self.shape))
        tokens = sum(len(record) for record in records)
        if not tokens:
            return
        self.windows, self.tokens = self.windows + 1, self.tokens + tokens
        # the weight of all windows, 1 + decay + decay^2 ...: the first one is the whole estimate, not a tenth of it
        weight = self.windows if self.decay == 1 else (1 - self.decay**self.windows) / (1 - self.decay)
        self._mean_LE += (window_LE - self._mean_LE) / weight

    def estimate(self) -> NDArray[np.float64]:
        """Tokens per window that each expert gets, [L, E]."""
        if not self.windows:
            raise UserError("no routing was added yet, so nothing is known of the loads; generate with record_routing")
        return self._mean_LE.copy()

    def save(self, path: str | Path) -> None:
        """Writes JSON; the file is its old self or its new self, never something between."""
        path = Path(path)
        facts = {"format": FORMAT, "decay": self.decay, "windows": self.windows, "tokens": self.tokens,
                 "load": self._mean_LE.tolist()}  # fmt: skip
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(facts) + "\n", "utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}; choose a file in a folder you may write") from None

    @classmethod
    def load(cls, path: str | Path) -> Loads:
        """The same object again, to the last bit."""
        try:
            facts = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give a file that Loads.save wrote") from None
        except ValueError:
            raise UserError(f"{path} is not JSON; give a file that Loads.save wrote") from None
        mean_LE = _checked(facts, path)
        loads = cls(*mean_LE.shape, decay=facts["decay"])
        loads.windows, loads.tokens, loads._mean_LE = facts["windows"], facts["tokens"], mean_LE
        return loads


def counts(routing: Tensor, n_layers: int, n_experts: int) -> NDArray[np.int64]:
    """How many of these T tokens chose each expert, [L, E], from a record [T, L, K]."""
    if routing is None:
        raise UserError("this completion has no record of its routing; generate with record_routing=True")
    if routing.ndim != 3 or routing.shape[1] != n_layers or routing.is_floating_point():
        raise UserError(
            f"a record of routing is whole numbers [tokens, {n_layers} layers, experts per token], this one is "
            f"{str(routing.dtype).removeprefix('torch.')} {list(routing.shape)}; add what an engine with the same "
            "model recorded"
        )
    expert_TLK = routing.long()
    if expert_TLK.numel() and not 0 <= expert_TLK.min() <= expert_TLK.max() < n_experts:
        raise UserError(
            f"a record of routing names experts {int(expert_TLK.min())} to {int(expert_TLK.max())} of a model that has "
            f"{n_experts}; add what an engine with the same model recorded"
        )
    cell_TLK = expert_TLK + n_experts * torch.arange(n_layers, device=routing.device)[:, None]
    count = torch.bincount(cell_TLK.flatten(), minlength=n_layers * n_experts)
    return count.view(n_layers, n_experts).cpu().numpy()


def _checked(facts: Any, path: str | Path) -> NDArray[np.float64]:
    """The table [L, E] of a file's contents, all of which can be trusted afterwards."""

    def wrong(what: str) -> UserError:
        return UserError(f"{path}: {what}; record the loads again")

    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise wrong(f'not a file of expert loads ("format" is not "{FORMAT}")')
    decay = facts.get("decay")
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise wrong(f'"decay" is {decay!r}, not a number between 0 and 1')
    for key in ("windows", "tokens"):
        if type(facts.get(key)) is not int or facts[key] < 0:
            raise wrong(f'"{key}" is {facts.get(key)!r}, not a whole number of at least 0')
    try:
        mean_LE = np.array(facts.get("load"), dtype=np.float64)
    except (TypeError, ValueError):
        mean_LE = np.empty(0)
    if mean_LE.ndim != 2 or not mean_LE.size or not np.isfinite(mean_LE).all() or (mean_LE < 0).any():
        raise wrong('"load" is not a table [layers, experts] of counts, 0 or more')
    return mean_LE
