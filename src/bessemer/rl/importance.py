"""What sampler and trainer disagree on, measured and corrected before the first update of a rollout.

The two are one network here, so on the policy that drew it the gap is rounding alone. It is more where samples are
older than the policy (`ahead`), or where another sampler or another number format drew them. With a correction, pi_old
of the objective is the trainer's policy before the updates, which keeps the clip about the updates alone, and the
distance from there to the sampler is weighed apart (rl/correction.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer
from bessemer.rl import replay
from bessemer.rl.correction import CORRECTIONS
from bessemer.rl.objective import policy_logprobs
from bessemer.workers import Workers


class Gap:
    """`close(batches)` before the first update of a rollout."""

    def __init__(self, model: Transformer, workers: Workers, settings: RLConfig) -> None:
        self.model, self.workers, self.settings = model, workers, settings
        if settings.routing_replay and all(layer.dense for layer in model.layers):
            raise UserError(
                f'stage "{settings.name}": routing_replay has nothing to replay, no layer of this model has routed '
                "experts; set it to false"
            )

    def close(self, batches: list[Batch]) -> dict[str, float]:
        """Figures of all batches of a rollout; with a correction the batches get its weights."""
        figures = {}
        if self.settings.routing_replay:  # one forward more, so of one micro-batch
            figures["rl/routing_disagreement"] = replay.disagreement(self.model, batches[0])
        if self.settings.correction != "none":
            figures |= self._correct(batches)
        return figures

    def _correct(self, batches: list[Batch]) -> dict[str, float]:
        weigh, found = CORRECTIONS[self.settings.correction], []
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            sampler_BT, keep = batch.extras["old_logp_BT"], batch.loss_BT.flatten().nonzero().squeeze(1)
            log_ratio_N = (logp_BT - sampler_BT).flatten()[keep]
            found.append(weigh(log_ratio_N, keep // batch.loss_BT.shape[1], self.settings.correction_cap))
            weight_BT = torch.zeros_like(logp_BT)
            weight_BT.view(-1)[keep] = found[-1].weight
            batch.extras |= {"sampler_logp_BT": sampler_BT, "old_logp_BT": logp_BT, "importance_BT": weight_BT}
        means = {name: torch.cat([getattr(part, name) for part in found]).mean().item() for name in ("weight", "cut")}
        return {f"rl/correction_{name}": mean for name, mean in means.items()}

    def _logprobs(self, batch: Batch) -> Tensor:
        return policy_logprobs(self.model, batch.to(self.model.embed.weight.device), self.settings.temperature).cpu()
