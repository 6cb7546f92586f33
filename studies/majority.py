"""A reward without labels: 1 for the answer that most samples of the problem give, in the right form (self-consistency)."""

from collections import Counter

from bessemer.rl.reward import Samples


def majority(samples: Samples) -> list[float]:
    """Answers are compared in canonical form; of equally frequent ones the first counts. No readable answer: 0."""
    votes: dict[int, Counter[str]] = {}
    for group, verdict in zip(samples.groups, samples.verdicts, strict=True):
        if verdict.answer is not None:
            votes.setdefault(group, Counter())[verdict.answer] += 1
    chosen = {group: counted.most_common(1)[0][0] for group, counted in votes.items()}
    return [
        float(verdict.formatted and verdict.answer is not None and verdict.answer == chosen[group])
        for group, verdict in zip(samples.groups, samples.verdicts, strict=True)
    ]
