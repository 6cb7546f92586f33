"""A sampler that draws more answers than are trained on, and keeps the shortest."""

from bessemer.rl.sampler import LocalSampler


class Shortest(LocalSampler):
    def __init__(self, *parts, extra: int = 2):
        super().__init__(*parts)
        self.extra = extra

    def sample(self, prompts, apart=False, **options):
        drawn = super().sample(prompts, **options | {"samples": options["samples"] + self.extra})
        return [sorted(answers, key=lambda answer: len(answer.tokens))[: options["samples"]] for answers in drawn]
