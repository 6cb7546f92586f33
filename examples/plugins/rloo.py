"""RLOO (Ahmadian et al. 2024): a sample's baseline is the mean reward of the other samples of its prompt."""


def rloo(rewards_PG, groups):
    others = rewards_PG.shape[1] - 1
    return rewards_PG - (rewards_PG.sum(1, keepdim=True) - rewards_PG) / others
