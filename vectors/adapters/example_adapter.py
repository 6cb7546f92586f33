"""An adapter: one function per topic that the project has. Here the project is 20 lines of numpy, with two slips."""

import numpy as np

NAME = "example"


def group_advantages(rewards, groups, std, eps):
    if std != "sample":
        raise NotImplementedError("divides by n - 1")
    per_prompt = rewards.reshape(-1, np.bincount(groups).max())  # slip: rows of a prompt need not be neighbours
    centred = per_prompt - per_prompt.mean(1, keepdims=True)
    return (centred / (per_prompt.std(1, ddof=1, keepdims=True) + eps)).reshape(-1)


def loss_weights(mask, micro_batch, level, length):
    if level != "token":
        raise NotImplementedError("means over tokens only")
    weights = np.zeros(mask.shape)
    for number in np.unique(micro_batch):
        rows = micro_batch == number
        weights[rows] = mask[rows] / mask[rows].sum() / len(np.unique(micro_batch))  # slip: a mean of means
    return weights


def sequence_ratio(logprobs, old_logprobs, mask):
    return np.exp(((logprobs - old_logprobs) * mask).sum(1) / mask.sum(1))
