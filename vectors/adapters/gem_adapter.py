"""gem: the advantages of its GRPO example for oat, from a checkout (GEM=folder).

`Actor` normalises the episodes of a prompt, `Learner` whatever it receives, each by the script's own default settings.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from table_model import absent, checkout

folder = checkout("GEM")
absent("oat", "vllm", "tree", "launchpad")
sys.path.insert(0, str(folder / "examples" / "train_oat"))

import train_oat_grpo as script  # noqa: E402

script.TransitionData = SimpleNamespace


def group_advantages(rewards, groups, std, eps):
    if std == "sample" or (np.bincount(groups) == 1).any():
        raise NotImplementedError("divides by the standard deviation of the population, groups of two and more")
    args = script.Args()
    args.critic_type2, args.num_samples = {"population": "grpo", "none": "drgrpo"}[std], 2
    actor, learner = object.__new__(script.Actor), object.__new__(script.Learner)
    actor.args = learner.args = args
    learner.strategy = SimpleNamespace(all_reduce=lambda value, op: value)
    rows, transitions = [], []
    for group in sorted(set(groups.tolist())):
        members = np.flatnonzero(groups == group)
        episodes = [
            [SimpleNamespace(
                reward=float(rewards[i]), prompt="", prompt_ids=[0], response="", response_ids=[0, 0],
                response_logprobs=[0.0, 0.0], response_is_truncated=False, action_is_formatted=True,
            )]
            for i in members
        ]  # fmt: skip
        rows.extend(members.tolist())
        transitions.extend(actor.prepare_group_of_episodes(episodes))
    received = torch.tensor([t.rewards for t in transitions], dtype=torch.float64)
    advantages = np.empty(len(rewards))
    advantages[rows] = learner.compute_monte_carlo_advantages(received, torch.ones_like(received))
    return {"advantages": advantages}
