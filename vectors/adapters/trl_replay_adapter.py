"""TRL: `GRPOWithReplayBufferTrainer`, in the versions that have it: the mask of a group that comes from the buffer.

First step: the completions of the case, with rewards that differ, so that they are kept. Second step: the same prompts
with equal rewards, so that the buffered completions take their place. A KL term against another table shows which
tokens train: its gradient is that of one token times the token's weight, whatever the advantages.
"""

import numpy as np
import trl_adapter
from trl.experimental.grpo_with_replay_buffer import GRPOWithReplayBufferConfig, GRPOWithReplayBufferTrainer


def loss_mask(completion_mask, tool_mask, truncated):
    if truncated.any():
        raise NotImplementedError("completions that end")
    rewards = 1e-7 * trl_adapter._weightless(len(completion_mask))
    gradients, calls = [], []

    def reward(row, **_):
        calls.append(row)
        return [float(rewards[b]) if len(calls) == 1 else 0.0 for b in row]

    start = np.full(completion_mask.shape, -1.0)
    trainer, table = trl_adapter._trainer(
        start, trl_adapter._rollout(completion_mask, tool_mask, truncated), reward, cls=GRPOWithReplayBufferTrainer,
        config_cls=GRPOWithReplayBufferConfig, rate=1e-12, replay_buffer_size=1, max_steps=2, loss_type="dapo",
        scale_rewards="none", **trl_adapter.PLAIN_KL,
    )  # fmt: skip
    trainer.beta, trainer.ref_model = 1.0, trl_adapter.TableLM(trl_adapter.TableConfig(), start - 0.2)
    table.register_hook(lambda gradient: gradients.append(gradient.numpy().copy()))
    trainer.train()
    weights = gradients[1] / (1 - np.exp(-0.2))
    mask = np.abs(weights) > 1e-4
    return {"mask": mask, "tokens": round(1 / float(np.median(weights[mask])))}
