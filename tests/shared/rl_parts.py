"""Parts of an RL stage as a recipe writes them."""

from functools import partial

from bessemer import plugins
from bessemer.config.rl import RLConfig
from bessemer.rl import algorithms
from bessemer.rl.reward import Reward

LOSSES = ("grpo", "gspo", "cispo", "reinforce")
assert algorithms.LOSS


def reward(*terms):
    """`reward("accuracy", ("format", 0.1))`: names, names with a weight, or tables."""
    tables = [{"name": term[0], "weight": term[1]} if isinstance(term, tuple) else term for term in terms]
    return Reward.of_config(RLConfig(kind="rl", name="zero", tasks=["sums"], reward=tables))


def rewarded(rows, *terms):
    """The rewards of these samples."""
    reward(*terms).score([[row] for row in rows])
    return [row.reward for row in rows]


def loss_of(name="grpo", low=0.2, high=0.28):
    """A loss of the package with these clips, if it has any."""
    clips = {} if name == "reinforce" else {"clip_low": low, "clip_high": high}
    return partial(plugins.find("losses", name), **clips)


def assign(groups, advantage):
    """Sets the advantages of scored samples."""
    config = RLConfig(kind="rl", name="zero", tasks=["sums"], advantage=advantage)
    algorithms.advantage_of(config)(None).assign(groups)
