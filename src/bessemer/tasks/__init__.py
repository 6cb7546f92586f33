"""Problems, verifiers and the documents that teach them: `tasks.get("countdown")`.

A task is one object with three uses: its problems feed RL and evaluation, its verifier gives the reward, its documents
join the pre-training mixture. Pure Python and numpy; nothing here imports torch.
"""

from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.registry import get, names

__all__ = ["Problem", "Task", "Verdict", "get", "names", "stable_hash"]
