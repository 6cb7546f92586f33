"""slime: `RolloutManager._post_process_rewards`, from a checkout (SLIME=folder). No sglang: its names stay empty."""

from types import SimpleNamespace

import numpy as np
from table_model import absent, checkout

checkout("SLIME")
absent("sglang", "sglang_router", "slime.backends.sglang_utils", "slime.utils.health_monitor", "slime.utils.http_utils")

import slime.ray.rollout as rollout  # noqa: E402
from slime.utils.types import Sample  # noqa: E402

Manager = rollout.RolloutManager.__ray_metadata__.modified_class


def group_advantages(rewards, groups, std, eps):
    if std == "population":
        raise NotImplementedError("divides by the standard deviation of a sample (n - 1)")
    order = np.argsort(groups, kind="stable")  # slime keeps the samples of a prompt together
    sizes = np.bincount(groups)
    args = SimpleNamespace(
        advantage_estimator="grpo", rewards_normalization=True, grpo_std_normalization=std == "sample",
        n_samples_per_prompt=int(sizes.max()), rollout_batch_size=int((sizes > 0).sum()), reward_key=None,
    )  # fmt: skip
    samples = [
        Sample(group_index=int(groups[i]), index=int(i), reward=float(rewards[i]), tokens=[0, 1], response_length=1)
        for i in order
    ]
    manager = SimpleNamespace(args=args, custom_reward_post_process_func=None)
    _, normalised = Manager._post_process_rewards(manager, samples)
    advantages = np.empty(len(rewards))
    advantages[order] = normalised
    return {"advantages": advantages}
