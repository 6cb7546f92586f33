"""Parts of an RL stage as a recipe writes them."""

from functools import partial
from types import SimpleNamespace

import torch

from bessemer import plugins
from bessemer.config.rl import RLConfig
from bessemer.rl import algorithms
from bessemer.rl.losses import logprobs_of
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import Packing
from bessemer.train.collective import Collective
from bessemer.workers import Workers

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


def to_batches(samples, pad_id, max_tokens, normalise, n_pipelines=1, packs=False):
    """The batches of these samples, on one process or for several pipelines; by default each has a row."""
    packing = Packing(max_tokens, pad_id, normalise, n_pipelines, packs=packs)
    return [packing.batch(part, part) for part in packing.parts(samples)]


@torch.no_grad()
def policy_logprobs(model, batch, temperature):
    """log pi of every trained token, [B, T], 0 elsewhere."""
    out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=False, **batch.routed)
    return logprobs_of(out, model.head_weight, batch, temperature=temperature)


def reference_logprobs(model, batch, temperature):
    """The same of a model that chooses its experts itself."""
    return policy_logprobs(model, batch.unrouted(), temperature)


def collective_of(model):
    """That of one process, of a model that no trainer trains."""
    collective = Collective()
    collective.trainer = SimpleNamespace(model=model, plan=SimpleNamespace(workers=Workers()))
    return collective
