"""A loss whose gradient fades as the ratio leaves 1, where PPO's clip cuts it off."""

import torch


def soft_clip(logp_N, old_logp_N, advantage_N, output_N, *, width: float = 0.2):
    ratio = (logp_N - old_logp_N).exp()
    return advantage_N * (1 + width * torch.tanh((ratio - 1) / width))
