"""A task: twice a number, an even one in training and an odd one in tests."""

from bessemer.tasks import Problem, Task


class Double(Task):
    def make(self, split, index, seed, language, phrasing):
        n = 2 * index + (split == "test")
        return Problem(f"double/{split}/{index}", f"Compute 2*{n}.", language, {"value": 2 * n})
