"""A control of RL: a reward that does not depend on the answer. What a run gains under it, the task did not teach."""

from bessemer.rl.reward import Samples
from bessemer.tasks import stable_hash


def coin(samples: Samples) -> list[int]:
    pairs = zip(samples.problems, samples.tokens, strict=True)
    return [stable_hash("coin", problem.id, index, *tokens) & 1 for index, (problem, tokens) in enumerate(pairs)]
